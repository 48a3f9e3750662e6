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

from gdn_plugin.backends.triton.configs import Tile, Tiles
from gdn_plugin.backends.triton.gates import (
    delta_step,
    l2_normalise,
    log_decay,
    rms_norm_gated,
    round_to,
    sigmoid,
    silu,
)
from gdn_plugin.backends.triton.heads import qkv_strides, value_strides
from gdn_plugin.backends.triton.launch import compile_count, counted, device_sm, launch
from gdn_plugin.backends.triton.staged import NO_RING, Staging, Stagings, staged_kernel, step_options
from gdn_plugin.backends.triton.variants import KernelVariant, fused_forms, variants_of
from gdn_plugin.backends.triton.workspace import counters
from gdn_plugin.registry import BackendOp, Platform, Problem


@triton.jit
def conv_step(
    p_x, p_weight, p_bias, p_conv_state, o_c, stride_w_c, stride_w_t, stride_cs_c, stride_cs_w, W: tl.constexpr
):
    """Conv and SiLU of channels o_c for one token, whose inputs are at p_x.

    Returns (activation rounded to the io dtype, the W-1 newest inputs).
    """
    b_x = tl.load(p_x)
    b_acc = b_x.to(tl.float32) * tl.load(p_weight + o_c * stride_w_c + (W - 1) * stride_w_t).to(tl.float32)
    newest = ()
    for i in tl.static_range(W - 1):
        b_old = tl.load(p_conv_state + o_c * stride_cs_c + i * stride_cs_w).to(tl.float32)
        b_acc += b_old * tl.load(p_weight + o_c * stride_w_c + i * stride_w_t).to(tl.float32)
        if i > 0:
            newest = newest + (b_old,)
    if p_bias is not None:
        b_acc += tl.load(p_bias + o_c).to(tl.float32)
    return round_to(silu(b_acc), p_x.dtype.element_ty), newest + (b_x.to(tl.float32),)


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
    b_x = tl.load(p_x)
    p_old = p_conv_state + o_c[None, :] * stride_cs_c + o_w * stride_cs_w
    b_old = tl.load(p_old, mask=o_w < W - 1, other=0.0).to(tl.float32)
    b_weight = tl.load(p_weight + o_c[None, :] * stride_w_c + o_w * stride_w_t, mask=o_w < W, other=0.0).to(tl.float32)
    b_acc = tl.sum(tl.where(o_w < W - 1, b_old, b_x.to(tl.float32)[None, :]) * b_weight, axis=0)
    if p_bias is not None:
        b_acc += tl.load(p_bias + o_c).to(tl.float32)
    return round_to(silu(b_acc), p_x.dtype.element_ty), b_x, b_old


@triton.jit
def store_history_few(
    p_conv_state, o_c, b_x, b_old, stride_cs_c, stride_cs_w, W: tl.constexpr, BW: tl.constexpr
):  # fmt: skip
    o_w = tl.arange(0, BW)[:, None]
    p_new = p_conv_state + o_c[None, :] * stride_cs_c + (o_w - 1) * stride_cs_w
    tl.store(p_new, b_old.to(p_conv_state.dtype.element_ty), mask=(o_w > 0) & (o_w < W - 1))
    tl.store(p_conv_state + o_c * stride_cs_c + (W - 2) * stride_cs_w, b_x.to(p_conv_state.dtype.element_ty))


@triton.jit
def store_history(p_conv_state, o_c, newest, stride_cs_c, stride_cs_w, W: tl.constexpr):
    for i in tl.static_range(W - 1):
        tl.store(p_conv_state + o_c * stride_cs_c + i * stride_cs_w, newest[i].to(p_conv_state.dtype.element_ty))


@counted
@triton.jit(
    do_not_specialize=["stride_w_c", "stride_w_t", "stride_cs_n", "stride_cs_c", "stride_cs_w", "stride_a_t",
                       "stride_a_k", "stride_a_h", "stride_b_t", "stride_b_k", "stride_b_h", "stride_indices",
                       "num_k_heads", "null_index", "is_sigmoid", "zero_padding"],
    do_not_specialize_on_alignment=["p_a", "p_b", "p_A_log", "p_dt_bias", "p_indices", "p_weight", "p_bias",
                                    "p_conv_state", "p_counters"],
)  # fmt: skip
def fused_decode_kernel(
    p_x, p_weight, p_bias, p_conv_state, p_a, p_b, p_A_log, p_dt_bias, p_state, p_indices, p_z, p_norm_weight, p_out,
    p_counters,
    stride_x, stride_x_k, stride_x_v, first_k, first_v, stride_w_c, stride_w_t, stride_cs_n, stride_cs_c, stride_cs_w,
    stride_a_t, stride_a_k, stride_a_h, stride_b_t, stride_b_k, stride_b_h, stride_state, stride_indices, stride_z_t,
    stride_z_k, stride_z_h, stride_out_t, stride_out_h,
    scale, eps, num_k_heads, null_index, is_sigmoid, zero_padding,
    K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, RATIO: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    NV: tl.constexpr = V // BV
    BW: tl.constexpr = 2 if W == 2 else 4 if W <= 4 else 8
    NORM: tl.constexpr = p_z is not None
    num_v_heads = num_k_heads * RATIO
    i_p = tl.program_id(0)  # divided in 32 bits, which is much faster; the parts are widened for the offsets
    i_v = (i_p % NV).to(tl.int64)
    i_h = ((i_p // NV) % num_v_heads).to(tl.int64)
    i_b = (i_p // NV // num_v_heads).to(tl.int64)
    i_hk = ((i_p // NV) % num_v_heads // RATIO).to(tl.int64)
    i_r = i_h - i_hk * RATIO  # among the value heads of its key head
    o_k = tl.arange(0, K)
    o_v = i_v * BV + tl.arange(0, BV)
    p_o = p_out + i_b * stride_out_t + i_h * stride_out_h + o_v

    row = tl.load(p_indices + i_b * stride_indices).to(tl.int64)
    if row <= null_index:
        if zero_padding != 0:
            tl.store(p_o, tl.zeros([BV], dtype=tl.float32))
        return

    p_state += row * stride_state + i_h * (V * K) + o_v[:, None] * K + o_k[None, :]
    b_s = tl.load(p_state).to(tl.float32)
    a = tl.load(p_a + i_b * stride_a_t + i_hk * stride_a_k + i_r * stride_a_h).to(tl.float32)
    b = tl.load(p_b + i_b * stride_b_t + i_hk * stride_b_k + i_r * stride_b_h).to(tl.float32)
    A_log = tl.load(p_A_log + i_h).to(tl.float32)
    dt_bias = tl.load(p_dt_bias + i_h).to(tl.float32)
    p_x += i_b * stride_x
    p_conv_state += row * stride_cs_n
    p_key = p_x + i_hk * stride_x_k + o_k
    p_value = p_x + first_v + i_hk * stride_x_v + i_r * V + o_v
    c_q = i_hk * K + o_k
    c_k = num_k_heads * K + c_q
    c_v = 2 * num_k_heads * K + i_h * V + o_v
    b_q, new_q = conv_step(
        p_key, p_weight, p_bias, p_conv_state, c_q, stride_w_c, stride_w_t, stride_cs_c, stride_cs_w, W
    )
    b_k, new_k = conv_step(
        p_key + first_k, p_weight, p_bias, p_conv_state, c_k, stride_w_c, stride_w_t, stride_cs_c, stride_cs_w, W
    )  # fmt: skip
    b_v, x_v, old_v = conv_step_few(
        p_value, p_weight, p_bias, p_conv_state, c_v, stride_w_c, stride_w_t, stride_cs_c, stride_cs_w, W, BW
    )  # fmt: skip
    b_q = l2_normalise(b_q, p_x.dtype.element_ty)
    b_k = l2_normalise(b_k, p_x.dtype.element_ty)
    b_s, b_o = delta_step(b_s, b_q, b_k, b_v, tl.exp(log_decay(a, A_log, dt_bias)), sigmoid(b), scale)

    if NORM and NV == 1:
        b_o = round_to(b_o, p_x.dtype.element_ty)
        b_z = tl.load(p_z + i_b * stride_z_t + i_hk * stride_z_k + i_r * stride_z_h + o_v).to(tl.float32)
        b_weight = tl.load(p_norm_weight + o_v).to(tl.float32)[None, :]
        b_y = rms_norm_gated(b_o[None, :], b_z[None, :], b_weight, V, eps, is_sigmoid)
        b_o = tl.reshape(b_y, [V])
    tl.store(p_o, b_o.to(p_out.dtype.element_ty))
    # Every thread of this program has read its history, and its part of `out` is stored, before anything below.
    tl.debug_barrier()
    store_history_few(p_conv_state, c_v, x_v, old_v, stride_cs_c, stride_cs_w, W, BW)
    if NV * RATIO == 1:
        store_history(p_conv_state, c_q, new_q, stride_cs_c, stride_cs_w, W)
        store_history(p_conv_state, c_k, new_k, stride_cs_c, stride_cs_w, W)
        tl.store(p_state, b_s.to(p_state.dtype.element_ty))
    else:
        p_counters += i_b * num_k_heads + i_hk
        ticket = tl.atomic_add(p_counters, 1, sem="acq_rel", scope="gpu")
        # Stored behind the atomic: its release would otherwise wait for the whole tile to reach L2.
        tl.store(p_state, b_s.to(p_state.dtype.element_ty))
        if ticket == NV * RATIO - 1:
            # The other threads of this program are ordered behind the one that made the atomic access.
            tl.debug_barrier()
            tl.store(p_counters, 0)
            store_history(p_conv_state, c_q, new_q, stride_cs_c, stride_cs_w, W)
            store_history(p_conv_state, c_k, new_k, stride_cs_c, stride_cs_w, W)
            if NORM and NV > 1:
                o_r = tl.arange(0, BR)
                o_f = tl.arange(0, V)
                heads = i_hk * RATIO + o_r
                mask = (o_r < RATIO)[:, None] & (o_f < V)[None, :]
                p_part = p_out + i_b * stride_out_t + heads[:, None] * stride_out_h + o_f[None, :]
                # .cg: from L2, where the other programs' stores are
                b_part = tl.load(p_part, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
                p_gate = p_z + i_b * stride_z_t + i_hk * stride_z_k + o_r[:, None] * stride_z_h + o_f[None, :]
                b_z = tl.load(p_gate, mask=mask, other=0.0).to(tl.float32)
                b_weight = tl.load(p_norm_weight + o_f).to(tl.float32)[None, :]
                b_y = rms_norm_gated(b_part, b_z, b_weight, V, eps, is_sigmoid)
                tl.store(p_part, b_y.to(p_out.dtype.element_ty), mask=mask)


# Every program repeats the conv of q and k, so tiles are larger. H100 80GB, torch 2.11, triton 3.6, 2026-11-27, norm
# inside, K = V = 128, bf16 io, elements/warps, us at Hk 16, Hv 32:
#     fp32 state  B = 1   B = 8  B = 256      bf16 state  B = 1   B = 8  B = 64  B = 256
#     2048/4        5.1    14.0      446                    4.7    12.2      84      322
#     4096/4               12.0      432                    4.2     9.5      69      261
#     4096/2        6.7    12.1      400                    4.6     8.1      62      231
#     8192/2               11.6      389                    5.4     8.3      64      242
#     8192/4        5.2    12.6      403                    4.3     9.3      67      251
# (B = 1 of an fp32 state at 2048/4 and 4096/2 is of 2026-11-23, as is decode, which has neither conv nor norm: 4.0,
# 14.2, 376; at B = 1, 64 and 256 of a bf16 one 3.1, 53, 194.) Programs that do both value heads of a key head, so that
# their q and k are convolved once, and programs that walk a whole head in steps of 4096 with the next one asked for
# ahead (221 us at B = 256 with a bf16 state, 404 with fp32; 8.9 and 10.8 at B = 8), gain as much as they lose. 4096/2
# has 128 registers a thread with an fp32 state, 167 with a bf16 one, 8192/2 253 (triton 3.9). Other dims and GPUs take
# the same rows untimed.
TILES = Tiles(
    {
        (0, 0, 0, ""): (Tile(4096, 4), Tile(4096, 2)),
        (90, 128, 128, "float32"): (Tile(2048, 4), Tile(8192, 2)),
    }
)

# The same, staged, rows/buffers/warps at B = 1, 8, 64 and 256 of a bf16 state: 64/4/4 5.1, 5.9, 54, -; 64/2/4 5.7, 6.7,
# 54, 205; 64/3/4 -, -, -, 204; 128/1/4 -, -, -, 208. The tiles above in the same runs: 4.2, 8.1, 62, 231. fp32: 32/4/4
# 8.6, 10.5, 100, 388; 64/2/8 8.8, 11.1, 101, -; the tiles above 4.9, 11.5, 103, 388.
_HALF = (None, Staging(64, 4, 4), Staging(64, 2, 4))
STAGINGS = Stagings(
    {
        (0, 0, 0, ""): (None, None, None),
        (90, 128, 128, "bfloat16"): _HALF,
        (90, 128, 128, "float16"): _HALF,
        (90, 128, 128, "float32"): (None, Staging(32, 4, 4), Staging(32, 4, 4)),
    }
)


def run(
    *, mixed_qkv: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, conv_state: Tensor, a: Tensor, b: Tensor,
    A_log: Tensor, dt_bias: Tensor, state: Tensor, state_indices: Tensor, num_k_heads: int, head_k_dim: int,
    head_v_dim: int, scale: float, z: Tensor | None, norm_weight: Tensor | None, norm_eps: float, gate: str,
    null_index: int, out: Tensor, zero_padding: bool, config: Tile | Staging | None = None,
) -> None:  # fmt: skip
    """One token of every sequence from mixed_qkv [B, dim] or [B, Hk, dim/Hk] to out [B, Hv, V].

    Rows of conv_state and state change in place. With z [B, Hv, V] or [B, Hk, Hv/Hk, V] and norm_weight [V], out is
    RMSNorm(o) * weight * gate(z). Rows with state_indices <= null_index touch no pool; their `out` is zeroed under
    zero_padding and left otherwise.

    Args:
        config: for a tuning script; else the tables'.
    """
    batch, num_v_heads = a.shape[0], A_log.shape[0]
    ratio = num_v_heads // num_k_heads
    normed = z is not None and norm_weight is not None
    arguments = {
        "p_x": mixed_qkv, "p_weight": conv_weight, "p_bias": conv_bias, "p_conv_state": conv_state, "p_a": a, "p_b": b,
        "p_A_log": A_log, "p_dt_bias": dt_bias, "p_state": state, "p_indices": state_indices,
        "p_z": z if normed else None, "p_norm_weight": norm_weight if normed else None, "p_out": out,
        **qkv_strides(mixed_qkv, num_k_heads, num_v_heads, head_k_dim, head_v_dim),
        **value_strides("a", a, num_k_heads, num_v_heads), **value_strides("b", b, num_k_heads, num_v_heads),
        **value_strides("z", z if normed else out, num_k_heads, num_v_heads),
        "stride_w_c": conv_weight.stride(0), "stride_w_t": conv_weight.stride(1),
        "stride_cs_n": conv_state.stride(0), "stride_cs_c": conv_state.stride(1), "stride_cs_w": conv_state.stride(2),
        "stride_state": state.stride(0), "stride_indices": state_indices.stride(0),
        "stride_out_t": out.stride(0), "stride_out_h": out.stride(1),
        "scale": scale, "eps": norm_eps, "num_k_heads": num_k_heads, "null_index": null_index,
        "is_sigmoid": int(gate == "sigmoid"), "zero_padding": int(zero_padding),
        "K": head_k_dim, "V": head_v_dim, "W": conv_weight.shape[1], "RATIO": ratio,
    }  # fmt: skip
    config = config or STAGINGS.staging(state, batch, num_k_heads)
    if isinstance(config, Staging):
        launch(
            staged_kernel, (batch * num_k_heads,), **arguments, **NO_RING, p_accepted=None, p_start=None,
            p_cu_seqlens=None, p_initial=None, stride_start=0, has_start=0, has_initial=0, num_sequences=batch,
            num_tokens=batch, num_slots=1, **step_options(config, ratio, head_v_dim, 1),
        )  # fmt: skip
        return
    tile = config or TILES.tile(device_sm(a.device), state.dtype, batch * num_v_heads, head_k_dim, head_v_dim)
    block_v = tile.block_v(head_k_dim, head_v_dim)
    programs = num_v_heads * (head_v_dim // block_v)
    launch(
        fused_decode_kernel, (batch * programs,), **arguments,
        p_counters=counters(mixed_qkv.device, batch * num_k_heads) if programs > num_k_heads else None,
        BR=triton.next_power_of_2(ratio), BV=block_v, num_warps=tile.num_warps, num_stages=1,
    )  # fmt: skip


def variants(platform: Platform, problem: Problem, pool: Tensor | None = None) -> list[KernelVariant]:
    """See BackendOp.variants and `variants_of`."""
    return variants_of(run, fused_forms, platform, problem, pool)


FUSED_DECODE = BackendOp(run=run, variants=variants, compile_count=compile_count, interleaved=True)
