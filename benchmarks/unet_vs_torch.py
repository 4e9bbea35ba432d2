"""Time of one UNet call on one device, compared with torch diffusers.

    python benchmarks/unet_vs_torch.py                                   # the embedded default model, 256x256
    python benchmarks/unet_vs_torch.py --model FOLDER --image-size 512
    python benchmarks/unet_vs_torch.py --config sdxl-reduced --compile   # SDXL's widths, few transformer layers, random
    python benchmarks/unet_vs_torch.py --config sdxl --image-size 1024 --compile --channels-last      # on a GPU

All UNets have the same weights and the same input. They take turns in one process, which on a CPU is pinned to as many cores
as each may use, and each turn begins when the other's threads are asleep. The result is the median of the ratios of adjacent
turns. distrijax computes once, before the denoising loop, what depends on the prompt alone; diffusers computes it in every
call. That time is not included in distrijax's turns and is printed separately. Needs the extra `test`.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory of the same GPU

import jax
import jax.numpy as jnp
import numpy as np

try:
    import diffusers
    import torch
except ImportError:
    raise SystemExit("error: this benchmark needs diffusers and torch; install the extra `test`") from None

from distrijax import DEFAULT_MODEL
from distrijax.cli.options import Parser
from distrijax.convert.layouts.families import SDXL
from distrijax.convert.layouts.folder import read_model
from distrijax.json_config import read_json
from distrijax.models.unet import abstract_unet
from distrijax.models.unet_config import UNetConfig
from distrijax.parallel.exchange import WholeImage
from distrijax.parallel.mesh import MeshPlan
from distrijax.parallel.programs import compiled, options_for
from distrijax.weights.load import load_module
from distrijax.weights.sharding import Model, ModelLayout

CONFIGS = {"sdxl": SDXL.unet, "sdxl-reduced": {**SDXL.unet, "layers_per_block": 1, "transformer_layers_per_block": 1}}
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENS = 77
VAE_SCALE = 8
WARM_UP = 3
PAUSE = 0.05  # seconds; OpenMP's idle threads spin for a while before they sleep


def arguments() -> argparse.Namespace:
    """Parses the flags."""
    parser = Parser(__doc__)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="a folder in the diffusers layout")
    source.add_argument("--config", choices=tuple(CONFIGS), help="random weights instead of a model")
    parser.add_argument(
        "--image-size", type=int, nargs="+", default=[256], metavar=("H", "W"), help="pixels (default: 256)"
    )
    parser.add_argument("--batch", type=int, default=2, help="batch of the UNet; 2 is one image with guidance")
    parser.add_argument("--dtype", choices=tuple(TORCH_DTYPES), help="(default: bfloat16 on GPUs, float32 on CPUs)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="cores for each, on CPUs")
    parser.add_argument("--pairs", type=int, default=20, help="turns of each (default: %(default)s)")
    parser.add_argument("--calls", type=int, default=1, help="consecutive calls of a turn (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile in addition to eager torch")
    parser.add_argument("--compile-mode", default="default", help="mode of torch.compile (default: %(default)s)")
    parser.add_argument("--channels-last", action="store_true", help="use torch's channels-last memory layout")
    args = parser.parse_args()
    args.image_size = parser.size(args.image_size)
    return args


def main() -> None:
    """Measures and prints; raises SystemExit for wrong input."""
    args = arguments()
    on_gpu = torch.cuda.is_available()
    if not on_gpu:  # before JAX starts its threads, which inherit the affinity of the starting thread
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
        torch.set_num_threads(args.threads)
        jax.config.update("jax_platforms", "cpu")
    device = jax.devices()[0]
    if on_gpu and device.platform != "gpu":
        raise SystemExit("error: torch sees a GPU and JAX does not; install the extra `cuda12`, or hide it from torch")
    args.dtype = args.dtype or ("bfloat16" if on_gpu else "float32")
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    unet, torch_unet = load_unets(args, device, layout)
    inputs = random_inputs(unet.config, args)
    condition, jax_call = jax_calls(unet, inputs, device)
    diffusers_call = torch_call(torch_unet, inputs, layout)
    calls = {"distrijax": jax_call, "diffusers, eager": diffusers_call}
    if args.compile:
        calls["diffusers, compiled"] = torch_call(torch.compile(torch_unet, mode=args.compile_mode), inputs, layout)

    first, outputs = {}, {}
    condition()
    for name, call in calls.items():
        first[name] = seconds(call)
        for _ in range(WARM_UP):
            outputs[name] = call()
    turns = {name: [] for name in calls}
    for _ in range(args.pairs):
        for name, call in calls.items():
            turns[name].append(seconds(call, args.calls))
    error = difference(outputs["distrijax"], outputs["diffusers, eager"])
    print(
        f"{args.config or args.model}: {sum(p.numel() for p in torch_unet.parameters()) / 1e6:.1f} M parameters, sample "
        f"{list(inputs['sample'].shape)}, {args.dtype}, {device.device_kind}, pairs: {args.pairs} of {args.calls}"
        f"{'' if on_gpu else f', threads: {args.threads}'}\n"
        f"jax {jax.__version__}, torch {torch.__version__}{', channels last' * args.channels_last}, diffusers "
        f"{diffusers.__version__}{f', torch.compile {args.compile_mode}' * args.compile}\n"
        f"distrijax, once for each prompt: {1e3 * seconds(condition):.1f} ms\n"
        f"largest difference of the outputs: {error:.1e} of the largest value"
    )
    report(turns, first)


def report(turns: dict[str, list[float]], first: dict[str, float]) -> None:
    """Prints each UNet's time, and the ratio of distrijax's to it."""
    for name, times in turns.items():
        line = f"{name}: {1e3 * statistics.median(times):.2f} ms a call (median); first call {first[name]:.1f} s"
        if name != "distrijax":
            ratios = [a / b for a, b in zip(turns["distrijax"], times, strict=True)]
            quarter, median, three_quarters = statistics.quantiles(ratios, n=4)
            line += f"; distrijax / it: {median:.3f} (middle half: {quarter:.3f} to {three_quarters:.3f})"
        print(line)


def load_unets(
    args: argparse.Namespace, device: jax.Device, layout: torch.memory_format
) -> tuple[Model, torch.nn.Module]:
    """The same weights as distrijax's and as diffusers' UNet."""
    dtype, where = TORCH_DTYPES[args.dtype], torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as scratch:
        if args.config:
            torch.manual_seed(0)
            with where:
                made = diffusers.UNet2DConditionModel.from_config(CONFIGS[args.config]).to(dtype)
            made.save_pretrained(Path(scratch, "unet"))
            args.model = Path(scratch)
            del made
        torch_unet = diffusers.UNet2DConditionModel.from_pretrained(args.model / "unet", torch_dtype=dtype)
        torch_unet = torch_unet.eval().to(where, memory_format=layout)
        return load_unet(args.model / "unet", jnp.dtype(args.dtype), device), torch_unet


def difference(output: jax.Array, expected: torch.Tensor) -> float:
    """Largest difference of distrijax's output `[b, h, w, c]` from torch's `[b, c, h, w]`, as a share of the largest value."""
    expected = expected.permute(0, 2, 3, 1)
    return np.abs(np.asarray(output, np.float32) - expected.float().cpu().numpy()).max() / expected.abs().max().item()


def load_unet(folder: Path, dtype: jnp.dtype, device: jax.Device) -> Model:
    """Loads a UNet as a pipeline on one device does."""
    config = UNetConfig.from_dict(read_json(folder / "config.json"))
    form, mesh = ModelLayout.of(abstract_unet(config), platform=device.platform), MeshPlan(1, 1, 1).build([device])
    module = load_module(form.abstract(), read_model(folder), str(folder), dtype=dtype, place=form.make_placer(mesh))
    return Model.of(config, form, mesh, dtype)._replace(params=form.fuse_params(module))


def random_inputs(config: UNetConfig, args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Inputs of a UNet call, the sample in NHWC."""
    rng = np.random.default_rng(0)
    height, width = args.image_size
    shapes = {
        "sample": (height // VAE_SCALE, width // VAE_SCALE, config.in_channels),
        "encoder_hidden_states": (TOKENS, config.context(0)),
    }
    sizes = [height, width, 0, 0, height, width]
    if config.addition_embed_type:
        pooled = config.projection_class_embeddings_input_dim - len(sizes) * config.addition_time_embed_dim
        shapes["text_embeds"] = (pooled,)
    inputs = {name: rng.normal(size=(args.batch, *shape)).astype(np.float32) for name, shape in shapes.items()}
    if config.addition_embed_type:
        inputs["time_ids"] = np.float32([sizes] * args.batch)
    return inputs | {"timestep": np.float32(500)}


def in_dtype(inputs: dict[str, Any], cast: Callable[[Any], Any]) -> dict[str, Any]:
    """The inputs, with those cast that a pipeline holds in the model's dtype."""
    return {name: value if name in ("time_ids", "timestep") else cast(value) for name, value in inputs.items()}


def jax_calls(unet: Model, inputs: dict[str, np.ndarray], device: jax.Device) -> tuple[Callable, Callable]:
    """The computation for each prompt, and one call that does not wait for its result."""
    arrays = in_dtype(jax.device_put(inputs, device), lambda array: array.astype(unet.dtype))
    prompt = [arrays[name] for name in arrays if name not in ("sample", "timestep")]

    def program(function: Callable, *arguments: jax.Array) -> Callable[[], jax.Array]:
        """A program that is compiled at its first call, like torch's."""
        options = options_for(device.platform)
        compile = functools.cache(lambda: compiled(jax.jit(function).lower(unet.params, *arguments), options, {}))
        return lambda: compile()(unet.params, *arguments)

    prepare = program(lambda params, *prompt: unet.form.module(params).condition(*prompt), *prompt)
    sample = (arrays["sample"], arrays["timestep"], prepare())
    return prepare, program(lambda params, *sample: unet.form.module(params)(*sample, WholeImage()), *sample)


def torch_call(unet: torch.nn.Module, inputs: dict[str, np.ndarray], layout: torch.memory_format) -> Callable:
    """One call of diffusers' UNet, which on a GPU does not wait for its result."""
    held = next(unet.parameters())
    tensors = {name: torch.tensor(value, device=held.device) for name, value in inputs.items()}
    tensors = in_dtype(tensors, lambda tensor: tensor.to(held.dtype))
    sample = tensors["sample"].permute(0, 3, 1, 2).contiguous(memory_format=layout)
    added = {name: tensors[name] for name in ("text_embeds", "time_ids") if name in tensors}

    @torch.inference_mode()
    def call():
        return unet(sample, tensors["timestep"], tensors["encoder_hidden_states"], added_cond_kwargs=added).sample

    return call


def seconds(call: Callable, times: int = 1) -> float:
    """Seconds of one call, averaged over `times` consecutive ones."""
    time.sleep(PAUSE)
    start = time.perf_counter()
    for _ in range(times):
        result = call()
    jax.block_until_ready(result) if not isinstance(result, torch.Tensor) else _wait()
    return (time.perf_counter() - start) / times


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
