"""Adapters that do not fit or are none: one error that names every tensor."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from adapters import changed
from facts import refuses
from lora_files import random_lora

from distrijax.convert.adapters.lora import Lora, with_loras
from distrijax.weights.tensors import of_array


def test_lora_of_another_model_is_refused_with_its_tensors(xl, sd):
    kohya = random_lora("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k", 64, 32)
    with refuses("style.safetensors", 1, next(iter(kohya)).split(".")[0], "[64, 32]", "[64, 64]"):
        with_loras(xl, [Lora(kohya, "style.safetensors")])
    assert len(changed(sd, with_loras(sd, [Lora(kohya, "style.safetensors")]))) == 1
    for module in ("lora_te2_text_model_encoder_layers_0_mlp_fc1", "lora_unet_mid_block_attentions_7_proj_in"):
        with refuses("style", f"1 unknown ({module})"):
            with_loras(sd, [Lora(random_lora(module, 64, 32), "style")])


@pytest.mark.parametrize(
    "edit, told",
    [
        (lambda t: t.pop("m.lora_up.weight"), r"\b1 incomplete \(\w+ .*\bup\)"),
        (lambda t: t.pop("m.lora_down.weight"), r"\b1 incomplete \(\w+ .*\bdown\)"),
        (lambda t: t.update({"m.lora_x.weight": t["m.lora_up.weight"]}), r"\b1 unknown \(\w+\.lora_x\.weight\)"),
        (lambda t: t.update({"m.lora_A.weight": t["m.lora_down.weight"]}), r"\b1 duplicate"),
        (lambda t: t.update({"m.hada_w1_a": t["m.lora_up.weight"]}), r"\b1 [^;(]*methods"),
        (lambda t: t.update({"m.alpha": t["m.lora_up.weight"]}), r"\b1 [^;(]*shape[^;(]* \([^)]*\balpha\b.*\[64, 2\]"),
        (lambda t: t.update({"m.dora_scale": of_array(np.ones((7, 1), np.float32))}), r"\b1 [^;(]*shape"),
        (lambda t: t.update({"m.lora_up.weight": of_array(np.ones((64, 5), np.float32))}), r"\b1 [^;(]*shape.*\bdown\b.*\bup\b"),
        (lambda t: t.update({"other.alpha": of_array(np.float32(1).reshape(()))}), r"\b1 [^;(]*factors \(other\)"),
        (lambda t: t.update({"m.oft_blocks": t["m.lora_up.weight"]}), r"\bOFT or BOFT \(.*\bLoRA\b"),
    ],
)  # fmt: skip
def test_each_tensor_without_a_place_is_named(xl, edit, told):
    module = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {name.replace(module, "m"): tensor for name, tensor in random_lora(module, 64, 64).items()}
    edit(tensors)
    tensors = {re.sub("^m[.]", f"{module}.", name): tensor for name, tensor in tensors.items()}
    with refuses("broken", re.compile(told)):
        with_loras(xl, [Lora(tensors, "broken")])


def test_what_is_no_lora_and_what_is_no_weight_is_refused(xl):
    with refuses("vae.safetensors", "VAE", "LoRA", "LoCon"):
        with_loras(xl, [Lora(xl.tensors["vae"], "vae.safetensors")])
    lora = random_lora("lora_unet_mid_block_attentions_0_proj_in", 64, 64)
    for weight in (float("nan"), "1", True):
        with refuses("weight", "style", repr(weight)):
            Lora(lora, "style", weight)
    for metadata in ({"lora_adapter_metadata": "{"}, {"lora_adapter_metadata": '{"unet.alpha_pattern": {"(": 1}}'}):
        with refuses("style", re.compile("PEFT|diffusers")):
            with_loras(xl, [Lora(lora, "style", metadata=metadata)])


@pytest.mark.parametrize("begun", ["pissa_niter_16", "olora"])
def test_adapters_that_began_by_changing_the_models_weights_are_refused(xl, begun):
    lora = random_lora("lora_unet_mid_block_attentions_0_proj_in", 64, 64)
    settings = {"peft_type": "LORA", "init_lora_weights": begun}
    for metadata in (settings, {"lora_adapter_metadata": json.dumps({"unet.init_lora_weights": begun})}):
        with refuses("style", begun, "PEFT", "LoRA"):
            with_loras(xl, [Lora(lora, "style", metadata=metadata)])
    with_loras(xl, [Lora(lora, "style", metadata=settings | {"init_lora_weights": "gaussian"})])


def test_peft_name_that_two_encoders_have_is_refused_as_ambiguous(xl):
    module = "base_model.model.text_model.encoder.layers.0.mlp.fc1"
    with refuses("style", "1 ambiguous", "text_encoder", "text_encoder_2"):
        with_loras(xl, [Lora(random_lora(module, 64, 32), "style")])
