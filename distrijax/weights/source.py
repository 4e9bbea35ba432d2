"""A file of tensors: its bytes are read where and when they are asked for, and never beyond its end."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from distrijax.errors import CheckpointError
from distrijax.weights.tensors import Block, Shape, Tensor


class Source:
    """A regular file; every read is checked against the size that it had first. It is open only while it is read.

    Raises CheckpointError if it is not there or not a regular file, and on a read beyond its end.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            status = path.stat()
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} can't be read ({reason(error)}); give a file that is there") from None
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
            raise CheckpointError(f"{path} is {kind}; give the file that holds the tensors")
        self.size = status.st_size

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """The file, buffered."""
        with self._readable(), self.path.open("rb") as file:
            yield file

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes."""
        return self.array(offset, (count,), np.dtype(np.uint8)).tobytes()

    def head(self, count: int) -> bytes:
        """The first bytes."""
        return self.read(0, min(count, self.size))

    def array(self, offset: int, shape: Shape, dtype: np.dtype) -> np.ndarray:
        """A little-endian array in memory of its own, which is allocated only once the bytes are known to be there."""
        count = math.prod(shape) * dtype.itemsize
        if min(offset, count) < 0 or offset + count > self.size:
            raise self.broken("file", f"it ends at byte {self.size}, and {offset + count} were promised")
        array = np.empty(shape, dtype)
        rest = memoryview(array.reshape(-1).view(np.uint8))
        with self._readable(), self.path.open("rb", buffering=0) as file:
            while rest:
                if not (count := os.preadv(file.fileno(), [rest], offset)):
                    raise self.broken("file", "it became shorter while it was read")
                rest, offset = rest[count:], offset + count
        return array

    def tensor(self, offset: int, shape: Shape, dtype: np.dtype) -> Tensor:
        """The tensor at a place of the file."""
        if offset + math.prod(shape) * dtype.itemsize > self.size:
            raise self.broken("file", f"it ends at byte {self.size}, within a tensor")
        row = math.prod(shape[1:]) * dtype.itemsize

        def rows(start: int, stop: int) -> np.ndarray:
            return self.array(offset + start * row, (stop - start, *shape[1:]), dtype)

        cut = partial(cut_rows, shape, rows) if shape else None
        return Tensor(shape, dtype, partial(self.array, offset, shape, dtype), cut)

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(f"{self.path} can't be read ({reason(error)}); check the file and its disk") from None

    @contextmanager
    def parsed_as(self, kind: str) -> Iterator[None]:
        """Turns what a parser raises into the sentence for a damaged file."""
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:  # libraries raise classes of their own
            raise self.broken(kind, reason(error)) from None

    def broken(self, kind: str, why: str) -> CheckpointError:
        """The error for a damaged file."""
        return CheckpointError(f"{self.path} is not a whole {kind} ({why}); fetch it again")


def cut_rows(shape: Shape, rows: Callable[[int, int], np.ndarray], block: Block) -> np.ndarray:
    """A block of a tensor of which the rows (along the first axis) that it lies in are read."""
    start, stop, _ = block[0].indices(shape[0])
    return rows(start, max(start, stop))[:, *block[1:]]


def checked_shape(dimensions: object) -> Shape:
    """A shape out of a file. Raises ValueError for what is no shape."""
    shape = tuple(dimensions) if isinstance(dimensions, list | tuple) else (None,)
    if not all(type(length) is int and length >= 0 for length in shape):
        raise ValueError(f"{dimensions!r} is not the shape of a tensor")
    return shape


def add(found: dict[str, Any], name: str, value: Any) -> None:
    """Adds what has a name. Raises ValueError for a name that is there already or is not valid Unicode."""
    name.encode()  # fails for half of a surrogate pair
    if name in found:
        raise ValueError(f"{name!r} is in it twice")
    found[name] = value


def reason(error: BaseException) -> str:
    """What went wrong, on one printable line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    text = " ".join(text.split())[:200]
    return text if text.isprintable() else ascii(text)
