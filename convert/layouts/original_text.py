"""Text encoders of single files, CLIP-L in transformers' names and OpenCLIP in open_clip's: tables of names, and configs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from distrijax.convert.configs import UNKNOWN, shape_of
from distrijax.convert.engine import LAYER, SPLIT, TRANSPOSED, Row, Table, rows
from distrijax.weights.tensors import Tensors

HEAD_WIDTH = 64
"""Channels of a head in every CLIP that Stable Diffusion uses."""

EMBEDDINGS = Table(
    Row("token_embedding.weight", "token_embedding.weight"),
    Row("position_embedding.weight", "position_embedding.weight"),
    Row("position_ids", None),
)

ENCODER_LAYER = Table(
    *rows("self_attn.q_proj, self_attn.k_proj, self_attn.v_proj, self_attn.out_proj"),
    *rows("layer_norm1, mlp.fc1, mlp.fc2, layer_norm2"),
)


def _transformers_rows(prefix: str) -> tuple[Row, ...]:
    return (
        Row(f"{prefix}embeddings.", "text_model.embeddings.", EMBEDDINGS),
        Row(f"{prefix}encoder.layers.{{n}}.", "text_model.encoder.layers.{n}.", ENCODER_LAYER),
        Row(f"{prefix}final_layer_norm.", "text_model.final_layer_norm.", LAYER),
    )


TRANSFORMERS = Table(
    *_transformers_rows("text_model."),
    *_transformers_rows(""),  # files from before transformers 4.31, and from 5.6 on
    Row("text_projection.weight", None),
    Row("logit_scale", None),
)

SPLIT_ATTENTION = {
    leaf: tuple(f"self_attn.{name}_proj.{leaf}" for name in ("q", "k", "v")) for leaf in ("weight", "bias")
}

RESBLOCK = Table(
    *(Row(f"attn.in_proj_{leaf}", names, SPLIT) for leaf, names in SPLIT_ATTENTION.items()),
    *rows("attn.out_proj self_attn.out_proj, ln_1 layer_norm1, ln_2 layer_norm2, mlp.c_fc mlp.fc1, mlp.c_proj mlp.fc2"),
)

PROJECTION = Table(
    Row("text_projection", "text_projection.weight", TRANSPOSED),  # multiplied from the right there
    Row("text_projection.weight", "text_projection.weight"),  # written by some trainers, as a linear layer
)


def open_clip_table(*, projected: bool, dropped: Iterable[int] = ()) -> Table:
    """Rows of a text encoder of open_clip.

    projected: whether its pooled embedding is used. dropped: numbers of layers that are not: SD 2.x reads the embeddings before
    the last layer, which diffusers leaves out.
    """
    return Table(
        Row("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
        Row("positional_embedding", "text_model.embeddings.position_embedding.weight"),
        *(Row(f"transformer.resblocks.{number}.", None) for number in dropped),
        Row("transformer.resblocks.{n}.", "text_model.encoder.layers.{n}.", RESBLOCK),
        Row("ln_final.", "text_model.final_layer_norm.", LAYER),
        *(PROJECTION.rows if projected else (Row(row.source, None) for row in PROJECTION.rows)),
        Row("logit_scale", None),
        Row("attn_mask", None),
    )


def layers_of(names: Iterable[str]) -> int:
    """The number of layers, in either naming."""
    pattern = re.compile(r"(?:transformer\.resblocks|text_model\.encoder\.layers)\.(\d+)\.", re.ASCII)
    return len({found[1] for name in names if (found := pattern.match(name))})


def describe_text(tensors: Tensors, what: str) -> dict[str, Any]:
    """The keys of transformers' config that the shapes of its text encoder imply."""
    vocabulary, width = shape_of(tensors, "text_model.embeddings.token_embedding.weight", what, 2)
    inferred = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "max_position_embeddings": shape_of(tensors, "text_model.embeddings.position_embedding.weight", what, 2)[0],
        "num_hidden_layers": layers_of(tensors),
        "intermediate_size": shape_of(tensors, "text_model.encoder.layers.0.mlp.fc1.weight", what, 2)[0],
    }
    if "text_projection.weight" in tensors:
        inferred["projection_dim"] = shape_of(tensors, "text_projection.weight", what, 2)[0]
    return inferred


def heads_of(width: int) -> Any:
    """The number of heads of an encoder of that width, or `UNKNOWN`."""
    return UNKNOWN if width % HEAD_WIDTH else width // HEAD_WIDTH
