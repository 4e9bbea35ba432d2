"""Families of models: the components that a Stable Diffusion pipeline has, and how its text encoders are used."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from distrijax.models.unet_config import UNetConfig
from distrijax.models.vae import VAEConfig


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """What distinguishes a family of models.

    Attributes:
        name: For messages.
        pipeline: The class of this package that loads it.
        suffixes: Of the folders `tokenizer` and `text_encoder`, in the order in which embeddings are concatenated.
        pooled: Whether the last text encoder has a projection and the UNet reads its pooled embedding.
        penultimate: Whether the UNet reads token embeddings before the last layer, or after it and the final norm.
        sample_size: Rows and columns of the latent, for a UNet whose config has no sample_size.
        scheduler: Options that take precedence over scheduler_config.json.
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
        """The folders that a checkpoint must have."""
        return *self.tokenizers, *self.text_encoders, "unet", "vae", "scheduler"


SD = Family(
    name="Stable Diffusion",
    pipeline="DistriSDPipeline",
    suffixes=("",),
    pooled=False,
    penultimate=False,
    sample_size=64,
    scheduler={"steps_offset": 1, "clip_sample": False},  # diffusers corrects old files in the same way
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
"""The supported families, by `_class_name` of model_index.json."""

PARTS = tuple(dict.fromkeys(part for family in FAMILIES.values() for part in family.parts))
"""The folders that checkpoints of any family may have."""


def default_size(family: Family, unet: UNetConfig, vae: VAEConfig) -> tuple[int, int]:
    """Height and width that a model was trained for, in pixels.

    Args:
        family: Gives the size where the UNet's configuration has none.
        unet: Its `sample_size` is in pixels of the latent.
        vae: Gives the pixels of the image for each of the latent.
    """
    size = unet.sample_size or family.sample_size
    height, width = size if isinstance(size, tuple) else (size, size)
    return height * vae.scale, width * vae.scale
