"""The progress bar of a conversion, by bytes of tensors that were read."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from tqdm import tqdm

from distrijax.weights.checkpoint import Checkpoint


@contextmanager
def with_progress(checkpoint: Checkpoint, what: str) -> Iterator[Checkpoint]:
    """The checkpoint, with a bar named `what` of the bytes that were read of it; none where stderr is no terminal."""
    total = sum(tensor.nbytes for tensors in checkpoint.tensors.values() for tensor in tensors.values())
    with tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=not sys.stderr.isatty(), leave=False) as bar:

        def advance(array: np.ndarray) -> np.ndarray:
            bar.update(array.nbytes)
            return array

        tensors = {
            part: {name: tensor.then(advance) for name, tensor in held.items()}
            for part, held in checkpoint.tensors.items()
        }
        yield dataclasses.replace(checkpoint, tensors=tensors)
