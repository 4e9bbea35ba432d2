"""What the embedded model can do, to be looked at: round trips through the autoencoder, and prompts painted."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw

from distrijax.models.tokenizer import CLIPTokenizer
from distrijax.models.vae import AutoencoderKL
from distrijax.parallel.exchange import WholeImage
from embedded.artwork import Artwork
from embedded.autoencoder import to_pixels
from embedded.painting import Painter, sample
from embedded.perceptual import Weights, lpips
from embedded.scene import draw, scene_of

PROMPTS = (
    "a cute fox in the snow",
    "two apples on a blue table",
    "a large green star in the top left corner",
    "a red circle on a blue background",
    "panda",
    "a sailboat at sea",
    "a rocket in space",
    "a purple heart on a yellow background",
    "a cat and a dog in a meadow",
    "hamburger",
    "a small blue car at the bottom, in the desert",
    "an owl at night",
    "a yellow triangle to the left of a red square",
    "three balloons in the sky",
    "a penguin on a striped pink background",
    "a black cross in the bottom right corner, on a white background",
)
"""Looked at during training; most of them are seen in some wording."""


def round_trips(
    vae: AutoencoderKL, artwork: Artwork, weights: Weights, file: Path, count: int = 16
) -> dict[str, float]:
    """Held-out scenes of 256 x 256 above what comes back; their mean PSNR and LPIPS."""
    scenes = (scene_of(7, index, held_out=True) for index in range(count))
    pictures = [draw(scene, artwork, 256, 256, rng) for scene, rng in scenes]
    pixels = to_pixels(pictures)
    trip = jax.jit(lambda vae, x: jnp.clip(vae.decode(vae.encode(x, WholeImage())[0], WholeImage()), -1, 1))
    back = np.concatenate([np.asarray(trip(vae, pixels[i : i + 4])) for i in range(0, count, 4)])
    distance = np.mean([float(lpips(weights, a[None], b[None])[0]) for a, b in zip(pixels, back, strict=True)])
    error = np.mean(np.square(pixels - back), (1, 2, 3)) / 4
    half = count // 2
    rows = [np.concatenate(list(part), 1) for part in (pixels[:half], back[:half], pixels[half:], back[half:])]
    Image.fromarray(to_bytes(np.concatenate(rows))).save(file)
    return {"psnr": float(np.mean(-10 * np.log10(error))), "lpips": float(distance)}


def paint_sheet(
    painter: Painter,
    vae: AutoencoderKL,
    tokenizers: Sequence[CLIPTokenizer],
    scale: float,
    size: int,
    file: Path,
    prompts: Sequence[str] = PROMPTS,
    guidance: float = 4.0,
) -> None:
    """A sheet of square pictures with their prompts below."""
    ids = [jnp.asarray(tokenizer(prompts)) for tokenizer in tokenizers]
    time_ids = jnp.broadcast_to(jnp.float32((size, size, 0, 0, size, size)), (len(prompts), 6))
    paint = jax.jit(sample, static_argnames=("height", "width"))
    latents = paint(painter, jax.random.key(3), *ids, time_ids, height=size, width=size, guidance=guidance)
    pictures = to_bytes(np.asarray(jax.jit(lambda vae, z: vae.decode(z, WholeImage()))(vae, latents / scale)))
    columns, text = 8, 36
    sheet = Image.new("RGB", (columns * size, -(-len(prompts) // columns) * (size + text)), "white")
    brush = ImageDraw.Draw(sheet)
    for i, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
        x, y = i % columns * size, i // columns * (size + text)
        sheet.paste(Image.fromarray(picture), (x, y))
        for line, part in enumerate(textwrap.wrap(prompt, size // 6)[:3]):
            brush.text((x + 2, y + size + 11 * line), part, fill="black")
    sheet.save(file)


def to_bytes(pixels: np.ndarray) -> np.ndarray:
    """Pixels in -1 to 1 as uint8."""
    return np.uint8(np.clip(pixels * 127.5 + 128, 0, 255))
