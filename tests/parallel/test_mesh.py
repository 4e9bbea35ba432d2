"""The planner: which sizes the axes get, how devices lie on them, and which image sizes fit."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from facts import refuses

from distrijax.config import DistriConfig
from distrijax.parallel.bands import Bands
from distrijax.parallel.layout import check_sizes
from distrijax.parallel.mesh import CFG, DATA, EVERY_AXIS, PATCH, MeshPlan, plan_mesh


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
    [({"patch": 3}, 8, 3), ({"patch": 4, "cfg": 2}, 4, 8), ({"data": 16, "patch": 1}, 8, 16)],
)
def test_sizes_that_do_not_fill_the_devices_are_refused(settings, devices, product):
    with refuses("data", "cfg", "patch", product, "devices", devices):
        plan_mesh(DistriConfig(**settings), devices)


@pytest.mark.parametrize(
    ("settings", "devices", "told"),
    [
        ({"cfg": 2}, 1, ["cfg=2", "multiple of 2", 1]),
        ({"cfg": 2}, 3, ["cfg=2", "multiple of 2", 3]),
        ({"data": 3}, 8, ["data=3", "multiple of 3", 8]),
        ({"data": 16}, 8, ["data=16", "multiple of 16", 8]),
        ({"data": 2, "cfg": 2}, 2, ["data=2 x cfg=2", "multiple of 4", 2]),
        ({"devices": 4}, 8, [8, 4]),
        ({}, 0, [0, 1]),
        ({}, -2, [-2, 1]),
        ({}, 8.0, ["8.0", 1]),
    ],
)
def test_numbers_of_devices_that_can_not_be_are_refused(settings, devices, told):
    with refuses("devices", *told):
        plan_mesh(DistriConfig(**settings), devices)


def test_a_mesh_has_sizes_of_at_least_one_and_as_many_devices_as_they_need():
    with refuses("patch", 0, 1):
        MeshPlan(1, 2, 0)
    for count in (1, 8):
        with refuses("data 1", "cfg 2", "patch 2", "4 devices", count):
            MeshPlan(1, 2, 2).build(jax.devices()[:count])


def test_branches_get_a_half_each_and_bands_lie_side_by_side():
    devices = jax.devices()
    mesh = MeshPlan(1, 2, 4).build(devices)
    assert mesh.shape == {DATA: 1, PATCH: 4, CFG: 2}
    assert [list(mesh.devices[0, :, branch]) for branch in (0, 1)] == [devices[:4], devices[4:]]


def test_images_lie_on_blocks_of_devices():
    ids = np.vectorize(lambda device: device.id)(MeshPlan(2, 2, 2).build(jax.devices()).devices)
    assert ids[0].ravel().tolist() == [0, 2, 1, 3]
    assert ids[1].ravel().tolist() == [4, 6, 5, 7]


@pytest.mark.parametrize("plan", [MeshPlan(1, 2, 4), MeshPlan(4, 2, 1), MeshPlan(2, 1, 3)], ids=str)
def test_the_mesh_for_tracing_has_the_axes_of_the_one_with_devices_each_of_the_planned_size(plan):
    built = plan.build(jax.devices()[: plan.devices])
    for mesh in (built, plan.abstract()):
        assert mesh.axis_names == EVERY_AXIS
        assert dict(mesh.shape) == {"data": plan.data, "cfg": plan.cfg, "patch": plan.patch}


def test_plan_reads_as_a_sentence_part():
    assert str(MeshPlan(1, 2, 4)) == "data 1 x cfg 2 x patch 4"
    assert MeshPlan(1, 2, 4).devices == 8


@pytest.mark.parametrize(
    ("rows", "patches", "levels", "band"),
    [(128, 8, 3, 16), (96, 8, 3, 12), (96, 8, 4, 16), (125, 3, 3, 44), (8, 8, 3, 4), (125, 1, 3, 125), (9, 2, 1, 5)],
)
def test_bands_are_as_equal_as_the_levels_allow(rows, patches, levels, band):
    assert Bands.among(rows, patches, levels=levels) == Bands(rows, band)


def test_rows_of_the_image_are_halved_and_doubled_as_a_convolution_of_stride_2_and_an_upsampling_do():
    halved = [125, 63, 32]
    assert [Bands(125, 44).image_rows(band) for band in (44, 22, 11)] == halved
    assert [Bands(125, 42).image_rows(42 * scale) for scale in (1, 2, 8)] == [125, 250, 1000]


@pytest.mark.parametrize(("height", "width", "scale"), [(1024, 1024, 8), (768, 8, 8), (1000, 1016, 8), (1004, 4, 4)])
def test_any_multiple_of_the_autoencoders_scale_fits_and_nothing_between(height, width, scale):
    check_sizes(height=height, width=width, vae_scale=scale)
    for other in ({"height": height + scale // 2, "width": width}, {"height": height, "width": width + scale // 2}):
        with refuses(scale):
            check_sizes(**other, vae_scale=scale)


@pytest.mark.parametrize(
    ("size", "told"),
    [
        ((1001, 1024), "height 1001 8 1000 1008"),
        ((1024, 7), "width 7 8"),
        ((0, 1024), "height 0"),
        ((1024, -32), "width -32"),
        ((1024.0, 1024), "height 1024.0"),
    ],
)
def test_sizes_that_do_not_fit_name_the_nearest_that_do(size, told):
    with refuses(*told.split()):
        check_sizes(height=size[0], width=size[1], vae_scale=8)
