"""Nobody gets to see what the blocks of former users hold: a real engine, NaN in every block that is handed out."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.host.engines import LLM, needs_vllm, repeated, run_in_subprocess, tokens

pytestmark = [pytest.mark.engine, needs_vllm]

BLOCK = 256  # tokens, of the prefix cache in fp32
CACHED = tokens(BLOCK + 1, 11)  # all but its last token may come from the cache
COMPANY = [[3] * 40, [9] * 20, tokens(60, 12), repeated(50, 7, 13)]
PROMPTS = [[7], [7, 8], [7, 8, 9], [42], [5, 5]]
# (method, drafts, prefix cache, verify). The numbers of drafts that a step may bring to a fresh row are all in
# tests/host/test_core.py. On a CPU auto verifies in parts; torch has the fused op.
MATRIX = [
    ("ngram", 1, False, "auto"),
    ("ngram", 4, True, "torch"),
    ("mtp", 2, True, "auto"),
    ("mtp", 3, False, "torch"),
    ("mtp", 2, True, "replay"),
    ("no drafts", 0, True, "replay"),
]
# vLLM's own kernels run in Triton's interpreter.
SECOND_RUNNER = {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}
# An engine is half a minute, so not every row: with MATRIX, every method with every verify, with the cache and without;
# every number of drafts with every verify, with each method, with the cache and without.
REST = [
    ("mtp", 1, True, "torch"),
    ("ngram", 1, False, "replay"),
    ("ngram", 2, False, "torch"),
    ("ngram", 3, True, "auto"),
    ("ngram", 3, True, "replay"),
    ("mtp", 4, False, "auto"),
    ("mtp", 4, False, "replay"),
]


@pytest.mark.parametrize(
    ("method", "drafts", "cache", "verify"),
    [*MATRIX, *(pytest.param(*row, marks=pytest.mark.slow) for row in REST)],
    ids=lambda value: ("cache" if value else "no-cache") if isinstance(value, bool) else None,
)
def test_short_prompts_in_recycled_blocks(
    checkpoint: Path, tmp_path: Path, method: str, drafts: int, cache: bool, verify: str
) -> None:
    drafting: dict[str, Any] = {"method": method, "num_speculative_tokens": drafts}
    if method == "ngram":
        drafting |= {"prompt_lookup_max": 3, "prompt_lookup_min": 1}
    llm = {**LLM, "max_num_seqs": 2, "enable_prefix_caching": cache, "speculative_config": drafting if drafts else None}
    prompts = PROMPTS + [CACHED] * cache
    job = {
        "llm": {"model": str(checkpoint), **llm},
        "prompts": prompts,
        "company": COMPANY,
        "prime": [CACHED] * cache,
    }
    script = Path(__file__).with_name("poison_engine.py")
    environment = {"GDN_PLUGIN_REPLAY": "8"} if verify == "replay" else {"GDN_PLUGIN_VERIFY_BACKEND": verify}
    result, log = run_in_subprocess(job, tmp_path, "poison", environment=environment, script=script)
    assert result is not None, log[-4000:]
    assert ("fused_verify: torch (asked for: torch)" in log) == (verify == "torch")
    assert ("gdn_plugin: replay: on" in log) == (verify == "replay")
    seen = result["seen"]
    assert seen["poisoned"] > 0 and (seen["fresh speculative rows"] > 0) == (drafts > 0), seen
    # With MTP the host computes the last cached block anew, so no tail is that short.
    tail = cache and method != "mtp"
    assert bool(seen["tails of one token"]) == tail, seen
    for prompt, alone, companies in zip(prompts, result["alone"], result["in company"], strict=True):
        assert all(map(math.isfinite, alone["logprobs"]))
        for said in companies:
            assert said["tokens"] == alone["tokens"], f"a prompt of {len(prompt)} tokens"
            assert said["logprobs"] == pytest.approx(alone["logprobs"], abs=1e-3)
        if tail and prompt is CACHED:
            assert {said["cached"] for said in companies} == {BLOCK}


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(
    "replay", [pytest.param("0", id="plain"), pytest.param("8", id="replay", marks=pytest.mark.slow)]
)
def test_short_prompts_with_model_runner_v2(checkpoint: Path, tmp_path: Path, replay: str) -> None:
    """A prompt of one token that joins others is continued as if it were alone, and not as if zeros followed it."""
    llm = {**LLM, "max_num_seqs": 2, "speculative_config": {"method": "mtp", "num_speculative_tokens": 3}}
    job = {
        "llm": {"model": str(checkpoint), **llm, "max_model_len": 512, "max_num_batched_tokens": 256},
        "prompts": [[7], [7, 8], [42]],
        "company": COMPANY[:2],
        "prime": [],
    }
    script = Path(__file__).with_name("poison_engine.py")
    environment = SECOND_RUNNER | {"GDN_PLUGIN_REPLAY": replay}
    result, log = run_in_subprocess(job, tmp_path, "poison", environment=environment, script=script)
    assert result is not None, log[-4000:]
    assert "Using V2 Model Runner" in log and ("gdn_plugin: replay: on" in log) == (replay != "0")
    assert result["seen"]["poisoned"] > 0 and result["seen"]["fresh speculative rows"] > 0, result["seen"]
    for alone, companies in zip(result["alone"], result["in company"], strict=True):
        assert all(map(math.isfinite, alone["logprobs"]))
        for said in companies:
            assert said["tokens"] == alone["tokens"]
            assert said["logprobs"] == pytest.approx(alone["logprobs"], abs=1e-3)
