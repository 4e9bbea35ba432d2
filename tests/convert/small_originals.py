"""Small files in the original layouts, of random weights."""

from __future__ import annotations

import numpy as np
from original_layouts import clip, open_clip, prefixed, unet, vae

from distrijax.convert.layouts.original import from_original
from distrijax.weights.checkpoint import Checkpoint
from distrijax.weights.tensors import Tensors, of_array

FAMILIES = ("sd1", "sd2", "sdxl", "refiner")

CONFIG = {
    "unet": {"attention_head_dim": 4, "norm_num_groups": 8},
    "vae": {"norm_num_groups": 8},
    "text_encoder": {"num_attention_heads": 4},
    "text_encoder_2": {"num_attention_heads": 4},
}
"""What the shapes of a small model do not tell."""

FILES = {"tokenizer/vocab.json": b"{}"}


def small(family: str) -> Tensors:
    """A small file of the family, of random weights."""
    sizes = {"width": 32, "multipliers": (1, 2), "middle_depth": 2, "linear_projection": family != "sd1"}
    label = {"sdxl": 80 + 6 * 8, "refiner": 80 + 5 * 8}.get(family)
    context = {"sd1": 48, "sd2": 64, "sdxl": 128, "refiner": 80}[family]
    shapes = prefixed("model.diffusion_model.", unet(depths=(1, 2), context=context, label=label, **sizes))
    shapes |= prefixed("first_stage_model.", vae(32, (1, 2)))
    shapes |= {
        "sd1": prefixed("cond_stage_model.transformer.", clip(48, 2, 100)),
        "sd2": prefixed("cond_stage_model.model.", open_clip(64, 3, 100)),
        "sdxl": prefixed("conditioner.embedders.0.transformer.", clip(48, 2, 100))
        | prefixed("conditioner.embedders.1.model.", open_clip(80, 2, 100)),
        "refiner": prefixed("conditioner.embedders.0.model.", open_clip(80, 2, 100)),
    }[family]
    rng = np.random.default_rng(0)
    return {name: of_array(rng.normal(size=shape).astype(np.float16)) for name, shape in shapes.items()}


def convert(tensors: Tensors, **options) -> Checkpoint:
    return from_original(tensors, "file", **{"config": CONFIG, "files": FILES} | options)


def same_bytes(one: Tensors, other: Tensors) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        read = other[name].read()
        assert tensor.dtype == other[name].dtype == read.dtype and tensor.shape == other[name].shape == read.shape
        assert tensor.read().tobytes() == read.tobytes(), name
