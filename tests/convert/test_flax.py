"""Flax's names and layouts: every tensor has one, in full size; linen's own modules compute torch's outputs with them."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from facts import refuses
from flax.traverse_util import flatten_dict
from flax_model import flax_bytes, to_flax
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from distrijax.convert.files import open_tensors
from distrijax.convert.layouts.flax_names import from_flax
from distrijax.convert.tensors import Shape, Tensor, Tensors, of_array
from distrijax.weights.names import current_name

FAMILIES = ("xl", 1, 2)

UNET = {  # names of FlaxUNet2DConditionModel and shapes, of tests/tiny_pipeline.py's UNet like SD 1.x
    "conv_in.kernel": (3, 3, 4, 32),
    "time_embedding.linear_1.kernel": (32, 128),
    "down_blocks_0.resnets_0.norm1.scale": (32,),
    "down_blocks_0.resnets_0.conv1.kernel": (3, 3, 32, 32),
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
    "mid_block.resnets_1.conv2.bias": (64,),
    "up_blocks_0.upsamplers_0.conv.kernel": (3, 3, 64, 64),
    "up_blocks_2.resnets_1.conv1.kernel": (3, 3, 64, 32),
    "conv_norm_out.scale": (32,),
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
    "text_model.encoder.layers.0.mlp.fc2.kernel": (64, 32),
    "text_model.final_layer_norm.bias": (32,),
}


def shapes(tensors: Tensors) -> dict[str, Shape]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def on_meta(module: torch.nn.Module) -> Tensors:
    """A model that has no memory, by its names and shapes."""

    def read() -> np.ndarray:
        raise AssertionError("names and shapes are to be told without reading")

    return {
        current_name(name): Tensor(tuple(value.shape), np.dtype(np.float32), read)
        for name, value in module.state_dict().items()
    }


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


FULL = {
    "SD 1.5's UNet": ("unet", lambda: UNet2DConditionModel(cross_attention_dim=768), 686),
    "SD 2.1's UNet": (
        "unet",
        lambda: UNet2DConditionModel(
            cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
        ),
        686,
    ),
    "SDXL's UNet": (
        "unet",
        lambda: UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            use_linear_projection=True,
            cross_attention_dim=2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
        1680,
    ),
    "the VAE": (
        "vae",
        lambda: AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        ),
        248,
    ),
    "CLIP ViT-L": (
        "text_encoder",
        lambda: CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        ),
        196,
    ),
    "OpenCLIP bigG": (
        "text_encoder_2",
        lambda: CLIPTextModelWithProjection(
            CLIPTextConfig(
                hidden_size=1280,
                intermediate_size=5120,
                num_hidden_layers=32,
                num_attention_heads=20,
                projection_dim=1280,
            )
        ),
        517,
    ),
}


@pytest.mark.parametrize("model", FULL)
def test_models_of_full_size_map_without_a_rest(model):
    part, build, count = FULL[model]
    with torch.device("meta"):
        ours = on_meta(build())
    flax = to_flax(ours, part)
    assert len(flax) == count
    assert shapes(from_flax(flax, model)) == shapes(ours)


def params(module: torch.nn.Module, name: str, part: str) -> dict[str, np.ndarray]:
    """The parameters of a torch module for linen's, having had the given place in a model."""
    ours = {f"{name}.{leaf}": of_array(value.detach().numpy()) for leaf, value in module.named_parameters()}
    return {name.rsplit(".", 1)[1]: tensor.read() for name, tensor in to_flax(ours, part).items()}


def check_same_output(linen: nn.Module, held: dict[str, np.ndarray], inputs: np.ndarray, wanted: np.ndarray) -> None:
    variables = {"params": jax.tree.map(jnp.asarray, held)}
    np.testing.assert_allclose(linen.apply(variables, jnp.asarray(inputs)), wanted, atol=1e-5)


def test_a_convolution_of_linen_gives_torchs_output():
    conv = torch.nn.Conv2d(4, 6, (3, 5), padding=(1, 2))
    pictures = torch.randn(2, 4, 8, 9)
    check_same_output(
        nn.Conv(6, (3, 5), padding=((1, 1), (2, 2))),
        params(conv, "down_blocks.0.resnets.0.conv1", "unet"),
        pictures.numpy().transpose(0, 2, 3, 1),
        conv(pictures).detach().numpy().transpose(0, 2, 3, 1),
    )


@pytest.mark.parametrize(
    "name, part",
    [
        ("down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2", "unet"),
        ("decoder.mid_block.attentions.0.to_q", "vae"),
        ("decoder.mid_block.attentions.0.to_out.0", "vae"),
        ("text_model.encoder.layers.0.mlp.fc1", "text_encoder"),
    ],
)
def test_a_linear_layer_of_linen_gives_torchs_output(name, part):
    linear = torch.nn.Linear(5, 7)
    rows = torch.randn(3, 5)
    check_same_output(nn.Dense(7), params(linear, name, part), rows.numpy(), linear(rows).detach().numpy())


def test_norms_and_embeddings_of_linen_give_torchs_output():
    norm, table = torch.nn.LayerNorm(6), torch.nn.Embedding(10, 6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    rows, tokens = torch.randn(3, 6), torch.tensor([4, 0, 9])
    held = params(norm, "text_model.final_layer_norm", "text_encoder")
    check_same_output(nn.LayerNorm(epsilon=1e-5), held, rows.numpy(), norm(rows).detach().numpy())
    held = params(table, "text_model.embeddings.token_embedding", "text_encoder")
    check_same_output(nn.Embed(10, 6), held, tokens.numpy().astype(np.int32), table(tokens).detach().numpy())


class Resnet(nn.Module):
    def setup(self) -> None:
        self.norm1, self.norm2 = nn.LayerNorm(), nn.LayerNorm()
        self.conv1, self.conv2 = nn.Conv(4, (3, 3)), nn.Conv(4, (3, 3))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv2(self.norm2(self.conv1(self.norm1(x))))


class Block(nn.Module):
    def setup(self) -> None:
        self.resnets = [Resnet(), Resnet()]

    def __call__(self, x: jax.Array) -> jax.Array:
        for resnet in self.resnets:
            x = resnet(x)
        return x


class Tower(nn.Module):
    def setup(self) -> None:
        self.down_blocks = [Block(), Block()]

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.down_blocks:
            x = block(x)
        return x


def test_lists_of_modules_are_named_as_linen_names_them():
    found = jax.eval_shape(Tower().init, jax.random.key(0), jnp.zeros((1, 8, 8, 4)))["params"]
    theirs = {".".join(path) for path in flatten_dict(found)}
    layers = ("norm1", "conv1", "norm2", "conv2")
    ours = {
        f"down_blocks.{block}.resnets.{n}.{layer}.{leaf}": of_array(
            np.zeros((4, 4, 3, 3) if layer.startswith("conv") and leaf == "weight" else 4, np.float32)
        )
        for block in (0, 1)
        for n in (0, 1)
        for layer in layers
        for leaf in ("weight", "bias")
    }
    assert to_flax(ours, "unet").keys() == theirs


def test_tensors_that_no_layer_of_flax_has_are_listed(checkpoints):
    with refuses("model.msgpack", "unknown", "conv_in.weight"):
        from_flax({"conv_in.weight": of_array(np.zeros((32, 4, 3, 3)))}, "model.msgpack")
