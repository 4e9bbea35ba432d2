"""Pipelines of Stable Diffusion XL, 1.x and 2.x with every part small and random, made by torch diffusers and transformers."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from oracle import disturb
from tiny_tokenizer import train_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from distrijax.cli.fidelity.scenes import all_captions_vocabulary

PADDINGS = {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}
TEXT_WIDTH = 32
TEXT_ENCODER = {
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 2 * TEXT_WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "projection_dim": TEXT_WIDTH,
}
UNET = {
    "sample_size": 16,
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (2, 4, 4),
    "norm_num_groups": 16,
    "use_linear_projection": True,
    "cross_attention_dim": 2 * TEXT_WIDTH,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": TEXT_WIDTH + 6 * 8,
}
SHALLOW = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": 1,
    "attention_head_dim": (2, 4),
}
"""Of a UNet that compiles in half the time: two levels and one transformer layer in a block."""
VAE = {
    "sample_size": 128,
    "block_out_channels": (16, 32, 32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "scaling_factor": 0.13025,
}
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
SD_UNET = UNET | {
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "transformer_layers_per_block": 1,
    "cross_attention_dim": TEXT_WIDTH,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
}
SD_UNETS = {
    1: SD_UNET | {"attention_head_dim": 4, "use_linear_projection": False},
    2: SD_UNET | {"attention_head_dim": (2, 4, 4), "use_linear_projection": True, "upcast_attention": True},
}
SD_VAE = VAE | {"scaling_factor": 0.18215}
SD_TEXTS = {1: ("<|endoftext|>", "quick_gelu"), 2: ("!", "gelu")}
SD_SCHEDULERS = {
    1: PNDMScheduler(**SCHEDULER, skip_prk_steps=True),
    2: DDIMScheduler(**SCHEDULER, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False),
}


def save_tiny_pipeline(folder: Path, *, seed: int = 0, scheduler: Any = None, **unet: Any) -> None:
    """Writes an SDXL pipeline to `folder` in the diffusers layout, float32; the same weights for the same seed.

    scheduler: of diffusers, instead of Euler's. unet: what its config has besides `UNET`, or in its place.
    """
    with tempfile.TemporaryDirectory() as texts:
        tokenizers = _train_tokenizers(PADDINGS, texts)
        torch.manual_seed(seed)
        parts = {
            "unet": UNet2DConditionModel(**(UNET | unet)),
            "vae": AutoencoderKL(**VAE),
            "text_encoder": CLIPTextModel(_text_config(tokenizers["tokenizer"], hidden_act="quick_gelu")),
            "text_encoder_2": CLIPTextModelWithProjection(_text_config(tokenizers["tokenizer_2"], hidden_act="gelu")),
        }
        for part in parts.values():
            disturb(part)
        scheduler = scheduler or EulerDiscreteScheduler(**SCHEDULER)
        _save(StableDiffusionXLPipeline(**parts, **tokenizers, scheduler=scheduler), folder, texts)


def save_tiny_sd_pipeline(folder: Path, version: int, *, seed: int = 0, scheduler: Any = None, **unet: Any) -> None:
    """The same of a pipeline like Stable Diffusion 1.x or 2.x (with v-prediction): version 1 or 2."""
    padding, hidden_act = SD_TEXTS[version]
    with tempfile.TemporaryDirectory() as texts:
        tokenizers = _train_tokenizers({"tokenizer": padding}, texts)
        torch.manual_seed(seed)
        parts = {
            "unet": UNet2DConditionModel(**(SD_UNETS[version] | unet)),
            "vae": AutoencoderKL(**SD_VAE),
            "text_encoder": CLIPTextModel(_text_config(tokenizers["tokenizer"], hidden_act=hidden_act)),
        }
        for part in parts.values():
            disturb(part)
        absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        scheduler = scheduler or SD_SCHEDULERS[version]
        pipe = StableDiffusionPipeline(**parts, **tokenizers, **absent, scheduler=scheduler)
        _save(pipe, folder, texts)


def load_torch_pipeline(folder: Path) -> DiffusionPipeline:
    """The pipeline as torch diffusers reads it, in float32, without watermark and progress bar."""
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.watermark = None  # SDXL's
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _train_tokenizers(paddings: dict[str, str], texts: str) -> dict[str, CLIPTokenizer]:
    """Tokenizers by the name of their folder, read from files in `texts` such as Stable Diffusion has them."""
    for name, pad_token in paddings.items():
        train_tokenizer(all_captions_vocabulary(), Path(texts, name), vocab_size=1024, pad_token=pad_token)
    return {name: CLIPTokenizer.from_pretrained(Path(texts, name)) for name in paddings}


def _save(pipe: DiffusionPipeline, folder: Path, texts: str) -> None:
    pipe.save_pretrained(folder)
    for tokenizer in Path(
        texts
    ).iterdir():  # transformers has saved them in its own way; these files are as they were read
        shutil.rmtree(folder / tokenizer.name)
        shutil.copytree(tokenizer, folder / tokenizer.name)


def _text_config(tokenizer: CLIPTokenizer, *, hidden_act: str) -> CLIPTextConfig:
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return CLIPTextConfig(**TEXT_ENCODER, **special, vocab_size=len(tokenizer), hidden_act=hidden_act)
