"""Backend `cpu` is no further from the float64 truth than vLLM's own CPU kernels, on the same bf16 values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gdn_plugin import ops
from gdn_plugin.backends.reference import recurrence as reference

pytestmark = pytest.mark.slow  # imports vLLM
TOKENS, HK, HV, DIM = 500, 2, 4, 128
STARTS, ROW = torch.tensor([0, TOKENS], dtype=torch.int32), torch.tensor([1], dtype=torch.int32)


@pytest.fixture(scope="module")
def host() -> Any:
    pytest.importorskip("vllm._custom_ops", reason="vLLM's CPU build is not installed")
    if not hasattr(torch.ops._C, "chunk_gated_delta_rule_cpu"):
        pytest.skip("this vLLM has no chunk_gated_delta_rule_cpu")
    return __import__("vllm._custom_ops", fromlist=["_custom_ops"])


def distance(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).square().mean().sqrt() / want.square().mean().sqrt())


def inputs(kind: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    k = torch.randn(TOKENS, HK, DIM)
    if kind == "correlated":
        k = 0.3 * k + torch.randn(1, HK, DIM)
    decay = torch.zeros(TOKENS, HV) if kind == "no decay" else -torch.rand(TOKENS, HV) * 0.2
    beta = torch.rand(TOKENS, HV).bfloat16().float()  # vLLM takes it in bf16
    values = {"q": torch.randn(TOKENS, HK, DIM), "k": k, "v": torch.randn(TOKENS, HV, DIM)}
    return {name: x.bfloat16() for name, x in values.items()} | {"g": decay, "beta": beta}


@pytest.mark.parametrize("kind", ["random", "correlated", "no decay"])
def test_prefill(host: Any, kind: str) -> None:
    x = inputs(kind)
    start = torch.randn(2, HV, DIM, DIM) * 0.1
    true_state = start.double()
    true_out = torch.zeros(TOKENS, HV, DIM, dtype=torch.float64)
    reference.prefill(
        **x, state=true_state, state_indices=ROW, cu_seqlens=STARTS, has_initial_state=None, scale=DIM**-0.5,
        use_qk_l2norm=True, exp_gate=False, max_seqlen=0, null_index=-1, out=true_out, checkpoints=None,
        checkpoint_cu_starts=None, checkpoint_every=0, zero_padding=True, padding="any", compute_dtype=torch.float64,
    )  # fmt: skip
    own_state = start.clone()
    own = ops.prefill(**x, state=own_state, state_indices=ROW, cu_seqlens=STARTS, use_qk_l2norm=True, backend="cpu")
    their_state = start.mT.contiguous()
    theirs, _ = host.chunk_gated_delta_rule_cpu(
        query=x["q"][None], key=x["k"][None], value=x["v"][None], g=x["g"][None], beta=x["beta"].bfloat16()[None],
        initial_state=their_state, output_final_state=True, cu_seqlens=STARTS, head_first=False,
        use_qk_l2norm_in_kernel=True, initial_state_indices=ROW,
    )  # fmt: skip
    assert distance(own, true_out) <= distance(theirs[0], true_out) < 2e-2
    assert distance(own_state[1], true_state[1]) <= distance(their_state[1].mT, true_state[1]) < 2e-2


def test_decode(host: Any) -> None:
    torch.manual_seed(0)
    batch = 8
    q, k, v = (torch.randn(batch, heads, DIM).bfloat16() for heads in (HK, HK, HV))
    a, b = torch.randn(batch, HV).bfloat16(), torch.randn(batch, HV).bfloat16()
    gates = {"a": a, "b": b, "A_log": torch.randn(HV) * 0.5, "dt_bias": torch.randn(HV).bfloat16()}
    rows = torch.arange(1, batch + 1, dtype=torch.int32)
    start = torch.randn(batch + 1, HV, DIM, DIM) * 0.1
    true_state, true_out = start.double(), torch.zeros(batch, HV, DIM, dtype=torch.float64)
    reference.decode(
        q, k, v, **gates, state=true_state, state_indices=rows, scale=DIM**-0.5, use_qk_l2norm=True, null_index=-1,
        out=true_out, zero_padding=True, padding="any", compute_dtype=torch.float64,
    )  # fmt: skip
    own_state = start.clone()
    own = ops.decode(q, k, v, **gates, state=own_state, state_indices=rows, backend="cpu")
    their_state = start.mT.contiguous()
    theirs = host.fused_sigmoid_gating_delta_rule_update_cpu(
        **gates, q=q[None], k=k[None], v=v[None], initial_state_source=their_state, initial_state_indices=rows,
        cu_seqlens=torch.arange(batch + 1, dtype=torch.int32), use_qk_l2norm_in_kernel=True,
    )  # fmt: skip
    assert distance(own, true_out) <= distance(theirs.view(batch, HV, DIM), true_out) < 2e-2
    assert distance(own_state, true_state) <= distance(their_state.mT, true_state) < 2e-2
