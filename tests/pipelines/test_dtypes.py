"""bfloat16 and float16 in displaced steps on several devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distrijax import DistriConfig, DistriSDXLPipeline

CALL = {"height": 64, "width": 64, "num_inference_steps": 6, "output_type": "latent"}


def latents(checkpoint, dtype: str, devices: int, **settings) -> np.ndarray:
    config = DistriConfig(devices=devices, warmup_steps=1, split_batch=False, **settings)
    pipe = DistriSDXLPipeline.from_pretrained(checkpoint, config, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    assert {leaf.dtype for leaf in jax.tree.leaves(pipe._unet.params)} == {jnp.dtype(dtype)}
    return np.asarray(pipe("a red circle", **CALL).images)


@pytest.fixture(scope="module")
def exact(shallow_checkpoint) -> dict[int, np.ndarray]:
    """In float32, by the number of devices."""
    return {devices: latents(shallow_checkpoint, "float32", devices) for devices in (1, 2)}


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_costs_no_more_where_steps_are_displaced(shallow_checkpoint, exact, dtype):
    """Two devices are from their float32 as far as one device is from its own; both are rounded in as many places.

    What is displaced is no further from one device than in float32, but for that rounding.
    """
    one, two = (latents(shallow_checkpoint, dtype, devices) for devices in (1, 2))
    rounding = distance(one, exact[1])
    assert 0 < rounding < 10 * float(jnp.finfo(dtype).eps)
    assert distance(two, exact[2]) < 2 * rounding
    assert abs(distance(two, one) - distance(exact[2], exact[1])) < 3 * rounding
    assert two.dtype == np.float32
