"""Schedulers, which take the latents from noise to image step by step: one frozen dataclass each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distrijax.errors import CheckpointError, InvalidArgument
from distrijax.schedulers.base import Scheduler, State
from distrijax.schedulers.ddim import DDIM
from distrijax.schedulers.dpm_solver import DPMSolverPP2M, MultistepState
from distrijax.schedulers.euler import Euler
from distrijax.schedulers.euler_ancestral import EulerAncestral
from distrijax.schedulers.lcm import LCM
from distrijax.schedulers.pndm import PNDM, PNDMState

__all__ = [
    "DDIM",
    "LCM",
    "PNDM",
    "SCHEDULERS",
    "DPMSolverPP2M",
    "Euler",
    "EulerAncestral",
    "MultistepState",
    "PNDMState",
    "Scheduler",
    "State",
    "load_scheduler",
    "with_class",
]

SCHEDULERS: dict[str, tuple[type[Scheduler], dict[str, Any]]] = {
    "ddim": (DDIM, {}),
    "euler": (Euler, {"use_karras_sigmas": False}),
    "euler-karras": (Euler, {"use_karras_sigmas": True}),
    "euler-trailing": (Euler, {"use_karras_sigmas": False, "timestep_spacing": "trailing"}),
    "euler-ancestral": (EulerAncestral, {}),
    "dpm++2m": (DPMSolverPP2M, {"use_karras_sigmas": False}),
    "dpm++2m-karras": (DPMSolverPP2M, {"use_karras_sigmas": True}),
    "pndm": (PNDM, {"skip_prk_steps": True}),
    "lcm": (LCM, {}),
}
"""The class and the options that each short name stands for."""

_SOLVER_OPTIONS = ("algorithm_type", "solver_type", "solver_order")
"""Options that choose between the variants of one solver. In another class they have another meaning, or none."""


def load_scheduler(
    config: Mapping[str, Any], name: str | None = None, options: Mapping[str, Any] | None = None
) -> Scheduler:
    """Creates the scheduler that a scheduler_config.json describes, or another class with its options.

    As in diffusers' `from_config`, a change of class keeps the options that both classes have. Options that the config does
    not set take the new class's default.

    Args:
        config: The content of a scheduler_config.json.
        name: One of `SCHEDULERS`; None takes the class that the config names in `_class_name`.
        options: Options that replace the config's, such as `timestep_spacing="trailing"`.

    Raises:
        CheckpointError: A class or a value is not supported.
        InvalidArgument: `name` or an option does not exist, or an option has another value than those allowed.
    """
    source = config.get("_class_name")
    if name is None:
        kind, decided = _class_named(source), {}
    elif name in SCHEDULERS:
        kind, decided = SCHEDULERS[name]
    else:
        raise InvalidArgument(f"scheduler is {name!r}; use one of: {', '.join(SCHEDULERS)}")
    if source != kind.diffusers_name:
        config = {key: value for key, value in config.items() if key not in _SOLVER_OPTIONS}
    options = options or {}
    for key in options:
        if key not in kind.options() - kind.ignored:
            allowed = ", ".join(sorted(kind.options() - kind.ignored))
            raise InvalidArgument(
                f"{key} is not an option that {kind.diffusers_name} uses; remove it or use: {allowed}"
            )
    config = {**config, **decided}
    try:
        return kind.from_config({**config, **options})
    except CheckpointError as error:
        kind.from_config(config)  # raises unless an option is to blame
        raise InvalidArgument(str(error)) from None


def _class_named(diffusers_name: Any) -> type[Scheduler]:
    """The class with that name in diffusers; raises CheckpointError if it is not supported."""
    classes = {kind.diffusers_name: kind for kind, _ in SCHEDULERS.values()}
    if diffusers_name not in classes:
        raise CheckpointError(
            f"the scheduler class is {diffusers_name!r}; supported: {', '.join(classes)}; or choose one of "
            f"{', '.join(SCHEDULERS)} instead"
        )
    return classes[diffusers_name]


def with_class(scheduler: Scheduler, name: str) -> Scheduler:
    """Returns another scheduler with the options of this one.

    Args:
        scheduler: A scheduler.
        name: One of `SCHEDULERS`.

    Raises:
        InvalidArgument: As `load_scheduler`.
    """
    return load_scheduler({**scheduler.to_config(), "_class_name": scheduler.diffusers_name}, name)
