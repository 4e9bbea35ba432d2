"""Tensors that are located and not read: what all readers of files return, and what loading and converting take."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import ml_dtypes
import numpy as np

Shape = tuple[int, ...]
Block = tuple[slice, ...]
"""A part of a tensor: a slice of each axis, without steps."""

EIGHT_BITS = tuple(np.dtype(kind) for kind in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2))
HALF = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
FLOATS = (np.dtype(np.float64), np.dtype(np.float32), *HALF, *EIGHT_BITS)
"""The floating-point types that checkpoints come in."""


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Tensor:
    """A tensor of a file, or one that is computed of such tensors.

    Attributes:
        shape: Its shape, known without reading it.
        dtype: Its type, known without reading it.
        read: Returns a new array each time.
        cut: Returns a block and reads little more than it; None for a tensor that is only read whole.
    """

    shape: Shape
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    cut: Callable[[Block], np.ndarray] | None = None

    def __getitem__(self, block: Block) -> np.ndarray:
        return self.read()[block] if self.cut is None else self.cut(block)

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def then(self, function: Callable[[np.ndarray], np.ndarray], *, shape: Shape | None = None, dtype=None) -> Tensor:
        """The result of a function of the whole tensor, applied when it is read.

        Args:
            function: The function.
            shape: Of the result, if it differs.
            dtype: Of the result, if it differs.
        """
        shape = self.shape if shape is None else shape
        return Tensor(shape, self.dtype if dtype is None else np.dtype(dtype), lambda: function(self.read()))

    def rows(self, start: int, stop: int) -> Tensor:
        """The part from `start` to `stop` along the first axis."""

        def cut(block: Block) -> np.ndarray:
            first, end, _ = block[0].indices(stop - start)
            return self[slice(start + first, start + max(first, end)), *block[1:]]

        whole = (slice(None),) * len(self.shape)
        return Tensor((stop - start, *self.shape[1:]), self.dtype, lambda: cut(whole), cut)


Tensors = dict[str, Tensor]
"""By name."""


def of_array(array: np.ndarray) -> Tensor:
    """A tensor that is in memory."""
    return Tensor(array.shape, array.dtype, lambda: array, array.__getitem__)
