"""LoRA and related adapters, merged into a checkpoint's weights one by one as they are read.

names of the adapter -> module and role -> tensor of the checkpoint -> checked -> Change, merged with others when read
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from distrijax.convert.adapters.lora_names import FOREIGN, Key, Target, is_pefts, read_key, spellings
from distrijax.convert.adapters.lora_settings import PEFT_SETTINGS, Settings, read_settings
from distrijax.convert.adapters.merging import COMMON, Change, fits, lengths_fit, merged
from distrijax.convert.engine import Problems
from distrijax.convert.kinds import recognise
from distrijax.errors import CheckpointError, InvalidArgument, warn
from distrijax.weights.checkpoint import Checkpoint
from distrijax.weights.files import summary
from distrijax.weights.names import shown
from distrijax.weights.tensors import Shape, Tensor, Tensors

SUPPORTED = "LoRA, LoCon, LoHa, LoKr and whole differences, with or without DoRA"


@dataclasses.dataclass(frozen=True, eq=False)
class Lora:
    """An adapter.

    what: the file, for errors. weight: the factor of its change; 1 is what it was trained for. metadata: of the safetensors
    file, where diffusers writes PEFT's settings (`lora_adapter_metadata`), or those settings, PEFT's adapter_config.json.
    Raises InvalidArgument for a weight that is not a finite number.
    """

    tensors: Tensors
    what: str
    weight: float = 1.0
    metadata: Mapping[str, Any] | None = None

    def __post_init__(self):
        if isinstance(self.weight, bool) or not isinstance(self.weight, int | float) or not math.isfinite(self.weight):
            raise InvalidArgument(f"the weight of {self.what} is {self.weight!r}; give a number such as 1.0")


Changes = dict[Target, Change]


def with_loras(checkpoint: Checkpoint, loras: Sequence[Lora]) -> Checkpoint:
    """The checkpoint with adapters merged into its UNet and text encoders in float32, each weight when it is read.

    Each adapter changes the weights as they were without the others, so their order does not matter. That, and the effect of
    an adapter's weight with DoRA, is as in diffusers, whose layers add the adapters' outputs and do not merge them.
    Raises one CheckpointError for each adapter of another kind, and one that lists all of its tensors that have no place in the
    checkpoint, lack a counterpart, come twice, or have another shape.
    """
    changes: dict[Target, list[Change]] = {}
    known = spellings(checkpoint) if loras else {}
    for lora in loras:
        for target, change in _changes(lora, checkpoint, known).items():
            changes.setdefault(target, []).append(change)
    tensors = {part: dict(held) for part, held in checkpoint.tensors.items()}
    for target, all_ in changes.items():
        tensors[target.part][target.name] = merged(tensors[target.part][target.name], all_)
    return dataclasses.replace(checkpoint, tensors=tensors)


def _changes(lora: Lora, checkpoint: Checkpoint, known: Mapping[tuple[str, str], list[Target]]) -> Changes:
    """What one adapter changes, by the tensor that it changes."""
    problems: Problems = {}
    found: dict[Target, Change] = {}
    for (module, leaf), factors in _modules(lora, problems).items():
        change = _change(lora, module, factors, problems)
        target = change and _target(known.get((module, leaf), ()), module, change, checkpoint, problems)
        if target in found:
            problems.setdefault("duplicate", []).append(module)
        elif target:
            found[target] = change
    if problems:
        raise CheckpointError(
            f"{lora.what} does not fit the model; give a LoRA that was trained for one of its kind: {summary(problems)}"
        )
    # some trainers write a module in both layouts; diffusers' own comes last and is taken, as in diffusers
    ordered = sorted(found.items(), key=lambda item: not item[0].original)
    settings = read_settings(lora.metadata, lora.what)
    if is_pefts(lora.tensors) and not settings and not any("alpha" in each.factors for each in found.values()):
        warn(
            f"{lora.what} is PEFT's and has no {PEFT_SETTINGS} beside it, which holds its alpha; it is merged as if alpha were its "
            "rank: put that file there, or give another weight"
        )
    applied = {}
    for target, change in ordered:
        held = settings.get(target.part, Settings())
        applied[target._replace(original=False)] = held.applied(change, target.name.rpartition(".")[0])
    return applied


def _modules(lora: Lora, problems: Problems) -> dict[tuple[str, str], dict[str, tuple[Key, Tensor]]]:
    """The tensors of each module, by role. Raises CheckpointError for a file that is not a LoRA, or of another method."""
    for name in lora.tensors:
        if method := next((method for method, pattern in FOREIGN.items() if re.search(pattern, name, re.ASCII)), None):
            raise CheckpointError(
                f"{lora.what} is {method} ({shown(name)}), which is not supported; use one of: {SUPPORTED}"
            )
    if not any(map(read_key, lora.tensors)):
        kind = recognise(lora.tensors, lora.what)
        raise CheckpointError(
            f"{lora.what} is {kind} and has no tensor named as in {SUPPORTED}; give a file of one of those"
        )
    modules: dict[tuple[str, str], dict[str, tuple[Key, Tensor]]] = {}
    for name, tensor in lora.tensors.items():
        key = read_key(name)
        if key is None:
            problems.setdefault("unknown", []).append(name)
            continue
        roles = modules.setdefault((key.module, key.leaf), {})
        if key.role in roles:
            problems.setdefault("duplicate", []).append(name)
        roles[key.role] = key, tensor
    return modules


def _change(lora: Lora, module: str, factors: dict[str, tuple[Key, Tensor]], problems: Problems) -> Change | None:
    """The change that a module's tensors make; None, and a problem, for an incomplete one."""
    methods = {key.method for key, _ in factors.values()} - {None}
    tensors = {role: tensor for role, (_, tensor) in factors.items()}
    method = methods.pop() if len(methods) == 1 else None
    if method is None:
        kind = "of several methods" if methods else "without factors"
        problems.setdefault(kind, []).append(module)
        return None
    roles = frozenset(tensors) - COMMON
    if roles not in method.roles:
        absent = method.absent(roles) or {"other factors"}
        problems.setdefault("incomplete", []).append(f"{module} lacks {' and '.join(sorted(absent))}")
        return None
    if "alpha" in tensors and tensors["alpha"].size != 1:
        problems.setdefault("of the wrong shape", []).append(f"alpha of {module} is {list(tensors['alpha'].shape)}")
        return None
    if "magnitude" in tensors:  # flat, which tells it from LyCORIS' lengths of the inputs
        size = tensors["magnitude"].size
        tensors["magnitude"] = tensors["magnitude"].then(lambda array: array.reshape(-1), shape=(size,))
    return Change(method, tensors, float(lora.weight), what=lora.what)


def _target(
    found: Sequence[Target], module: str, change: Change, checkpoint: Checkpoint, problems: Problems
) -> Target | None:
    """The tensor that a change fits; None, and a problem, where there is none or more than one."""
    shape = change.method.shape({role: tensor.shape for role, tensor in change.factors.items()})
    if shape is None:
        factors = (f"{role} {list(tensor.shape)}" for role, tensor in change.factors.items() if role not in COMMON)
        problems.setdefault("of the wrong shape", []).append(f"{module} has {' and '.join(factors)}")
        return None
    shapes = {target: checkpoint.tensors[target.part][target.name].shape for target in found}
    fitting = [target for target in found if _fits(shape, change, shapes[target])]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        parts = " and ".join(sorted(target.part for target in fitting))
        problems.setdefault("ambiguous", []).append(f"{module} is in {parts}")
    elif found:
        needed = " or ".join(str(list(held)) for held in shapes.values())
        problems.setdefault("of the wrong shape", []).append(
            f"{module} changes {list(shape)} and the model has {needed}"
        )
    else:
        problems.setdefault("unknown", []).append(module)
    return None


def _fits(shape: Shape, change: Change, weight: Shape) -> bool:
    return fits(shape, weight) and all(
        lengths_fit(role, change.factors[role].shape, weight)
        for role in ("dora_scale", "magnitude")
        if role in change.factors
    )
