"""Latents of many scenes, and their captions' tokens, in files: computed once, read by every training of the UNet.

A file holds CHUNK scenes of one way to see them (FRAMES). The folder's name tells the encoder, so that the latents of another
one are never mixed in. Scenes of size 512 and 1024 are seen through windows of 256 x 256: the second pass of a large picture
meets nothing but such windows, and has to know what an edge looks like there.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from distrijax.models.tokenizer import CLIPTokenizer
from distrijax.models.vae import AutoencoderKL
from distrijax.parallel.exchange import WholeImage
from embedded.ahead import ahead
from embedded.artwork import Artwork
from embedded.autoencoder import to_pixels
from embedded.captions import caption
from embedded.scene import draw, scene_of

CHUNK, GROUP, CAPTIONS = 1024, 16, 3


@dataclass(frozen=True)
class Frame:
    """Scenes are drawn at `drawn` (height, width) and seen through a window of `seen`, the same or smaller."""

    drawn: tuple[int, int]
    seen: tuple[int, int]
    share: float  # of the batches of full training


FRAMES = {
    "128": Frame((128, 128), (128, 128), 0.0),
    "256": Frame((256, 256), (256, 256), 0.6),
    "192x320": Frame((192, 320), (192, 320), 0.08),
    "320x192": Frame((320, 192), (320, 192), 0.08),
    "512": Frame((512, 512), (256, 256), 0.16),
    "1024": Frame((1024, 1024), (256, 256), 0.08),
}


def cache_folder(work: Path, vae: AutoencoderKL) -> Path:
    """Where the latents of this encoder are kept."""
    parts = nnx.to_pure_dict(nnx.split((vae.encoder, vae.quant_conv))[1])
    code = 0
    for leaf in jax.tree.leaves(parts):
        code = zlib.crc32(np.ascontiguousarray(leaf, np.float32).tobytes(), code)
    return work / f"cache-{code:08x}"


def extend_cache(
    folder: Path,
    vae: AutoencoderKL,
    artwork: Artwork,
    tokenizers: Sequence[CLIPTokenizer],
    words: tuple[str, ...],
    *,
    seed: int,
    wanted: dict[str, int],
    workers: int = 0,
) -> None:
    """Makes the files that are missing. wanted: how many files of each of FRAMES there shall be. workers: processes that draw."""
    folder.mkdir(parents=True, exist_ok=True)
    encode = jax.jit(lambda vae, pixels: vae.encode(pixels, WholeImage())[0])
    named = {folder / f"{name}-{i:03d}.npz": (name, i) for name, count in wanted.items() for i in range(count)}
    missing = [file for file in named if not file.exists()]
    # no scene is seen in two ways
    firsts = [(list(FRAMES).index(name) * 4096 + i) * CHUNK for name, i in map(named.get, missing)]
    starts = (start for first in firsts for start in range(first, first + CHUNK, GROUP))
    groups = ahead(partial(_group, artwork=artwork, tokenizers=tokenizers, words=words, seed=seed), starts, workers)
    for file in missing:
        parts = []
        for pictures, *rest in islice(groups, CHUNK // GROUP):
            parts.append((np.asarray(encode(vae, to_pixels(pictures)), np.float16), *rest))
        whole = map(np.concatenate, zip(*parts, strict=True))
        beside = file.with_suffix(".part.npz")
        np.savez(beside, **dict(zip(("latents", "ids", "ids_2", "time_ids"), whole, strict=True)))
        os.replace(beside, file)


def _group(start: int, *, artwork: Artwork, tokenizers, words: tuple[str, ...], seed: int) -> tuple:
    """GROUP pictures, and the arrays of a file but for the latents."""
    frame = list(FRAMES.values())[start // (4096 * CHUNK)]
    views = [_view(frame, artwork, words, seed, index) for index in range(start, start + GROUP)]
    pictures, told, time_ids = zip(*views, strict=True)
    flat = [text for texts in told for text in texts]
    ids = [tokenizer(flat).reshape(GROUP, CAPTIONS, -1).astype(np.int16) for tokenizer in tokenizers]
    return pictures, *ids, np.float32(time_ids)


def _view(frame: Frame, artwork: Artwork, words: tuple[str, ...], seed: int, index: int) -> tuple:
    """A picture, its captions and SDXL's six numbers: size of the scene, where the window lies, and the size again.

    Half of the windows do not tell where they lie, as a second pass over a large picture does not.
    """
    scene, rng = scene_of(seed, index)
    told = [caption(scene, artwork, rng, words) for _ in range(CAPTIONS)]
    pixels = draw(scene, artwork, *frame.drawn, rng)
    (height, width), (rows, columns) = frame.drawn, frame.seen
    top, left = (int(rng.integers(0, most + 1)) // 8 * 8 for most in (height - rows, width - columns))
    where = (top, left) if rng.random() < 0.5 else (0, 0)
    return pixels[top : top + rows, left : left + columns], told, (height, width, *where, height, width)


def read_cache(folder: Path, names: Sequence[str]) -> dict[str, dict[str, np.ndarray]]:
    """For each of the named FRAMES that has files all of its arrays."""
    found = {}
    for name in names:
        files = [dict(np.load(file)) for file in sorted(folder.glob(f"{name}-[0-9][0-9][0-9].npz"))]
        if files:
            found[name] = {key: np.concatenate([file[key] for file in files]) for key in files[0]}
    return found


def batch_of(cache: dict[str, dict[str, np.ndarray]], scale: float, seed: int, step: int, size: int) -> tuple:
    """A batch of one of the frames in the cache, chosen by its share: latents, ids for both encoders, time ids."""
    rng = np.random.default_rng([seed, step, 2])
    shares = np.array([FRAMES[name].share or 1.0 for name in cache])
    arrays = cache[list(cache)[rng.choice(len(cache), p=shares / shares.sum())]]
    rows = rng.integers(0, len(arrays["latents"]), size)
    which = rng.integers(0, CAPTIONS, size)
    latents = arrays["latents"][rows].astype(np.float32) * np.float32(scale)
    ids, ids_2 = (arrays[key][rows, which].astype(np.int32) for key in ("ids", "ids_2"))
    return latents, ids, ids_2, arrays["time_ids"][rows]
