"""Families of models: which parts a pipeline of Stable Diffusion has, and how they are used."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from distrijax.models.unet_config import UNetConfig
from distrijax.models.vae import VAEConfig


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """What tells one family of models from the other: the parts of its text, and how they are used.

    name: for people. pipeline: the class of this package that paints with it.
    suffixes: of the folders `tokenizer` and `text_encoder`, in the order in which the encoders' embeddings are joined.
    pooled: whether the last encoder has a projection, whose pooled embedding the UNet reads.
    penultimate: what the UNet reads of a token: its embedding before the last layer, or the last one, normalised.
    sample_size: rows of the latent, for a UNet whose config names none.
    scheduler: options that hold whatever scheduler_config.json says.
    """

    name: str
    pipeline: str
    suffixes: tuple[str, ...]
    pooled: bool
    penultimate: bool
    sample_size: int
    scheduler: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def tokenizers(self) -> tuple[str, ...]:
        return tuple(f"tokenizer{suffix}" for suffix in self.suffixes)

    @property
    def text_encoders(self) -> tuple[str, ...]:
        return tuple(f"text_encoder{suffix}" for suffix in self.suffixes)

    @property
    def parts(self) -> tuple[str, ...]:
        """The folders that a checkpoint needs."""
        return *self.tokenizers, *self.text_encoders, "unet", "vae", "scheduler"


SD = Family(
    name="Stable Diffusion",
    pipeline="DistriSDPipeline",
    suffixes=("",),
    pooled=False,
    penultimate=False,
    sample_size=64,
    scheduler={"steps_offset": 1, "clip_sample": False},  # diffusers corrects old files so, too
)
SDXL = Family(
    name="Stable Diffusion XL",
    pipeline="DistriSDXLPipeline",
    suffixes=("", "_2"),
    pooled=True,
    penultimate=True,
    sample_size=128,
)

FAMILIES = {"StableDiffusionPipeline": SD, "StableDiffusionXLPipeline": SDXL}
"""By `_class_name` of model_index.json."""

PARTS = tuple(dict.fromkeys(part for family in FAMILIES.values() for part in family.parts))
"""The folders that a checkpoint of any family needs."""


def default_size(family: Family, unet: UNetConfig, vae: VAEConfig) -> tuple[int, int]:
    """Height and width in pixels that a model was trained for."""
    size = unet.sample_size or family.sample_size
    height, width = size if isinstance(size, tuple) else (size, size)
    return height * vae.scale, width * vae.scale
