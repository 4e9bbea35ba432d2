"""A UNet or a VAE alone, in the naming of the original layouts or of diffusers."""

from __future__ import annotations

import numpy as np
import pytest
from facts import refuses
from original_layouts import unread, vae
from small_originals import convert, same_bytes, small

from distrijax.convert.layouts.original_parts import unet_from, vae_from
from distrijax.weights.tensors import of_array

PARTS = ("model.diffusion_model.", "diffusion_model.", "")


@pytest.mark.parametrize("prefix", PARTS)
def test_a_unet_alone_is_taken_in_either_naming(prefix):
    file = small("sdxl")
    wanted = convert(file).tensors["unet"]
    bare = {name.removeprefix("model.diffusion_model."): tensor for name, tensor in file.items()}
    alone = {prefix + name: bare[name] for name in bare if "model.diffusion_model." + name in file}
    told, tensors = unet_from(alone, "unet.safetensors")
    same_bytes(wanted, tensors)
    assert told["block_out_channels"] == [32, 64] and told["transformer_layers_per_block"] == [1, 2]
    assert told["use_linear_projection"] and told["cross_attention_dim"] == 128
    assert told["projection_class_embeddings_input_dim"] == 128
    assert "attention_head_dim" not in told
    told_again, again = unet_from(wanted, "unet.safetensors")
    same_bytes(wanted, again)
    assert told_again == told


def test_a_whole_file_gives_its_unet_and_its_vae():
    file = small("sd2")
    checkpoint = convert(file)
    same_bytes(checkpoint.tensors["unet"], unet_from(file, "file")[1])
    same_bytes(checkpoint.tensors["vae"], vae_from(file, "file")[1])


def test_a_latent_consistency_unet_is_told():
    held = {**convert(small("sd1")).tensors["unet"], "time_embedding.cond_proj.weight": of_array(np.zeros((32, 256)))}
    assert unet_from(held, "lcm.safetensors")[0]["time_cond_proj_dim"] == 256


@pytest.mark.parametrize("prefix", ("first_stage_model.", "vae.", ""))
def test_a_vae_alone_is_taken_in_either_naming(prefix):
    file = small("sdxl")
    wanted = convert(file).tensors["vae"]
    start = "first_stage_model."
    alone = {prefix + name.removeprefix(start): tensor for name, tensor in file.items() if name.startswith(start)}
    alone |= {f"{prefix}loss.logvar": of_array(np.zeros(())), f"{prefix}model_ema.decay": of_array(np.zeros(()))}
    told, tensors = vae_from(alone, "vae.ckpt")
    same_bytes(wanted, tensors)
    assert told["block_out_channels"] == [32, 64] and told["layers_per_block"] == 2 and told["latent_channels"] == 4
    old = {name.replace(".to_q.", ".query."): tensor for name, tensor in wanted.items()}
    assert old.keys() != wanted.keys()
    same_bytes(wanted, vae_from(old, "vae.safetensors")[1])


def test_parts_with_unknown_tensors_or_of_other_models_are_refused():
    checkpoint = convert(small("sd1"))
    odd = {"down_blocks.0.resnets.0.odd.weight": of_array(np.zeros(1))}
    with refuses("unet.bin", "1 unknown (down_blocks.0.resnets.0.odd.weight"):
        unet_from(checkpoint.tensors["unet"] | odd, "unet.bin")
    with refuses("vae.bin", "1 unknown (odd"):
        vae_from({**checkpoint.tensors["vae"], "odd": of_array(np.zeros(1))}, "vae.bin")
    with refuses("vae.bin", "VAE", "UNet"):
        unet_from(checkpoint.tensors["vae"], "vae.bin")
    with refuses("unet.bin", "VAE", "UNet"):
        vae_from(checkpoint.tensors["unet"], "unet.bin")
    with refuses("flux-vae.safetensors", "VAE", 16, 4):
        vae_from(unread(vae(latent=16)), "flux-vae.safetensors")
