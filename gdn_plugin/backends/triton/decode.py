"""decode: one token a sequence, in one launch.

A program owns BV rows of one head's state: it reads them once, writes them once, and reads that head's q, k and gates
beside them. Programs of one state row are neighbours in the grid, so that a wave reads whole pool rows.
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
                       "stride_indices", "num_v_heads", "ratio", "null_index", "l2norm", "zero_padding"],
    do_not_specialize_on_alignment=["p_a", "p_b", "p_A_log", "p_dt_bias", "p_indices"],
)  # fmt: skip
def decode_kernel(
    p_q, p_k, p_v, p_a, p_b, p_A_log, p_dt_bias, p_state, p_indices, p_out,
    stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_v_t, stride_v_h, stride_a_t, stride_a_k,
    stride_a_h, stride_b_t, stride_b_k, stride_b_h, stride_state, stride_indices, stride_out_t, stride_out_h,
    scale, num_v_heads, ratio, null_index, l2norm, zero_padding,
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
    p_out += i_b * stride_out_t + i_h * stride_out_h + o_v

    row = tl.load(p_indices + i_b * stride_indices).to(tl.int64)
    if row <= null_index:
        if zero_padding != 0:
            tl.store(p_out, tl.zeros([BV], dtype=tl.float32))
        return

    p_state += row * stride_state + i_h * (V * K) + o_v[:, None] * K + o_k[None, :]
    b_s = tl.load(p_state).to(tl.float32)
    b_q = tl.load(p_q + i_b * stride_q_t + i_hk * stride_q_h + o_k).to(tl.float32)
    b_k = tl.load(p_k + i_b * stride_k_t + i_hk * stride_k_h + o_k).to(tl.float32)
    b_v = tl.load(p_v + i_b * stride_v_t + i_h * stride_v_h + o_v).to(tl.float32)
    a = tl.load(p_a + i_b * stride_a_t + i_hk * stride_a_k + i_r * stride_a_h).to(tl.float32)
    b = tl.load(p_b + i_b * stride_b_t + i_hk * stride_b_k + i_r * stride_b_h).to(tl.float32)
    A_log = tl.load(p_A_log + i_h).to(tl.float32)
    dt_bias = tl.load(p_dt_bias + i_h).to(tl.float32)
    b_q = l2_normalise(b_q, p_q.dtype.element_ty, l2norm != 0)
    b_k = l2_normalise(b_k, p_k.dtype.element_ty, l2norm != 0)

    b_s, b_o = delta_step(b_s, b_q, b_k, b_v, tl.exp(log_decay(a, A_log, dt_bias)), sigmoid(b), scale)
    tl.store(p_out, b_o.to(p_out.dtype.element_ty))
    tl.store(p_state, b_s.to(p_state.dtype.element_ty))


# One warp a program: no reduction then crosses warps, so that there is no barrier at all, and 32 programs of 4 KiB
# (fp32 state, K = 128) on a multiprocessor keep 128 KiB in flight. H100 80GB, torch 2.11, triton 3.6, 2026-11-23,
# Hk 16, Hv 32, K = V = 128, bf16 io, fp32 state, 1024 elements (block_v 8): 97 us at B = 64, 376 at B = 256; every
# other tile is within 1 % there, and 512 give 3.7 us in place of 4.0 at B = 1. With the padding and the norm told as
# numbers (72 registers in place of 64), 2026-11-26: 97 and 370. Other dims and GPUs take the same row untimed.
TILES = Tiles({(0, 0, 0, ""): (Tile(1024, 1), Tile(1024, 1))})


def run(
    *, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, state: Tensor,
    state_indices: Tensor, scale: float, use_qk_l2norm: bool, null_index: int, padding: str, out: Tensor,
    zero_padding: bool, config: Tile | None = None,
) -> None:  # fmt: skip
    """One token of every sequence: q, k [B, Hk, K], v and out [B, Hv, V], a and b [B, Hv] or [B, Hk, Hv/Hk].

    The sequences' rows of `state` change in place. A sequence with state_indices <= null_index touches no state,
    whatever `padding` says of it; its row of `out` is zeroed under zero_padding and left otherwise.

    Args:
        config: for a tuning script; else the table's.
    """
    batch, num_k_heads, K = q.shape
    num_v_heads, V = v.shape[1:]
    tile = config or TILES.tile(device_sm(q.device), state.dtype, batch * num_v_heads, K, V)
    block_v = tile.block_v(K, V)
    launch(
        decode_kernel, (batch * num_v_heads * (V // block_v),),
        p_q=q, p_k=k, p_v=v, p_a=a, p_b=b, p_A_log=A_log, p_dt_bias=dt_bias, p_state=state, p_indices=state_indices,
        p_out=out,
        stride_q_t=q.stride(0), stride_q_h=q.stride(1), stride_k_t=k.stride(0), stride_k_h=k.stride(1),
        stride_v_t=v.stride(0), stride_v_h=v.stride(1), **value_strides("a", a, num_k_heads, num_v_heads),
        **value_strides("b", b, num_k_heads, num_v_heads), stride_state=state.stride(0),
        stride_indices=state_indices.stride(0), stride_out_t=out.stride(0), stride_out_h=out.stride(1),
        scale=scale, num_v_heads=num_v_heads, ratio=num_v_heads // num_k_heads, null_index=null_index,
        l2norm=int(use_qk_l2norm), zero_padding=int(zero_padding),
        K=K, V=V, BV=block_v, num_warps=tile.num_warps, num_stages=1,
    )  # fmt: skip


def calls(arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """dt_bias in the io dtype and in fp32."""
    for dt_bias in either(arguments["dt_bias"]):
        yield arguments | {"dt_bias": dt_bias}


def variants(platform: Platform, problem: Problem, pool: Tensor | None = None) -> list[KernelVariant]:
    """See BackendOp.variants and `variants_of`."""
    return variants_of(run, calls, platform, problem, pool)


DECODE = BackendOp(run=run, variants=variants, compile_count=compile_count, interleaved=True)
