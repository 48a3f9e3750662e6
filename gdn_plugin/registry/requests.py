"""What a user asked for, a backend phase by phase and replay, from wherever it was said, every value checked.

Strongest first: the phase's variable, GDN_PLUGIN_BACKEND, the host's own configuration for this plugin
(`--additional-config '{"gdn_plugin": {"prefill_backend": ...}}'`), the host's own backend flag, auto.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gdn_plugin import settings
from gdn_plugin.registry.backend import split_request
from gdn_plugin.registry.table import BUILTIN_NAMES, backend_names
from gdn_plugin.settings import PHASES, SettingsError, suggest

CONFIG_KEY = "gdn_plugin"
CONFIG_KEYS = ("backend", *(f"{phase}_backend" for phase in PHASES), "replay")


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for, for one phase or of replay, and where it was said."""

    value: str
    source: str


def requests(
    additional_config: Mapping[str, object] | None = None, gdn_prefill_backend: str | None = None
) -> dict[str, Request]:
    """The request for each phase, "auto" where nothing was said.

    Args:
        additional_config: the host's additional_config; only its "gdn_plugin" entry is read.
        gdn_prefill_backend: the value of the host's --gdn-prefill-backend, None where it was not given.
    Raises:
        SettingsError: an unknown GDN_PLUGIN_* variable or key, or a value that is not valid, wherever it was set and
            whether or not it would be used.
    """
    settings.check()
    config = _from_config(additional_config)
    host = _from_host(gdn_prefill_backend)
    everywhere = _from_variable(None)
    chosen = {}
    for phase in PHASES:
        chosen[phase] = (
            _from_variable(phase)
            or everywhere
            or config.get(f"{phase}_backend")
            or config.get("backend")
            or (host if phase == "prefill" else None)
            or Request("auto", "default")
        )
    return chosen


def replay_request(additional_config: Mapping[str, object] | None = None) -> Request:
    """The request for replay: "auto", "0" or the slots of a ring.

    Args, raises: as `requests`.
    """
    settings.check()
    config = _from_config(additional_config)
    said = settings.replay_request()
    return Request(said[1], said[0]) if said else config.get("replay") or Request("auto", "default")


def _from_variable(phase: str | None) -> Request | None:
    said = settings.backend_request(phase)
    return None if said is None else Request(checked(said[1], said[0]), said[0])


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
                f"{where} has no key {key!r}{suggest(str(key), CONFIG_KEYS)}; choose one of: {', '.join(CONFIG_KEYS)}"
            )
        if value is None:
            continue
        if key == "replay" and isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str):
            kind = "a string or an integer" if key == "replay" else "a string"
            raise SettingsError(f"{where}[{key!r}] must be {kind}; got {value!r}")
        check = settings.checked_replay if key == "replay" else checked
        found[str(key)] = Request(check(value, f"{where}[{key!r}]"), where)
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


def checked(raw: str, where: str) -> str:
    """A request whose names all exist, spaces removed.

    Raises:
        SettingsError: an unknown name, or auto beside another.
    """
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
                f"{where}={raw!r} is not valid{suggest(name, valid)}; choose one of: {', '.join(valid)}; "
                "or several, tried in order: flashinfer,triton"
            )
    if "auto" in names:
        raise SettingsError(f"{where}={raw!r} is not valid; auto stands alone, it already tries every backend")
    return ",".join(names)
