"""What a message must hold: the facts (names, values, files, limits), in whatever words and order it gives them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from distrijax import DistriError, DistriWarning

Fact = str | int | float | re.Pattern[str]
"""A text that stands by itself, so that 2 is not found in 12, 0.2, 2.5, -2 or int2; or a pattern."""


def says(text: str, *facts: Fact) -> None:
    """Fails unless every fact occurs in the text."""
    missing = [fact for fact in facts if not re.search(_pattern(fact), text)]
    assert not missing, f"{text!r} does not tell {missing}"


@contextmanager
def refuses(*facts: Fact, error: type[BaseException] = DistriError) -> Iterator[pytest.ExceptionInfo]:
    """Like `pytest.raises`; the error must be one line that tells the facts. A SystemExit must begin with `error: `."""
    with pytest.raises(error) as caught:
        yield caught
    message = str(caught.value)
    assert "\n" not in message, f"more than a line: {message!r}"
    assert error is not SystemExit or message.startswith("error: "), message
    says(message, *facts)


@contextmanager
def warns(*facts: Fact, warning: type[Warning] = DistriWarning) -> Iterator[pytest.WarningsRecorder]:
    """Like `pytest.warns`: one of the warnings must tell all facts. Others are passed on, and fail the test."""
    told = "".join(f"(?=.*?{_pattern(fact)})" for fact in facts)
    with pytest.warns(warning, match=f"(?s)^{told}") as caught:
        yield caught


def one_sentence(message: str, *, longest: int = 400) -> None:
    """Fails unless an error has the form that all have: a printable line that goes on, after what is wrong, with what to do."""
    assert message.isprintable() and 20 < len(message) < longest, message
    assert re.search(r"[;.] \w", message), f"{message!r} does not say what to do"
    assert not re.search(r"Traceback|<class|object at 0x", message), message


def _pattern(fact: Fact) -> str:
    """A regular expression: of a text, that it is no part of a longer word or number."""
    if isinstance(fact, re.Pattern):
        return fact.pattern
    text = str(fact)
    before = r"(?<![\w-])(?<!\d\.)" if text[0].isdigit() else r"(?<!\w)" if text[0].isalpha() or text[0] == "_" else ""
    after = r"(?!\w)(?!\.\d)" if text[-1].isdigit() else r"(?!\w)" if text[-1].isalpha() or text[-1] == "_" else ""
    return before + re.escape(text) + after
