"""DistriConfig on a command line: the flags that the scripts and `python -m distrijax.plan` share."""

from __future__ import annotations

import argparse
import enum
from collections.abc import Container
from typing import Any

from distrijax.config import Compression, DistriConfig, Parallelism, SplitScheme, SyncMode


def _one_of(kind: type[enum.Enum], help: str) -> dict[str, Any]:
    return {"choices": tuple(member.value for member in kind), "help": f"{help} (default: %(default)s)"}


FLAGS: dict[str, dict[str, Any]] = {
    "warmup_steps": {"type": int, "help": "exact steps after the first (default: %(default)s)"},
    "sync_steps": {"type": int, "nargs": "+", "metavar": "STEP", "help": "further exact steps; -1 is the last"},
    "sync_mode": _one_of(SyncMode, "what devices exchange then"),
    "extrapolate": {"action": "store_true", "help": "devices publish predictions of their next step's values"},
    "compress": {
        "choices": tuple(kind.value for kind in Compression),
        "nargs": "?",
        "const": Compression.INT8.value,
        "help": "what keys and values travel as: int8, or int4",
    },
    "shard_weights": {
        "action": "store_true",
        "help": "each device keeps a share of the weights and gathers the rest",
    },
    "parallelism": _one_of(Parallelism, "how the UNet is divided"),
    "split_scheme": _one_of(SplitScheme, "cuts of naive_patch"),
    "split_batch": {
        "action": "store_false",
        "help": "give no half of the devices to each branch of the guidance",
    },
}
"""By the fields that they set; one that is true by default is unset by `--no-`."""


def add_config_flags(parser: argparse.ArgumentParser, *, without: Container[str] = ()) -> None:
    """All of them, but for those of some fields."""
    for name, settings in FLAGS.items():
        if name not in without:
            flag = ("no-" if settings.get("action") == "store_false" else "") + name.replace("_", "-")
            parser.add_argument(f"--{flag}", dest=name, default=getattr(DistriConfig, name), **settings)


def config_of(arguments: argparse.Namespace, **given: Any) -> DistriConfig:
    """What those flags say. given: further fields. Raises DistriError for what does not go together."""
    return DistriConfig(**{name: getattr(arguments, name) for name in FLAGS if hasattr(arguments, name)}, **given)


def settings_of(config: DistriConfig) -> dict[str, Any]:
    """What the flags would say of it, as JSON has it."""
    values = {name: getattr(config, name) for name in FLAGS}
    return {name: value.value if isinstance(value, enum.Enum) else value for name, value in values.items()}
