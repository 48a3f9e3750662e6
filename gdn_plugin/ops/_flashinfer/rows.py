"""Small Triton kernels around FlashInfer's: row numbers and zeros, where FlashInfer's own meaning of them differs.

None of them runs in prefill as the host calls it. Each is one launch, and the wrapper that uses one says when.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# The smallest int32: with it as null_index every row counts as live.
ALL_LIVE = -(2**31)


# Row numbers may be slices that start anywhere: a kernel for each alignment would be compiled while serving.
@triton.jit(do_not_specialize_on_alignment=["rows", "accepted", "cu_seqlens", "given"])
def _start_rows_kernel(
    rows,  # [B, S] int32
    accepted,  # [B] int32, or anything where not HAS_ACCEPTED
    cu_seqlens,  # [B + 1], or anything where not HAS_LENGTHS
    given,  # [B] int32 rows to start from, or anything where not HAS_GIVEN
    start,  # [B] int32
    table,  # [B, S] int32, or anything where not HAS_TABLE
    stride_b,
    stride_s,
    null_index,
    S: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PADDING: tl.constexpr,
    HAS_ACCEPTED: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_GIVEN: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    if HAS_GIVEN:
        row = tl.load(given + i_b)
    else:
        column = 0
        if HAS_ACCEPTED:
            column = tl.minimum(tl.maximum(tl.load(accepted + i_b) - 1, 0), S - 1)
        row = tl.load(rows + i_b * stride_b + column * stride_s)
    live = row > null_index
    if HAS_LENGTHS:
        live = live & (tl.load(cu_seqlens + i_b + 1) > tl.load(cu_seqlens + i_b))
    tl.store(start + i_b, tl.where(live, row, PADDING))
    if HAS_TABLE:
        o_s = tl.arange(0, BLOCK_S)
        b_rows = tl.load(rows + i_b * stride_b + o_s * stride_s, mask=o_s < S, other=0)
        # A sequence that is padding may name no row at all; the bf16 kernel still writes, so it writes to row 0.
        tl.store(table + i_b * S + o_s, tl.where(live, b_rows, tl.maximum(PADDING, 0)), mask=o_s < S)


@triton.jit(do_not_specialize_on_alignment=["out", "rows"])
def _zero_padding_kernel(
    out,  # [B * TOKENS, Hv, V]
    rows,  # [B] int32
    stride_t,
    stride_h,
    stride_row,
    null_index,
    V,
    TOKENS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    row = tl.load(rows + (i_t // TOKENS) * stride_row)
    o_v = tl.arange(0, BLOCK_V)
    p_out = out + i_t * stride_t + i_h * stride_h + o_v
    zeros = tl.zeros([BLOCK_V], dtype=tl.float32).to(out.dtype.element_ty)
    tl.store(p_out, zeros, mask=o_v < tl.where(row <= null_index, V, 0))


@triton.jit(do_not_specialize_on_alignment=["rows", "has_initial_state", "cu_seqlens"])
def _zero_fresh_kernel(
    state,  # [N, Hv, V, K], inner dims dense
    rows,  # [B] int32
    has_initial_state,  # [B] bool
    cu_seqlens,  # [B + 1]
    stride_n,
    stride_row,
    stride_has,
    null_index,
    SIZE,
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
    tl.store(state + row * stride_n + o_x, zeros, mask=o_x < tl.where(fresh, SIZE, 0))


def _launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """The one place that launches; a simulated device records here what would run."""
    kernel[grid](*args, **constants)


def compile_count() -> int:
    """Variants of these kernels compiled in this process (0 when interpreting: those kernels have no caches)."""
    kernels = (_start_rows_kernel, _zero_padding_kernel, _zero_fresh_kernel)
    return sum(
        len(caches[0]) for kernel in kernels for caches in getattr(kernel, "device_caches", {}).values()
    )  # fmt: skip


def start_rows(state_indices: Tensor, null_index: int, padding: int) -> Tensor:
    """Row numbers with padding brought to the one number that FlashInfer's kernel knows. One launch.

    Args:
        state_indices: [B] int32, any stride and alignment.
        null_index: rows up to it are padding; `ALL_LIVE` copies every number.
        padding: what FlashInfer takes for padding: -1 (fp32 pools, skipped) or 0 (bf16 pools, the scratch row).
    Returns:
        [B] int32, dense.
    """
    batch = state_indices.shape[0]
    start = torch.empty(batch, dtype=torch.int32, device=state_indices.device)
    _launch(
        _start_rows_kernel, (batch,), state_indices, state_indices, state_indices, state_indices, start, start,
        state_indices.stride(0), 0, null_index, S=1, BLOCK_S=1, PADDING=padding,
        HAS_ACCEPTED=False, HAS_LENGTHS=False, HAS_TABLE=False, HAS_GIVEN=False,
    )  # fmt: skip
    return start


def verify_rows(
    state_indices: Tensor,
    num_accepted_tokens: Tensor,
    cu_seqlens: Tensor,
    null_index: int,
    padding: int,
    given: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Where each sequence starts and where each token's state goes. One launch.

    Args:
        state_indices: [B, S] int32, any strides.
        num_accepted_tokens: [B] int32, dense, at least 1.
        cu_seqlens: [B + 1], dense; empty sequences are padding.
        null_index, padding: as in `start_rows`.
        given: [B] int32, dense: rows to start from, in place of those that num_accepted_tokens picks.
    Returns:
        start [B] int32, `padding` where a sequence is padding, and rows [B, S] int32, dense, with row 0 there.
    """
    batch, tokens = state_indices.shape
    start = torch.empty(batch, dtype=torch.int32, device=state_indices.device)
    table = torch.empty(batch, tokens, dtype=torch.int32, device=state_indices.device)
    _launch(
        _start_rows_kernel, (batch,), state_indices, num_accepted_tokens, cu_seqlens,
        state_indices if given is None else given, start, table,
        state_indices.stride(0), state_indices.stride(1), null_index, S=tokens,
        BLOCK_S=triton.next_power_of_2(tokens), PADDING=padding,
        HAS_ACCEPTED=given is None, HAS_LENGTHS=True, HAS_TABLE=True, HAS_GIVEN=given is not None,
    )  # fmt: skip
    return start, table


def zero_padding(out: Tensor, rows: Tensor, null_index: int, tokens: int = 1) -> None:
    """Zero the tokens of padding sequences. One launch.

    Args:
        out: [B * tokens, Hv, V], last stride 1.
        rows: [B] int32, any stride; rows up to null_index are padding.
        tokens: tokens a sequence has in `out`.
    """
    num_tokens, heads, value_dim = out.shape
    _launch(
        _zero_padding_kernel, (num_tokens, heads), out, rows, out.stride(0), out.stride(1), rows.stride(0), null_index,
        value_dim, TOKENS=tokens, BLOCK_V=triton.next_power_of_2(value_dim),
    )  # fmt: skip


def zero_fresh(
    state: Tensor, state_indices: Tensor, has_initial_state: Tensor, cu_seqlens: Tensor, null_index: int
) -> None:
    """Zero the pool rows of sequences that start fresh (not padding, not empty). One launch."""
    size = state.shape[1] * state.shape[2] * state.shape[3]
    block = 4096
    _launch(
        _zero_fresh_kernel, (state_indices.shape[0], triton.cdiv(size, block)), state, state_indices,
        has_initial_state, cu_seqlens, state.stride(0), state_indices.stride(0), has_initial_state.stride(0),
        null_index, size, BLOCK=block,
    )  # fmt: skip
