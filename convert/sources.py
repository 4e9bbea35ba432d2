"""From whatever people have to a Checkpoint: where it is, which reader and layout, and what is put on top."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

from huggingface_hub.errors import LocalEntryNotFoundError

from distrijax.convert.adapters.inversion import A1111, Embedding, with_embeddings
from distrijax.convert.adapters.lora import Lora, with_loras
from distrijax.convert.adapters.lora_names import is_pefts
from distrijax.convert.adapters.lora_settings import KEY, PEFT_SETTINGS
from distrijax.convert.adapters.replace import with_unet, with_vae
from distrijax.convert.engine import SAME, Mapped
from distrijax.convert.files import metadata_of, open_tensors
from distrijax.convert.layouts.folder import from_folder, read_files, read_model
from distrijax.convert.layouts.original import convert_original
from distrijax.convert.layouts.original_parts import unet_from, vae_from
from distrijax.convert.readers.orbax_files import is_orbax, read_orbax
from distrijax.errors import CheckpointError, InvalidArgument
from distrijax.json_config import read_json
from distrijax.models.families import PARTS
from distrijax.weights import hub
from distrijax.weights.checkpoint import Checkpoint
from distrijax.weights.tensors import Tensors

Config = dict[str, Any]

LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_model.bin")
EMBEDDING_FILE = "learned_embeds.safetensors"
"""What diffusers calls them, and PEFT: taken where only a repository is named, or for a LoRA a folder."""

_TAIL = re.compile(r"(.+):([^/\\:]+)")
"""A file and what stands after its last colon; a colon before a slash belongs to hf:// or a drive."""


class Additions(TypedDict, total=False):
    """What a checkpoint is read with, and what goes on top of it.

    Attributes:
        config: For a single file: a folder in the diffusers layout, or a hub id, whose configurations and tokenizers take the
            place of the family's. Its weights need not be there.
        ema: For a single file: whether to take its averaged weights.
        prediction_type: For a single file: what the UNet predicts ("epsilon", "v_prediction", "sample"), where tensors can't
            tell (Stable Diffusion 2).
        unet: A UNet that takes the place of the checkpoint's: a file, a folder or a hub id.
        vae: A VAE that takes the place of the checkpoint's.
        loras: Adapters: files or folders, each alone or with its weight, ["a.safetensors", ("b.safetensors", 0.8)].
        embeddings: Files of textual inversion, each alone or with the word that stands for it in prompts.
    """

    config: str | Path | None
    ema: bool
    prediction_type: str | None
    unet: str | Path | None
    vae: str | Path | None
    loras: Sequence[Any] | Mapping[str, float]
    embeddings: Sequence[Any] | Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A checkpoint that people name, and what goes on top of it: `Additions`, in these types.

    Attributes:
        source: A single file, a folder (diffusers layout or orbax), a hub id, an `hf://` path.
        variant: Of the weight files in a folder.
        revision: Of a repository on the hub.
        loras: Files and their weights.
        embeddings: Files and their words; None for the word that a file names.

    Raises:
        InvalidArgument: For arguments of other types.
    """

    source: str
    variant: str | None = None
    revision: str | None = None
    ema: bool = False
    config: str | None = None
    prediction_type: str | None = None
    unet: str | None = None
    vae: str | None = None
    loras: tuple[tuple[str, float], ...] = ()
    embeddings: tuple[tuple[str, str | None], ...] = ()

    def __post_init__(self):
        for name in ("source", "config", "unet", "vae"):
            if not isinstance(value := getattr(self, name), str | Path | None) or (name == "source" and not value):
                raise InvalidArgument(f"{name} of a checkpoint is {value!r:.80}; give a path or a hub id")
            object.__setattr__(self, name, None if value is None else str(value))
        object.__setattr__(self, "loras", _pairs("loras", self.loras, 1.0))
        object.__setattr__(self, "embeddings", _pairs("embeddings", self.embeddings, None))

    @classmethod
    def of(cls, source: str, arguments: argparse.Namespace) -> Recipe:
        """Out of the flags of `add_flags`. Raises InvalidArgument for a LoRA's weight that is no number."""
        names = ("variant", "revision", "ema", "config", "prediction_type", "unet", "vae")
        return cls(
            source,
            **{name: getattr(arguments, name) for name in names},
            loras=tuple(map(_weighted, arguments.lora)),
            embeddings=tuple(_tail(text) for text in arguments.embedding),
        )

    @property
    def additions(self) -> dict[str, Any]:
        """What is not as it is by default, but the source."""
        return {
            field.name: value
            for field in dataclasses.fields(self)[1:]
            if (value := getattr(self, field.name)) not in (None, False, ())
        }


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What to make a model of, besides its source."""
    add = parser.add_argument
    add("--variant", help="of the weight files in a folder, for example fp16")
    add("--revision", help="of a repository on the hub: a branch, a tag or a commit")
    add("--token", help="for the hub (default: the one that you logged in with)")
    add("--offline", action="store_true", help="take from the hub's cache only")
    add("--ema", action="store_true", help="take the averaged weights of a single file")
    add("--config", metavar="FOLDER", help="whose configurations a single file has (default: those of its family)")
    kinds = ("epsilon", "v_prediction", "sample")
    add("--prediction-type", choices=kinds, help="what the UNet of a single file predicts (default: as its family)")
    add("--unet", metavar="FILE", help="a UNet to take instead: distilled (Lightning, Turbo, LCM) or fine-tuned")
    add("--vae", metavar="FILE", help="a VAE to take instead")
    lora = "to merge into the weights; may be given several times"
    add("--lora", action="append", default=[], metavar="FILE[:WEIGHT]", help=lora)
    word = "a textual inversion, and the word for it; may be given several times"
    names = ("--embedding", "--textual-inversion")
    add(*names, action="append", default=[], metavar="FILE[:WORD]", help=word)


def open_checkpoint(
    source: str | Path | Recipe, *, token: str | bool | None = None, offline: bool = False, weights: bool = True
) -> Checkpoint:
    """A checkpoint with all that goes on top of it; nothing of its weights is read but names and shapes.

    Args:
        source: Its name, or a recipe.
        token: Of the hub.
        offline: Whether to use only what was fetched from the hub before.
        weights: Whether its weights are needed, or configurations alone.

    Raises:
        CheckpointError: For what is not found, is no model, or does not fit together.
    """
    recipe = source if isinstance(source, Recipe) else Recipe(source)
    if not weights and not recipe.additions.keys() - {"variant", "revision"}:
        options = {"revision": recipe.revision, "token": token, "offline": offline}
        folder = hub.find(recipe.source, parts=PARTS, weights=False, **options)
        if (folder / "model_index.json").is_file():
            return from_folder(folder, weights=False)
    return assemble(recipe, Found.of(recipe, token=token, offline=offline))[0]


@dataclasses.dataclass(frozen=True)
class Found:
    """A recipe's files, on this machine.

    Attributes:
        lora_settings: PEFT's, of each LoRA that has a file of them beside it.
    """

    source: Path
    config: Path | None
    unet: Path | None
    vae: Path | None
    loras: tuple[Path, ...]
    embeddings: tuple[Path, ...]
    lora_settings: tuple[Path | None, ...]

    @classmethod
    def of(cls, recipe: Recipe, *, token: str | bool | None = None, offline: bool = False) -> Found:
        """Looks for them here and on the hub. Raises CheckpointError for one that is not to be had."""
        find = partial(hub.find, token=token, offline=offline)
        loras = tuple(_find_lora(file, find) for file, _ in recipe.loras)
        beside = [path.with_name(PEFT_SETTINGS) for path in loras]
        model = partial(find, parts=("",), index="config.json")
        return cls(
            source=find(recipe.source, parts=PARTS, variant=recipe.variant, revision=recipe.revision),
            config=None if recipe.config is None else find(recipe.config, parts=PARTS, weights=False),
            unet=None if recipe.unet is None else model(recipe.unet),
            vae=None if recipe.vae is None else model(recipe.vae),
            loras=loras,
            embeddings=tuple(find(file, parts=(), file=EMBEDDING_FILE) for file, _ in recipe.embeddings),
            lora_settings=tuple(path if path.is_file() else None for path in beside),
        )


def assemble(recipe: Recipe, found: Found) -> tuple[Checkpoint, list[Mapped]]:
    """The model, with nothing read but names and shapes, and where the source's tensors went.

    Raises CheckpointError for what is no model, or does not fit together.
    """
    checkpoint, mapping = _source(recipe, found)
    if found.unet is not None:
        config, tensors = _model(found.unet, recipe.unet, unet_from)
        checkpoint = with_unet(checkpoint, tensors, recipe.unet, config)
    if found.vae is not None:
        config, tensors = _model(found.vae, recipe.vae, vae_from)
        checkpoint = with_vae(checkpoint, tensors, recipe.vae, config)
    loras = [
        _lora(path, settings, file, weight)
        for path, settings, (file, weight) in zip(found.loras, found.lora_settings, recipe.loras, strict=True)
    ]
    embeddings = [
        _embedding(open_tensors(path), path, file, word)
        for path, (file, word) in zip(found.embeddings, recipe.embeddings, strict=True)
    ]
    checkpoint = with_embeddings(with_loras(checkpoint, loras), embeddings)
    return dataclasses.replace(checkpoint, what=recipe.source), mapping


def _source(recipe: Recipe, found: Found) -> tuple[Checkpoint, list[Mapped]]:
    """The source alone. In a folder all tensors stay what they are."""
    if not found.source.is_dir():
        configs, files = read_files(found.config) if found.config else ({}, None)
        return convert_original(
            open_tensors(found.source),
            recipe.source,
            ema=recipe.ema,
            config=configs,
            prediction_type=recipe.prediction_type,
            files=files,
        )
    if recipe.ema or recipe.config or recipe.prediction_type:
        raise InvalidArgument(
            f"{recipe.source} is a folder, which has its own configurations; leave out --ema, --config and --prediction-type"
        )
    folder = found.source
    checkpoint = read_orbax(folder) if is_orbax(folder) else from_folder(folder, variant=recipe.variant)
    names = [f"{part}.{name}" for part, tensors in checkpoint.tensors.items() for name in tensors]
    return checkpoint, [Mapped(name, (name,), SAME) for name in names]


def _model(
    path: Path, what: str, taken_from: Callable[[Tensors, str], tuple[Config, Tensors]]
) -> tuple[Config, Tensors]:
    """The config and the tensors of one model: out of a file, or of a folder with its own config.json."""
    if path.is_dir():
        return read_json(path / "config.json"), read_model(path)
    return taken_from(open_tensors(path), what)


def _find_lora(file: str, find: Callable[..., Path]) -> Path:
    """The file of a LoRA, or of a folder or repository of one; PEFT's settings are fetched with it."""
    remote = None if Path(file).expanduser().exists() else hub.parse_remote(file)
    if remote is None:
        path = find(file, parts=())
        held = [path / name for name in LORA_FILES if (path / name).is_file()]
        if path.is_dir() and not held:
            raise CheckpointError(f"{file} is a folder without {' or '.join(LORA_FILES)}; name the file of the LoRA")
        return held[0] if held else path
    try:
        path = find(file, parts=(), file=LORA_FILES[0])
    except CheckpointError as error:
        if remote.file:
            raise
        unreachable = isinstance(error.__context__, LocalEntryNotFoundError)  # no need to wait for the hub again
        path = find(file, parts=(), file=LORA_FILES[1], **({"offline": True} if unreachable else {}))
    if path.name in LORA_FILES[1:] and not path.with_name(PEFT_SETTINGS).exists():
        with suppress(CheckpointError):  # a repository may have none
            find(f"{file.rpartition('/')[0]}/{PEFT_SETTINGS}" if remote.file else file, parts=(), file=PEFT_SETTINGS)
    return path


def _lora(path: Path, settings: Path | None, file: str, weight: float) -> Lora:
    """With PEFT's settings, where its names are PEFT's and it has none of its own."""
    tensors, metadata = open_tensors(path), metadata_of(path)
    if settings is not None and KEY not in metadata and is_pefts(tensors):
        metadata = read_json(settings)
    return Lora(tensors, file, weight, metadata)


def _embedding(tensors: Tensors, path: Path, file: str, word: str | None) -> Embedding:
    """Where nobody says the word, it is the tensor's name in diffusers' format, and the file's in the others."""
    named = len(tensors) == 1 and next(iter(tensors)) not in A1111
    return Embedding(tensors, file, word or (None if named else path.stem))


def _weighted(text: str) -> tuple[str, float]:
    """FILE or FILE:WEIGHT."""
    file, weight = _tail(text)
    try:
        return file, 1.0 if weight is None else float(weight)
    except ValueError:
        raise InvalidArgument(f"--lora is {text}; give FILE or FILE:WEIGHT, such as {file}:0.8") from None


def _pairs(name: str, given: Any, default: Any) -> tuple[tuple[str, Any], ...]:
    """Files and what is given with each, out of a sequence of files or pairs, or a dictionary."""
    listed = given.items() if isinstance(given, Mapping) else [given] if isinstance(given, str | Path) else given
    try:
        pairs = [(each, default) if isinstance(each, str | Path) else tuple(each) for each in listed or ()]
        if not all(isinstance(file, str | Path) for file, _ in pairs):
            raise ValueError
    except (TypeError, ValueError):
        raise InvalidArgument(f"{name} is {given!r:.80}; give files, each alone or in a pair with its value") from None
    return tuple((str(file), value) for file, value in pairs)


def _tail(text: str) -> tuple[str, str | None]:
    """A file, and what stands after its last colon, if anything."""
    found = _TAIL.fullmatch(text)
    return (found.group(1), found.group(2)) if found else (text, None)
