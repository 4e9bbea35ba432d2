"""Layers against torch, attention in chunks against attention in one piece, and 16 bit that stays 16 bit."""

from __future__ import annotations

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention as TorchAttention
from diffusers.models.embeddings import get_timestep_embedding
from flax import nnx
from jaxtyping import TypeCheckError
from oracle import disturb, nhwc, port, relative_error

from distrijax.models import attention, layers
from distrijax.models.attention import Attention
from distrijax.models.layers import Conv, GroupNorm, LayerNorm, Linear
from distrijax.parallel.exchange import WholeImage

EXACT = 1e-5


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


@jax.jit
def run(module: nnx.Module, x: jax.Array) -> jax.Array:
    exchanging = isinstance(module, Conv | GroupNorm | Attention)
    return module(x, WholeImage()) if exchanging else module(x)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_equals_torch(bias):
    source = torch.nn.Linear(5, 7, bias=bias)
    x = randn(2, 3, 5)
    ours = port(Linear(5, 7, bias=bias, rngs=nnx.Rngs(0)), source)
    assert relative_error(run(ours, x.numpy()), source(x)) < EXACT


@pytest.mark.parametrize("offset", [0.0, 100.0], ids=["centred", "far from zero"])
def test_group_norm_equals_torch(offset):
    source = disturb(torch.nn.GroupNorm(4, 12, eps=1e-5))
    x = randn(2, 12, 6, 4) + offset
    wanted = nhwc(source.double()(x.double()))  # torch's own float32 loses digits far from zero
    ours = port(GroupNorm(12, 4, 1e-5), source.float())
    assert relative_error(run(ours, nhwc(x)), wanted) < (EXACT if offset == 0 else 1e-4)


def test_layer_norm_equals_torch():
    source = disturb(torch.nn.LayerNorm(12))
    x = randn(2, 5, 12)
    assert relative_error(run(port(LayerNorm(12), source), x.numpy()), source(x)) < EXACT


def test_self_attention_equals_diffusers():
    source = disturb(TorchAttention(query_dim=24, heads=3, dim_head=8))
    x = randn(2, 10, 24)
    ours = port(Attention(24, 3, rngs=nnx.Rngs(0)), source)
    assert relative_error(run(ours, x.numpy()), source(x)) < EXACT


def test_cross_attention_equals_diffusers():
    source = disturb(TorchAttention(query_dim=24, cross_attention_dim=16, heads=3, dim_head=8))
    ours = port(Attention(24, 3, context=16, rngs=nnx.Rngs(0)), source)
    x, context = randn(2, 10, 24), randn(2, 7, 16)
    got = jax.jit(lambda m, x, c: m(x, WholeImage(), m.project_context(c)))(ours, x.numpy(), context.numpy())
    assert relative_error(got, source(x, encoder_hidden_states=context)) < EXACT


@pytest.mark.parametrize(
    ("here", "expected"),
    [([], True), (["8.0"], True), (["9.0", "7.5"], False)],
    ids=["none", "Ampere", "one of Turing"],
)
def test_cudnn_available_where_no_gpu_is_older_than_ampere(here, expected, monkeypatch):
    def gpus(backend):
        if not here:
            raise RuntimeError(f"Unknown backend {backend}")
        return [SimpleNamespace(compute_capability=capability) for capability in here]

    monkeypatch.setattr(attention, "_cudnn_attention", lambda query, key, value: query)  # as if cuDNN were installed
    monkeypatch.setattr(jax, "local_devices", gpus)
    assert attention._cudnn_available.__wrapped__() is expected


@pytest.mark.parametrize(
    ("chunk", "rows", "held"),
    [
        (6 * 64 * 50, 16, "6x64x50"),  # all heads of both images together
        (5 * 64 * 50, 16, "3x64x50"),  # five would fit, and do not divide six
        (16 * 50, 8, "1x16x50"),  # a quarter of a head's queries
        (13 * 50, 8, "1x13x50"),  # a fifth, with one row of padding
        (16 * 50, 32, "1x32x50"),  # never less than so many queries
        (1, 1, "1x1x50"),
    ],
)
def test_attention_in_chunks_equals_torch_and_holds_no_more_scores_than_allowed(monkeypatch, chunk, rows, held):
    monkeypatch.setattr(attention, "CPU_ATTENTION_CHUNK", chunk)
    monkeypatch.setattr(attention, "MIN_CHUNK_QUERIES", rows)
    query, key, value = randn(2, 64, 3, 8), randn(2, 50, 3, 8), randn(2, 50, 3, 8)
    wanted = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (query, key, value)))
    heads = [t.numpy() for t in (query, key, value)]
    lowered = jax.jit(lambda *heads: attention.attend(*heads)).lower(*heads)
    assert set(re.findall(r"exponential .* : tensor<(\w+)xf32>", lowered.as_text())) == {held}
    assert relative_error(lowered.compile()(*heads), wanted.transpose(1, 2)) < EXACT


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize(("flip", "shift"), [(True, 0.0), (False, 1.0)])
def test_sinusoidal_embedding_equals_diffusers(size, flip, shift):
    values = torch.tensor([0.0, 1.0, 333.5, 999.0])
    wanted = get_timestep_embedding(values, size, flip_sin_to_cos=flip, downscale_freq_shift=shift)
    got = layers.sinusoidal(jnp.asarray(values.numpy()), size, flip_sin_to_cos=flip, shift=shift)
    # one bit of an angle near 1000 is 6e-5, whoever computes it
    assert np.abs(np.asarray(got) - wanted.numpy()).max() < 1e-4
    assert relative_error(got[:2], wanted[:2]) < EXACT


def test_upsampling_equals_torch():
    x = randn(2, 3, 4, 5)
    wanted = torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
    np.testing.assert_array_equal(layers.upsample_nearest(jnp.asarray(nhwc(x))), nhwc(wanted))


def test_gelu_is_torchs_exact_one():
    x = torch.linspace(-6, 6, 101)
    assert relative_error(layers.gelu(jnp.asarray(x.numpy())), torch.nn.functional.gelu(x)) < EXACT


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (lambda: Linear(16, 16, rngs=nnx.Rngs(0)), (2, 5, 16)),
        (lambda: Conv(16, 16, rngs=nnx.Rngs(0)), (1, 4, 4, 16)),
        (lambda: GroupNorm(16, 4, 1e-5), (1, 4, 4, 16)),
        (lambda: LayerNorm(16), (2, 5, 16)),
        (lambda: Attention(16, 2, rngs=nnx.Rngs(0)), (2, 5, 16)),
    ],
    ids=["Linear", "Conv", "GroupNorm", "LayerNorm", "Attention"],
)
def test_bfloat16_stays_bfloat16_and_close(module, shape):
    exact = module()
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    short = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), exact)
    got = run(short, x.astype(jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    assert relative_error(got.astype(jnp.float32), run(exact, x)) < 0.03


def test_layers_learn_their_paths():
    class Two(nnx.Module):
        def __init__(self):
            self.norm = GroupNorm(4, 2, 1e-5)
            self.convs = nnx.List([Conv(4, 4, rngs=nnx.Rngs(0)), Conv(4, 4, rngs=nnx.Rngs(0))])

    module = Two()
    layers.name_layers(module)
    assert [module.norm.path, module.convs[0].path, module.convs[1].path] == ["norm", "convs.0", "convs.1"]


def test_arguments_of_another_shape_than_annotated_are_seen_here():
    """What conftest.py switches off elsewhere is on in this file."""
    with pytest.raises(TypeCheckError):
        layers.sinusoidal(jnp.zeros((2, 2)), 8, flip_sin_to_cos=True, shift=0.0)
