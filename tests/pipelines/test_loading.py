"""What the configurations of Stable Diffusion's checkpoints say, and what a family makes of them."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from facts import refuses
from flax import nnx

from distrijax import DistriConfig, DistriSDPipeline, plan_mesh
from distrijax.config import Parallelism
from distrijax.convert.sources import open_checkpoint
from distrijax.models.clip import CLIPTextEncoder
from distrijax.models.families import SD, default_size
from distrijax.models.vae import AutoencoderKL
from distrijax.pipelines.loading import abstract_components, read_configs
from distrijax.schedulers import DDIM, PNDM
from distrijax.weights.dtypes import resolve_dtype

UNET = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.2.2",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
UNET_2 = UNET | {
    "_diffusers_version": "0.10.0.dev0",
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "use_linear_projection": True,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.2.2",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
TEXT = {
    "_name_or_path": "openai/clip-vit-large-patch14",
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "torch_dtype": "float32",
    "transformers_version": "4.21.0.dev0",
    "vocab_size": 49408,
}
TEXT_2 = TEXT | {
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 512,
}
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.7.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
V_PREDICTION = SCHEDULER | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.2.2",
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
INDEX_2 = INDEX | {"requires_safety_checker": False, "safety_checker": [None, None], "image_encoder": [None, None]}

CHECKPOINTS = {
    "1.4": (INDEX, UNET, VAE, TEXT, SCHEDULER),
    "1.5": (INDEX, UNET, VAE | {"norm_num_groups": 32}, TEXT | {"projection_dim": 768}, SCHEDULER),
    "2.0": (INDEX_2, UNET_2 | {"sample_size": 96}, VAE | {"sample_size": 768}, TEXT_2, V_PREDICTION),
    "2.0-base": (INDEX_2, UNET_2, VAE, TEXT_2, SCHEDULER | {"prediction_type": "epsilon"}),
    "2.1": (
        INDEX_2,
        UNET_2 | {"sample_size": 96, "upcast_attention": True},
        VAE | {"sample_size": 768, "scaling_factor": 0.18215},
        TEXT_2,
        V_PREDICTION,
    ),
    "2.1-base": (INDEX_2, UNET_2, VAE, TEXT_2, SCHEDULER),
}


@pytest.mark.parametrize("version", CHECKPOINTS)
def test_the_configs_of_stable_diffusion_are_read(version, tmp_path):
    index, *parts = CHECKPOINTS[version]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for name, config in zip(("unet", "vae", "text_encoder", "scheduler"), parts, strict=True):
        (tmp_path / name).mkdir()
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (tmp_path / name / file).write_text(json.dumps(config))
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "merges.txt").touch()
    configs = read_configs(open_checkpoint(tmp_path, weights=False))
    large, second = version in ("2.0", "2.1"), version.startswith("2")
    assert default_size(configs.family, configs.unet, configs.vae) == ((768, 768) if large else (512, 512))
    assert type(configs.scheduler) is (DDIM if large else PNDM)
    assert configs.scheduler.prediction_type == ("v_prediction" if large else "epsilon")
    assert configs.vae.scaling_factor == 0.18215
    assert configs.unet.heads == ((5, 10, 20, 20) if second else (8, 8, 8, 8))
    (text,) = configs.text_encoders
    encoder = nnx.eval_shape(lambda: CLIPTextEncoder(text, with_projection=False, rngs=nnx.Rngs(0)))
    assert count(encoder) == (340_387_840 if second else 123_060_480)
    assert count(nnx.eval_shape(lambda: AutoencoderKL(configs.vae, rngs=nnx.Rngs(0)))) == 83_653_863


def count(module: nnx.Module) -> int:
    """Parameters."""
    return sum(leaf.size for leaf in nnx.to_flat_state(nnx.state(module)).leaves)


@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")
def test_old_scheduler_configs_are_corrected_as_in_diffusers(tiny_sd_checkpoints, tmp_path):
    folder = shutil.copytree(tiny_sd_checkpoints[2], tmp_path / "model")
    file = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    del config["steps_offset"]
    file.write_text(json.dumps(config | {"clip_sample": True}))
    theirs = StableDiffusionPipeline.from_pretrained(folder).scheduler.config
    ours = read_configs(open_checkpoint(folder)).scheduler
    assert (ours.steps_offset, ours.clip_sample) == (theirs.steps_offset, theirs.clip_sample) == (1, False)
    assert read_configs(open_checkpoint(folder), "euler").scheduler.steps_offset == 1


def test_a_variant_of_some_parts_is_loaded_as_in_diffusers(tiny_sd_checkpoints, tmp_path):
    folder = shutil.copytree(tiny_sd_checkpoints[1], tmp_path / "model")
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    unet.rename(unet.with_suffix(".fp16.safetensors"))
    for kind in (StableDiffusionPipeline, DistriSDPipeline):
        kind.from_pretrained(folder, variant="fp16")
    with pytest.raises(ValueError, match="bf16"):
        StableDiffusionPipeline.from_pretrained(folder, variant="bf16")
    with refuses("safetensors", "variant", "'bf16'"):
        DistriSDPipeline.from_pretrained(folder, variant="bf16")


def test_a_model_without_a_size_has_its_familys(tiny_sd_checkpoints, tmp_path):
    folder = shutil.copytree(tiny_sd_checkpoints[1], tmp_path / "model")
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sample_size": None}))
    configs = read_configs(open_checkpoint(folder))
    assert configs.family is SD
    assert default_size(configs.family, configs.unet, configs.vae) == (512, 512)


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [
        (torch.float16, np.float16),
        (torch.bfloat16, jnp.bfloat16),
        (torch.float32, np.float32),
        (jnp.bfloat16, jnp.bfloat16),
        (np.float16, np.float16),
        (np.dtype(np.float32), np.float32),
        ("bfloat16", jnp.bfloat16),
        (None, np.float32),
    ],
)
def test_dtypes_of_any_library_are_taken(dtype, wanted):
    assert resolve_dtype(dtype, "cpu") == np.dtype(wanted)


def test_a_dtype_of_torch_that_is_not_computed_in_is_refused_by_its_name():
    with refuses("dtype", "'float64'", "float32", "bfloat16", "float16"):
        resolve_dtype(torch.float64, "cpu")


@pytest.mark.parametrize(
    ("force_upcast", "dtype", "wanted"),
    [(True, np.float16, np.float32), (False, np.float16, np.float16), (True, jnp.bfloat16, jnp.bfloat16)],
)
def test_a_vae_that_overflows_in_float16_is_float32(force_upcast, dtype, wanted, tiny_checkpoint):
    checkpoint = open_checkpoint(tiny_checkpoint)
    configs = read_configs(checkpoint)
    configs = configs._replace(vae=dataclasses.replace(configs.vae, force_upcast=force_upcast))
    mesh = plan_mesh(DistriConfig(), 1).build(jax.devices()[:1])
    outline = abstract_components(
        checkpoint,
        configs,
        dtype=np.dtype(dtype),
        mesh=mesh,
        parallelism=Parallelism.PATCH,
        shard_weights=False,
    )
    assert outline.vae.dtype == np.dtype(wanted)
    assert outline.unet.dtype == np.dtype(dtype)
