"""Names and layouts of the Flax models that diffusers and transformers had: UNet, VAE and CLIP's text encoders.

Flax joins a module of a list to its number (`down_blocks_0`), ends names in `kernel`, `scale` and `embedding`, has the channels
of a convolution last (HWIO) and linear layers transposed. The attention of its VAE has the names that PyTorch's had at first.
Both libraries have dropped these models, so such files are read and not written.
"""

from __future__ import annotations

import re
from functools import partial

import numpy as np

from distrijax.convert.engine import raise_for
from distrijax.weights.names import current_name, native_axes, to_pytorch
from distrijax.weights.tensors import Tensors

LISTS = re.compile(
    r"\b(down_blocks|up_blocks|resnets|attentions|downsamplers|upsamplers|transformer_blocks|to_out|net)_(\d+)\b",
    re.ASCII,
)

LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def from_flax(tensors: Tensors, what: str) -> Tensors:
    """The tensors of a Flax model with PyTorch's names and layouts.

    what: the file, for the error. Raises CheckpointError that lists all tensors that no layer of Flax has.
    """
    if unknown := [name for name in tensors if name.rpartition(".")[2] not in LEAVES]:
        raise_for({"unknown": unknown}, what)
    found: Tensors = {}
    for name, tensor in tensors.items():
        module, _, leaf = LISTS.sub(r"\1.\2", name).rpartition(".")
        axes = np.argsort(native_axes(leaf, len(tensor.shape)))
        shape = tuple(tensor.shape[axis] for axis in axes)
        found[current_name(f"{module}.{LEAVES[leaf]}")] = tensor.then(partial(to_pytorch, leaf), shape=shape)
    return found
