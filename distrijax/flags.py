"""The fields of DistriConfig as flags, which all command lines share."""

from __future__ import annotations

import argparse
import enum
from collections.abc import Container, Sequence
from typing import Any

from distrijax.config import Compression, DistriConfig, Parallelism, SplitScheme, SyncMode, check_large
from distrijax.errors import DistriError


def _one_of(kind: type[enum.Enum], help: str) -> dict[str, Any]:
    """Settings of a flag that takes a member of an enumeration."""
    return {"choices": tuple(member.value for member in kind), "help": f"{help} (default: %(default)s)"}


FLAGS: dict[str, dict[str, Any]] = {
    "warmup_steps": {"type": int, "help": "synchronous steps after the first (default: %(default)s)"},
    "sync_steps": {"type": int, "nargs": "+", "metavar": "STEP", "help": "further synchronous steps; -1 is the last"},
    "sync_mode": _one_of(
        SyncMode,
        "what a step after the warm-up reads of other patches. full_sync: values of the same step. async_tokens: keys and "
        "values of the previous step. sync_gn: its halos too. stale_gn, damped_async_gn, corrected_async_gn: its moments too, "
        "with the own patch's share, half or all of the own change. separate_gn: no moments. no_sync: values of the warm-up "
        "and no moments",
    ),
    "extrapolate": {"action": "store_true", "help": "publish predictions of the next step's values"},
    "compress": {
        "choices": tuple(kind.value for kind in Compression),
        "nargs": "?",
        "const": Compression.INT8.value,
        "help": "compress keys and values for transfer: int8, or int4",
    },
    "shard_weights": {
        "action": "store_true",
        "help": "hold a share of the weights on each device and all-gather the rest",
    },
    "parallelism": _one_of(Parallelism, "how the UNet is divided"),
    "split_scheme": _one_of(SplitScheme, "how naive_patch divides the image"),
    "split_batch": {
        "action": "store_false",
        "help": "do not run each guidance branch on half of the devices",
    },
}
"""argparse's settings of each field's flag. A field that is true by default has the flag `--no-` with its name."""


def add_config_flags(parser: argparse.ArgumentParser, *, without: Container[str] = ()) -> None:
    """Adds a flag for each field of a configuration.

    Args:
        parser: The parser.
        without: Names of fields that get no flag.
    """
    for name, settings in FLAGS.items():
        if name not in without:
            flag = ("no-" if settings.get("action") == "store_false" else "") + name.replace("_", "-")
            parser.add_argument(f"--{flag}", dest=name, default=getattr(DistriConfig, name), **settings)


def config_of(arguments: argparse.Namespace, **given: Any) -> DistriConfig:
    """The config of parsed flags.

    Args:
        arguments: What argparse returned.
        **given: Further fields.

    Raises:
        InvalidArgument: A value is not allowed, or has no effect together with the others.
    """
    return DistriConfig(**{name: getattr(arguments, name) for name in FLAGS if hasattr(arguments, name)}, **given)


def settings_of(config: DistriConfig) -> dict[str, Any]:
    """The fields of a config that have flags, as JSON values.

    Args:
        config: Its fields without a flag are left out.
    """
    values = {name: getattr(config, name) for name in FLAGS}
    return {name: value.value if isinstance(value, enum.Enum) else value for name, value in values.items()}


def add_large_flag(parser: argparse.ArgumentParser, default: str) -> None:
    """Adds `--large`.

    Args:
        parser: The parser.
        default: Its value unless given.
    """

    class Large(argparse.Action):
        def __call__(self, parser, namespace, values, option=None):
            try:
                setattr(
                    namespace,
                    self.dest,
                    check_large(values[0] if len(values) == 1 and ":" not in values[0] else pairs(values)),
                )
            except DistriError as error:
                parser.error(str(error))

    def pairs(values: Sequence[str]) -> list[tuple[float, ...]]:
        try:
            return [tuple(float(number) for number in value.split(":")) for value in values]
        except ValueError:
            return []

    parser.add_argument(
        "--large",
        nargs="+",
        action=Large,
        default=default,
        metavar="LARGE",
        help="auto, off, or TIMESTEP:FACTOR pairs such as 350:0.25 200:0.5: how images larger than the model was trained for "
        "are made; at timesteps above each TIMESTEP the UNet's deep part runs at FACTOR times height and width "
        "(default: %(default)s)",
    )
