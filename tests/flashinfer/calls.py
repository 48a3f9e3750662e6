"""Calls of the backend's three functions on a simulated device, laid out by `cases` as the vLLM host does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gdn_plugin.ops.cases import case
from gdn_plugin.registry import Problem

HEADS, D, ROWS = (16, 32), 128, 70


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda")


def problem(op: str, heads: tuple[int, int], state_dtype: torch.dtype, **facts: Any) -> Problem:
    return Problem(op, "bfloat16", str(state_dtype).removeprefix("torch."), *heads, D, D, **facts)


def call(wanted: Problem, lens: Sequence[int], *, zero_padding: bool = False, **features: Any) -> dict[str, Any]:
    """Every argument of a `run`; the values of its tensors are nobody's concern, for there are none."""
    given = case(wanted, lens, device="meta", **features).arguments(zero_padding)
    return {name: _on_cuda(x) if isinstance(x, Tensor) else x for name, x in given.items()}


def _on_cuda(x: Tensor) -> Tensor:
    if x.numel() == 0:
        return empty(*x.shape, dtype=x.dtype)
    extent = x.storage_offset() + 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return torch.empty(extent, dtype=x.dtype, device="cuda").as_strided(x.shape, x.stride(), x.storage_offset())


def split(tokens: int, batch: int) -> list[int]:
    """Lengths of `batch` sequences that have so many tokens together."""
    return [tokens // batch] * (batch - 1) + [tokens - tokens // batch * (batch - 1)]


def prefill_args(
    state_dtype: torch.dtype, *, batch: int = 8, tokens: int = 4099, checkpoints: bool = False, **changes: Any
) -> dict[str, Any]:
    wanted = problem("prefill", HEADS, state_dtype, padded_pool=True, padding="none", checkpoints=checkpoints)
    fresh = {"fresh": None, "exp_gate": True, "hint_seqlen": True, "null_index": 0, "pool_rows": ROWS}
    return call(wanted, split(tokens, batch), **fresh) | changes


def decode_args(state_dtype: torch.dtype, *, batch: int = 5, **changes: Any) -> dict[str, Any]:
    wanted = problem("decode", HEADS, state_dtype, padded_pool=True, padding="none", strided=True, qk_l2norm=False)
    return call(wanted, [1] * batch, null_index=0, pool_rows=ROWS) | changes


def verify_args(state_dtype: torch.dtype, *, batch: int = 5, width: int = 4, **changes: Any) -> dict[str, Any]:
    """Rows of an fp32 pool lie side by side: FlashInfer's scatter of states knows no row padding."""
    wanted = problem("verify", HEADS, state_dtype, padded_pool=state_dtype != torch.float32, padding="none",
                     strided=True, qk_l2norm=False, max_spec_tokens=width)  # fmt: skip
    return call(wanted, [width] * batch, null_index=0, pool_rows=ROWS) | changes
