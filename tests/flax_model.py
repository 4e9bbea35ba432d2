"""Models as the Flax classes of diffusers and transformers name and lay out their tensors, by the rules of those libraries."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import flax.serialization
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file

from distrijax.weights.names import current_name
from distrijax.weights.tensors import Tensors, of_array


def to_flax(ours: Tensors, part: str) -> Tensors:
    """Of PyTorch's names `name.1` is joined to `name_1`, and the last is told by the kind of the layer.

    CLIP's layers keep their dot; the VAE's attention has names of its own.
    """
    found = {}
    for name, tensor in ours.items():
        if name.endswith("position_ids"):
            continue
        module, leaf = name.rsplit(".", 1)
        module = module if part.startswith("text") else re.sub(r"\.(\d+)(?=\.|$)", r"_\1", module)
        if part == "vae":
            for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out_0": "proj_attn"}.items():
                module = re.sub(rf"\.{new}$", f".{old}", module)
        if leaf == "weight" and len(tensor.shape) == 1:
            leaf = "scale"
        elif leaf == "weight" and module.endswith(("token_embedding", "position_embedding")):
            leaf = "embedding"
        elif leaf == "weight":
            leaf, order = "kernel", (2, 3, 1, 0) if len(tensor.shape) == 4 else (1, 0)
            shape = tuple(tensor.shape[axis] for axis in order)
            tensor = tensor.then(lambda array, order=order: array.transpose(order), shape=shape)
        found[f"{module}.{leaf}"] = tensor
    return found


def flax_bytes(tensors: Tensors) -> bytes:
    """The file that flax.serialization makes of them."""
    tree = {tuple(name.split(".")): tensor.read() for name, tensor in tensors.items()}
    return flax.serialization.msgpack_serialize(unflatten_dict(tree))


def flax_folder(model: Path, folder: Path) -> Path:
    """A folder in the diffusers layout with the weights of another one in Flax's files."""
    shutil.copytree(model, folder)
    for file in folder.glob("*/*.safetensors"):
        tensors = {current_name(name): of_array(array) for name, array in load_file(file).items()}
        name = "flax_model" if file.stem == "model" else "diffusion_flax_model"
        file.with_name(f"{name}.msgpack").write_bytes(flax_bytes(to_flax(tensors, file.parent.name)))
        file.unlink()
    return folder
