"""Stable Diffusion XL in SGM's layout: CLIP-L and OpenCLIP bigG, and a UNet that reads the pooled embedding and six sizes."""

from __future__ import annotations

from distrijax.convert.kinds import Kind
from distrijax.convert.layouts.family import (
    CLIP_L,
    OPEN_CLIP_BIG_G,
    SCHEDULER,
    UNET_CONFIG,
    VAE_CONFIG,
    OriginalFamily,
    Text,
    index_of,
)

XL_SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    **SCHEDULER,
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}

XL_VAE = {**VAE_CONFIG, "force_upcast": True, "sample_size": 1024, "scaling_factor": 0.13025}

SDXL = OriginalFamily(
    kind=Kind.SDXL,
    unet={
        **UNET_CONFIG,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "projection_class_embeddings_input_dim": 2816,
        "sample_size": 128,
        "transformer_layers_per_block": [1, 2, 10],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "use_linear_projection": True,
    },
    vae=XL_VAE,
    texts=(
        Text(
            suffix="",
            theirs="conditioner.embedders.0.transformer.",
            config=CLIP_L,
            pad_token="<|endoftext|>",
            open_clip=False,
        ),
        Text(
            suffix="_2",
            theirs="conditioner.embedders.1.model.",
            config=OPEN_CLIP_BIG_G,
            pad_token="!",
            open_clip=True,
        ),
    ),
    scheduler=XL_SCHEDULER,
    index=index_of(
        "StableDiffusionXLPipeline",
        "",
        "_2",
        scheduler=["diffusers", "EulerDiscreteScheduler"],
        force_zeros_for_empty_prompt=True,
    ),
    head_width=64,
    time_ids=6,
)
