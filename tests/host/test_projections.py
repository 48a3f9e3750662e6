"""LoRA and quantisation are the host's, on projections that stay the host's: a real engine, with and without them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.host.checkpoints import write_adapter, write_int8, write_merged
from tests.host.engines import BF16_LIMIT, MIXED, PLUGIN, QWEN3_5, STOCK, answers, log_probability_gap, needs_vllm

pytestmark = [pytest.mark.engine, needs_vllm]

LORA = {"enable_lora": True, "max_lora_rank": 8, "environment": QWEN3_5}
PROMPTS = len(MIXED[0])


@pytest.fixture(scope="module")
def adapter(qwen3_5: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On in_proj_qkv, in_proj_z, in_proj_b, in_proj_a and out_proj of every GDN layer."""
    return write_adapter(qwen3_5, tmp_path_factory.mktemp("lora") / "adapter")


def test_an_adapter_is_its_merged_weights(ask, qwen3_5, adapter: Path, plain_qwen3_5, tmp_path: Path) -> None:
    merged = write_merged(qwen3_5, adapter, tmp_path / "merged")
    want, _ = ask("lora-merged", MIXED, model=str(merged), environment=QWEN3_5)
    ours, _ = ask("lora-fp32", MIXED * 2, model=str(qwen3_5), adapters=[None, str(adapter)], **LORA)
    assert set(ours["layers"]) == {PLUGIN}
    assert answers(ours)[PROMPTS:] == answers(want)
    assert answers(ours)[:PROMPTS] == answers(plain_qwen3_5())[:PROMPTS]
    assert answers(ours)[PROMPTS:] != answers(ours)[:PROMPTS]


def test_an_adapter_in_bf16_is_the_stock_model(ask, qwen3_5, adapter: Path) -> None:
    """In bf16 the host repacks the convolution's weight on the layer that LoRA wraps."""
    job = {"model": str(qwen3_5), "dtype": "bfloat16", "max_tokens": 4, "adapters": [None, str(adapter)]}
    stock, _ = ask("lora-stock", MIXED * 2, **job, **LORA | {"environment": QWEN3_5 | STOCK})
    ours, _ = ask("lora-bf16", MIXED * 2, **job, **LORA)
    assert PLUGIN not in stock["layers"] and set(ours["layers"]) == {PLUGIN}
    assert answers(ours) == answers(stock)


def test_int8_projections_are_the_stock_model(ask, checkpoint: Path, bf16, tmp_path: Path) -> None:
    """compressed-tensors W8A8 on in_proj_qkvz and out_proj."""
    job = {"model": str(write_int8(checkpoint, tmp_path / "int8")), "dtype": "bfloat16", "prompt_logprobs": True}
    stock, _ = ask("int8-stock", MIXED, environment=STOCK, **job)
    ours, log = ask("int8", MIXED, **job)
    assert PLUGIN not in stock["layers"] and set(ours["layers"]) == {PLUGIN}
    assert "Selected CPUInt8ScaledMMLinearKernel for CompressedTensorsW8A8Int8" in log
    assert log_probability_gap(stock, ours) < BF16_LIMIT
    assert log_probability_gap(bf16()[0], ours) > 0  # it is not the unquantised model
