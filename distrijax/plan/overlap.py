"""Communication/compute overlap of a scheduled HLO module: its collectives, and the kernels between their start and done.

XLA prints the instructions of a scheduled module in the order in which they are issued. A collective overlaps with compute
where it has a start and a done, and matmul kernels (dots, convolutions, attention) are issued between the two.

On TPUs, matmul fusions may carry a collective instead: each of them moves a part of it beside its own work. XLA writes the
collective into each of these fusions and marks the parts by a chain id. Only those fusions overlap with it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable

HLO_COLLECTIVES = ("all-gather", "all-reduce", "collective-permute", "all-to-all", "reduce-scatter")

_FREE = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "partition-id", "after-all", "iota")
"""Opcodes that launch no kernel."""

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(?:calls|to_apply|body)=%?([\w.\-]+)")
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w*)\[([\d,]*)\]")
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]+)\}|\[\d+,(\d+)\]|mesh\[([^\]]*)\] \{([^}]*)\})")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_CONVOLUTION = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_CYCLES = re.compile(r"\"estimated_cycles\":\"(\d+)\"")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_CHAIN = re.compile(r"chain_id=\"(\d+)\"")
_CUBLAS = re.compile(r"custom_call_target=\"__cublas.*?\"lhs_contracting_dimensions\":\[([^\]]*)\]")
_ATTENTION = re.compile(r"custom_call_target=\"[^\"]*fmha", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO.

    Attributes:
        name: Name of the result.
        shape: Type of the result as HLO writes it, for example `(bf16[8,16]{1,0}, u32[])`.
        opcode: For example `fusion` or `all-gather-start`.
        rest: The line after the opcode's opening parenthesis.
    """

    name: str
    shape: str
    opcode: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Names of the instructions whose results this one reads."""
        return _NAME.findall(self.rest[: _end(self.rest)])

    @property
    def called(self) -> list[str]:
        """Names of the computations that this instruction runs."""
        return _CALLED.findall(self.rest)

    @property
    def arrays(self) -> list[str]:
        """Arrays of the result, for example `bf16[2,128,1280]`."""
        return [f"{kind}[{sizes}]" for kind, sizes in _ARRAY.findall(self.shape)]


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A collective of a module.

    Attributes:
        kind: One of `HLO_COLLECTIVES`.
        arrays: Result arrays on one device.
        received: Bytes that one device receives; those of a ring for an all-reduce.
        start: Index of its start in the schedule.
        done: Index of its done; equal to `start` where the collective is synchronous.
        hidden_by: Names of the matmul kernels issued between start and done, or of those that carry it.
    """

    kind: str
    arrays: tuple[str, ...]
    received: int
    start: int
    done: int
    hidden_by: tuple[str, ...]

    @property
    def asynchronous(self) -> bool:
        return self.start < self.done


class HloProgram:
    """A scheduled HLO module, parsed from its text.

    Attributes:
        hlo: The text.
        computations: Instructions of each computation, by the computation's name.
        step: Instructions of the longest computation, which is the loop body where there is a loop.
    """

    def __init__(self, hlo: str):
        self.hlo = hlo
        self.computations: dict[str, list[Instruction]] = {}
        current: list[Instruction] = []
        for line in hlo.splitlines():
            if found := _INSTRUCTION.match(line):
                current.append(Instruction(*found.groups()))
            elif found := _COMPUTATION.match(line):
                current = self.computations.setdefault(found.group(1), [])
        self.step: list[Instruction] = max(self.computations.values(), key=len, default=[])
        self._by_name = {each.name: each for body in self.computations.values() for each in body}

    @functools.cached_property
    def transfers(self) -> list[Transfer]:
        """The collectives of `step`, ordered by their done."""
        places = {instruction.name: place for place, instruction in enumerate(self.step)}
        result = []
        chains: dict[str, list[tuple[int, Instruction]]] = {}
        for place, instruction in enumerate(self.step):
            if instruction.opcode in HLO_COLLECTIVES:
                result.append(self._transfer(instruction, place, place))
            elif instruction.opcode.endswith("-done"):
                start = places[instruction.operands[0]]
                if (collective := self._started(self.step[start])) is not None:
                    result.append(self._transfer(collective, start, place))
            elif instruction.opcode == "fusion":
                for collective in self._within(instruction):
                    chain = _CHAIN.search(collective.rest)
                    chains.setdefault(chain.group(1) if chain else collective.name, []).append((place, collective))
        result += map(self._carried, chains.values())
        return sorted(result, key=lambda transfer: transfer.done)

    def flops(self, instruction: Instruction) -> int:
        """Floating-point operations of the matmuls in an instruction; 0 where it has none.

        Args:
            instruction: Of this program; those that call others count with what they call, for each turn of a loop.
        """
        if instruction.opcode in ("fusion", "call", "while", "conditional"):
            inner = (each for name in instruction.called for each in self.computations.get(name, ()))
            return sum(map(self.flops, inner)) * self._turns(instruction)
        arrays = (self._by_name[name].arrays for name in instruction.operands)
        operands = [_sizes(each[0]) for each in arrays if each]
        if contracted := (_CONTRACTED if instruction.opcode == "dot" else _CUBLAS).search(instruction.rest):
            axes = contracted.group(1).replace('"', "")
            inner = math.prod(operands[0][int(axis)] for axis in axes.split(",") if axis)
            return 2 * math.prod(_sizes(instruction.arrays[0])) * inner
        if layouts := _CONVOLUTION.search(instruction.rest):
            return _convolution_flops(instruction, *layouts.groups(), operands)
        if instruction.opcode == "custom-call" and _ATTENTION.search(instruction.rest):
            query, key = operands[:2]
            return 4 * math.prod(query) * key[1]
        return 0

    def cycles(self, computation: str | None = None) -> int:
        """Cycles of a computation's kernels, by the estimates that libtpu writes beside them.

        Args:
            computation: Its name; None stands for `step`.
        """
        total = 0
        for instruction in self.step if computation is None else self.computations[computation]:
            if instruction.opcode == "while":
                total += self._turns(instruction) * sum(map(self.cycles, instruction.called))
            elif estimate := _CYCLES.search(instruction.rest):
                total += int(estimate.group(1))
        return total

    def _turns(self, instruction: Instruction) -> int:
        """How often an instruction's computations run; a loop counts up to the constant that its condition compares with."""
        if instruction.opcode != "while":
            return 1
        condition = self.computations[_CONDITION.search(instruction.rest).group(1)]
        return max((int(each.rest.split(")")[0]) for each in condition if each.opcode == "constant"), default=1)

    def moved(self, instruction: Instruction) -> int:
        """Bytes that an instruction's kernel reads and writes; 0 where the instruction has no kernel.

        Args:
            instruction: Of this program.
        """
        if instruction.opcode in _FREE or instruction.opcode.endswith(("-start", "-done")):
            return 0
        read = [array for name in instruction.operands for array in self._by_name[name].arrays]
        # the arrays after a library kernel's result are its scratch memory
        written = instruction.arrays[:1] if instruction.opcode == "custom-call" else instruction.arrays
        return sum(map(array_bytes, [*written, *read]))

    def _started(self, start: Instruction) -> Instruction | None:
        """The collective that an asynchronous start begins: itself, or the one it wraps; None for another instruction."""
        if start.opcode.removesuffix("-start") in HLO_COLLECTIVES:
            return start
        inner = [each for name in start.called for each in self.computations.get(name, ())]
        return next((each for each in inner if each.opcode in HLO_COLLECTIVES), None)

    def _within(self, fusion: Instruction) -> list[Instruction]:
        """The collectives in a fusion and in the fusions nested in it."""
        inner = [each for name in fusion.called for each in self.computations.get(name, ())]
        deeper = [found for each in inner if each.opcode == "fusion" for found in self._within(each)]
        return [each for each in inner if each.opcode in HLO_COLLECTIVES] + deeper

    def _carried(self, chain: list[tuple[int, Instruction]]) -> Transfer:
        """The collective that a chain of fusions begins, carries and ends.

        Args:
            chain: For each fusion its index in `step`, and its part of the collective.
        """
        (start, collective), (done, _) = chain[0], chain[-1]
        hidden_by = tuple(self.step[place].name for place, _ in chain if self.flops(self.step[place]))
        transfer = self._transfer(collective, start, done, collective.arrays)
        return dataclasses.replace(transfer, hidden_by=hidden_by)

    def _transfer(
        self, collective: Instruction, start: int, done: int, arrays: Iterable[str] | None = None
    ) -> Transfer:
        """A `Transfer` between two indices of `step`; its arrays are those of the instruction at `done` unless given."""
        kind = collective.opcode.removesuffix("-start")
        arrays = tuple(self.step[done].arrays if arrays is None else arrays)
        n = _group(collective)
        part = {"collective-permute": 1.0, "all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1.0}.get(
            kind, (n - 1) / n
        )
        hidden_by = tuple(each.name for each in self.step[start + 1 : done] if self.flops(each))
        return Transfer(kind, arrays, round(part * sum(map(array_bytes, arrays))), start, done, hidden_by)


def _convolution_flops(
    instruction: Instruction, image: str, kernel: str, output: str, operands: list[list[int]]
) -> int:
    """Floating-point operations of a convolution.

    Args:
        instruction: XLA's convolution, or a library's.
        image: Labels of the image's axes, for example `b01f`.
        kernel: Labels of the kernel's axes, for example `01io`.
        output: Labels of the result's axes.
        operands: Sizes of the operands.
    """
    result = _sizes(instruction.arrays[0])
    if instruction.opcode != "convolution":  # a library's kernel, which states no window
        per_output = math.prod(size for size, label in zip(operands[1], kernel, strict=True) if label != "o")
        return 2 * math.prod(result) * per_output
    windows = _windows(instruction.rest, sum(label.isdigit() for label in kernel))
    labelled = ((image, operands[0]), (kernel, operands[1]), (output, result))
    sizes = [dict(zip(labels, of, strict=True)) for labels, of in labelled]
    spatial = (_tap_pairs(window, *(each[str(axis)] for each in sizes)) for axis, window in enumerate(windows))
    return 2 * sizes[2]["b"] * sizes[2]["f"] * sizes[1]["i"] * math.prod(spatial)


def array_bytes(array: str) -> int:
    """Bytes of an array.

    Args:
        array: As HLO writes it, for example `bf16[2,128,1280]`.
    """
    kind, _ = _ARRAY.fullmatch(array).groups()
    bits = 8 if kind == "pred" else int(re.search(r"\d+", kind).group())
    return math.prod(_sizes(array)) * bits // 8


def _sizes(array: str) -> list[int]:
    return [int(size) for size in array[array.index("[") + 1 : -1].split(",") if size]


def _windows(rest: str, axes: int) -> list[dict[str, str]]:
    """The window of each spatial axis of a convolution, for example `{"size": "3", "stride": "2", "pad": "1_1"}`."""
    found = _WINDOW.search(rest)
    keys = (part.split("=") for part in found.group(1).split()) if found else ()
    columns = {key: values.split("x") for key, values in keys}
    return [{key: values[axis] for key, values in columns.items()} for axis in range(axes)]


def _tap_pairs(window: dict[str, str], image: int, kernel: int, output: int) -> int:
    """Counts, on one axis, the pairs of an output and a kernel tap that meet a pixel: neither padding nor a dilation hole.

    XLA for TPUs writes batch axes as spatial axes on which each output meets only its own pixel.
    """
    stride, hole, apart = (int(window.get(key, 1)) for key in ("stride", "lhs_dilate", "rhs_dilate"))
    before = int(window.get("pad", "0_0").split("_")[0])
    places = (place * stride + tap * apart - before for place in range(output) for tap in range(kernel))
    return sum(place % hole == 0 and 0 <= place < image * hole for place in places)


def _group(collective: Instruction) -> int:
    """Devices in each group of a collective, from any of the three notations that XLA uses for groups."""
    found = _GROUPS.search(collective.rest)
    if found is None:
        return 1
    listed, counted, mesh, axes = found.groups()
    if mesh is not None:
        sizes = dict(part.split("=") for part in mesh.split(","))
        return math.prod(int(sizes[axis]) for axis in axes.split(","))
    return len(listed.split(",")) if listed else int(counted)


def _end(rest: str) -> int:
    """Index at which the operands end: the parenthesis that closes the opcode's."""
    depth = 1
    for place, character in enumerate(rest):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return place
    return len(rest)
