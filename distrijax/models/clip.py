"""The text encoders of Stable Diffusion: CLIP-L (1.x; SDXL's first), OpenCLIP H (2.x) and bigG (SDXL's second).

Parameters are named as in the checkpoints, `text_model.encoder.layers.0.self_attn.q_proj` and so on.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from distrijax.errors import CheckpointError, InvalidArgument
from distrijax.json_config import ModelConfig
from distrijax.models.layers import ACTIVATIONS, Embedding, LayerNorm, Linear
from distrijax.validate import check_choice, positive

LEGACY_EOS = 2
"""What configs from before transformers 4.31 have in place of 49407; with it the largest id marks the end of the text."""

GENERATION_KEYS = """
    bad_words_ids begin_suppress_tokens decoder_start_token_id diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id
    length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_scores remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens temperature top_k
    top_p typical_p
"""
TRAINING_KEYS = """
    attention_dropout dropout gradient_checkpointing initializer_factor initializer_range
"""
BOOKKEEPING_KEYS = """
    architectures attn_implementation chunk_size_feed_forward cross_attention_hidden_size dtype finetuning_task id2label
    label2id name_or_path output_attentions output_hidden_states prefix problem_type return_dict sep_token_id
    task_specific_params tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class torch_dtype torchscript
    transformers_version use_bfloat16 use_cache
"""


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig(ModelConfig):
    """The keys of a text encoder's config.json that shape it; the defaults are those of transformers' CLIPTextConfig.

    Attributes:
        projection_dim: Width of the pooled embedding of an encoder with a projection; without one it has no effect.
        eos_token_id: The id at whose first position the text is pooled; 2 means the position of the largest id
            (`LEGACY_EOS`).
        bos_token_id: No effect; kept for writing the config.
        pad_token_id: No effect, since attention does not mask padding; kept for writing the config.
    """

    INERT = frozenset((GENERATION_KEYS + TRAINING_KEYS + BOOKKEEPING_KEYS).split())
    FIXED = {
        "model_type": ("clip_text_model",),
        "add_cross_attention": (False,),
        "is_decoder": (False,),
        "is_encoder_decoder": (False,),
        "pruned_heads": ({}, None),
        "quantization_config": (None,),
    }

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512
    bos_token_id: int | None = 49406
    eos_token_id: int = 49407
    pad_token_id: int | None = 1

    def __post_init__(self):
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
            "projection_dim",
        ):
            positive(getattr(self, name), name)
        positive(self.eos_token_id, "eos_token_id", least=0)
        check_choice(self.hidden_act, ("gelu", "quick_gelu"), "hidden_act")
        if self.hidden_size % self.num_attention_heads:
            raise CheckpointError(
                f"hidden_size {self.hidden_size} cannot be divided among {self.num_attention_heads} attention heads; "
                "use a multiple"
            )


class CLIPTextEncoder(nnx.Module):
    """transformers' CLIPTextModel, or CLIPTextModelWithProjection.

    Args:
        config: The encoder's.
        with_projection: Whether the pooled embedding is projected.
        penultimate: Whether token embeddings are taken before the last layer (SDXL) instead of after it and the final norm
            (1.x and 2.x, whose checkpoints have one layer of OpenCLIP H less).
        rngs: Keys of the initial values.
    """

    def __init__(self, config: CLIPTextConfig, *, with_projection: bool, penultimate: bool = True, rngs: nnx.Rngs):
        self.text_model = CLIPTextTransformer(config, rngs=rngs)
        self.text_projection = (
            Linear(config.hidden_size, config.projection_dim, bias=False, rngs=rngs) if with_projection else None
        )
        self.config, self.penultimate = config, penultimate

    def __call__(
        self, input_ids: Int[Array, "b t"], *, clip_skip: int = 0
    ) -> tuple[Float[Array, "b t c"], Float[Array, "b p"]]:
        """Encodes texts.

        Args:
            input_ids: Token ids.
            clip_skip: How many layers further back the token embeddings are taken, as in diffusers.

        Returns:
            Token embeddings: transformers' `hidden_states[-2 - clip_skip]`, or, without `penultimate`, the final norm of
            `hidden_states[-1 - clip_skip]`. Pooled embedding: the normalised last hidden state at the end of the text,
            projected where there is a projection.

        Raises:
            CheckpointError: For more tokens than positions, and for a `clip_skip` beyond the first layer.
        """
        layers = self.config.num_hidden_layers
        most = layers - self.penultimate
        if not 0 <= clip_skip <= most:
            raise InvalidArgument(f"clip_skip is {clip_skip}; this text encoder of {layers} layers takes 0 to {most}")
        hidden_states, last = self.text_model(input_ids)
        tokens = hidden_states[most - clip_skip]
        if not self.penultimate:
            tokens = self.text_model.final_layer_norm(tokens)
        pooled = jnp.take_along_axis(last, self._end_of_text(input_ids)[:, None, None], axis=1)[:, 0]
        return tokens, pooled if self.text_projection is None else self.text_projection(pooled)

    def _end_of_text(self, input_ids: Int[Array, "b t"]) -> Int[Array, "b"]:
        if self.config.eos_token_id == LEGACY_EOS:
            return jnp.argmax(input_ids, -1)
        return jnp.argmax(input_ids == self.config.eos_token_id, -1)


class CLIPTextTransformer(nnx.Module):
    """Embeddings, layers and final norm."""

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.embeddings = CLIPTextEmbeddings(config, rngs=rngs)
        self.encoder = CLIPLayers(config, rngs=rngs)
        self.final_layer_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def __call__(self, input_ids: Int[Array, "b t"]) -> tuple[list[Array], Float[Array, "b t c"]]:
        """All hidden states, the embeddings first, and the normalised last one."""
        hidden_states = [self.embeddings(input_ids)]
        for layer in self.encoder.layers:
            hidden_states.append(layer(hidden_states[-1]))
        return hidden_states, self.final_layer_norm(hidden_states[-1])


class CLIPTextEmbeddings(nnx.Module):
    """Sum of the embeddings of token and position."""

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.token_embedding = Embedding(config.vocab_size, config.hidden_size, rngs=rngs)
        self.position_embedding = Embedding(config.max_position_embeddings, config.hidden_size, rngs=rngs)
        self.positions = config.max_position_embeddings

    def __call__(self, input_ids: Int[Array, "b t"]) -> Float[Array, "b t c"]:
        tokens = input_ids.shape[1]
        if tokens > self.positions:
            raise InvalidArgument(
                f"the text has {tokens} tokens; this text encoder takes up to {self.positions}; shorten the text"
            )
        return self.token_embedding(input_ids) + self.position_embedding(jnp.arange(tokens))[None]


class CLIPLayers(nnx.Module):
    """The list of layers, one level down as in the checkpoint's names."""

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.layers = nnx.List([CLIPLayer(config, rngs=rngs) for _ in range(config.num_hidden_layers)])


class CLIPLayer(nnx.Module):
    """Causal self-attention and feed-forward, each on normalised input and added to it."""

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.self_attn = CLIPAttention(config.hidden_size, config.num_attention_heads, rngs=rngs)
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = CLIPMLP(config, rngs=rngs)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPAttention(nnx.Module):
    """Causal multi-head self-attention; softmax in float32."""

    def __init__(self, features: int, heads: int, *, rngs: nnx.Rngs):
        self.q_proj = Linear(features, features, rngs=rngs)
        self.k_proj = Linear(features, features, rngs=rngs)
        self.v_proj = Linear(features, features, rngs=rngs)
        self.out_proj = Linear(features, features, rngs=rngs)
        self.heads = heads

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        query, key, value = (
            projection(x).reshape(*x.shape[:2], self.heads, -1)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = jnp.einsum("bqnd,bknd->bnqk", query, key, preferred_element_type=jnp.float32)
        causal = jnp.tril(jnp.ones((1, 1, *scores.shape[2:]), bool))
        scores = jnp.where(causal, scores * query.shape[-1] ** -0.5, -jnp.inf)
        weights = jax.nn.softmax(scores, -1).astype(x.dtype)
        return self.out_proj(jnp.einsum("bnqk,bknd->bqnd", weights, value).reshape(x.shape))


class CLIPMLP(nnx.Module):
    """Two linear layers around the activation."""

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, rngs=rngs)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, rngs=rngs)
        self.activation = ACTIVATIONS[config.hidden_act]

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        return self.fc2(self.activation(self.fc1(x)))
