"""The command `distrijax`: a subcommand's name, and then its flags."""

from __future__ import annotations

import sys

from distrijax.cli.start import run

COMMANDS = {
    "generate": ("distrijax.cli.generate", "generate an image of a prompt"),
    "evaluate": ("distrijax.cli.evaluate", "measure how faithful each setting is to one device"),
    "convert": ("distrijax.convert.__main__", "convert a checkpoint, or tell what a file holds"),
    "plan": ("distrijax.plan.__main__", "compile a step for GPUs or TPUs without having any, and project its time"),
}
"""By name: the module whose `main` it runs, and what it does."""


def main() -> None:
    """Runs the subcommand that the command line names; raises SystemExit for a name that is none."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(_help())
        return
    if name not in COMMANDS:
        sys.exit(f"error: {name!r} is no subcommand of distrijax; use one of: {', '.join(COMMANDS)}")
    sys.argv = [f"distrijax {name}", *sys.argv[2:]]
    run(COMMANDS[name][0])


def _help() -> str:
    lines = (f"  {name:10} {what}" for name, (_, what) in COMMANDS.items())
    return (
        "usage: distrijax COMMAND [flags]\n\n"
        + "\n".join(lines)
        + "\n\ndistrijax COMMAND --help shows a command's flags."
    )
