"""Loads a model's safetensors, in a folder of the diffusers layout, onto the devices, one tensor at a time.

Of each tensor only the blocks that devices of this process hold are read; names, shapes and types are checked in the header.

Modules have diffusers' names, so four rules map a checkpoint's tensors to parameters:

    `kernel`, rank 4       weight, OIHW -> HWIO
    `kernel`, rank 2       weight, transposed
    `scale`, `embedding`   weight
    `bias`                 bias
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from distrijax.errors import CheckpointError
from distrijax.weights.files import summary, weight_files
from distrijax.weights.names import (
    IGNORED,
    ParamPath,
    checkpoint_name,
    current_name,
    native_axes,
    to_native,
    to_pytorch,
)

Module = TypeVar("Module", bound=nnx.Module)


class Values(Protocol):
    """A parameter on the host, indexed by blocks: an array of NumPy's, or a tensor in a file (`Stored`)."""

    shape: tuple[int, ...]

    def __getitem__(self, block: tuple[slice, ...]) -> np.ndarray: ...


Place = Callable[[ParamPath, Values], jax.Array]
"""Puts a parameter on the devices, given its path in the module."""

FLOATING = ("F64", "F32", "F16", "BF16")
"""Types of weights that are loaded, by their names in safetensors files."""

EIGHT_BITS, EIGHT_BIT_PROBLEM = ("F8_E4M3", "F8_E5M2"), "8-bit"
"""Types of weights that only `distrijax.convert` reads, and the name of the problem in errors."""


def load_module(module: Module, folder: Path, *, variant: str | None, dtype: jnp.dtype, place: Place) -> Module:
    """A module with the weights of a folder: completely, or not at all.

    Each tensor is read, cast and placed before the next one, so the host never holds two.

    Args:
        module: Of shapes (`layers.abstract`).
        folder: The model's.
        variant: Of the weights; see `weight_files`.
        dtype: To cast to.
        place: Puts each parameter on the devices.

    Raises:
        CheckpointError: If tensors are missing, unexpected, duplicate, of the wrong shape or type, or not finite; one error
            lists all of them. NaN and infinity are found by the process that reads them, which may be one of several.
    """
    graph, abstract = nnx.split(module)
    wanted = {checkpoint_name(path): (path, leaf) for path, leaf in nnx.to_flat_state(abstract)}
    filled: dict[str, jax.Array] = {}
    seen: set[str] = set()
    problems: dict[str, list[str]] = {}
    for name, tensor in read_tensors(weight_files(folder, variant)):
        if name in IGNORED:
            continue
        problem, detail = ("duplicate", name) if name in seen else _problem(name, tensor, wanted)
        seen.add(name)
        if not problem:
            path, _ = wanted[name]
            stored = Stored(tensor, path[-1], dtype)
            filled[name] = place(path, stored)
            if not stored.finite:
                problem, detail = "not finite", name
        if problem:
            problems.setdefault(problem, []).append(detail)
        if problems:  # loading goes on only to report everything
            filled.clear()
    missing = [name for name in wanted if name not in seen]
    if missing:
        problems["missing"] = missing
    if problems.keys() == {EIGHT_BIT_PROBLEM}:
        command = "`python -m distrijax.convert SOURCE DESTINATION --dtype float16`"
        raise CheckpointError(
            f"{folder} has 8-bit weights, which cannot be loaded; convert them, {command}: {summary(problems)}"
        )
    if problems:
        raise CheckpointError(
            f"{folder} does not contain the model that its config.json describes; fetch the folder again: {summary(problems)}"
        )
    for name, (_, leaf) in wanted.items():
        leaf.set_value(filled[name])
    return nnx.merge(graph, abstract)


def save_module(module: nnx.Module, config: dict[str, Any], folder: Path, *, stem: str, dtype: np.dtype) -> None:
    """Writes a module's folder: config.json, and a safetensors file with PyTorch's names and axis orders.

    Args:
        module: The module.
        config: Content of its config.json.
        folder: The folder, created if needed.
        stem: Name of the weights file, without suffix.
        dtype: Of the stored weights.
    """
    tensors = {}
    for path, leaf in nnx.to_flat_state(nnx.split(module)[1]):
        value = to_pytorch(path[-1], np.asarray(leaf.get_value())).astype(dtype)
        tensors[checkpoint_name(path)] = np.ascontiguousarray(value)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / f"{stem}.safetensors", metadata={"format": "pt"})


class FileTensor:
    """A tensor in an open safetensors file, in PyTorch's axis order.

    Attributes:
        shape: Its shape.
        kind: Its type, by the file's name for it.
    """

    def __init__(self, tensors: safe_open, name: str, file: Path):
        self._file, self._content = file, tensors.get_slice(name)
        self.shape, self.kind = tuple(self._content.get_shape()), self._content.get_dtype()

    def __getitem__(self, block: tuple[slice, ...]) -> np.ndarray:
        """A copy of a block."""
        with _reading(self._file):
            return self._content[block]


class Stored:
    """A parameter in a file, in this project's axis order; reads, casts and checks only the blocks that are asked for.

    Attributes:
        shape: The parameter's shape.
        finite: Whether everything read so far is finite.
    """

    def __init__(self, tensor: FileTensor, leaf: str, dtype: jnp.dtype):
        self._tensor, self._leaf, self._dtype = tensor, leaf, dtype
        self._axes = native_axes(leaf, len(tensor.shape))
        self.shape = tuple(tensor.shape[axis] for axis in self._axes)
        self.finite = True

    def __getitem__(self, block: tuple[slice, ...]) -> np.ndarray:
        sizes = tuple(len(range(*part.indices(length))) for part, length in zip(block, self.shape, strict=True))
        if 0 in sizes:  # safetensors refuses an empty block at the end of an axis
            return np.zeros(sizes, self._dtype)
        stored = self._tensor[tuple(block[axis] for axis in np.argsort(self._axes))]
        self.finite = self.finite and finite(stored)
        return to_native(self._leaf, stored).astype(self._dtype, copy=False)


def read_tensors(files: list[Path]) -> Iterator[tuple[str, FileTensor]]:
    """Names (by `current_name`) and tensors of safetensors files; read each tensor before asking for the next one.

    Args:
        files: The files.

    Raises:
        CheckpointError: If a file is missing or not a complete safetensors file.
    """
    for file in files:
        if file.exists() and not file.is_file():
            raise CheckpointError(f"{file} is a folder or a pipe; put the weights file there")
        with _reading(file), safe_open(file, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                yield current_name(name), FileTensor(tensors, name, file)


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Raises DistriError if a file cannot be read."""
    try:
        yield
    except FileNotFoundError:
        raise CheckpointError(f"{file} is named by the index but does not exist; fetch the missing shard") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a complete safetensors file ({error}); fetch it again") from None


def finite(tensor: np.ndarray) -> bool:
    """Whether no element is NaN or infinite; by the exponent bits, several times faster than isfinite in 16 bits."""
    info = jnp.finfo(tensor.dtype)
    bits = tensor.view(np.dtype(f"u{tensor.itemsize}"))
    exponent = bits.dtype.type(((1 << info.nexp) - 1) << info.nmant)
    return not np.any((bits & exponent) == exponent)


def _problem(name: str, tensor: FileTensor, wanted: dict) -> tuple[str | None, str]:
    """The problem with a tensor according to the file's header, None if there is none, and what to list for it."""
    if name not in wanted:
        return "unexpected", name
    path, leaf = wanted[name]
    needed = to_pytorch(path[-1], np.broadcast_to(0, leaf.shape)).shape
    if tensor.shape != needed:
        return "of the wrong shape", f"{name} is {list(tensor.shape)} and should be {list(needed)}"
    if tensor.kind in EIGHT_BITS:
        return EIGHT_BIT_PROBLEM, f"{name} is {tensor.kind}"
    if tensor.kind not in FLOATING:
        return f"of a type other than {', '.join(FLOATING)}", f"{name} is {tensor.kind}"
    return None, name
