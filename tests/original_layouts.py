"""What tensors the original files hold: names and shapes, in full size, built as the original models build their modules.

The sizes are those of the configs that were published with the models (`v1-inference.yaml`, `v2-inference.yaml`,
`sd_xl_base.yaml`, `sd_xl_refiner.yaml`). test_convert_original.py sees diffusers' own converter read them without a rest.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from distrijax.weights.tensors import Tensor, Tensors

Shapes = dict[str, tuple[int, ...]]


def prefixed(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


def conv(name: str, inner: int, outer: int, size: int = 3) -> Shapes:
    return {f"{name}.weight": (outer, inner, size, size), f"{name}.bias": (outer,)}


def linear(name: str, inner: int, outer: int, *, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (outer, inner)} | ({f"{name}.bias": (outer,)} if bias else {})


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def unet(
    width: int,
    multipliers: tuple[int, ...],
    depths: tuple[int, ...],
    *,
    context: int,
    linear_projection: bool,
    middle_depth: int,
    label: int | None = None,
    channels: int = 4,
) -> Shapes:
    """depths: transformer layers of each level; 0 where it has none. label: width of the other embeddings."""
    layers, embedding = 2, 4 * width
    shapes = linear("time_embed.0", width, embedding) | linear("time_embed.2", embedding, embedding)
    if label:
        shapes |= linear("label_emb.0.0", label, embedding) | linear("label_emb.0.2", embedding, embedding)

    def resnet(inner: int, outer: int) -> Shapes:
        held = norm("in_layers.0", inner) | conv("in_layers.2", inner, outer) | linear("emb_layers.1", embedding, outer)
        held |= norm("out_layers.0", outer) | conv("out_layers.3", outer, outer)
        return held | (conv("skip_connection", inner, outer, 1) if inner != outer else {})

    def transformer(width: int, depth: int) -> Shapes:
        return spatial_transformer(width, depth, context, linear_projection)

    blocks = iter(range(10_000))
    shapes |= conv(f"input_blocks.{next(blocks)}.0", channels, width)
    skips = current = [width]
    current = width
    for level, (multiplier, depth) in enumerate(zip(multipliers, depths, strict=True)):
        for _ in range(layers):
            block = f"input_blocks.{next(blocks)}"
            shapes |= prefixed(f"{block}.0.", resnet(current, multiplier * width))
            current = multiplier * width
            shapes |= prefixed(f"{block}.1.", transformer(current, depth)) if depth else {}
            skips.append(current)
        if level < len(multipliers) - 1:
            shapes |= conv(f"input_blocks.{next(blocks)}.0.op", current, current)
            skips.append(current)
    shapes |= prefixed("middle_block.0.", resnet(current, current))
    shapes |= prefixed("middle_block.1.", transformer(current, middle_depth))
    shapes |= prefixed("middle_block.2.", resnet(current, current))
    blocks = iter(range(10_000))
    for level, multiplier, depth in reversed(list(zip(range(len(depths)), multipliers, depths, strict=True))):
        for layer in range(layers + 1):
            block = f"output_blocks.{next(blocks)}"
            shapes |= prefixed(f"{block}.0.", resnet(current + skips.pop(), multiplier * width))
            current = multiplier * width
            shapes |= prefixed(f"{block}.1.", transformer(current, depth)) if depth else {}
            if level and layer == layers:
                shapes |= conv(f"{block}.{2 if depth else 1}.conv", current, current)
    return shapes | norm("out.0", width) | conv("out.2", width, 4)


def spatial_transformer(width: int, depth: int, context: int, linear_projection: bool) -> Shapes:
    project = linear if linear_projection else lambda *sizes: conv(*sizes, 1)
    shapes = norm("norm", width) | project("proj_in", width, width) | project("proj_out", width, width)
    for block in range(depth):
        held = norm("norm1", width) | norm("norm2", width) | norm("norm3", width)
        for name, inner in (("attn1", width), ("attn2", context)):
            held |= linear(f"{name}.to_q", width, width, bias=False) | linear(f"{name}.to_out.0", width, width)
            held |= linear(f"{name}.to_k", inner, width, bias=False) | linear(f"{name}.to_v", inner, width, bias=False)
        held |= linear("ff.net.0.proj", width, 8 * width) | linear("ff.net.2", 4 * width, width)
        shapes |= prefixed(f"transformer_blocks.{block}.", held)
    return shapes


def vae(width: int = 128, multipliers: tuple[int, ...] = (1, 2, 4, 4), latent: int = 4) -> Shapes:
    def resnet(inner: int, outer: int) -> Shapes:
        held = norm("norm1", inner) | conv("conv1", inner, outer) | norm("norm2", outer) | conv("conv2", outer, outer)
        return held | (conv("nin_shortcut", inner, outer, 1) if inner != outer else {})

    def middle(width: int) -> Shapes:
        held = prefixed("mid.block_1.", resnet(width, width)) | prefixed("mid.block_2.", resnet(width, width))
        held |= norm("mid.attn_1.norm", width)
        for name in ("q", "k", "v", "proj_out"):
            held |= conv(f"mid.attn_1.{name}", width, width, 1)
        return held

    widest, current = multipliers[-1] * width, width
    encoder = (
        conv("conv_in", 3, width) | middle(widest) | norm("norm_out", widest) | conv("conv_out", widest, 2 * latent)
    )
    for level, multiplier in enumerate(multipliers):
        for block in range(2):
            encoder |= prefixed(f"down.{level}.block.{block}.", resnet(current, multiplier * width))
            current = multiplier * width
        if level < len(multipliers) - 1:
            encoder |= conv(f"down.{level}.downsample.conv", current, current)
    decoder = conv("conv_in", latent, widest) | middle(widest) | norm("norm_out", width) | conv("conv_out", width, 3)
    for level, multiplier in reversed(list(enumerate(multipliers))):
        for block in range(3):
            decoder |= prefixed(f"up.{level}.block.{block}.", resnet(current, multiplier * width))
            current = multiplier * width
        if level:
            decoder |= conv(f"up.{level}.upsample.conv", current, current)
    quant = conv("quant_conv", 2 * latent, 2 * latent, 1) | conv("post_quant_conv", latent, latent, 1)
    return prefixed("encoder.", encoder) | prefixed("decoder.", decoder) | quant


def clip(width: int = 768, layers: int = 12, vocabulary: int = 49408) -> Shapes:
    """As transformers names CLIP's text encoder."""
    shapes = {"embeddings.token_embedding.weight": (vocabulary, width)}
    shapes |= {"embeddings.position_embedding.weight": (77, width), "embeddings.position_ids": (1, 77)}
    for layer in range(layers):
        held = norm("layer_norm1", width) | norm("layer_norm2", width)
        for name in ("q", "k", "v", "out"):
            held |= linear(f"self_attn.{name}_proj", width, width)
        held |= linear("mlp.fc1", width, 4 * width) | linear("mlp.fc2", 4 * width, width)
        shapes |= prefixed(f"encoder.layers.{layer}.", held)
    return prefixed("text_model.", shapes | norm("final_layer_norm", width))


def open_clip(width: int, layers: int, vocabulary: int = 49408) -> Shapes:
    shapes = {"positional_embedding": (77, width), "text_projection": (width, width), "logit_scale": ()}
    shapes |= {"token_embedding.weight": (vocabulary, width), **norm("ln_final", width)}
    for layer in range(layers):
        held = norm("ln_1", width) | norm("ln_2", width) | linear("attn.out_proj", width, width)
        held |= {"attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,)}
        held |= linear("mlp.c_fc", width, 4 * width) | linear("mlp.c_proj", 4 * width, width)
        shapes |= prefixed(f"transformer.resblocks.{layer}.", held)
    return shapes


def tables() -> Shapes:
    """The noise schedule, as CompVis' training leaves it in its files."""
    names = (
        "betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod "
        "log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod posterior_variance "
        "posterior_log_variance_clipped posterior_mean_coef1 posterior_mean_coef2"
    )
    return dict.fromkeys(names.split(), (1000,))


def averages(unet: Shapes) -> Shapes:
    """The UNet's averaged weights, whose names have no dots, and their counters."""
    flat = {"model_ema.diffusion_model" + name.replace(".", ""): shape for name, shape in unet.items()}
    return {**flat, "model_ema.decay": (), "model_ema.num_updates": ()}


def original(family: str) -> Shapes:
    """A whole file of the family: "sd1", "sd2", "sdxl" or "refiner"."""
    parts = {"sd1": _sd1, "sd2": _sd2, "sdxl": _sdxl, "refiner": _refiner}[family]
    return {name: shape for shapes in parts() for name, shape in shapes.items()}


def _sd1() -> Iterator[Shapes]:
    held = unet(320, (1, 2, 4, 4), (1, 1, 1, 0), context=768, linear_projection=False, middle_depth=1)
    yield prefixed("model.diffusion_model.", held)
    yield prefixed("first_stage_model.", vae())
    yield prefixed("cond_stage_model.transformer.", clip())
    yield tables()
    yield averages(held)


def _sd2() -> Iterator[Shapes]:
    held = unet(320, (1, 2, 4, 4), (1, 1, 1, 0), context=1024, linear_projection=True, middle_depth=1)
    yield prefixed("model.diffusion_model.", held)
    yield prefixed("first_stage_model.", vae())
    yield prefixed("cond_stage_model.model.", open_clip(1024, 24))
    yield tables()


def _sdxl() -> Iterator[Shapes]:
    sizes = {"context": 2048, "linear_projection": True, "middle_depth": 10, "label": 2816}
    yield prefixed("model.diffusion_model.", unet(320, (1, 2, 4), (0, 2, 10), **sizes))
    yield prefixed("first_stage_model.", vae())
    yield prefixed("conditioner.embedders.0.transformer.", clip())
    yield prefixed("conditioner.embedders.1.model.", open_clip(1280, 32))
    yield {"denoiser.sigmas": (1000,)}


def _refiner() -> Iterator[Shapes]:
    sizes = {"context": 1280, "linear_projection": True, "middle_depth": 4, "label": 2560}
    yield prefixed("model.diffusion_model.", unet(384, (1, 2, 4, 4), (0, 4, 4, 0), **sizes))
    yield prefixed("first_stage_model.", vae())
    yield prefixed("conditioner.embedders.0.model.", open_clip(1280, 32))
    yield {"denoiser.sigmas": (1000,)}


def unread(shapes: Shapes) -> Tensors:
    """Tensors of which nothing but the shape may be asked."""

    def read():
        raise AssertionError("a tensor was read to find out what it is")

    return {name: Tensor(shape, np.dtype(np.float16), read) for name, shape in shapes.items()}
