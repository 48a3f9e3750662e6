"""Every setting of the plugin, in one table, read from the environment when asked for, and nowhere else.

What a request for a backend may name, and what comes before what, is the registry's to say: `registry/requests.py`.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

PREFIX = "GDN_PLUGIN_"
PHASES = ("prefill", "decode", "verify")
REPLAY_SLOTS = range(4, 65)


class SettingsError(ValueError):
    """An unknown setting, or a value that is not valid. The message lists the valid ones."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A row of the table.

    Args:
        kind: "request" (auto or backends joined by commas), "switch" (0 or 1), "replay" (auto, 0 or slots), "path".
    """

    name: str
    kind: str
    default: str | None
    help: str


TABLE: Mapping[str, Setting] = {
    row.name: row
    for row in (
        Setting("GDN_PLUGIN_BACKEND", "request", "auto", "backend of every phase"),
        Setting("GDN_PLUGIN_PREFILL_BACKEND", "request", None, "backend of prefill; wins over the above"),
        Setting("GDN_PLUGIN_DECODE_BACKEND", "request", None, "backend of decode; wins over the above"),
        Setting("GDN_PLUGIN_VERIFY_BACKEND", "request", None, "backend of verify; wins over the above"),
        Setting("GDN_PLUGIN_REPLAY", "replay", "auto", "0: write each token's state; or slots of the ring, 4 to 64"),
        Setting("GDN_PLUGIN_DISABLE", "switch", "0", "1: register nothing, the stock host"),
        Setting("GDN_PLUGIN_SELF_CHECK", "switch", "1", "0: use kernels without checking their numbers first"),
        Setting("GDN_PLUGIN_DEBUG", "switch", "0", "1: also the argument checks that synchronise with the device"),
        Setting(
            "GDN_PLUGIN_CACHE",
            "path",
            None,
            "folder of CPU kernels, self-check verdicts, what was compiled ahead",
        ),
    )
}


_REQUESTS = {None: f"{PREFIX}BACKEND"} | {phase: f"{PREFIX}{phase.upper()}_BACKEND" for phase in PHASES}


def disabled() -> bool:
    """GDN_PLUGIN_DISABLE: stay out of the way."""
    return _switch("GDN_PLUGIN_DISABLE")


def self_check() -> bool:
    """GDN_PLUGIN_SELF_CHECK: check a kernel's numbers before it is first used."""
    return _switch("GDN_PLUGIN_SELF_CHECK")


def debug() -> bool:
    """GDN_PLUGIN_DEBUG: also the checks that cost a synchronisation."""
    return _switch("GDN_PLUGIN_DEBUG")


def cache() -> str | None:
    """GDN_PLUGIN_CACHE: a folder; None for the user's own cache folder."""
    return value("GDN_PLUGIN_CACHE")


def backend_request(phase: str | None = None) -> tuple[str, str] | None:
    """(variable, its value) that asks for a backend of one phase, or of every phase; None where it is unset."""
    name = _REQUESTS[phase]
    raw = value(name)
    return None if raw is None else (name, raw)


def replay_request() -> tuple[str, str] | None:
    """(variable, its value) of GDN_PLUGIN_REPLAY: "auto", "0" or a number of slots; None where it is unset.

    Raises:
        SettingsError: something else.
    """
    name = "GDN_PLUGIN_REPLAY"
    raw = value(name)
    return None if raw is None else (name, checked_replay(raw, name))


def checked_replay(raw: str, where: str) -> str:
    """A request for replay that is valid.

    Raises:
        SettingsError: it is not.
    """
    slots = raw if raw in ("auto", "0") else next((str(n) for n in REPLAY_SLOTS if str(n) == raw), None)
    if slots is None:
        most = f"slots of the ring, {REPLAY_SLOTS[0]} to {REPLAY_SLOTS[-1]}"
        raise SettingsError(f"{where}={raw!r} is not valid; choose one of: auto, 0, {most}")
    return slots


def check() -> None:
    """Everything that can be wrong with the variables but for the names of backends.

    Raises:
        SettingsError: the first thing that is wrong.
    """
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in TABLE:
            raise SettingsError(
                f"{name} is not a setting of gdn-plugin{suggest(name, TABLE)}; the settings are: {', '.join(TABLE)}"
            )
    for name, row in TABLE.items():
        if row.kind == "switch":
            _switch(name)
    replay_request()


def in_force() -> dict[str, str | None]:
    """The value of each setting as it stands, default included and not validated: for a report."""
    return {name: value(name) or row.default for name, row in TABLE.items()}


def value(name: str) -> str | None:
    """A variable's value; None where it is unset or empty."""
    found = os.environ.get(name)
    return None if found is None else found.strip() or None


def suggest(name: str, valid: Iterable[str]) -> str:
    """ "; did you mean ...?" where something is spelled nearly like `name`, else nothing."""
    close = difflib.get_close_matches(name, list(valid), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _switch(name: str) -> bool:
    raw = value(name) or TABLE[name].default
    if raw not in ("0", "1"):
        raise SettingsError(f"{name}={raw!r} is not valid; choose one of: 0, 1")
    return raw == "1"
