"""Seeds as callers give them: numbers, arrays of any library, keys of JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from facts import refuses

from distrijax import DistriError
from distrijax.pipelines.call import image_seeds


@pytest.mark.parametrize("array", [np.array, jnp.asarray, torch.tensor])
def test_seeds_may_be_arrays_of_any_library(array):
    np.testing.assert_array_equal(image_seeds(array(3), 2), image_seeds(3, 2))
    np.testing.assert_array_equal(image_seeds(array([3, 4]), 2), image_seeds([3, 4], 2))
    np.testing.assert_array_equal(image_seeds([array(3), 4], 2), image_seeds([3, 4], 2))
    for wrong in (array(True), array(1.0), array(-1), array([[3], [4]]), np.array("3")):
        with pytest.raises(DistriError, match=r"\bseed\b"):
            image_seeds(wrong, 2)


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg"])
def test_keys_of_jax_are_seeds(implementation):
    """A key is one seed, not two; `jax.random.key(3)` is the seed 3."""
    key, raw = jax.random.key(3, impl=implementation), jax.random.PRNGKey(3)
    np.testing.assert_array_equal(image_seeds(key, 2), image_seeds(3, 2))
    np.testing.assert_array_equal(image_seeds(raw, 2), image_seeds(3, 2))
    both = [jax.random.key(3, impl=implementation), jax.random.key(2**32 - 1, impl=implementation)]
    np.testing.assert_array_equal(image_seeds(both, 2), image_seeds([3, 2**32 - 1], 2))
    split = jax.random.split(jax.random.key(0), 2)
    words = np.asarray(jax.random.key_data(split))
    np.testing.assert_array_equal(image_seeds(split, 2), np.stack([words[:, 1], words[:, 0], [0, 0]], 1))
    np.testing.assert_array_equal(image_seeds(jax.random.key_data(split), 2), image_seeds(split, 2))
    with refuses("seed", 2, 3):
        image_seeds(split, 3)
