"""A file is what its tensors say, and what is no Stable Diffusion is called by its name."""

from __future__ import annotations

import re

import numpy as np
import pytest
from facts import one_sentence, refuses, says
from original_layouts import Shapes, clip, open_clip, original, prefixed, unet, unread, vae

from distrijax import DistriError
from distrijax.convert.kinds import Kind, recognise
from distrijax.convert.layouts.families import FAMILIES
from distrijax.convert.layouts.original import from_original
from distrijax.weights.tensors import of_array

UNET = "model.diffusion_model."
SD1 = {
    "width": 32,
    "multipliers": (1, 2),
    "depths": (1, 0),
    "context": 768,
    "linear_projection": False,
    "middle_depth": 1,
}


def named(*names: str, shape: tuple[int, ...] = (4, 4)) -> Shapes:
    return dict.fromkeys(names, shape)


@pytest.mark.parametrize("family, kind", list(zip(("sd1", "sd2", "sdxl", "refiner"), FAMILIES, strict=True)))
def test_whole_files_are_recognised(family, kind):
    assert recognise(unread(original(family)), "file") is kind


PARTS = {
    "a UNet": (unet(**SD1), Kind.UNET),
    "a UNet with its prefix": (prefixed(UNET, unet(**SD1)), Kind.UNET),
    "a UNet with a VAE": (prefixed(UNET, unet(**SD1)) | prefixed("first_stage_model.", vae(32)), Kind.UNET),
    "diffusers' UNet": (
        named("conv_in.weight", "down_blocks.0.resnets.0.conv1.weight", shape=(32, 4, 3, 3)),
        Kind.UNET,
    ),
    "a VAE": (vae(32), Kind.VAE),
    "diffusers' VAE": (named("decoder.conv_in.weight", "decoder.up_blocks.0.resnets.0.conv1.bias"), Kind.VAE),
    "kohya's LoRA": (named("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"), Kind.LORA),
    "kohya's LoRA of a text encoder": (named("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"), Kind.LORA),
    "diffusers' LoRA": (named("unet.mid_block.attentions.0.proj_in.lora.up.weight"), Kind.LORA),
    "diffusers' old LoRA": (named("mid_block.attentions.0.processor.to_q_lora.down.weight"), Kind.LORA),
    "peft's LoRA": (named("base_model.model.mid_block.attentions.0.proj_in.lora_A.weight"), Kind.LORA),
    "LoHa": (named("lora_unet_mid_block.hada_w1_a"), Kind.LORA),
    "LoKr of LyCORIS": (named("lycoris_mid_block.lokr_w1"), Kind.LORA),
    "an embedding": (named("emb_params", shape=(2, 768)), Kind.EMBEDDING),
    "an embedding of SDXL": ({"clip_l": (2, 768), "clip_g": (2, 1280)}, Kind.EMBEDDING),
    "diffusers' embedding": (named("<cat-toy>", shape=(768,)), Kind.EMBEDDING),
    "an embedding of the web UI": (named("string_to_param.*", shape=(2, 768)), Kind.EMBEDDING),
}


@pytest.mark.parametrize("case", PARTS)
def test_parts_and_additions_are_recognised_and_no_whole_model(case):
    shapes, kind = PARTS[case]
    assert recognise(unread(shapes), "file") is kind
    told = {
        Kind.UNET: ["UNet", "--unet"],
        Kind.VAE: ["VAE", "--vae"],
        Kind.LORA: ["LoRA", "--lora"],
        Kind.EMBEDDING: ["embedding", "--embedding"],
    }[kind]
    with refuses("file", *told) as error:
        from_original(unread(shapes), "file")
    one_sentence(str(error.value))


def unet_reading(channels: int) -> Shapes:
    return prefixed(UNET, unet(**SD1, channels=channels)) | prefixed("cond_stage_model.transformer.", clip(768, 1))


FOREIGN = {
    "ControlNet": named("control_model.input_hint_block.0.weight", "control_model.time_embed.0.weight"),
    "ControlNet;": named("controlnet_cond_embedding.conv_in.weight", "conv_in.weight"),
    "ControlNet; ": named("lora_controlnet", "input_blocks.1.0.in_layers.2.down"),
    "AnimateDiff": named("down_blocks.0.motion_modules.0.temporal_transformer.norm.bias"),
    "Stable Video Diffusion": named(f"{UNET}input_blocks.1.1.time_stack.0.attn1.to_k.weight"),
    "Stable Diffusion 3": named(f"{UNET}joint_blocks.0.context_block.adaLN_modulation.1.bias"),
    "Stable Diffusion 3;": named("transformer_blocks.0.attn.add_k_proj.weight"),
    "Flux": named("double_blocks.0.img_attn.norm.key_norm.scale"),
    "Flux;": named("single_transformer_blocks.0.attn.to_q.weight", "transformer_blocks.0.attn.add_k_proj.weight"),
    "diffusion transformer": named("blocks.0.attn.qkv.weight"),
    "Kolors, Kandinsky or DeepFloyd IF": named("encoder_hid_proj.weight", "conv_in.weight"),
    "unCLIP": named("class_embedding.linear_1.weight", "conv_in.weight"),
    "Zero123": original("sd1") | named("cc_projection.weight"),
    "Playground 2.5": original("sdxl") | named("edm_mean", "edm_std", shape=(4,)),
    "CosXL": original("sdxl") | named("edm_vpred.sigma_max", shape=()),
    "inpainting UNet": unet_reading(9),
    "InstructPix2Pix UNet": unet_reading(8),
    "upscaling UNet": unet_reading(7),
    "depth-to-image UNet": unet_reading(5),
    "[32, 6, 3, 3]": unet_reading(6),
    "video": named("conv_in.weight", "down_blocks.0.resnets.0.conv1.weight", shape=(4, 4, 1, 3, 3)),
    "CLIP encoder": clip(768, 1),
    "CLIP encoder;": prefixed("conditioner.embedders.1.model.", open_clip(1280, 1)),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_not_supported_is_called_by_its_name(name):
    with pytest.raises(DistriError) as error:
        recognise(unread(FOREIGN[name]), "file.safetensors")
    sentence = str(error.value)
    one_sentence(sentence)
    beginning, *_ = re.split("[;.] ", sentence)  # the rest names what is supported
    says(beginning, "file.safetensors", name.rstrip("; "))


def test_what_is_unknown_shows_some_of_its_tensors():
    with refuses("file", 4, "layer0, layer1, layer2 ..."):
        recognise({f"layer{n}": of_array(np.zeros((3, 3))) for n in range(4)}, "file")
    with refuses("file", "no tensors"):
        recognise({}, "file")


@pytest.mark.parametrize(
    "spoilt, shape, told",
    [
        (f"{UNET}conv_in.weight", (4, 4), ["1 unknown"]),
        (f"{UNET}input_blocks.0.0.weight", (4,), ["UNet", "[4]"]),
        (f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", (5,), ["[5]", "2 dimensions"]),
        (f"{UNET}input_blocks.{'9' * 5000}.0.op.weight", (4,), ["unknown"]),
        (f"{UNET}odd\nname.weight", (4,), [r"unknown ('model.diffusion_model.odd\nname.weight')"]),
        (f"{UNET}input_blocks.4.0.op.weight", (4,), ["input blocks"]),
        (f"{UNET}input_blocks.17.0.in_layers.0.weight", (4,), ["input blocks"]),
        ("cond_stage_model.transformer.text_model.embeddings.token_embedding.weight", (), ["2 dimensions"]),
        ("first_stage_model.decoder.conv_out.weight", (3,), ["4 dimensions"]),
    ],
)
def test_a_spoilt_file_gives_one_sentence(spoilt, shape, told):
    with pytest.raises(DistriError) as error:
        from_original(unread(original("sd1") | {spoilt: shape}), "file")
    one_sentence(str(error.value))
    says(str(error.value), *told)


@pytest.mark.parametrize(
    "missing", ["input_blocks.3.0.op.weight", "conv_in", "out.2.weight", "input_blocks.1.0.in_layers.2.weight"]
)
def test_a_file_that_lacks_what_its_config_is_told_by_gives_one_sentence(missing):
    shapes = {name: shape for name, shape in original("sd1").items() if name != UNET + missing}
    if missing == "conv_in":
        shapes.pop("first_stage_model.encoder.conv_in.weight")
    with pytest.raises(DistriError) as error:
        from_original(unread(shapes), "file")
    one_sentence(str(error.value))
    says(str(error.value), re.compile("^file"))
