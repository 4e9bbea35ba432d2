"""The families of single files: Stable Diffusion 1.x and 2.x in CompVis' layout, XL and its refiner in SGM's; their configs.

Keys with the default of diffusers or transformers are left out.
"""

from __future__ import annotations

from typing import Any

from distrijax.convert.kinds import Kind
from distrijax.convert.layouts.family import Config, OriginalFamily, Text

SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}
PNDM = {"_class_name": "PNDMScheduler", **SCHEDULER}
EULER = {
    "_class_name": "EulerDiscreteScheduler",
    **SCHEDULER,
    "timestep_spacing": "leading",
}

SD1_UNET = {
    "_class_name": "UNet2DConditionModel",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "sample_size": 64,
    "transformer_layers_per_block": 1,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "use_linear_projection": False,
}
SD2_UNET = {
    **SD1_UNET,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}
XL_UNET = {
    **SD1_UNET,
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
}
REFINER_UNET = {
    **XL_UNET,
    "attention_head_dim": [6, 12, 24, 24],
    "block_out_channels": [384, 768, 1536, 1536],
    "cross_attention_dim": 1280,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "projection_class_embeddings_input_dim": 2560,
    "transformer_layers_per_block": 4,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}

VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "layers_per_block": 2,
    "sample_size": 512,
    "scaling_factor": 0.18215,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
XL_VAE = {**VAE, "force_upcast": True, "sample_size": 1024, "scaling_factor": 0.13025}

CLIP_L = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "max_position_embeddings": 77,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
    "vocab_size": 49408,
}
OPEN_CLIP_H = {
    **CLIP_L,
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 512,
}
OPEN_CLIP_BIG_G = {
    **CLIP_L,
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}

END = "<|endoftext|>"

ABSENT = {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
"""Parts of the hub's pipelines that single files do not hold."""

EPSILON_STEP = 875_000
"""Training steps of the 512x512 models of SD 2.x, by which diffusers recognises them where the file holds `global_step`."""


def _index(pipeline: str, *texts: Text, **others: Any) -> Config:
    """A model_index.json."""
    held = {f"tokenizer{text.suffix}": ["transformers", "CLIPTokenizer"] for text in texts}
    held |= {text.part: ["transformers", text.config["architectures"][0]] for text in texts}
    unet, vae = ["diffusers", "UNet2DConditionModel"], ["diffusers", "AutoencoderKL"]
    return {"_class_name": pipeline, "unet": unet, "vae": vae, **held, **others}


CLIP_OF_SD1 = Text("", "cond_stage_model.transformer.", CLIP_L, END, open_clip=False)
SD1 = OriginalFamily(
    kind=Kind.SD1,
    unet=SD1_UNET,
    vae=VAE,
    texts=(CLIP_OF_SD1,),
    scheduler=PNDM,
    index=_index("StableDiffusionPipeline", CLIP_OF_SD1, **ABSENT),
    head_width=None,
)

CLIP_OF_SD2 = Text("", "cond_stage_model.model.", OPEN_CLIP_H, "!", open_clip=True, last_unused=True)
SD2 = OriginalFamily(
    kind=Kind.SD2,
    unet=SD2_UNET,
    vae={**VAE, "sample_size": 768},
    texts=(CLIP_OF_SD2,),
    scheduler={"_class_name": "DDIMScheduler", **SCHEDULER, "prediction_type": "v_prediction"},
    index=_index("StableDiffusionPipeline", CLIP_OF_SD2, **ABSENT),
    head_width=64,
    by_prediction={"epsilon": {"unet": {"sample_size": 64}, "scheduler": {"_class_name": "PNDMScheduler"}}},
)

CLIPS_OF_XL = (
    Text("", "conditioner.embedders.0.transformer.", CLIP_L, END, open_clip=False),
    Text("_2", "conditioner.embedders.1.model.", OPEN_CLIP_BIG_G, "!", open_clip=True),
)
SDXL = OriginalFamily(
    kind=Kind.SDXL,
    unet=XL_UNET,
    vae=XL_VAE,
    texts=CLIPS_OF_XL,
    scheduler=EULER,
    index=_index("StableDiffusionXLPipeline", *CLIPS_OF_XL, force_zeros_for_empty_prompt=True),
    head_width=64,
    time_ids=6,
)

CLIP_OF_REFINER = Text("_2", "conditioner.embedders.0.model.", OPEN_CLIP_BIG_G, "!", open_clip=True)
REFINER = OriginalFamily(
    kind=Kind.REFINER,
    unet=REFINER_UNET,
    vae=XL_VAE,
    texts=(CLIP_OF_REFINER,),
    scheduler=EULER,
    index=_index(
        "StableDiffusionXLImg2ImgPipeline",
        CLIP_OF_REFINER,
        text_encoder=[None, None],
        tokenizer=[None, None],
        force_zeros_for_empty_prompt=False,
        requires_aesthetics_score=True,
    ),
    head_width=64,
    time_ids=5,
)

FAMILIES = {family.kind: family for family in (SD1, SD2, SDXL, REFINER)}
