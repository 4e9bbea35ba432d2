"""What a checkpoint is made of, as people say it: its source, how that is read, and what goes on top."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from distrijax.errors import InvalidArgument
from distrijax.validate import check_argument, flag

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
        for name in ("variant", "revision", "prediction_type"):
            if not isinstance(value := getattr(self, name), str | None):
                raise InvalidArgument(f"{name} of a checkpoint is {value!r:.80}; give a text, or None for the default")
        object.__setattr__(self, "ema", flag(self.ema, "ema"))
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

    @classmethod
    def given(cls, source: str | Path | Recipe, **others: Any) -> Recipe:
        """A recipe that is given, or made of its parts.

        Args:
            source: A recipe, or the source of one.
            **others: The other fields; none beside a recipe.

        Raises:
            InvalidArgument: For fields beside a recipe.
        """
        if not isinstance(source, Recipe):
            return cls(source, **others)
        if fixed := [name for name, value in others.items() if value]:
            raise InvalidArgument(f"{', '.join(fixed)} is given beside a recipe; put it into the recipe")
        return source

    @property
    def additions(self) -> dict[str, Any]:
        """What is not as it is by default, but the source."""
        return {
            field.name: value
            for field in dataclasses.fields(self)[1:]
            if (value := getattr(self, field.name)) not in (None, False, ())
        }

    @property
    def facts(self) -> dict[str, str]:
        """What several processes that load the checkpoint must have in common, by name: how its source is read, and what goes on
        top. Of files it has the base names, for their folders may differ between hosts."""
        values = {name: getattr(self, name) for name in ("variant", "revision", "ema", "prediction_type")}
        parts = {name: None if (file := getattr(self, name)) is None else _base(file) for name in ("unet", "vae")}
        loras = [(_base(file), float(weight)) for file, weight in self.loras]
        embeddings = [(_base(file), word) for file, word in self.embeddings]
        return {
            name: repr(value) for name, value in {**values, **parts, "loras": loras, "embeddings": embeddings}.items()
        }


def check_names(given: Mapping[str, Any], function: Callable) -> None:
    """Checks that a function that takes `Additions` beside its own parameters has arguments of these names.

    Args:
        given: Arguments by name.
        function: The function.

    Raises:
        InvalidArgument: For the first one that it lacks; the error tells the nearest one.
    """
    parameters = inspect.signature(function).parameters.values()
    own = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
    for name in given:
        check_argument(name, (*own, *Additions.__annotations__), function.__name__)


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


def _weighted(text: str) -> tuple[str, float]:
    """FILE or FILE:WEIGHT."""
    file, weight = _tail(text)
    try:
        return file, 1.0 if weight is None else float(weight)
    except ValueError:
        raise InvalidArgument(f"--lora is {text}; give FILE or FILE:WEIGHT, such as {file}:0.8") from None


def _base(file: str) -> str:
    """The last part of a path, a hub id or a URL."""
    return os.path.basename(os.path.abspath(file))


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
