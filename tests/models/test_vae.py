"""The VAE against torch diffusers, both ways, and on bands of rows against the whole image."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as TorchVAE
from facts import refuses
from flax import nnx
from jax.sharding import PartitionSpec as P
from oracle import disturb, nhwc, part, port, record, relative_error

from distrijax.models.vae import AutoencoderKL, VAEConfig
from distrijax.parallel.exchange import Synchronous, WholeImage
from distrijax.parallel.mesh import CFG, PATCH, MeshPlan
from distrijax.weights.names import checkpoint_name, to_pytorch

EXACT = 1e-5
TINY = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
BARE = TINY | {"use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False}
FULL = TINY | {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
}


def pair(kind: dict) -> tuple[AutoencoderKL, TorchVAE]:
    torch.manual_seed(2)
    source = disturb(TorchVAE(**kind))
    return port(AutoencoderKL(VAEConfig.from_dict(kind), rngs=nnx.Rngs(0)), source), source


@pytest.fixture(scope="module")
def tiny():
    return pair(TINY)


def encode(vae, pixels, exchange=None):
    return vae.encode(pixels, exchange or WholeImage())


def decode(vae, latents, exchange=None):
    return vae.decode(latents, exchange or WholeImage())


@pytest.mark.parametrize("kind", [TINY, BARE], ids=["SDXL's", "without attention and 1x1 convolutions"])
def test_both_ways_equal_diffusers(tiny, kind):
    ours, source = tiny if kind is TINY else pair(kind)
    pixels, latents = torch.randn(2, 3, 32, 16), torch.randn(2, 4, 8, 4)
    with torch.no_grad():
        wanted, image = source.encode(pixels).latent_dist, source.decode(latents).sample
    mean, deviation = jax.jit(encode)(ours, nhwc(pixels))
    assert relative_error(mean, nhwc(wanted.mean)) < EXACT
    assert relative_error(deviation, nhwc(wanted.std)) < EXACT
    assert relative_error(jax.jit(decode)(ours, nhwc(latents)), nhwc(image)) < EXACT


@pytest.mark.parametrize(
    "path",
    [
        "encoder.down_blocks.1",
        "encoder.down_blocks.2",
        "encoder.mid_block",
        "encoder.mid_block.attentions.0",
        "decoder.up_blocks.0",
        "decoder.up_blocks.2",
    ],
)
def test_block_equals_diffusers(tiny, path):
    ours, source = tiny
    seen = record(source, torch.randn(1, 3, 16, 16))
    given, wanted = seen[path]
    x = given.get("hidden_states", given.get("sample"))
    got = jax.jit(lambda block, x: block(x, WholeImage()))(part(ours, path), nhwc(x))
    assert relative_error(got, nhwc(wanted)) < EXACT


@pytest.mark.parametrize("way", [encode, decode])
def test_bands_of_rows_equal_the_whole_image(tiny, way):
    """Rows cut over both axes of a mesh, as in the pipeline."""
    ours, rows = tiny[0], (PATCH, CFG)
    shape = (1, 32, 8, 3) if way is encode else (1, 8, 4, 4)
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    mesh = MeshPlan(1, 2, 2).build(jax.devices()[:4])
    cut = P(None, rows)
    local = jax.shard_map(lambda vae, x: way(vae, x, Synchronous(rows)), mesh=mesh, in_specs=(P(), cut), out_specs=cut)
    got, wanted = jax.jit(local)(ours, x), jax.jit(way)(ours, x)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert relative_error(one, other) < EXACT


def test_full_size_model_has_the_tensors_of_diffusers():
    with torch.device("meta"):
        source = TorchVAE(**FULL)
    ours = nnx.eval_shape(lambda: AutoencoderKL(VAEConfig.from_dict(FULL), rngs=nnx.Rngs(0)))
    shapes = {
        checkpoint_name(path): to_pytorch(path[-1], np.broadcast_to(0, leaf.shape)).shape
        for path, leaf in nnx.to_flat_state(nnx.state(ours))
    }
    assert shapes == {name: tuple(tensor.shape) for name, tensor in source.state_dict().items()}


@pytest.mark.parametrize("way", [encode, decode])
def test_bfloat16_stays_bfloat16(tiny, way):
    short = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny[0])
    x = jax.ShapeDtypeStruct((1, 16, 16, 3 if way is encode else 4), jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(way, short, x))} == {jnp.dtype(jnp.bfloat16)}


def test_scale_is_that_of_the_downsamplings():
    assert VAEConfig.from_dict(TINY).scale == 4
    assert VAEConfig.from_dict(FULL).scale == 8


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"down_block_types": ("DownEncoderBlock2D",)}, "1 3 blocks"),
        ({"up_block_types": ("AttnUpDecoderBlock2D",) * 3}, "'AttnUpDecoderBlock2D'"),
        ({"norm_num_groups": 3}, "norm_num_groups 3"),
        ({"latents_mean": (0.0,) * 4}, "latents_mean 0.0"),
        ({"latent_chanels": 4}, "key 'latent_chanels'"),
    ],
)
def test_unknown_config_raises(changes, told):
    with refuses(*told.split()):
        VAEConfig.from_dict(TINY | changes)
