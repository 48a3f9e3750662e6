"""Weights that change while an engine serves, in place or loaded anew, are the next step's weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.host.checkpoints import write_scaled
from tests.host.engines import LLM, QWEN3_5, needs_vllm, run_in_subprocess, tokens

pytestmark = [pytest.mark.engine, needs_vllm]

FACTOR = 0.5
PROMPTS = [tokens(40, 1), tokens(3, 2)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_change(qwen3_5: Path, tmp_path: Path, dtype: str) -> None:
    """In bf16 the host repacks weights at load. No experts: theirs come out wrong of the host's own reload on a CPU."""
    other = write_scaled(qwen3_5, tmp_path / "scaled", FACTOR)
    job = {
        "llm": {"model": str(qwen3_5), **LLM, "dtype": dtype},
        "prompts": PROMPTS,
        "factor": FACTOR,
        "reload": [str(qwen3_5), str(other)],
    }
    script = Path(__file__).with_name("weights_engine.py")
    result, log = run_in_subprocess(job, tmp_path, "weights", environment=QWEN3_5, script=script)
    assert result is not None, log[-4000:]
    assert result["layers"] == 3
    as_it_was, as_scaled = result["reloaded"]
    assert not same(result["scaled"], result["loaded"])
    assert same(as_it_was, result["loaded"])
    assert same(as_scaled, result["scaled"])


def same(one: list[dict], other: list[dict]) -> bool:
    return all(
        a["tokens"] == b["tokens"] and max(abs(x - y) for x, y in zip(a["logprobs"], b["logprobs"], strict=True)) < 1e-4
        for a, b in zip(one, other, strict=True)
    )
