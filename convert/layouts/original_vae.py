"""The VAE in the names of CompVis and SGM: table of names, and what its shapes imply for its config.

The source numbers the decoder's blocks from the image's end: its `up.3` is `up_blocks.0` in diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from distrijax.convert.configs import shape_of
from distrijax.convert.engine import SQUEEZED, Row, Table, layer, rows
from distrijax.weights.tensors import Tensors

RESNET = Table(*rows("norm1, conv1, norm2, conv2, nin_shortcut conv_shortcut"))

ATTENTION = Table(*rows("norm group_norm"), *rows("q to_q, k to_k, v to_v, proj_out to_out.0", layer(SQUEEZED)))

ENDS = (
    *rows("conv_in, norm_out conv_norm_out, conv_out"),
    *rows("mid.block_1 mid_block.resnets.0, mid.block_2 mid_block.resnets.1", RESNET),
    *rows("mid.attn_1 mid_block.attentions.0", ATTENTION),
)

ENCODER = Table(
    *ENDS,
    *rows("down.{n}.block.{n} down_blocks.{n}.resnets.{n}", RESNET),
    *rows("down.{n}.downsample.conv down_blocks.{n}.downsamplers.0.conv"),
)


def vae_table(levels: int) -> Table:
    """Rows of a VAE's tensors, whose names start with `encoder.` and so on. levels: how many blocks the decoder has."""
    decoder = [*ENDS]
    for level in range(levels):
        block = f"up_blocks.{levels - 1 - level}"
        decoder += rows(f"up.{level}.block.{{n}} {block}.resnets.{{n}}", RESNET)
        decoder += rows(f"up.{level}.upsample.conv {block}.upsamplers.0.conv")
    return Table(
        *rows("encoder", ENCODER),
        *rows("decoder", Table(*decoder)),
        *rows("quant_conv, post_quant_conv"),
        Row("loss.", None),
        Row("model_ema.", None),
    )


def levels_of(names: Iterable[str]) -> int:
    """How many blocks the decoder has, in either naming."""
    pattern = re.compile(r"decoder\.up(?:_blocks)?\.(\d+)\.", re.ASCII)
    return len({found[1] for name in names if (found := pattern.match(name))})


def describe_vae(tensors: Tensors, what: str) -> dict[str, Any]:
    """The keys of diffusers' config that the shapes of its VAE imply."""
    pattern = re.compile(r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.", re.ASCII)
    numbers = [found.groups() for name in tensors if (found := pattern.match(name))]
    levels = len({level for level, _ in numbers})
    inferred = {
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
            inferred[f"use_{name}"] = False
    return inferred
