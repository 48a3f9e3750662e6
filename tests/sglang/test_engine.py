"""A real SGLang engine on the CPU, beside stand-ins for SGLang's compiled kernels (`examples/sglang_standins`).

Its scheduler, radix cache, pools, loader and models are SGLang's. What the plugin's engine says is compared with what
the same engine says on the stand-ins' plain recurrence: that proves the adapter and nothing of SGLang's own kernels.

Run by `make test-sglang`, in an environment of its own.
"""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gdn_plugin.hosts.sglang import compat

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from run_sglang import SERVED_BY_STANDIN, run_in_subprocess
from tiny_model import TinyConfig, write_tiny_qwen3_next

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(compat.installed_root() is None, reason="SGLang is not installed: make test-sglang"),
]

STOCK = {"GDN_PLUGIN_DISABLE": "1"}
# Mean |difference| of log-probabilities of tokens that agree, bf16 models: 0.005 to 0.011; of the control 0.12.
LIMIT = 0.03
CHUNKED = {"chunked_prefill_size": 128, "enable_mixed_chunk": True}
EXTRA_BUFFER = {"mamba_radix_cache_strategy": "extra_buffer"}
MAX_TOKENS = 16


def tokens(count: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(count)]


FIRST = [tokens(1, 0), tokens(5, 1), tokens(64, 2), tokens(129, 3), tokens(300, 4)]
# The second round continues what the first has left in the radix cache; one prompt branches off inside.
SECOND = [FIRST[4] + tokens(3, 5), FIRST[3] + tokens(70, 6), FIRST[4][:200] + tokens(20, 7), tokens(40, 8)]
ROUNDS = [FIRST, SECOND]
HITS = (0, 1)  # of SECOND: prompts whose beginning is a whole prompt of FIRST

Ask = Callable[..., tuple[dict[str, Any], str]]
Stock = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sglang")
    return {
        # SGLang's Qwen3-Next has experts in every layer.
        "qwen3_next": write_tiny_qwen3_next(folder / "next", TinyConfig(moe_layers=(0, 1, 2, 3))),
        "qwen3_5": write_tiny_qwen3_next(folder / "flat", TinyConfig(flat=True, vision=True)),
    }


@pytest.fixture(scope="module")
def ask(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Ask:
    """ask(name, model, environment, aborted, **engine's arguments) -> (result, log), a process of its own each time."""
    folder = tmp_path_factory.mktemp("engines")

    def ask(
        name: str,
        model: str,
        environment: dict[str, str] | None = None,
        aborted: list[list[int]] | None = None,
        fails: bool = False,
        **engine: Any,
    ) -> tuple[dict[str, Any], str]:
        if model == "qwen3_5":
            engine["enable_multimodal"] = False  # its text part alone
        job = {
            "engine": {"model_path": str(models[model]), **engine},
            "rounds": ROUNDS,
            "max_tokens": MAX_TOKENS,
            "aborted": aborted,
        }
        result, log = run_in_subprocess(job, folder, name, environment=environment)
        if fails:
            assert result is None, "the engine started"
            return {}, log
        assert result is not None, log[-6000:]
        return result, log

    return ask


@pytest.fixture(scope="module")
def stock(ask: Ask) -> Stock:
    """The same engine on the stand-ins' recurrence: what the plugin's must equal."""

    @functools.cache
    def stock(model: str) -> dict[str, Any]:
        result, log = ask(f"stock-{model}", model, STOCK)
        assert SERVED_BY_STANDIN in log and log.count("stands down") >= 1
        return result

    return stock


def difference(result: dict[str, Any], wanted: dict[str, Any]) -> tuple[int, float]:
    """(tokens that differ, mean |difference| of log-probabilities up to the first of them)."""
    wrong, gaps = 0, []
    for got_round, want_round in zip(result["rounds"], wanted["rounds"], strict=True):
        for got, want in zip(got_round, want_round, strict=True):
            same = [a == b for a, b in zip(got["tokens"], want["tokens"], strict=True)]
            wrong += same.count(False)
            agree = same.index(False) if False in same else len(same)
            pairs = zip(got["logprobs"][:agree], want["logprobs"][:agree], strict=True)
            gaps += [abs(a - b) for a, b in pairs]
    return wrong, sum(gaps) / max(len(gaps), 1)


@pytest.fixture
def say(request: pytest.FixtureRequest) -> Callable[..., None]:
    """say(result, wanted): the comparison, where the tests' dots are."""
    terminal = request.config.pluginmanager.getplugin("terminalreporter")
    captured = request.config.pluginmanager.getplugin("capturemanager")

    def say(result: dict[str, Any], wanted: dict[str, Any]) -> None:
        wrong, mean = difference(result, wanted)
        total = sum(len(answer["tokens"]) for prompts in wanted["rounds"] for answer in prompts)
        name = request.node.name.removeprefix("test_").replace("_", " ")
        with captured.global_and_fixture_disabled():
            terminal.write_line(f"{name}: {total - wrong}/{total} tokens equal, mean |d log p| {mean:.4f}")

    return say


def served(log: str) -> bool:
    """Whether the plugin ran every GDN layer."""
    return "gdn_plugin: prefill: " in log and not any(
        line in log for line in (SERVED_BY_STANDIN, "left to SGLang", "stands down")
    )


def same(result: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Two bf16 engines may part at a near tie; a wrong state parts most answers."""
    wrong, mean = difference(result, wanted)
    total = sum(len(answer["tokens"]) for prompts in wanted["rounds"] for answer in prompts)
    return wrong <= 0.05 * total and mean < LIMIT


def cached(result: dict[str, Any]) -> list[int]:
    return [result["rounds"][1][i]["cached_tokens"] for i in HITS]


def test_no_buffer_and_aborts(ask: Ask, stock: Stock, say: Callable[..., None]) -> None:
    """Requests are aborted while they are served, beside one another; what comes into their slots is right."""
    result, log = ask("no-buffer", "qwen3_next", aborted=[tokens(100, 9), tokens(33, 10), tokens(200, 11)])
    say(result, stock("qwen3_next"))
    assert served(log) and same(result, stock("qwen3_next"))
    assert cached(result) == [300, 129]  # the radix cache answers for whole prompts


def test_chunks_and_mixed_batches(ask: Ask, stock: Stock, say: Callable[..., None]) -> None:
    result, log = ask("chunks", "qwen3_next", **CHUNKED | {"chunked_prefill_size": 64})
    say(result, stock("qwen3_next"))
    assert served(log) and same(result, stock("qwen3_next"))


def test_extra_buffer_keeps_our_checkpoints(ask: Ask, stock: Stock, say: Callable[..., None]) -> None:
    """Prompts continue from states that came out of the middle of a prefill."""
    result, log = ask("extra-buffer", "qwen3_next", **EXTRA_BUFFER, **CHUNKED)
    say(result, stock("qwen3_next"))
    assert served(log) and same(result, stock("qwen3_next"))
    for hit, whole in zip(cached(result), (300, 129), strict=True):
        assert whole - 64 <= hit < whole  # the last whole chunk


def test_qwen3_5(ask: Ask, stock: Stock, say: Callable[..., None]) -> None:
    result, log = ask("flat", "qwen3_5", **EXTRA_BUFFER)
    say(result, stock("qwen3_5"))
    assert served(log) and same(result, stock("qwen3_5"))
    assert all(cached(result))


def test_a_control_that_must_fail(ask: Ask, stock: Stock, say: Callable[..., None]) -> None:
    """Every extend starts from zero, whatever its slot holds."""
    environment = {"SGLANG_STANDINS_ALSO": "control:forget_initial_states", "PYTHONPATH": str(Path(__file__).parent)}
    result, log = ask("control", "qwen3_next", environment, chunked_prefill_size=64)
    say(result, stock("qwen3_next"))
    assert served(log) and not same(result, stock("qwen3_next"))


def test_a_wrong_setting_stops_the_server(ask: Ask) -> None:
    _, log = ask("wrong", "qwen3_next", {"GDN_PLUGIN_BACKEND": "tritom"}, fails=True)
    assert "GDN_PLUGIN_BACKEND='tritom' is not valid; did you mean 'triton'?" in log
