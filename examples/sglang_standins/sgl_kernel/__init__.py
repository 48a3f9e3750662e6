"""Stands in for SGLang's compiled kernels on a CPU: what it imports or calls there without AMX, in plain PyTorch."""

from typing import Any

import torch
from torch import Tensor

from . import mamba


def __getattr__(name: str) -> Any:
    """Everything else can be imported, and says its name when it is called."""
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*args: object, **kwargs: object) -> None:
        raise NotImplementedError(f"sgl_kernel.{name} has no stand-in")

    return absent


def assign_req_to_token_pool_cpu(
    rows: Tensor, table: Tensor, start: Tensor, end: Tensor, loc: Tensor, width: int
) -> None:
    at = 0
    for row, first, last in zip(rows.tolist(), start.tolist(), end.tolist(), strict=True):
        table[row, first:last] = loc[at : at + last - first].to(table.dtype)
        at += last - first


def fused_sigmoid_mul_cpu(x: Tensor, gate: Tensor) -> None:
    x.copy_(x * torch.sigmoid(gate.reshape(x.shape).float()))


def _gemma_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * (1 + weight.float())).to(x.dtype)


def fused_qk_gemma_rmsnorm_cpu(
    q: Tensor, k: Tensor, qw: Tensor, kw: Tensor, eps: float, dim: int
) -> tuple[Tensor, Tensor]:
    return _gemma_norm(q.reshape(-1, dim), qw, eps), _gemma_norm(k.reshape(-1, dim), kw, eps)


def fused_qk_gemma_rmsnorm_with_gate_cpu(
    q_gate: Tensor, k: Tensor, qw: Tensor, kw: Tensor, eps: float, dim: int, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    q, gate = q_gate.reshape(-1, heads, 2 * dim).chunk(2, dim=-1)
    return *fused_qk_gemma_rmsnorm_cpu(q, k, qw, kw, eps, dim), gate.contiguous()


def fused_qkvzba_split_reshape_cat_contiguous_cpu(
    qkvz: Tensor, ba: Tensor, k_heads: int, v_heads: int, k_dim: int, v_dim: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(mixed_qkv, z, b, a) of Qwen3.5's projections [q k v z] and [b a]."""
    qkv, z = qkvz.split([2 * k_heads * k_dim + v_heads * v_dim, v_heads * v_dim], dim=-1)
    b, a = ba.split(v_heads, dim=-1)
    return qkv.contiguous(), z.unflatten(-1, (v_heads, v_dim)).contiguous(), b.contiguous(), a.contiguous()


# The same as SGLang reads some of them, torch.ops.sgl_kernel.NAME.
for _op in (
    fused_sigmoid_mul_cpu,
    fused_qk_gemma_rmsnorm_cpu,
    fused_qk_gemma_rmsnorm_with_gate_cpu,
    fused_qkvzba_split_reshape_cat_contiguous_cpu,
    mamba.fused_gdn_gating_cpu,
    mamba.fused_sigmoid_gating_delta_rule_update_cpu,
):
    setattr(torch.ops.sgl_kernel, _op.__name__, _op)
