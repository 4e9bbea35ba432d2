"""Stable Diffusion 1.x in the layout of CompVis: CLIP-L, a UNet with convolutions around its transformers, 512x512."""

from __future__ import annotations

from distrijax.convert.kinds import Kind
from distrijax.convert.layouts.family import CLIP_L, SCHEDULER, UNET_CONFIG, VAE_CONFIG, OriginalFamily, Text, index_of

ABSENT = {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
"""What the hub's pipeline has beside the model that is in a single file."""

SD1 = OriginalFamily(
    kind=Kind.SD1,
    unet={
        **UNET_CONFIG,
        "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 768,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "sample_size": 64,
        "transformer_layers_per_block": 1,
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "use_linear_projection": False,
    },
    vae={**VAE_CONFIG, "scaling_factor": 0.18215},
    texts=(
        Text(
            suffix="",
            theirs="cond_stage_model.transformer.",
            config=CLIP_L,
            pad_token="<|endoftext|>",
            open_clip=False,
        ),
    ),
    scheduler={"_class_name": "PNDMScheduler", **SCHEDULER, "prediction_type": "epsilon"},
    index=index_of("StableDiffusionPipeline", "", scheduler=["diffusers", "PNDMScheduler"], **ABSENT),
    head_width=None,
)
