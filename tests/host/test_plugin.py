"""The entry point: attaches to the host's layer as it is imported, or stands down in one line."""

from __future__ import annotations

import importlib.metadata
import logging
import subprocess
import sys

import pytest

from gdn_plugin import plugin
from gdn_plugin.hosts.vllm import compat

needs_vllm = pytest.mark.skipif(compat.installed_root() is None, reason="vLLM is not installed")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "_state", "new")
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    for name in ("GDN_PLUGIN_DISABLE", "GDN_PLUGIN_BACKEND"):
        monkeypatch.delenv(name, raising=False)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("vllm.gdn_plugin")]


def run(code: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_disabled(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("GDN_PLUGIN_DISABLE", "1")
    with caplog.at_level(logging.INFO):
        plugin.register()
        plugin.register()
    assert plugin.state() == "standing down"
    assert len(lines(caplog)) == 1 and "GDN_PLUGIN_DISABLE=1" in lines(caplog)[0]


def test_a_host_that_does_not_fit(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(compat, "would_attach", lambda: (False, "vLLM 9.9 is not a version this plugin knows"))
    finders = list(sys.meta_path)
    plugin.register()
    assert plugin.state() == "standing down" and sys.meta_path == finders
    assert len(lines(caplog)) == 1 and "9.9" in lines(caplog)[0]


def test_no_exception_comes_out(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> tuple[bool, str]:
        raise OSError("disk on fire")

    monkeypatch.setattr(compat, "would_attach", broken)
    plugin.register()
    assert plugin.state() == "standing down"
    assert len(lines(caplog)) == 1 and "disk on fire" in lines(caplog)[0]


def test_a_wrong_switch_is_left_to_the_layer(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("GDN_PLUGIN_DISABLE", "perhaps")
    monkeypatch.setattr(compat, "would_attach", lambda: (True, ""))
    monkeypatch.delitem(sys.modules, compat.LAYER_MODULE, raising=False)
    plugin.register()
    assert plugin.state() == "waiting" and not lines(caplog)


def test_the_hook_fires_once_after_the_import(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hooked_module.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    seen = []
    finder = plugin._AfterImport("hooked_module", lambda: seen.append(sys.modules["hooked_module"].value))
    sys.meta_path.insert(0, finder)
    import hooked_module  # type: ignore[import-not-found]

    assert seen == [1] and finder not in sys.meta_path
    importlib.reload(hooked_module)
    assert seen == [1]
    del sys.modules["hooked_module"]


def test_entry_point_names_register() -> None:
    found = [
        point for point in importlib.metadata.entry_points(group="vllm.general_plugins") if point.name == "gdn_plugin"
    ]
    assert len(found) == 1, "the package is not installed, so vLLM cannot find it"
    assert found[0].value == "gdn_plugin.plugin:register" and found[0].load() is plugin.register


@needs_vllm
def test_registration_is_lazy_and_happens_with_the_hosts_import() -> None:
    done = run(
        "import sys\n"
        "from gdn_plugin import plugin\n"
        "plugin.register(); plugin.register()\n"
        "print(plugin.state(), [m for m in ('torch', 'vllm', 'triton') if m in sys.modules])\n"
        "import torch\n"
        f"import {compat.LAYER_MODULE} as host\n"
        f"from {compat.REGISTRY_MODULE} import op_registry_oot\n"
        "taken = op_registry_oot[host.QwenGatedDeltaNetAttention.__name__]\n"
        "print(plugin.state(), torch.cuda.is_initialized(), taken)\n"
        "plugin.register()\n"
        "print(plugin.state())\n"
    )
    first, second, third = [line for line in done.stdout.splitlines() if line.startswith(("waiting", "attached"))]
    assert first == "waiting []"
    assert second == "attached False <class 'gdn_plugin.hosts.vllm.layer.GdnPluginAttention'>"
    assert third == "attached"
    assert "stands down" not in done.stdout + done.stderr


@needs_vllm
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_registration_in_child_processes(method: str) -> None:
    done = run(
        "import multiprocessing\n"
        "from gdn_plugin import plugin\n"
        "plugin.register()\n"
        f"with multiprocessing.get_context({method!r}).Pool(1) as pool:\n"
        "    before = pool.apply(plugin.state)\n"
        "    pool.apply(plugin.register)\n"
        "    print(plugin.state(), before, pool.apply(plugin.state))\n"
    )
    assert done.stdout.split() == ["waiting", "waiting" if method == "fork" else "new", "waiting"]
    assert "stands down" not in done.stderr


@needs_vllm
def test_the_hosts_filter_of_plugins() -> None:
    """vLLM's own loader under VLLM_PLUGINS: unset, ours among others, another's, ours mistyped, none."""
    filters = [None, "another,gdn_plugin", "another", "gdn-plugin", ""]
    done = run(
        "import os\n"
        "from gdn_plugin import plugin\n"
        "import vllm.plugins as host\n"
        "found = []\n"
        f"for value in {filters!r}:\n"
        "    os.environ.pop('VLLM_PLUGINS', None)\n"
        "    if value is not None:\n"
        "        os.environ['VLLM_PLUGINS'] = value\n"
        "    plugin._state, host.plugins_loaded = 'new', False\n"
        "    host.load_general_plugins()\n"
        "    found.append(plugin.state())\n"
        "print('found', *found)\n"
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("found")]
    assert line.split()[1:] == ["waiting", "waiting", "new", "new", "new"]


@needs_vllm
def test_a_second_plugin_keeps_the_layer() -> None:
    done = run(
        "from gdn_plugin import plugin\n"
        f"from {compat.REGISTRY_MODULE} import PluggableLayer, op_registry_oot\n"
        "Other = type('Other', (PluggableLayer,), {'__module__': 'other_plugin'})\n"
        f"PluggableLayer.register_oot(Other, name='{compat.LAYER_CLASS}')\n"
        "plugin.register()\n"
        f"import {compat.LAYER_MODULE}\n"
        f"print(plugin.state(), op_registry_oot['{compat.LAYER_CLASS}'] is Other)\n"
    )
    assert "standing down True" in done.stdout
    said = [line for line in (done.stdout + done.stderr).splitlines() if "stands down" in line]
    assert len(said) == 1 and "other_plugin.Other has already replaced QwenGatedDeltaNetAttention" in said[0]
