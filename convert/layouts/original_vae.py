"""The VAE as CompVis and SGM name its tensors: rows, and what the shapes say of its config.

The decoder's blocks are numbered from the picture's end: their `up.3` is our `up_blocks.0`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from distrijax.convert.configs import shape_of
from distrijax.convert.engine import LAYER, SQUEEZED, Row, Table, layer
from distrijax.convert.tensors import Tensors

RESNET = Table(
    *(Row(name, name, LAYER) for name in ("norm1.", "conv1.", "norm2.", "conv2.")),
    Row("nin_shortcut.", "conv_shortcut.", LAYER),
)

ATTENTION = Table(
    Row("norm.", "group_norm.", LAYER),
    *(Row(f"{name}.", f"to_{name}.", layer(SQUEEZED)) for name in ("q", "k", "v")),
    Row("proj_out.", "to_out.0.", layer(SQUEEZED)),
)

MIDDLE = (
    Row("mid.block_1.", "mid_block.resnets.0.", RESNET),
    Row("mid.attn_1.", "mid_block.attentions.0.", ATTENTION),
    Row("mid.block_2.", "mid_block.resnets.1.", RESNET),
)

ENDS = (
    Row("conv_in.", "conv_in.", LAYER),
    Row("norm_out.", "conv_norm_out.", LAYER),
    Row("conv_out.", "conv_out.", LAYER),
)

ENCODER = Table(
    *ENDS,
    Row("down.{n}.block.{n}.", "down_blocks.{n}.resnets.{n}.", RESNET),
    Row("down.{n}.downsample.conv.", "down_blocks.{n}.downsamplers.0.conv.", LAYER),
    *MIDDLE,
)


def vae_table(levels: int) -> Table:
    """Rows of a VAE's tensors, whose names start with `encoder.` and so on. levels: how many blocks the decoder has."""
    decoder = [*ENDS, *MIDDLE]
    for level in range(levels):
        ours = f"up_blocks.{levels - 1 - level}."
        decoder.append(Row(f"up.{level}.block.{{n}}.", f"{ours}resnets.{{n}}.", RESNET))
        decoder.append(Row(f"up.{level}.upsample.conv.", f"{ours}upsamplers.0.conv.", LAYER))
    return Table(
        Row("encoder.", "encoder.", ENCODER),
        Row("decoder.", "decoder.", Table(*decoder)),
        Row("quant_conv.", "quant_conv.", LAYER),
        Row("post_quant_conv.", "post_quant_conv.", LAYER),
        Row("loss.", None),
        Row("model_ema.", None),
    )


def levels_of(names: Iterable[str]) -> int:
    """How many blocks the decoder has, in either naming."""
    pattern = re.compile(r"decoder\.up(?:_blocks)?\.(\d+)\.", re.ASCII)
    return len({found[1] for name in names if (found := pattern.match(name))})


def describe_vae(tensors: Tensors, what: str) -> dict[str, Any]:
    """The keys of diffusers' config that the shapes of a VAE in its naming tell."""
    pattern = re.compile(r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.", re.ASCII)
    numbers = [found.groups() for name in tensors if (found := pattern.match(name))]
    levels = len({level for level, _ in numbers})
    told = {
        "in_channels": shape_of(tensors, "encoder.conv_in.weight", what, 4)[1],
        "out_channels": shape_of(tensors, "decoder.conv_out.weight", what, 4)[0],
        "latent_channels": shape_of(tensors, "decoder.conv_in.weight", what, 4)[1],
        "block_out_channels": [
            shape_of(tensors, f"encoder.down_blocks.{level}.resnets.0.conv1.weight", what, 4)[0]
            for level in range(levels)
        ],
        "layers_per_block": len({number for _, number in numbers}),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    for name in ("quant_conv", "post_quant_conv"):
        if f"{name}.weight" not in tensors:
            told[f"use_{name}"] = False
    return told
