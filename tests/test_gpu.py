"""The pipeline on GPUs, one and several: JAX_PLATFORMS=cuda,cpu pytest -n 0 -m gpu. Passed over where there are none."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from distrijax import DEFAULT_MODEL, DistriConfig, load_pipeline

pytestmark = pytest.mark.gpu

CALL = {"prompt": "a red circle", "height": 128, "width": 128, "num_inference_steps": 6, "output_type": "np"}


def images(devices: int, **settings) -> np.ndarray:
    settings, dtype = {"warmup_steps": 1, **settings}, settings.pop("dtype", "float32")
    if len(jax.devices()) < devices or jax.devices()[0].platform != "gpu":
        pytest.skip(f"needs {devices} GPUs")
    pipe = load_pipeline(DEFAULT_MODEL, DistriConfig(devices=devices, **settings), dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    with jax.default_matmul_precision("highest"):
        return pipe(**CALL).images


def mean_difference(one: np.ndarray, other: np.ndarray) -> float:
    """Of pixels in 0 to 1."""
    return float(np.abs(one - other).mean())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_one_gpu_generates_in_every_dtype_what_it_does_in_float32(dtype):
    assert mean_difference(images(1, dtype=dtype), images(1)) < 0.02


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_several_gpus_generate_what_one_does(devices):
    """All steps synchronous, so only the order of sums differs; displaced ones differ by little."""
    one = images(1)
    assert mean_difference(images(devices, sync_mode="full_sync"), one) < 1e-3
    assert mean_difference(images(devices), one) < 0.05
