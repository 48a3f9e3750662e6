"""verify: speculative tokens in one launch, the state after each token kept in a row of its own.

A program owns BV rows of one head's state for one sequence and walks that sequence's tokens. It reads its tile of the
accepted row into registers before it writes anything, and no other program reads or writes that (head, tile) of any of
the sequence's rows; so the accepted row may be one of the rows that are overwritten.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from gdn_plugin.backends.triton.configs import Tile, Tiles
from gdn_plugin.backends.triton.gates import delta_step, l2_normalise, log_decay, sigmoid
from gdn_plugin.backends.triton.heads import value_strides
from gdn_plugin.backends.triton.launch import compile_count, counted, device_sm, launch
from gdn_plugin.backends.triton.variants import KernelVariant, either, variants_of
from gdn_plugin.registry import BackendOp, Platform, Problem


@counted
@triton.jit(
    do_not_specialize=["stride_a_t", "stride_a_k", "stride_a_h", "stride_b_t", "stride_b_k", "stride_b_h",
                       "stride_indices", "stride_start", "has_start", "num_sequences", "num_tokens", "num_slots",
                       "num_v_heads", "ratio", "null_index", "l2norm", "zero_padding"],
    do_not_specialize_on_alignment=["p_a", "p_b", "p_A_log", "p_dt_bias", "p_indices", "p_accepted", "p_start",
                                    "p_cu_seqlens"],
)  # fmt: skip
def verify_kernel(
    p_q, p_k, p_v, p_a, p_b, p_A_log, p_dt_bias, p_state, p_indices, p_accepted, p_start, p_cu_seqlens,
    p_out,
    stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_v_t, stride_v_h, stride_a_t, stride_a_k,
    stride_a_h, stride_b_t, stride_b_k, stride_b_h, stride_state, stride_indices, stride_start, stride_out_t,
    stride_out_h,
    has_start, scale, num_sequences, num_tokens, num_slots, num_v_heads, ratio, null_index, l2norm,
    zero_padding,
    K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    NV: tl.constexpr = V // BV
    i_p = tl.program_id(0)  # divided in 32 bits, which is much faster; the parts are widened for the offsets
    i_v = (i_p % NV).to(tl.int64)
    i_h = ((i_p // NV) % num_v_heads).to(tl.int64)
    i_b = (i_p // NV // num_v_heads).to(tl.int64)
    i_hk = ((i_p // NV) % num_v_heads // ratio).to(tl.int64)
    i_r = i_h - i_hk * ratio  # among the value heads of its key head
    o_k = tl.arange(0, K)
    o_v = i_v * BV + tl.arange(0, BV)
    p_out += i_h * stride_out_h + o_v

    # Under zero_padding the grid has one sequence more: the tokens past cu_seqlens[-1].
    start = tl.load(p_cu_seqlens + i_b).to(tl.int64)
    end = num_tokens.to(tl.int64)
    row = null_index.to(tl.int64)
    if i_b < num_sequences:
        end = tl.load(p_cu_seqlens + i_b + 1).to(tl.int64)
        if start < end:
            # Start rows are the table itself, or a table of one column: one variant of the kernel serves both.
            origin = tl.maximum(tl.load(p_accepted + i_b).to(tl.int64) - 1, 0)
            row = tl.load(p_start + i_b * stride_start + tl.where(has_start != 0, 0, origin)).to(tl.int64)
    if row <= null_index:
        if zero_padding != 0:
            for i_t in range(start, end):
                tl.store(p_out + i_t * stride_out_t, tl.zeros([BV], dtype=tl.float32))
        return

    o_s = i_h * (V * K) + o_v[:, None] * K + o_k[None, :]
    b_s = tl.load(p_state + row * stride_state + o_s).to(tl.float32)
    A_log = tl.load(p_A_log + i_h).to(tl.float32)
    dt_bias = tl.load(p_dt_bias + i_h).to(tl.float32)
    p_q += i_hk * stride_q_h + o_k
    p_k += i_hk * stride_k_h + o_k
    p_v += i_h * stride_v_h + o_v
    p_a += i_hk * stride_a_k + i_r * stride_a_h
    p_b += i_hk * stride_b_k + i_r * stride_b_h
    b_q = tl.load(p_q + start * stride_q_t)
    b_k = tl.load(p_k + start * stride_k_t)
    b_v = tl.load(p_v + start * stride_v_t)
    a = tl.load(p_a + start * stride_a_t)
    b = tl.load(p_b + start * stride_b_t)
    for i_t in range(start, end):
        # The next token's inputs are asked for before this token's state is stored: the compiler may not move loads
        # above stores, and their latency would otherwise be paid once a token.
        i_next = tl.minimum(i_t + 1, end - 1)
        b_q_next = tl.load(p_q + i_next * stride_q_t)
        b_k_next = tl.load(p_k + i_next * stride_k_t)
        b_v_next = tl.load(p_v + i_next * stride_v_t)
        a_next = tl.load(p_a + i_next * stride_a_t)
        b_next = tl.load(p_b + i_next * stride_b_t)
        slot = i_t - start
        target = tl.load(p_indices + i_b * stride_indices + slot, mask=slot < num_slots, other=null_index).to(tl.int64)
        b_qf = l2_normalise(b_q.to(tl.float32), p_q.dtype.element_ty, l2norm != 0)
        b_kf = l2_normalise(b_k.to(tl.float32), p_k.dtype.element_ty, l2norm != 0)
        decay = tl.exp(log_decay(a.to(tl.float32), A_log, dt_bias))
        b_s, b_o = delta_step(b_s, b_qf, b_kf, b_v.to(tl.float32), decay, sigmoid(b.to(tl.float32)), scale)
        tl.store(p_out + i_t * stride_out_t, b_o.to(p_out.dtype.element_ty))
        if target > null_index:
            tl.store(p_state + target * stride_state + o_s, b_s.to(p_state.dtype.element_ty))
        b_q, b_k, b_v, a, b = b_q_next, b_k_next, b_v_next, a_next, b_next


# The tile of decode, which moves the same states the same way; its file has the times.
TILES = Tiles({(0, 0, 0, ""): (Tile(1024, 1), Tile(1024, 1))})


def run(
    *, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, state: Tensor,
    state_indices: Tensor, num_accepted_tokens: Tensor, cu_seqlens: Tensor, start_rows: Tensor | None, scale: float,
    use_qk_l2norm: bool, null_index: int, padding: str, out: Tensor, zero_padding: bool, config: Tile | None = None,
) -> None:  # fmt: skip
    """Packed speculative tokens: q, k [T, Hk, K], v and out [T, Hv, V], a and b [T, Hv], state_indices [B, S].

    Sequence i starts from row state_indices[i, n_i - 1], or start_rows[i] where given, and its state after token t
    lands in row state_indices[i, t]. A sequence whose start row is <= null_index is padding, whatever `padding` says
    of it; a single target row that is, is skipped.

    Args:
        config: for a tuning script; else the table's.
    """
    num_tokens, num_k_heads, K = q.shape
    num_v_heads, V = v.shape[1:]
    batch = state_indices.shape[0]
    start = state_indices if start_rows is None else start_rows
    tile = config or TILES.tile(device_sm(q.device), state.dtype, batch * num_v_heads, K, V)
    block_v = tile.block_v(K, V)
    launch(
        verify_kernel, ((batch + int(zero_padding)) * num_v_heads * (V // block_v),),
        p_q=q, p_k=k, p_v=v, p_a=a, p_b=b, p_A_log=A_log, p_dt_bias=dt_bias, p_state=state, p_indices=state_indices,
        p_accepted=num_accepted_tokens, p_start=start, p_cu_seqlens=cu_seqlens, p_out=out,
        stride_q_t=q.stride(0), stride_q_h=q.stride(1), stride_k_t=k.stride(0), stride_k_h=k.stride(1),
        stride_v_t=v.stride(0), stride_v_h=v.stride(1), **value_strides("a", a, num_k_heads, num_v_heads),
        **value_strides("b", b, num_k_heads, num_v_heads), stride_state=state.stride(0),
        stride_indices=state_indices.stride(0), stride_start=start.stride(0), stride_out_t=out.stride(0),
        stride_out_h=out.stride(1), has_start=int(start_rows is not None), scale=scale, num_sequences=batch,
        num_tokens=num_tokens, num_slots=state_indices.shape[1], num_v_heads=num_v_heads,
        ratio=num_v_heads // num_k_heads, null_index=null_index, l2norm=int(use_qk_l2norm),
        zero_padding=int(zero_padding),
        K=K, V=V, BV=block_v, num_warps=tile.num_warps, num_stages=1,
    )  # fmt: skip


def calls(arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """dt_bias in the io dtype and in fp32."""
    for dt_bias in either(arguments["dt_bias"]):
        yield arguments | {"dt_bias": dt_bias}


def variants(platform: Platform, problem: Problem, pool: Tensor | None = None) -> list[KernelVariant]:
    """See BackendOp.variants and `variants_of`."""
    return variants_of(run, calls, platform, problem, pool)


VERIFY = BackendOp(run=run, variants=variants, compile_count=compile_count, interleaved=True)
