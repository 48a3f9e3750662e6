"""Values of arguments: what is wrong with one is said in a line, with exit status 2, before any work is done."""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib.util
import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

from gdn_plugin.settings import REPLAY_SLOTS


class BadArguments(ValueError):
    """Arguments that are wrong together, or only on this machine; the message is the whole answer."""


class Parser(argparse.ArgumentParser):
    """A parser whose complaint is one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def count(text: str) -> int:
    """argparse type: a whole number above 0."""
    if not text.strip().isdecimal() or not 0 < int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def slots(text: str) -> int:
    """argparse type: slots of a replay ring."""
    if text.strip() not in map(str, REPLAY_SLOTS):
        raise argparse.ArgumentTypeError(f"{text!r} is not a ring's slots, {REPLAY_SLOTS[0]} to {REPLAY_SLOTS[-1]}")
    return int(text)


def seconds(text: str) -> float:
    """argparse type: a number of seconds above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def counts(text: str) -> tuple[int, ...]:
    """argparse type: numbers above 0 joined by commas, each once, in order."""
    return tuple(dict.fromkeys(count(part) for part in _parts(text)))


def names(known: Callable[[], Iterable[str]]) -> Callable[[str], tuple[str, ...]]:
    """An argparse type: names among `known()` joined by commas, each once."""

    def check(text: str) -> tuple[str, ...]:
        valid = tuple(known())
        for name in (parts := _parts(text)):
            if name not in valid:
                raise argparse.ArgumentTypeError(unknown(name, valid))
        return tuple(dict.fromkeys(parts))

    return check


def unknown(name: str, valid: Iterable[str]) -> str:
    """The sentence on a name that is none of the valid ones."""
    valid = tuple(valid)
    close = difflib.get_close_matches(name, valid, n=1)
    meant = f"; did you mean {close[0]!r}?" if close else ""
    return f"{name!r} is not known{meant}; choose one of: {', '.join(valid)}"


def _parts(text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list such as a,b")
    return parts


def output(text: str) -> Path:
    """argparse type: a file that can be written; tried, since permissions alone do not tell."""
    path = Path(text)
    if path.exists() and not path.is_file() and not path.is_dir():
        return path  # a pipe or a terminal: opening it may wait for a reader
    path = Path(os.path.realpath(path))
    existed = path.exists()
    try:
        with path.open("ab"):
            pass
        if not existed:
            path.unlink()
    except OSError as exc:
        raise argparse.ArgumentTypeError(f"{text} cannot be written: {exc.strerror}") from exc
    return path


def picture(text: str) -> Path:
    """argparse type: a PNG that can be written and drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("drawing needs matplotlib: pip install 'matplotlib>=3.9'")
    return output(text)


def folder(text: str) -> Path:
    """argparse type: a folder to write to; made if need be."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise argparse.ArgumentTypeError(f"{text} cannot be made: {exc.strerror}") from exc
    if not os.access(path, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written to")
    return path


def write(path: Path, text: str) -> None:
    """Replace what a file holds at once: whoever reads it, or cuts the run short, finds all of it or the former.

    A symbolic link stays one: the file is what it points to. In a folder that takes no new file it is written in place.
    """
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    path = Path(os.path.realpath(path))
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as exc:  # a folder of somebody else's, a file that is mounted alone
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        path.write_text(text, encoding="utf-8")
    finally:
        part.unlink(missing_ok=True)


def as_json(data: object) -> str:
    """JSON in the form in which every command writes it; NaN and infinity, which JSON has not, become null."""
    return json.dumps(_finite(data), indent=2)


def _finite(data: object) -> object:
    if isinstance(data, float) and not math.isfinite(data):
        return None
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return data
