"""Tensor parallelism: which channels go to which device, and that the whole model computes what one device does."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from marks import slow_but
from oracle import relative_error
from test_unet import latents
from unet_configs import FULL_BASE, KINDS

from distrijax.config import Parallelism
from distrijax.models.layers import TPKind, TPSpec
from distrijax.models.unet import UNet, abstract_unet
from distrijax.models.unet_config import UNetConfig
from distrijax.parallel.exchange import TensorParallel, WholeImage
from distrijax.parallel.mesh import PATCH, MeshPlan
from distrijax.parallel.processes import blocks_to_devices
from distrijax.weights.sharding import ChannelSharded, ModelLayout, channel_sharded

HEADS = TPSpec(TPKind.COLUMN, multiple_of=2)


def abstract_params(piece: ChannelSharded, values: np.ndarray, devices: int) -> np.ndarray:
    """What all devices together hold of a parameter."""
    shape = piece.global_shape(values.shape, {PATCH: devices})
    mesh = MeshPlan(1, 1, devices).build(jax.devices()[:devices])
    block = functools.partial(piece.block, values, {PATCH: devices})
    return np.asarray(blocks_to_devices(shape, NamedSharding(mesh, piece.spec()), block))


def test_heads_stay_together_and_missing_ones_are_zeros():
    """Three heads of two channels on two devices: the second one has a head and a place for one."""
    weights = np.arange(12, dtype=np.float32).reshape(2, 6)
    both = abstract_params(ChannelSharded(1, HEADS, 6), weights, 2)
    np.testing.assert_array_equal(both[:, :4], weights[:, :4])
    np.testing.assert_array_equal(both[:, 4:6], weights[:, 4:])
    np.testing.assert_array_equal(both[:, 6:], 0)


def test_every_device_has_some_of_each_part():
    """Values and gates side by side, four of each on two devices."""
    both = abstract_params(ChannelSharded(0, TPSpec(TPKind.COLUMN, chunks=2), 8), np.arange(8, dtype=np.float32), 2)
    np.testing.assert_array_equal(both, [0, 1, 4, 5, 2, 3, 6, 7])


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
@pytest.mark.parametrize("cut", [HEADS, TPSpec(TPKind.ROW, 3, 2), TPSpec(TPKind.COLUMN)])
def test_nothing_is_lost_and_shapes_are_as_announced(cut, devices):
    piece, values = ChannelSharded(1, cut, 12), np.arange(1, 25, dtype=np.float32).reshape(2, 12)
    everyone = abstract_params(piece, values, devices)
    assert everyone.shape[1] % devices == 0
    assert sorted(everyone[everyone > 0]) == sorted(values.ravel())


def test_layers_are_divided_as_in_the_original():
    """By heads, by the feed-forward's channels, within resnets, and convolutions that change the size by input channels."""
    divided = {".".join(map(str, path)) for path in channel_sharded(abstract_unet(UNetConfig.from_dict(FULL_BASE)))}
    patterns = (
        r"attn[12]\.to_[qkv]\.kernel|attn[12]\.to_out\.0\.kernel",
        r"ff\.net\.0\.proj\.(kernel|bias)|ff\.net\.2\.kernel",
        r"(conv1|time_emb_proj)\.(kernel|bias)|norm2\.(scale|bias)|conv2\.kernel",
        r"(downsamplers|upsamplers)\.0\.conv\.kernel|^conv_out\.kernel",
    )
    # in each of 70 blocks: eight matrices of the attentions, three parameters of the feed-forward; seven in each resnet
    counts = [70 * 8, 70 * 3, 17 * 7, 5]
    found = [
        [name for name in divided if re.search(f"({pattern})$", name) and ("resnets" in name) == ("conv1" in pattern)]
        for pattern in patterns
    ]
    assert [len(names) for names in found] == counts
    assert len(divided) == sum(counts)


@pytest.mark.parametrize("kind", slow_but(["base"], ["base", "convolutional projections"]))
@pytest.mark.parametrize("devices", slow_but([3], [2, 3, 8]))
def test_devices_with_a_part_of_the_channels_equal_one_device(kind, devices):
    """Random weights; 1, 2 and 4 heads and 8 groups, which two of the three numbers of devices do not divide."""
    config = UNetConfig.from_dict(KINDS[kind])
    unet = UNet(config, rngs=nnx.Rngs(0))
    # biases and scales away from 0 and 1
    for path, leaf in nnx.to_flat_state(nnx.state(unet)):
        if len(leaf.shape) == 1:
            noise = np.random.default_rng(len(str(path))).standard_normal(leaf.shape, np.float32)
            leaf.set_value(leaf.get_value() + 0.1 * noise)
    prompt, added = np.float32(np.random.default_rng(1).standard_normal((2, 7, 24))), []
    if config.addition_embed_type:
        added = [np.ones((2, 20), np.float32), np.full((2, 6), 64, np.float32)]

    mesh = MeshPlan(1, 1, devices).build(jax.devices()[:devices])
    form = ModelLayout.of(unet, Parallelism.TENSOR)
    place = form.make_placer(mesh)
    leaves = [place(path, np.asarray(leaf.get_value())) for path, leaf in nnx.to_flat_state(nnx.state(unet))]

    def call(exchange, leaves, x):
        module = form.module(leaves)
        conditioning = module.condition(*map(jnp.asarray, (prompt, *added)))
        return module(x, jnp.float32(500), conditioning, exchange)

    cut = jax.shard_map(
        lambda leaves, x: call(TensorParallel(PATCH), leaves, x), mesh=mesh, in_specs=(form.specs, P()), out_specs=P()
    )
    wanted = jax.jit(lambda leaves, x: call(WholeImage(), leaves, x))(tuple(jax.tree.leaves(unet)), latents(0))
    assert relative_error(jax.jit(cut)(tuple(leaves), latents(0)), wanted) < 1e-5
