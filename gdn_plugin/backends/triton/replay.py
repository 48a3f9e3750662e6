"""replay_decode, replay_verify: the fused steps with a state that is read and not written; and replay_fold.

A row holds an anchor S_0 and the n newest updates: k_j, u_j and g_j in a ring (see gdn_plugin.ops). With
l_j = the sum of g behind update j, and l = the sum of all g, both up to and with the token's own,

    S_n k = exp(l) S_0 k + sum_j exp(l_j) (k_j . k) u_j          and the same for q
    u = beta (v - S_n k);    o = scale (S_n q + (k . q) u)

so a token costs two products with S_0 and, for each update, two short dots and two sums of u_j. The sums of g are taken
from the newest update backwards: a cumulative sum would lose the small gates behind a large one, and make NaN of two
that are -inf.

A program owns BV rows of one value head's anchor, as in `fused_verify`, whose conv, norm and tickets these are. It has
the ring of its head in registers, k [RB, K] and u [RB, BV], and puts each token of the step into it, so that the tokens
of a step see one another. What programs share, beside what fused_verify lists:

- k of a key head and g of a value head are read by all programs of the group, and written by one of them, the group's
  first, or the head's first, as soon as they are known. No slot is both: a step's tokens go behind the row's live
  updates, and a step that folds leaves those where they are and moves the row's first slot on. That is why a ring must
  have 2 S slots, and why it goes round.
- u belongs to the program that owns its rows.
- ring_span is read by all programs of a key head's group and written by its last. Each key head has its own copy: the
  programs of another one may not even have started.

A fold applies the updates to the anchor one by one, which is the recurrence's own line, and stores it: one more pass
over the ring, from L1 or L2, and one write of the state, each R - S tokens or so.

What a step must move, B sequences of L tokens, n updates before it, i bytes an element of tokens, s of state, r of u:
    anchor    B * Hv*V*K * s                      and once more in a step that folds
    ring      B * (n + L) * (Hk*K * i + Hv*V * r + Hv * 4)
    the rest  as fused_verify's tokens and history
At B = 256, L = 1, Hk 16, Hv 32, K = V = 128, R = 16 and 2 bytes everywhere, n = 7.5 in the mean: 268 + 27 (+ 18 for the
folds) + 13 = 326 MB, 97 us at 3.35 TB/s, where fused_decode moves 550 MB, 164 us. The ring's k is asked for by every
program of its group, Hv/Hk * V/BV of them, from L1 or L2 all but once: 4 KB at n = 8 beside the 8 KB of a program's own
anchor at BV = 32. Operations: 4 an anchor element and token, and 4 (K + BV) an update and program; at BV = 32, n = 8 a
third of the anchor's. Measured: 230 us there, so bytes do not bind it (see TILES); staged (see staged.py), 144.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn_plugin.backends.triton.configs import Tile, Tiles
from gdn_plugin.backends.triton.fused_verify import conv_inputs, convolve, normalise_parts, store_history
from gdn_plugin.backends.triton.gates import l2_normalise, log_decay, rms_norm_gated, round_to, sigmoid
from gdn_plugin.backends.triton.heads import qkv_strides, value_strides
from gdn_plugin.backends.triton.launch import any_flags, compile_count, counted, device_sm, launch
from gdn_plugin.backends.triton.staged import MOST_SLOTS, Staging, Stagings, staged_kernel, step_options
from gdn_plugin.backends.triton.variants import KernelVariant, fused_forms, variants_of
from gdn_plugin.backends.triton.workspace import counters
from gdn_plugin.registry import BackendOp, Platform, Problem

ROWS = 8  # as in fused_verify; of replay_decode, which has one token, 1


@triton.jit
def fold(b_s, p_k, p_u, p_g, o_k, o_v, first, held, slots, stride_k, stride_u, stride_g):
    """The tile b_s [BV, K] of an anchor with `held` updates applied: S <- exp(g) S + u k^T."""
    for j in range(held):
        slot = first + j
        slot = tl.where(slot >= slots, slot - slots, slot)
        b_k = tl.load(p_k + slot * stride_k + o_k).to(tl.float32)
        b_u = tl.load(p_u + slot * stride_u + o_v).to(tl.float32)
        b_s = tl.exp(tl.load(p_g + slot * stride_g)) * b_s + b_u[:, None] * b_k[None, :]
    return b_s


@counted
@triton.jit(
    do_not_specialize=["stride_w_c", "stride_w_t", "stride_cs_n", "stride_cs_c", "stride_cs_w", "stride_a_t",
                       "stride_a_k", "stride_a_h", "stride_b_t", "stride_b_k", "stride_b_h", "stride_rg_n",
                       "stride_span", "stride_indices", "has_initial", "num_sequences", "num_tokens", "slots", "most",
                       "num_k_heads", "null_index", "is_sigmoid", "zero_padding"],
    do_not_specialize_on_alignment=["p_a", "p_b", "p_A_log", "p_dt_bias", "p_ring_g", "p_span", "p_indices",
                                    "p_accepted", "p_cu_seqlens", "p_initial", "p_weight", "p_bias", "p_conv_state",
                                    "p_counters"],
)  # fmt: skip
def replay_kernel(
    p_x, p_weight, p_bias, p_conv_state, p_a, p_b, p_A_log, p_dt_bias, p_state, p_ring_k, p_ring_u, p_ring_g, p_span,
    p_indices, p_accepted, p_cu_seqlens, p_initial, p_z, p_norm_weight, p_out, p_counters,
    stride_x, stride_x_k, stride_x_v, first_k, first_v, stride_w_c, stride_w_t, stride_cs_n, stride_cs_c, stride_cs_w,
    stride_a_t, stride_a_k, stride_a_h, stride_b_t, stride_b_k, stride_b_h, stride_state, stride_rk_n, stride_ru_n,
    stride_rg_n, stride_span, stride_indices, stride_z_t, stride_z_k, stride_z_h, stride_out_t, stride_out_h,
    has_initial, scale, eps, num_sequences, num_tokens, slots, most, num_k_heads, null_index, is_sigmoid, zero_padding,
    K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, RATIO: tl.constexpr, BV: tl.constexpr, RB: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    NV: tl.constexpr = V // BV
    NORM: tl.constexpr = p_z is not None
    SPECULATIVE: tl.constexpr = p_cu_seqlens is not None
    IO: tl.constexpr = p_x.dtype.element_ty
    num_v_heads = num_k_heads * RATIO
    i_p = tl.program_id(0)  # divided in 32 bits, which is much faster; the parts are widened for the offsets
    i_v = (i_p % NV).to(tl.int64)
    i_h = ((i_p // NV) % num_v_heads).to(tl.int64)
    i_b = (i_p // NV // num_v_heads).to(tl.int64)
    i_hk = ((i_p // NV) % num_v_heads // RATIO).to(tl.int64)
    i_r = i_h - i_hk * RATIO  # among the value heads of its key head
    o_k = tl.arange(0, K)
    o_v = i_v * BV + tl.arange(0, BV)
    o_r = tl.arange(0, RB)

    row = null_index.to(tl.int64)
    fresh = False
    accepted = 1
    if SPECULATIVE:
        # Under zero_padding the grid has one sequence more: the tokens past cu_seqlens[-1].
        start = tl.load(p_cu_seqlens + i_b).to(tl.int64)
        end = num_tokens.to(tl.int64)
        if i_b < num_sequences:
            end = tl.load(p_cu_seqlens + i_b + 1).to(tl.int64)
            if start < end:
                row = tl.load(p_indices + i_b * stride_indices).to(tl.int64)
                # has_initial_state, if absent, is any bytes, of which the first is read.
                fresh = (has_initial != 0) & (tl.load(p_initial + i_b * has_initial).to(tl.int32) == 0)
                accepted = tl.maximum(tl.load(p_accepted + i_b), 1)
    else:
        start = i_b
        end = i_b + 1
        row = tl.load(p_indices + i_b * stride_indices).to(tl.int64)
    p_out += start * stride_out_t
    length = (end - start).to(tl.int32)
    if row <= null_index:
        if zero_padding != 0:
            for i_t in range(length):
                p_o = p_out + i_t * stride_out_t + i_h * stride_out_h + o_v
                tl.store(p_o, tl.zeros([BV], dtype=tl.float32).to(p_out.dtype.element_ty))
        return

    p_span += row * stride_span + i_hk * 2
    first = tl.load(p_span)
    held = tl.load(p_span + 1) + accepted - 1
    accepted = tl.where(fresh, 1, accepted)  # what a fresh row or its count says is not looked at
    first = tl.where(fresh, 0, first)
    held = tl.where(fresh, 0, held)

    p_state += row * stride_state + i_h * (V * K)
    o_s = o_v[:, None] * K + o_k[None, :]
    # A scalar flag itself the interpreter rejects as a mask.
    m_s = (o_v < tl.where(fresh, 0, V))[:, None]
    b_s = tl.load(p_state + o_s, mask=m_s, other=0.0).to(tl.float32)
    p_ring_k += row * stride_rk_n + i_hk * K
    p_ring_u += row * stride_ru_n + i_h * V
    p_ring_g += row * stride_rg_n + i_h
    o_slot = first + o_r
    o_slot = tl.where(o_slot >= slots, o_slot - slots, o_slot)
    holds = o_r < held
    b_rk = tl.load(
        p_ring_k + o_slot[:, None] * (num_k_heads * K) + o_k[None, :], mask=holds[:, None], other=0.0
    ).to(tl.float32)  # fmt: skip
    b_ru = tl.load(
        p_ring_u + o_slot[:, None] * (num_v_heads * V) + o_v[None, :], mask=holds[:, None], other=0.0
    ).to(tl.float32)  # fmt: skip
    b_ru += b_ru * 0.0  # an infinite update makes products of S_n NaN: its k has both signs
    b_rg = tl.load(p_ring_g + o_slot * num_v_heads, mask=holds, other=0.0)
    A_log = tl.load(p_A_log + i_h).to(tl.float32)
    dt_bias = tl.load(p_dt_bias + i_h).to(tl.float32)
    p_x += start * stride_x
    p_a += start * stride_a_t + i_hk * stride_a_k + i_r * stride_a_h
    p_b += start * stride_b_t + i_hk * stride_b_k + i_r * stride_b_h
    p_conv_state += row * stride_cs_n
    p_history = p_conv_state + (accepted - 1) * stride_cs_w
    c_q = i_hk * K + o_k
    c_k = num_k_heads * K + c_q
    c_v = 2 * num_k_heads * K + i_h * V + o_v
    readable = tl.where(fresh, 0, 2 * num_k_heads * K + num_v_heads * V)
    o_xq = i_hk * stride_x_k + o_k
    o_xk = first_k + o_xq
    o_xv = first_v + i_hk * stride_x_v + i_r * V + o_v
    x_q = tl.load(p_x + o_xq)
    x_k = tl.load(p_x + o_xk)
    x_v = tl.load(p_x + o_xv)
    a = tl.load(p_a)
    b = tl.load(p_b)
    taps_q, bias_q, old_q = conv_inputs(
        p_weight, p_bias, p_history, c_q, readable, stride_w_c, stride_w_t, stride_cs_c, stride_cs_w, W
    )
    taps_k, bias_k, old_k = conv_inputs(
        p_weight, p_bias, p_history, c_k, readable, stride_w_c, stride_w_t, stride_cs_c, stride_cs_w, W
    )
    taps_v, bias_v, old_v = conv_inputs(
        p_weight, p_bias, p_history, c_v, readable, stride_w_c, stride_w_t, stride_cs_c, stride_cs_w, W
    )
    window_q, window_k, window_v = old_q, old_k, old_v

    # The logarithm of what is left of each update, and of the anchor.
    behind = tl.sum(tl.where(o_r[None, :] > o_r[:, None], b_rg[None, :], 0.0), axis=1)
    left = tl.sum(b_rg, axis=0)
    if fresh | (held + 2 * most > slots):
        b_s = fold(
            b_s, p_ring_k, p_ring_u, p_ring_g, o_k, o_v, first, held, slots, num_k_heads * K, num_v_heads * V,
            num_v_heads,
        )  # fmt: skip
        tl.store(p_state + o_s, b_s.to(p_state.dtype.element_ty))
        first += held
        first = tl.where(first >= slots, first - slots, first)
        held = held * 0
        behind += float("-inf")  # the updates are in the anchor now
        left = tl.full((), 0.0, tl.float32)  # not a product: it is -inf where a gate in the ring wipes the state
    for i_t in range(length):
        if SPECULATIVE:
            # As in fused_verify: the next token's inputs are asked for before anything is stored.
            i_next = tl.minimum(i_t + 1, length - 1)
            x_q_next = tl.load(p_x + i_next * stride_x + o_xq)
            x_k_next = tl.load(p_x + i_next * stride_x + o_xk)
            x_v_next = tl.load(p_x + i_next * stride_x + o_xv)
            a_next = tl.load(p_a + i_next * stride_a_t)
            b_next = tl.load(p_b + i_next * stride_b_t)
        if NORM and NV == 1:
            b_z = tl.load(p_z + (start + i_t) * stride_z_t + i_hk * stride_z_k + i_r * stride_z_h + o_v)
        b_q, window_q = convolve(x_q, window_q, taps_q, bias_q, IO, W)
        b_k, window_k = convolve(x_k, window_k, taps_k, bias_k, IO, W)
        b_v, window_v = convolve(x_v, window_v, taps_v, bias_v, IO, W)
        b_q = l2_normalise(b_q, IO)
        b_k = l2_normalise(b_k, IO)
        g = log_decay(a.to(tl.float32), A_log, dt_bias)
        behind += g
        left += g
        b_w = tl.exp(behind)
        decay = tl.exp(left)
        with_k = b_w * tl.sum(b_rk * b_k[None, :], axis=1)
        with_q = b_w * tl.sum(b_rk * b_q[None, :], axis=1)
        b_sk = decay * tl.sum(b_s * b_k[None, :], axis=1) + tl.sum(with_k[:, None] * b_ru, axis=0)
        b_sq = decay * tl.sum(b_s * b_q[None, :], axis=1) + tl.sum(with_q[:, None] * b_ru, axis=0)
        b_u = sigmoid(b.to(tl.float32)) * (b_v - b_sk)
        b_o = scale * (b_sq + tl.sum(b_k * b_q, axis=0) * b_u)
        if NORM and NV == 1:
            b_weight = tl.load(p_norm_weight + o_v).to(tl.float32)[None, :]
            b_y = rms_norm_gated(round_to(b_o, IO)[None, :], b_z.to(tl.float32)[None, :], b_weight, V, eps, is_sigmoid)
            b_o = tl.reshape(b_y, [V])
        tl.store(p_out + i_t * stride_out_t + i_h * stride_out_h + o_v, b_o.to(p_out.dtype.element_ty))
        slot = first + held + i_t
        slot = tl.where(slot >= slots, slot - slots, slot)
        tl.store(p_ring_u + slot * (num_v_heads * V) + o_v, b_u.to(p_ring_u.dtype.element_ty))
        if i_v == 0:
            tl.store(p_ring_g + slot * num_v_heads, g)
            if i_r == 0:
                tl.store(p_ring_k + slot * (num_k_heads * K) + o_k, b_k.to(p_ring_k.dtype.element_ty))
        if SPECULATIVE:
            mine = o_r == held + i_t
            b_rk = tl.where(mine[:, None], b_k[None, :], b_rk)
            b_ru = tl.where(mine[:, None], b_u[None, :], b_ru)
            behind = tl.where(mine, 0.0, behind)
            x_q, x_k, x_v, a, b = x_q_next, x_k_next, x_v_next, a_next, b_next

    # Every thread of this program has read its history, its spans and its ring, and its parts of `out` are stored,
    # before anything below.
    tl.debug_barrier()
    store_history(p_conv_state, p_x, o_xv, c_v, old_v, length, stride_x, stride_cs_c, stride_cs_w, W, ROWS)
    ticket = NV * RATIO - 1
    if NV * RATIO > 1:
        p_counters += i_b * num_k_heads + i_hk
        ticket = tl.atomic_add(p_counters, 1, sem="acq_rel", scope="gpu")
    if ticket == NV * RATIO - 1:
        if NV * RATIO > 1:
            # The other threads of this program are ordered behind the one that made the atomic access.
            tl.debug_barrier()
            tl.store(p_counters, 0)
        tl.store(p_span, first)
        tl.store(p_span + 1, held + 1)
        if NORM and NV > 1:
            p_gate = p_z + start * stride_z_t + i_hk * stride_z_k
            normalise_parts(
                p_out + i_hk * RATIO * stride_out_h, p_gate, p_norm_weight, length, stride_out_t, stride_out_h,
                stride_z_t, stride_z_h, eps, is_sigmoid, V, RATIO, ROWS,
            )  # fmt: skip
        store_history(p_conv_state, p_x, o_xq, c_q, old_q, length, stride_x, stride_cs_c, stride_cs_w, W, ROWS)
        store_history(p_conv_state, p_x, o_xk, c_k, old_k, length, stride_x, stride_cs_c, stride_cs_w, W, ROWS)


@counted
@triton.jit(
    do_not_specialize=["stride_rg_n", "stride_span", "stride_indices", "has_initial", "has_accepted", "slots",
                       "num_k_heads", "null_index"],
    do_not_specialize_on_alignment=["p_ring_g", "p_span", "p_indices", "p_accepted", "p_initial", "p_counters"],
)  # fmt: skip
def replay_fold_kernel(
    p_state, p_ring_k, p_ring_u, p_ring_g, p_span, p_indices, p_accepted, p_initial, p_counters,
    stride_state, stride_rk_n, stride_ru_n, stride_rg_n, stride_span, stride_indices,
    has_initial, has_accepted, slots, num_k_heads, null_index,
    K: tl.constexpr, V: tl.constexpr, RATIO: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    NV: tl.constexpr = V // BV
    num_v_heads = num_k_heads * RATIO
    i_p = tl.program_id(0)
    i_v = (i_p % NV).to(tl.int64)
    i_h = ((i_p // NV) % num_v_heads).to(tl.int64)
    i_b = (i_p // NV // num_v_heads).to(tl.int64)
    i_hk = ((i_p // NV) % num_v_heads // RATIO).to(tl.int64)
    o_k = tl.arange(0, K)
    o_v = i_v * BV + tl.arange(0, BV)

    row = tl.load(p_indices + i_b * stride_indices).to(tl.int64)
    if row <= null_index:
        return
    # What is absent is any bytes, of which the first are read.
    fresh = (has_initial != 0) & (tl.load(p_initial + i_b * has_initial).to(tl.int32) == 0)
    accepted = tl.where(has_accepted != 0, tl.load(p_accepted + i_b * has_accepted), 1)
    p_span += row * stride_span + i_hk * 2
    first = tl.load(p_span)
    held = tl.where(fresh, 0, tl.load(p_span + 1) + accepted - 1)
    if held > 0:
        p_s = p_state + row * stride_state + i_h * (V * K) + o_v[:, None] * K + o_k[None, :]
        b_s = fold(
            tl.load(p_s).to(tl.float32), p_ring_k + row * stride_rk_n + i_hk * K,
            p_ring_u + row * stride_ru_n + i_h * V, p_ring_g + row * stride_rg_n + i_h, o_k, o_v, first, held, slots,
            num_k_heads * K, num_v_heads * V, num_v_heads,
        )  # fmt: skip
        tl.store(p_s, b_s.to(p_state.dtype.element_ty))
    tl.debug_barrier()  # every thread has read the spans
    ticket = NV * RATIO - 1
    if NV * RATIO > 1:
        p_counters += i_b * num_k_heads + i_hk
        ticket = tl.atomic_add(p_counters, 1, sem="acq_rel", scope="gpu")
    if ticket == NV * RATIO - 1:
        if NV * RATIO > 1:
            tl.debug_barrier()
            tl.store(p_counters, 0)
        tl.store(p_span, 0)
        tl.store(p_span + 1, 0)


# H100 80GB, torch 2.11, triton 3.6, 2026-11-27, norm inside, a ring of 16, K = V = 128, bf16 io, elements/warps, us at
# Hk 16, Hv 32 with folds as they come, and beside them what fused_decode and fused_verify take:
#                 replay_decode B = 8  B = 64  B = 256      replay_verify 8x4  64x4 (none accepted)
#     fp32 state, 4096/2         15.6      99      370                     34       232
#                 8192/2         11.7      76      267                     31       201
#                 16384/4        12.3      83      293                     39       282
#                 fused          11.6     105      389                     41       265
#     bf16 state, 4096/2           16     100      378                     33       226
#                 8192/2         10.5      65      230                     28       186
#                 16384/4        10.6      72      254                     30       206
#                 fused           8.1      62      231                     21       151
# Bytes do not bind it: whatever the tile, time follows how often programs repeat the convolution and the products with
# the ring. Tried and not better: a program that walks a whole head in steps (233 to 283 at B = 256
# with a bf16 state), and all of a step's products with the state as one matrix product (225 there, 458 with an fp32
# state; 165 at 64x4, 224). 8192/2 spills 8 to 370 bytes (triton 3.9) and is the fastest nonetheless. At K = 64 four
# warps spill. Few heads, other GPUs and dims: untimed, compiled for sm_90a and sm_100a.
TILES = Tiles(
    {
        (0, 64, 0, ""): (Tile(1024, 2), Tile(2048, 2)),
        (0, 0, 0, ""): (Tile(2048, 4), Tile(4096, 4)),
        (90, 128, 128, ""): (Tile(2048, 4), Tile(8192, 2)),
    }
)

# The same, staged, rows/buffers/warps, replay_decode at B = 1, 8, 64, 256: bf16 state 64/2/4 4.6, 5.4, 35, 123; 128/1/4
# -, -, 35, 123; fp32 64/2/4 -, -, 63, 227; 32/2/4 -, 8.7, 63, 229. replay_verify at 1x4, 8x4, 64x4 (one accepted),
# 64x6, 64x8: bf16 64/2/4 8.0, 11.7, 51; past four tokens, not held, 123 and 148; fp32 64/2/4 16, 22, 96;
# 128/1/8 13, 19, 117. The tiles above in the same runs, 64x4 to 64x8: bf16 193, 259, 328; fp32 208. Past four tokens on
# an H200, 2026-11-29, with hosts' rings of 20 to 32, 8x6, 64x5, 64x6, 64x8, 128x5: bf16 21.5, 148, 147, 152, 286, held
# to 128 registers 22.4, 120, 119, 122, 225; fp32 28.8, 191, 190, 196, 366, so held 29.9, 204, 201, 208, 390.
# fp32 with few heads, by (sequence, value head) pairs, the tiles above against 64/2/4: replay_decode 32 6.2 and 7.7, 64
# 7.5 and 8.2 to 8.6, 128 11.9 to 12.5 and 8.4 to 8.9, 256 11.4 and 9.0; replay_verify of four tokens 32 11.3 and 15.7,
# 64 20 to 21 and 17 to 22, 128 38 and 20 to 23 (heads of one rank, of two and of four; H100).
_HALF = (Staging(64, 2, 4), Staging(64, 2, 4), Staging(64, 2, 4))
STAGINGS = Stagings(
    {
        (0, 0, 0, ""): (None, None, None),
        (90, 128, 128, "bfloat16"): _HALF,
        (90, 128, 128, "float16"): _HALF,
        (90, 128, 128, "float32"): (None, Staging(64, 2, 4), Staging(64, 2, 4)),
    },
    some=128,
)


def run(
    *, mixed_qkv: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, conv_state: Tensor, a: Tensor, b: Tensor,
    A_log: Tensor, dt_bias: Tensor, state: Tensor, ring_k: Tensor, ring_u: Tensor, ring_g: Tensor, ring_span: Tensor,
    state_indices: Tensor, num_k_heads: int, head_k_dim: int, head_v_dim: int, scale: float, z: Tensor | None,
    norm_weight: Tensor | None, norm_eps: float, gate: str, null_index: int, out: Tensor, zero_padding: bool,
    num_accepted_tokens: Tensor | None = None, cu_seqlens: Tensor | None = None,
    has_initial_state: Tensor | None = None, config: Tile | Staging | None = None,
) -> None:  # fmt: skip
    """Packed speculative tokens from mixed_qkv [T, dim] or [T, Hk, dim/Hk] to out [T, Hv, V], state_indices [B].

    Each token's update goes to the ring of its sequence's row; a row whose ring has no room is folded first. Without
    cu_seqlens and num_accepted_tokens every sequence has one token, and one of the step before counts.

    Args:
        config: for a tuning script; else the tables'.
    """
    batch, num_v_heads = state_indices.shape[0], A_log.shape[0]
    ratio = num_v_heads // num_k_heads
    slots, most = ring_k.shape[1], conv_state.shape[2] - conv_weight.shape[1] + 2
    initial = has_initial_state
    if initial is None and num_accepted_tokens is not None:
        initial = any_flags(num_accepted_tokens)
    normed = z is not None and norm_weight is not None
    speculative = cu_seqlens is not None
    arguments = {
        "p_x": mixed_qkv, "p_weight": conv_weight, "p_bias": conv_bias, "p_conv_state": conv_state, "p_a": a, "p_b": b,
        "p_A_log": A_log, "p_dt_bias": dt_bias, "p_state": state, "p_ring_k": ring_k, "p_ring_u": ring_u,
        "p_ring_g": ring_g, "p_span": ring_span, "p_indices": state_indices, "p_accepted": num_accepted_tokens,
        "p_cu_seqlens": cu_seqlens, "p_initial": initial, "p_z": z if normed else None,
        "p_norm_weight": norm_weight if normed else None, "p_out": out,
        **qkv_strides(mixed_qkv, num_k_heads, num_v_heads, head_k_dim, head_v_dim),
        **value_strides("a", a, num_k_heads, num_v_heads), **value_strides("b", b, num_k_heads, num_v_heads),
        **value_strides("z", z if normed else out, num_k_heads, num_v_heads),
        "stride_w_c": conv_weight.stride(0), "stride_w_t": conv_weight.stride(1),
        "stride_cs_n": conv_state.stride(0), "stride_cs_c": conv_state.stride(1), "stride_cs_w": conv_state.stride(2),
        "stride_state": state.stride(0), "stride_rk_n": ring_k.stride(0), "stride_ru_n": ring_u.stride(0),
        "stride_rg_n": ring_g.stride(0), "stride_span": ring_span.stride(0), "stride_indices": state_indices.stride(0),
        "stride_out_t": out.stride(0), "stride_out_h": out.stride(1), "has_initial": int(has_initial_state is not None),
        "scale": scale, "eps": norm_eps, "num_sequences": batch, "num_tokens": a.shape[0], "slots": slots, "most": most,
        "num_k_heads": num_k_heads, "null_index": null_index, "is_sigmoid": int(gate == "sigmoid"),
        "zero_padding": int(zero_padding), "K": head_k_dim, "V": head_v_dim, "W": conv_weight.shape[1], "RATIO": ratio,
        "RB": triton.next_power_of_2(slots),
    }  # fmt: skip
    sequences = batch + int(zero_padding and speculative)  # the last are the tokens past cu_seqlens[-1]
    if config is None and slots <= MOST_SLOTS:
        config = STAGINGS.staging(state, batch, num_k_heads, most, (ring_k, ring_u))
    if isinstance(config, Staging):
        options = step_options(config, ratio, head_v_dim, most if speculative else 1, slots)
        # A matrix product is of 16 slots at least.
        options |= {"RB": max(16, arguments["RB"]), "p_start": None, "stride_start": 0, "has_start": 0, "num_slots": 1}
        if not speculative and state.element_size() == 2 and ratio <= 2 and options["RB"] == 16:
            # Four programs to a multiprocessor, as its shared memory lets them: 88 us at 256 sequences, else 92.
            options.setdefault("maxnreg", 128)
        launch(staged_kernel, (sequences * num_k_heads,), **arguments | options)
        return
    tile = config or TILES.tile(device_sm(a.device), state.dtype, batch * num_v_heads, head_k_dim, head_v_dim)
    block_v = tile.block_v(head_k_dim, head_v_dim)
    programs = num_v_heads * (head_v_dim // block_v)
    launch(
        replay_kernel, (sequences * programs,), **arguments,
        p_counters=counters(mixed_qkv.device, batch * num_k_heads) if programs > num_k_heads else None,
        BV=block_v, ROWS=ROWS if speculative else 1, num_warps=tile.num_warps, num_stages=1,
    )  # fmt: skip


def run_fold(
    *, ring_k: Tensor, ring_u: Tensor, ring_g: Tensor, ring_span: Tensor, state: Tensor, state_indices: Tensor,
    has_initial_state: Tensor | None, num_accepted_tokens: Tensor | None, null_index: int, config: Tile | None = None,
) -> None:  # fmt: skip
    """Rows state_indices [B] become plain states: their updates are applied, their spans zero.

    Args:
        config: for a tuning script; else the table's.
    """
    batch, (num_v_heads, head_v_dim, head_k_dim) = state_indices.shape[0], state.shape[1:]
    num_k_heads = ring_k.shape[2]
    tile = config or TILES.tile(device_sm(state.device), state.dtype, batch * num_v_heads, head_k_dim, head_v_dim)
    block_v = tile.block_v(head_k_dim, head_v_dim)
    programs = num_v_heads * (head_v_dim // block_v)
    launch(
        replay_fold_kernel, (batch * programs,),
        p_state=state, p_ring_k=ring_k, p_ring_u=ring_u, p_ring_g=ring_g, p_span=ring_span, p_indices=state_indices,
        p_accepted=ring_span if num_accepted_tokens is None else num_accepted_tokens,
        p_initial=ring_span.view(torch.bool) if has_initial_state is None else has_initial_state,
        p_counters=counters(state.device, batch * num_k_heads) if programs > num_k_heads else None,
        stride_state=state.stride(0), stride_rk_n=ring_k.stride(0), stride_ru_n=ring_u.stride(0),
        stride_rg_n=ring_g.stride(0), stride_span=ring_span.stride(0), stride_indices=state_indices.stride(0),
        has_initial=int(has_initial_state is not None), has_accepted=int(num_accepted_tokens is not None),
        slots=ring_k.shape[1], num_k_heads=num_k_heads, null_index=null_index,
        K=head_k_dim, V=head_v_dim, RATIO=num_v_heads // num_k_heads, BV=block_v,
        num_warps=tile.num_warps, num_stages=1,
    )  # fmt: skip


def variants(platform: Platform, problem: Problem, pool: Tensor | None = None) -> list[KernelVariant]:
    """See BackendOp.variants and `variants_of`."""
    return variants_of(run, fused_forms, platform, problem, pool)


def variants_fold(platform: Platform, problem: Problem, pool: Tensor | None = None) -> list[KernelVariant]:
    return variants_of(run_fold, lambda arguments: [arguments], platform, problem, pool)


REPLAY_DECODE = REPLAY_VERIFY = BackendOp(run=run, variants=variants, compile_count=compile_count, interleaved=True)
REPLAY_FOLD = BackendOp(run=run_fold, variants=variants_fold, compile_count=compile_count)
