"""What the scripts of this folder share: flags told wrong in one line, the model, the devices, compiled and written files."""

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

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA's own log, which has nothing for a user

import jax
import jax.numpy as jnp

from distrijax import DEFAULT_MODEL, DistriError, DistriWarning
from distrijax.convert.cache import Prepared, cache_folder, prepared
from distrijax.convert.sources import Recipe, add_flags
from distrijax.models.families import PARTS
from distrijax.validate import positive
from distrijax.weights.dtypes import resolve_dtype
from distrijax.weights.hub import find


class Parser(argparse.ArgumentParser):
    """Tells a wrong flag in one line, and a script's docstring in its help."""

    def __init__(self, doc: str):
        summary, _, rest = doc.partition("\n")
        # `distrijax.cli.start` looks for whole flags
        super().__init__(description=summary, epilog=rest, formatter_class=_Formatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")

    def add_values(self, flag: str, help: str) -> None:
        """A flag that takes NAME=VALUE, several times, and gives a dictionary: numbers, true, false and null as such, or text."""
        help += "; may be given several times"
        self.add_argument(flag, action=_Values, default={}, metavar="NAME=VALUE", help=help)

    def size(self, numbers: Sequence[int] | None) -> tuple[int, int] | None:
        """Height and width out of what --image-size got."""
        if numbers and len(numbers) > 2:
            self.error(f"--image-size takes H or H W, not {len(numbers)} numbers")
        return (numbers[0], numbers[-1]) if numbers else None


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """--model, and what is put on top of it."""
    parser.add_argument(
        "--model", help="Stable Diffusion 1.x, 2.x or XL: a folder, a single file or a hub id (default: embedded)"
    )
    add_flags(parser)


def find_model(arguments: argparse.Namespace) -> tuple[Recipe, Prepared]:
    """What those flags say, and the folder to load it from. Raises DistriError for what can't be had or converted."""
    recipe = _recipe(arguments)
    return recipe, prepared(recipe, token=arguments.token, offline=arguments.offline)


def find_configurations(arguments: argparse.Namespace) -> Path:
    """A folder with the configurations of what those flags say; of one in the diffusers layout no weights are fetched."""
    recipe = _recipe(arguments)
    if recipe.plain:
        options = {"revision": recipe.revision, "token": arguments.token, "offline": arguments.offline}
        path = find(recipe.source, parts=PARTS, formats=(), **options)
        if (path / "model_index.json").is_file():
            return path
    return find_model(arguments)[1].folder


def _recipe(arguments: argparse.Namespace) -> Recipe:
    return Recipe.of(arguments.model or str(DEFAULT_MODEL), arguments)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Shows what `Parser.size` takes, where argparse would promise any number of numbers."""

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
    """Raises DistriError for the first of those flags that is given and is no whole number of at least 1."""
    for name in names:
        if getattr(arguments, name) is not None:
            positive(getattr(arguments, name), "--" + name.replace("_", "-"))


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Raises SystemExit, with one line for stderr, for what a user can mend; prints warnings of this project alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("once", DistriWarning)
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
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


def keep_compiled_programs() -> None:
    """Compiled programs are kept in JAX_COMPILATION_CACHE_DIR, or else in the user's cache folder, however quick they were."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def find_devices(wanted: int | None) -> int:
    """How many devices to use. Raises DistriError where there are fewer accelerators than `wanted`.

    A machine without accelerators gets as many virtual CPU devices; accelerators do not care for that setting, which must be
    made before the first look at them. Several processes have made it when they joined, each for its part.
    """
    if wanted is not None and not jax.distributed.is_initialized():
        with contextlib.suppress(RuntimeError):  # JAX has been used in this process, and its devices are what they are
            jax.config.update("jax_num_cpu_devices", wanted)
    try:
        found = len(jax.devices())
    except (RuntimeError, AssertionError):
        platforms = os.environ.get("JAX_PLATFORMS")
        raise DistriError(
            f"JAX finds no device with JAX_PLATFORMS={platforms}; set it otherwise or not at all"
        ) from None
    if wanted is not None and wanted > found:
        raise DistriError(
            f"--devices is {wanted} and this machine shows {found} ({device_kind()}); use --devices {found} or fewer"
        )
    return wanted or found


def find_dtype(name: str | None) -> jnp.dtype:
    """What --dtype says, or what suits the devices."""
    return resolve_dtype(name, jax.devices()[0].platform)


def device_kind() -> str:
    """What the devices are, for people."""
    device = jax.devices()[0]
    return "virtual CPU" if device.platform == "cpu" else device.device_kind


def json_lines(path: Path | None) -> Callable[[dict[str, Any]], None]:
    """A function that prints a row as a line of JSON, and adds it to `path`, if any.

    Raises DistriError at once where that could not be written, before anything is measured.
    """

    def add(text: str) -> None:
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise DistriError(f"--output {path} cannot be written ({error.strerror}); choose another file") from None

    def tell(row: dict[str, Any]) -> None:
        line = json.dumps(row)
        print(line, flush=True)
        if path is not None:
            add(line + "\n")

    if path is not None:
        add("")
    return tell
