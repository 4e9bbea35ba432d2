"""Any size on any number of devices: what many devices compute in synchronous steps is what one device computes.

Small random models of SDXL's shape and of Stable Diffusion's, of three levels, and one of two: latents after a whole step.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
from marks import slow, slow_but
from oracle import psnr, relative_error

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
    ("SD", 384, 384, 8),
    ("SD", 64, 64, 8),
]
EVERY_FAMILY = pytest.mark.parametrize("family", ["SDXL", "SD"])


@pytest.fixture(scope="module")
def generate(tiny_checkpoint, shallow_checkpoint, tiny_sd_checkpoints):
    """Latents or images by family, size and configuration; those of one device are computed once."""

    folders = {"SDXL": tiny_checkpoint, "shallow": shallow_checkpoint, "SD": tiny_sd_checkpoints[1]}

    @functools.lru_cache(2)
    def pipeline(family: str, **settings):
        pipe = load_pipeline(folders[family], DistriConfig(**settings))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @functools.cache
    def latents(family: str, height: int, width: int, kind: str = "latent", steps: int = 1, **settings) -> np.ndarray:
        call = dict(height=height, width=width, num_inference_steps=steps, output_type=kind, chunk_size=None)
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
def test_images_of_any_size_are_decoded_by_all_devices(generate, devices):
    got = generate("shallow", 136, 72, kind="np", devices=devices, sync_mode="full_sync")
    assert got.shape == (1, 136, 72, 3)
    assert psnr(got, generate("shallow", 136, 72, kind="np", devices=1)) > 80


@slow
def test_displaced_steps_of_uneven_bands_start_from_the_synchronous_ones(generate):
    """Three steps of which one is displaced: near the exact result, and not it."""
    size = dict(height=136, width=72, steps=3, devices=5)
    exact = generate("shallow", **size, sync_mode="full_sync")
    error = relative_error(generate("shallow", **size, warmup_steps=1), exact)
    assert 1e-5 < error < 0.3


@slow
@pytest.mark.parametrize("scheme", ["row", "column", "alternate"])
def test_naive_patches_reach_beyond_the_border_and_are_cut(generate, scheme):
    settings = dict(devices=3, parallelism="naive_patch", split_scheme=scheme)
    got = generate("shallow", 136, 200, **settings)
    assert got.shape[2:] == (17, 25)
    assert np.isfinite(got).all()


@slow
def test_the_first_naive_patch_is_an_image_of_its_own(shallow_checkpoint):
    """17 rows among 3 devices are bands of 6, and the first is one device's image of 6 rows."""
    noise = np.random.default_rng(1).standard_normal((1, 4, 17, 25), np.float32)
    call = dict(
        width=200, num_inference_steps=2, output_type="latent", original_size=(136, 200), target_size=(136, 200)
    )

    def pipe(**settings):
        return load_pipeline(shallow_checkpoint, DistriConfig(**settings))

    naive = pipe(devices=3, parallelism="naive_patch", split_scheme="row")
    got = np.asarray(naive("a red circle", height=136, latents=noise, **call).images)
    alone = pipe(devices=1)("a red circle", height=48, latents=noise[:, :, :6], **call).images
    assert relative_error(got[:, :, :6], alone) < CLOSE
