"""How parameters lie on the mesh: nothing is lost, shapes are as announced, and a model put together again is the same."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from marks import slow
from oracle import relative_error
from unet_configs import BASE

from distrijax import DEFAULT_MODEL, DistriConfig, DistriSDXLPipeline
from distrijax.config import Parallelism
from distrijax.models.unet import UNet, abstract_unet
from distrijax.models.unet_config import UNetConfig
from distrijax.parallel.mesh import MeshPlan
from distrijax.weights import sharding
from distrijax.weights.sharding import FlatSharded, ModelLayout, OutputMajor, Replicated

MESHES = [MeshPlan(1, 1, 1), MeshPlan(1, 1, 3), MeshPlan(2, 2, 2)]


LEAST = 1000
"""Of the elements of what is shared out, here: these models are small."""


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", LEAST)


@pytest.fixture(scope="module")
def unet() -> UNet:
    return UNet(UNetConfig.from_dict(BASE), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("parallelism", list(Parallelism))
@pytest.mark.parametrize("shard", [False, True])
def test_shapes_are_those_of_the_placed_parameters(unet, parallelism, shard):
    mesh = MeshPlan(1, 1, 3).build(jax.devices()[:3])
    form = ModelLayout.of(abstract_unet(unet.config), parallelism, shard=shard)
    flat, place = nnx.to_flat_state(nnx.state(unet)), form.make_placer(mesh)
    for (path, leaf), shape, spec in zip(flat, form.abstract_params(mesh.shape, np.float32), form.specs, strict=True):
        placed = place(path, np.asarray(leaf.get_value()))
        assert (placed.shape, placed.sharding.spec) == (shape.shape, spec), path


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_what_is_shared_out_comes_back_bit_for_bit(unet, mesh):
    """Sizes that three devices do not divide among them."""
    form = ModelLayout.of(unet, shard=True)
    devices = mesh.build(jax.devices()[: mesh.devices])
    flat, place = nnx.to_flat_state(nnx.state(unet)), form.make_placer(devices)
    values = [np.asarray(leaf.get_value()) for _, leaf in flat]
    placed = tuple(place(path, value) for path, value in zip(form.paths, values, strict=True))
    parts = [part.inner if isinstance(part, OutputMajor) else part for part in form.layouts]
    shared = [isinstance(part, FlatSharded) for part in parts]
    assert any(shared) and not all(shared)
    for value, there, part in zip(values, placed, parts, strict=True):
        if isinstance(part, FlatSharded):
            assert value.size >= LEAST
            assert {shard.data.size for shard in there.addressable_shards} == {math.ceil(value.size / mesh.devices)}
    take = [index for index, part in enumerate(parts) if isinstance(part, FlatSharded | Replicated)]

    def back(params):
        leaves = jax.tree.leaves(form.module(params))
        return [leaves[index] for index in take]

    restored = jax.jit(jax.shard_map(back, mesh=devices, in_specs=(form.specs,), out_specs=P()))(placed)
    for index, value in zip(take, restored, strict=True):
        np.testing.assert_array_equal(value, values[index])


class Counted:
    """A parameter that counts how often each of its elements is read."""

    def __init__(self, value: np.ndarray):
        self.value, self.shape, self.reads = value, value.shape, np.zeros(value.shape, int)

    def __getitem__(self, block: tuple[slice, ...]) -> np.ndarray:
        self.reads[block] += 1
        return self.value[block]


@pytest.mark.parametrize("parallelism", list(Parallelism))
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_of_what_is_divided_a_device_reads_its_part_alone(unet, mesh, platform, parallelism):
    """Once for all devices of a process that hold the same. A share may begin and end within an output channel's row."""
    form = ModelLayout.of(unet, parallelism, shard=True, platform=platform)
    devices = mesh.build(jax.devices()[: mesh.devices])
    flat = zip(form.paths, form.shapes, form.layouts, strict=True)
    for (path, shape, part), value in zip(flat, jax.tree.leaves(unet), strict=True):
        counted, row = Counted(np.asarray(value)), math.prod(shape[:-1])
        everyone = form.make_placer(devices)(path, counted)
        if isinstance(part, OutputMajor | FlatSharded) and part.spec() != P():
            assert counted.reads.min() == 1 and counted.reads.sum() <= value.size + (mesh.devices - 1) * row
        else:
            assert (counted.reads == 1).all()
        index = everyone.sharding.devices_indices_map(everyone.shape)[devices.devices.flat[-1]]
        counted.reads[:] = 0
        part.block(counted, devices.shape, index)
        cuts = math.prod(devices.shape[axis] for axes in part.spec() if axes for axis in np.atleast_1d(axes))
        held = math.prod(part.global_shape(shape, devices.shape)) // cuts
        assert counted.reads.sum() <= held + (row if isinstance(part, OutputMajor | FlatSharded) and cuts > 1 else 0)


@pytest.mark.parametrize("parallelism", list(Parallelism))
@pytest.mark.parametrize("shard", [False, True])
def test_gpus_get_kernels_of_the_same_input_in_one_array_and_layers_get_them_back(unet, parallelism, shard):
    mesh = MeshPlan(1, 1, 1).build(jax.devices()[:1])
    form = ModelLayout.of(abstract_unet(unet.config), parallelism, shard=shard, platform="gpu")
    flat, place = nnx.to_flat_state(nnx.state(unet)), form.make_placer(mesh)
    values = [np.asarray(leaf.get_value()) for _, leaf in flat]
    placed = [place(path, value) for path, value in zip(form.paths, values, strict=True)]
    params = form.fuse_params(jax.tree.unflatten(form.structure, placed))
    announced = form.abstract_params(mesh.shape, np.float32)
    assert [array.shape for array in params] == [array.shape for array in announced]
    whole = not shard and parallelism is not Parallelism.TENSOR
    assert len(params) == len(values) - whole * 2 * len(unet._transformer_blocks())
    assert all(leaf.is_deleted() for array in form.arrays if len(array) > 1 for leaf in map(placed.__getitem__, array))
    back = jax.jit(
        jax.shard_map(
            lambda params: jax.tree.leaves(form.module(params)),
            mesh=mesh,
            in_specs=(form.specs,),
            out_specs=P(),
            check_vma=False,
        )
    )(params)
    for value, restored in zip(values, back, strict=True):
        np.testing.assert_array_equal(value, restored)


def test_only_projections_of_the_prompt_are_divided_in_every_parallelism(unet):
    form = ModelLayout.of(unet)
    divided = {path for path, part in zip(form.paths, form.layouts, strict=True) if not isinstance(part, Replicated)}
    assert divided == {path for path in form.paths if "attn2" in path and path[-2] in ("to_k", "to_v")}
    assert len(divided) == 2 * len(unet._transformer_blocks())


@slow
@pytest.mark.parametrize("settings", [{"devices": 6}, {"devices": 3, "parallelism": "tensor"}], ids=str)
def test_sharding_weights_changes_no_image(settings, shallow_checkpoint):
    def image(**shared) -> np.ndarray:
        config = DistriConfig(warmup_steps=0, **settings, **shared)
        pipe = DistriSDXLPipeline.from_pretrained(shallow_checkpoint, config)
        pipe.set_progress_bar_config(disable=True)
        return pipe("a red circle", height=64, width=64, num_inference_steps=3, output_type="np").images

    assert relative_error(image(shard_weights=True), image()) < 1e-5


def test_weights_are_read_whatever_transfers_are_forbidden(shallow_checkpoint):
    with jax.transfer_guard("disallow"):
        DistriSDXLPipeline.from_pretrained(shallow_checkpoint, DistriConfig(devices=2))


def test_each_device_keeps_its_share_of_all_models():
    def held(**settings) -> int:
        pipe = DistriSDXLPipeline.from_pretrained(DEFAULT_MODEL, DistriConfig(devices=8, **settings))
        parts = [pipe._unet, pipe._vae, *pipe._prompts.encoders]
        leaves = [leaf for model in parts for leaf in model.params if math.prod(leaf.shape) >= LEAST]
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)

    assert held(shard_weights=True) < 0.15 * held()  # with the places for heads that are not there
