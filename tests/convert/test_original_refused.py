"""Files in the original layouts that lack something or hold something else: one error with what to give."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from facts import refuses
from original_layouts import prefixed, vae
from small_originals import CONFIG, FAMILIES, convert, small

from distrijax.convert.layouts.original import to_original
from distrijax.weights.tensors import of_array


@pytest.mark.parametrize("family", FAMILIES)
def test_whatever_is_unknown_is_listed(family):
    extra = ("model.diffusion_model.input_blocks.1.0.in_layers.9.weight", "first_stage_model.encoder.odd", "odd.weight")
    with refuses("file", "3 unknown", *extra):
        convert({**small(family), **dict.fromkeys(extra, of_array(np.zeros(1)))})


def test_a_quantised_file_is_not_taken_for_a_plain_one():
    name = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight.absmax"
    with refuses(f"1 unknown ({name}"):
        convert({**small("sd1"), name: of_array(np.zeros(1))})


def test_heads_that_no_shape_tells_have_to_be_given():
    with refuses("attention_head_dim", "unet", "--config FOLDER"):
        convert(small("sdxl"), config={})
    with refuses("num_attention_heads", "text_encoder", "--config FOLDER"):
        convert(small("sd1"), config={"unet": CONFIG["unet"]})


def test_a_config_of_another_model_is_refused():
    wrong = {**CONFIG, "unet": {"attention_head_dim": 4, "block_out_channels": [32, 96]}}
    with refuses("block_out_channels", "unet", "[32, 64]", "[32, 96]"):
        convert(small("sd1"), config=wrong)


def test_a_small_vocabulary_needs_its_own_tokenizer():
    with refuses("text_encoder", 100, 49408, "--config FOLDER"):
        convert(small("sd1"), files=None)


@pytest.mark.parametrize(
    "left_out, part", [("first_stage_model.", "vae"), ("conditioner.embedders.0.", "text_encoder")]
)
def test_a_part_that_is_not_there_is_named(left_out, part):
    file = {name: tensor for name, tensor in small("sdxl").items() if not name.startswith(left_out)}
    with refuses("file", part):
        convert(file)


def test_parts_of_different_models_are_refused():
    file = {name: tensor for name, tensor in small("sd1").items() if not name.startswith("cond_stage_model.")}
    text = {name: tensor for name, tensor in small("sd2").items() if name.startswith("cond_stage_model.")}
    with refuses("file", "UNet", 48, 64):
        convert(file | text)
    wide = prefixed("first_stage_model.", vae(32, (1, 2), latent=16))
    with refuses("VAE", 16, 4):
        convert({**small("sd1"), **{name: of_array(np.zeros(shape, np.float16)) for name, shape in wide.items()}})


def test_what_the_original_layout_has_no_name_for_is_refused():
    checkpoint = convert(small("sd1"))
    guided = {**checkpoint.tensors["unet"], "time_embedding.cond_proj.weight": of_array(np.zeros((32, 16), np.float16))}
    with refuses("latent consistency model", "time_embedding.cond_proj.weight"):
        to_original(checkpoint.with_tensors("unet", guided))
    linear = dataclasses.replace(checkpoint, configs={**checkpoint.configs, "text_encoder": {"hidden_act": "gelu"}})
    with refuses("text_encoder", "'gelu'", "'quick_gelu'"):
        to_original(linear)
    with refuses("unet, vae"):
        to_original(
            dataclasses.replace(checkpoint, tensors={part: checkpoint.tensors[part] for part in ("unet", "vae")})
        )
