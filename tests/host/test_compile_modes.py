"""vLLM's torch.compile modes with the plugin's layer in the model: the same answers, one graph, compiled once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gdn_plugin.hosts.vllm.patches import saved_models as compile_cache
from tests.host.engines import FP32_LIMIT, MIXED, PLUGIN, answers, log_probability_gap, needs_vllm

LOADED, SAVED = "Directly load AOT compilation from path", "saved AOT compiled function to"

engine = [pytest.mark.engine, pytest.mark.slow, needs_vllm]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """vLLM's cache of compiled models, empty at first."""
    return {"VLLM_CACHE_ROOT": str(tmp_path_factory.mktemp("vllm-cache"))}


@pytest.fixture(scope="module")
def cold(ask, cache: dict[str, str]) -> tuple[dict[str, Any], str]:
    return ask("compiled", MIXED, prompt_logprobs=True, enforce_eager=False, environment=cache, spy=True)


def same(compiled: dict[str, Any], eager: dict[str, Any]) -> None:
    assert set(compiled["layers"]) == {PLUGIN} and compiled["seen"]["prefill"] > 0
    assert compiled["graph_breaks"] == {}
    assert compiled["compiled_while_serving"] == 0
    assert answers(compiled) == answers(eager)
    assert log_probability_gap(eager, compiled) < FP32_LIMIT


class TestEngine:
    pytestmark = engine

    def test_a_cold_start_compiles_once(self, cold, plain) -> None:
        """The default: vLLM asks for VLLM_COMPILE, its CPU platform makes DYNAMO_TRACE_ONCE of it."""
        compiled, log = cold
        same(compiled, plain())
        assert (log.count(SAVED), log.count(LOADED)) == (1, 0)
        assert compiled["compiled_graphs"] >= 1
        assert "<CompilationMode.DYNAMO_TRACE_ONCE: 2>" in log

    @pytest.mark.parametrize(
        "mode",
        [{}, {"cudagraph_mode": "PIECEWISE"}, {"cudagraph_mode": "FULL"}],
        ids=["default", "piecewise", "full"],
    )
    def test_a_second_start_compiles_nothing(self, ask, cache, cold, plain, mode: dict[str, Any]) -> None:
        """And a graph setting makes no other model: on a CPU there is nothing to capture."""
        name = f"compiled-again-{mode.get('cudagraph_mode', 'default')}"
        llm = {"enforce_eager": False, "compilation_config": mode} if mode else {"enforce_eager": False}
        compiled, log = ask(name, MIXED, prompt_logprobs=True, environment=cache, spy=True, **llm)
        same(compiled, plain())
        assert (log.count(SAVED), log.count(LOADED)) == (0, 1), log[-3000:]
        assert compiled["compiled_graphs"] == 0
        assert compiled["startup_s"] < cold[0]["startup_s"]

    def test_stock_torch_compile(self, ask, cache, plain) -> None:
        """Mode 1: torch.compile on the whole model, nothing of vLLM's around it."""
        compiled, _ = ask(
            "compiled-stock-mode",
            MIXED,
            prompt_logprobs=True,
            enforce_eager=False,
            compilation_config={"mode": 1},
            environment=cache,
            spy=True,
        )
        same(compiled, plain())


def test_the_gap_that_the_plugin_fills() -> None:
    """torch's artefact lacks what vLLM calls on it. Where this fails, compile_cache has nothing left to do."""
    code = (
        "import json\n"
        f"import {compile_cache._MODULE} as host\n"
        f"artefact = host.{compile_cache._CLASS}\n"
        f"before = {compile_cache._METHOD!r} in dir(artefact)\n"
        "from gdn_plugin.hosts.vllm.patches.saved_models import let_artefacts_load\n"
        "given = [let_artefacts_load(), let_artefacts_load()]\n"
        f"print(json.dumps([before, given, artefact.{compile_cache._METHOD}(None, None)]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [False, [True, False], None]


def test_a_torch_without_the_artefact_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_cache, "_CLASS", "NoSuchClass")
    assert not compile_cache.let_artefacts_load()
    monkeypatch.setattr(compile_cache, "_MODULE", "torch.no_such_module")
    assert not compile_cache.let_artefacts_load()


@needs_vllm
def test_the_host_calls_it() -> None:
    from gdn_plugin.hosts.vllm import compat

    root = compat.installed_root()
    assert root is not None
    text = Path(root / "compilation" / "decorators.py").read_text()
    assert f"loaded_fn._artifacts.compiled_fn.{compile_cache._METHOD}(model.vllm_config)" in text
