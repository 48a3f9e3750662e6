"""The `gdn-plugin` command.

A subcommand is a module of this package with `add_arguments(parser)` and `run(args) -> exit code`. Only the module
that was asked for is imported, so that one broken part does not take the others down.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder

from gdn_plugin import __version__

COMMANDS = {
    "doctor": "what this machine has, which backends would run, and why the others would not",
    "check": "run every backend of this machine on a small problem and compare the numbers",
    "compile": "compile the kernels for a GPU that need not be present",
    "bench": "time backends against each other, numbers checked first",
    "accuracy": "score a trained model through the vLLM engine, stock and with every backend",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: arguments without the program's name; by default those of the process.
    Returns:
        the exit status: 0, 1 where the subcommand found something wrong, 2 for bad arguments (raised as SystemExit).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="gdn-plugin", description="Gated Delta Net linear attention for vLLM.")
    parser.add_argument("--version", action="version", version=f"gdn-plugin {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    asked = next((word for word in arguments if not word.startswith("-")), None)
    run = None
    for command, summary in COMMANDS.items():
        if PathFinder.find_spec(f"{__name__}.{command}", list(__path__)) is None:
            continue
        subparser = subparsers.add_parser(command, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if command == asked:
            module = importlib.import_module(f"{__name__}.{command}")
            module.add_arguments(subparser)
            run = module.run
    args = parser.parse_args(arguments)
    assert run is not None  # parse_args has left already where the command is unknown or missing
    try:
        code = int(run(args) or 0)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader left (`| head`): that is no error, and the interpreter's own flush at exit must not fail either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code
