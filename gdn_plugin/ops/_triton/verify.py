"""verify: speculative tokens in one launch, the state after each token kept in a row of its own.

A program owns BV rows of one head's state for one sequence and walks that sequence's tokens. It reads its tile of the
accepted row into registers before it writes anything, and no other program reads or writes that (head, tile) of any of
the sequence's rows; so the accepted row may be one of the rows that are overwritten.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gdn_plugin.ops._triton.gates import delta_step, l2_normalise, log_decay, sigmoid
from gdn_plugin.ops._triton.launch import compile_count, device_sm, launch
from gdn_plugin.ops._triton.tiles import TileConfig, verify_config
from gdn_plugin.registry import Problem

__all__ = ["compile_count", "verify", "verify_with_config", "warm_up"]


@triton.jit(
    do_not_specialize=["stride_a_t", "stride_a_h", "stride_b_t", "stride_b_h", "stride_indices", "stride_start",
                       "has_start", "num_sequences", "num_tokens", "num_slots", "num_v_heads", "ratio", "null_index"],
    do_not_specialize_on_alignment=["p_a", "p_b", "p_A_log", "p_dt_bias", "p_indices", "p_accepted", "p_start",
                                    "p_cu_seqlens"],
)  # fmt: skip
def verify_kernel(
    p_q, p_k, p_v, p_a, p_b, p_A_log, p_dt_bias, p_state, p_indices, p_accepted, p_start, p_cu_seqlens,
    p_out,
    stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_v_t, stride_v_h, stride_a_t, stride_a_h, stride_b_t,
    stride_b_h, stride_state, stride_indices, stride_start, stride_out_t, stride_out_h,
    has_start, scale, num_sequences, num_tokens, num_slots, num_v_heads, ratio, null_index,
    K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, L2NORM: tl.constexpr, ZERO_PADDING: tl.constexpr,
):  # fmt: skip
    NV: tl.constexpr = V // BV
    pid = tl.program_id(0)  # divided in 32 bits, which is much faster; the parts are widened for the offsets
    i_v = (pid % NV).to(tl.int64)
    i_h = ((pid // NV) % num_v_heads).to(tl.int64)
    i_b = (pid // NV // num_v_heads).to(tl.int64)
    i_hk = ((pid // NV) % num_v_heads // ratio).to(tl.int64)
    o_k = tl.arange(0, K)
    o_v = i_v * BV + tl.arange(0, BV)
    p_o = p_out + i_h * stride_out_h + o_v

    # Under ZERO_PADDING the grid has one sequence more: the tokens past cu_seqlens[-1].
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
        if ZERO_PADDING:
            for i_t in range(start, end):
                tl.store(p_o + i_t * stride_out_t, tl.zeros([BV], dtype=tl.float32))
        return

    o_S = i_h * (V * K) + o_v[:, None] * K + o_k[None, :]
    S = tl.load(p_state + row * stride_state + o_S).to(tl.float32)
    A_log = tl.load(p_A_log + i_h).to(tl.float32)
    dt_bias = tl.load(p_dt_bias + i_h).to(tl.float32)
    p_q += i_hk * stride_q_h + o_k
    p_k += i_hk * stride_k_h + o_k
    p_v += i_h * stride_v_h + o_v
    p_a += i_h * stride_a_h
    p_b += i_h * stride_b_h
    q = tl.load(p_q + start * stride_q_t)
    k = tl.load(p_k + start * stride_k_t)
    v = tl.load(p_v + start * stride_v_t)
    a = tl.load(p_a + start * stride_a_t)
    b = tl.load(p_b + start * stride_b_t)
    for i_t in range(start, end):
        # The next token's inputs are asked for before this token's state is stored: the compiler may not move loads
        # above stores, and their latency would otherwise be paid once a token.
        i_next = tl.minimum(i_t + 1, end - 1)
        q_next = tl.load(p_q + i_next * stride_q_t)
        k_next = tl.load(p_k + i_next * stride_k_t)
        v_next = tl.load(p_v + i_next * stride_v_t)
        a_next = tl.load(p_a + i_next * stride_a_t)
        b_next = tl.load(p_b + i_next * stride_b_t)
        slot = i_t - start
        target = tl.load(p_indices + i_b * stride_indices + slot, mask=slot < num_slots, other=null_index).to(tl.int64)
        q_t = q.to(tl.float32)
        k_t = k.to(tl.float32)
        if L2NORM:
            q_t = l2_normalise(q_t, p_q.dtype.element_ty)
            k_t = l2_normalise(k_t, p_k.dtype.element_ty)
        decay = tl.exp(log_decay(a.to(tl.float32), A_log, dt_bias))
        S, o = delta_step(S, q_t, k_t, v.to(tl.float32), decay, sigmoid(b.to(tl.float32)), scale)
        tl.store(p_o + i_t * stride_out_t, o.to(p_out.dtype.element_ty))
        if target > null_index:
            tl.store(p_state + target * stride_state + o_S, S.to(p_state.dtype.element_ty))
        q, k, v, a, b = q_next, k_next, v_next, a_next, b_next


def verify(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, state: Tensor,
    state_indices: Tensor, num_accepted_tokens: Tensor, cu_seqlens: Tensor, start_rows: Tensor | None, scale: float,
    use_qk_l2norm: bool, null_index: int, out: Tensor, zero_padding: bool,
) -> None:  # fmt: skip
    """Packed speculative tokens: q, k [T, Hk, K], v and out [T, Hv, V], a and b [T, Hv], state_indices [B, S].

    Sequence i starts from row state_indices[i, n_i - 1], or start_rows[i] where given, and its state after token t
    lands in row state_indices[i, t]. A sequence whose start row is <= null_index is padding; a single target row that
    is, is skipped.
    """
    num_heads = state_indices.shape[0] * v.shape[1]
    config = verify_config(device_sm(q.device), state.dtype, num_heads, q.shape[2], v.shape[2])
    verify_with_config(
        q, k, v, a, b, A_log, dt_bias, state, state_indices, num_accepted_tokens, cu_seqlens, start_rows, scale,
        use_qk_l2norm, null_index, out, zero_padding, config=config,
    )  # fmt: skip


def verify_with_config(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, state: Tensor,
    state_indices: Tensor, num_accepted_tokens: Tensor, cu_seqlens: Tensor, start_rows: Tensor | None, scale: float,
    use_qk_l2norm: bool, null_index: int, out: Tensor, zero_padding: bool, *, config: TileConfig,
) -> None:  # fmt: skip
    """`verify` with a given configuration, for a tuning script."""
    num_tokens, num_k_heads, K = q.shape
    num_v_heads, V = v.shape[1:]
    batch = state_indices.shape[0]
    start = state_indices if start_rows is None else start_rows
    launch(
        verify_kernel, ((batch + zero_padding) * num_v_heads * (V // config.block_v),),
        q, k, v, a, b, A_log, dt_bias, state, state_indices, num_accepted_tokens, start, cu_seqlens, out,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), a.stride(0), a.stride(1),
        b.stride(0), b.stride(1), state.stride(0), state_indices.stride(0), start.stride(0), out.stride(0),
        out.stride(1), int(start_rows is not None), scale, batch, num_tokens, state_indices.shape[1], num_v_heads,
        num_v_heads // num_k_heads, null_index,
        K=K, V=V, BV=config.block_v, L2NORM=use_qk_l2norm, ZERO_PADDING=zero_padding,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def warm_up(problem: Problem) -> None:
    """Compile every variant that calls of this problem can reach; see warm_up.py."""
    from gdn_plugin.ops._triton.warm_up import warm_up as run

    run(problem)
