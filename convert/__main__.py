"""Converts models of Stable Diffusion (XL, its refiner, 1.x and 2.x) between formats.

    python -m distrijax.convert dream.safetensors DREAM           a single file to a folder that from_pretrained reads
    python -m distrijax.convert owner/model dream.safetensors     a repository on the hub to a single file
    python -m distrijax.convert base.ckpt NEW --lora style.safetensors:0.8 --vae vae.safetensors --dtype float16
    python -m distrijax.convert dream.ckpt --inspect              what it is, and what is unusual about it

SOURCE: a single file in the original layout (safetensors or pickle), a folder in the diffusers layout (safetensors, pickles,
Flax or orbax), a hub id, an hf:// path. No code of a file is executed. DESTINATION appears whole or not at all.
"""

from __future__ import annotations

from distrijax.interrupts import INTERRUPTED, end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()  # before imports that take seconds

import argparse
import enum
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from distrijax.atomic_write import atomic_write
from distrijax.convert.complete import check_complete
from distrijax.convert.inspection import describe_checkpoint, describe_file
from distrijax.convert.layouts.folder import write_folder
from distrijax.convert.layouts.original import to_original
from distrijax.convert.progress import with_progress
from distrijax.convert.readers.safetensors_files import write_safetensors
from distrijax.convert.sources import assemble, find_source
from distrijax.errors import DistriError, DistriWarning, InvalidArgument
from distrijax.weights import hub
from distrijax.weights.checkpoint import Checkpoint
from distrijax.weights.dtypes import DTYPES
from distrijax.weights.recipe import Recipe, add_flags


class Format(enum.StrEnum):
    """What to write."""

    DIFFUSERS = "diffusers"
    SINGLE = "single"
    ORBAX = "orbax"


SHARD = "10GB"
"""The default size of a file in a folder of safetensors."""

SINGLE = ".safetensors"
"""The suffix of a single file that is written."""

FILES = (*hub.FILE_SUFFIXES, ".pt", ".pth", ".msgpack", ".gguf", ".onnx")
"""Suffixes of files of weights; a folder of such a name would be mistaken for one."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; raises SystemExit with a code other than 0, after one line on stderr, for wrong input."""
    arguments = _parse(argv)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", DistriWarning)
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        try:
            convert(arguments)
        except DistriError as error:
            sys.exit(f"error: {error}")
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(INTERRUPTED)
        except BrokenPipeError:  # the reader of the output has closed it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    summary, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        sys.argv[0] if sys.argv[0] == "distrijax convert" else "python -m distrijax.convert",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", metavar="SOURCE")
    add("destination", metavar="DESTINATION", nargs="?", type=Path)
    add_flags(parser)
    kinds = tuple(kind.value for kind in Format)
    add("--format", choices=kinds, help="of the destination (default: single for a .safetensors, else diffusers)")
    add("--dtype", choices=tuple(DTYPES), help="of the weights (default: as they are)")
    add("--max-shard-size", metavar="SIZE", help=f"of a file in a folder of safetensors (default: {SHARD})")
    add("--force", action="store_true", help="replace a destination that exists")
    add("--dry-run", action="store_true", help="print where each tensor goes, and write nothing")
    add("--inspect", action="store_true", help="print what the source is, and write nothing; reads all of it")
    arguments = parser.parse_args(argv)
    if arguments.destination is None and not (arguments.dry_run or arguments.inspect):
        parser.exit(2, "error: no DESTINATION is given; name a folder or a .safetensors file, or use --inspect\n")
    return arguments


def convert(arguments: argparse.Namespace) -> None:
    """Reads the source, and prints or writes it. Raises DistriError for what cannot be read, converted or written."""
    recipe = Recipe.of(arguments.source, arguments)
    kind = _format(arguments) if arguments.destination else None
    if arguments.max_shard_size is not None:
        _bytes(arguments.max_shard_size)
        if kind not in (None, Format.DIFFUSERS):
            raise InvalidArgument(
                f"--max-shard-size is for --format {Format.DIFFUSERS}, and this is {kind}; leave it out"
            )
    if arguments.destination and arguments.destination.exists() and not (arguments.force or arguments.dry_run):
        raise InvalidArgument(f"{arguments.destination} exists; choose another name, or --force to replace it")
    access = {"token": arguments.token, "offline": arguments.offline}
    if arguments.inspect and (source := find_source(recipe, **access)).is_file():
        print(*describe_file(source, recipe.source), sep="\n")
        return
    checkpoint, mapping = assemble(recipe, **access)
    check_complete(checkpoint)
    if arguments.inspect or arguments.dry_run:
        print(*(describe_checkpoint(checkpoint, mapping) if arguments.inspect else mapping), sep="\n")
        return
    write(checkpoint, kind, arguments)
    print(f"wrote {arguments.destination}")


def write(checkpoint: Checkpoint, kind: Format, arguments: argparse.Namespace) -> None:
    """Writes a checkpoint in a format."""
    destination: Path = arguments.destination
    if arguments.dtype:
        checkpoint = checkpoint.cast(DTYPES[arguments.dtype])
    with (
        with_progress(checkpoint, destination.name) as seen,
        atomic_write(destination, replace=arguments.force, durable=True) as beside,
    ):
        if kind is Format.SINGLE:
            write_safetensors(to_original(seen), beside)
        else:
            size = _bytes(arguments.max_shard_size or SHARD)
            write_folder(seen, beside, max_shard_size=size, orbax=kind is Format.ORBAX)


def _format(arguments: argparse.Namespace) -> Format:
    """The format requested. Raises DistriError for a destination whose name says another one."""
    destination: Path = arguments.destination
    if destination.name in ("", ".."):
        raise InvalidArgument(
            f"DESTINATION is {destination}, which cannot be replaced from within; name a folder in it"
        )
    single = destination.suffix == SINGLE
    kind = Format(arguments.format) if arguments.format else Format.SINGLE if single else Format.DIFFUSERS
    if single != (kind is Format.SINGLE):
        needed = f"a file that ends in {SINGLE}" if kind is Format.SINGLE else "a folder"
        raise InvalidArgument(f"DESTINATION is {destination} and --format is {kind.value}; name {needed}")
    if not single and destination.suffix.lower() in FILES:
        raise InvalidArgument(
            f"DESTINATION is {destination}, and single files are written with the ending {SINGLE} only; "
            f"name {destination.with_suffix(SINGLE).name}, or a folder"
        )
    return kind


def _bytes(size: str) -> int:
    """The number of bytes in 500MB or 5GB, decimal units as on the hub."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    number, unit = size[:-2], size[-2:].upper()
    if unit not in units or not number.isdecimal() or int(number) == 0:
        raise InvalidArgument(f"--max-shard-size is {size}; give a whole number of {', '.join(units)}, such as 5GB")
    return int(number) * units[unit]


if __name__ == "__main__":
    main()
