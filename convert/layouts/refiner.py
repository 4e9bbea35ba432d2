"""The refiner of Stable Diffusion XL in SGM's layout: OpenCLIP bigG alone, and a UNet of its own that reads an aesthetic score."""

from __future__ import annotations

from distrijax.convert.kinds import Kind
from distrijax.convert.layouts.family import OPEN_CLIP_BIG_G, OriginalFamily, Text, index_of
from distrijax.convert.layouts.sdxl import SDXL, XL_SCHEDULER, XL_VAE

REFINER = OriginalFamily(
    kind=Kind.REFINER,
    unet={
        **SDXL.unet,
        "attention_head_dim": [6, 12, 24, 24],
        "block_out_channels": [384, 768, 1536, 1536],
        "cross_attention_dim": 1280,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "projection_class_embeddings_input_dim": 2560,
        "transformer_layers_per_block": 4,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    },
    vae=XL_VAE,
    texts=(
        Text(
            suffix="_2",
            theirs="conditioner.embedders.0.model.",
            config=OPEN_CLIP_BIG_G,
            pad_token="!",
            open_clip=True,
        ),
    ),
    scheduler=XL_SCHEDULER,
    index=index_of(
        "StableDiffusionXLImg2ImgPipeline",
        "_2",
        text_encoder=[None, None],
        tokenizer=[None, None],
        scheduler=["diffusers", "EulerDiscreteScheduler"],
        force_zeros_for_empty_prompt=False,
        requires_aesthetics_score=True,
    ),
    head_width=64,
    time_ids=5,
)
