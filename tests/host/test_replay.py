"""A real vLLM engine on the CPU whose decode and speculation write no states: it says what the plain one says."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from tests.host.engines import SPECULATIVE, SPECULATIVE_LENGTHS, answers, needs_vllm, tokens

pytestmark = [pytest.mark.engine, needs_vllm]

RING = {"GDN_PLUGIN_REPLAY": "8"}
LENGTH = 30  # tokens of an answer; behind 500 and 505 they end past a block of the prefix cache, 256 tokens in fp32
NGRAM = {"method": "ngram", "prompt_lookup_max": 3, "prompt_lookup_min": 1, "num_speculative_tokens": 4}
MTP = {"method": "mtp", "num_speculative_tokens": 3}


def agree(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Nearly all tokens (0.97), and the log-probabilities of the tokens up to the first that differs."""
    pairs = [
        (mine, other)
        for a, b in zip(ours["rounds"], theirs["rounds"], strict=True)
        for mine, other in zip(a, b, strict=True)
    ]
    same = [[x == y for x, y in zip(mine["tokens"], other["tokens"], strict=True)] for mine, other in pairs]
    assert sum(map(sum, same)) >= 0.97 * sum(map(len, same))
    for (mine, other), equal in zip(pairs, same, strict=True):
        until = equal.index(False) if False in equal else len(equal)
        if "logprobs" in mine:
            assert mine["logprobs"][:until] == pytest.approx(other["logprobs"][:until], abs=0.01)


@pytest.fixture(scope="session")
def conversations(ask):
    """Prompts, and prompts that go on behind their answers: (rounds, what the plain engine says)."""

    def make() -> tuple[list[list[list[int]]], dict[str, Any]]:
        first = [tokens(500, 30), tokens(505, 31), tokens(40, 32), tokens(1, 33)]
        said = answers(ask("first", [first], max_tokens=LENGTH)[0])
        second = [prompt + answer + tokens(9, 34) for prompt, answer in zip(first, said, strict=True)]
        rounds = [first, second, [second[0][:512] + tokens(70, 35)]]
        plain, log = ask("conversations", rounds, max_tokens=LENGTH, logprobs=True)
        assert "gdn_plugin: replay: off (auto leaves replay off" in log
        return rounds, plain

    return functools.cache(make)


def cached(ask, conversations, name: str, **job: Any) -> tuple[dict[str, Any], dict[str, Any], str]:
    rounds, plain = conversations()
    ours, log = ask(
        name,
        rounds,
        max_tokens=LENGTH,
        logprobs=True,
        enable_prefix_caching=True,
        prefix_cache_retention_interval=None,  # by default the host keeps no block that decode has filled
        max_num_batched_tokens=300,
        environment=RING,
        **job,
    )
    assert "gdn_plugin: replay: on, a ring of 8 slots (asked for, GDN_PLUGIN_REPLAY)" in log
    hits = [answer["cached_tokens"] for prompts in ours["rounds"][1:] for answer in prompts]
    assert hits == [512, 512, 0, 0, 512], "a block that decode has filled, its ring not empty"
    return ours, plain, log


def test_a_prefix_hit_in_chunks_folds_what_the_cached_block_holds(ask, conversations) -> None:
    ours, plain, log = cached(ask, conversations, "replay-cached", spy=True)
    agree(ours, plain)
    assert ours["seen"]["decode+prefill"] > 0
    for op in ("replay_decode", "replay_fold"):
        assert sum(f"gdn_plugin: {op}: torch" in line for line in log.splitlines()) == 1, op


def test_without_the_fold_it_fails(ask, conversations) -> None:
    script = Path(__file__).with_name("replay_without_fold.py")
    ours, plain, _ = cached(ask, conversations, "replay-control", script=script)
    with pytest.raises(AssertionError):
        agree(ours, plain)


def test_preempted_requests_begin_again(ask) -> None:
    """Five requests in blocks for three: some are thrown out while they decode, and computed anew."""
    prompts = [tokens(200 + 11 * i, 40 + i) for i in range(5)]
    job = {"max_tokens": 120, "max_model_len": 768, "max_num_seqs": 5, "logprobs": True, "spy": True}
    plain, _ = ask("replay-roomy", [prompts], **job)
    ours, _ = ask("replay-preempted", [prompts], num_gpu_blocks_override=22, environment=RING, **job)
    assert plain["seen"].get("preempted", 0) == 0 < ours["seen"]["preempted"]
    agree(ours, plain)


@pytest.mark.parametrize("drafting", [NGRAM, MTP], ids=lambda drafting: drafting["method"])
def test_drafts_have_one_row_a_sequence(ask, unspeculated, drafting: dict[str, Any]) -> None:
    ours, log = ask(
        f"replay-{drafting['method']}",
        SPECULATIVE,
        max_tokens=SPECULATIVE_LENGTHS,
        speculative_config=drafting,
        max_num_batched_tokens=64,
        max_num_seqs=3,
        disable_log_stats=False,
        environment=RING,
        spy=True,
    )
    assert f"replay: on, a ring of {4 * (drafting['num_speculative_tokens'] + 1)} slots" in log
    agree(ours, unspeculated())
    counts = ours["speculation"]
    assert 0 < counts["accepted"] < counts["drafted"], counts
    assert ours["seen"]["spec"] > 0 and ours["seen"]["prefill+spec"] > 0, ours["seen"]


def test_drafts_beside_the_prefix_cache_are_served_without(ask, unspeculated) -> None:
    ours, log = ask(
        "replay-refused",
        SPECULATIVE,
        max_tokens=SPECULATIVE_LENGTHS,
        speculative_config=NGRAM,
        enable_prefix_caching=True,
        disable_log_stats=False,
        environment=RING,
    )
    assert sum("gdn_plugin: replay: off (with the prefix cache and drafts" in line for line in log.splitlines()) == 1
    agree(ours, unspeculated())
