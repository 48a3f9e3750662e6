"""fused_decode: the whole decode step in one launch: conv update, gates, L2 norm, recurrence, gated RMSNorm.

A program owns BV rows of one value head's state, as in `decode`, and works out the convolution of that head's q, k and
its own BV channels of v. Two things are shared between programs:

- conv_state of a key head's q and k is read by every program of the Hv/Hk value heads that share it, and is shifted in
  place. (The v channels belong to one program.)
- The RMSNorm needs a head's whole V, which is split over V/BV programs.

Both are finished by whichever program of a (sequence, key head) group is the last to arrive. Each program reads the
conv history, stores its part of `out`, passes a barrier and adds one to the group's counter with acquire-release
semantics at GPU scope. The program that draws the highest ticket therefore knows that every other read of the history
has happened (their reads come before their release, and it acquired the last of them), so it may shift the columns; and
it sees every part of `out`, so it normalises the group's heads there. Nobody waits: a program that is not last just
ends. The last one also sets the counter back to zero, which the next launch sees, as launches of a stream are ordered.
The split normalisation loses nothing: the contract rounds o to the io dtype before the norm, and that is what `out`
holds in between. A group of one program (Hv = Hk, V = BV) needs no counter, and where V = BV the norm is done in
registers.

Counters: one int32 per (sequence, key head), zero between launches, in a workspace per (device, stream) that is
allocated once and never freed, so that captured graphs may keep its address. Two launches that can run at the same time
must not share it: a graph uses the workspace of the stream it was captured on.
"""

# ruff: noqa: RUF005 - Triton has no unpacking of tuples
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gdn_plugin.ops._triton.gates import delta_step, l2_normalise, log_decay, round_to, sigmoid, silu
from gdn_plugin.ops._triton.launch import compile_count, device_sm, launch
from gdn_plugin.ops._triton.tiles import TileConfig, fused_decode_config
from gdn_plugin.ops._triton.workspace import counters
from gdn_plugin.registry import Problem

__all__ = ["compile_count", "fused_decode", "fused_decode_with_config", "warm_up"]


@triton.jit
def conv_step(
    p_x, p_weight, p_bias, p_conv_state, o_c, stride_w_c, stride_w_t, stride_cs_c, stride_cs_w, W: tl.constexpr
):
    """Conv and SiLU of channels o_c for one token: (activation rounded to the io dtype, the W-1 newest inputs)."""
    x = tl.load(p_x + o_c)
    acc = x.to(tl.float32) * tl.load(p_weight + o_c * stride_w_c + (W - 1) * stride_w_t).to(tl.float32)
    newest = ()
    for i in tl.static_range(W - 1):
        old = tl.load(p_conv_state + o_c * stride_cs_c + i * stride_cs_w).to(tl.float32)
        acc += old * tl.load(p_weight + o_c * stride_w_c + i * stride_w_t).to(tl.float32)
        if i > 0:
            newest = newest + (old,)
    if p_bias is not None:
        acc += tl.load(p_bias + o_c).to(tl.float32)
    return round_to(silu(acc), p_x.dtype.element_ty), newest + (x.to(tl.float32),)


@triton.jit
def conv_step_few(
    p_x, p_weight, p_bias, p_conv_state, o_c, stride_w_c, stride_w_t, stride_cs_c, stride_cs_w, W: tl.constexpr,
    BW: tl.constexpr,
):  # fmt: skip
    """As `conv_step`, with the taps as rows of a tile [BW, channels]; returns (activation, the newest input, the tile).

    For the channels of v, fewer than threads, which as vectors of one tap each took 48 registers a thread more: 121 us
    instead of 111 at B = 64, Hk 16, Hv 32 on H100. BW is W rounded up to a power of two.
    """
    o_w = tl.arange(0, BW)[:, None]
    x = tl.load(p_x + o_c)
    p_old = p_conv_state + o_c[None, :] * stride_cs_c + o_w * stride_cs_w
    old = tl.load(p_old, mask=o_w < W - 1, other=0.0).to(tl.float32)
    weight = tl.load(p_weight + o_c[None, :] * stride_w_c + o_w * stride_w_t, mask=o_w < W, other=0.0).to(tl.float32)
    acc = tl.sum(tl.where(o_w < W - 1, old, x.to(tl.float32)[None, :]) * weight, axis=0)
    if p_bias is not None:
        acc += tl.load(p_bias + o_c).to(tl.float32)
    return round_to(silu(acc), p_x.dtype.element_ty), x, old


@triton.jit
def store_history_few(
    p_conv_state, o_c, x, old, stride_cs_c, stride_cs_w, W: tl.constexpr, BW: tl.constexpr
):  # fmt: skip
    o_w = tl.arange(0, BW)[:, None]
    p_new = p_conv_state + o_c[None, :] * stride_cs_c + (o_w - 1) * stride_cs_w
    tl.store(p_new, old.to(p_conv_state.dtype.element_ty), mask=(o_w > 0) & (o_w < W - 1))
    tl.store(p_conv_state + o_c * stride_cs_c + (W - 2) * stride_cs_w, x.to(p_conv_state.dtype.element_ty))


@triton.jit
def store_history(p_conv_state, o_c, newest, stride_cs_c, stride_cs_w, W: tl.constexpr):
    for i in tl.static_range(W - 1):
        tl.store(p_conv_state + o_c * stride_cs_c + i * stride_cs_w, newest[i].to(p_conv_state.dtype.element_ty))


@triton.jit
def gated_norm(o, z, weight, V: tl.constexpr, eps, SIGMOID: tl.constexpr):
    """RMSNorm over the last axis of o [R, V], then the gate; all fp32."""
    y = o * tl.rsqrt(tl.sum(o * o, axis=1) / V + eps)[:, None] * weight[None, :]
    return y * (sigmoid(z) if SIGMOID else silu(z))


@triton.jit(
    do_not_specialize=["stride_w_c", "stride_w_t", "stride_cs_n", "stride_cs_c", "stride_cs_w", "stride_a_t",
                       "stride_a_h", "stride_b_t", "stride_b_h", "stride_indices", "num_k_heads", "null_index"],
    do_not_specialize_on_alignment=["p_a", "p_b", "p_A_log", "p_dt_bias", "p_indices", "p_weight", "p_bias",
                                    "p_conv_state", "p_counters"],
)  # fmt: skip
def fused_decode_kernel(
    p_x, p_weight, p_bias, p_conv_state, p_a, p_b, p_A_log, p_dt_bias, p_state, p_indices, p_z, p_norm_weight, p_out,
    p_counters,
    stride_x, stride_w_c, stride_w_t, stride_cs_n, stride_cs_c, stride_cs_w, stride_a_t, stride_a_h, stride_b_t,
    stride_b_h, stride_state, stride_indices, stride_z_t, stride_z_h, stride_out_t, stride_out_h,
    scale, eps, num_k_heads, null_index,
    K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, RATIO: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr,
    SIGMOID: tl.constexpr, ZERO_PADDING: tl.constexpr,
):  # fmt: skip
    NV: tl.constexpr = V // BV
    BW: tl.constexpr = 2 if W == 2 else 4 if W <= 4 else 8
    NORM: tl.constexpr = p_z is not None
    num_v_heads = num_k_heads * RATIO
    pid = tl.program_id(0)  # divided in 32 bits, which is much faster; the parts are widened for the offsets
    i_v = (pid % NV).to(tl.int64)
    i_h = ((pid // NV) % num_v_heads).to(tl.int64)
    i_b = (pid // NV // num_v_heads).to(tl.int64)
    i_hk = ((pid // NV) % num_v_heads // RATIO).to(tl.int64)
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
    a = tl.load(p_a + i_b * stride_a_t + i_h * stride_a_h).to(tl.float32)
    b = tl.load(p_b + i_b * stride_b_t + i_h * stride_b_h).to(tl.float32)
    A_log = tl.load(p_A_log + i_h).to(tl.float32)
    dt_bias = tl.load(p_dt_bias + i_h).to(tl.float32)
    p_x += i_b * stride_x
    p_conv_state += row * stride_cs_n
    c_q = i_hk * K + o_k
    c_k = num_k_heads * K + c_q
    c_v = 2 * num_k_heads * K + i_h * V + o_v
    q, new_q = conv_step(p_x, p_weight, p_bias, p_conv_state, c_q, stride_w_c, stride_w_t, stride_cs_c, stride_cs_w, W)
    k, new_k = conv_step(p_x, p_weight, p_bias, p_conv_state, c_k, stride_w_c, stride_w_t, stride_cs_c, stride_cs_w, W)
    v, x_v, old_v = conv_step_few(
        p_x, p_weight, p_bias, p_conv_state, c_v, stride_w_c, stride_w_t, stride_cs_c, stride_cs_w, W, BW
    )  # fmt: skip
    q = l2_normalise(q, p_x.dtype.element_ty)
    k = l2_normalise(k, p_x.dtype.element_ty)
    S, o = delta_step(S, q, k, v, tl.exp(log_decay(a, A_log, dt_bias)), sigmoid(b), scale)

    if NORM and NV == 1:
        o = round_to(o, p_x.dtype.element_ty)
        z = tl.load(p_z + i_b * stride_z_t + i_h * stride_z_h + o_v).to(tl.float32)
        weight = tl.load(p_norm_weight + o_v).to(tl.float32)
        y = gated_norm(o[None, :], z[None, :], weight, V, eps, SIGMOID)
        o = tl.reshape(y, [V])
    tl.store(p_o, o.to(p_out.dtype.element_ty))
    # Every thread of this program has read its history, and its part of `out` is stored, before anything below.
    tl.debug_barrier()
    store_history_few(p_conv_state, c_v, x_v, old_v, stride_cs_c, stride_cs_w, W, BW)
    if NV * RATIO == 1:
        store_history(p_conv_state, c_q, new_q, stride_cs_c, stride_cs_w, W)
        store_history(p_conv_state, c_k, new_k, stride_cs_c, stride_cs_w, W)
        tl.store(p_S, S.to(p_state.dtype.element_ty))
    else:
        p_counter = p_counters + i_b * num_k_heads + i_hk
        ticket = tl.atomic_add(p_counter, 1, sem="acq_rel", scope="gpu")
        # Stored behind the atomic: its release would otherwise wait for the whole tile to reach L2.
        tl.store(p_S, S.to(p_state.dtype.element_ty))
        if ticket == NV * RATIO - 1:
            # The other threads of this program are ordered behind the one that made the atomic access.
            tl.debug_barrier()
            tl.store(p_counter, 0)
            store_history(p_conv_state, c_q, new_q, stride_cs_c, stride_cs_w, W)
            store_history(p_conv_state, c_k, new_k, stride_cs_c, stride_cs_w, W)
            if NORM and NV > 1:
                o_r = tl.arange(0, BR)
                o_f = tl.arange(0, V)
                heads = i_hk * RATIO + o_r
                mask = (o_r < RATIO)[:, None] & (o_f < V)[None, :]
                p_part = p_out + i_b * stride_out_t + heads[:, None] * stride_out_h + o_f[None, :]
                # .cg: from L2, where the other programs' stores are
                part = tl.load(p_part, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
                p_gate = p_z + i_b * stride_z_t + heads[:, None] * stride_z_h + o_f[None, :]
                z = tl.load(p_gate, mask=mask, other=0.0).to(tl.float32)
                weight = tl.load(p_norm_weight + o_f).to(tl.float32)
                y = gated_norm(part, z, weight, V, eps, SIGMOID)
                tl.store(p_part, y.to(p_out.dtype.element_ty), mask=mask)


def fused_decode(
    mixed_qkv: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, conv_state: Tensor, a: Tensor, b: Tensor,
    A_log: Tensor, dt_bias: Tensor, state: Tensor, state_indices: Tensor, num_k_heads: int, head_k_dim: int,
    head_v_dim: int, scale: float, z: Tensor | None, norm_weight: Tensor | None, norm_eps: float, gate: str,
    null_index: int, out: Tensor, zero_padding: bool,
) -> None:  # fmt: skip
    """One token of every sequence from mixed_qkv [B, 2*Hk*K + Hv*V] to out [B, Hv, V].

    Rows of conv_state and state change in place. With z [B, Hv, V] and norm_weight [V], out is RMSNorm(o) * weight *
    gate(z). Rows with state_indices <= null_index touch no pool; their `out` is zeroed under zero_padding and left
    otherwise.
    """
    num_heads = a.shape[0] * a.shape[1]
    config = fused_decode_config(device_sm(a.device), state.dtype, num_heads, head_k_dim, head_v_dim)
    fused_decode_with_config(
        mixed_qkv, conv_weight, conv_bias, conv_state, a, b, A_log, dt_bias, state, state_indices, num_k_heads,
        head_k_dim, head_v_dim, scale, z, norm_weight, norm_eps, gate, null_index, out, zero_padding, config=config,
    )  # fmt: skip


def fused_decode_with_config(
    mixed_qkv: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, conv_state: Tensor, a: Tensor, b: Tensor,
    A_log: Tensor, dt_bias: Tensor, state: Tensor, state_indices: Tensor, num_k_heads: int, head_k_dim: int,
    head_v_dim: int, scale: float, z: Tensor | None, norm_weight: Tensor | None, norm_eps: float, gate: str,
    null_index: int, out: Tensor, zero_padding: bool, *, config: TileConfig,
) -> None:  # fmt: skip
    """`fused_decode` with a given configuration, for a tuning script."""
    batch, num_v_heads = a.shape
    ratio = num_v_heads // num_k_heads
    programs_per_head = head_v_dim // config.block_v
    normed = z is not None and norm_weight is not None
    p_counters = None
    if ratio * programs_per_head > 1:
        p_counters = counters(mixed_qkv.device, batch * num_k_heads)
    launch(
        fused_decode_kernel, (batch * num_v_heads * programs_per_head,),
        mixed_qkv, conv_weight, conv_bias, conv_state, a, b, A_log, dt_bias, state, state_indices,
        z if normed else None, norm_weight if normed else None, out, p_counters,
        mixed_qkv.stride(0), conv_weight.stride(0), conv_weight.stride(1), conv_state.stride(0), conv_state.stride(1),
        conv_state.stride(2), a.stride(0), a.stride(1), b.stride(0), b.stride(1), state.stride(0),
        state_indices.stride(0), z.stride(0) if normed else 0, z.stride(1) if normed else 0, out.stride(0),
        out.stride(1), scale, norm_eps, num_k_heads, null_index,
        K=head_k_dim, V=head_v_dim, W=conv_weight.shape[1], RATIO=ratio, BR=triton.next_power_of_2(ratio),
        BV=config.block_v, SIGMOID=gate == "sigmoid", ZERO_PADDING=zero_padding,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def warm_up(problem: Problem) -> None:
    """Compile every variant that calls of this problem can reach; see warm_up.py."""
    from gdn_plugin.ops._triton.warm_up import warm_up as run

    run(problem)
