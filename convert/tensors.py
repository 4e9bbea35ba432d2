"""Tensors that are located but not read: what all readers yield and all writers take."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import ml_dtypes
import numpy as np

Shape = tuple[int, ...]

HALF = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
FLOATS = (np.dtype(np.float64), np.dtype(np.float32), *HALF, *(np.dtype(kind) for kind in (
    ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)))  # fmt: skip
"""The floating-point types that checkpoints come in."""


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Tensor:
    """A tensor of a file. shape, dtype: known without reading it. read: returns a new array each time."""

    shape: Shape
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def then(self, function: Callable[[np.ndarray], np.ndarray], *, shape: Shape | None = None, dtype=None) -> Tensor:
        """The result of a function, applied when it is read. shape, dtype: of the result, if they differ."""
        shape = self.shape if shape is None else shape
        return Tensor(shape, self.dtype if dtype is None else np.dtype(dtype), lambda: function(self.read()))


Tensors = dict[str, Tensor]
"""By name."""


def of_array(array: np.ndarray) -> Tensor:
    """A tensor that is in memory."""
    return Tensor(array.shape, array.dtype, lambda: array)
