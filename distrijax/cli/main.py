"""The command `distrijax SUBCOMMAND [flags]`."""

from __future__ import annotations

import sys

from distrijax.cli.start import run

COMMANDS = {
    "generate": ("distrijax.cli.generate", "generate an image from a prompt"),
    "evaluate": ("distrijax.cli.evaluate", "measure how close each setting is to one device"),
    "convert": ("distrijax.convert.__main__", "convert a checkpoint, or show what a file contains"),
    "plan": ("distrijax.plan.__main__", "compile a step for GPUs or TPUs without having any, and project its time"),
}
"""Subcommands by name: the module whose `main` runs, and a line of help."""


def main() -> None:
    """Runs the subcommand that the command line names; raises SystemExit for an unknown one."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(_help())
        return
    if name not in COMMANDS:
        sys.exit(f"error: {name!r} is not a subcommand of distrijax; use one of: {', '.join(COMMANDS)}")
    sys.argv = [f"distrijax {name}", *sys.argv[2:]]
    run(COMMANDS[name][0], several=name == "generate")


def _help() -> str:
    lines = (f"  {name:10} {summary}" for name, (_, summary) in COMMANDS.items())
    return (
        "usage: distrijax SUBCOMMAND [flags]\n\n"
        + "\n".join(lines)
        + "\n\ndistrijax SUBCOMMAND --help shows the flags of a subcommand."
    )
