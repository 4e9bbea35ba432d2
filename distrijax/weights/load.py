"""Fills a model with a checkpoint's tensors, on the devices, one tensor at a time.

Names, shapes and types are checked before the first tensor is read. Of each tensor only the blocks that devices of this process
hold are read.

Modules have diffusers' names, so four rules map a checkpoint's tensors to parameters:

    `kernel`, rank 4       weight, OIHW -> HWIO
    `kernel`, rank 2       weight, transposed
    `scale`, `embedding`   weight
    `bias`                 bias
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from distrijax.errors import CheckpointError
from distrijax.weights.files import summary
from distrijax.weights.names import (
    IGNORED,
    ParamPath,
    checkpoint_name,
    current_name,
    native_axes,
    to_native,
    to_pytorch,
)
from distrijax.weights.tensors import FLOATS, Block, Shape, Tensor

Module = TypeVar("Module", bound=nnx.Module)
Problems = dict[str, list[str]]
"""Names of tensors by what is wrong with them."""


class Values(Protocol):
    """A parameter on the host, indexed by blocks: an array of NumPy's, or a tensor in a file (`Stored`)."""

    shape: tuple[int, ...]

    def __getitem__(self, block: Block) -> np.ndarray: ...


Place = Callable[[ParamPath, Values], jax.Array]
"""Puts a parameter on the devices, given its path in the module."""


def load_module(module: Module, tensors: Mapping[str, Tensor], what: str, *, dtype: jnp.dtype, place: Place) -> Module:
    """A module with a checkpoint's tensors: completely, or not at all.

    Each tensor is read, cast and placed before the next one, so the host never holds two.

    Args:
        module: Of shapes (`layers.abstract`).
        tensors: The model's, by name, in PyTorch's axis order.
        what: Where they come from, for errors.
        dtype: To cast to.
        place: Puts each parameter on the devices.

    Raises:
        CheckpointError: Before anything is read, if tensors are missing, unexpected or of the wrong shape or type; one error
            lists all of them. After it, if tensors are not finite, which the process finds that reads them.
    """
    graph, abstract = nnx.split(module)
    wanted = {checkpoint_name(path): (path, leaf) for path, leaf in nnx.to_flat_state(abstract)}
    held = {current_name(name): tensor for name, tensor in tensors.items()}
    check_tensors(held, ((path, leaf.shape) for path, leaf in wanted.values()), what)
    broken = []
    for name, tensor in held.items():
        if name in IGNORED:
            continue
        path, leaf = wanted[name]
        stored = Stored(tensor, path[-1], dtype)
        leaf.set_value(place(path, stored))
        if not stored.finite:
            broken.append(name)
    if broken:
        raise CheckpointError(
            f"{what} has numbers that are not finite (NaN or infinity); fetch it again, or use another: "
            + summary({"not finite": broken})
        )
    return nnx.merge(graph, abstract)


def stored_shapes(params: Iterable[tuple[ParamPath, Shape]]) -> dict[str, Shape]:
    """The shapes of parameters by their names in a checkpoint, in PyTorch's axis order."""
    return {
        checkpoint_name(path): tuple(shape[axis] for axis in np.argsort(native_axes(path[-1], len(shape))))
        for path, shape in params
    }


def check_tensors(tensors: Mapping[str, Tensor], params: Iterable[tuple[ParamPath, Shape]], what: str) -> None:
    """Checks that a model's tensors are those of its config; no weight is read.

    Args:
        tensors: By `current_name`.
        params: The paths of the model's parameters, and their shapes.
        what: Where the tensors come from, for the error.

    Raises:
        CheckpointError: If tensors are missing, unexpected or of the wrong shape or type; one error lists all of them.
    """
    needed = stored_shapes(params)
    found = {name: tensor for name, tensor in tensors.items() if name not in IGNORED}
    both = [name for name in found if name in needed]
    floats = ", ".join(dtype.name for dtype in FLOATS)
    problems = {
        "missing": [name for name in needed if name not in found],
        "unexpected": [name for name in found if name not in needed],
        "of the wrong shape": [
            f"{name} is {list(found[name].shape)} and should be {list(needed[name])}"
            for name in both
            if found[name].shape != needed[name]
        ],
        f"of a type other than {floats}": [
            f"{name} is {found[name].dtype}" for name in both if found[name].dtype not in FLOATS
        ],
    }
    if any(problems.values()):
        found = summary({problem: names for problem, names in problems.items() if names})
        raise CheckpointError(f"{what} does not hold the model that its config.json describes; fetch it again: {found}")


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


class Stored:
    """A tensor of a checkpoint in this project's axis order; reads, casts and checks only the blocks that are asked for.

    Attributes:
        shape: The parameter's shape.
        finite: Whether everything read so far is finite.
    """

    def __init__(self, tensor: Tensor, leaf: str, dtype: jnp.dtype):
        self._tensor, self._leaf, self._dtype = tensor, leaf, dtype
        self._axes = native_axes(leaf, len(tensor.shape))
        self._whole: np.ndarray | None = None
        self.shape = tuple(tensor.shape[axis] for axis in self._axes)
        self.finite = True

    def __getitem__(self, block: Block) -> np.ndarray:
        stored = self._read(tuple(block[axis] for axis in np.argsort(self._axes)))
        self.finite = self.finite and finite(stored)
        return to_native(self._leaf, stored).astype(self._dtype, copy=False)

    def _read(self, block: Block) -> np.ndarray:
        """A block; what can't be cut along its first axis is read once for all blocks."""
        sizes = tuple(len(range(*part.indices(length))) for part, length in zip(block, self._tensor.shape, strict=True))
        cut = self._tensor.cut and sizes[:1] != self._tensor.shape[:1]
        if self._whole is None and (cut or sizes == self._tensor.shape):
            return self._tensor[block]
        if self._whole is None:
            self._whole = self._tensor.read()
        return self._whole[block]


def finite(array: np.ndarray) -> bool:
    """Whether no element is NaN or infinite; by the exponent bits, several times faster than isfinite in 16 bits."""
    if array.dtype.itemsize == 1:  # some of these types have no infinity
        return bool(np.isfinite(array.astype(np.float16)).all())
    info = jnp.finfo(array.dtype)
    bits = array.view(np.dtype(f"u{array.itemsize}"))
    exponent = bits.dtype.type(((1 << info.nexp) - 1) << info.nmant)
    return not np.any((bits & exponent) == exponent)
