"""The embedded model as a folder in the diffusers layout: written from what is trained, and read to train on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from distrijax.convert.layouts.folder import read_model
from distrijax.json_config import read_json
from distrijax.models.vae import AutoencoderKL, VAEConfig
from distrijax.weights.load import load_module, save_module
from embedded.autoencoder import new_vae
from embedded.painting import SCHEDULER, Painter

INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "force_zeros_for_empty_prompt": True,
    "vae": ["diffusers", "AutoencoderKL"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "DDIMScheduler"],
}


def parts_of(painter: Painter) -> dict[str, nnx.Module]:
    """The modules of a painter by the names of their folders."""
    texts = painter.texts
    return {"unet": painter.unet, "text_encoder": texts.text_encoder, "text_encoder_2": texts.text_encoder_2}


def write_part(folder: Path, name: str, module: nnx.Module, **changes: Any) -> None:
    """One module, in float16. changes: to its config."""
    config = {"_class_name": INDEX[name][1], **dataclasses.asdict(module.config), **changes}
    stem = "model" if name.startswith("text") else "diffusion_pytorch_model"
    save_module(module, config, folder / name, stem=stem, dtype=np.float16)


def write_rest(folder: Path) -> None:
    """What a pipeline has beside modules and tokenizers."""
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    for name, content in (("scheduler/scheduler_config.json", SCHEDULER), ("model_index.json", INDEX)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_part(folder: Path, name: str, module: nnx.Module) -> nnx.Module:
    """The module with the weights of `folder`, in float32, or as it is where the folder has none."""
    if not (folder / name / "config.json").exists():
        return module
    abstract = nnx.eval_shape(lambda: module)
    return load_module(
        abstract,
        read_model(folder / name),
        str(folder / name),
        dtype=jnp.float32,
        place=lambda _, stored: jnp.asarray(stored[_all(stored)]),
    )


def read_vae(folder: Path, seed: int) -> AutoencoderKL:
    """The autoencoder of the folder, of whatever width, or an untrained one."""
    file = folder / "vae" / "config.json"
    if not file.exists():
        return new_vae(seed)
    return read_part(folder, "vae", AutoencoderKL(VAEConfig.from_dict(read_json(file)), rngs=nnx.Rngs(seed)))


def read_painter(folder: Path, painter: Painter) -> Painter:
    """The painter with the folder's weights, as far as it has them."""
    painter.unet = read_part(folder, "unet", painter.unet)
    for name in ("text_encoder", "text_encoder_2"):
        setattr(painter.texts, name, read_part(folder, name, getattr(painter.texts, name)))
    return painter


def read_scale(folder: Path) -> float | None:
    """What the latents are multiplied by, where the folder has a UNet that was trained so."""
    if not (folder / "unet" / "config.json").exists():
        return None
    return float(read_json(folder / "vae" / "config.json")["scaling_factor"])


def _all(stored) -> tuple[slice, ...]:
    return (slice(None),) * len(stored.shape)
