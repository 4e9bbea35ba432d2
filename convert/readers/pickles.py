"""A pickle read as data: a machine for its instructions that calls nothing, imports nothing and builds no object.

A pickle is a program for a stack machine, and may name any function of the machine it is opened on, to be called. Here a name
stays a name (`Named`), a call is a note of what would have been called with what (`Call`), and that is what torch's files are
made of: notes of how tensors lie in storages. Nothing else is needed of them.
"""

from __future__ import annotations

import dataclasses
import pickletools
import sys
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

INSTRUCTIONS = 1_000_000
"""Of one pickle. Those of a whole SDXL are 0.1 million; each may take a hundred bytes of memory."""

LENGTH = 16 << 20
"""Bytes of one pickle, tensors' data not among them. Those of a whole SDXL are 0.5 MB."""

NUMBERS = 2**32
"""Numbers that are keys. Among larger ones there are many of one hash, with which dictionaries take forever."""

LONG = 1 << 16
"""Bytes of a text above which it is counted before it is read: it may take five times as many then."""

LINE = 1 << 16
"""Bytes of a line, of which the oldest pickles are made."""

SLOT, ITEM, CALLED = 24, 100, 160
"""Bytes of memory that a place on the stack takes (and in a copy of what is above a mark), an item of a dictionary, and what a call
becomes."""

COSTS = {
    **dict.fromkeys("PUT BINPUT LONG_BINPUT MEMOIZE".split(), 90),
    **dict.fromkeys("EMPTY_DICT EMPTY_LIST TUPLE TUPLE1 TUPLE2 TUPLE3 LIST DICT BINPERSID FLOAT BINFLOAT".split(), 64),
    **dict.fromkeys("GLOBAL STACK_GLOBAL INST".split(), 160),
}
"""Bytes of memory that instructions take. None of it is counted as given back."""

SHARED = range(-5, 257)
"""Numbers of which Python has one each."""

NAME = 1000
"""Characters of a function's name. It may be named again at the cost of a few bytes."""

HARMLESS = (
    "argparse _codecs collections datetime diffusers ldm lightning lightning_fabric lightning_utilities numpy omegaconf pathlib "
    "pytorch_lightning sgm torch torchmetrics transformers typing"
).split()
"""Packages whose classes turn up in checkpoints of trainers. They too are but names here."""

HARMLESS_BUILTINS = (
    "bool bytearray bytes complex dict float frozenset int list object range set slice str tuple".split()
)


class Named(NamedTuple):
    """A function or class that the pickle names."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Call(NamedTuple):
    """A call that was not made."""

    function: Named
    arguments: tuple


class Persistent(NamedTuple):
    """What the pickle says of something outside it: in torch's files, of a storage."""

    description: Any


class Unknown:
    """A value that nobody needs: an object, a set, an extension."""


UNKNOWN = Unknown()
_MARK = Unknown()
_PARAMETERS = Unknown()


class Hostile(ValueError):
    """The pickle names something that no checkpoint needs. The message says what."""


@dataclasses.dataclass
class _Limited:
    """A file from which no more than a pickle's length can be read, however long a string in it claims to be.

    Memory for a string is taken before it is read, so it may not be longer than what is left either.
    """

    file: BinaryIO
    left: int
    spend: Callable[[int], None]

    def read(self, count: int) -> bytes:
        return self._counted(self.file.read(self._allowed(count)))

    def readline(self) -> bytes:
        return self._counted(self.file.readline(self._allowed(min(self.left, LINE))))

    def _allowed(self, count: int) -> int:
        if not 0 <= count <= self.left:
            raise ValueError(f"it is cut off, or longer than {LENGTH} bytes")
        if count > LONG:
            self.spend(5 * count)
        return count

    def _counted(self, data: bytes) -> bytes:
        self.left -= len(data)
        return data


def read_pickle(
    file: BinaryIO, size: int, spend: Callable[[int], None], convert: Callable[[Call], Any] = lambda call: call
) -> Any:
    """The value of the pickle that begins here; the file is left at its end.

    size: bytes that there are at most. spend: is told of memory that is taken, and raises where it is too much. convert: what to
    make of a call. Raises Hostile, or ValueError (and what is not a pickle may raise others of Python's `LookupError`,
    `TypeError`, `AttributeError`) for what is no whole pickle.
    """
    machine = _Machine(convert, spend)
    for count, (instruction, argument, _) in enumerate(pickletools.genops(_Limited(file, min(size, LENGTH), spend))):
        if count >= INSTRUCTIONS:
            raise ValueError(f"it has more than {INSTRUCTIONS} instructions")
        if instruction.name == "STOP":
            break
        machine.step(instruction.name, argument)
    return machine.pop()


class _Machine:
    """The stack and the memo. Dictionaries keep only what is named by strings and numbers."""

    def __init__(self, convert: Callable[[Call], Any], spend: Callable[[int], None]):
        self.convert, self.spend = convert, spend
        self.highest = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, instruction: str, argument: Any) -> None:
        self.spend(COSTS.get(instruction, 0) + SLOT * max(0, len(self.stack) - self.highest))
        self.highest = max(self.highest, len(self.stack))
        if instruction in _VALUES:
            self.spend(0 if argument in SHARED else sys.getsizeof(argument))
            self.stack.append(argument)
        elif (action := _ACTIONS.get(instruction)) is not None:
            action(self, argument)
        elif instruction not in ("PROTO", "FRAME"):
            raise ValueError(f"its instruction {instruction} is none that checkpoints have")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise ValueError("its stack is empty")
        return self.stack.pop()

    def popped(self, count: int) -> tuple:
        return tuple(reversed([self.pop() for _ in range(count)]))

    def to_mark(self) -> list[Any]:
        """What lies above the last mark, which goes too."""
        values = []
        while self.stack and self.stack[-1] is not _MARK:
            values.append(self.stack.pop())
        if not self.stack:
            raise ValueError("its stack has no mark")
        self.stack.pop()
        self.spend(8 * len(values))
        return values[::-1]

    def top(self, kind: type) -> Any:
        """The container on the stack, or a throw-away one where it is something that nobody needs."""
        return self.stack[-1] if self.stack and isinstance(self.stack[-1], kind) else kind()

    def put(self, number: int) -> None:
        if not self.stack or self.stack[-1] is _MARK:
            raise ValueError("its stack is empty")
        if not 0 <= number < NUMBERS:
            raise ValueError(f"it stores number {number}")
        self.memo[number] = self.stack[-1]

    def get(self, number: int) -> None:
        if number not in self.memo:
            raise ValueError(f"it wants back number {number}, which it never stored")
        self.push(self.memo[number])

    def items(self, values: list[Any]) -> dict:
        if len(values) % 2:
            raise ValueError("a key has no value")
        self.spend(ITEM * len(values) // 2)
        return {key: value for key, value in zip(values[::2], values[1::2], strict=True) if _is_key(key)}

    def name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a name is no text")
        if len(module) + len(name) > NAME:
            raise ValueError(f"a name has {len(module) + len(name)} characters")
        allowed = name in HARMLESS_BUILTINS if module in ("builtins", "__builtin__") else _package(module) in HARMLESS
        if not allowed:
            raise Hostile(f"{module}.{name}"[:120])
        self.push(Named(module, name))

    def make(self, kind: Any) -> None:
        """An object, of which nothing is known but its class (which older files name with its source text)."""
        if isinstance(kind, Persistent) and isinstance(kind.description, tuple) and len(kind.description) > 1:
            kind = kind.description[1]
        self.push(_PARAMETERS if kind == PARAMETERS else UNKNOWN)

    def build(self, state: Any) -> None:
        """The attributes of the object on the stack. Of a dictionary of parameters, one of them holds the parameters."""
        if self.stack and self.stack[-1] is _PARAMETERS and isinstance(state, dict):
            self.stack[-1] = state.get("_parameters")

    def call(self, function: Any, arguments: Any) -> None:
        if not isinstance(function, Named) or not isinstance(arguments, tuple):
            self.push(UNKNOWN)
        else:
            self.spend(CALLED)
            self.push({} if function == ORDERED else self.convert(Call(function, arguments)))


ORDERED = Named("collections", "OrderedDict")
PARAMETERS = Named("torch.nn.modules.container", "ParameterDict")


def _is_key(key: Any) -> bool:
    return type(key) is str or (type(key) is int and 0 <= key < NUMBERS)


def _package(module: str) -> str:
    return module.partition(".")[0]


_VALUES = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split()
)
"""Instructions that push their argument."""

_ACTIONS: dict[str, Callable[[_Machine, Any], Any]] = {
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "MARK": lambda machine, _: machine.push(_MARK),
    "POP": lambda machine, _: machine.stack.pop() if machine.stack else machine.pop(),
    "POP_MARK": lambda machine, _: machine.to_mark(),
    "DUP": lambda machine, _: machine.stack.extend(machine.popped(1) * 2),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.to_mark())),
    "TUPLE1": lambda machine, _: machine.push(machine.popped(1)),
    "TUPLE2": lambda machine, _: machine.push(machine.popped(2)),
    "TUPLE3": lambda machine, _: machine.push(machine.popped(3)),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "LIST": lambda machine, _: machine.push(machine.to_mark()),
    "APPEND": lambda machine, _: (lambda value: machine.top(list).append(value))(machine.pop()),
    "APPENDS": lambda machine, _: (lambda values: machine.top(list).extend(values))(machine.to_mark()),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "DICT": lambda machine, _: machine.push(machine.items(machine.to_mark())),
    "SETITEM": lambda machine, _: (lambda item: machine.top(dict).update(machine.items(item)))([*machine.popped(2)]),
    "SETITEMS": lambda machine, _: (lambda items: machine.top(dict).update(machine.items(items)))(machine.to_mark()),
    "EMPTY_SET": lambda machine, _: machine.push(UNKNOWN),
    "ADDITEMS": lambda machine, _: machine.to_mark(),
    "FROZENSET": lambda machine, _: (machine.to_mark(), machine.push(UNKNOWN)),
    "GET": lambda machine, number: machine.get(number),
    "BINGET": lambda machine, number: machine.get(number),
    "LONG_BINGET": lambda machine, number: machine.get(number),
    "PUT": lambda machine, number: machine.put(number),
    "BINPUT": lambda machine, number: machine.put(number),
    "LONG_BINPUT": lambda machine, number: machine.put(number),
    "MEMOIZE": lambda machine, _: machine.put(len(machine.memo)),
    "GLOBAL": lambda machine, name: machine.name(*name.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.name(*machine.popped(2)),
    "REDUCE": lambda machine, _: machine.call(*machine.popped(2)),
    "BUILD": lambda machine, _: machine.build(machine.pop()),
    "NEWOBJ": lambda machine, _: machine.make(machine.popped(2)[0]),
    "NEWOBJ_EX": lambda machine, _: (machine.popped(3), machine.push(UNKNOWN)),
    "INST": lambda machine, name: (machine.name(*name.split(" ", 1)), machine.to_mark(), machine.push(UNKNOWN)),
    "OBJ": lambda machine, _: (machine.to_mark(), machine.push(UNKNOWN)),
    "BINPERSID": lambda machine, _: machine.push(Persistent(machine.pop())),
}
