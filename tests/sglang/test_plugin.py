"""SGLang's entry point: hands the host's registry our class, or stands down in one line."""

from __future__ import annotations

import importlib.metadata
import logging
import sys
from enum import Enum
from types import ModuleType
from typing import Any

import pytest

from gdn_plugin.hosts.sglang import compat, plugin
from tests.sglang import fakes

TARGET = f"{compat.BACKEND_MODULE}.{compat.BACKEND_CLASS}"


class HookType(Enum):
    AROUND = "around"
    REPLACE = "replace"


class Registry:
    """The host's HookRegistry: what was registered for which target."""

    def __init__(self) -> None:
        self._hooks: dict[str, list[tuple[HookType, Any, Any]]] = {}

    def register(self, target: str, hook: Any, hook_type: HookType) -> None:
        self._hooks.setdefault(target, []).append((hook_type, hook, None))


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """An SGLang that fits, in fakes."""
    made = Registry()
    fakes.install(monkeypatch)
    monkeypatch.setattr(plugin, "_state", "new")
    monkeypatch.setattr(compat, "would_attach", lambda: (True, ""))
    for name in ("GDN_PLUGIN_DISABLE", "GDN_PLUGIN_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    module = ModuleType(compat.REGISTRY_MODULE)
    module.HookRegistry, module.HookType = made, HookType  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sglang.srt.plugins", ModuleType("sglang.srt.plugins"))
    monkeypatch.setitem(sys.modules, compat.REGISTRY_MODULE, module)
    return made


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("sglang.gdn_plugin")]


def test_attaches_once(registry: Registry, caplog: pytest.LogCaptureFixture) -> None:
    plugin.register()
    plugin.register()
    ((kind, hook, _),) = registry._hooks[TARGET]
    assert kind is HookType.REPLACE and hook.__name__ == "GdnPluginBackend"
    assert issubclass(hook, fakes.HostBackend)
    assert plugin.state() == "attached" and not lines(caplog)


def test_disabled(registry: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("GDN_PLUGIN_DISABLE", "1")
    plugin.register()
    plugin.register()
    assert plugin.state() == "standing down" and not registry._hooks
    assert len(lines(caplog)) == 1 and "GDN_PLUGIN_DISABLE=1" in lines(caplog)[0]


def test_a_host_that_does_not_fit(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compat, "would_attach", lambda: (False, "SGLang 9.9 is not a version this plugin knows"))
    plugin.register()
    assert plugin.state() == "standing down" and not registry._hooks
    assert len(lines(caplog)) == 1 and "9.9" in lines(caplog)[0]


def test_another_plugin_keeps_the_backend(registry: Registry, caplog: pytest.LogCaptureFixture) -> None:
    other = type("Other", (), {"__module__": "other_plugin"})
    registry.register(TARGET, other, HookType.REPLACE)
    plugin.register()
    assert plugin.state() == "standing down" and len(registry._hooks[TARGET]) == 1
    assert len(lines(caplog)) == 1 and "other_plugin.Other has already replaced GDNAttnBackend" in lines(caplog)[0]


def test_another_plugins_hook_around_it_is_no_reason(registry: Registry) -> None:
    registry.register(f"{TARGET}.forward_decode", print, HookType.AROUND)
    plugin.register()
    assert plugin.state() == "attached"


def test_no_exception_comes_out(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> tuple[bool, str]:
        raise OSError("disk on fire")

    monkeypatch.setattr(compat, "would_attach", broken)
    plugin.register()
    assert plugin.state() == "standing down"
    assert len(lines(caplog)) == 1 and "OSError: disk on fire" in lines(caplog)[0]


def test_a_host_that_does_not_import(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a CPU without SGLang's kernels, for one."""
    monkeypatch.setitem(sys.modules, compat.BACKEND_MODULE, None)
    with caplog.at_level(logging.INFO):
        plugin.register()
    assert plugin.state() == "standing down" and not registry._hooks
    assert len(lines(caplog)) == 1 and "import" in lines(caplog)[0]


def test_a_wrong_switch_is_left_to_the_backend(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("GDN_PLUGIN_DISABLE", "perhaps")
    plugin.register()
    assert plugin.state() == "attached" and not lines(caplog)


def test_entry_point_names_register() -> None:
    points = importlib.metadata.entry_points(group="sglang.srt.plugins", name="gdn_plugin")
    if not points:
        pytest.skip("gdn-plugin is not installed from this checkout: pip install -e .")
    assert [point.value for point in points] == ["gdn_plugin.hosts.sglang.plugin:register"]
    assert next(iter(points)).load() is plugin.register
