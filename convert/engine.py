"""Tables of names and named transforms, and the one engine that takes tensors through them, in either direction.

    Row("in_layers.0.", "norm1.")                       a prefix: what follows it is carried over
    Row("input_blocks.1.0.", "down_blocks.0.resnets.0.", RESNET)      what follows goes through another table
    Row("resblocks.{n}.", "encoder.layers.{n}.", LAYER)               {n} stands for a number
    Row("q.", "to_q.", SQUEEZED)                        a transform of the tensor
    Row("in_proj_weight", ("q.weight", "k.weight", "v.weight"), SPLIT)    one tensor there, several here
    Row("position_ids", None)                           known, and of no use here

"Theirs" is the foreign layout, "ours" the names that PyTorch's diffusers and transformers give.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from distrijax.convert.tensors import Shape, Tensor, Tensors
from distrijax.errors import DistriError
from distrijax.weights.files import summary


@dataclasses.dataclass(frozen=True)
class Transform:
    """A change of layout that loses nothing. One of their tensors is `parts` of ours.

    shape: of each of ours, of theirs; None where the transform does not apply. split: ours number i, of theirs.
    whole_shape, join: theirs, of all of ours.
    """

    name: str
    shape: Callable[[Shape], Shape | None]
    split: Callable[[np.ndarray, int], np.ndarray]
    whole_shape: Callable[[Shape], Shape | None]
    join: Callable[[Sequence[np.ndarray]], np.ndarray]
    parts: int = 1


SAME = Transform("same", lambda shape: shape, lambda array, _: array, lambda shape: shape, lambda arrays: arrays[0])

TRANSPOSED = Transform(
    "transposed",
    lambda shape: shape[::-1] if len(shape) == 2 else None,
    lambda array, _: array.T,
    lambda shape: shape[::-1] if len(shape) == 2 else None,
    lambda arrays: arrays[0].T,
)

SQUEEZED = Transform(
    "squeezed",  # a convolution of 1x1 there, a linear layer here; a bias, or what is linear already, is the same in both
    lambda shape: shape[:2] if all(size == 1 for size in shape[2:]) else None,
    lambda array, _: array.reshape(array.shape[:2]),
    lambda shape: (*shape, 1, 1) if len(shape) == 2 else shape if len(shape) == 1 else None,
    lambda arrays: arrays[0].reshape(*arrays[0].shape, *(1, 1) * (arrays[0].ndim == 2)),
)

SPLIT = Transform(
    "split in three",
    lambda shape: (shape[0] // 3, *shape[1:]) if shape and shape[0] % 3 == 0 else None,
    lambda array, part: np.split(array, 3)[part],
    lambda shape: (3 * shape[0], *shape[1:]) if shape else None,
    np.concatenate,
    parts=3,
)


class Row:
    """One line of a table.

    theirs, ours: names, or beginnings of names that end in a dot. ours: as many as the transform has parts, or None for what
    is dropped. then: a transform of the tensor, or a table for the rest of the name.
    """

    def __init__(self, theirs: str, ours: str | tuple[str, ...] | None, then: Transform | Table = SAME):
        self.theirs = theirs
        self.ours = (ours,) if isinstance(ours, str) else ours or ()
        self.then = then
        parts = then.parts if isinstance(then, Transform) else 1
        if self.ours and len(self.ours) != parts:
            raise ValueError(f"{theirs} has {len(self.ours)} names for {parts} parts")
        self._from_theirs = _pattern(theirs)
        self._from_ours = [_pattern(name) for name in self.ours]

    def from_theirs(self, name: str) -> Mapped | None:
        return self._mapped(self._from_theirs.fullmatch(name), Table.from_theirs)

    def from_ours(self, name: str) -> Mapped | None:
        found = (pattern.fullmatch(name) for pattern in self._from_ours)
        return self._mapped(next(filter(None, found), None), Table.from_ours)

    def _mapped(self, found: re.Match | None, inner: Callable[[Table, str], Mapped | None]) -> Mapped | None:
        if found is None:
            return None
        *numbers, rest = found.groups()
        theirs, ours = _fill(self.theirs, numbers), [_fill(name, numbers) for name in self.ours]
        if not isinstance(self.then, Table):
            return Mapped(theirs + rest, tuple(name + rest for name in ours), self.then)
        if not ours:
            return Mapped(theirs + rest, (), SAME)
        within = inner(self.then, rest)
        if within is None:
            return None
        return Mapped(theirs + within.theirs, tuple(ours[0] + name for name in within.ours), within.transform)


class Table:
    """Rows; the first that fits a name decides."""

    def __init__(self, *rows: Row):
        self.rows = rows

    def from_theirs(self, name: str) -> Mapped | None:
        """What one of their names is here; None for a name that no row knows."""
        return next(filter(None, (row.from_theirs(name) for row in self.rows)), None)

    def from_ours(self, name: str) -> Mapped | None:
        """The tensor of theirs that holds one of ours, and all of ours that it holds; None for a name that no row knows."""
        return next(filter(None, (row.from_ours(name) for row in self.rows)), None)

    def __add__(self, other: Table) -> Table:
        return Table(*self.rows, *other.rows)


@dataclasses.dataclass(frozen=True)
class Mapped:
    """Where a tensor of theirs goes. ours: names, none for what is dropped."""

    theirs: str
    ours: tuple[str, ...]
    transform: Transform

    def __str__(self) -> str:
        how = "" if self.transform is SAME else f"  [{self.transform.name}]"
        return f"{self.theirs} -> {', '.join(self.ours) or 'dropped'}{how}"


def to_ours(table: Table, theirs: Tensors, what: str) -> tuple[Tensors, list[Mapped]]:
    """Their tensors with our names and layouts, and how each came to be.

    what: the file, for the error. Raises one DistriError that lists every name that no row knows or that comes twice, and
    every shape that its transform can't take.
    """
    ours: Tensors = {}
    mapping: list[Mapped] = []
    problems: dict[str, list[str]] = {}
    for name, tensor in theirs.items():
        if (mapped := table.from_theirs(name)) is None:
            problems.setdefault("unknown", []).append(name)
            continue
        mapping.append(mapped)
        shape = mapped.transform.shape(tensor.shape)
        if mapped.ours and shape is None:
            problems.setdefault("misshapen", []).append(
                f"{name} is {list(tensor.shape)}, to be {mapped.transform.name}"
            )
            continue
        for part, target in enumerate(mapped.ours):
            if target in ours:
                problems.setdefault("duplicate", []).append(name)
            ours[target] = tensor.then(partial(_part, mapped.transform, part), shape=shape)
    raise_for(problems, what)
    return ours, mapping


def to_theirs(table: Table, ours: Tensors, what: str) -> tuple[Tensors, list[Mapped]]:
    """The inverse of `to_ours`. Raises DistriError as it does, and where a part of a tensor of theirs is missing."""
    theirs: Tensors = {}
    made: dict[str, tuple[str, ...]] = {}
    mapping: list[Mapped] = []
    problems: dict[str, list[str]] = {}
    for name, tensor in ours.items():
        if (mapped := table.from_ours(name)) is None:
            problems.setdefault("unknown", []).append(name)
            continue
        if mapped.theirs in made:
            if made[mapped.theirs] != mapped.ours:
                problems.setdefault("duplicate", []).append(name)
            continue
        made[mapped.theirs] = mapped.ours
        absent = [part for part in mapped.ours if part not in ours]
        if absent:
            problems.setdefault("missing", []).extend(absent)
            continue
        shape = mapped.transform.whole_shape(tensor.shape)
        if shape is None or any(ours[part].shape != tensor.shape for part in mapped.ours):
            problems.setdefault("misshapen", []).append(f"{name} is {list(tensor.shape)}")
            continue
        mapping.append(mapped)
        parts = [ours[part] for part in mapped.ours]
        theirs[mapped.theirs] = Tensor(shape, tensor.dtype, partial(_whole, mapped.transform, parts))
    raise_for(problems, what)
    return theirs, mapping


def raise_for(problems: dict[str, list[str]], what: str) -> None:
    """One DistriError for all of them, by kind; nothing where there are none."""
    if problems:
        raise DistriError(f"{what} can't be converted; give a whole file of a supported model: {summary(problems)}")


def _pattern(name: str) -> re.Pattern:
    """Matches a name, or a beginning that ends in a dot; groups: the numbers, and the rest."""
    numbered = re.escape(name).replace(re.escape("{n}"), r"(\d+)")
    return re.compile(numbered + ("(.+)" if name.endswith(".") else "()"), re.ASCII | re.DOTALL)


def _fill(name: str, numbers: list[str]) -> str:
    for number in numbers:
        name = name.replace("{n}", number, 1)
    return name


def _part(transform: Transform, part: int, array: np.ndarray) -> np.ndarray:
    return transform.split(array, part)


def _whole(transform: Transform, parts: list[Tensor]) -> np.ndarray:
    return transform.join([part.read() for part in parts])


def layer(transform: Transform = SAME) -> Table:
    """The two tensors of a layer, whose weight may be laid out in another way; no others."""
    return Table(Row("weight", "weight", transform), Row("bias", "bias"))


LAYER = layer()
"""A layer as it is."""
