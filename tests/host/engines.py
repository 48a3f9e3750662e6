"""What the tests of a real engine share: prompts, the engine's arguments, how two engines' answers are compared."""

from __future__ import annotations

import os
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

__all__ = ["EXAMPLES", "TinyConfig", "run_in_subprocess", "write_tiny_qwen3_next"]

needs_vllm = pytest.mark.skipif(compat.installed_root() is None, reason="vLLM is not installed")

PLUGIN = "gdn_plugin.hosts.vllm.layer.GdnPluginAttention"
STOCK = {"GDN_PLUGIN_DISABLE": "1"}
# Mean |difference| of prompt log-probabilities: two bf16 engines differ by 0.01, fp32 ones by rounding.
BF16_LIMIT, FP32_LIMIT = 0.03, 1e-3
# The workers of one engine are processes of their own, a core each.
TWO_WORKERS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
# For Qwen3.5, see tests/host/no_torchvision.
QWEN3_5 = {
    "PYTHONPATH": os.pathsep.join(
        filter(None, (str(Path(__file__).with_name("no_torchvision")), os.environ.get("PYTHONPATH")))
    )
}
LLM: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 2048,
    "max_num_batched_tokens": 1024,
    "max_num_seqs": 8,
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "disable_log_stats": True,
}


def tokens(count: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(count)]


def repeated(count: int, period: int, seed: int) -> list[int]:
    return (tokens(period, seed) * (count // period + 1))[:count]


MIXED = [[tokens(1, 0), tokens(5, 1), tokens(64, 2), tokens(129, 3), tokens(600, 4)]]
# Ends past a block of the prefix cache (256 tokens in fp32) and generation crosses into the next.
SPECULATIVE = [[repeated(5, 5, 5), repeated(40, 8, 6), repeated(250, 30, 7), tokens(70, 8), repeated(33, 4, 9)]]
SPECULATIVE_LENGTHS = [[24, 17, 40, 9, 30]]


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
