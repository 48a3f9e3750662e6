"""A real vLLM engine on the CPU, tiny Qwen3-Next, stock and with the plugin. A process an engine; half a minute each.

Models in fp32 where tokens must be equal: there a different order of additions does not turn a token over.
"""

from __future__ import annotations

import functools

import pytest

from tests.host.engines import (
    BF16_LIMIT,
    FP32_LIMIT,
    MIXED,
    PLUGIN,
    QWEN3_5,
    SPECULATIVE,
    SPECULATIVE_LENGTHS,
    STOCK,
    answers,
    log_probability_gap,
    needs_vllm,
    tokens,
)

pytestmark = [pytest.mark.engine, needs_vllm]


@pytest.fixture(scope="session")
def uncached(ask):
    return functools.cache(lambda: ask("uncached", caching_rounds(), max_tokens=24)[0])


def test_bf16_is_the_stock_model(ask, bf16) -> None:
    stock, log = ask("stock", MIXED, prompt_logprobs=True, dtype="bfloat16", environment=STOCK)
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


def test_qwen3_5_is_the_stock_model(ask, qwen3_5, plain_qwen3_5) -> None:
    """Flat projections, with the gated norm inside the op; a dense model."""
    job = {"prompt_logprobs": True, "dtype": "bfloat16", "model": str(qwen3_5)}
    stock, _ = ask("qwen3_5-stock", MIXED, environment=QWEN3_5 | STOCK, **job)
    ours, _ = ask("qwen3_5-bf16", MIXED, environment=QWEN3_5, **job)
    assert PLUGIN not in stock["layers"] and set(ours["layers"]) == {PLUGIN}
    assert log_probability_gap(stock, ours) < BF16_LIMIT
    assert log_probability_gap(plain_qwen3_5() | {"rounds": plain_qwen3_5()["rounds"][:1]}, ours) < BF16_LIMIT


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
# On a CPU auto verifies in parts; torch has the fused op.
SPECULATION = {
    "ngram-1": (NGRAM | {"num_speculative_tokens": 1}, False, "auto"),
    "ngram-2": (NGRAM | {"num_speculative_tokens": 2}, False, "auto"),
    "ngram-3-fused": (NGRAM | {"num_speculative_tokens": 3}, False, "torch"),
    "ngram-4-cached": (NGRAM | {"num_speculative_tokens": 4}, True, "auto"),
    "mtp-2": ({"method": "mtp", "num_speculative_tokens": 2}, False, "auto"),
    "mtp-3-cached-fused": ({"method": "mtp", "num_speculative_tokens": 3}, True, "torch"),
    "mtp-4": ({"method": "mtp", "num_speculative_tokens": 4}, False, "auto"),
}


@pytest.mark.parametrize("kind", SPECULATION)
def test_speculation_changes_no_token(ask, unspeculated, kind: str) -> None:
    speculative_config, cached, verify = SPECULATION[kind]
    drafted, _ = ask(
        kind,
        SPECULATIVE * (2 if cached else 1),
        max_tokens=SPECULATIVE_LENGTHS * (2 if cached else 1),
        speculative_config=speculative_config,
        enable_prefix_caching=cached,
        max_num_batched_tokens=300 if cached else 64,
        max_num_seqs=3,
        disable_log_stats=False,
        environment={"GDN_PLUGIN_VERIFY_BACKEND": verify},
        spy=True,
    )
    assert answers(drafted) == answers(unspeculated()) * (2 if cached else 1)
    counts = drafted["speculation"]
    assert 0 < counts["accepted"] < counts["drafted"], counts
    assert drafted["seen"]["spec"] > 0 and drafted["seen"]["prefill+spec"] > 0, drafted["seen"]
    assert drafted["compiled_while_serving"] == 0


def test_mtp_of_qwen3_5_changes_no_token(ask, qwen3_5, plain_qwen3_5) -> None:
    """One draft; the flat layout, whose norm comes behind the verified tokens."""
    drafted, _ = ask(
        "mtp-1",
        SPECULATIVE,
        max_tokens=SPECULATIVE_LENGTHS,
        speculative_config={"method": "mtp", "num_speculative_tokens": 1},
        max_num_batched_tokens=64,
        max_num_seqs=3,
        disable_log_stats=False,
        model=str(qwen3_5),
        environment=QWEN3_5,
        spy=True,
    )
    assert answers(drafted) == answers(plain_qwen3_5())[len(MIXED[0]) :]
    counts = drafted["speculation"]
    assert 0 < counts["accepted"] < counts["drafted"], counts
    assert drafted["seen"]["prefill+spec"] > 0, drafted["seen"]


def test_a_bad_setting_stops_the_engine(ask) -> None:
    """In one readable line; the layer's tests have the other kinds of bad settings."""
    _, log = ask("bad", MIXED, environment={"GDN_PLUGIN_PREFILL_BACKEND": "tritno"}, fails=True)
    assert sum(
        "GDN_PLUGIN_PREFILL_BACKEND='tritno' is not valid; did you mean 'triton'?" in x for x in log.splitlines()
    )
