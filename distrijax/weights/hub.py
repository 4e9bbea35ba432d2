"""Where a model is: here, or on the Hugging Face hub, from which only the files needed are fetched, into the hub's cache."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeVar

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from distrijax.errors import DistriError
from distrijax.weights.files import SAFE, STEMS, no_weights

Result = TypeVar("Result")

_URL = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([^/]+/[^/]+)(?:/(?:blob|resolve|tree)/([^/]+))?(?:/(.+))?"
)
_HF = re.compile(r"hf://(?:models/)?([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.+))?")
_ID = re.compile(r"([\w.\-]+/[\w.\-]+)()(?:/(.+))?")


FILES = (".safetensors", ".ckpt", ".bin")
"""How files end and no repository does: `folder/model.safetensors` is mistyped, not a hub id."""

TOKEN = "give a token that may read it (`hf auth login`, or HF_TOKEN)"
"""What to do where the hub shows a model to some people only."""


class Remote(NamedTuple):
    """A model on the hub, or one file of it. repository: owner/name. file: its path there."""

    repository: str
    revision: str | None
    file: str | None


def parse(name: str) -> Remote | None:
    """A hub id (`owner/model`, with or without a file's path), an `hf://` path or an address of the hub; None for others."""
    if name.startswith((".", "~", "/")):
        return None
    for pattern in (_URL, _HF, _ID):
        if found := pattern.fullmatch(name.rstrip("/")):
            repository, revision, file = found.groups()
            return Remote(repository, revision or None, file or None)
    return None


def find(
    name: str | Path,
    *,
    parts: Iterable[str],
    index: str = "model_index.json",
    file: str | None = None,
    formats: Sequence[str] = SAFE,
    variant: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    offline: bool = False,
) -> Path:
    """The local path of a model's folder, or of a single file.

    name: a path, a hub id, `hf://owner/model[@revision][/file]`, or an address of the hub. parts: the folders of a pipeline
    that are needed ("" for a model that lies in no folder of its own). index: the file that such a repository must have.
    file: its path, where a repository is named and one file of it is meant. formats: keys of `STEMS`, the better ones first.
    variant: of the weights, such as fp16, in those parts that have it. offline: take what was fetched before. Raises
    DistriError where it is not to be had.
    """
    if (path := Path(name).expanduser()).exists():
        return path
    remote = parse(str(name))
    if remote is None or (remote.file is None and path.suffix in FILES):
        raise DistriError(f"{name} is neither a file nor a folder; give one, or a hub id like owner/model")
    if path.parent != Path() and path.parent.is_dir():
        raise DistriError(
            f"{path.parent} is a folder here and has no {path.name}; "
            f"give a path that is there, or hf://{name} to fetch it from the hub"
        )
    remote = remote._replace(revision=revision or remote.revision, file=remote.file or file)
    offline = offline or constants.HF_HUB_OFFLINE
    options = {"revision": remote.revision, "token": token}
    if remote.file is not None:
        fetch = partial(hf_hub_download, remote.repository, remote.file, local_files_only=offline, **options)
        return Path(_asked(name, fetch))
    files = None if offline else _asked(name, partial(_listing, remote.repository, **options))
    if files is None:
        options["local_files_only"], needed = True, [index]
    else:
        needed = needed_files(files, tuple(parts), formats, variant, index=index, name=str(name))
    return Path(_asked(name, partial(snapshot_download, remote.repository, allow_patterns=needed, **options)))


def _listing(repository: str, **options) -> list[str] | None:
    """The names of a repository's files; None where the hub can't be reached."""
    try:
        return HfApi().list_repo_files(repository, **options)
    except (HfHubHTTPError, HFValidationError):
        raise
    except Exception:  # of whichever HTTP client the library has
        return None


def needed_files(
    files: Sequence[str], parts: Sequence[str], formats: Sequence[str], variant: str | None, *, index: str, name: str
) -> list[str]:
    """Which of a repository's files make the model; of a part without weights of the variant the plain ones, as in diffusers.

    formats: none where configurations are all that is needed. Raises DistriError where a part holds no weights that could be
    read, and where no part holds any of the variant.
    """
    if index not in files:
        single = [file for file in files if file.endswith((".safetensors", ".ckpt")) and "/" not in file]
        raise DistriError(
            f"{name} has no {index}, as a model in the diffusers layout has; "
            + (f"name one of its files, such as {name}/{single[0]}" if single else "choose another repository")
        )
    needed, found, honoured = [index], [], False
    for part in parts:
        inside = [file for file in files if PurePosixPath(file).parent == PurePosixPath(part)]
        needed += [file for file in inside if file.endswith((".json", ".txt"))]
        if formats:
            needed += _needed_weights(inside, part, formats, variant, name)
        found += _with_weights(inside)
        honoured = honoured or any(_holds_weights(file, kind, variant) for file in inside for kind in formats)
    if variant and found and formats and not honoured:
        raise no_weights(name, found, variant, formats)
    return needed


def _needed_weights(
    inside: Sequence[str], part: str, formats: Sequence[str], variant: str | None, name: str
) -> list[str]:
    """Of the files of a part those with the weights to take, if it is a model. inside: their paths. name: of the whole."""
    held = {
        (each, kind): [file for file in inside if _holds_weights(file, kind, each)]
        for each in (variant, None)
        for kind in STEMS
    }
    there = [kind for kind in STEMS if held[variant, kind] or held[None, kind]]
    chosen = next((held[each, kind] for each in (variant, None) for kind in formats if held[each, kind]), [])
    if there and not chosen:
        raise DistriError(
            f"{name} has the weights of {part} as {', '.join(there)} only; convert it first: "
            f"python -m distrijax.convert {name} FOLDER{f' --variant {variant}' if variant else ''}"
        )
    if not chosen and "config.json" in (PurePosixPath(file).name for file in inside):
        raise no_weights(f"{name}/{part}".rstrip("/"), _with_weights(inside), variant, formats)
    return chosen


def _with_weights(files: Iterable[str]) -> list[str]:
    return [PurePosixPath(file).name for file in files if file.endswith(tuple(STEMS))]


def _holds_weights(file: str, kind: str, variant: str | None) -> bool:
    stems = "|".join(STEMS[kind])
    middle = rf"(?:\.{re.escape(variant)})" if variant else ""
    shard = r"(?:-\d+-of-\d+)"
    return bool(
        re.fullmatch(rf"(?:{stems})(?:{middle}{shard}?|{shard}{middle}){re.escape(kind)}", PurePosixPath(file).name)
    )


def _asked(name: str | Path, ask: Callable[[], Result]) -> Result:
    """What the hub answers; raises DistriError where it refuses or is not there."""
    try:
        return ask()
    except GatedRepoError:
        raise DistriError(f"{name} is gated; accept its terms on the hub and {TOKEN}") from None
    except RevisionNotFoundError:
        raise DistriError(f"{name} has no such revision on the hub; give a branch, a tag or a commit of it") from None
    except RepositoryNotFoundError:  # which the hub says of private ones, too
        raise DistriError(
            f"{name} is neither here nor a public model on the hub; check the spelling, or for a private one {TOKEN}"
        ) from None
    except HFValidationError:
        raise DistriError(f"{name} is neither here nor a name on the hub; check the spelling") from None
    except LocalEntryNotFoundError:  # whose advice is for programs
        raise DistriError(
            f"{name} is no file or folder here, was not fetched before, and the hub can't be asked; check the path, or go online"
        ) from None
    except EntryNotFoundError:
        raise DistriError(
            f"{name} is no file here, and not among the files of that repository; check the spelling"
        ) from None
    except Exception as error:  # of whichever HTTP client the library has
        raise DistriError(
            f"{name} is no file or folder here and could not be fetched from the hub ({first_line(error)}); "
            "check the path, or try again"
        ) from None


def first_line(error: Exception) -> str:
    """What an error says at first."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
