"""Stable Diffusion 2.x in the layout of CompVis: OpenCLIP H but for its last layer; 768x768 and v-prediction, or 512x512."""

from __future__ import annotations

from distrijax.convert.kinds import Kind
from distrijax.convert.layouts.family import SCHEDULER, TEXT_CONFIG, VAE_CONFIG, OriginalFamily, Text, index_of
from distrijax.convert.layouts.sd1 import ABSENT, SD1

OPEN_CLIP_H = {
    **TEXT_CONFIG,
    "architectures": ["CLIPTextModel"],
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 512,
}

EPSILON_STEP = 875_000
"""Training steps of the 512x512 models, by which diffusers tells them where the file holds `global_step`."""

SD2 = OriginalFamily(
    kind=Kind.SD2,
    unet={
        **SD1.unet,
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "sample_size": 96,
        "upcast_attention": True,
        "use_linear_projection": True,
    },
    vae={**VAE_CONFIG, "sample_size": 768, "scaling_factor": 0.18215},
    texts=(
        Text(
            suffix="",
            theirs="cond_stage_model.model.",
            config=OPEN_CLIP_H,
            pad_token="!",
            open_clip=True,
            last_unused=True,
        ),
    ),
    scheduler={"_class_name": "DDIMScheduler", **SCHEDULER, "prediction_type": "v_prediction"},
    index=index_of("StableDiffusionPipeline", "", scheduler=["diffusers", "DDIMScheduler"], **ABSENT),
    head_width=64,
    by_prediction={"epsilon": {"unet": {"sample_size": 64}, "scheduler": {"_class_name": "PNDMScheduler"}}},
)
