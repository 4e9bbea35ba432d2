"""Reading a model's folder of the diffusers layout: config.json and safetensors, tensor by tensor, onto the devices.

Of each tensor those parts are copied that the devices of this process hold; all else that is checked stands in the file's head.

Modules carry diffusers' names, so the map from a checkpoint is four leaf rules:

    rank 4 `kernel`   weight, OIHW -> HWIO          rank 1 `scale`      weight
    rank 2 `kernel`   weight, transposed            any    `bias`       as it is      (`embedding`: weight as it is)
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from distrijax.config import DistriError

Module = TypeVar("Module", bound=nnx.Module)
ParamPath = tuple[str | int, ...]


class Values(Protocol):
    """A parameter on the host, of which any block can be had: NumPy's array, or one in a file (`Stored`)."""

    shape: tuple[int, ...]

    def __getitem__(self, block: tuple[slice, ...]) -> np.ndarray: ...


Place = Callable[[ParamPath, Values], jax.Array]
"""Puts the parameter at a path of a module on the devices."""

FLOATING = ("F64", "F32", "F16", "BF16")
"""What safetensors files call the types of weights that are read."""

EIGHT_BITS, OF_EIGHT_BITS = ("F8_E4M3", "F8_E5M2"), "of 8 bits"
"""Types of weights that `distrijax.convert` makes others of, and what an error calls the trouble with them."""

IGNORED = ("text_model.embeddings.position_ids",)
"""Tensors that some checkpoints carry and no model needs."""

UNPREFIXED = ("embeddings.", "encoder.layers.", "final_layer_norm.")
"""Beginnings of names in text encoders that transformers 5 wrote without their `text_model.`"""

DEPRECATED = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""What old VAEs, those of Stable Diffusion 1.x and 2.x among them, call the projections of their attention."""

STEMS = {
    ".safetensors": ("diffusion_pytorch_model", "model"),
    ".bin": ("diffusion_pytorch_model", "pytorch_model"),
    ".msgpack": ("diffusion_flax_model", "flax_model"),
}
"""What files with a model's weights are called, by their format; the first format that a model has is the one to take."""

SAFE = (".safetensors",)
"""The format that needs no conversion."""

JSON = 32 << 20
"""Characters of a JSON file: those of a tokenizer are 4 million."""

LISTED = 8
"""How many offending tensors an error names for each kind of trouble."""

LONGEST = 150
"""Characters of a name that an error shows."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises DistriError when there is none or it is not one."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(JSON + 1)
        if len(text) > JSON:
            raise ValueError(f"it has more than {JSON} characters")
        content = json.loads(text)
    except FileNotFoundError:
        raise DistriError(f"{path} does not exist; give a folder in the diffusers layout") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DistriError(f"{path} is not readable JSON ({error}); fetch the file again") from None
    if not isinstance(content, dict):
        raise DistriError(f"{path} holds a {type(content).__name__}; a JSON object is needed; fetch the file again")
    return content


def load_module(module: Module, folder: Path, *, variant: str | None, dtype: jnp.dtype, place: Place) -> Module:
    """A module filled from the safetensors of `folder`; all or nothing.

    module: of shapes (`layers.abstract`). Each tensor is read, cast and placed before the next one, so the
    host never holds two. Raises one DistriError that lists every tensor that is missing, unexpected, duplicate, misshapen,
    of a wrong type or not finite. A number that is not finite is found where it is read: maybe in one of several processes.
    """
    graph, abstract = nnx.split(module)
    wanted = {checkpoint_name(path): (path, leaf) for path, leaf in nnx.to_flat_state(abstract)}
    filled: dict[str, jax.Array] = {}
    seen: set[str] = set()
    problems: dict[str, list[str]] = {}
    for name, tensor in read_tensors(weight_files(folder, variant)):
        if name in IGNORED:
            continue
        trouble, told = ("duplicate", name) if name in seen else _trouble(name, tensor, wanted)
        seen.add(name)
        if not trouble:
            path, _ = wanted[name]
            stored = Stored(tensor, path[-1], dtype)
            filled[name] = place(path, stored)
            if not stored.finite:
                trouble, told = "not finite", name
        if trouble:
            problems.setdefault(trouble, []).append(told)
        if problems:  # a failing load goes on only to report everything
            filled.clear()
    missing = [name for name in wanted if name not in seen]
    if missing:
        problems["missing"] = missing
    if problems.keys() == {OF_EIGHT_BITS}:
        command = "`python -m distrijax.convert SOURCE DESTINATION --dtype float16`"
        raise DistriError(
            f"{folder} has weights of 8 bits, which are not read; convert it, {command}: {summary(problems)}"
        )
    if problems:
        raise DistriError(
            f"{folder} does not hold the model its config.json describes; fetch the folder again: {summary(problems)}"
        )
    for name, (_, leaf) in wanted.items():
        leaf.set_value(filled[name])
    return nnx.merge(graph, abstract)


def save_module(module: nnx.Module, config: dict[str, Any], folder: Path, *, stem: str, dtype: np.dtype) -> None:
    """Writes a module's folder: config.json and `stem`.safetensors with PyTorch's names and layouts."""
    tensors = {}
    for path, leaf in nnx.to_flat_state(nnx.split(module)[1]):
        value = to_pytorch(path[-1], np.asarray(leaf.get_value())).astype(dtype)
        tensors[checkpoint_name(path)] = np.ascontiguousarray(value)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / f"{stem}.safetensors", metadata={"format": "pt"})


def checkpoint_name(path: tuple) -> str:
    """The PyTorch name of a parameter's path."""
    *module, leaf = path
    return ".".join(map(str, [*module, leaf if leaf == "bias" else "weight"]))


def to_native(leaf: str, tensor: np.ndarray) -> np.ndarray:
    """A PyTorch parameter in this project's layout."""
    return tensor.transpose(_axes(leaf, tensor.ndim))


def to_pytorch(leaf: str, tensor: np.ndarray) -> np.ndarray:
    """The inverse of `to_native`."""
    return tensor.transpose(np.argsort(_axes(leaf, tensor.ndim)))


def _axes(leaf: str, rank: int) -> tuple[int, ...]:
    """PyTorch's axes of a parameter in this project's order."""
    kernels = {4: (2, 3, 1, 0), 2: (1, 0)}
    return kernels[rank] if leaf == "kernel" and rank in kernels else tuple(range(rank))


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


class FileTensor:
    """A tensor in an open safetensors file, in PyTorch's layout. kind: its type, as the file calls it."""

    def __init__(self, tensors: safe_open, name: str, file: Path):
        self._file, self._content = file, tensors.get_slice(name)
        self.shape, self.kind = tuple(self._content.get_shape()), self._content.get_dtype()

    def __getitem__(self, block: tuple[slice, ...]) -> np.ndarray:
        """A block of it, in memory of its own."""
        with _reading(self._file):
            return self._content[block]


class Stored:
    """A parameter in a file, in this project's layout. What is asked for is read, cast and looked at, and nothing else.

    finite: whether all that has been read is.
    """

    def __init__(self, tensor: FileTensor, leaf: str, dtype: jnp.dtype):
        self._tensor, self._leaf, self._dtype = tensor, leaf, dtype
        self._axes = _axes(leaf, len(tensor.shape))
        self.shape = tuple(tensor.shape[axis] for axis in self._axes)
        self.finite = True

    def __getitem__(self, block: tuple[slice, ...]) -> np.ndarray:
        sizes = tuple(len(range(*part.indices(length))) for part, length in zip(block, self.shape, strict=True))
        if 0 in sizes:  # at the end of an axis safetensors calls it out of bounds
            return np.zeros(sizes, self._dtype)
        stored = self._tensor[tuple(block[axis] for axis in np.argsort(self._axes))]
        self.finite = self.finite and finite(stored)
        return to_native(self._leaf, stored).astype(self._dtype, copy=False)


def read_tensors(files: list[Path]) -> Iterator[tuple[str, FileTensor]]:
    """Names (as they are today) and tensors of safetensors files, one at a time; to be read before the next one is asked for."""
    for file in files:
        if file.exists() and not file.is_file():
            raise DistriError(f"{file} is a folder or a pipe; put the file of weights there")
        with _reading(file), safe_open(file, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                yield current_name(name), FileTensor(tensors, name, file)


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Raises DistriError where a file cannot be read."""
    try:
        yield
    except FileNotFoundError:
        raise DistriError(f"{file} is named by the index and does not exist; fetch the missing shard") from None
    except (SafetensorError, OSError) as error:
        raise DistriError(f"{file} is not a whole safetensors file ({error}); fetch it again") from None


def current_name(name: str) -> str:
    """A parameter's name as diffusers and transformers write it today."""
    if name.startswith(UNPREFIXED):
        return f"text_model.{name}"
    if ".mid_block.attentions." in name:
        for old, new in DEPRECATED.items():
            name = name.replace(old, new)
    return name


def finite(tensor: np.ndarray) -> bool:
    """Whether no element is NaN or infinite; reads the exponent bits, several times faster than isfinite in 16 bit."""
    info = jnp.finfo(tensor.dtype)
    bits = tensor.view(np.dtype(f"u{tensor.itemsize}"))
    exponent = bits.dtype.type(((1 << info.nexp) - 1) << info.nmant)
    return not np.any((bits & exponent) == exponent)


def _trouble(name: str, tensor: FileTensor, wanted: dict) -> tuple[str | None, str]:
    """The kind of trouble with a tensor, by what the file's head says of it, and what to say; None where there is none."""
    if name not in wanted:
        return "unexpected", name
    path, leaf = wanted[name]
    needed = to_pytorch(path[-1], np.broadcast_to(0, leaf.shape)).shape
    if tensor.shape != needed:
        return "misshapen", f"{name} is {list(tensor.shape)} and should be {list(needed)}"
    if tensor.kind in EIGHT_BITS:
        return OF_EIGHT_BITS, f"{name} is {tensor.kind}"
    if tensor.kind not in FLOATING:
        return f"of a type other than {', '.join(FLOATING)}", f"{name} is {tensor.kind}"
    return None, name


def summary(problems: dict[str, list[str]]) -> str:
    """Kinds of trouble and the first tensors that have each."""
    parts = []
    for kind, names in problems.items():
        more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
        parts.append(f"{len(names)} {kind} ({', '.join(map(shown, names[:LISTED]))}{more})")
    return "; ".join(parts)


def shown(name: str) -> str:
    """A name out of a file, fit for a sentence whatever the file says."""
    short = name if len(name) <= LONGEST else f"{name[:LONGEST]}..."
    return short if short.isprintable() else ascii(short)
