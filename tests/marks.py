"""Which tests `pytest -m "not slow"` leaves out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

slow = pytest.mark.slow


def slow_but(quick: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """Parameters of a test, tuples where it has several, of which all but a few are slow."""
    quick = list(quick)
    return [case if case in quick else _slow(case) for case in cases]


def _slow(case: Any) -> Any:
    return pytest.param(*case, marks=slow) if isinstance(case, tuple) else pytest.param(case, marks=slow)
