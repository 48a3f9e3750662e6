"""The `gdn-plugin` command.

A subcommand is a module of this package with `add_arguments(parser)` and `run(args) -> exit code`. Only the module
that was asked for is imported, so that one broken part does not take the others down.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder

from gdn_plugin import __version__
from gdn_plugin.registry import BackendError, SettingsError
from gdn_plugin.tools.cli.values import BadArguments, Parser

COMMANDS = {
    "doctor": "what this machine has, which backends would run, and why the others would not",
    "check": "run every backend of this machine on a small problem and compare the numbers",
    "compile": "compile the kernels for a GPU that need not be present",
    "bench": "time backends against each other, numbers checked first",
    "accuracy": "score a trained model through the vLLM engine, stock and with every backend",
}
INTERRUPTED = 130  # what shells make of SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: arguments without the program's name; by default those of the process.
    Returns:
        the exit status: 0, 1 where the subcommand found something wrong or no backend can do it here, 2 for bad
        arguments (raised as SystemExit where one is wrong by itself) and settings, 130 after Ctrl-C. A reader that
        leaves, or is not there, is no error.
    """
    _open_streams()
    command = ""
    try:
        args = _parse(list(sys.argv[1:] if argv is None else argv))
        command = f" {args.command}"
        code = int(args.run(args) or 0)
        sys.stdout.flush()
    except (BadArguments, SettingsError) as exc:
        print(f"gdn-plugin{command}: {exc}", file=sys.stderr)
        return 2
    except BackendError as exc:
        print(f"gdn-plugin{command}: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"gdn-plugin{command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _forget_stdout()
        return 0
    except OSError as exc:
        if exc.errno != errno.ENOSPC:
            raise
        _forget_stdout()
        print(f"gdn-plugin{command}: {exc.filename or 'standard output'}: {exc.strerror}", file=sys.stderr)
        return 1
    return code


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(prog="gdn-plugin", description="Gated Delta Net linear attention for serving engines.")
    parser.add_argument("--version", action="version", version=f"gdn-plugin {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    asked = next((word for word in arguments if not word.startswith("-")), None)
    for command, summary in COMMANDS.items():
        if PathFinder.find_spec(f"{__name__}.{command}", list(__path__)) is None:
            continue
        subparser = subparsers.add_parser(command, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if command == asked:
            module = importlib.import_module(f"{__name__}.{command}")
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    return parser.parse_args(arguments)


def _open_streams() -> None:
    """Give a process that was started without some of its three standard streams the null device in their place.

    Else Python has None there, and the next file that is opened gets the stream's number and its output.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def _forget_stdout() -> None:
    """The interpreter's own flush at exit must not fail either."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
