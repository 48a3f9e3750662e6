"""Weights that change in place while an engine serves are the next step's weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.host.engines import LLM, needs_vllm, run_in_subprocess, tokens

pytestmark = [pytest.mark.engine, needs_vllm]

FACTOR = 0.5
PROMPTS = [tokens(40, 1), tokens(3, 2)]


def test_weights_updated_in_place(checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    script = Path(__file__).with_name("weights_engine.py")
    other = tmp_path / "scaled"
    shutil.copytree(checkpoint, other)
    scaled = 0
    for file in other.glob("*.safetensors"):
        weights = load_file(file)
        for name in [name for name in weights if name.endswith("conv1d.weight")]:
            weights[name] = weights[name] * FACTOR
            scaled += 1
        save_file(weights, file, metadata={"format": "pt"})

    def run(model: Path, name: str) -> dict:
        job = {"llm": {"model": str(model), **LLM}, "prompts": PROMPTS, "factor": FACTOR}
        result, log = run_in_subprocess(job, tmp_path, name, script=script)
        assert result is not None, log[-4000:]
        return result

    result, truth = run(checkpoint, "one"), run(other, "two")
    assert result["layers"] == scaled > 0
    assert same(result["scaled"], truth["loaded"])
    assert not same(result["scaled"], result["loaded"])


def same(one: list[dict], other: list[dict]) -> bool:
    return all(
        a["tokens"] == b["tokens"] and max(abs(x - y) for x, y in zip(a["logprobs"], b["logprobs"], strict=True)) < 1e-4
        for a, b in zip(one, other, strict=True)
    )
