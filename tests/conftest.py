"""How all tests run: eight virtual CPU devices, strict dtypes and ranks, shapes checked in some; a small random checkpoint."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0"
)  # programs are small: compiling them is what takes long
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's idle threads spin, and would take the cores from JAX

gc.set_threshold(50_000, 10, 10)  # tracing makes objects by the million; looking at them all took a tenth of the time

import jax
import jaxtyping
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

TYPED = ("models", "parallel", "sampling", "schedulers")
install_import_hook([f"distrijax.{room}" for room in TYPED], "array_types.check")
CHECKED = {
    f"test_{name}"
    for name in "clip compression convolution denoise exchange layers schedulers unet vae pipeline".split()
}
"""Test files in which the arguments of those modules' functions are checked; everywhere it would take a seventh of the time."""


def pytest_configure(config: pytest.Config) -> None:
    """Compiled programs are kept from run to run, in pytest's cache unless the environment names another folder."""
    folder = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("jax")))
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


LONG = (
    "invariants pipeline processes traffic any_size few_steps train_tiny unet pipeline_sd default_model evaluate sharding"
).split()
"""Files that take minutes. They come first, or one process would be left alone with the last of them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)


@pytest.fixture(autouse=True, scope="module")
def _check_arrays(request):
    jaxtyping.config.update("jaxtyping_disable", request.module.__name__ not in CHECKED)


@pytest.fixture(autouse=True, scope="module")
def _drop_compiled_programs():
    """Every compiled program holds memory maps, of which Linux gives a process 65530; XLA crashes when they run out."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(autouse=True)
def _seed_torch():
    """Torch draws the same numbers whatever ran before; tests without torch need not wait for its import."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A small random SDXL checkpoint, a folder in the diffusers layout; copy it before changing it."""
    from tiny_pipeline import save_tiny_pipeline

    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_pipeline(folder)
    return folder


@pytest.fixture(scope="session")
def shallow_checkpoint(tmp_path_factory) -> Path:
    """A checkpoint like `tiny_checkpoint` for tests of much else than the UNet: its own compiles in half the time."""
    from tiny_pipeline import SHALLOW, save_tiny_pipeline

    folder = tmp_path_factory.mktemp("shallow")
    save_tiny_pipeline(folder, **SHALLOW)
    return folder


@pytest.fixture(scope="session")
def tiny_sd_checkpoints(tmp_path_factory) -> dict[int, Path]:
    """Small random checkpoints like Stable Diffusion 1.x and 2.x (v-prediction), by version: 1 and 2."""
    from tiny_pipeline import save_tiny_sd_pipeline

    folders = {version: tmp_path_factory.mktemp(f"tiny-sd{version}") for version in (1, 2)}
    for version, folder in folders.items():
        save_tiny_sd_pipeline(folder, version)
    return folders


@pytest.fixture(scope="session")
def torch_pipe(tiny_checkpoint):
    """`tiny_checkpoint` in torch diffusers (StableDiffusionXLPipeline); tests share it, so leave it as it is."""
    from tiny_pipeline import load_torch_pipeline

    return load_torch_pipeline(tiny_checkpoint)
