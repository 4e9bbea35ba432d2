"""Both text encoders against transformers, and what they refuse."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from facts import refuses, warns
from flax import nnx
from transformers import CLIPTextConfig as TorchConfig
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from distrijax.models.clip import CLIPTextConfig, CLIPTextEncoder

EOS = 98
TINY = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "projection_dim": 24,
    "bos_token_id": 97,
    "eos_token_id": EOS,
}
KINDS = pytest.mark.parametrize(
    ("hidden_act", "with_projection"), [("quick_gelu", False), ("gelu", True)], ids=["CLIP-L", "bigG"]
)


def torch_encoder(with_projection: bool, **changes) -> torch.nn.Module:
    """A random encoder, large enough in its numbers that every part of it shows in the result."""
    torch.manual_seed(0)
    kind = CLIPTextModelWithProjection if with_projection else CLIPTextModel
    model = kind(TorchConfig(**TINY | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def checkpoint(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Tensors under the names that SDXL's files have; transformers 5 drops the prefix of CLIPTextModel."""
    return {
        name if name.startswith("text_") else f"text_model.{name}": tensor.numpy()
        for name, tensor in model.state_dict().items()
    }


def ported(model: torch.nn.Module, with_projection: bool, **changes) -> CLIPTextEncoder:
    """Our encoder with the weights of `model`."""
    encoder = CLIPTextEncoder(CLIPTextConfig(**TINY | changes), with_projection=with_projection, rngs=nnx.Rngs(0))
    tensors = checkpoint(model)
    state = nnx.to_flat_state(nnx.state(encoder))
    for path, parameter in state:
        *module, leaf = map(str, path)
        tensor = tensors.pop(".".join([*module, "bias" if leaf == "bias" else "weight"]))
        parameter.set_value(jnp.asarray(tensor.T if leaf == "kernel" else tensor))
    nnx.update(encoder, nnx.from_flat_state(state))
    assert not tensors
    return encoder


def prompts(tokens: int, ends: tuple[int, ...], padding: int, rows: int = 3) -> np.ndarray:
    """Random ids, each row with its end of text at another place, then padding."""
    ids = np.random.default_rng(0).integers(3, 97, (rows, tokens))
    ids[:, 0] = 97
    for row, end in zip(ids, ends, strict=True):
        row[end], row[end + 1 :] = EOS, padding
    return ids.astype(np.int32)


def relative_error(got, wanted: torch.Tensor) -> float:
    wanted = wanted.detach().numpy()
    return float(np.abs(np.asarray(got) - wanted).max() / np.abs(wanted).max())


@KINDS
@pytest.mark.parametrize("eos_token_id", [2, EOS], ids=["largest id", "named id"])
@pytest.mark.parametrize("padding", [0, EOS])
def test_equals_transformers(hidden_act, with_projection, eos_token_id, padding):
    changes = {"hidden_act": hidden_act, "eos_token_id": eos_token_id}
    model = torch_encoder(with_projection, **changes)
    ids = prompts(77, (4, 40, 76), padding)
    with torch.no_grad():
        wanted = model(torch.from_numpy(ids).long(), output_hidden_states=True)
    penultimate, pooled = jax.jit(lambda encoder, ids: encoder(ids))(
        ported(model, with_projection, **changes), jnp.asarray(ids)
    )
    assert penultimate.dtype == pooled.dtype == jnp.float32
    assert pooled.shape == (3, 24 if with_projection else 32)
    assert relative_error(penultimate, wanted.hidden_states[-2]) < 1e-5
    assert relative_error(pooled, wanted.text_embeds if with_projection else wanted.pooler_output) < 1e-5


def test_clip_skip_counts_as_in_diffusers():
    model = torch_encoder(True, hidden_act="gelu")
    ids = prompts(9, (4, 5, 8), 0)
    with torch.no_grad():
        hidden_states = model(torch.from_numpy(ids).long(), output_hidden_states=True).hidden_states
    encoder = ported(model, True, hidden_act="gelu")
    for clip_skip in range(3):
        got, _ = encoder(jnp.asarray(ids), clip_skip=clip_skip)
        assert relative_error(got, hidden_states[-2 - clip_skip]) < 1e-5
    with refuses("clip_skip", 3, 0, 2):
        encoder(jnp.asarray(ids), clip_skip=3)


@KINDS
def test_bfloat16_stays_bfloat16_and_near(hidden_act, with_projection):
    config = CLIPTextConfig(**TINY, hidden_act=hidden_act)
    encoder = CLIPTextEncoder(config, with_projection=with_projection, rngs=nnx.Rngs(0))
    graph, state = nnx.split(encoder)
    half = nnx.merge(graph, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state))
    ids = jnp.asarray(prompts(20, (4, 10, 19), 0))
    for exact, rounded in zip(encoder(ids), half(ids), strict=True):
        assert rounded.dtype == jnp.bfloat16
        error = jnp.linalg.norm(exact - rounded.astype(jnp.float32)) / jnp.linalg.norm(exact)
        assert error < 0.03


def test_no_token_sees_a_later_one():
    encoder = CLIPTextEncoder(CLIPTextConfig(**TINY), with_projection=False, rngs=nnx.Rngs(0))
    ids = jnp.asarray(prompts(12, (4, 10, 11), 0))
    before, _ = encoder(ids)
    after, _ = encoder(ids.at[:, 6].set(50))
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert jnp.abs(before[:, 6:] - after[:, 6:]).max() > 1e-4


@pytest.mark.parametrize("with_projection", [False, True])
def test_parameters_are_named_as_in_the_checkpoint(with_projection):
    encoder = nnx.eval_shape(
        lambda: CLIPTextEncoder(CLIPTextConfig(**TINY), with_projection=with_projection, rngs=nnx.Rngs(0))
    )
    leaves = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
    names = {".".join([*map(str, path[:-1]), leaves[path[-1]]]) for path, _ in nnx.to_flat_state(nnx.state(encoder))}
    assert names == set(checkpoint(torch_encoder(with_projection)))
    assert ("text_projection.weight" in names) == with_projection


SDXL = {
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "pad_token_id": 1,
    "torch_dtype": "float16",
    "transformers_version": "4.32.0.dev0",
    "vocab_size": 49408,
}
SDXL_FIRST = SDXL | {
    "architectures": ["CLIPTextModel"],
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
}
SDXL_SECOND = SDXL | {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}


@pytest.mark.parametrize(
    ("source", "with_projection", "parameters"),
    [(SDXL_FIRST, False, 123_060_480), (SDXL_SECOND, True, 694_659_840)],
    ids=["first", "second"],
)
def test_reads_the_configs_of_sdxl(source, with_projection, parameters):
    config = CLIPTextConfig.from_dict(source)
    assert dataclasses.asdict(config).items() <= source.items()
    encoder = nnx.eval_shape(lambda: CLIPTextEncoder(config, with_projection=with_projection, rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(encoder))) == parameters


def test_reads_every_key_that_transformers_writes(tmp_path):
    config = TorchConfig(**TINY)
    assert CLIPTextConfig.from_dict(config.to_dict()) == CLIPTextConfig.from_dict(config.to_diff_dict())
    # what transformers 4 writes when asked for everything
    generic = {
        "is_decoder": False,
        "pruned_heads": {},
        "top_k": 50,
        "use_bfloat16": False,
        "id2label": {"0": "LABEL_0"},
    }
    assert CLIPTextConfig.from_dict(config.to_dict() | generic).eos_token_id == EOS


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"hidden_act": "silu"}, "hidden_act 'silu' 'gelu' 'quick_gelu'"),
        ({"num_attention_heads": 5}, "hidden_size 32 5"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0"),
        ({"hidden_size": "32"}, "hidden_size '32'"),
        ({"eos_token_id": [2, 3]}, "eos_token_id 2 3"),
        ({"is_decoder": True}, "is_decoder True False"),
        ({"model_type": "t5"}, "model_type 't5'"),
        ({"quantization_config": {}}, "quantization_config None"),
    ],
)
def test_refuses_configs_that_it_would_compute_wrongly(change, told):
    with refuses(*told.split()):
        CLIPTextConfig.from_dict(TINY | change)


def test_an_unknown_key_is_warned_of_once():
    with warns("'brand_new'"):
        config = CLIPTextConfig.from_dict(TINY | {"brand_new": 1})
    assert config == CLIPTextConfig.from_dict(TINY | {"brand_new": 2}) == CLIPTextConfig.from_dict(TINY)


def test_refuses_more_tokens_than_positions():
    encoder = CLIPTextEncoder(CLIPTextConfig(**TINY), with_projection=False, rngs=nnx.Rngs(0))
    with refuses(78, "tokens", 77):
        encoder(jnp.zeros((1, 78), jnp.int32))
