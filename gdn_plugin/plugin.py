"""vLLM's way in: the entry point `gdn_plugin` of group `vllm.general_plugins` is `register`.

vLLM calls it in every process, before it has imported a model. It decides from the host's source whether the plugin
fits, imports nothing of the host's layers (that would initialise CUDA), and leaves a hook behind that registers the
layer as soon as the host itself has imported its own.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

# Below vLLM's own logger, so that its handlers and its level apply.
_log = logging.getLogger("vllm.gdn_plugin")

_state = "new"  # -> "waiting" for the host's layer -> "attached"; or "standing down"


def register() -> None:
    """Arrange for vLLM's GDN layers to run on this plugin's ops, or say in one line why not.

    Idempotent; lets no exception out; initialises no CUDA. Stock vLLM serves wherever the plugin stands down: with
    GDN_PLUGIN_DISABLE=1, on a vLLM it does not know or that lacks a name it needs, and where another plugin has
    replaced the layer. A wrong setting is not a reason to stand down: it stops the engine when the layer is built.
    """
    if _state != "new":
        return
    try:
        _register()
    except Exception as problem:  # whatever goes wrong here, the host must start
        _stand_down(f"its own start failed with {type(problem).__name__}: {problem}")


def state() -> str:
    """Where the plugin is in this process: "new", "waiting", "attached" or "standing down"."""
    return _state


def _register() -> None:
    from gdn_plugin import settings
    from gdn_plugin.hosts.vllm import compat

    if _wants_out(settings):
        _stand_down("GDN_PLUGIN_DISABLE=1")
        return
    fits, why = compat.would_attach()
    if not fits:
        _stand_down(why)
        return
    _set_state("waiting")
    if compat.LAYER_MODULE in sys.modules:
        _attach_or_stand_down()
    else:
        sys.meta_path.insert(0, _AfterImport(compat.LAYER_MODULE, _attach_or_stand_down))


def _wants_out(settings: ModuleType) -> bool:
    try:
        return settings.disabled()
    except settings.SettingsError:
        return False  # neither 0 nor 1: the layer reports it and stops the engine


def _attach_or_stand_down() -> None:
    try:
        _attach()
    except Exception as problem:  # runs inside the host's import of its own module
        _stand_down(f"its layer could not be registered: {type(problem).__name__}: {problem}")


def _attach() -> None:
    """Register the layer. The host's own module is imported by now."""
    from gdn_plugin.hosts.vllm import compat

    host = importlib.import_module(compat.REGISTRY_MODULE)
    taken = host.op_registry_oot.get(compat.LAYER_CLASS)
    if taken is not None:
        _stand_down(f"{taken.__module__}.{taken.__qualname__} has already replaced {compat.LAYER_CLASS}")
        return
    from gdn_plugin.hosts.vllm.layer import GdnPluginAttention

    host.PluggableLayer.register_oot(GdnPluginAttention, name=compat.LAYER_CLASS)
    _set_state("attached")


def _stand_down(why: str) -> None:
    _set_state("standing down")
    # A warning even where it was asked for: vLLM sets up its logging after this, and Python drops what is below.
    _log.warning("gdn_plugin stands down, vLLM serves GDN layers with its own code: %s", why)


def _set_state(value: str) -> None:
    global _state
    _state = value


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls back once, right after a module has been executed. Finds nothing itself."""

    def __init__(self, module: str, callback: Callable[[], object]) -> None:
        self._module = module
        self._callback = callback

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._module:
            return None
        with contextlib.suppress(ValueError):
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        loader, callback = spec.loader, self._callback
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module  # type: ignore[method-assign]
            execute(module)
            callback()

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
