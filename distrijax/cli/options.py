"""What distrijax's commands, benchmarks and examples share: one-line errors, flags of the model, devices, caches, JSON output."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # hides XLA's log, which is not meant for users

import jax
import jax.numpy as jnp

from distrijax import DEFAULT_MODEL
from distrijax.cli.compile_cache import UNREADABLE, remove_unreadable
from distrijax.convert.sources import open_checkpoint
from distrijax.errors import DistriError, DistriWarning, InvalidArgument
from distrijax.interrupts import INTERRUPTED
from distrijax.validate import positive
from distrijax.weights.checkpoint import Checkpoint
from distrijax.weights.dtypes import resolve_dtype
from distrijax.weights.recipe import Recipe, add_flags


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a wrong flag in one line.

    Args:
        doc: A script's docstring; its first line goes above the flags in the help, the rest below.
    """

    def __init__(self, doc: str):
        summary, _, rest = doc.partition("\n")
        # `distrijax.cli.start` knows only unabbreviated flags
        super().__init__(description=summary, epilog=rest, formatter_class=_Formatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")

    def add_values(self, flag: str, help: str) -> None:
        """Adds a flag NAME=VALUE that may be given several times and is parsed to a dictionary.

        Args:
            flag: The flag, such as "--option". Values are parsed as JSON if they are valid JSON, else taken as text.
            help: Its help text.
        """
        help += "; may be given several times"
        self.add_argument(flag, action=_Values, default={}, metavar="NAME=VALUE", help=help)

    def size(self, numbers: Sequence[int] | None) -> tuple[int, int] | None:
        """The height and width in pixels that --image-size gives, with one number or two; None without it."""
        if numbers and len(numbers) > 2:
            self.error(f"--image-size takes H or H W, not {len(numbers)} numbers")
        return (numbers[0], numbers[-1]) if numbers else None


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --model and the flags of adapters and replaced parts, which `open_model` reads."""
    parser.add_argument(
        "--model", help="Stable Diffusion 1.x, 2.x or XL: a folder, a single file or a hub id (default: embedded)"
    )
    add_flags(parser)


def open_model(arguments: argparse.Namespace, *, weights: bool = True) -> tuple[Recipe, Checkpoint]:
    """Opens the model that the flags of `add_model_flags` name; fetches it where needed.

    Args:
        arguments: Of a parser with `add_model_flags`.
        weights: Whether its weights are needed, or configurations alone.

    Returns:
        What the flags say, and the opened model.

    Raises:
        CheckpointError: If it could not be found, fetched or read.
        InvalidArgument: For wrong flags.
    """
    recipe = Recipe.of(str(DEFAULT_MODEL) if arguments.model is None else arguments.model, arguments)
    return recipe, open_checkpoint(recipe, token=arguments.token, offline=arguments.offline, weights=weights)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Shows the one or two numbers of `Parser.size`, where argparse would show any number of them."""

    def _format_args(self, action, default_metavar):
        return "H [W]" if action.metavar == ("H", "W") else super()._format_args(action, default_metavar)


class _Values(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        name, equals, value = values.partition("=")
        if not equals:
            parser.error(f"{option_string} is {values}; give NAME=VALUE")
        with contextlib.suppress(json.JSONDecodeError):
            value = json.loads(value)
        setattr(namespace, self.dest, {**getattr(namespace, self.dest), name: value})


def check_positive(arguments: argparse.Namespace, *names: str) -> None:
    """Checks that flags are positive integers where they are given.

    Args:
        arguments: The parsed flags.
        *names: Names of attributes of `arguments`.

    Raises:
        InvalidArgument: For the first one that is not.
    """
    for name in names:
        if getattr(arguments, name) is not None:
            positive(getattr(arguments, name), "--" + name.replace("_", "-"))


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """A context that turns errors a user can correct into SystemExit with one line, and prints only distrijax's warnings."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if not remove_unreadable(str(message)):
            print(f"warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("once", DistriWarning)
        warnings.filterwarnings("always", UNREADABLE)
        warnings.showwarning = show
        try:
            yield
        except DistriError as error:
            sys.exit(f"error: {error}")
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            sys.exit(
                "error: the devices' memory does not suffice; use more devices, a smaller --image-size or bfloat16"
            )
        except KeyboardInterrupt:  # where a `main` is called from Python, not as a command
            print("interrupted", file=sys.stderr)
            sys.exit(INTERRUPTED)


def find_devices(wanted: int | None) -> int:
    """Number of devices to use.

    On a machine without accelerators, JAX makes as many virtual CPU devices as are wanted. That setting must be made before JAX
    looks for devices, and has no effect on accelerators. One of several processes has made it when it joined.

    Args:
        wanted: Number of devices; None takes all.

    Raises:
        InvalidArgument: If there are fewer devices than `wanted`, or none of the platform in JAX_PLATFORMS.
    """
    if wanted is not None and not jax.distributed.is_initialized():
        with contextlib.suppress(RuntimeError):  # JAX has been used, and its devices are fixed
            jax.config.update("jax_num_cpu_devices", wanted)
    try:
        found = len(jax.devices())
    except (RuntimeError, AssertionError):
        platforms = os.environ.get("JAX_PLATFORMS")
        raise InvalidArgument(
            f"JAX finds no device with JAX_PLATFORMS={platforms}; set it otherwise or not at all"
        ) from None
    if wanted is not None and wanted > found:
        raise InvalidArgument(
            f"--devices is {wanted} and this machine shows {found} ({device_kind()}); use --devices {found} or fewer"
        )
    return wanted or found


def find_dtype(name: str | None) -> jnp.dtype:
    """The dtype that --dtype names; None takes the one that suits the devices."""
    return resolve_dtype(name, jax.devices()[0].platform)


def device_kind() -> str:
    """The devices' kind for display, such as "NVIDIA H200" or "virtual CPU"."""
    device = jax.devices()[0]
    return "virtual CPU" if device.platform == "cpu" else device.device_kind


def json_lines(path: Path | None) -> Callable[[dict[str, Any]], None]:
    """Returns a function that prints a row as a line of JSON, and appends it to a file.

    Args:
        path: The file; None only prints.

    Raises:
        InvalidArgument: At once, before anything is measured, if the file cannot be written.
    """

    def add(text: str) -> None:
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise InvalidArgument(
                f"--output {path} cannot be written ({error.strerror}); choose another file"
            ) from None

    def write(row: dict[str, Any]) -> None:
        line = json.dumps(row)
        print(line, flush=True)
        if path is not None:
            add(line + "\n")

    if path is not None:
        add("")
    return write
