"""SDXL's pipeline with every part small and random, made by torch diffusers and transformers."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from scenes import all_captions_vocabulary
from tiny_tokenizer import train_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

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


def save_tiny_pipeline(folder: Path, *, seed: int = 0) -> None:
    """Writes the pipeline to `folder` in the diffusers layout, float32; the same weights for the same seed."""
    texts = Path(tempfile.mkdtemp())
    for name, pad_token in PADDINGS.items():
        train_tokenizer(all_captions_vocabulary(), texts / name, vocab_size=1024, pad_token=pad_token)
    tokenizers = {name: CLIPTokenizer.from_pretrained(texts / name) for name in PADDINGS}
    torch.manual_seed(seed)
    parts = {
        "unet": UNet2DConditionModel(**UNET),
        "vae": AutoencoderKL(**VAE),
        "text_encoder": CLIPTextModel(_text_config(tokenizers["tokenizer"], hidden_act="quick_gelu")),
        "text_encoder_2": CLIPTextModelWithProjection(_text_config(tokenizers["tokenizer_2"], hidden_act="gelu")),
    }
    for part in parts.values():
        _disturb(part)
    scheduler = EulerDiscreteScheduler(**SCHEDULER)
    StableDiffusionXLPipeline(**parts, **tokenizers, scheduler=scheduler).save_pretrained(folder)
    for name in PADDINGS:  # transformers has saved them in its own way; these are files as SDXL has them
        shutil.rmtree(folder / name)
        shutil.move(texts / name, folder / name)
    texts.rmdir()


def load_torch_pipeline(folder: Path) -> StableDiffusionXLPipeline:
    """The pipeline as torch diffusers reads it, in float32, without watermark and progress bar."""
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, dtype=torch.float32, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _text_config(tokenizer: CLIPTokenizer, *, hidden_act: str) -> CLIPTextConfig:
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return CLIPTextConfig(**TEXT_ENCODER, **special, vocab_size=len(tokenizer), hidden_act=hidden_act)


def _disturb(module: torch.nn.Module) -> None:
    """Moves biases and the scales of norms away from 0 and 1, which would hide that they are not used."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
