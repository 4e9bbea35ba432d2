"""Checks whether the default model's images show what their captions say, by the pixels of held-out captions' images.

    python examples/check_scenes.py --captions 64 --at-least 0.8 --contact-sheet scenes.png

A named shape is found when its colour is in the place that the caption names (`scenes.found` has the exact rule). The script
prints the share of named shapes found, which `--at-least` judges, and the stricter share of captions whose every shape is found;
how many blobs of the shapes' colours lie elsewhere; the sharpness, the 99.5th percentile of the differences between neighbouring
pixels (0 to 1); and the seconds of all calls but the first, which compiles.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from distrijax.cli.fidelity.scenes import Scene, copies, found, held_out_example, sharpness
from distrijax.cli.options import Parser
from distrijax.flags import add_large_flag


@dataclass(frozen=True)
class Result:
    """The image of one caption, judged.

    Attributes:
        caption: The prompt.
        scene: What the image should show.
        image: `[h, w, 3]`, 0 to 1.
        found: For each shape of the scene, whether it was found.
        copies: How many blobs of the shapes' colours lie elsewhere.
        sharpness: Of the image (`scenes.sharpness`).
    """

    caption: str
    scene: Scene
    image: np.ndarray
    found: list[bool]
    copies: int
    sharpness: float


def check(
    generate: Callable[[list[str], int], np.ndarray], captions: int, batch: int, height: int, width: int, seed: int
) -> list[Result]:
    """Generates and judges the images of held-out captions.

    Args:
        generate: Called as `generate(prompts, seed)`; returns `[batch, height, width, 3]`, 0 to 1.
        captions: Number of captions.
        batch: Prompts of each call; the last call repeats its own, so that only one program is compiled.
        height: Pixels.
        width: Pixels.
        seed: Chooses the captions, and the starting noise of each call.
    """
    results, seconds = [], []
    for start in range(0, captions, batch):
        indices = range(start, min(start + batch, captions))
        examples = [held_out_example(seed, index, height, width) for index in indices]
        prompts = [caption for _, caption, _ in examples]
        begun = time.perf_counter()
        images = generate((prompts * batch)[:batch], seed + start)
        seconds.append(time.perf_counter() - begun)
        for (_, caption, scene), image in zip(examples, images, strict=False):
            results.append(Result(caption, scene, image, found(image, scene), copies(image, scene), sharpness(image)))
        print(f"{len(results)} of {captions} captions", end="\r", file=sys.stderr, flush=True)
    if seconds[1:]:
        print(f"{sum(seconds[1:]) / len(seconds[1:]) / batch:.2f} s an image")
    return results


def rates(results: Sequence[Result]) -> tuple[float, float]:
    """Share of named shapes found, and share of captions whose every shape was found."""
    shapes = [one for result in results for one in result.found]
    return float(np.mean(shapes)), float(np.mean([all(result.found) for result in results]))


def report(results: Sequence[Result]) -> str:
    """Lists the shapes that were not found, then the two figures."""
    shapes, captions = rates(results)
    lines = []
    for result in results:
        missed = [
            f"{s.colour} {s.kind} {s.place}" for s, ok in zip(result.scene.shapes, result.found, strict=True) if not ok
        ]
        if missed:
            lines.append(f"not found: {'; '.join(missed)}   in: {result.caption}")
    total = sum(len(result.found) for result in results)
    lines.append(f"named shapes found: {shapes:.1%} of {total}")
    lines.append(f"captions with every shape found: {captions:.1%} of {len(results)}")
    lines.append(f"copies beside the shapes: {sum(result.copies for result in results)}")
    lines.append(f"sharpness: {np.mean([result.sharpness for result in results]):.3f}")
    return "\n".join(lines)


def contact_sheet(results: Sequence[Result], columns: int = 8) -> Image.Image:
    """All images with their captions; a caption in red has a shape that was not found."""
    height, width = results[0].image.shape[:2]
    font = ImageFont.load_default(size=11)
    margin, text_height = 8, 72
    cell_width, cell_height = width + margin, height + text_height
    columns = min(columns, len(results))
    rows = -(-len(results) // columns)
    sheet = Image.new("RGB", (columns * cell_width + margin, rows * cell_height + margin), "white")
    pen = ImageDraw.Draw(sheet)
    for position, result in enumerate(results):
        row, column = divmod(position, columns)
        corner = (margin + column * cell_width, margin + row * cell_height)
        sheet.paste(Image.fromarray(np.round(np.clip(result.image, 0, 1) * 255).astype(np.uint8)), corner)
        words = textwrap.fill(result.caption, max(12, width // 6))
        pen.text((corner[0], corner[1] + height + 2), words, "black" if all(result.found) else "red", font)
    return sheet


def pipeline_generator(args: argparse.Namespace) -> Callable[[list[str], int], np.ndarray]:
    """A `generate` function for `check` that runs a pipeline."""
    import jax

    # affects CPUs only, and must come before JAX looks for devices
    jax.config.update("jax_num_cpu_devices", args.devices)
    import distrijax

    model = args.model or distrijax.DEFAULT_MODEL
    pipe = distrijax.load_pipeline(model, distrijax.DistriConfig(devices=args.devices))
    height, width = args.image_size

    def generate(prompts: list[str], seed: int) -> np.ndarray:
        return pipe(
            prompt=prompts,
            height=height,
            width=width,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            seed=seed,
            large=args.large,
            output_type="np",
        ).images

    return generate


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the flags."""
    parser = Parser(__doc__)
    parser.add_argument("--model", help="folder in the diffusers layout (default: the embedded model)")
    parser.add_argument("--captions", type=int, default=64, help="number of held-out captions (default: %(default)s)")
    parser.add_argument("--num-inference-steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=5.0)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument(
        "--image-size", type=int, nargs="+", default=[256], metavar=("H", "W"), help="pixels (default: 256)"
    )
    parser.add_argument(
        "--batch", type=int, default=8, help="captions of one call of the pipeline (default: %(default)s)"
    )
    add_large_flag(parser, default="off")
    parser.add_argument("--seed", type=int, default=0, help="chooses the captions and the starting noise")
    parser.add_argument("--contact-sheet", type=Path, metavar="PNG", help="write all images into one file")
    parser.add_argument("--at-least", type=float, metavar="SHARE", help="exit with 1 if fewer named shapes are found")
    args = parser.parse_args(argv)
    args.image_size = parser.size(args.image_size)
    if any(side % 8 or not 64 <= side <= 1024 for side in args.image_size):
        parser.error(f"--image-size is {args.image_size}; sides must be multiples of 8 from 64 to 1024")
    if min(args.captions, args.batch, args.devices) < 1 or args.seed < 0:
        parser.error("--captions, --batch and --devices must be at least 1, --seed at least 0")
    if args.at_least is not None and not 0 <= args.at_least <= 1:
        parser.error(f"--at-least is {args.at_least}; give a share from 0 to 1")
    if args.contact_sheet and (args.contact_sheet.suffix.lower() != ".png" or args.contact_sheet.is_dir()):
        parser.error(f"--contact-sheet is {args.contact_sheet}; give the name of a file that ends in .png")
    if args.contact_sheet and not args.contact_sheet.absolute().parent.is_dir():
        parser.error(f"--contact-sheet: {args.contact_sheet.absolute().parent} is not a folder; create it first")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    args = arguments(argv)
    from distrijax import DistriError

    try:
        results = check(pipeline_generator(args), args.captions, args.batch, *args.image_size, args.seed)
    except DistriError as error:
        sys.exit(f"error: {error}")
    if args.contact_sheet:
        contact_sheet(results).save(args.contact_sheet)
    print(report(results))
    share, _ = rates(results)
    if args.at_least is not None and share < args.at_least:
        print(
            f"{share:.1%} of the named shapes were found, and --at-least asks for {args.at_least:.1%}", file=sys.stderr
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
