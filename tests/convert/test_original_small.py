"""Files in the original layouts, there and back: what is read, left out, taken from averages, and lost on the way."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from facts import refuses, says, warns
from original_layouts import averages, original, unread
from small_originals import CONFIG, FAMILIES, FILES, convert, same_bytes, small

from distrijax.convert.layouts.original import convert_original, from_original, to_original
from distrijax.schedulers import load_scheduler
from distrijax.weights.tensors import Tensors, of_array

LOSSES = ("--config FOLDER",)
"""What a warning of them tells at least."""


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_the_same_bytes_both_ways(family):
    file = small(family)
    checkpoint = convert(file)
    with warns(*LOSSES):
        back = to_original(checkpoint)
    same_bytes({name: file[name] for name in back}, back)
    again = convert(back)
    for part, tensors in checkpoint.tensors.items():
        same_bytes(tensors, again.tensors[part])
    assert (again.index, again.configs, again.files) == (checkpoint.index, checkpoint.configs, FILES)


def test_the_last_layer_of_sd2_is_left_out_and_so_told():
    file = small("sd2")
    text = {"num_attention_heads": 4, "num_hidden_layers": 2}
    checkpoint, mapping = convert_original(file, "file", config={**CONFIG, "text_encoder": text}, files=FILES)
    assert checkpoint.configs["text_encoder"]["num_hidden_layers"] == 2
    assert not any("layers.2." in name for name in checkpoint.tensors["text_encoder"])
    dropped = {mapped.source for mapped in mapping if not mapped.diffusers}
    layer = {name for name in file if ".resblocks.2." in name}
    assert dropped == {*layer, "cond_stage_model.model.text_projection", "cond_stage_model.model.logit_scale"}


def test_the_mapping_tells_of_every_tensor_of_the_file():
    file = {**small("sd1"), "betas": of_array(np.zeros(3))}
    _, mapping = convert_original(file, "file", config=CONFIG, files=FILES)
    assert {mapped.source for mapped in mapping} == file.keys()
    goes = {mapped.source: mapped for mapped in mapping}
    assert goes["betas"].diffusers == ()
    query = goes["first_stage_model.decoder.mid.attn_1.q.weight"]
    assert query.diffusers == ("vae.decoder.mid_block.attentions.0.to_q.weight",)
    says(str(query), query.source, *query.diffusers, re.compile(r"\[.+\]"))  # and what is done to it


def test_averaged_weights_are_taken_when_asked_for():
    file = small("sd1")
    names = [name for name in file if name.startswith("model.diffusion_model.")]
    flat = averages({name.removeprefix("model.diffusion_model."): file[name].shape for name in names})
    rng = np.random.default_rng(1)
    file |= {name: of_array(rng.normal(size=shape).astype(np.float32)) for name, shape in flat.items()}
    plain = convert(file).tensors["unet"]
    averaged, mapping = convert_original(file, "file", ema=True, config=CONFIG, files=FILES)
    averaged = averaged.tensors["unet"]
    np.testing.assert_array_equal(
        averaged["mid_block.resnets.1.conv2.bias"].read(),
        file["model_ema.diffusion_modelmiddle_block2out_layers3bias"].read(),
    )
    np.testing.assert_array_equal(
        plain["mid_block.resnets.1.conv2.bias"].read(),
        file["model.diffusion_model.middle_block.2.out_layers.3.bias"].read(),
    )
    assert {name: tensor.shape for name, tensor in averaged.items()} == {n: t.shape for n, t in plain.items()}
    assert all(tensor.dtype == np.float32 for tensor in averaged.values())
    assert sorted(mapped.source for mapped in mapping) == sorted(file)
    used = {mapped.source: mapped.diffusers for mapped in mapping}
    assert used["model_ema.diffusion_modelout2bias"] == ("unet.conv_out.bias",)
    assert used["model.diffusion_model.out.2.bias"] == ()


def test_averaged_weights_that_are_not_there_are_an_error():
    with refuses("file", re.compile("EMA|moving average")):
        convert(small("sd1"), ema=True)
    with refuses("missing", "model_ema.diffusion_modeltime_embed0weight"):
        convert({**small("sd1"), "model_ema.decay": of_array(np.zeros(()))}, ema=True)


def test_what_a_file_predicts_is_asked_for_or_marked_or_usual():
    def predicted(family: str, extra: Tensors | None = None, **options) -> dict:
        return convert({**small(family), **(extra or {})}, **options).configs["scheduler"]

    marked = {name: of_array(np.zeros(0, np.float32)) for name in ("v_pred", "ztsnr")}
    assert predicted("sd2")["prediction_type"] == "v_prediction"
    assert predicted("sdxl")["prediction_type"] == "epsilon"
    assert "rescale_betas_zero_snr" not in predicted("sdxl")
    assert predicted("sd1", prediction_type="v_prediction")["prediction_type"] == "v_prediction"
    zero = predicted("sdxl", marked)
    assert (zero["prediction_type"], zero["rescale_betas_zero_snr"]) == ("v_prediction", True)
    assert load_scheduler(zero).rescale_betas_zero_snr
    step = {"global_step": of_array(np.asarray(875_000))}
    assert predicted("sd2", step)["prediction_type"] == "epsilon"
    given = {**CONFIG, "scheduler": {"prediction_type": "epsilon", "timestep_spacing": "trailing"}}
    assert predicted("sdxl", marked, config=given)["timestep_spacing"] == "trailing"
    with refuses("prediction_type", "'velocity'"):
        predicted("sd2", prediction_type="velocity")


def test_sd2_in_512_is_the_hubs_base_model():
    checkpoint = convert(small("sd2"), prediction_type="epsilon")
    assert checkpoint.configs["unet"]["sample_size"] == 64
    assert checkpoint.index["scheduler"] == ["diffusers", "PNDMScheduler"]


@pytest.mark.parametrize("markers", [("v_pred",), ("v_pred", "ztsnr")])
def test_v_prediction_of_sdxl_travels_in_the_file(markers):
    """And so nothing is warned of."""
    file = unread(original("sdxl")) | {name: of_array(np.zeros(0, np.float32)) for name in markers}
    checkpoint = from_original(file, "file")
    back = to_original(checkpoint)
    assert back.keys() & {"v_pred", "ztsnr"} == set(markers)
    assert from_original(back, "file").configs["scheduler"] == checkpoint.configs["scheduler"]


DDIM = {"_class_name": "DDIMScheduler"}
EULER = {"_class_name": "EulerDiscreteScheduler"}
UNI_PC = {"_class_name": "UniPCMultistepScheduler"}


@pytest.mark.parametrize(
    ("family", "scheduler", "lost"),
    [
        ("sd2", {"prediction_type": "epsilon"}, "prediction_type 'epsilon'"),
        (
            "sd2",
            {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
            "rescale_betas_zero_snr True, scheduler: timestep_spacing 'trailing'",
        ),
        ("sd1", {"set_alpha_to_one": True, "steps_offset": 0}, "set_alpha_to_one True, scheduler: steps_offset 0"),
        ("sd1", EULER, "timestep_spacing 'linspace'"),  # by its class, and PNDM's is another
        ("sd1", {"_class_name": "LCMScheduler", "timestep_spacing": "trailing"}, None),  # which LCM does not heed
        ("sd1", UNI_PC | {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr True"),
        ("sdxl", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr True"),  # no marker says it of epsilon
        ("sdxl", {"set_alpha_to_one": True}, None),  # which Euler does not heed
        ("sdxl", DDIM | {"set_alpha_to_one": True}, "set_alpha_to_one True"),
    ],
)
def test_what_the_original_layout_can_not_say_is_warned_of(family, scheduler, lost, recwarn):
    checkpoint = from_original(unread(original(family)), "file")
    given = checkpoint.configs | {"scheduler": checkpoint.configs["scheduler"] | scheduler}
    to_original(dataclasses.replace(checkpoint, configs=given))
    said = [str(warning.message) for warning in recwarn]
    assert len(said) == (0 if lost is None else 1)
    for each in said:
        says(each, "--config FOLDER")
        assert re.findall(r"\w+: \w+ [\w']+", each) == f"scheduler: {lost}".split(", ")


def test_a_whole_config_does_not_take_values_of_the_family():
    whole = {"_class_name": "AutoencoderKL", "norm_num_groups": 8}
    assert "scaling_factor" not in convert(small("sdxl"), config={**CONFIG, "vae": whole}).configs["vae"]
    assert convert(small("sdxl")).configs["vae"]["scaling_factor"] == 0.13025


def test_old_names_of_the_text_encoder_are_understood():
    file = small("sd1")
    old = {name.replace(".text_model.", "."): tensor for name, tensor in file.items()}
    assert old.keys() != file.keys()
    same_bytes(convert(old).tensors["text_encoder"], convert(file).tensors["text_encoder"])


def test_a_projection_stored_as_a_linear_layer_is_not_transposed():
    file, name = small("sdxl"), "conditioner.embedders.1.model.text_projection"
    stored = {**file, f"{name}.weight": of_array(file[name].read().T)}
    del stored[name]
    same_bytes(convert(stored).tensors["text_encoder_2"], convert(file).tensors["text_encoder_2"])


def test_attention_of_the_vae_may_be_linear_already():
    file = small("sd1")
    linear = {
        name: of_array(tensor.read()[:, :, 0, 0])
        if re.search(r"attn_1\.\w+\.weight", name) and tensor.shape[2:]
        else tensor
        for name, tensor in file.items()
    }
    same_bytes(convert(linear).tensors["vae"], convert(file).tensors["vae"])


def test_names_of_diffusers_and_transformers_old_and_new_are_written_alike():
    checkpoint = convert(small("sd1"))
    text = {name.removeprefix("text_model."): tensor for name, tensor in checkpoint.tensors["text_encoder"].items()}
    text["embeddings.position_ids"] = of_array(np.zeros((1, 77), np.int64))
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    vae = {}
    for name, tensor in checkpoint.tensors["vae"].items():
        for new, before in old.items():
            name = name.replace(new, before)
        vae[name] = tensor
    with warns(*LOSSES):
        same_bytes(
            to_original(checkpoint), to_original(checkpoint.with_tensors("text_encoder", text).with_tensors("vae", vae))
        )
