"""Which files of a folder hold a model's weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from distrijax.errors import DistriError
from distrijax.json_config import read_json
from distrijax.weights.names import shown

STEMS = {
    ".safetensors": ("diffusion_pytorch_model", "model"),
    ".bin": ("diffusion_pytorch_model", "pytorch_model"),
    ".msgpack": ("diffusion_flax_model", "flax_model"),
}
"""What files with a model's weights are called, by their format; the first format that a model has is the one to take."""

SAFE = (".safetensors",)
"""The format that needs no conversion."""

LISTED = 8
"""How many offending tensors an error names for each kind of trouble."""


def weight_files(folder: Path, variant: str | None = None, formats: Sequence[str] = SAFE) -> list[Path]:
    """The files with a model's weights: one, or the shards its index names, of the first format that is there.

    variant: where the folder has none of it the plain ones are taken, as in diffusers (see `check_variant`). formats: keys of
    `STEMS`. Raises DistriError where there are none, and for shards that lie elsewhere.
    """
    if not folder.is_dir():
        raise DistriError(f"{folder} is not a folder; give a checkpoint in the diffusers layout")
    for each in (variant, None):
        if (files := _files_of(folder, each, formats)) is not None:
            return files
    raise no_weights(str(folder), _holding_weights(folder), variant, formats)


def check_variant(folder: Path, parts: Iterable[str], variant: str | None, formats: Sequence[str] = SAFE) -> None:
    """Raises DistriError where parts of a folder have weights, and none of them has any of the variant."""
    folders = [folder / part for part in parts if (folder / part).is_dir()]
    found = [name for each in folders for name in _holding_weights(each)]
    if variant and found and all(_files_of(each, variant, formats) is None for each in folders):
        raise no_weights(str(folder), found, variant, formats)


def no_weights(where: str, found: Iterable[str], variant: str | None, formats: Sequence[str]) -> DistriError:
    """The error for a place without the weights that are wanted. found: names of the files with weights that are there."""
    names = sorted(set(found))
    listed = ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
    wanted = " or ".join(end.removeprefix(".") for end in formats) + (f" of variant {variant!r}" if variant else "")
    advice = "choose a variant that is there"
    if names and not any(name.endswith(tuple(formats)) for name in names):
        advice = "convert the model first: python -m distrijax.convert FOLDER DESTINATION"
    return DistriError(f"{where} has no {wanted} (found: {listed or 'no weights'}); {advice}")


def _holding_weights(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.suffix in STEMS]


def _files_of(folder: Path, variant: str | None, formats: Sequence[str]) -> list[Path] | None:
    """The files with weights of just this variant; None where there are none."""
    for end in formats:
        for stem in STEMS[end]:
            for index in _index_names(stem + end, variant):
                if (folder / index).exists():
                    return _shards(folder, index)
            single = folder / (f"{stem}.{variant}{end}" if variant else stem + end)
            if single.exists():
                return [single]
    return None


def _index_names(file: str, variant: str | None) -> list[str]:
    stem, end = file.split(".")
    plain = f"{file}.index"
    return [f"{plain}.{variant}.json", f"{stem}.{end}.{variant}.index.json"] if variant else [f"{plain}.json"]


def _shards(folder: Path, index: str) -> list[Path]:
    """The files beside an index that it names. Raises DistriError for a name that leads elsewhere."""
    shards = read_json(folder / index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise DistriError(f"{folder / index} has no weight_map; fetch the file again")
    end = "." + index.split(".")[1]
    for name in shards.values():
        if not name.endswith(end) or not name.isprintable() or {"/", "\\"} & set(name):
            raise DistriError(
                f"{folder / index} names {shown(name)!r} as a shard, and shards are {end} files beside it; fetch it again"
            )
    return [folder / name for name in sorted(set(shards.values()))]


def summary(problems: dict[str, list[str]]) -> str:
    """Kinds of trouble and the first tensors that have each."""
    parts = []
    for kind, names in problems.items():
        more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
        parts.append(f"{len(names)} {kind} ({', '.join(map(shown, names[:LISTED]))}{more})")
    return "; ".join(parts)
