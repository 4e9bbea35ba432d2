"""Schedulers: how the latents go from noise to image, one frozen dataclass each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distrijax.errors import DistriError
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
"""Short names: the class, and the options that the name decides."""

_METHOD = ("algorithm_type", "solver_type", "solver_order")
"""Options that tell one solver's variants apart, and mean another thing, or nothing, in another class."""


def load_scheduler(
    config: Mapping[str, Any], name: str | None = None, options: Mapping[str, Any] | None = None
) -> Scheduler:
    """The scheduler that a scheduler_config.json describes, or another class with its options.

    name: one of `SCHEDULERS`; None takes the class that the config names in `_class_name`. A change of class keeps the
        options that both have, and takes the new class's default for those the config leaves out, as diffusers'
        `from_config` does.
    options: what a caller wants instead of the config's, such as timestep_spacing="trailing".
    Raises DistriError for a class, an option or a value that is not supported.
    """
    source = config.get("_class_name")
    if name is None:
        kind, decided = _class_named(source), {}
    elif name in SCHEDULERS:
        kind, decided = SCHEDULERS[name]
    else:
        raise DistriError(f"scheduler is {name!r}; use one of: {', '.join(SCHEDULERS)}")
    if source != kind.diffusers_name:
        config = {key: value for key, value in config.items() if key not in _METHOD}
    options = options or {}
    for key in options:
        if key not in kind.options() - kind.idle:
            allowed = ", ".join(sorted(kind.options() - kind.idle))
            raise DistriError(f"{key} is no option that {kind.diffusers_name} heeds; leave it out or use: {allowed}")
    return kind.from_config({**config, **decided, **options})


def _class_named(diffusers_name: Any) -> type[Scheduler]:
    classes = {kind.diffusers_name: kind for kind, _ in SCHEDULERS.values()}
    if diffusers_name not in classes:
        raise DistriError(
            f"the scheduler class is {diffusers_name!r}; supported: {', '.join(classes)}; or put one of "
            f"{', '.join(SCHEDULERS)} in its place"
        )
    return classes[diffusers_name]


def with_class(scheduler: Scheduler, name: str) -> Scheduler:
    """The scheduler called `name`, one of `SCHEDULERS`, with the options of this one; raises like `load_scheduler`."""
    return load_scheduler({**scheduler.to_config(), "_class_name": scheduler.diffusers_name}, name)
