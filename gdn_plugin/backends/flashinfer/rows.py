"""Small Triton kernels around FlashInfer's: row numbers and zeros, where FlashInfer's own meaning of them differs.

Each is one launch, and the wrapper that uses one says when. Numbers are kept out of what Triton specialises on, so each
kernel is compiled once a dtype.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# The smallest int32: with it as null_index every row counts as live.
ALL_LIVE = -(2**31)


@triton.jit(
    do_not_specialize=["stride_b", "stride_s", "stride_given", "null_index", "padding", "S"],
    do_not_specialize_on_alignment=["rows", "accepted", "given"],
)
def _rows_kernel(
    rows,  # [B, S] int32, or anything where neither LOOK_UP nor HAS_TABLE
    accepted,  # [B] int32, or anything where not LOOK_UP
    given,  # [B] int32 rows to start from, or anything where LOOK_UP
    start,  # [B] int32
    table,  # [B, S] int32, or anything where not HAS_TABLE
    stride_b,
    stride_s,
    stride_given,
    null_index,
    padding,
    S,
    BLOCK_S: tl.constexpr,
    LOOK_UP: tl.constexpr,
    HAS_TABLE: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    if LOOK_UP:
        column = tl.minimum(tl.maximum(tl.load(accepted + i_b) - 1, 0), S - 1)
        row = tl.load(rows + i_b * stride_b + column * stride_s)
    else:
        row = tl.load(given + i_b * stride_given)
    tl.store(start + i_b, tl.where(row > null_index, row, padding))
    if HAS_TABLE:
        o_s = tl.arange(0, BLOCK_S)
        b_rows = tl.load(rows + i_b * stride_b + o_s * stride_s, mask=o_s < S, other=0)
        tl.store(table + i_b * S + o_s, b_rows, mask=o_s < S)


@triton.jit(
    do_not_specialize=["stride_row", "stride_t", "stride_h", "null_index", "B", "T", "H", "V"],
    do_not_specialize_on_alignment=["out", "rows", "cu_seqlens"],
)
def _zero_padding_kernel(
    out,  # [T, H, V]
    rows,  # [B] int32
    cu_seqlens,  # [B + 1], or anything where not HAS_OFFSETS: then a token a sequence
    stride_row,
    stride_t,
    stride_h,
    null_index,
    B,
    T,
    H,
    V,
    BLOCK: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
):
    i_b, i_part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    row = tl.load(rows + i_b * stride_row, mask=i_b < B, other=0)
    # Program B has the tokens that no sequence has.
    dead = (i_b >= B) | (row <= null_index)
    if HAS_OFFSETS:
        begin = tl.load(cu_seqlens + i_b).to(tl.int64)
        end = tl.load(cu_seqlens + i_b + 1, mask=i_b < B, other=0).to(tl.int64)
        end = tl.where(i_b < B, end, T)
    else:
        begin = i_b
        end = i_b + 1
    end = tl.where(dead, end, begin)
    for i_t in range(begin + i_part, end, parts):
        for i_x in range(0, H * V, BLOCK):
            o_x = i_x + tl.arange(0, BLOCK)
            p_out = out + i_t * stride_t + (o_x // V).to(tl.int64) * stride_h + o_x % V
            tl.store(p_out, tl.zeros([BLOCK], dtype=tl.float32).to(out.dtype.element_ty), mask=o_x < H * V)


@triton.jit(
    do_not_specialize=["stride_n", "stride_row", "stride_has", "null_index", "size"],
    do_not_specialize_on_alignment=["state", "rows", "has_initial_state", "cu_seqlens"],
)
def _zero_fresh_kernel(
    state,  # [N, Hv, V, K], inner dims dense
    rows,  # [B] int32
    has_initial_state,  # [B] bool
    cu_seqlens,  # [B + 1]
    stride_n,
    stride_row,
    stride_has,
    null_index,
    size,
    BLOCK: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    i_x = tl.program_id(1).to(tl.int64)
    row = tl.load(rows + i_b * stride_row).to(tl.int64)
    has = tl.load(has_initial_state + i_b * stride_has).to(tl.int32)
    length = tl.load(cu_seqlens + i_b + 1) - tl.load(cu_seqlens + i_b)
    fresh = (row > null_index) & (has == 0) & (length > 0)
    o_x = i_x * BLOCK + tl.arange(0, BLOCK)
    zeros = tl.zeros([BLOCK], dtype=tl.float32).to(state.dtype.element_ty)
    tl.store(state + row * stride_n + o_x, zeros, mask=o_x < tl.where(fresh, size, 0))


_KERNELS = (_rows_kernel, _zero_padding_kernel, _zero_fresh_kernel)


def _launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """The one place that launches; a simulated device records here what would run."""
    kernel[grid](**arguments)


def compile_count() -> int:
    """Variants of these kernels compiled in this process (0 when interpreting: those kernels have no caches)."""
    return sum(len(caches[0]) for kernel in _KERNELS for caches in getattr(kernel, "device_caches", {}).values())


def start_rows(state_indices: Tensor, null_index: int, padding: int) -> Tensor:
    """Row numbers with padding brought to the one number that FlashInfer's kernel knows. One launch.

    Args:
        state_indices: [B] int32, any stride and alignment.
        null_index: rows up to it are padding; `ALL_LIVE` copies every number.
        padding: what stands for padding in the result.
    Returns:
        [B] int32, dense.
    """
    start = torch.empty(state_indices.shape[0], dtype=torch.int32, device=state_indices.device)
    _launch(
        _rows_kernel, tuple(start.shape), rows=state_indices, accepted=state_indices, given=state_indices, start=start,
        table=start, stride_b=0, stride_s=0, stride_given=state_indices.stride(0), null_index=null_index,
        padding=padding, S=1, BLOCK_S=1, LOOK_UP=False, HAS_TABLE=False,
    )  # fmt: skip
    return start


def verify_rows(state_indices: Tensor, num_accepted_tokens: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where each sequence starts and where each token's state goes, dense. One launch.

    Args:
        state_indices: [B, S] int32, any strides.
        num_accepted_tokens: [B] int32, dense, at least 1.
        given: [B] int32, any stride: rows to start from, in place of those that num_accepted_tokens picks.
    Returns:
        start [B] int32 and rows [B, S] int32.
    """
    batch, tokens = state_indices.shape
    start = torch.empty(batch, dtype=torch.int32, device=state_indices.device)
    table = torch.empty(batch, tokens, dtype=torch.int32, device=state_indices.device)
    _launch(
        _rows_kernel, (batch,), rows=state_indices, accepted=num_accepted_tokens,
        given=state_indices if given is None else given, start=start, table=table, stride_b=state_indices.stride(0),
        stride_s=state_indices.stride(1), stride_given=0 if given is None else given.stride(0), null_index=ALL_LIVE,
        padding=0, S=tokens, BLOCK_S=triton.next_power_of_2(tokens), LOOK_UP=given is None, HAS_TABLE=True,
    )  # fmt: skip
    return start, table


def zero_padding(out: Tensor, rows: Tensor, null_index: int, cu_seqlens: Tensor | None = None) -> None:
    """Zero the tokens of padding sequences and those behind the last sequence. One launch.

    Programs of live sequences end at once.

    Args:
        out: [T, Hv, V], last stride 1.
        rows: [B] int32, any stride; rows up to null_index are padding.
        cu_seqlens: [B + 1], dense; None where each sequence has one token and T = B.
    """
    (tokens, heads, value_dim), batch = out.shape, rows.shape[0]
    # A long padding sequence is shared by several programs; many sequences are programs enough.
    parts = 1 if cu_seqlens is None else max(1, min(32, 2048 // (batch + 1)))
    _launch(
        _zero_padding_kernel, (batch if cu_seqlens is None else batch + 1, parts), out=out, rows=rows,
        cu_seqlens=rows if cu_seqlens is None else cu_seqlens, stride_row=rows.stride(0), stride_t=out.stride(0),
        stride_h=out.stride(1), null_index=null_index, B=batch, T=tokens, H=heads, V=value_dim, BLOCK=1024,
        HAS_OFFSETS=cu_seqlens is not None,
    )  # fmt: skip


def zero_fresh(
    state: Tensor, state_indices: Tensor, has_initial_state: Tensor, cu_seqlens: Tensor, null_index: int
) -> None:
    """Zero the pool rows of sequences that start fresh (not padding, not empty). One launch."""
    size, block = state.shape[1] * state.shape[2] * state.shape[3], 4096
    _launch(
        _zero_fresh_kernel, (state_indices.shape[0], triton.cdiv(size, block)), state=state, rows=state_indices,
        has_initial_state=has_initial_state, cu_seqlens=cu_seqlens, stride_n=state.stride(0),
        stride_row=state_indices.stride(0), stride_has=has_initial_state.stride(0), null_index=null_index, size=size,
        BLOCK=block,
    )  # fmt: skip
