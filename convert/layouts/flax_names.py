"""The UNet, the VAE and CLIP's text encoders as the Flax models of diffusers and transformers name and lay out their tensors.

Flax joins a module of a list to its number (`down_blocks_0`), ends names in `kernel`, `scale` and `embedding`, and has the
channels of a convolution last (HWIO). CLIP's layers, though, are modules that are called `0`, `1`, ..., and the projections of
the VAE's attention have the names that PyTorch's had at first. Names are those of maps in maps, joined by dots, as
`flax_files` reads them. Those of FlaxUNet2DConditionModel, FlaxAutoencoderKL, FlaxCLIPTextModel and
FlaxCLIPTextModelWithProjection are meant; both libraries have left them out since, so such files are read and not written.
"""

from __future__ import annotations

from distrijax.convert.engine import KERNEL, Row, Table, to_ours
from distrijax.convert.tensors import Tensors
from distrijax.errors import DistriError

KERNEL_AND_BIAS = Table(Row("kernel", "weight", KERNEL), Row("bias", "bias"))
"""A linear layer or a convolution."""

NORM = Table(Row("scale", "weight"), Row("bias", "bias"))

EMBEDDING = Table(Row("embedding", "weight"))


def _same(then: Table, *names: str) -> tuple[Row, ...]:
    """Modules that have the same name in both."""
    return tuple(Row(f"{name}.", f"{name}.", then) for name in names)


RESNET = Table(
    *_same(NORM, "norm1", "norm2"),
    *_same(KERNEL_AND_BIAS, "conv1", "conv2", "conv_shortcut", "time_emb_proj"),
)

SAMPLER = Table(*_same(KERNEL_AND_BIAS, "conv"))

ATTENTION = Table(
    *_same(KERNEL_AND_BIAS, "to_q", "to_k", "to_v"),
    Row("to_out_0.", "to_out.0.", KERNEL_AND_BIAS),
)

BLOCK = Table(
    *_same(NORM, "norm1", "norm2", "norm3"),
    *_same(ATTENTION, "attn1", "attn2"),
    Row("ff.net_0.proj.", "ff.net.0.proj.", KERNEL_AND_BIAS),
    Row("ff.net_2.", "ff.net.2.", KERNEL_AND_BIAS),
)

TRANSFORMER = Table(
    *_same(NORM, "norm"),
    *_same(KERNEL_AND_BIAS, "proj_in", "proj_out"),  # convolutions in SD 1.x, linear later: the same rank in both
    Row("transformer_blocks_{n}.", "transformer_blocks.{n}.", BLOCK),
)

VAE_ATTENTION = Table(
    *_same(NORM, "group_norm"),
    Row("query.", "to_q.", KERNEL_AND_BIAS),
    Row("key.", "to_k.", KERNEL_AND_BIAS),
    Row("value.", "to_v.", KERNEL_AND_BIAS),
    Row("proj_attn.", "to_out.0.", KERNEL_AND_BIAS),
)


def _blocks(attention: Table) -> tuple[Row, ...]:
    """The rows of a tower of blocks: its ends, its way down, its middle and its way up."""
    return (
        *_same(KERNEL_AND_BIAS, "conv_in", "conv_out"),
        *_same(NORM, "conv_norm_out"),
        Row("mid_block.resnets_{n}.", "mid_block.resnets.{n}.", RESNET),
        Row("mid_block.attentions_{n}.", "mid_block.attentions.{n}.", attention),
        *(
            Row(f"{way}_blocks_{{n}}.{kind}_{{n}}.", f"{way}_blocks.{{n}}.{kind}.{{n}}.", then)
            for way in ("down", "up")
            for kind, then in (("resnets", RESNET), ("attentions", attention), (f"{way}samplers", SAMPLER))
        ),
    )


TIME = Table(*_same(KERNEL_AND_BIAS, "linear_1", "linear_2"))

UNET = Table(*_same(TIME, "time_embedding", "add_embedding"), *_blocks(TRANSFORMER))

VAE = Table(
    *_same(Table(*_blocks(VAE_ATTENTION)), "encoder", "decoder"),
    *_same(KERNEL_AND_BIAS, "quant_conv", "post_quant_conv"),
)

LAYER = Table(
    *_same(NORM, "layer_norm1", "layer_norm2"),
    *_same(KERNEL_AND_BIAS, *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2"),
)

TEXT = Table(
    *_same(EMBEDDING, "text_model.embeddings.token_embedding", "text_model.embeddings.position_embedding"),
    Row("text_model.encoder.layers.{n}.", "text_model.encoder.layers.{n}.", LAYER),
    *_same(NORM, "text_model.final_layer_norm"),
    Row("text_projection.kernel", "text_projection.weight", KERNEL),
)

TABLES = {"unet": UNET, "vae": VAE, "text_encoder": TEXT}
"""By the kind of model; both text encoders of SDXL are of one kind."""

TELLING = {
    "unet": "down_blocks_0.resnets_0.conv1.kernel",
    "vae": "decoder.conv_in.kernel",
    "text_encoder": "text_model.embeddings.token_embedding.embedding",
}
"""A tensor that every model of the kind has, and no other."""


def flax_part(tensors: Tensors, what: str) -> str:
    """Whether a file holds a `unet`, a `vae` or a `text_encoder` (of any family, the second of SDXL among them).

    what: the file, for the error. Raises DistriError for another model.
    """
    found = [part for part, name in TELLING.items() if name in tensors]
    if len(found) != 1:
        raise DistriError(
            f"{what} holds {' and '.join(found) or 'no known part'} in Flax's names; "
            f"give the file of one of: {', '.join(TELLING)}"
        )
    return found[0]


def from_flax(tensors: Tensors, what: str) -> Tensors:
    """The tensors of a model of Flax with PyTorch's names and layouts.

    tensors: of one of the models that `flax_part` knows. what: the file, for the error.
    Raises DistriError for another model, and one that lists every tensor that its table does not know.
    """
    return to_ours(TABLES[flax_part(tensors, what)], tensors, what)[0]
