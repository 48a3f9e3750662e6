"""decode: one token a sequence, in one launch.

A program owns BV rows of one head's state: it reads them once, writes them once, and reads that head's q, k and gates
beside them. Programs of one state row are neighbours in the grid, so that a wave reads whole pool rows.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gdn_plugin.ops._triton.gates import delta_step, l2_normalise, log_decay, sigmoid
from gdn_plugin.ops._triton.launch import compile_count, device_sm, launch
from gdn_plugin.ops._triton.tiles import TileConfig, decode_config
from gdn_plugin.registry import Problem

__all__ = ["compile_count", "decode", "decode_with_config", "warm_up"]


@triton.jit(
    do_not_specialize=["stride_a_t", "stride_a_h", "stride_b_t", "stride_b_h", "stride_indices", "num_v_heads", "ratio",
                       "null_index"],
    do_not_specialize_on_alignment=["p_a", "p_b", "p_A_log", "p_dt_bias", "p_indices"],
)  # fmt: skip
def decode_kernel(
    p_q, p_k, p_v, p_a, p_b, p_A_log, p_dt_bias, p_state, p_indices, p_out,
    stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_v_t, stride_v_h, stride_a_t, stride_a_h, stride_b_t,
    stride_b_h, stride_state, stride_indices, stride_out_t, stride_out_h,
    scale, num_v_heads, ratio, null_index,
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
    p_o = p_out + i_b * stride_out_t + i_h * stride_out_h + o_v

    row = tl.load(p_indices + i_b * stride_indices).to(tl.int64)
    if row <= null_index:
        if ZERO_PADDING:
            tl.store(p_o, tl.zeros([BV], dtype=tl.float32))
        return

    p_S = p_state + row * stride_state + i_h * (V * K) + o_v[:, None] * K + o_k[None, :]
    S = tl.load(p_S).to(tl.float32)
    q = tl.load(p_q + i_b * stride_q_t + i_hk * stride_q_h + o_k).to(tl.float32)
    k = tl.load(p_k + i_b * stride_k_t + i_hk * stride_k_h + o_k).to(tl.float32)
    v = tl.load(p_v + i_b * stride_v_t + i_h * stride_v_h + o_v).to(tl.float32)
    a = tl.load(p_a + i_b * stride_a_t + i_h * stride_a_h).to(tl.float32)
    b = tl.load(p_b + i_b * stride_b_t + i_h * stride_b_h).to(tl.float32)
    A_log = tl.load(p_A_log + i_h).to(tl.float32)
    dt_bias = tl.load(p_dt_bias + i_h).to(tl.float32)
    if L2NORM:
        q = l2_normalise(q, p_q.dtype.element_ty)
        k = l2_normalise(k, p_k.dtype.element_ty)

    S, o = delta_step(S, q, k, v, tl.exp(log_decay(a, A_log, dt_bias)), sigmoid(b), scale)
    tl.store(p_o, o.to(p_out.dtype.element_ty))
    tl.store(p_S, S.to(p_state.dtype.element_ty))


def decode(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, state: Tensor,
    state_indices: Tensor, scale: float, use_qk_l2norm: bool, null_index: int, out: Tensor, zero_padding: bool,
) -> None:  # fmt: skip
    """One token of every sequence: q, k [B, Hk, K], v and out [B, Hv, V], a and b [B, Hv].

    The sequences' rows of `state` change in place. A sequence with state_indices <= null_index touches no state; its
    row of `out` is zeroed under zero_padding and left otherwise.
    """
    config = decode_config(device_sm(q.device), state.dtype, q.shape[0] * v.shape[1], q.shape[2], v.shape[2])
    decode_with_config(
        q, k, v, a, b, A_log, dt_bias, state, state_indices, scale, use_qk_l2norm, null_index, out, zero_padding,
        config=config,
    )  # fmt: skip


def decode_with_config(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, state: Tensor,
    state_indices: Tensor, scale: float, use_qk_l2norm: bool, null_index: int, out: Tensor, zero_padding: bool,
    *, config: TileConfig,
) -> None:  # fmt: skip
    """`decode` with a given configuration, for a tuning script."""
    batch, num_k_heads, K = q.shape
    num_v_heads, V = v.shape[1:]
    launch(
        decode_kernel, (batch * num_v_heads * (V // config.block_v),),
        q, k, v, a, b, A_log, dt_bias, state, state_indices, out,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), a.stride(0), a.stride(1),
        b.stride(0), b.stride(1), state.stride(0), state_indices.stride(0), out.stride(0), out.stride(1),
        scale, num_v_heads, num_v_heads // num_k_heads, null_index,
        K=K, V=V, BV=config.block_v, L2NORM=use_qk_l2norm, ZERO_PADDING=zero_padding,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def warm_up(problem: Problem) -> None:
    """Compile every variant that calls of this problem can reach; see warm_up.py."""
    from gdn_plugin.ops._triton.warm_up import warm_up as run

    run(problem)
