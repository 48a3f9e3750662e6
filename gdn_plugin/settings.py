"""Every setting of the plugin, in one table, read from the environment when asked for.

Which backend serves a phase, strongest first: the phase's variable, GDN_PLUGIN_BACKEND, vLLM's
`--additional-config '{"gdn_plugin": {"prefill_backend": ...}}'`, vLLM's `--gdn-prefill-backend`, auto.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gdn_plugin.registry.backend import split_request
from gdn_plugin.registry.problem import PHASES
from gdn_plugin.registry.table import BUILTIN_NAMES, backend_names

PREFIX = "GDN_PLUGIN_"
CONFIG_KEY = "gdn_plugin"


class SettingsError(ValueError):
    """An unknown setting, or a value that is not valid. The message lists the valid ones."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A row of the table. `kind` is "request" (auto, a backend, or several joined by commas) or "switch" (0 or 1)."""

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
        Setting("GDN_PLUGIN_DISABLE", "switch", "0", "1: register nothing, stock vLLM"),
        Setting("GDN_PLUGIN_SELF_CHECK", "switch", "1", "0: use kernels without checking their numbers first"),
        Setting("GDN_PLUGIN_DEBUG", "switch", "0", "1: also the argument checks that synchronise with the device"),
    )
}
CONFIG_KEYS = ("backend", *(f"{phase}_backend" for phase in PHASES))


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for, for one phase, and where it was said."""

    value: str
    source: str


def requests(
    additional_config: Mapping[str, object] | None = None, gdn_prefill_backend: str | None = None
) -> dict[str, Request]:
    """The request for each phase, "auto" where nothing was said.

    Args:
        additional_config: vLLM's additional_config; only its "gdn_plugin" entry is read.
        gdn_prefill_backend: the value of vLLM's --gdn-prefill-backend, None where it was not given.
    Raises:
        SettingsError: a value that is not valid or an unknown key, wherever it was set, used or not.
    """
    config = _from_config(additional_config)
    host = _from_host(gdn_prefill_backend)
    everywhere = _request_variable(f"{PREFIX}BACKEND")
    chosen = {}
    for phase in PHASES:
        chosen[phase] = (
            _request_variable(f"{PREFIX}{phase.upper()}_BACKEND")
            or everywhere
            or config.get(f"{phase}_backend")
            or config.get("backend")
            or (host if phase == "prefill" else None)
            or Request("auto", "default")
        )
    return chosen


def disabled() -> bool:
    """GDN_PLUGIN_DISABLE: stay out of the way."""
    return _switch("GDN_PLUGIN_DISABLE")


def self_check() -> bool:
    """GDN_PLUGIN_SELF_CHECK: check a kernel's numbers before it is first used."""
    return _switch("GDN_PLUGIN_SELF_CHECK")


def debug() -> bool:
    """GDN_PLUGIN_DEBUG: also the checks that cost a synchronisation."""
    return _switch("GDN_PLUGIN_DEBUG")


def validate(
    additional_config: Mapping[str, object] | None = None, gdn_prefill_backend: str | None = None
) -> dict[str, Request]:
    """Everything that can be wrong with the settings, found at start-up: names of variables, then all values.

    Returns:
        the requests, as `requests` gives them.
    Raises:
        SettingsError: the first thing that is wrong.
    """
    problems = unknown_variables()
    if problems:
        raise SettingsError(problems[0])
    for name, row in TABLE.items():
        if row.kind == "switch":
            _switch(name)
    return requests(additional_config, gdn_prefill_backend)


def unknown_variables() -> list[str]:
    """A sentence for each GDN_PLUGIN_* variable that is set and not in the table."""
    return [
        f"{name} is not a setting of gdn-plugin{_suggest(name, TABLE)}; the settings are: {', '.join(TABLE)}"
        for name in sorted(os.environ)
        if name.startswith(PREFIX) and name not in TABLE
    ]


def in_force() -> dict[str, str | None]:
    """The value of each setting as it stands, default included and not validated: for a report."""
    return {name: _raw(name) or row.default for name, row in TABLE.items()}


def _raw(name: str) -> str | None:
    """A variable's value; None where it is unset or empty."""
    return os.environ.get(name, "").strip() or None


def _switch(name: str) -> bool:
    raw = _raw(name) or TABLE[name].default
    if raw not in ("0", "1"):
        raise SettingsError(f"{name}={raw!r} is not valid; choose one of: 0, 1")
    return raw == "1"


def _request_variable(name: str) -> Request | None:
    raw = _raw(name)
    return None if raw is None else Request(_checked(raw, name), name)


def _from_config(additional_config: Mapping[str, object] | None) -> dict[str, Request]:
    where = f'additional_config["{CONFIG_KEY}"]'
    section = (additional_config or {}).get(CONFIG_KEY)
    if section is None:
        return {}
    if not isinstance(section, Mapping):
        raise SettingsError(f"{where} must be a mapping with keys among {', '.join(CONFIG_KEYS)}; got {section!r}")
    found = {}
    for key, value in section.items():
        if key not in CONFIG_KEYS:
            raise SettingsError(
                f"{where} has no key {key!r}{_suggest(str(key), CONFIG_KEYS)}; choose one of: {', '.join(CONFIG_KEYS)}"
            )
        if value is None:
            continue
        if not isinstance(value, str):
            raise SettingsError(f"{where}[{key!r}] must be a string; got {value!r}")
        found[str(key)] = Request(_checked(value, f"{where}[{key!r}]"), where)
    return found


def _from_host(value: str | None) -> Request | None:
    if value is None or value == "auto":
        return None
    where = "--gdn-prefill-backend"
    if value not in ("triton", "flashinfer"):
        # vLLM has kernels of its own under other names; taking something else instead would be a silent fallback.
        raise SettingsError(
            f"{where}={value!r} names no backend of gdn-plugin; choose one of: auto, triton, flashinfer, "
            "or set GDN_PLUGIN_DISABLE=1 to use vLLM's own"
        )
    return Request(value, where)


def _checked(raw: str, where: str) -> str:
    """A request whose names all exist, spaces removed."""
    names = split_request(raw)
    if names == ("auto",):
        return "auto"
    # Third parties' entry points are loaded only where a name is not one of the plugin's own.
    if names and all(name in BUILTIN_NAMES for name in names):
        return ",".join(names)
    valid = ("auto", *backend_names())
    for name in names or (raw,):
        if name not in valid:
            raise SettingsError(
                f"{where}={raw!r} is not valid{_suggest(name, valid)}; choose one of: {', '.join(valid)}; "
                "or several, tried in order: flashinfer,triton"
            )
    if "auto" in names:
        raise SettingsError(f"{where}={raw!r} is not valid; auto stands alone, it already tries every backend")
    return ",".join(names)


def _suggest(name: str, valid: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(valid), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
