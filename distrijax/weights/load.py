"""Reading a model's folder of the diffusers layout: config.json and safetensors, tensor by tensor, onto the devices.

Of each tensor those parts are copied that the devices of this process hold; all else that is checked stands in the file's head.

Modules carry diffusers' names, so the map from a checkpoint is four leaf rules:

    rank 4 `kernel`   weight, OIHW -> HWIO          rank 1 `scale`      weight
    rank 2 `kernel`   weight, transposed            any    `bias`       as it is      (`embedding`: weight as it is)
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

from distrijax.errors import DistriError
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
    """A parameter on the host, of which any block can be had: NumPy's array, or one in a file (`Stored`)."""

    shape: tuple[int, ...]

    def __getitem__(self, block: tuple[slice, ...]) -> np.ndarray: ...


Place = Callable[[ParamPath, Values], jax.Array]
"""Puts the parameter at a path of a module on the devices."""

FLOATING = ("F64", "F32", "F16", "BF16")
"""What safetensors files call the types of weights that are read."""

EIGHT_BITS, OF_EIGHT_BITS = ("F8_E4M3", "F8_E5M2"), "of 8 bits"
"""Types of weights that `distrijax.convert` makes others of, and what an error calls the trouble with them."""


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
        self._axes = native_axes(leaf, len(tensor.shape))
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
