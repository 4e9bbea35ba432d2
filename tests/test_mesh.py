"""The planner: which sizes the axes get, how devices lie on them, and which picture sizes fit."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest

from distrijax.config import DistriConfig, DistriError
from distrijax.mesh import CFG, DATA, PATCH, MeshPlan, check_sizes, plan_mesh


@pytest.mark.parametrize(
    ("settings", "devices", "wanted"),
    [
        ({}, 1, (1, 1, 1)),
        ({}, 2, (1, 2, 1)),
        ({}, 8, (1, 2, 4)),
        ({}, 3, (1, 1, 3)),
        ({"split_batch": False}, 8, (1, 1, 8)),
        ({"cfg": 1}, 8, (1, 1, 8)),
        ({"patch": 8}, 8, (1, 1, 8)),
        ({"patch": 2}, 4, (1, 2, 2)),
        ({"data": 2}, 8, (2, 2, 2)),
        ({"data": 4, "cfg": 2}, 8, (4, 2, 1)),
        ({"data": 2, "split_batch": False}, 8, (2, 1, 4)),
    ],
)
def test_plan(settings, devices, wanted):
    assert plan_mesh(DistriConfig(**settings), devices) == MeshPlan(*wanted)


@pytest.mark.parametrize(
    ("settings", "devices", "product"),
    [({"patch": 3}, 8, 3), ({"cfg": 2}, 3, 2), ({"data": 3}, 8, 6), ({"data": 16}, 8, 0)],
)
def test_sizes_that_do_not_fill_the_devices_are_refused(settings, devices, product):
    with pytest.raises(DistriError, match=f"is {product} and devices is {devices}; choose axis sizes"):
        plan_mesh(DistriConfig(**settings), devices)


def test_branches_get_a_half_each_and_bands_lie_side_by_side():
    devices = jax.devices()
    mesh = MeshPlan(1, 2, 4).build(devices)
    assert mesh.shape == {DATA: 1, PATCH: 4, CFG: 2}
    assert [list(mesh.devices[0, :, branch]) for branch in (0, 1)] == [devices[:4], devices[4:]]


def test_pictures_lie_on_blocks_of_devices():
    ids = np.vectorize(lambda device: device.id)(MeshPlan(2, 2, 2).build(jax.devices()).devices)
    assert ids[0].ravel().tolist() == [0, 2, 1, 3]
    assert ids[1].ravel().tolist() == [4, 6, 5, 7]


def test_plan_reads_as_a_sentence_part():
    assert str(MeshPlan(1, 2, 4)) == "data 1 x cfg 2 x patch 4"
    assert MeshPlan(1, 2, 4).devices == 8


SDXL = {"vae_scale": 8, "levels": 3}


@pytest.mark.parametrize(
    ("size", "patches"), [((1024, 1024), 8), ((256, 32), 8), ((96, 1024), 3), ((2048, 4096), 4), ((32, 32), 1)]
)
def test_sizes_that_divide(size, patches):
    check_sizes(height=size[0], width=size[1], patches=patches, **SDXL)


@pytest.mark.parametrize(
    ("size", "patches", "sentence"),
    [
        ((1000, 1024), 4, "height is 1000 and 4 patches need a multiple of 128; use 896 or 1024"),
        ((100, 1024), 8, "height is 100 and 8 patches need a multiple of 256; use 256"),
        ((1024, 1000), 4, "width is 1000 and this model needs a multiple of 32; use 992 or 1024"),
        ((0, 1024), 4, "height is 0"),
        ((1024, -32), 4, "width is -32"),
        ((1024.0, 1024), 4, "height is 1024.0"),
    ],
)
def test_sizes_that_do_not_divide_name_the_nearest_that_do(size, patches, sentence):
    with pytest.raises(DistriError, match=re.escape(sentence)):
        check_sizes(height=size[0], width=size[1], patches=patches, **SDXL)
