"""The UNet in the names of CompVis and SGM: table of names, and what its shapes imply for its config.

input_blocks.0.0                 conv_in
input_blocks.{b (layers+1) + 1 + l}   down_blocks.b: resnet l and, as .1, its attention; after the last one the downsampler
middle_block.0, .1, .2           resnet, attention, resnet
output_blocks.{b (layers+1) + l} up_blocks.b: the same; the upsampler is the last member of the last one
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any, Self

from distrijax.convert.configs import shape_of
from distrijax.convert.engine import Row, Table, rows
from distrijax.errors import CheckpointError
from distrijax.weights.tensors import Tensors

RESNET = Table(
    *rows("in_layers.0 norm1, in_layers.2 conv1, emb_layers.1 time_emb_proj, out_layers.0 norm2, out_layers.3 conv2"),
    *rows("skip_connection conv_shortcut"),
)

ATTENTION = ", ".join(f"attn{n}.to_{name}" for n in (1, 2) for name in ("q", "k", "v", "out.0"))
BLOCK = Table(*rows(ATTENTION), *rows("ff.net.0.proj, ff.net.2, norm1, norm2, norm3"))
TRANSFORMER = Table(*rows("norm, proj_in, proj_out"), *rows("transformer_blocks.{n}", BLOCK))
"""The same names in both; proj_in and proj_out are convolutions in SD 1.x and linear layers later, in both too."""

TIME_COND = "time_embedding.cond_proj.weight"
"""Embeds the guidance scale in latent consistency models; the original layout has no name for it."""


@dataclasses.dataclass(frozen=True)
class UNetLayout:
    """What the numbers of the blocks depend on.

    layers: resnets of a block on the way down. down, up: whether each block has attention.
    """

    layers: int
    down: tuple[bool, ...]
    up: tuple[bool, ...]

    @classmethod
    def of_source(cls, names: Iterable[str], what: str) -> Self:
        """From names in the original layout; raises CheckpointError for blocks of unequal size."""
        names = set(names)
        numbers = {int(found[1]) for name in names if (found := re.match(r"input_blocks\.(\d{1,2})\.", name, re.ASCII))}
        ends = sorted(n for n in numbers if f"input_blocks.{n}.0.op.weight" in names)
        blocks = len(ends) + 1
        period = len(numbers) // blocks  # conv_in stands where the last block lacks a downsampler
        if (
            numbers != set(range(blocks * period))
            or ends != [period * (b + 1) for b in range(blocks - 1)]
            or period < 2
        ):
            raise CheckpointError(
                f"{what}: the UNet has {len(numbers)} input blocks, of which {ends} downsample; "
                "only blocks of one size are supported; use another model"
            )
        return cls(
            layers=period - 1,
            down=tuple(f"input_blocks.{b * period + 1}.1.norm.weight" in names for b in range(blocks)),
            up=tuple(f"output_blocks.{b * period}.1.norm.weight" in names for b in range(blocks)),
        )

    @classmethod
    def of_diffusers(cls, names: Iterable[str], what: str) -> Self:
        """From diffusers' names; raises as `of_source`."""
        resnets, down, up = {}, {}, {}
        for name in names:
            if found := re.match(r"(down|up)_blocks\.(\d{1,3})\.(resnets|attentions)\.(\d{1,3})\.", name, re.ASCII):
                side, block, kind, number = found[1], int(found[2]), found[3], int(found[4])
                resnets.setdefault((side, block), set()).add(number)
                attention = down if side == "down" else up
                attention[block] = attention.get(block, False) or kind == "attentions"
        layers = len(resnets.get(("down", 0), ()))
        sizes = {"down": layers, "up": layers + 1}
        if sorted(down) != sorted(up) or any(len(found) != sizes[side] for (side, _), found in resnets.items()):
            raise CheckpointError(
                f"{what}: the UNet's blocks have different numbers of layers; only blocks of one size are supported; "
                "use another model"
            )
        return cls(layers, tuple(down[b] for b in sorted(down)), tuple(up[b] for b in sorted(up)))


def unet_table(layout: UNetLayout) -> Table:
    """Rows of a UNet's tensors, whose names start with `input_blocks.` and so on."""
    found = [
        *rows("time_embed.0 time_embedding.linear_1, time_embed.2 time_embedding.linear_2"),
        *rows("label_emb.0.0 add_embedding.linear_1, label_emb.0.2 add_embedding.linear_2"),
        *rows("input_blocks.0.0 conv_in, out.0 conv_norm_out, out.2 conv_out"),
        *rows("middle_block.0 mid_block.resnets.0, middle_block.2 mid_block.resnets.1", RESNET),
        *rows("middle_block.1 mid_block.attentions.0", TRANSFORMER),
    ]
    period = layout.layers + 1
    for block, attention in enumerate(layout.down):
        first = block * period + 1
        found += _members("input_blocks", first, layout.layers, f"down_blocks.{block}", attention)
        if block < len(layout.down) - 1:
            found += rows(f"input_blocks.{first + layout.layers}.0.op down_blocks.{block}.downsamplers.0.conv")
    for block, attention in enumerate(layout.up):
        last, member = (block + 1) * period - 1, 2 if attention else 1
        found += _members("output_blocks", block * period, period, f"up_blocks.{block}", attention)
        if block < len(layout.up) - 1:
            found += rows(f"output_blocks.{last}.{member}.conv up_blocks.{block}.upsamplers.0.conv")
    return Table(*found)


def _members(source: str, first: int, count: int, block: str, attention: bool) -> list[Row]:
    """Rows of a block's resnets and attentions."""
    found: list[Row] = []
    for n in range(count):
        found += rows(f"{source}.{first + n}.0 {block}.resnets.{n}", RESNET)
        if attention:
            found += rows(f"{source}.{first + n}.1 {block}.attentions.{n}", TRANSFORMER)
    return found


def describe_unet(tensors: Tensors, what: str) -> dict[str, Any]:
    """The keys of diffusers' config that the shapes of its UNet imply; None in a list: nothing is known of that block."""
    layout = UNetLayout.of_diffusers(tensors, what)
    blocks = range(len(layout.down))
    with_attention = [f"down_blocks.{b}.attentions.0." if layout.down[b] else None for b in blocks]
    with_attention[-1] = with_attention[-1] or "mid_block.attentions.0."
    some = next(filter(None, with_attention))
    conv_in = shape_of(tensors, "conv_in.weight", what, 4)
    inferred = {
        "in_channels": conv_in[1],
        "out_channels": shape_of(tensors, "conv_out.weight", what, 4)[0],
        "block_out_channels": [
            shape_of(tensors, f"down_blocks.{b}.resnets.0.conv1.weight", what, 4)[0] for b in blocks
        ],
        "layers_per_block": layout.layers,
        "down_block_types": ["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in layout.down],
        "up_block_types": ["CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in layout.up],
        "transformer_layers_per_block": [name and _depth(tensors, name) for name in with_attention],
        "cross_attention_dim": shape_of(tensors, f"{some}transformer_blocks.0.attn2.to_k.weight", what, 2)[1],
        "use_linear_projection": len(shape_of(tensors, f"{some}proj_in.weight", what, 2, 4)) == 2,
    }
    if "add_embedding.linear_1.weight" in tensors:
        inferred["addition_embed_type"] = "text_time"
        inferred["projection_class_embeddings_input_dim"] = shape_of(tensors, "add_embedding.linear_1.weight", what, 2)[
            1
        ]
    if TIME_COND in tensors:
        inferred["time_cond_proj_dim"] = shape_of(tensors, TIME_COND, what, 2)[1]
    return inferred


def _depth(tensors: Tensors, attention: str) -> int:
    pattern = re.compile(re.escape(attention) + r"transformer_blocks\.(\d+)\.", re.ASCII)
    return len({found[1] for name in tensors if (found := pattern.match(name))})
