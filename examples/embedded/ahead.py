"""Batches drawn ahead by other processes, for machines with more cores than the training itself keeps busy."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

Made = TypeVar("Made")
AHEAD = 4  # of each process


def ahead(make: Callable[[int], Made], steps: Iterable[int], workers: int) -> Iterator[Made]:
    """`make` of each step, in order. workers: processes that make them, none for this one; `make` has to be picklable then."""
    if not workers:
        yield from map(make, steps)
        return
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    waiting = deque()
    try:
        for step in steps:
            waiting.append(pool.submit(make, step))
            if len(waiting) > AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
