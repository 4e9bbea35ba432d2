"""Another VAE or UNet in a checkpoint's place: what is taken over of the old one, and what is refused."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch
from adapters import tensors_of
from diffusers import AutoencoderKL, UNet2DConditionModel
from facts import refuses
from tiny_pipeline import SD_VAE, UNET, VAE

from distrijax.convert.adapters.replace import with_unet, with_vae
from distrijax.convert.complete import check_complete
from distrijax.models.unet_config import UNetConfig
from distrijax.weights.tensors import Tensors

TIME_COND = "time_embedding.cond_proj.weight"


def unet(**options) -> Tensors:
    return tensors_of(UNet2DConditionModel(**(UNET | options)).state_dict())


def vae(**options) -> Tensors:
    return tensors_of(AutoencoderKL(**(VAE | options)).state_dict())


def test_vae_takes_the_place_and_the_scaling_factor_of_the_old_one(sd):
    tensors = vae()
    ours = with_vae(sd, tensors, "another")
    check_complete(ours)
    assert ours.tensors["vae"].keys() == tensors.keys()
    np.testing.assert_array_equal(ours.tensors["vae"]["quant_conv.weight"].read(), tensors["quant_conv.weight"].read())
    assert ours.configs["vae"]["scaling_factor"] == SD_VAE["scaling_factor"] != VAE["scaling_factor"]
    assert {part: held for part, held in ours.tensors.items() if part != "vae"} == {
        part: held for part, held in sd.tensors.items() if part != "vae"
    }


def test_vae_of_another_size_brings_the_config_that_its_shapes_tell(xl):
    options = {"block_out_channels": (8, 16, 16), "layers_per_block": 2, "norm_num_groups": 8}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    ours = with_vae(xl, vae(**options, **blocks, use_quant_conv=False), "another")
    config = ours.configs["vae"]
    assert (config["block_out_channels"], config["layers_per_block"]) == ([8, 16, 16], 2)
    assert (config["use_quant_conv"], config["use_post_quant_conv"]) == (False, True)
    back = with_vae(ours, vae(), "the old kind").configs["vae"]
    assert back["use_quant_conv"] and back["block_out_channels"] == list(VAE["block_out_channels"])


def test_whole_vae_config_takes_the_place_of_the_old_one(xl):
    config = dict(AutoencoderKL(**VAE).config) | {
        "scaling_factor": 0.5,
        "force_upcast": False,
        "_class_name": "AutoencoderKL",
    }
    held = with_vae(xl, vae(), "another", config).configs["vae"]
    assert (held["scaling_factor"], held["force_upcast"]) == (0.5, False)
    assert with_vae(xl, vae(), "another", {"scaling_factor": 2.0}).configs["vae"]["scaling_factor"] == 2.0
    with refuses("layers_per_block", "vae", 1, 3):
        with_vae(xl, vae(), "another", {"layers_per_block": 3})


def test_old_names_of_a_vae_are_those_of_today(xl):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = vae()
    renamed = {}
    for name, tensor in tensors.items():
        for new, then in old.items():
            name = name.replace(f".{new}.", f".{then}.")
        renamed[name] = tensor
    assert renamed.keys() != tensors.keys()
    assert with_vae(xl, renamed, "an old one").tensors["vae"].keys() == tensors.keys()


def test_unet_with_embedded_guidance_is_told_by_its_tensors(xl):
    torch.manual_seed(1)
    consistency = unet(time_cond_proj_dim=24)
    ours = with_unet(xl, consistency, "LCM")
    check_complete(ours)
    assert ours.tensors["unet"][TIME_COND] is consistency[TIME_COND]
    assert ours.configs["unet"] == xl.configs["unet"] | {"time_cond_proj_dim": 24}
    assert UNetConfig.from_dict(ours.configs["unet"]).time_cond_proj_dim == 24
    back = with_unet(ours, unet(), "the old kind")
    assert back.configs["unet"]["time_cond_proj_dim"] is None
    with refuses("time_cond_proj_dim", "unet", "None", 24):
        with_unet(xl, unet(), "another", {"time_cond_proj_dim": 24})


def test_unet_with_fewer_transformers_brings_its_depths(xl):
    ours = with_unet(xl, unet(transformer_layers_per_block=(1, 1, 1)), "a smaller one")
    assert UNetConfig.from_dict(ours.configs["unet"]).transformer_layers_per_block in (1, (1, 1, 1))
    check_complete(ours)


def test_unet_that_reads_other_text_is_refused(xl, sd):
    with refuses("other", "cross_attention_dim", "unet", 32, 64):
        with_unet(xl, sd.tensors["unet"], "other")
    with refuses("other", "cross_attention_dim", "unet", 64, 32):
        with_unet(sd, xl.tensors["unet"], "other")
    wide = unet(projection_class_embeddings_input_dim=UNET["projection_class_embeddings_input_dim"] + 8)
    with refuses("projection_class_embeddings_input_dim", "unet", 88, 80):
        with_unet(xl, wide, "other")
    with refuses("addition_embed_type", "unet", "text_time", "None"):
        with_unet(sd, unet(cross_attention_dim=32), "other")


def test_vae_of_other_latents_is_refused(xl):
    with refuses("latent_channels", "vae", 16, 4):
        with_vae(xl, vae(latent_channels=16), "Flux's")


@pytest.mark.parametrize(
    "part, put, name", [("unet", with_unet, "mid_block.resnets.0.conv1.weight"), ("vae", with_vae, "decoder.conv_out.bias")]
)  # fmt: skip
def test_every_tensor_that_does_not_fit_is_named(xl, part, put, name):
    held = xl.tensors[part]
    rest = {key: tensor for key, tensor in held.items() if key != name}
    narrow = held[name].then(lambda array: array[:1], shape=(1, *held[name].shape[1:]))
    for tensors, problem in [
        (rest, "missing"),
        (rest | {name: narrow}, r"[^;(]*shape\w*"),
        (held | {"foo": narrow}, "unexpected"),
    ]:
        with refuses("a broken one", re.compile(rf"\b{part}\b.*\b1 {problem} \(({name}|foo)\b")):
            put(xl, tensors, "a broken one")
    with refuses("a broken one", part):
        put(dataclasses.replace(xl, configs={}), held, "a broken one")
