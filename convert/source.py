"""A file of unknown intent: its bytes, read where and when they are asked for, and never more than it has."""

from __future__ import annotations

import math
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from distrijax.convert.tensors import Shape, Tensor
from distrijax.errors import DistriError

RANK = 32
"""Dimensions a tensor may have; numpy takes 64, and no model has more than five."""

TENSORS = 100_000
NAME = 500
"""Tensors of a file, and characters of the name of one: SDXL has 2,516, with names of up to 100. More take time and memory."""


ROOM = 24 << 20
"""Bytes that what describes a file's tensors may take in memory, beside as many as the file has."""

TENSOR = 320
"""Bytes of memory that a name and where its tensor lies take, roughly, beside the name's characters."""


class Source:
    """A regular file whose size is fixed when it is found; every read is checked against it. It's open only while it is read.

    Raises DistriError where there is no such file, where it is no file, and on each read that finds less than there was.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            status = path.stat()
        except (OSError, ValueError) as error:
            raise DistriError(f"{path} can't be read ({reason(error)}); give a file that is there") from None
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
            raise DistriError(f"{path} is {kind}; give the file that holds the tensors")
        self.size = status.st_size
        self.room = ROOM + self.size

    def spend(self, count: int) -> None:
        """Takes memory from the one account that all readers of this file have. Raises ValueError where too little is left."""
        self.room -= count
        if self.room < 0:
            raise ValueError("what describes its tensors would take much more memory than it has bytes")

    def add(self, found: dict[str, Any], name: str, value: Any) -> None:
        """As `add`, at the account's expense."""
        self.spend(TENSOR + sys.getsizeof(name))
        add(found, name, value)

    @contextmanager
    def open(self, offset: int = 0) -> Iterator[BinaryIO]:
        """The file, buffered, from `offset` on."""
        try:
            with self.path.open("rb") as file:
                file.seek(offset)
                yield file
        except OSError as error:
            raise DistriError(f"{self.path} can't be read ({reason(error)}); look after the file or its disk") from None

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes."""
        return self.array(offset, (count,), np.dtype(np.uint8)).tobytes()

    def head(self, count: int) -> bytes:
        """The first bytes, at most as many as there are."""
        return self.read(0, min(count, self.size))

    def array(self, offset: int, shape: Shape, dtype: np.dtype) -> np.ndarray:
        """A little-endian array in memory of its own, which is taken only once the bytes are known to be there."""
        count = math.prod(shape) * dtype.itemsize
        if min(offset, count) < 0 or offset + count > self.size:
            raise self.broken("file", f"it ends at byte {self.size}, and {offset + count} were promised")
        array = np.empty(shape, dtype)
        self.fill(array, offset)
        return array

    def fill(self, array: np.ndarray, offset: int) -> None:
        """Reads a contiguous array's bytes into it, past any buffer of Python's."""
        rest = memoryview(array.reshape(-1).view(np.uint8))
        try:
            with self.path.open("rb", buffering=0) as file:
                while rest:
                    if not (count := os.preadv(file.fileno(), [rest], offset)):
                        raise self.broken("file", "it became shorter while it was read")
                    rest, offset = rest[count:], offset + count
        except OSError as error:
            raise DistriError(f"{self.path} can't be read ({reason(error)}); look after the file or its disk") from None

    def tensor(self, offset: int, shape: Shape, dtype: np.dtype) -> Tensor:
        """The tensor at a place of the file that the caller has checked."""
        return Tensor(shape, dtype, partial(self.array, offset, shape, dtype))

    @contextmanager
    def parsed_as(self, kind: str) -> Iterator[None]:
        """Turns what wrong bytes make a parser raise into the one sentence for a file that isn't what it says it is."""
        try:
            yield
        except DistriError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, Warning) as error:
            raise self.broken(kind, reason(error)) from None

    def broken(self, kind: str, why: str) -> DistriError:
        """The error for a file that isn't what it says it is."""
        return DistriError(f"{self.path} is not a whole {kind} ({why}); fetch it again")


def checked_shape(dimensions: object) -> Shape:
    """A shape out of a file. Raises ValueError for what no tensor can have; their product stays below 2^63."""
    shape = tuple(dimensions) if isinstance(dimensions, list | tuple) else (None,)
    if len(shape) > RANK or not all(type(length) is int and 0 <= length < 2**48 for length in shape):
        raise ValueError("a tensor's shape is none")
    if math.prod(length or 1 for length in shape) >= 2**56:
        raise ValueError(f"a tensor's shape is {list(shape)}")
    return shape


def add(found: dict[str, Any], name: str, value: Any) -> None:
    """Takes up a tensor, or what holds one. Raises ValueError for a name that is there already or no text, and for too much."""
    if len(name) > NAME or len(found) == TENSORS:
        raise ValueError(f"it has more than {TENSORS} tensors, or names of more than {NAME} characters")
    name.encode()  # fails for half of a surrogate pair
    if name in found:
        raise ValueError(f"{name!r} is in it twice")
    found[name] = value


def reason(error: Exception) -> str:
    """What went wrong, in a few words on one line, fit to be printed whatever the file says."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    text = " ".join(text.split())[:200]
    return text if text.isprintable() else ascii(text)
