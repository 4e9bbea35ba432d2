"""Is one UNet call on one CPU device as fast as torch diffusers'?

    python benchmarks/unet_vs_torch.py                                   # the embedded default model, 256x256
    python benchmarks/unet_vs_torch.py --model FOLDER --image-size 512
    python benchmarks/unet_vs_torch.py --config sdxl-reduced             # SDXL's widths, few transformer layers, random

Both UNets have the same float32 weights and the same input. They take turns in one process that is bound to as many
cores as either may use, and each turn begins when the other's threads are asleep; the answer is the median of the
ratios of neighbouring turns. What depends on the prompt alone is computed here before the denoising loop, in diffusers
in every call; it is not counted in our turns, and its time is printed beside them. Needs the extra `test`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from distrijax import DEFAULT_MODEL
from distrijax.exchange import WholeImage
from distrijax.unet import UNet, UNetConfig
from distrijax.weights import load_module, read_json

SDXL_REDUCED = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 1, 1),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TOKENS = 77
VAE_SCALE = 8
WARM_UP = 2
PAUSE = 0.05  # seconds; OpenMP's idle threads spin for a while before they sleep


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="a folder in the diffusers layout")
    source.add_argument("--config", choices=["sdxl-reduced"], help="random weights instead of a model")
    parser.add_argument("--image-size", type=int, nargs="+", default=[256], metavar="PIXELS", help="height [width]")
    parser.add_argument("--batch", type=int, default=2, help="UNet batch; 2 is one image with guidance")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="cores for either")
    parser.add_argument("--pairs", type=int, default=20, help="how many turns each")
    parser.add_argument("--channels-last", action="store_true", help="give torch its other memory layout")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    torch.set_num_threads(args.threads)
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory() as scratch:
        if args.config:
            torch.manual_seed(0)
            diffusers.UNet2DConditionModel(**SDXL_REDUCED).save_pretrained(Path(scratch, "unet"))
            args.model = Path(scratch)
        theirs = diffusers.UNet2DConditionModel.from_pretrained(args.model / "unet").eval()
        ours = load_unet(args.model / "unet")
    inputs = random_inputs(ours.config, args)
    condition, our_call = jax_calls(ours, inputs)
    their_call = torch_call(theirs, inputs, torch.channels_last if args.channels_last else torch.contiguous_format)

    for _ in range(WARM_UP):
        condition()
        got, expected = our_call(), their_call()
    pairs = [(seconds(our_call), seconds(their_call)) for _ in range(args.pairs)]
    quarter, median, three_quarters = statistics.quantiles([a / b for a, b in pairs], n=4)
    error = np.abs(np.asarray(got) - expected.permute(0, 2, 3, 1).numpy()).max() / expected.abs().max()
    print(
        f"{args.config or args.model}: {sum(p.numel() for p in theirs.parameters()) / 1e6:.1f} M parameters, sample "
        f"{list(inputs['sample'].shape)}, float32, threads: {args.threads}, pairs: {args.pairs}\n"
        f"jax {jax.__version__}, torch {torch.__version__}, diffusers {diffusers.__version__}\n"
        f"distrijax: {milliseconds(a for a, _ in pairs)}, and once for each prompt {1e3 * seconds(condition):.1f} ms\n"
        f"diffusers: {milliseconds(b for _, b in pairs)}{', channels last' if args.channels_last else ''}\n"
        f"largest difference of the outputs: {error:.1e} of the largest value\n"
        f"ratio distrijax / diffusers: {median:.3f} (middle half: {quarter:.3f} to {three_quarters:.3f})"
    )


def load_unet(folder: Path) -> UNet:
    config = UNetConfig.from_dict(read_json(folder / "config.json"))
    return load_module(
        abstract_unet(config), folder, variant=None, dtype=jnp.float32, place=lambda path, value: jax.device_put(value)
    )


def random_inputs(config: UNetConfig, args: argparse.Namespace) -> dict[str, np.ndarray]:
    """What a UNet is called with, pictures NHWC."""
    rng = np.random.default_rng(0)
    height, width = args.image_size[0], args.image_size[-1]
    shapes = {
        "sample": (height // VAE_SCALE, width // VAE_SCALE, config.in_channels),
        "encoder_hidden_states": (TOKENS, config.context(0)),
        "text_embeds": (config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim,),
    }
    inputs = {name: rng.normal(size=(args.batch, *shape)).astype(np.float32) for name, shape in shapes.items()}
    sizes = [height, width, 0, 0, height, width]
    return inputs | {"time_ids": np.float32([sizes] * args.batch), "timestep": np.float32(500)}


def jax_calls(unet: UNet, inputs: dict[str, np.ndarray]) -> tuple[Callable, Callable]:
    """What is done once for each prompt, and one call."""
    graph, params = nnx.split(unet)
    arrays = jax.device_put(inputs)
    prompt = [arrays[name] for name in ("encoder_hidden_states", "text_embeds", "time_ids")]
    prepare = jax.jit(lambda params, *prompt: nnx.merge(graph, params).condition(*prompt))
    call = jax.jit(lambda params, *sample: nnx.merge(graph, params)(*sample, WholeImage()))
    sample = (arrays["sample"], arrays["timestep"], prepare(params, *prompt))
    return (
        lambda: jax.block_until_ready(prepare(params, *prompt)),
        lambda: jax.block_until_ready(call(params, *sample)),
    )


def torch_call(
    unet: diffusers.UNet2DConditionModel, inputs: dict[str, np.ndarray], layout: torch.memory_format
) -> Callable:
    """One call of diffusers' UNet."""
    tensors = {name: torch.tensor(value) for name, value in inputs.items()}
    sample = tensors["sample"].permute(0, 3, 1, 2).contiguous(memory_format=layout)
    added = {name: tensors[name] for name in ("text_embeds", "time_ids")}
    unet = unet.to(memory_format=layout)

    @torch.inference_mode()
    def call():
        return unet(sample, tensors["timestep"], tensors["encoder_hidden_states"], added_cond_kwargs=added).sample

    return call


def seconds(call: Callable) -> float:
    time.sleep(PAUSE)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def milliseconds(times) -> str:
    return f"{1e3 * statistics.median(times):.1f} ms per call (median)"


if __name__ == "__main__":
    main()
