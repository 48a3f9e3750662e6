"""SGLang's way in: the entry point `gdn_plugin` of group `sglang.srt.plugins` is `register`.

SGLang calls it in every process, before it has read its arguments. It decides from the host's source whether the plugin
fits, and if so hands SGLang's own HookRegistry the class that takes the place of the host's GDN backend. (The registry
imports the host's backend in any case, to replace it.)
"""

from __future__ import annotations

import importlib
import logging

# Below SGLang's own loggers. It sets up its logging by a handler at the root, so any name does.
_log = logging.getLogger("sglang.gdn_plugin")

_state = "new"  # -> "attached" or "standing down"


def register() -> None:
    """Have SGLang's GDN layers run on this plugin's ops, or say in one line why not.

    Idempotent; lets no exception out. SGLang's own code serves wherever the plugin stands down: with
    GDN_PLUGIN_DISABLE=1, on an SGLang it does not know or that lacks a name it needs, and where another plugin has
    replaced the backend. A wrong setting is not a reason to stand down. SGLang only logs what a plugin raises here, so
    it stops the server when the backend is built.
    """
    if _state != "new":
        return
    try:
        _register()
    except Exception as problem:  # whatever goes wrong here, the host must start
        _stand_down(f"its own start failed with {type(problem).__name__}: {problem}")


def state() -> str:
    """Where the plugin is in this process: "new", "attached" or "standing down"."""
    return _state


def _register() -> None:
    from gdn_plugin.hosts.sglang import compat

    if _wants_out():
        _stand_down("GDN_PLUGIN_DISABLE=1")
        return
    fits, why = compat.would_attach()
    if not fits:
        _stand_down(why)
        return
    host = importlib.import_module(compat.REGISTRY_MODULE)
    target = f"{compat.BACKEND_MODULE}.{compat.BACKEND_CLASS}"
    for kind, other, _ in host.HookRegistry._hooks.get(target, ()):
        if kind is host.HookType.REPLACE:
            _stand_down(f"{other.__module__}.{other.__qualname__} has already replaced {compat.BACKEND_CLASS}")
            return
    from gdn_plugin.hosts.sglang.backend import GdnPluginBackend

    host.HookRegistry.register(target, GdnPluginBackend, host.HookType.REPLACE)
    _set_state("attached")


def _wants_out() -> bool:
    from gdn_plugin import settings

    try:
        return settings.disabled()
    except settings.SettingsError:
        return False  # neither 0 nor 1: the backend reports it and stops the server


def _stand_down(why: str) -> None:
    _set_state("standing down")
    # A warning even where it was asked for: it may come before SGLang has set up its logging.
    _log.warning("gdn_plugin stands down, SGLang serves GDN layers with its own code: %s", why)


def _set_state(value: str) -> None:
    global _state
    _state = value
