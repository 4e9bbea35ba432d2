"""From whatever people have to a Checkpoint: where it is, which reader and layout, and what is put on top."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Unpack

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
from distrijax.errors import CheckpointError, InvalidArgument
from distrijax.json_config import read_json
from distrijax.models.families import PARTS
from distrijax.weights import hub
from distrijax.weights.checkpoint import Checkpoint
from distrijax.weights.recipe import Additions, Recipe, check_names
from distrijax.weights.tensors import Tensors

LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_model.bin")
EMBEDDING_FILE = "learned_embeds.safetensors"
"""What diffusers calls them, and PEFT: taken where only a repository is named, or for a LoRA a folder."""


def open_checkpoint(
    source: str | Path | Recipe,
    *,
    variant: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    offline: bool = False,
    weights: bool = True,
    **additions: Unpack[Additions],
) -> Checkpoint:
    """A checkpoint with all that goes on top of it; nothing of its weights is read but names and shapes.

    Args:
        source: Its name, or a recipe, which has all that goes on top.
        variant: Of the weight files in a folder, such as "fp16".
        revision: The hub's branch, tag or commit.
        token: Of the hub.
        offline: Whether to use only what was fetched from the hub before.
        weights: Whether its weights are needed, or configurations alone.
        **additions: How a single file is read, and what goes on top of the checkpoint.

    Raises:
        CheckpointError: For what is not found, is no model, or does not fit together.
        InvalidArgument: For arguments that there are not or that cannot be used.
    """
    check_names(additions, open_checkpoint)
    recipe = Recipe.given(source, variant=variant, revision=revision, **additions)
    if not weights and not recipe.additions.keys() - {"variant", "revision"}:
        options = {"revision": recipe.revision, "token": token, "offline": offline}
        folder = hub.find(recipe.source, parts=PARTS, weights=False, **options)
        if (folder / "model_index.json").is_file():
            return from_folder(folder, weights=False)
    return assemble(recipe, token=token, offline=offline)[0]


def find_source(recipe: Recipe, *, token: str | bool | None = None, offline: bool = False) -> Path:
    """Where a recipe's source is on this machine. Raises CheckpointError for one that is not to be had."""
    options = {"variant": recipe.variant, "revision": recipe.revision, "token": token, "offline": offline}
    return hub.find(recipe.source, parts=PARTS, **options)


def assemble(
    recipe: Recipe, *, token: str | bool | None = None, offline: bool = False
) -> tuple[Checkpoint, list[Mapped]]:
    """The model, with nothing read but names and shapes, and where the source's tensors went.

    Raises CheckpointError for what is not found, is no model, or does not fit together.
    """
    found = _find_all(recipe, token=token, offline=offline)
    loras = [_lora(found[f"lora {file}"], file, weight) for file, weight in recipe.loras]
    checkpoint, mapping = _source(found["model"], recipe, found.get("config"))
    for part, taken_from, replaced in (("unet", unet_from, with_unet), ("vae", vae_from, with_vae)):
        if part in found:
            what = getattr(recipe, part)
            config, tensors = _model(found[part], what, taken_from)
            checkpoint = replaced(checkpoint, tensors, what, config)
    embeddings = [_embedding(found[f"embedding {file}"], file, word) for file, word in recipe.embeddings]
    checkpoint = with_embeddings(with_loras(checkpoint, loras), embeddings)
    return dataclasses.replace(checkpoint, what=recipe.source, recipe=recipe, found=found), mapping


def _find_all(recipe: Recipe, *, token: str | bool | None, offline: bool) -> dict[str, Path]:
    """`Checkpoint.found` of a recipe."""
    find = partial(hub.find, token=token, offline=offline)
    found = {"model": find_source(recipe, token=token, offline=offline)}
    if found["model"].is_dir():
        alone = ("ema", "config", "prediction_type")
        if given := [name for name in alone if getattr(recipe, name)]:
            raise InvalidArgument(
                f"{recipe.source} is a folder, which has its own configurations; leave out {' and '.join(given)}"
            )
    elif recipe.config:
        found["config"] = find(recipe.config, parts=PARTS, weights=False)
    for part in ("unet", "vae"):
        if (what := getattr(recipe, part)) is not None:
            found[part] = find(what, parts=("",), index="config.json")
    found |= {f"lora {file}": _find_lora(file, find) for file, _ in recipe.loras}
    return found | {f"embedding {file}": find(file, parts=(), file=EMBEDDING_FILE) for file, _ in recipe.embeddings}


def _source(source: Path, recipe: Recipe, config: Path | None) -> tuple[Checkpoint, list[Mapped]]:
    """The source alone. In a folder all tensors stay what they are."""
    if not source.is_dir():
        given = read_files(config) if config else ({}, None)
        options = {"ema": recipe.ema, "prediction_type": recipe.prediction_type}
        return convert_original(open_tensors(source), recipe.source, config=given[0], files=given[1], **options)
    checkpoint = from_folder(source, variant=recipe.variant)
    names = [f"{part}.{name}" for part, tensors in checkpoint.tensors.items() for name in tensors]
    return checkpoint, [Mapped(name, (name,), SAME) for name in names]


def _model(
    path: Path, what: str, taken_from: Callable[[Tensors, str], tuple[dict[str, Any], Tensors]]
) -> tuple[dict[str, Any], Tensors]:
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


def _lora(path: Path, file: str, weight: float) -> Lora:
    """With PEFT's settings beside it, where its names are PEFT's and it has none of its own."""
    tensors, metadata, settings = open_tensors(path), metadata_of(path), path.with_name(PEFT_SETTINGS)
    if settings.is_file() and KEY not in metadata and is_pefts(tensors):
        metadata = read_json(settings)
    return Lora(tensors, file, weight, metadata)


def _embedding(path: Path, file: str, word: str | None) -> Embedding:
    """Where nobody says the word, it is the tensor's name in diffusers' format, and the file's in the others."""
    tensors = open_tensors(path)
    named = len(tensors) == 1 and next(iter(tensors)) not in A1111
    return Embedding(tensors, file, word or (None if named else path.stem))
