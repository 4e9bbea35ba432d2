"""How much memory JSON may take once it is read, told before it is: a list of empty lists takes thirty times its bytes."""

from __future__ import annotations

import re
from itertools import islice

TOKENS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?+\s*+:?|[,\[{]', re.DOTALL)
"""Keys, texts, and what values begin behind."""

ENTRY, KEY, VALUE = 900, 250, 64
"""Bytes that a tensor of a safetensors header takes in the library and here, any other key with its value, and any other value."""

KEYS, VALUES = 4, 9
"""Of such a tensor."""

WIDE = re.compile(rb"[\xf0-\xf4]|\\u[dD]")
"""What makes Python keep a text four bytes a character."""


def json_cost(text: bytes, most: int) -> int:
    """Bytes of memory, `text` and a copy of it among them; what is more than `most` isn't counted to its end."""
    keys = values = tensors = 0
    for token in islice(TOKENS.finditer(text), max(0, most) // VALUE + 1):  # none takes less
        key = token[0][-1:] == b":"
        keys, values, tensors = keys + key, values + (not key), tensors + (token[0] == b'"dtype":')
    width = 4 if WIDE.search(text) else 1 if text.isascii() and b"\\u" not in text else 2
    rest = max(0, keys - KEYS * tensors) * KEY + max(0, values - VALUES * tensors) * VALUE
    return len(text) * (1 + 2 * width) + ENTRY * tensors + rest
