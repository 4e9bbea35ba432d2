"""Which tests `pytest -m "not slow"` leaves out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

slow = pytest.mark.slow


def slow_but(quick: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """Parameters of a test of which all but a few are slow."""
    quick = list(quick)
    return [case if case in quick else pytest.param(case, marks=slow) for case in cases]
