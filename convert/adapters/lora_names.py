"""The names of a LoRA's tensors: the role of each, and the module it belongs to.

lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight        kohya, with diffusers' names of the blocks
lora_unet_input_blocks_4_1_proj_in.lora_down.weight                  kohya, with the original ones
lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha
unet.down_blocks.1.attentions.0.proj_in.lora_A.weight                diffusers
unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight    before version 0.23
base_model.model.down_blocks.1.attentions.0.proj_in.lora_A.default.weight                 PEFT, of a part that it does not name
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from distrijax.convert.adapters.merging import FULL, LOHA, LOKR, LORA, Method
from distrijax.convert.engine import Table
from distrijax.convert.layouts.original_unet import UNetLayout, unet_table
from distrijax.weights.checkpoint import Checkpoint
from distrijax.weights.names import current_name

PARTS = ("unet", "text_encoder", "text_encoder_2")
"""What a LoRA can change."""

UNDERSCORED = {"unet": ("lora_unet_",), "text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",)}
"""Prefixes of names with underscores in place of dots."""

ROLES: tuple[tuple[str, Method | None, str | None, str], ...] = (
    (r"\.lora_(?P<role>down|up|mid)\.weight", LORA, None, "weight"),
    (r"\.lora_A(\.[^.]+)?\.weight", LORA, "down", "weight"),
    (r"\.lora_B(\.[^.]+)?\.weight", LORA, "up", "weight"),
    (r"(\.lora|_lora|\.lora_linear_layer)\.(?P<role>down|up)\.weight", LORA, None, "weight"),
    (r"\.hada_(?P<role>[wt][12](_[ab])?)", LOHA, None, "weight"),
    (r"\.lokr_(?P<role>[wt][12](_[ab])?)", LOKR, None, "weight"),
    (r"\.(diff|w_norm)", FULL, "diff", "weight"),
    (r"\.(diff_b|b_norm)", FULL, "diff", "bias"),
    (r"(\.lora|_lora|\.lora_linear_layer)?\.alpha", None, "alpha", "weight"),
    (r"\.dora_scale", None, "dora_scale", "weight"),
    (r"[._]lora_magnitude_vector(\.[^.]+?)?(\.weight)?", None, "magnitude", "weight"),
)
"""Ends of names: pattern, method (None: any), role, and which tensor of the module it changes."""

ENDS = [(re.compile(rf"(?P<module>.+?){end}", re.ASCII | re.DOTALL), *rest) for end, *rest in ROLES]

FOREIGN = {
    "OFT or BOFT": r"\.(oft_\w+|boft_\w+)(\.|$)",
    "GLoRA": r"\.([ab][12]\.weight|glora_\w+)$",
    "(IA)3": r"\.(ia3_l|on_input)(\.|$)",
    "VeRA": r"vera_lambda",
    "LoRA of an embedding": r"lora_embedding_[AB]",
    "LoRA with a bias of its own": r"\.lora_(B(\.[^.]+)?|up)\.bias$",
}
"""Methods that are not supported: a pattern that one of their tensors has."""


class Key(NamedTuple):
    """A tensor's name taken apart. module: as the file spells it. leaf: `weight` or `bias` of that module."""

    module: str
    method: Method | None
    role: str
    leaf: str


class Target(NamedTuple):
    """A tensor of the checkpoint. original: found by its name in the original layout."""

    part: str
    name: str
    original: bool = False


def read_key(name: str) -> Key | None:
    """The parts of a name; None for an unknown one."""
    for pattern, method, role, leaf in ENDS:
        if found := pattern.fullmatch(name):
            module = found["module"].replace("base_model.model.", "").replace(".processor.", ".")
            return Key(module, method, role or found["role"], leaf)
    return None


def is_pefts(names: Iterable[str]) -> bool:
    """Whether PEFT wrote these names; it writes no alpha with them."""
    return any("base_model.model." in name for name in names)


def spellings(checkpoint: Checkpoint) -> dict[tuple[str, str], list[Target]]:
    """All tensors that a LoRA can change, by each name of their module and `weight` or `bias`; PEFT's names may fit several."""
    found: dict[tuple[str, str], list[Target]] = {}
    for part in PARTS:
        tensors = checkpoint.tensors.get(part, {})
        is_unet = part == "unet" and tensors
        table = unet_table(UNetLayout.of_diffusers(tensors, "the checkpoint's UNet")) if is_unet else None
        for name in tensors:
            module, _, leaf = name.rpartition(".")
            for spelt, original in set(_spelt(part, module, leaf, table)):
                found.setdefault((spelt, leaf), []).append(Target(part, name, original))
    return found


def _spelt(part: str, module: str, leaf: str, table: Table | None) -> Iterator[tuple[str, bool]]:
    """A module's names, each with whether it is one of the original layout."""
    for name in _aliases(part, module):
        for spelt in (name, f"{part}.{name}", *(prefix + name.replace(".", "_") for prefix in UNDERSCORED[part])):
            yield spelt, False
    if table and (mapped := table.from_diffusers(f"{module}.{leaf}")):
        name = mapped.source.removesuffix(f".{leaf}")
        yield "lora_unet_" + name.replace(".", "_"), True
        for prefix in ("diffusion_model.", "model.diffusion_model.", "unet."):
            yield prefix + name, True


def _aliases(part: str, module: str) -> Iterator[str]:
    """A module's names in diffusers and transformers, now and before."""
    if part == "unet":
        yield module
        if module.endswith(".to_out.0"):
            yield module.removesuffix(".0")
        return
    current = current_name(module)
    yield current
    yield current.removeprefix("text_model.")  # as transformers 5 has it
    if found := re.fullmatch(r"(.+\.self_attn\.)(q|k|v|out)_proj", current):
        yield f"{found[1]}to_{found[2]}"
