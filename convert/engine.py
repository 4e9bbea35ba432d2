"""Tables of names and transforms, and the engine that renames tensors by them, from a source's layout to diffusers' and back.

    Row("in_layers.0.", "norm1.")                       a prefix: what follows it is kept
    Row("input_blocks.1.0.", "down_blocks.0.resnets.0.", RESNET)      what follows it is looked up in another table
    Row("resblocks.{n}.", "encoder.layers.{n}.", LAYER)               {n} stands for a number
    Row("q.", "to_q.", SQUEEZED)                        a transform of the tensor
    Row("in_proj_weight", ("q.weight", "k.weight", "v.weight"), SPLIT)    one tensor in the source, several in diffusers
    Row("position_ids", None)                           known, and not needed

"diffusers" means the names that PyTorch's diffusers and transformers give.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from distrijax.errors import CheckpointError
from distrijax.weights.files import summary
from distrijax.weights.load import Problems
from distrijax.weights.tensors import Shape, Tensor, Tensors


@dataclasses.dataclass(frozen=True)
class Transform:
    """A lossless change of layout.

    split: the tensors in diffusers, of the source's one; raises ValueError for a shape that it does not apply to.
    join: the inverse, of arrays.
    """

    name: str
    split: Callable[[Tensor], Sequence[Tensor]]
    join: Callable[[Sequence[np.ndarray]], np.ndarray]


def _squeezed(tensor: Tensor) -> Tensor:
    shape = tensor.shape[:2]
    if math.prod(shape) != tensor.size:
        raise ValueError
    return tensor.then(lambda array: array.reshape(shape), shape=shape)


def _thirds(tensor: Tensor) -> list[Tensor]:
    if not tensor.shape or tensor.shape[0] % 3:
        raise ValueError
    length = tensor.shape[0] // 3
    return [tensor.rows(start * length, (start + 1) * length) for start in range(3)]


SAME = Transform("same", lambda tensor: (tensor,), lambda arrays: arrays[0])

TRANSPOSED = Transform(
    "transposed", lambda tensor: (tensor.then(np.transpose, shape=tensor.shape[::-1]),), lambda arrays: arrays[0].T
)

SQUEEZED = Transform(
    "squeezed",  # a 1x1 convolution in the source, a linear layer in diffusers; a bias is the same in both
    lambda tensor: (_squeezed(tensor),),
    lambda arrays: arrays[0].reshape(*arrays[0].shape, *(1, 1) * (arrays[0].ndim == 2)),
)

SPLIT = Transform("split in three", _thirds, np.concatenate)


class Row:
    """One line of a table.

    source, diffusers: names, or prefixes that end in a dot; diffusers is a tuple where the transform has several parts, and
    None for what is dropped. then: a transform of the tensor, or a table for the rest of the name.
    """

    def __init__(self, source: str, diffusers: str | tuple[str, ...] | None, then: Transform | Table = SAME):
        self.source = source
        self.diffusers = (diffusers,) if isinstance(diffusers, str) else diffusers or ()
        self.then = then

    def from_source(self, name: str) -> Mapped | None:
        return self._mapped((self.source,), name, Table.from_source)

    def from_diffusers(self, name: str) -> Mapped | None:
        return self._mapped(self.diffusers, name, Table.from_diffusers)

    def _mapped(self, names: Iterable[str], name: str, inner: Callable[[Table, str], Mapped | None]) -> Mapped | None:
        found = next(filter(None, (_pattern(each).fullmatch(name) for each in names)), None)
        if found is None:
            return None
        *numbers, rest = found.groups()
        source, diffusers = _fill(self.source, numbers), [_fill(each, numbers) for each in self.diffusers]
        if not diffusers:
            return Mapped(source + rest, (), SAME)
        if isinstance(self.then, Transform):
            return Mapped(source + rest, tuple(each + rest for each in diffusers), self.then)
        within = inner(self.then, rest)
        if within is None:
            return None
        return Mapped(source + within.source, tuple(diffusers[0] + each for each in within.diffusers), within.transform)


class Table:
    """Rows; the first that fits a name applies."""

    def __init__(self, *rows: Row):
        self.rows = rows

    def from_source(self, name: str) -> Mapped | None:
        """Where a tensor of the source goes; None for a name that no row knows."""
        return next(filter(None, (row.from_source(name) for row in self.rows)), None)

    def from_diffusers(self, name: str) -> Mapped | None:
        """The source's tensor that holds one of diffusers, and all that it holds; None for a name that no row knows."""
        return next(filter(None, (row.from_diffusers(name) for row in self.rows)), None)

    def __add__(self, other: Table) -> Table:
        return Table(*self.rows, *other.rows)


@dataclasses.dataclass(frozen=True)
class Mapped:
    """Where a tensor of the source goes. diffusers: names, none for what is dropped."""

    source: str
    diffusers: tuple[str, ...]
    transform: Transform

    def __str__(self) -> str:
        how = "" if self.transform is SAME else f"  [{self.transform.name}]"
        return f"{self.source} -> {', '.join(self.diffusers) or 'dropped'}{how}"


def to_diffusers(table: Table, tensors: Tensors, what: str) -> tuple[Tensors, list[Mapped]]:
    """A source's tensors with diffusers' names and layouts, and where each went.

    what: the file, for the error. Raises one CheckpointError that lists every name that no row knows or that comes twice, and
    every shape that its transform does not apply to.
    """
    found: Tensors = {}
    mapping: list[Mapped] = []
    problems: Problems = {}
    for name, tensor in tensors.items():
        if (mapped := table.from_source(name)) is None:
            problems.setdefault("unknown", []).append(name)
            continue
        mapping.append(mapped)
        try:
            parts = mapped.transform.split(tensor)
        except ValueError:
            shape = f"{name} is {list(tensor.shape)}, to be {mapped.transform.name}"
            problems.setdefault("of the wrong shape", []).append(shape)
            continue
        for target, part in zip(mapped.diffusers, parts, strict=False):
            if target in found:
                problems.setdefault("duplicate", []).append(name)
            found[target] = part
    raise_for(problems, what)
    return found, mapping


def to_source(table: Table, tensors: Tensors, what: str) -> Tensors:
    """The inverse of `to_diffusers`. Raises CheckpointError as it does, and where a part of a tensor is missing."""
    known: dict[str, Mapped] = {}
    problems: Problems = {}
    for name in tensors:
        if (mapped := table.from_diffusers(name)) is None:
            problems.setdefault("unknown", []).append(name)
        elif known.setdefault(mapped.source, mapped).diffusers != mapped.diffusers:
            problems.setdefault("duplicate", []).append(name)
    found: Tensors = {}
    for source, mapped in known.items():
        if absent := [name for name in mapped.diffusers if name not in tensors]:
            problems.setdefault("missing", []).extend(absent)
            continue
        parts = [tensors[name] for name in mapped.diffusers]
        if len({part.shape for part in parts}) > 1:
            shape = f"{mapped.diffusers[0]} is {list(parts[0].shape)}, unlike the other parts of {source}"
            problems.setdefault("of the wrong shape", []).append(shape)
            continue
        shape = mapped.transform.join([_stand_in(part.shape) for part in parts]).shape
        found[source] = Tensor(shape, parts[0].dtype, functools.partial(_joined, mapped.transform, parts))
    raise_for(problems, what)
    return found


def raise_for(problems: Problems, what: str) -> None:
    """One CheckpointError for all of them; nothing where there are none."""
    if problems:
        raise CheckpointError(f"{what} can't be used; give a whole file of a supported model: {summary(problems)}")


def layer(transform: Transform = SAME) -> Table:
    """The weight and bias of a layer, whose weight may be laid out in another way; no others."""
    return Table(Row("weight", "weight", transform), Row("bias", "bias"))


LAYER = layer()
"""A layer as it is."""


def rows(pairs: str, then: Transform | Table = LAYER) -> tuple[Row, ...]:
    """Rows of modules.

    pairs: their names in the source and in diffusers, "in_layers.0 norm1, out_layers.3 conv2"; one name if both are the same.
    then: the layout of each.
    """
    names = [pair.split() for pair in pairs.split(",")]
    return tuple(Row(f"{pair[0]}.", f"{pair[-1]}.", then) for pair in names)


def _stand_in(shape: Shape) -> np.ndarray:
    """An array of a shape that takes no memory. Raises ValueError for a shape that no array has."""
    return np.broadcast_to(np.False_, shape)


def _joined(transform: Transform, parts: Sequence[Tensor]) -> np.ndarray:
    return transform.join([part.read() for part in parts])


@functools.cache
def _pattern(name: str) -> re.Pattern:
    """Matches a name, or a prefix that ends in a dot; groups: the numbers, and the rest."""
    numbered = re.escape(name).replace(re.escape("{n}"), r"(\d+)")
    return re.compile(numbered + ("(.+)" if name.endswith(".") else "()"), re.ASCII | re.DOTALL)


def _fill(name: str, numbers: list[str]) -> str:
    for number in numbers:
        name = name.replace("{n}", number, 1)
    return name
