"""Which files of a folder contain a model's weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from distrijax.errors import CheckpointError
from distrijax.json_config import read_json
from distrijax.weights.names import shown

STEMS = {
    ".safetensors": ("diffusion_pytorch_model", "model"),
    ".bin": ("diffusion_pytorch_model", "pytorch_model"),
    ".msgpack": ("diffusion_flax_model", "flax_model"),
}
"""Names, without suffix, of files with a model's weights, by format (the suffix); earlier formats are preferred."""

MAX_LISTED = 8
"""Most names that an error lists for each problem."""


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The files with a model's weights: one file, or the shards that its index names.

    Args:
        folder: The model's.
        variant: Of the weights, such as "fp16"; where the folder has none of it the plain ones are taken, as in diffusers
            (see `check_variant`).

    Raises:
        CheckpointError: If there are no such files, or the index names files in other folders.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give a checkpoint in the diffusers layout")
    for each in (variant, None):
        if (files := _files_of(folder, each)) is not None:
            return files
    raise no_weights(str(folder), _weight_names(folder), variant)


def check_variant(folder: Path, parts: Iterable[str], variant: str | None) -> None:
    """Checks that a folder has weights of a variant.

    Args:
        folder: The pipeline's folder.
        parts: Its subfolders that are needed.
        variant: Of the weights, such as "fp16"; None is none.

    Raises:
        CheckpointError: If the parts have weights, but none of the variant.
    """
    folders = [folder / part for part in parts if (folder / part).is_dir()]
    found = [name for each in folders for name in _weight_names(each)]
    if variant and found and all(_files_of(each, variant) is None for each in folders):
        raise no_weights(str(folder), found, variant)


def no_weights(where: str, found: Iterable[str], variant: str | None) -> CheckpointError:
    """The error for a model without the weights that are wanted.

    Args:
        where: The model's folder or hub id.
        found: Names of the files with weights that it has.
        variant: The variant that is wanted.
    """
    names = sorted(set(found))
    listed = ", ".join(names[:MAX_LISTED]) + (f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else "")
    wanted = " or ".join(end.removeprefix(".") for end in STEMS) + (f" of variant {variant!r}" if variant else "")
    advice = "give a variant that it has" if names else "fetch its weights"
    return CheckpointError(f"{where} has no {wanted} (found: {listed or 'no weights'}); {advice}")


def _weight_names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.suffix in STEMS]


def _files_of(folder: Path, variant: str | None) -> list[Path] | None:
    """The files with weights of exactly this variant; None if there are none."""
    for end, stems in STEMS.items():
        for stem in stems:
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
    """The files that an index names; raises DistriError for names outside its folder."""
    shards = read_json(folder / index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise CheckpointError(f"{folder / index} has no valid weight_map; fetch the file again")
    end = "." + index.split(".")[1]
    for name in shards.values():
        if not name.endswith(end) or not name.isprintable() or {"/", "\\"} & set(name):
            raise CheckpointError(
                f"{folder / index} names {shown(name)!r} as a shard; shards must be {end} files in the same folder; fetch it again"
            )
    return [folder / name for name in sorted(set(shards.values()))]


def summary(problems: dict[str, list[str]]) -> str:
    """A text with the number of tensors that have each problem, and the first of their names."""
    parts = []
    for kind, names in problems.items():
        more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
        parts.append(f"{len(names)} {kind} ({', '.join(map(shown, names[:MAX_LISTED]))}{more})")
    return "; ".join(parts)
