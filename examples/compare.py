"""How faithful is displaced patch parallelism? The same picture on one device and on many, side by side.

    python examples/compare.py --devices 8 --output compare.png

Paints each prompt on one device and, displaced, on `--devices`; prints the PSNR of each pair and writes a sheet: above the
one-device pictures, below the others. On a machine without accelerators the devices are virtual ones.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import jax
import numpy as np

PROMPTS = (
    "a large red circle at the top left and a small blue square on the right, on a striped yellow background",
    "a large green star in the center, on a checkered white background",
    "a large purple triangle on the left and a large yellow diamond on the right, on a dotted blue background",
    "a large black square at the bottom, a cyan circle at the top and a large red star at the top right, on a gray background",
)


def psnr(pictures: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of pictures in 0 to 1."""
    return float(-10 * np.log10(np.mean(np.square(pictures.astype(np.float64) - reference))))


def paint(devices: int, prompts: tuple[str, ...], settings: argparse.Namespace) -> np.ndarray:
    """Pictures [b, h, w, 3] of the prompts, each from its own seed."""
    from distrijax import DEFAULT_MODEL, DistriConfig, load_pipeline

    config = DistriConfig(
        devices=devices,
        sync_mode=settings.sync_mode,
        warmup_steps=settings.warmup_steps,
        split_batch=settings.split_batch,
        parallelism=settings.parallelism,
        split_scheme=settings.split_scheme,
    )
    pipeline = load_pipeline(settings.model or DEFAULT_MODEL, config)
    steps, scale = settings.num_inference_steps, settings.guidance_scale
    return np.concatenate(
        [
            pipeline(prompt, num_inference_steps=steps, guidance_scale=scale, seed=seed, output_type="np").images
            for seed, prompt in enumerate(prompts)
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--model", help="folder or hub id; the embedded model by default")
    parser.add_argument("--prompt", nargs="+", default=PROMPTS)
    parser.add_argument("--num-inference-steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=5.0)
    parser.add_argument("--warmup-steps", type=int, default=4)
    parser.add_argument("--sync-mode", default="corrected_async_gn")
    parser.add_argument("--parallelism", default="patch")
    parser.add_argument("--split-scheme", default="alternate")
    parser.add_argument("--no-split-batch", dest="split_batch", action="store_false")
    parser.add_argument("--output", type=Path, default=Path("compare.png"))
    settings = parser.parse_args()
    if settings.devices < 2:
        parser.error(f"--devices is {settings.devices}; one device is what it is compared with, so give at least 2")
    if not settings.output.absolute().parent.is_dir():
        parser.error(f"--output: there is no folder {settings.output.absolute().parent}; create it first")
    jax.config.update("jax_num_cpu_devices", settings.devices)

    from distrijax import DistriError
    from distrijax.pipeline import to_pil

    prompts = tuple(settings.prompt)
    kind = settings.sync_mode if settings.parallelism == "patch" else f"{settings.parallelism} {settings.split_scheme}"
    try:
        many, one = paint(settings.devices, prompts, settings), paint(1, prompts, settings)
    except DistriError as error:
        sys.exit(f"error: {error}")
    for prompt, pair in zip(prompts, zip(many, one, strict=True), strict=True):
        print(f"{psnr(*pair):6.2f} dB  {prompt}")
    print(f"{psnr(many, one):6.2f} dB  all, {settings.devices} devices against one, {kind}")
    sheet = np.concatenate([np.concatenate([*pictures], 1) for pictures in (one, many)], 0)
    to_pil(sheet[None])[0].save(settings.output)


if __name__ == "__main__":
    main()
