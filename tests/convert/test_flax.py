"""Flax's names and layouts: every tensor has one, and the same bytes come back."""

from __future__ import annotations

import numpy as np
import pytest
from facts import refuses
from flax_model import flax_bytes, to_flax

from distrijax.convert.files import open_tensors
from distrijax.convert.layouts.flax_names import from_flax
from distrijax.weights.tensors import Shape, Tensors, of_array

FAMILIES = ("xl", 1, 2)

UNET = {  # names of FlaxUNet2DConditionModel and shapes, of tests/tiny_pipeline.py's UNet like SD 1.x
    "conv_in.kernel": (3, 3, 4, 32),
    "down_blocks_0.resnets_0.norm1.scale": (32,),
    "down_blocks_0.resnets_0.time_emb_proj.kernel": (128, 32),
    "down_blocks_0.attentions_0.norm.bias": (32,),
    "down_blocks_0.attentions_0.proj_in.kernel": (1, 1, 32, 32),
    "down_blocks_0.attentions_0.transformer_blocks_0.attn2.to_k.kernel": (32, 32),
    "down_blocks_0.attentions_0.transformer_blocks_0.attn1.to_out_0.bias": (32,),
    "down_blocks_0.attentions_0.transformer_blocks_0.ff.net_0.proj.kernel": (32, 256),
    "down_blocks_0.attentions_0.transformer_blocks_0.ff.net_2.kernel": (128, 32),
    "down_blocks_0.attentions_0.transformer_blocks_0.norm3.scale": (32,),
    "down_blocks_0.downsamplers_0.conv.kernel": (3, 3, 32, 32),
    "down_blocks_1.resnets_0.conv_shortcut.kernel": (1, 1, 32, 64),
    "mid_block.attentions_0.proj_out.kernel": (1, 1, 64, 64),
    "up_blocks_0.upsamplers_0.conv.kernel": (3, 3, 64, 64),
    "up_blocks_2.resnets_1.conv1.kernel": (3, 3, 64, 32),
    "conv_out.kernel": (3, 3, 32, 4),
}
XL = {
    "add_embedding.linear_1.kernel": (80, 128),
    "down_blocks_1.attentions_0.proj_in.kernel": (64, 64),
    "down_blocks_2.attentions_0.transformer_blocks_1.attn2.to_v.kernel": (64, 64),
}
VAE = {  # of FlaxAutoencoderKL
    "encoder.conv_in.kernel": (3, 3, 3, 16),
    "encoder.down_blocks_0.downsamplers_0.conv.kernel": (3, 3, 16, 16),
    "encoder.mid_block.attentions_0.group_norm.scale": (32,),
    "encoder.mid_block.attentions_0.query.kernel": (32, 32),
    "encoder.mid_block.attentions_0.key.bias": (32,),
    "decoder.mid_block.attentions_0.value.kernel": (32, 32),
    "decoder.mid_block.attentions_0.proj_attn.kernel": (32, 32),
    "decoder.up_blocks_3.resnets_0.conv_shortcut.kernel": (1, 1, 32, 16),
    "decoder.up_blocks_0.upsamplers_0.conv.bias": (32,),
    "decoder.conv_norm_out.bias": (16,),
    "quant_conv.kernel": (1, 1, 8, 8),
    "post_quant_conv.kernel": (1, 1, 4, 4),
}
TEXT = {  # of FlaxCLIPTextModel
    "text_model.embeddings.position_embedding.embedding": (77, 32),
    "text_model.encoder.layers.2.self_attn.out_proj.kernel": (32, 32),
    "text_model.encoder.layers.0.layer_norm1.scale": (32,),
    "text_model.encoder.layers.0.mlp.fc1.kernel": (32, 64),
    "text_model.final_layer_norm.bias": (32,),
}


def shapes(tensors: Tensors) -> dict[str, Shape]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def check_held(wanted: dict[str, Shape], flax: Tensors) -> None:
    assert {name: flax[name].shape for name in wanted} == wanted


def test_names_are_those_of_the_flax_modules(checkpoints):
    sd, xl = checkpoints[1].tensors, checkpoints["xl"].tensors
    check_held(UNET, to_flax(sd["unet"], "unet"))
    check_held(XL, to_flax(xl["unet"], "unet"))
    check_held(VAE, to_flax(sd["vae"], "vae"))
    check_held(TEXT, to_flax(sd["text_encoder"], "text_encoder"))
    check_held(TEXT | {"text_projection.kernel": (32, 32)}, to_flax(xl["text_encoder_2"], "text_encoder_2"))
    assert "text_projection.kernel" not in to_flax(sd["text_encoder"], "text_encoder")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_flax_file_gives_the_bytes_that_it_was_made_of(checkpoints, family, tmp_path):
    for part, tensors in checkpoints[family].tensors.items():
        path = tmp_path / f"{part}.msgpack"
        path.write_bytes(flax_bytes(to_flax(tensors, part)))
        found = open_tensors(path)
        back = from_flax(found, part)
        assert shapes(back) == shapes(tensors)
        for name, tensor in tensors.items():
            assert back[name].dtype == tensor.dtype
            assert back[name].read().tobytes() == tensor.read().tobytes(), name


def test_tensors_that_no_layer_of_flax_has_are_listed():
    with refuses("model.msgpack", "unknown", "conv_in.weight"):
        from_flax({"conv_in.weight": of_array(np.zeros((32, 4, 3, 3)))}, "model.msgpack")
