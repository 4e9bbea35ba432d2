"""How far a conversion is: a bar that grows with each tensor that is read."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from tqdm import tqdm

from distrijax.convert.checkpoint import Checkpoint
from distrijax.convert.tensors import Tensor


@contextmanager
def watched(checkpoint: Checkpoint, what: str) -> Iterator[Checkpoint]:
    """The checkpoint, with a bar named `what` of the bytes that were read of it; none where stderr is no terminal."""
    total = sum(tensor.nbytes for tensors in checkpoint.tensors.values() for tensor in tensors.values())
    with tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=not sys.stderr.isatty(), leave=False) as bar:

        def seen(tensor: Tensor) -> Tensor:
            def tell(array: np.ndarray) -> np.ndarray:
                bar.update(tensor.nbytes)
                return array

            return tensor.then(tell)

        tensors = {
            part: {name: seen(tensor) for name, tensor in held.items()} for part, held in checkpoint.tensors.items()
        }
        yield dataclasses.replace(checkpoint, tensors=tensors)
