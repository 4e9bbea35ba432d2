"""How all tests run: eight virtual CPU devices, strict dtypes and ranks, shapes checked in some; a small random checkpoint."""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import os
import re
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if os.environ["JAX_PLATFORMS"] == "cpu":  # programs are small: compiling them is what takes long
    flags = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # later versions have these emitters alone
        flags.append("--xla_cpu_use_fusion_emitters=false")  # a quarter of the time to compile
    os.environ.setdefault("XLA_FLAGS", " ".join(flags))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's idle threads spin, and would take the cores from JAX
os.environ.setdefault("MALLOC_ARENA_MAX", "2")  # read by the workers; each thread that compiles would keep an arena

gc.set_threshold(50_000, 10, 10)  # tracing makes objects by the million; looking at them all took a tenth of the time

import jax
import jaxtyping
import pytest
from jaxtyping import install_import_hook
from memory import give_memory_back, memory

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

TYPED = {
    "models": "attention blocks clip convolution layers unet vae",
    "parallel": "collectives compression displaced exchange moments",
    "sampling": "decode denoise noise",
}
"""Modules that compute. Others warn, and a warning that goes through the hook's wrappers would name them as its place."""
install_import_hook(
    ["distrijax.schedulers", *(f"distrijax.{room}.{name}" for room, names in TYPED.items() for name in names.split())],
    "array_types.check",
)
CHECKED = {
    f"test_{name}"
    for name in (
        "clip compression convolution denoise exchange layers schedulers schedulers_agree schedulers_exact unet vae fixed"
    ).split()
}
"""Test files in which the arguments of those modules' functions are checked; everywhere it would take a seventh of the time."""


STARTED, PEAKS = time.time(), pytest.StashKey[dict[str, float]]()
"""When this process began, and the largest memory of each worker that has ended, in GB."""


def pytest_configure(config: pytest.Config) -> None:
    """Compiled programs are kept from run to run, in pytest's cache unless the environment names another folder."""
    folder = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("jax")))
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    config.stash[PEAKS] = {}


LONG = (
    "invariants pipeline processes traffic any_size few_steps train_tiny unet pipeline_sd default_model evaluate sharding"
).split()
"""Files that take minutes. They come first, or one process would be left alone with the last of them."""


NEEDS_TORCH = re.compile(
    r"^(?:from|import) (?:accelerate|adapters|diffusers|oracle|peft|safetensors\.torch|scheduler_runs|tensor_files"
    r"|test_tokenizer|test_unet|tiny_pipeline|torch|torchmetrics|transformers)\b",
    re.MULTILINE,
)
"""Imports of test files whose oracle is torch, and of the helpers that import it."""


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Where torch is not installed, files that compare with it are left out."""
    if importlib.util.find_spec("torch") is not None or collection_path.suffix != ".py":
        return None
    return bool(NEEDS_TORCH.search(collection_path.read_text(encoding="utf-8"))) or None


SLOW = {"test_convert_command", "test_interrupts", "test_processes", "test_same_as"}
"""Files of which every test is slow: they start interpreters, or read and write whole checkpoints."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """What was imported stays: the collector need not look at it again and again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["peak"] = memory("VmHWM")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    """A worker of pytest-xdist has ended."""
    node.config.stash[PEAKS][node.gateway.id] = getattr(node, "workeroutput", {}).get("peak", 0.0)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    peaks = config.stash[PEAKS] or {"this process": memory("VmHWM")}
    each = ", ".join(f"{name} {peak:.2f} GB" for name, peak in sorted(peaks.items()))
    minutes, seconds = divmod(round(time.time() - STARTED), 60)
    terminalreporter.write_line(f"peak memory: {each}; wall time: {minutes} min {seconds} s")


@pytest.fixture(autouse=True, scope="module")
def _check_arrays(request):
    jaxtyping.config.update("jaxtyping_disable", request.module.__name__ not in CHECKED)


@pytest.fixture(autouse=True, scope="module")
def _give_memory_back():
    yield
    give_memory_back()


GROWTH = pytest.StashKey[float]()
"""Resident memory at which to give some back, in GB."""


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    if memory("VmRSS") > item.config.stash.setdefault(GROWTH, 1.5):
        give_memory_back()
        item.config.stash[GROWTH] = memory("VmRSS") + 0.3


@pytest.fixture(autouse=True)
def _seed_torch():
    """Torch draws the same numbers whatever ran before; tests without torch need not wait for its import."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A small random SDXL checkpoint, a folder in the diffusers layout; copy it before changing it."""
    pytest.importorskip("torch")
    from tiny_pipeline import save_tiny_pipeline

    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_pipeline(folder)
    return folder


@pytest.fixture(scope="session")
def shallow_checkpoint(tmp_path_factory) -> Path:
    """A checkpoint like `tiny_checkpoint` for tests of much else than the UNet: its own compiles in half the time."""
    pytest.importorskip("torch")
    from tiny_pipeline import SHALLOW, save_tiny_pipeline

    folder = tmp_path_factory.mktemp("shallow")
    save_tiny_pipeline(folder, **SHALLOW)
    return folder


@pytest.fixture(scope="session")
def tiny_sd_checkpoints(tmp_path_factory) -> dict[int, Path]:
    """Small random checkpoints like Stable Diffusion 1.x and 2.x (v-prediction), by version: 1 and 2."""
    pytest.importorskip("torch")
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
