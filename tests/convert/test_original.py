"""Single files in the original layouts, in full size: every tensor finds its place, and diffusers reads the same from them."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from facts import refuses
from original_layouts import original, unread
from small_originals import FAMILIES
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from distrijax.convert.complete import check_complete
from distrijax.convert.layouts.original import from_original, to_original
from distrijax.models.clip import CLIPTextConfig as OurTextConfig
from distrijax.models.unet_config import UNetConfig
from distrijax.models.vae import VAEConfig
from distrijax.schedulers import load_scheduler
from distrijax.weights.checkpoint import Checkpoint
from distrijax.weights.tensors import of_array

HUB = {  # of the hub's stable-diffusion-v1-5, -2-1, -xl-base-1.0 and -xl-refiner-1.0
    "sd1": {
        "model_index": "StableDiffusionPipeline",
        "scheduler": ("PNDMScheduler", "epsilon"),
        "unet": {
            "attention_head_dim": 8,
            "cross_attention_dim": 768,
            "sample_size": 64,
            "use_linear_projection": False,
        },
        "vae": {"scaling_factor": 0.18215, "sample_size": 512},
        "text_encoder": {
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "hidden_act": "quick_gelu",
        },
    },
    "sd2": {
        "model_index": "StableDiffusionPipeline",
        "scheduler": ("DDIMScheduler", "v_prediction"),
        "unet": {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "sample_size": 96},
        "vae": {"scaling_factor": 0.18215, "sample_size": 768},
        "text_encoder": {"hidden_size": 1024, "num_hidden_layers": 23, "num_attention_heads": 16, "hidden_act": "gelu"},
    },
    "sdxl": {
        "model_index": "StableDiffusionXLPipeline",
        "scheduler": ("EulerDiscreteScheduler", "epsilon"),
        "unet": {
            "attention_head_dim": [5, 10, 20],
            "transformer_layers_per_block": [1, 2, 10],
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "sample_size": 128,
        },
        "vae": {"scaling_factor": 0.13025, "sample_size": 1024, "force_upcast": True},
        "text_encoder": {
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "hidden_act": "quick_gelu",
        },
        "text_encoder_2": {
            "hidden_size": 1280,
            "num_hidden_layers": 32,
            "num_attention_heads": 20,
            "projection_dim": 1280,
        },
    },
    "refiner": {
        "model_index": "StableDiffusionXLImg2ImgPipeline",
        "scheduler": ("EulerDiscreteScheduler", "epsilon"),
        "unet": {
            "attention_head_dim": [6, 12, 24, 24],
            "transformer_layers_per_block": 4,
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2560,
        },
        "vae": {"scaling_factor": 0.13025},
        "text_encoder_2": {
            "hidden_size": 1280,
            "num_hidden_layers": 32,
            "num_attention_heads": 20,
            "hidden_act": "gelu",
        },
    },
}

NOT_WRITTEN = (
    r"position_ids$|logit_scale$|^betas$|alphas_cumprod|^posterior_|^denoiser\.sigmas$|^model_ema\."
    r"|^cond_stage_model\.model\.(text_projection$|transformer\.resblocks\.23\.)"
)
"""What follows from the config, or is used by no model of the family."""


@pytest.fixture(scope="module")
def converted() -> dict[str, Checkpoint]:
    """A whole file of each family, in full size, of which no tensor may be read."""
    return {family: from_original(unread(original(family)), family) for family in FAMILIES}


def meta_model(part: str, config: dict) -> torch.nn.Module:
    """The model of diffusers or transformers that a config describes, without memory for its weights."""
    with torch.device("meta"):
        if part in ("unet", "vae"):
            return {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[part].from_config(config)
        kind = {"CLIPTextModel": CLIPTextModel, "CLIPTextModelWithProjection": CLIPTextModelWithProjection}
        return kind[config["architectures"][0]](CLIPTextConfig.from_dict(config))


def state_shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of its weights, as checkpoints have them: transformers has dropped a prefix since."""
    bare = isinstance(model, CLIPTextModel) and not hasattr(model, "text_model")
    prefix = "text_model." if bare else ""
    return {prefix + name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_has_the_name_and_shape_that_torch_gives_it(converted, family):
    checkpoint = converted[family]
    assert set(checkpoint.tensors) == HUB[family].keys() - {"model_index", "scheduler"}
    for part, tensors in checkpoint.tensors.items():
        wanted = state_shapes(meta_model(part, checkpoint.configs[part]))
        wanted = {name: shape for name, shape in wanted.items() if not name.endswith("position_ids")}
        assert {name: tensor.shape for name, tensor in tensors.items()} == wanted, part


@pytest.mark.parametrize("family", FAMILIES)
def test_configs_are_those_of_the_hub_and_are_understood_here(converted, family):
    configs, wanted = converted[family].configs, HUB[family]
    for part in wanted.keys() - {"model_index", "scheduler"}:
        assert {key: configs[part][key] for key in wanted[part]} == wanted[part]
    assert converted[family].index["_class_name"] == wanted["model_index"]
    assert (configs["scheduler"]["_class_name"], configs["scheduler"]["prediction_type"]) == wanted["scheduler"]
    UNetConfig.from_dict(configs["unet"])
    VAEConfig.from_dict(configs["vae"])
    load_scheduler(configs["scheduler"])
    for part in configs.keys() & {"text_encoder", "text_encoder_2"}:
        OurTextConfig.from_dict(configs[part])


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_own_converter_reads_the_same_names_from_the_same_file(converted, family):
    """So the lists of tensors in full size, which are built here, are those that diffusers expects of such files."""
    checkpoint = converted[family]
    placed = {name: torch.empty(shape, device="meta") for name, shape in original(family).items()}
    theirs = convert_ldm_unet_checkpoint(dict(placed), checkpoint.configs["unet"])
    theirs |= convert_ldm_vae_checkpoint(dict(placed), checkpoint.configs["vae"])
    ours = {**checkpoint.tensors["unet"], **checkpoint.tensors["vae"]}
    assert {name: tuple(tensor.shape) for name, tensor in theirs.items()} == {
        name: tensor.shape for name, tensor in ours.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_full_size_goes_back_to_the_same_names_and_shapes(converted, family):
    back = to_original(converted[family])
    wanted = {name: shape for name, shape in original(family).items() if not re.search(NOT_WRITTEN, name)}
    assert {name: tensor.shape for name, tensor in back.items()} == wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_file_makes_whole_models_and_another_does_not(converted, family):
    checkpoint = converted[family]
    check_complete(checkpoint)
    tensors = dict(checkpoint.tensors["vae"])
    tensors["odd"] = tensors.pop("decoder.conv_out.bias")
    tensors["quant_conv.bias"] = of_array(np.zeros(3))
    shape = re.compile(r"\b1 [^;(]*shape[^;(]* \(quant_conv\.bias")
    with refuses("vae", "1 missing (decoder.conv_out.bias)", "1 unexpected (odd)", shape):
        check_complete(checkpoint.with_tensors("vae", tensors))
