"""A real vLLM engine on the CPU whose decode and speculation write no states: it says what the plain one says."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from tests.host.engines import (
    BF16_LIMIT,
    MIXED,
    QWEN3_5,
    SPECULATIVE,
    SPECULATIVE_LENGTHS,
    TWO_WORKERS,
    answers,
    needs_vllm,
    repeated,
    tokens,
)

pytestmark = [pytest.mark.engine, needs_vllm]

RING = {"GDN_PLUGIN_REPLAY": "8"}
# Tokens of the conversations' answers; behind prompts of 500 and 505 they fill two blocks of the prefix cache and one,
# which are of 256 tokens in fp32.
LENGTHS = [[290, 30, 30, 30], [30, 30, 30, 30], [30]]
NGRAM = {"method": "ngram", "prompt_lookup_max": 3, "prompt_lookup_min": 1, "num_speculative_tokens": 4}
MTP = {"method": "mtp", "num_speculative_tokens": 3}


def agree(ours: dict[str, Any], theirs: dict[str, Any], *, bf16: bool = False) -> None:
    """Nearly all tokens (0.97), and the log-probabilities of the tokens up to the first that differs.

    Args:
        bf16: logits are so coarse that some tokens are ties, which any rounding decides. What is said behind one counts
            for nothing then, and of log-probabilities the mean difference is judged.
    """
    pairs = [
        (mine, other)
        for a, b in zip(ours["rounds"], theirs["rounds"], strict=True)
        for mine, other in zip(a, b, strict=True)
    ]
    same = [[x == y for x, y in zip(mine["tokens"], other["tokens"], strict=True)] for mine, other in pairs]
    until = [equal.index(False) if False in equal else len(equal) for equal in same]
    gaps = [
        [abs(x - y) for x, y in zip(mine.get("logprobs", []), other.get("logprobs", []), strict=False)]
        for mine, other in pairs
    ]
    before = [gap for of_one, end in zip(gaps, until, strict=True) for gap in of_one[:end]]
    if not bf16:
        assert sum(map(sum, same)) >= 0.97 * sum(map(len, same))
        assert all(gap <= 0.01 for gap in before), before
        return
    differing = [of_one[end] for of_one, end in zip(gaps, until, strict=True) if end < len(of_one)]
    assert len(differing) <= 0.03 * sum(until) and all(gap <= BF16_LIMIT for gap in differing), (until, differing)
    assert sum(before) <= 0.01 * len(before), sum(before) / len(before)


@pytest.fixture(scope="session")
def conversations(ask):
    """Prompts, and prompts that go on behind their answers: (rounds, what the plain engine says)."""

    def make() -> tuple[list[list[list[int]]], dict[str, Any]]:
        first = [repeated(500, 30, 30), repeated(505, 7, 31), tokens(40, 32), tokens(1, 33)]
        said = answers(ask("first", [first], max_tokens=LENGTHS)[0])
        second = [prompt + answer + tokens(9, 34) for prompt, answer in zip(first, said, strict=True)]
        rounds = [first, second, [second[0][:512] + tokens(70, 35)]]
        plain, log = ask("conversations", rounds, max_tokens=LENGTHS, logprobs=True)
        assert "gdn_plugin: replay: off (auto leaves replay off" in log
        return rounds, plain

    return functools.cache(make)


def cached(
    ask, conversations, name: str, slots: int = 8, dropped: int = 0, **job: Any
) -> tuple[dict[str, Any], dict[str, Any], str]:
    rounds, plain = conversations()
    ours, log = ask(
        name,
        rounds,
        max_tokens=LENGTHS,
        logprobs=True,
        enable_prefix_caching=True,
        prefix_cache_retention_interval=None,  # by default the host keeps no block that decode has filled
        max_num_batched_tokens=300,
        environment=RING,
        **job,
    )
    assert f"gdn_plugin: replay: on, a ring of {slots} slots (asked for, GDN_PLUGIN_REPLAY)" in log
    hits = [answer["cached_tokens"] for prompts in ours["rounds"][1:] for answer in prompts]
    # Blocks that decode has filled, their rings not empty, but for 256; less what the host leaves out.
    assert hits == [768 - dropped, 512 - dropped, 0, 0, 512 - dropped]
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


@pytest.mark.parametrize(("drafting", "dropped"), [(NGRAM, 0), (MTP, 256)], ids=["ngram", "mtp"])
def test_drafts_beside_the_prefix_cache(ask, conversations, drafting: dict[str, Any], dropped: int) -> None:
    """Pages are moved from behind accepted drafts too. With MTP the host leaves a request's last cached block out."""
    ours, plain, _ = cached(
        ask,
        conversations,
        f"replay-cached-{drafting['method']}",
        slots=4 * (drafting["num_speculative_tokens"] + 1),
        dropped=dropped,
        speculative_config=drafting,
        disable_log_stats=False,
        spy=True,
    )
    agree(ours, plain)
    assert 0 < ours["speculation"]["accepted"] < ours["speculation"]["drafted"]
    assert ours["seen"]["moved from behind drafts"] > 0 and ours["seen"]["moved"] > 0


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


@pytest.mark.slow
def test_mtp_on_two_ranks(ask, unspeculated) -> None:
    """Each has half of the heads and of the ring; the scheduler is in a process of its own."""
    ours, log = ask(
        "replay-tp2",
        SPECULATIVE,
        max_tokens=SPECULATIVE_LENGTHS,
        speculative_config={"method": "mtp", "num_speculative_tokens": 5},
        enable_prefix_caching=True,
        max_num_batched_tokens=300,
        max_num_seqs=3,
        tensor_parallel_size=2,
        disable_log_stats=False,
        environment=RING | TWO_WORKERS,
    )
    assert log.count("gdn_plugin: replay: on, a ring of 24 slots") == 2  # one line a worker
    agree(ours, unspeculated())
    assert 0 < ours["speculation"]["accepted"] < ours["speculation"]["drafted"]


@pytest.mark.slow
def test_one_draft_of_qwen3_5(ask, qwen3_5, plain_qwen3_5) -> None:
    ours, log = ask(
        "replay-qwen3_5-mtp",
        SPECULATIVE,
        max_tokens=SPECULATIVE_LENGTHS,
        speculative_config={"method": "mtp", "num_speculative_tokens": 1},
        max_num_batched_tokens=64,
        max_num_seqs=3,
        disable_log_stats=False,
        model=str(qwen3_5),
        environment=RING | QWEN3_5,
        spy=True,
    )
    assert "gdn_plugin: replay: on, a ring of 8 slots" in log
    agree(ours, {"rounds": plain_qwen3_5()["rounds"][len(MIXED) :]})
    assert 0 < ours["speculation"]["accepted"] < ours["speculation"]["drafted"]
    assert ours["seen"]["prefill+spec"] > 0, ours["seen"]


@pytest.mark.slow
def test_qwen3_5_compiled_in_bf16(ask, qwen3_5, tmp_path: Path) -> None:
    """vLLM's default: torch.compile, the model's own dtype, and the state's with it; the flat layout."""
    prompts = [tokens(300, 50), tokens(1, 51), repeated(40, 8, 52), tokens(70, 53), tokens(129, 54)]
    job = {"max_tokens": 40, "logprobs": True, "model": str(qwen3_5), "dtype": "bfloat16", "enforce_eager": False}
    environment = QWEN3_5 | {"VLLM_CACHE_ROOT": str(tmp_path)}
    plain, _ = ask("replay-bf16-without", [prompts], environment=environment, **job)
    ours, log = ask("replay-bf16", [prompts], environment=RING | environment, spy=True, **job)
    assert "gdn_plugin: replay: on, a ring of 8 slots" in log
    assert ours["seen"]["decode"] > 0 and ours["graph_breaks"] == {}
    agree(ours, plain, bf16=True)
