"""Finds a model, local or on the Hugging Face hub; of the latter only the needed files are fetched, into the hub's cache."""

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

from distrijax.errors import CheckpointError
from distrijax.weights.files import STEMS, no_weights

Result = TypeVar("Result")

_URL = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([^/]+/[^/]+)(?:/(?:blob|resolve|tree)/([^/]+))?(?:/(.+))?"
)
_HF = re.compile(r"hf://(?:models/)?([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.+))?")
_ID = re.compile(r"([\w.\-]+/[\w.\-]+)()(?:/(.+))?")

FILE_SUFFIXES = (".safetensors", ".ckpt", ".bin")
"""Suffixes that files have and repositories do not: `folder/model.safetensors` is a mistyped path, not a hub id."""

TOKEN_ADVICE = "give a token that may read it (`hf auth login`, or HF_TOKEN)"
"""What to do about models that are not public."""


class Remote(NamedTuple):
    """A model on the hub, or one file of it.

    Attributes:
        repository: owner/name.
        revision: A branch, tag or commit; None is the main branch.
        file: The file's path in the repository; None is the whole model.
    """

    repository: str
    revision: str | None
    file: str | None


def parse_remote(name: str) -> Remote | None:
    """Parses a hub id (`owner/model`, with or without a file's path), `hf://` path or URL of the hub; None for other names.

    Args:
        name: A hub id, `hf://` path or URL, or any other name.
    """
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
    weights: bool = True,
    variant: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    offline: bool = False,
) -> Path:
    """The local path of a model's folder, or of a single file; what is on the hub is fetched.

    Args:
        name: A path, a hub id, `hf://owner/model[@revision][/file]`, or a URL of the hub.
        parts: Subfolders of a pipeline that are needed; "" for a model that is not in a subfolder.
        index: A file that the repository must have.
        file: The path of a single file, if `name` is a repository and only this file is wanted.
        weights: Whether weights are needed, or configurations alone.
        variant: Of the weights, such as "fp16"; parts without it are taken without variant.
        revision: A branch, tag or commit; takes precedence over that of `name`.
        token: Of the hub; None takes the one that is logged in.
        offline: Whether to use only what was fetched before.

    Raises:
        CheckpointError: If the model could not be found or fetched.
    """
    if (path := Path(name).expanduser()).exists():
        return path
    remote = parse_remote(str(name))
    if remote is None or (remote.file is None and path.suffix in FILE_SUFFIXES):
        raise CheckpointError(
            f"{name} is neither a local file or folder nor a hub id; give a path, or a hub id like owner/model"
        )
    if path.parent != Path() and path.parent.is_dir():
        raise CheckpointError(
            f"{path.parent} is a local folder and has no {path.name}; "
            f"give a path that exists, or hf://{name} to fetch it from the hub"
        )
    remote = remote._replace(revision=revision or remote.revision, file=remote.file or file)
    offline = offline or constants.HF_HUB_OFFLINE
    options = {"revision": remote.revision, "token": token}
    if remote.file is not None:
        fetch = partial(hf_hub_download, remote.repository, remote.file, local_files_only=offline, **options)
        return Path(_ask_hub(name, fetch))
    files = None if offline else _ask_hub(name, partial(_listing, remote.repository, **options))
    if files is None:
        options["local_files_only"], needed = True, [index]
    else:
        needed = needed_files(files, tuple(parts), weights, variant, index=index, name=str(name))
    return Path(_ask_hub(name, partial(snapshot_download, remote.repository, allow_patterns=needed, **options)))


def commit_of(path: Path) -> str | None:
    """The commit of a file or folder in the hub's cache; None for any other.

    Args:
        path: As `find` returns it.
    """
    parts = path.parts
    for repository, folder, commit in zip(parts, parts[1:], parts[2:], strict=False):
        if repository.startswith("models--") and folder == "snapshots":
            return commit
    return None


def _listing(repository: str, **options) -> list[str] | None:
    """The paths of a repository's files; None if the hub cannot be reached."""
    try:
        return HfApi().list_repo_files(repository, **options)
    except (HfHubHTTPError, HFValidationError):
        raise
    except Exception:  # which one depends on the library's HTTP client
        return None


def needed_files(
    files: Sequence[str], parts: Sequence[str], weights: bool, variant: str | None, *, index: str, name: str
) -> list[str]:
    """The files of a repository that a model consists of; as in diffusers, parts without the variant are taken without it.

    Args:
        files: The paths of all files.
        parts: The subfolders that are needed.
        weights: Whether weights are needed, in the first format of `STEMS` that a part has, or configurations alone.
        variant: Of the weights.
        index: A file that the repository must have.
        name: The model's name, for errors.

    Raises:
        CheckpointError: If a part has no weights, or no part has weights of the variant.
    """
    if index not in files:
        single = [file for file in files if file.endswith((".safetensors", ".ckpt")) and "/" not in file]
        raise CheckpointError(
            f"{name} has no {index} and so is not a model in the diffusers layout; "
            + (f"give one of its files, such as {name}/{single[0]}" if single else "choose another repository")
        )
    needed, found, has_variant = [index], [], False
    for part in parts:
        inside = [file for file in files if PurePosixPath(file).parent == PurePosixPath(part)]
        needed += [file for file in inside if file.endswith((".json", ".txt"))]
        if weights:
            needed += _choose_weights(inside, part, variant, name)
        found += _weight_file_names(inside)
        has_variant = has_variant or any(_is_weight_file(file, kind, variant) for file in inside for kind in STEMS)
    if variant and found and weights and not has_variant:
        raise no_weights(name, found, variant)
    return needed


def _choose_weights(inside: Sequence[str], part: str, variant: str | None, name: str) -> list[str]:
    """The files with the weights to take among the files `inside` a part; none for a part that is not a model."""
    files = (
        [file for file in inside if _is_weight_file(file, kind, each)] for each in (variant, None) for kind in STEMS
    )
    chosen = next(filter(None, files), [])
    if not chosen and "config.json" in (PurePosixPath(file).name for file in inside):
        raise no_weights(f"{name}/{part}".rstrip("/"), _weight_file_names(inside), variant)
    return chosen


def _weight_file_names(files: Iterable[str]) -> list[str]:
    return [PurePosixPath(file).name for file in files if file.endswith(tuple(STEMS))]


def _is_weight_file(file: str, kind: str, variant: str | None) -> bool:
    """Whether a file has weights of a format (a key of `STEMS`) and of exactly this variant."""
    stems = "|".join(STEMS[kind])
    middle = rf"(?:\.{re.escape(variant)})" if variant else ""
    shard = r"(?:-\d+-of-\d+)"
    return bool(
        re.fullmatch(rf"(?:{stems})(?:{middle}{shard}?|{shard}{middle}){re.escape(kind)}", PurePosixPath(file).name)
    )


def _ask_hub(name: str | Path, ask: Callable[[], Result]) -> Result:
    """The hub's answer; raises DistriError if it refuses or cannot be reached."""
    try:
        return ask()
    except GatedRepoError:
        raise CheckpointError(f"{name} is gated; accept its terms on the hub and {TOKEN_ADVICE}") from None
    except RevisionNotFoundError:
        raise CheckpointError(
            f"{name} has no such revision on the hub; give one of its branches, tags or commits"
        ) from None
    except RepositoryNotFoundError:  # also raised for private ones
        raise CheckpointError(
            f"{name} is neither a local path nor a public model on the hub; "
            f"check the spelling, or for a private model {TOKEN_ADVICE}"
        ) from None
    except HFValidationError:
        raise CheckpointError(
            f"{name} is neither a local path nor a valid name on the hub; check the spelling"
        ) from None
    except LocalEntryNotFoundError:  # whose own advice is for programmers
        raise CheckpointError(
            f"{name} is not a local path, was not fetched before, and the hub cannot be reached; check the path, or go online"
        ) from None
    except EntryNotFoundError:
        raise CheckpointError(
            f"{name} is neither a local file nor among the files of that repository; check the spelling"
        ) from None
    except Exception as error:  # which one depends on the library's HTTP client
        raise CheckpointError(
            f"{name} is not a local path and could not be fetched from the hub ({first_line(error)}); "
            "check the path, or try again"
        ) from None


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
