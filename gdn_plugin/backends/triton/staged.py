"""fused_decode, fused_verify, replay_decode and replay_verify with the states staged through shared memory (Gluon).

The kernels in the files of those names have their tile of a state in registers from the first load on, so that
registers bound how many bytes of states are under way, and each program repeats the convolution of q and k. Here a
program has the states of all value heads of one key head of one sequence. It asks for the first `buffers` tiles of them
by copies into shared memory that no register waits for (cp.async), works out conv, norms and gates while they come, and
then goes through them tile by tile, asking for the next where one is done with. q and k are convolved once; nothing is
shared between programs, so there are no tickets; and the norm has a head's whole V.

This is Gluon, Triton's own language with layouts said: a Triton program can neither start a copy early and wait late
outside a pipelined loop, nor keep its tile in one layout (both were tried: 391 us for 231 at 256 sequences). Triton's
interpreter does not know it; tests/support/gluon_on_cpu.py does. A launcher asks `staging` and takes its own kernel
where that has none: other GPUs and dims, an older Triton, few heads, value heads that are no power of two, pools whose
rows are not aligned, long rings.

Layouts, NW warps, VEC elements of a state in 16 bytes:
    TILE     [BV, K] of a state: 8 lanes along K, so that a row's sum takes three shuffles and a thread has K/8 of a row
    TOKENS   [L, channels]: a thread has all tokens of its channels, and so may move their history on by itself
    HEADS    [RATIO, V]: a value of a head a thread; of replay, RING adds the ring's slots, all of them in the thread
Bytes and operations are those that the other files state.
"""

# ruff: noqa: RUF005 - Triton has no unpacking of tuples
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
from packaging.version import Version
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from gdn_plugin.backends.triton import gates
from gdn_plugin.backends.triton.configs import FEW_HEADS, Table
from gdn_plugin.backends.triton.launch import counted, device_sm

MANY_HEADS = 1024  # (sequence, value head) pairs from which a call has "many"; FEW_HEADS, from which "some"
MOST_TOKENS = 8  # a sequence; more are not unrolled
MOST_SLOTS = 32  # of a ring, which a thread has in registers

KNOWN = Version(triton.__version__) >= Version("3.6")  # what 3.5 calls Gluon does not compile these kernels
# Renamed between triton 3.6 and 3.9.
copy_to_shared = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
barrier = getattr(gl, "thread_barrier", None) or gl.barrier

# Arithmetic has no layout: what the other kernels compile with is compiled here as well.
log_decay, sigmoid, silu, rms_norm_gated = (
    gluon.jit(function.fn) for function in (gates.log_decay, gates.sigmoid, gates.silu, gates.rms_norm_gated)
)


@dataclass(frozen=True, slots=True)
class Staging:
    """Tiles of `rows` rows of a state, of which `buffers` are under way at a time (at most all), by `num_warps` warps.

    registers: a thread's at most, where the compiler takes more than is good.
    """

    rows: int
    buffers: int
    num_warps: int
    registers: int | None = None


class Stagings(Table[tuple[Staging | None, Staging | None]]):
    """(for some heads, for many), by the state's dtype; None where the other kernel is no slower."""

    def staging(
        self, state: Tensor, num_sequences: int, num_k_heads: int, others: tuple[Tensor, ...] = ()
    ) -> Staging | None:
        """For a call on pool `state` [N, Hv, V, K]; None where the other kernel has to serve.

        others: tensors whose rows are copied beside the state's.
        """
        num_v_heads, V, K = state.shape[1:]
        ratio = num_v_heads // num_k_heads
        heads = num_sequences * num_v_heads
        if not KNOWN or heads < FEW_HEADS or ratio not in (1, 2, 4):
            return None
        if any(x.data_ptr() % 16 or x.stride(0) % 16 for x in (state, *others)):
            return None  # a copy is of 16 bytes; Triton tells alignment by 16 elements
        return self.lookup(device_sm(state.device), K, V, state.dtype)[heads >= MANY_HEADS]


@gluon.jit
def inputs(
    p_x, p_history, o_t, o_x, o_c, length, fresh, stride_x, stride_cs_c, stride_cs_w, W: gl.constexpr,
    ONE: gl.constexpr, i: gl.constexpr,
):  # fmt: skip
    """[L, channels]: what tap i meets at tokens o_t: an input, or one of the history before the first token."""
    if ONE:
        if i == W - 1:
            return gl.load(p_x + o_t * stride_x + o_x).to(gl.float32)
        else:
            return gl.load(
                p_history + o_c * stride_cs_c + (o_t + i) * stride_cs_w, mask=(o_c >= 0) & (fresh == 0), other=0.0
            ).to(gl.float32)
    else:
        o_n = o_t + (i - (W - 1))
        x = gl.load(p_x + o_n * stride_x + o_x, mask=(o_n >= 0) & (o_n < length), other=0.0).to(gl.float32)
        if i == W - 1:
            return x
        else:
            old = gl.load(
                p_history + o_c * stride_cs_c + (o_n + W - 1) * stride_cs_w,
                mask=(o_n < 0) & (o_c >= 0) & (fresh == 0),
                other=0.0,
            )
            return gl.where(o_n < 0, old.to(gl.float32), x)


@gluon.jit
def convolved(
    p_x, p_conv_state, p_history, p_weight, p_bias, o_t, o_x, o_c, length, fresh, stride_x, stride_w_c, stride_w_t,
    stride_cs_c, stride_cs_w, W: gl.constexpr, L: gl.constexpr,
):  # fmt: skip
    """[L, channels]: conv and SiLU of channels o_c at tokens o_t, in the io dtype. Moves their history on.

    A thread has all tokens of its channels, and no other thread has them: what it overwrites it has read. Column c
    becomes what tap 1 meets at token c, and, past the last token, what later taps meet there.
    """
    o_x = o_x[None, :]
    o_n = o_c[None, :]
    taps = ()
    for i in gl.static_range(W):
        taps = taps + (
            inputs(p_x, p_history, o_t, o_x, o_n, length, fresh, stride_x, stride_cs_c, stride_cs_w, W, L == 1, i),
        )
    acc = taps[0] * gl.load(p_weight + o_c * stride_w_c).to(gl.float32)[None, :]
    for i in gl.static_range(1, W):
        acc += taps[i] * gl.load(p_weight + o_c * stride_w_c + i * stride_w_t).to(gl.float32)[None, :]
    if p_bias is not None:
        acc += gl.load(p_bias + o_c).to(gl.float32)[None, :]
    for i in gl.static_range(1, W):
        p_new = p_conv_state + o_n * stride_cs_c + (o_t + i - 1) * stride_cs_w
        wanted = (o_t < length) & (o_n >= 0)
        if i > 1:
            wanted = wanted & (o_t == length - 1)
        gl.store(p_new, taps[i].to(p_new.dtype.element_ty), mask=wanted)
    return silu(acc).to(p_x.dtype.element_ty)


@gluon.jit
def convolved_group(
    p_x, p_conv_state, p_history, p_weight, p_bias, i_hk, length, fresh, stride_x, stride_x_k, stride_x_v, first_k,
    first_v, stride_w_c, stride_w_t, stride_cs_c, stride_cs_w, num_k_heads,
    K: gl.constexpr, V: gl.constexpr, W: gl.constexpr, RATIO: gl.constexpr, L: gl.constexpr, TOKENS: gl.constexpr,
):  # fmt: skip
    """(q beside k [L, 2K], the v of all value heads [L, RATIO * V]) of key head i_hk, convolved."""
    o_t = gl.arange(0, L, layout=gl.SliceLayout(1, TOKENS))[:, None]
    o_c = gl.arange(0, 2 * K, layout=gl.SliceLayout(0, TOKENS))
    o_x = i_hk * stride_x_k + o_c // K * first_k + o_c % K
    b_qk = convolved(
        p_x, p_conv_state, p_history, p_weight, p_bias, o_t, o_x, (o_c // K * num_k_heads + i_hk) * K + o_c % K, length,
        fresh, stride_x, stride_w_c, stride_w_t, stride_cs_c, stride_cs_w, W, L,
    )  # fmt: skip
    o_c = gl.arange(0, RATIO * V, layout=gl.SliceLayout(0, TOKENS))
    o_x = first_v + i_hk * stride_x_v + o_c
    b_v = convolved(
        p_x, p_conv_state, p_history, p_weight, p_bias, o_t, o_x, 2 * num_k_heads * K + i_hk * (RATIO * V) + o_c,
        length, fresh, stride_x, stride_w_c, stride_w_t, stride_cs_c, stride_cs_w, W, L,
    )  # fmt: skip
    return b_qk, b_v


@gluon.jit
def normalised(x, L: gl.constexpr, K: gl.constexpr):
    """[L, 2K], q beside k: each by its norm, rounded."""
    y = gl.reshape(x.to(gl.float32), [L, 2, K])
    y = y * gl.rsqrt(gl.sum(y * y, axis=2) + 1e-6)[:, :, None]
    return gl.convert_layout(gl.reshape(y.to(x.dtype), [L, 2 * K]), x.type.layout)


@gluon.jit
def gated_norm(o, p_z, p_norm_weight, o_r, o_v, stride_z_h, V: gl.constexpr, eps, is_sigmoid):
    """`rms_norm_gated` of o [RATIO, V], z and weight where they lie."""
    z = gl.load(p_z + o_r[:, None] * stride_z_h + o_v[None, :]).to(gl.float32)
    return rms_norm_gated(o, z, gl.load(p_norm_weight + o_v).to(gl.float32), V, eps, is_sigmoid)


@gluon.jit
def plus(a, b):
    return a + b


@counted
@gluon.jit(
    do_not_specialize=["stride_w_c", "stride_w_t", "stride_cs_n", "stride_cs_c", "stride_cs_w", "stride_a_t",
                       "stride_a_k", "stride_a_h", "stride_b_t", "stride_b_k", "stride_b_h", "stride_indices",
                       "stride_start", "has_start", "has_initial", "num_sequences", "num_tokens", "num_slots",
                       "num_k_heads", "null_index", "is_sigmoid", "zero_padding"],
    do_not_specialize_on_alignment=["p_a", "p_b", "p_A_log", "p_dt_bias", "p_indices", "p_accepted", "p_start",
                                    "p_cu_seqlens", "p_initial", "p_weight", "p_bias", "p_conv_state"],
)  # fmt: skip
def staged_step_kernel(
    p_x, p_weight, p_bias, p_conv_state, p_a, p_b, p_A_log, p_dt_bias, p_state, p_indices, p_accepted, p_start,
    p_cu_seqlens, p_initial, p_z, p_norm_weight, p_out,
    stride_x, stride_x_k, stride_x_v, first_k, first_v, stride_w_c, stride_w_t, stride_cs_n, stride_cs_c, stride_cs_w,
    stride_a_t, stride_a_k, stride_a_h, stride_b_t, stride_b_k, stride_b_h, stride_state, stride_indices, stride_start,
    stride_z_t, stride_z_k, stride_z_h, stride_out_t, stride_out_h,
    has_start, has_initial, scale, eps, num_sequences, num_tokens, num_slots, num_k_heads, null_index, is_sigmoid,
    zero_padding,
    K: gl.constexpr, V: gl.constexpr, W: gl.constexpr, RATIO: gl.constexpr, BV: gl.constexpr, NBUF: gl.constexpr,
    L: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    VERIFY: gl.constexpr = p_cu_seqlens is not None
    NORM: gl.constexpr = p_z is not None
    IO: gl.constexpr = p_x.dtype.element_ty
    STATE: gl.constexpr = p_state.dtype.element_ty
    VEC: gl.constexpr = 128 // STATE.primitive_bitwidth
    STEPS: gl.constexpr = RATIO * V // BV
    BY_HEAD: gl.constexpr = V // BV
    HEAD_WARPS: gl.constexpr = min(RATIO, num_warps)
    TILE: gl.constexpr = gl.BlockedLayout([1, VEC], [4, 8], [num_warps, 1], [1, 0])
    TOKENS: gl.constexpr = gl.BlockedLayout([L, 1], [1, 32], [1, num_warps], [1, 0])
    HEADS: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [HEAD_WARPS, num_warps // HEAD_WARPS], [1, 0])
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(VEC, 1, 8, [1, 0])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    BY_K: gl.constexpr = gl.SliceLayout(0, TILE)
    BY_V: gl.constexpr = gl.SliceLayout(1, TILE)

    i_p = gl.program_id(0)
    i_hk = i_p % num_k_heads
    i_b = (i_p // num_k_heads).to(gl.int64)
    fresh = i_p < 0
    if VERIFY:
        start = gl.load(p_cu_seqlens + i_b).to(gl.int64)
        end = num_tokens.to(gl.int64)
        row = null_index.to(gl.int64)
        first_row = row
        first_column = row
        if i_b < num_sequences:
            end = gl.load(p_cu_seqlens + i_b + 1).to(gl.int64)
            if start < end:
                first_row = gl.load(p_indices + i_b * stride_indices).to(gl.int64)
                fresh = (has_initial != 0) & (gl.load(p_initial + i_b).to(gl.int32) == 0)
                first_column = gl.maximum(gl.load(p_accepted + i_b).to(gl.int64) - 1, 0)
                own = fresh | (first_row <= null_index)
                i_start = gl.where(own | (has_start != 0), 0, first_column)
                row = gl.where(own, first_row, gl.load(p_start + i_b * stride_start + i_start).to(gl.int64))
        length = (end - start).to(gl.int32)
        first_column = gl.where(fresh, 0, first_column)
    else:
        start = i_b
        length = 1
        row = gl.load(p_indices + i_b * stride_indices).to(gl.int64)
        first_row = row
        first_column = 0
    p_out += start * stride_out_t + i_hk * RATIO * stride_out_h
    o_r = gl.arange(0, RATIO, layout=gl.SliceLayout(1, HEADS))
    o_f = gl.arange(0, V, layout=gl.SliceLayout(0, HEADS))
    o_out = o_r[:, None] * stride_out_h + o_f[None, :]
    if row <= null_index:
        if zero_padding != 0:
            for i_t in range(length):
                gl.store(p_out + i_t * stride_out_t + o_out, gl.zeros([RATIO, V], p_out.dtype.element_ty, HEADS))
        return

    # the states, tile by tile, on their way
    o_v = gl.arange(0, BV, layout=BY_V)
    o_k = gl.arange(0, K, layout=BY_K)
    o_s = o_v[:, None] * K + o_k[None, :]
    s_state = gl.allocate_shared_memory(STATE, [NBUF, BV, K], SHARED)
    p_state += i_hk * (RATIO * V * K) + o_s
    p_s = p_state + row * stride_state
    for i in gl.static_range(NBUF):
        copy_to_shared(s_state.index(i), p_s + i * (BV * K))
        async_copy.commit_group()

    p_x += start * stride_x
    p_conv_state += first_row * stride_cs_n
    p_history = p_conv_state + first_column * stride_cs_w
    b_qk, b_v = convolved_group(
        p_x, p_conv_state, p_history, p_weight, p_bias, i_hk, length, fresh, stride_x, stride_x_k, stride_x_v, first_k,
        first_v, stride_w_c, stride_w_t, stride_cs_c, stride_cs_w, num_k_heads, K, V, W, RATIO, L, TOKENS,
    )  # fmt: skip
    s_qk = gl.allocate_shared_memory(IO, [L, 2 * K], PLAIN)
    s_qk.store(normalised(b_qk, L, K))
    s_v = gl.allocate_shared_memory(IO, [L * RATIO, V], PLAIN)
    s_v.reshape([L, RATIO * V]).store(b_v)
    s_o = gl.allocate_shared_memory(IO, [L * RATIO, V], PLAIN)

    p_a += start * stride_a_t + i_hk * stride_a_k
    p_b += start * stride_b_t + i_hk * stride_b_k
    decay = ()
    beta = ()
    target = ()
    for t in gl.static_range(L):
        i_t = gl.minimum(t, length - 1)
        for r in gl.static_range(RATIO):
            A_log = gl.load(p_A_log + i_hk * RATIO + r).to(gl.float32)
            dt_bias = gl.load(p_dt_bias + i_hk * RATIO + r).to(gl.float32)
            decay = decay + (
                gl.exp(log_decay(gl.load(p_a + i_t * stride_a_t + r * stride_a_h).to(gl.float32), A_log, dt_bias)),
            )
            beta = beta + (sigmoid(gl.load(p_b + i_t * stride_b_t + r * stride_b_h).to(gl.float32)),)
        if VERIFY:
            target = target + (gl.load(p_indices + i_b * stride_indices + gl.minimum(t, num_slots - 1)).to(gl.int64),)
        else:
            target = target + (row,)

    for i in gl.static_range(STEPS):
        # committed behind tile i: the other first ones and what was asked for since
        if i < NBUF:
            async_copy.wait_group(NBUF - 1 - i + min(i, STEPS - NBUF))
        else:
            async_copy.wait_group(min(i, STEPS - NBUF) - (i - NBUF) - 1)
        barrier()
        b_s = s_state.index(i % NBUF).load(TILE).to(gl.float32)
        if i + NBUF < STEPS:
            barrier()  # everyone has this one
            copy_to_shared(s_state.index(i % NBUF), p_s + (i + NBUF) * (BV * K))
            async_copy.commit_group()
        if VERIFY:
            b_s = gl.where(fresh, 0.0, b_s)
        for t in gl.static_range(L):
            if t < length:
                q = s_qk.slice(t, 1).slice(0, K, dim=1).load(TILE).to(gl.float32)
                k = s_qk.slice(t, 1).slice(K, K, dim=1).load(TILE).to(gl.float32)
                v = (
                    s_v.slice(t * RATIO + i // BY_HEAD, 1)
                    .slice(i % BY_HEAD * BV, BV, dim=1)
                    .permute([1, 0])
                    .load(TILE)
                    .to(gl.float32)
                )
                d = decay[t * RATIO + i // BY_HEAD]
                delta = beta[t * RATIO + i // BY_HEAD] * (v - d * gl.sum(b_s * k, axis=1)[:, None])
                o = scale * (d * gl.sum(b_s * q, axis=1)[:, None] + delta * gl.sum(k * q, axis=1)[:, None])
                b_s = d * b_s + delta * k
                if VERIFY:
                    if (target[t] > null_index) & (t < num_slots):
                        gl.store(p_state + target[t] * stride_state + i * (BV * K), b_s.to(STATE))
                else:
                    gl.store(p_s + i * (BV * K), b_s.to(STATE))
                s_o.slice(t * RATIO + i // BY_HEAD, 1).slice(i % BY_HEAD * BV, BV, dim=1).permute([1, 0]).store(
                    o.to(IO)
                )

    barrier()
    if NORM:
        p_z += start * stride_z_t + i_hk * stride_z_k
    for t in gl.static_range(L):
        if t < length:
            b_o = s_o.slice(t * RATIO, RATIO).load(HEADS).to(gl.float32)
            if NORM:
                b_o = gated_norm(
                    b_o, p_z + t * stride_z_t, p_norm_weight, o_r, o_f, stride_z_h, V, eps, is_sigmoid
                )  # fmt: skip
            gl.store(p_out + t * stride_out_t + o_out, b_o.to(p_out.dtype.element_ty))


@counted
@gluon.jit(
    do_not_specialize=["stride_w_c", "stride_w_t", "stride_cs_n", "stride_cs_c", "stride_cs_w", "stride_a_t",
                       "stride_a_k", "stride_a_h", "stride_b_t", "stride_b_k", "stride_b_h", "stride_rg_n",
                       "stride_span", "stride_indices", "has_initial", "num_sequences", "num_tokens", "slots", "most",
                       "num_k_heads", "null_index", "is_sigmoid", "zero_padding"],
    do_not_specialize_on_alignment=["p_a", "p_b", "p_A_log", "p_dt_bias", "p_ring_g", "p_span", "p_indices",
                                    "p_accepted", "p_cu_seqlens", "p_initial", "p_weight", "p_bias", "p_conv_state"],
)  # fmt: skip
def staged_replay_kernel(
    p_x, p_weight, p_bias, p_conv_state, p_a, p_b, p_A_log, p_dt_bias, p_state, p_ring_k, p_ring_u, p_ring_g, p_span,
    p_indices, p_accepted, p_cu_seqlens, p_initial, p_z, p_norm_weight, p_out,
    stride_x, stride_x_k, stride_x_v, first_k, first_v, stride_w_c, stride_w_t, stride_cs_n, stride_cs_c, stride_cs_w,
    stride_a_t, stride_a_k, stride_a_h, stride_b_t, stride_b_k, stride_b_h, stride_state, stride_rk_n, stride_ru_n,
    stride_rg_n, stride_span, stride_indices, stride_z_t, stride_z_k, stride_z_h, stride_out_t, stride_out_h,
    has_initial, scale, eps, num_sequences, num_tokens, slots, most, num_k_heads, null_index, is_sigmoid, zero_padding,
    K: gl.constexpr, V: gl.constexpr, W: gl.constexpr, RATIO: gl.constexpr, BV: gl.constexpr, NBUF: gl.constexpr,
    RB: gl.constexpr, L: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    VERIFY: gl.constexpr = p_cu_seqlens is not None
    NORM: gl.constexpr = p_z is not None
    IO: gl.constexpr = p_x.dtype.element_ty
    STATE: gl.constexpr = p_state.dtype.element_ty
    UPDATE: gl.constexpr = p_ring_u.dtype.element_ty
    VEC: gl.constexpr = 128 // STATE.primitive_bitwidth
    VEC_K: gl.constexpr = 128 // p_ring_k.dtype.element_ty.primitive_bitwidth
    VEC_U: gl.constexpr = 128 // UPDATE.primitive_bitwidth
    STEPS: gl.constexpr = RATIO * V // BV
    BY_HEAD: gl.constexpr = V // BV
    HEAD_WARPS: gl.constexpr = min(RATIO, num_warps)
    TILE: gl.constexpr = gl.BlockedLayout([1, VEC], [4, 8], [num_warps, 1], [1, 0])
    KEYS: gl.constexpr = gl.BlockedLayout([1, VEC_K], [2, 16], [num_warps, 1], [1, 0])
    UPDATES: gl.constexpr = gl.BlockedLayout([1, VEC_U], [1, 32], [num_warps, 1], [1, 0])
    TOKENS: gl.constexpr = gl.BlockedLayout([L, 1], [1, 32], [1, num_warps], [1, 0])
    RING: gl.constexpr = gl.BlockedLayout([RB, 1, 1], [1, 1, 32], [1, HEAD_WARPS, num_warps // HEAD_WARPS], [2, 1, 0])
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(VEC, 1, 8, [1, 0])
    SHARED_K: gl.constexpr = gl.SwizzledSharedLayout(VEC_K, 1, 8, [1, 0])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    BY_K: gl.constexpr = gl.SliceLayout(0, TILE)
    BY_V: gl.constexpr = gl.SliceLayout(1, TILE)
    HEADS: gl.constexpr = gl.SliceLayout(0, RING)  # [RATIO, V]
    WEIGHTS: gl.constexpr = gl.SliceLayout(2, RING)  # [RB, RATIO]

    i_p = gl.program_id(0)
    i_hk = i_p % num_k_heads
    i_b = (i_p // num_k_heads).to(gl.int64)
    num_v_heads = num_k_heads * RATIO

    fresh = i_p < 0
    accepted = i_p * 0 + 1
    if VERIFY:
        start = gl.load(p_cu_seqlens + i_b).to(gl.int64)
        end = num_tokens.to(gl.int64)
        row = null_index.to(gl.int64)
        if i_b < num_sequences:
            end = gl.load(p_cu_seqlens + i_b + 1).to(gl.int64)
            if start < end:
                row = gl.load(p_indices + i_b * stride_indices).to(gl.int64)
                fresh = (has_initial != 0) & (gl.load(p_initial + i_b * has_initial).to(gl.int32) == 0)
                accepted = gl.maximum(gl.load(p_accepted + i_b).to(gl.int32), 1)
        length = (end - start).to(gl.int32)
    else:
        start = i_b
        length = 1
        row = gl.load(p_indices + i_b * stride_indices).to(gl.int64)
    p_out += start * stride_out_t + i_hk * RATIO * stride_out_h
    o_r = gl.arange(0, RATIO, layout=gl.SliceLayout(1, HEADS))
    o_f = gl.arange(0, V, layout=gl.SliceLayout(0, HEADS))
    o_out = o_r[:, None] * stride_out_h + o_f[None, :]
    if row <= null_index:
        if zero_padding != 0:
            for i_t in range(length):
                gl.store(p_out + i_t * stride_out_t + o_out, gl.zeros([RATIO, V], p_out.dtype.element_ty, HEADS))
        return

    # the anchors, tile by tile, on their way
    o_v = gl.arange(0, BV, layout=BY_V)
    o_k = gl.arange(0, K, layout=BY_K)
    o_s = o_v[:, None] * K + o_k[None, :]
    s_state = gl.allocate_shared_memory(STATE, [NBUF, BV, K], SHARED)
    p_s = p_state + row * stride_state + i_hk * (RATIO * V * K) + o_s
    for i in gl.static_range(NBUF):
        copy_to_shared(s_state.index(i), p_s + i * (BV * K))
        async_copy.commit_group()

    p_span += row * stride_span + i_hk * 2
    first = gl.load(p_span)
    held = gl.load(p_span + 1) + accepted - 1
    accepted = gl.where(fresh, 1, accepted)
    first = gl.where(fresh, 0, first)
    held = gl.where(fresh, 0, held)
    p_ring_k += row * stride_rk_n + i_hk * K
    p_ring_u += row * stride_ru_n + i_hk * (RATIO * V)
    p_ring_g += row * stride_rg_n + i_hk * RATIO
    s_rk = gl.allocate_shared_memory(p_ring_k.dtype.element_ty, [RB, K], SHARED_K)
    s_ru = gl.allocate_shared_memory(UPDATE, [RB, RATIO * V], PLAIN)
    o_j = gl.arange(0, RB, layout=gl.SliceLayout(1, KEYS))
    o_n = gl.arange(0, K, layout=gl.SliceLayout(0, KEYS))
    slot = first + o_j
    slot = gl.where(slot >= slots, slot - slots, slot)
    # What a mask leaves out is zeros there.
    copy_to_shared(
        s_rk, p_ring_k + slot[:, None] * (num_k_heads * K) + o_n[None, :],
        mask=(o_j < held)[:, None] & (o_n >= 0)[None, :],
    )  # fmt: skip
    o_j = gl.arange(0, RB, layout=gl.SliceLayout(1, UPDATES))
    o_n = gl.arange(0, RATIO * V, layout=gl.SliceLayout(0, UPDATES))
    slot = first + o_j
    slot = gl.where(slot >= slots, slot - slots, slot)
    copy_to_shared(
        s_ru, p_ring_u + slot[:, None] * (num_v_heads * V) + o_n[None, :],
        mask=(o_j < held)[:, None] & (o_n >= 0)[None, :],
    )  # fmt: skip
    async_copy.commit_group()
    SCAN: gl.constexpr = gl.BlockedLayout([1, 1], [min(RB, 32), 32 // min(RB, 32)], [1, num_warps], [0, 1])
    o_j = gl.arange(0, RB, layout=gl.SliceLayout(1, SCAN))[:, None]
    o_wr = gl.arange(0, RATIO, layout=gl.SliceLayout(0, SCAN))[None, :]
    slot = first + o_j + 1
    slot = gl.where(slot >= slots, slot - slots, slot)
    b_rg = gl.load(
        p_ring_g + slot * num_v_heads + o_wr, mask=(o_j + 1 < held) & (o_wr >= 0), other=0.0
    )  # of the update behind
    oldest = gl.load(p_ring_g + first * num_v_heads + gl.arange(0, RATIO, layout=gl.SliceLayout(0, WEIGHTS)))

    p_x += start * stride_x
    p_conv_state += row * stride_cs_n
    p_history = p_conv_state + (accepted - 1) * stride_cs_w
    b_qk, b_v = convolved_group(
        p_x, p_conv_state, p_history, p_weight, p_bias, i_hk, length, fresh, stride_x, stride_x_k, stride_x_v, first_k,
        first_v, stride_w_c, stride_w_t, stride_cs_c, stride_cs_w, num_k_heads, K, V, W, RATIO, L, TOKENS,
    )  # fmt: skip
    s_qk = gl.allocate_shared_memory(IO, [L, 2 * K], PLAIN)
    s_qk.store(normalised(b_qk, L, K))
    s_v = gl.allocate_shared_memory(IO, [L * RATIO, V], PLAIN)
    s_v.reshape([L, RATIO * V]).store(b_v)
    s_p = gl.allocate_shared_memory(gl.float32, [2 * L * RATIO, V], PLAIN)  # S_0 k and S_0 q of each token

    # g [RATIO] of each token, in the layout of the weights
    p_a += start * stride_a_t + i_hk * stride_a_k
    p_b += start * stride_b_t + i_hk * stride_b_k
    o_h = gl.arange(0, RATIO, layout=gl.SliceLayout(0, WEIGHTS))
    A_log = gl.load(p_A_log + i_hk * RATIO + o_h).to(gl.float32)
    dt_bias = gl.load(p_dt_bias + i_hk * RATIO + o_h).to(gl.float32)
    g = ()
    beta = ()
    for t in gl.static_range(L):
        i_t = gl.minimum(t, length - 1)
        g = g + (log_decay(gl.load(p_a + i_t * stride_a_t + o_h * stride_a_h).to(gl.float32), A_log, dt_bias),)
        beta = beta + (sigmoid(gl.load(p_b + i_t * stride_b_t + o_h * stride_b_h).to(gl.float32)),)

    folds = fresh | (held + 2 * most > slots)
    behind = gl.convert_layout(gl.associative_scan(b_rg, 0, plus, reverse=True), WEIGHTS)
    left = gl.convert_layout(gl.sum(b_rg, axis=0), gl.SliceLayout(0, WEIGHTS)) + gl.where(held > 0, oldest, 0.0)
    new_first = first
    new_held = held
    if folds:
        behind = behind + float("-inf")
        left = gl.zeros_like(left)
        new_first = first + held
        new_first = gl.where(new_first >= slots, new_first - slots, new_first)
        new_held = held * 0

    # every thread has read the span
    barrier()
    gl.store(p_span, new_first)
    gl.store(p_span + 1, new_held + 1)

    # the products with the anchors
    for i in gl.static_range(STEPS):
        # committed behind tile i: the other first ones, the ring, and what was asked for since
        if i < NBUF:
            async_copy.wait_group(NBUF - i + min(i, STEPS - NBUF))
        else:
            async_copy.wait_group(min(i, STEPS - NBUF) - (i - NBUF) - 1)
        barrier()
        b_s = s_state.index(i % NBUF).load(TILE).to(gl.float32)
        if folds:
            b_s = gl.where(fresh, 0.0, b_s)
            for j in range(held):
                slot_j = first + j
                slot_j = gl.where(slot_j >= slots, slot_j - slots, slot_j)
                k_j = gl.load(p_ring_k + slot_j * (num_k_heads * K) + o_k).to(gl.float32)
                u_j = gl.load(p_ring_u + slot_j * (num_v_heads * V) + i * BV + o_v).to(gl.float32)
                b_s = (
                    gl.exp(gl.load(p_ring_g + slot_j * num_v_heads + i // BY_HEAD)) * b_s + u_j[:, None] * k_j[None, :]
                )
            gl.store(p_s + i * (BV * K), b_s.to(STATE))
        for t in gl.static_range(L):
            q = s_qk.slice(t, 1).slice(0, K, dim=1).load(TILE).to(gl.float32)
            k = s_qk.slice(t, 1).slice(K, K, dim=1).load(TILE).to(gl.float32)
            s_p.slice(2 * t * RATIO + i // BY_HEAD, 1).slice(i % BY_HEAD * BV, BV, dim=1).permute([1, 0]).store(
                gl.sum(b_s * k, axis=1)[:, None]
            )
            s_p.slice((2 * t + 1) * RATIO + i // BY_HEAD, 1).slice(i % BY_HEAD * BV, BV, dim=1).permute([1, 0]).store(
                gl.sum(b_s * q, axis=1)[:, None]
            )
        if i + NBUF < STEPS:
            barrier()
            copy_to_shared(s_state.index(i % NBUF), p_s + (i + NBUF) * (BV * K))
            async_copy.commit_group()

    async_copy.wait_group(0)
    barrier()
    # the updates, those of the step among them, one token after the other
    o_jt = gl.arange(0, RB, layout=BY_V)
    b_rk = s_rk.load(TILE).to(gl.float32)
    o_jr = gl.arange(0, RB, layout=gl.SliceLayout(1, gl.SliceLayout(2, RING)))
    b_ru = s_ru.reshape([RB, RATIO, V]).load(RING).to(gl.float32)
    b_ru += b_ru * 0.0  # an infinite update makes products of S_n NaN: its k has both signs
    o_u = o_r[:, None] * V + o_f[None, :]
    if NORM:
        p_z += start * stride_z_t + i_hk * stride_z_k
    for t in gl.static_range(L):
        if t < length:
            q_t = s_qk.slice(t, 1).slice(0, K, dim=1).load(TILE).to(gl.float32)
            k_t = s_qk.slice(t, 1).slice(K, K, dim=1).load(TILE).to(gl.float32)
            b_rk_t = b_rk
            b_rk = gl.where((o_jt == new_held + t)[:, None], k_t, b_rk)
            dot_k = gl.convert_layout(gl.sum(b_rk_t * k_t, axis=1), gl.SliceLayout(1, WEIGHTS))
            dot_q = gl.convert_layout(gl.sum(b_rk * q_t, axis=1), gl.SliceLayout(1, WEIGHTS))
            behind += g[t][None, :]
            left += g[t]
            b_w = gl.exp(behind)
            mine = o_jr == new_held + t
            with_k = b_w * dot_k[:, None]
            behind = gl.where(mine[:, None], 0.0, behind)
            with_q = gl.where(mine[:, None], 1.0, b_w) * dot_q[:, None]
            decay = gl.convert_layout(gl.exp(left), gl.SliceLayout(1, HEADS))[:, None]
            beta_t = gl.convert_layout(beta[t], gl.SliceLayout(1, HEADS))[:, None]
            v_t = s_v.slice(t * RATIO, RATIO).load(HEADS).to(gl.float32)
            p_k = s_p.slice(2 * t * RATIO, RATIO).load(HEADS)
            p_q = s_p.slice((2 * t + 1) * RATIO, RATIO).load(HEADS)
            u_t = beta_t * (v_t - decay * p_k - gl.sum(with_k[:, :, None] * b_ru, axis=0))
            b_ru = gl.where(mine[:, None, None], u_t[None, :, :], b_ru)
            o_new = scale * (decay * p_q + gl.sum(with_q[:, :, None] * b_ru, axis=0))
            slot_t = new_first + new_held + t
            slot_t = gl.where(slot_t >= slots, slot_t - slots, slot_t)
            gl.store(p_ring_u + slot_t * (num_v_heads * V) + o_u, u_t.to(UPDATE))
            gl.store(p_ring_g + slot_t * num_v_heads + o_h, g[t])
            p_new = p_ring_k + slot_t * (num_k_heads * K) + o_k[None, :] + gl.arange(0, 1, layout=BY_V)[:, None]
            gl.store(p_new, k_t.to(p_ring_k.dtype.element_ty))
            if NORM:
                o_new = gated_norm(
                    o_new.to(IO).to(gl.float32), p_z + t * stride_z_t, p_norm_weight, o_r, o_f, stride_z_h, V, eps,
                    is_sigmoid,
                )  # fmt: skip
            gl.store(p_out + t * stride_out_t + o_out, o_new.to(p_out.dtype.element_ty))


def step_options(staging: Staging, ratio: int, V: int, tokens: int) -> dict[str, Any]:
    """What a launch of either kernel adds: tiles, for sequences of at most `tokens` tokens, and Triton's options."""
    steps = ratio * V // staging.rows
    options: dict[str, Any] = {"maxnreg": staging.registers} if staging.registers else {}
    return options | {
        "BV": staging.rows, "NBUF": min(staging.buffers, steps), "L": triton.next_power_of_2(tokens),
        # A channel must not be two threads': see `convolved`.
        "num_warps": min(staging.num_warps, ratio * V // 32),
    }  # fmt: skip
