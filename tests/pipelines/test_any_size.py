"""Any size on any number of devices: what many devices compute in synchronous steps is what one device computes.

Latents after a whole step of small random models: SDXL's shape with its three levels, Stable Diffusion's with its four, and a
shallow one with two where the number of levels does not matter. Exchanges alone, of each mode with one and three levels, are in
tests/parallel/test_exchange.py; 1, 2, 4 and 8 devices at one size are in test_pipeline.py; the modes in test_invariants.py.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
from marks import slow, slow_but
from oracle import psnr, relative_error
from tiny_pipeline import save_tiny_sd_pipeline

from distrijax import DistriConfig, load_pipeline

CLOSE = 1e-4
GRID = [  # family, height, width, devices
    ("shallow", 200, 64, 7),
    ("SDXL", 384, 384, 8),  # three levels make six rows of the latent eight
    ("SDXL", 680, 696, 3),  # attention in chunks on each device
    ("SDXL", 64, 64, 8),  # the deepest level has two rows for eight devices
    ("SDXL", 8, 8, 2),  # one row and one column, at every level
    ("shallow", 136, 64, 5),
    ("SDXL", 136, 72, 6),
    ("SD", 384, 384, 8),  # four levels: two of eight devices have no row
    ("SD", 64, 64, 8),  # the deepest level has one row for eight devices
]
FOUR_LEVELS = {
    "block_out_channels": (32, 32, 32, 64),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
"""Stable Diffusion's, of a UNet."""
EVERY_FAMILY = pytest.mark.parametrize("family", ["SDXL", "SD"])


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint, shallow_checkpoint, tmp_path_factory):
    """A pipeline by family and configuration; the last two are kept."""
    folders = {"SDXL": tiny_checkpoint, "shallow": shallow_checkpoint, "SD": tmp_path_factory.mktemp("four-levels")}
    save_tiny_sd_pipeline(folders["SD"], 1, **FOUR_LEVELS)

    @functools.lru_cache(2)
    def load(family: str, **settings):
        pipe = load_pipeline(folders[family], DistriConfig(**settings))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return load


@pytest.fixture(scope="module")
def generate(pipeline):
    """Latents by family, size and configuration; those of one device are computed once."""

    @functools.cache
    def latents(family: str, height: int, width: int, steps: int = 1, **settings) -> np.ndarray:
        call = dict(height=height, width=width, num_inference_steps=steps, output_type="latent", chunk_size=None)
        return np.asarray(pipeline(family, **settings)("a red circle", **call).images)

    return latents


@pytest.mark.parametrize(("family", "height", "width", "devices"), slow_but(GRID[:1], GRID))
def test_full_sync_equals_one_device(generate, family, height, width, devices):
    got = generate(family, height, width, devices=devices, split_batch=False, sync_mode="full_sync")
    assert got.shape[2:] == (height // 8, width // 8)
    assert relative_error(got, generate(family, height, width, devices=1)) < CLOSE


@slow
@EVERY_FAMILY
def test_full_sync_equals_one_device_with_the_cfg_split(generate, family):
    """Three patches for each branch."""
    got = generate(family, 136, 72, devices=6, sync_mode="full_sync")
    assert relative_error(got, generate(family, 136, 72, devices=1)) < CLOSE


@slow
@pytest.mark.parametrize("devices", [3, 8])
def test_images_of_any_size_are_decoded_by_all_devices(pipeline, devices):
    latents = np.random.default_rng(2).standard_normal((1, 4, 17, 9), np.float32)
    got, wanted = (pipeline("shallow", devices=n).decode(latents, output_type="np").images for n in (devices, 1))
    assert got.shape == (1, 136, 72, 3)
    assert psnr(got, wanted) > 80


@slow
def test_displaced_steps_of_uneven_bands_start_from_the_synchronous_ones(generate):
    """Three steps of which one is displaced: near the exact result, and not it."""
    size = dict(height=136, width=72, steps=3, devices=5)
    exact = generate("shallow", **size, sync_mode="full_sync")
    error = relative_error(generate("shallow", **size, warmup_steps=1), exact)
    assert 1e-5 < error < 0.3


NAIVE = {"devices": 3, "parallelism": "naive_patch"}


@slow
def test_the_first_naive_patch_is_an_image_of_its_own(pipeline):
    """17 rows among 3 devices are bands of 6, and the first is one device's image of 6 rows."""
    noise = np.random.default_rng(1).standard_normal((1, 4, 17, 25), np.float32)
    call = dict(
        width=200, num_inference_steps=2, output_type="latent", original_size=(136, 200), target_size=(136, 200)
    )
    naive = pipeline("shallow", **NAIVE, split_scheme="row")
    got = np.asarray(naive("a red circle", height=136, latents=noise, **call).images)
    alone = pipeline("shallow", devices=1)("a red circle", height=48, latents=noise[:, :, :6], **call).images
    assert relative_error(got[:, :, :6], alone) < CLOSE


@slow
@pytest.mark.parametrize("scheme", ["row", "column", "alternate"])
def test_naive_patches_reach_beyond_the_border_and_are_cut(generate, scheme):
    got = generate("shallow", 136, 200, **NAIVE, split_scheme=scheme)
    assert got.shape[2:] == (17, 25)
    assert np.isfinite(got).all()
