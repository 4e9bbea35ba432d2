"""Names and axis orders of parameters: PyTorch's in a checkpoint, this project's in memory."""

from __future__ import annotations

import numpy as np

ParamPath = tuple[str | int, ...]
"""A parameter's path in a module, such as ("down_blocks", 0, "resnets", 1, "conv1", "kernel")."""

IGNORED = ("text_model.embeddings.position_ids",)
"""Tensors that some checkpoints contain and no model needs."""

UNPREFIXED = ("embeddings.", "encoder.layers.", "final_layer_norm.")
"""Prefixes of names in text encoders that transformers 5 wrote without `text_model.`"""

DEPRECATED = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""Names of the projections of attention in old VAEs, such as those of Stable Diffusion 1.x and 2.x."""

MAX_SHOWN = 150
"""Most characters of a name that an error shows."""


def checkpoint_name(path: tuple) -> str:
    """The PyTorch name of a parameter's path.

    Args:
        path: Keys of the modules, then the parameter's name within its layer.
    """
    *module, leaf = path
    return ".".join(map(str, [*module, leaf if leaf == "bias" else "weight"]))


def to_native(leaf: str, tensor: np.ndarray) -> np.ndarray:
    """A PyTorch parameter in this project's axis order.

    Args:
        leaf: The parameter's name within its layer, such as "kernel".
        tensor: The parameter in PyTorch's axis order.
    """
    return tensor.transpose(native_axes(leaf, tensor.ndim))


def to_pytorch(leaf: str, tensor: np.ndarray) -> np.ndarray:
    """The inverse of `to_native`.

    Args:
        leaf: The parameter's name within its layer, such as "kernel".
        tensor: The parameter in this project's axis order.
    """
    return tensor.transpose(np.argsort(native_axes(leaf, tensor.ndim)))


def native_axes(leaf: str, rank: int) -> tuple[int, ...]:
    """PyTorch's axes of a parameter in this project's order.

    Args:
        leaf: The parameter's name within its layer, such as "kernel".
        rank: Its number of axes.
    """
    kernels = {4: (2, 3, 1, 0), 2: (1, 0)}
    return kernels[rank] if leaf == "kernel" and rank in kernels else tuple(range(rank))


def current_name(name: str) -> str:
    """A parameter's name as diffusers and transformers write it today.

    Args:
        name: A name in a checkpoint, possibly of an older version.
    """
    if name.startswith(UNPREFIXED):
        return f"text_model.{name}"
    if ".mid_block.attentions." in name:
        for old, new in DEPRECATED.items():
            name = name.replace(old, new)
    return name


def shown(name: str) -> str:
    """A name from a file, shortened and made printable."""
    short = name if len(name) <= MAX_SHOWN else f"{name[:MAX_SHOWN]}..."
    return short if short.isprintable() else ascii(short)
