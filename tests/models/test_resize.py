"""Bicubic resizing on bands of rows, against torch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec as P
from oracle import nhwc, relative_error
from torch.nn.functional import interpolate

from distrijax.models.resize import resize
from distrijax.parallel.bands import Bands
from distrijax.parallel.exchange import Synchronous, WholeImage
from distrijax.parallel.mesh import PATCH, MeshPlan

SIZES = {
    "half": ((32, 16), (16, 8)),
    "double": ((16, 8), (32, 16)),
    "odd": ((33, 17), (20, 12)),
    "odd, larger": ((20, 12), (33, 17)),
    "a sixth": ((96, 8), (16, 4)),
}


@pytest.mark.parametrize("patches", [1, 3, 8])
@pytest.mark.parametrize("name", SIZES)
def test_bands_are_resized_as_the_whole_map_in_torch(name, patches):
    """With 8 patches of few rows some need rows from beyond their neighbours."""
    size, wanted = SIZES[name]
    x = torch.randn(2, 5, *size)
    expected = nhwc(interpolate(x, size=wanted, mode="bicubic", align_corners=False))
    here, there = (Bands.among(rows, patches, levels=3) for rows in (size[0], wanted[0]))
    padded = np.zeros((2, patches * here.rows_per_device, size[1], 5), np.float32)
    padded[:, : size[0]] = nhwc(x)
    padded[:, size[0] :] = 7  # what lies in padding is not read

    def local(x):
        exchange = WholeImage() if patches == 1 else Synchronous(PATCH, here)
        return resize(x, exchange, "map", (size[0], wanted[0]), wanted[1], there)

    mesh = MeshPlan(1, 1, patches).build(jax.devices()[:patches])
    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P(None, PATCH), out_specs=P(None, PATCH)))
    got = run(jnp.asarray(padded))
    assert got.shape[1] == patches * there.rows_per_device
    assert relative_error(got[:, : wanted[0]], expected) < 1e-5
