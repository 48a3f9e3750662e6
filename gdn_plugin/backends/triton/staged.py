"""fused_decode, fused_verify, replay_decode and replay_verify with the states staged through shared memory (Gluon).

The kernels in the files of those names have their tile of a state in registers from the first load on, so that
registers bound how many bytes of states are under way, and each program repeats the convolution of q and k. Here a
program has the states of all value heads of one key head of one sequence. It asks for the first `buffers` tiles of them
by copies into shared memory that no register waits for (cp.async), works out conv, norms and gates while they come, and
then goes through them tile by tile, asking for the next where one is done with. q and k are convolved once; nothing is
shared between programs, so there are no tickets; and the norm has a head's whole V.

One kernel serves all four. What the tokens of a step need of the state S_0 that their sequence starts from are its
products with their k and q, and those are one matrix product a tile. Tensor cores take it exactly where the state is of
the io dtype, and where it is fp32 and tokens are bf16, as three parts that hold its bits. So a ring folds as well. The
rest goes on vectors (l_t: the sum of g up to token t; updates of a ring come before s):

    S_t k_t = exp(l_t) S_0 k_t + sum_{s<t} exp(l_t - l_s) (k_s . k_t) u_s;    u_t = beta_t (v_t - S_t k_t)

Without a ring the states follow from u, S_t = exp(g_t) S_{t-1} + u_t k_t^T, in a second pass over shared memory.

What bounds it is waiting (ncu on an H100, 256 sequences): with the states of four programs a multiprocessor under way,
a load behind them waits 5 us and more. So all that goes to registers, the gated norm's z too, is asked for before the
program's own states, in one batch: 123 us of replay_decode for 140 with the same loads where they are used.

This is Gluon, Triton's own language with layouts said: a Triton program can neither start a copy early and wait late
outside a pipelined loop, nor keep its tile in one layout (both were tried: 391 us for 231 at 256 sequences). Triton's
interpreter does not know it; tests/support/gluon_on_cpu.py does. A launcher asks `staging` and takes its own kernel
where that has none: other GPUs and dims, an older Triton, few heads, value heads that are no power of two, pools whose
rows are not aligned, long rings, many drafts.

Layouts, NW warps, VEC elements of a state in 16 bytes:
    TILE     [BV, K] of a state: 8 lanes along K, so that a row's sum takes three shuffles and a thread has K/8 of a row
    TOKENS   [L, channels]: a thread has all tokens of its channels, and so may move their history on by itself
    VECTORS  [R, V] of a head: a thread has all slots of a ring for its values
    ROWS     [L * RATIO, V] of outputs: a warp has a row, so that the norm's sum takes no barrier
Bytes and operations are those that the other files state.
"""

# ruff: noqa: RUF005 - Triton has no unpacking of tuples
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import triton
from packaging.version import Version
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from gdn_plugin.backends.triton import gates
from gdn_plugin.backends.triton.configs import FEW_HEADS, Key, Table
from gdn_plugin.backends.triton.launch import counted, device_sm

MANY_HEADS = 1024  # (sequence, value head) pairs from which a call has "many"
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
    """Tiles of `rows` rows of a state, of which `buffers` are under way at a time (at most all); warps a program.

    tokens: the most that a sequence may have; beyond it the other kernel serves.
    registers: that a thread is held to.
    """

    rows: int
    buffers: int
    num_warps: int
    tokens: int = MOST_TOKENS
    registers: int | None = None


Row = tuple[Staging | None, Staging | None, Staging | None]


class Stagings(Table[Row]):
    """(for few heads, for some, for many), by the state's dtype; None where the other kernel is no slower.

    some: (sequence, value head) pairs from which a call has "some"; at most FEW_HEADS, for which kernels are compiled
        ahead.
    """

    def __init__(self, rows: Mapping[Key, Row], some: int = FEW_HEADS) -> None:
        super().__init__(rows)
        assert some <= FEW_HEADS
        self.some = some

    def staging(
        self, state: Tensor, num_sequences: int, num_k_heads: int, tokens: int = 1, others: tuple[Tensor, ...] = ()
    ) -> Staging | None:
        """For a call on pool `state` [N, Hv, V, K]; None where the other kernel has to serve.

        tokens: that a sequence may have.
        others: tensors whose rows are copied beside the state's.
        """
        num_v_heads, V, K = state.shape[1:]
        ratio = num_v_heads // num_k_heads
        heads = num_sequences * num_v_heads
        if not KNOWN or ratio not in (1, 2, 4):
            return None
        if any(x.data_ptr() % 16 or x.stride(0) % 16 for x in (state, *others)):
            return None  # a copy is of 16 bytes; Triton tells alignment by 16 elements
        row = self.lookup(device_sm(state.device), K, V, state.dtype)
        found = row[(heads >= self.some) + (heads >= MANY_HEADS)]
        if found is None or tokens > found.tokens:
            return None
        if tokens > 4 and ratio == 2 and heads >= FEW_HEADS and state.element_size() == 2:
            # Else a thread has 176 to 205, and a multiprocessor one program where its shared memory holds two.
            # It holds one of four heads without a ring, and of fp32 states beside the rings that hosts have then.
            return replace(found, registers=128)
        return found


@gluon.jit
def conv_inputs(
    p_x, p_history, p_weight, p_bias, o_t, o_x, o_c, length, fresh, stride_x, stride_w_c, stride_w_t, stride_cs_c,
    stride_cs_w, W: gl.constexpr, L: gl.constexpr,
):  # fmt: skip
    """What each tap of channels o_c meets at tokens o_t [L, channels], the taps' weights [channels], the bias if any.

    A tap meets an input, or one of the history before the first token.
    """
    o_x = o_x[None, :]
    o_n = o_c[None, :]
    loaded = ()
    for i in gl.static_range(W):
        o_i = o_t + (i - (W - 1))
        if i == W - 1:
            x = gl.load(p_x + o_i * stride_x + o_x, mask=(o_i < length) & (o_n >= 0), other=0.0).to(gl.float32)
        else:
            old = gl.load(
                p_history + o_n * stride_cs_c + (o_i + W - 1) * stride_cs_w,
                mask=(o_i < 0) & (o_n >= 0) & (fresh == 0),
                other=0.0,
            ).to(gl.float32)
            if L == 1:
                x = old
            else:
                x = gl.load(p_x + o_i * stride_x + o_x, mask=(o_i >= 0) & (o_i < length), other=0.0).to(gl.float32)
                x = gl.where(o_i < 0, old, x)
        loaded = loaded + (x,)
    for i in gl.static_range(W):
        loaded = loaded + (gl.load(p_weight + o_c * stride_w_c + i * stride_w_t).to(gl.float32),)
    if p_bias is not None:
        loaded = loaded + (gl.load(p_bias + o_c).to(gl.float32),)
    return loaded


@gluon.jit
def convolved(
    loaded, p_conv_state, p_bias, o_t, o_c, length, stride_cs_c, stride_cs_w, W: gl.constexpr, IO: gl.constexpr,
):  # fmt: skip
    """[L, channels]: conv and SiLU of `conv_inputs`, in the io dtype. Moves the history of channels o_c on.

    A thread has all tokens of its channels, and no other thread has them: what it overwrites it has read. Column c
    becomes what tap 1 meets at token c, and, past the last token, what later taps meet there.
    """
    acc = loaded[0] * loaded[W][None, :]
    for i in gl.static_range(1, W):
        acc += loaded[i] * loaded[W + i][None, :]
    if p_bias is not None:
        acc += loaded[2 * W][None, :]
    for i in gl.static_range(1, W):
        p_new = p_conv_state + o_c[None, :] * stride_cs_c + (o_t + i - 1) * stride_cs_w
        wanted = (o_t < length) & (o_c >= 0)[None, :]
        if i > 1:
            wanted = wanted & (o_t == length - 1)
        gl.store(p_new, loaded[i].to(p_new.dtype.element_ty), mask=wanted)
    return silu(acc).to(IO)


@gluon.jit
def normalised(x, L: gl.constexpr, K: gl.constexpr):
    """[L, 2K], q beside k, -> [2L, K]: each by its norm, rounded; rows 2t and 2t+1 are q and k of token t."""
    y = gl.reshape(x.to(gl.float32), [L, 2, K])
    y = y * gl.rsqrt(gl.sum(y * y, axis=2) + 1e-6)[:, :, None]
    return gl.reshape(y.to(x.dtype), [2 * L, K])


@gluon.jit
def wrapped(slot, slots):
    """A slot counted past the end of the ring goes on at its beginning."""
    return gl.where(slot >= slots, slot - slots, slot)


@gluon.jit
def plus(a, b):
    return a + b


@gluon.jit
def columns(x, M: gl.constexpr, N: gl.constexpr, LEVELS: gl.constexpr):
    """x [M, N], N = 2^LEVELS, a thread with whole rows -> its N columns [M]: moves nothing."""
    parts = (x,)
    for i in gl.static_range(LEVELS):
        low = ()
        high = ()
        for j in gl.static_range(2**i):
            if i + 1 == LEVELS:
                even, odd = gl.split(parts[j])
            else:
                even, odd = gl.split(gl.reshape(parts[j], [M, N // 2 ** (i + 1), 2]))
            low = low + (even,)
            high = high + (odd,)
        parts = low + high
    return parts


@gluon.jit
def ring_decays(x_rg, x_oldest, o_j):
    """(sums of g behind each update [RB, RATIO], those of the whole ring [1, RATIO]); x_rg: g of the update behind."""
    behind = gl.associative_scan(x_rg, 0, plus, reverse=True)
    total = gl.sum(x_rg, axis=0)[None, :] + gl.where(o_j == 0, x_oldest, 0.0)
    return behind, gl.sum(gl.where(o_j == 0, total, 0.0), axis=0)[None, :]


@gluon.jit
def part_of(x, dtype: gl.constexpr):
    """(x rounded to `dtype`, what that leaves of it); nothing of an infinite x."""
    part = x.to(dtype)
    rest = x - part.to(gl.float32)
    return part, gl.where(rest == rest, rest, 0.0)


@gluon.jit
def matrix_products(
    s_tile, s_tokens, BV: gl.constexpr, K: gl.constexpr, N: gl.constexpr, PARTS: gl.constexpr, num_warps: gl.constexpr
):
    """[BV, N] = tile [BV, K] times tokens [N, K] transposed on tensor cores, the tile as PARTS of the io dtype."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [num_warps, 1], [16, 8])
    WIDTH: gl.constexpr = K // 2  # of registers
    acc = gl.zeros([BV, N], gl.float32, MMA)
    for h in gl.static_range(2):
        b_tokens = s_tokens.slice(0, N).slice(h * WIDTH, WIDTH, dim=1).permute([1, 0])
        b_tokens = b_tokens.load(gl.DotOperandLayout(1, MMA, 2))
        rest = s_tile.slice(h * WIDTH, WIDTH, dim=1).load(gl.DotOperandLayout(0, MMA, 2))
        if PARTS == 1:
            acc = mma_v2(rest, b_tokens, acc)
        else:
            for _ in gl.static_range(PARTS):
                part, rest = part_of(rest, b_tokens.dtype)
                acc = mma_v2(part, b_tokens, acc)
    return acc


@gluon.jit
def fold_by_matrix(
    s_tile, s_rk, s_ru, kept, weights, fresh, BV: gl.constexpr, K: gl.constexpr, PARTS: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """s_tile = kept times itself plus the updates [RB, BV], weighted, times their k; a thread writes what it has read.

    A weighted update goes into the product in PARTS of the io dtype that have its bits together.
    """
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [num_warps, 1], [16, 8])
    ROWS: gl.constexpr = min(16 * num_warps, BV)
    WIDTH: gl.constexpr = K // 2  # of registers
    for m in gl.static_range(BV // ROWS):
        b_u = s_ru.slice(m * ROWS, ROWS, dim=1).permute([1, 0]).load(gl.DotOperandLayout(0, MMA, 2))
        b_u = weights * b_u.to(gl.float32)
        for h in gl.static_range(2):
            s_part = s_tile.slice(m * ROWS, ROWS).slice(h * WIDTH, WIDTH, dim=1)
            b_k = s_rk.slice(h * WIDTH, WIDTH, dim=1).load(gl.DotOperandLayout(1, MMA, 2))
            b_s = kept * gl.where(fresh, 0.0, s_part.load(MMA).to(gl.float32))
            rest = b_u
            for _ in gl.static_range(PARTS):
                part, rest = part_of(rest, b_k.dtype)
                b_s = mma_v2(part, b_k, b_s)
            s_part.store(b_s.to(s_part.dtype))


@gluon.jit
def fold(
    s_tile, s_rk, s_ru, s_kept, s_weights, fresh, BV: gl.constexpr, RB: gl.constexpr, TILE: gl.constexpr,
    SUB: gl.constexpr,
):  # fmt: skip
    """The same by sums."""
    for h in gl.static_range(BV // SUB):
        s_part = s_tile.slice(h * SUB, SUB)
        b_s = s_kept.load(TILE) * gl.where(fresh, 0.0, s_part.load(TILE).to(gl.float32))
        for j in gl.static_range(RB):
            u_j = s_ru.slice(j, 1).slice(h * SUB, SUB, dim=1).permute([1, 0]).load(TILE).to(gl.float32)
            u_j *= s_weights.slice(j, 1, dim=1).load(TILE)
            b_s += u_j * s_rk.slice(j, 1).load(TILE).to(gl.float32)
        s_part.store(b_s.to(s_part.dtype))


@gluon.jit
def products(s_rows, s_tokens, s_out, M: gl.constexpr, N: gl.constexpr, num_warps: gl.constexpr):
    """s_out [M, N] = rows [M, K] times tokens [N, K] transposed, by sums in fp32."""
    TILE: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [num_warps, 1], [1, 0])
    SUB: gl.constexpr = min(M, 32)
    for m in gl.static_range(M // SUB):
        b_rows = s_rows.slice(m * SUB, SUB).load(TILE).to(gl.float32)
        for n in gl.static_range(N):
            b_token = s_tokens.slice(n, 1).load(TILE).to(gl.float32)
            s_out.slice(m * SUB, SUB).slice(n, 1, dim=1).store(gl.sum(b_rows * b_token, axis=1)[:, None])


@counted
@gluon.jit(
    do_not_specialize=["stride_w_c", "stride_w_t", "stride_cs_n", "stride_cs_c", "stride_cs_w", "stride_a_t",
                       "stride_a_k", "stride_a_h", "stride_b_t", "stride_b_k", "stride_b_h", "stride_rg_n",
                       "stride_span", "stride_indices", "stride_start", "has_start", "has_initial", "num_sequences",
                       "num_tokens", "num_slots", "slots", "most", "num_k_heads", "null_index", "is_sigmoid",
                       "zero_padding"],
    do_not_specialize_on_alignment=["p_a", "p_b", "p_A_log", "p_dt_bias", "p_ring_g", "p_span", "p_indices",
                                    "p_accepted", "p_start", "p_cu_seqlens", "p_initial", "p_weight", "p_bias",
                                    "p_conv_state"],
)  # fmt: skip
def staged_kernel(
    p_x, p_weight, p_bias, p_conv_state, p_a, p_b, p_A_log, p_dt_bias, p_state, p_ring_k, p_ring_u, p_ring_g, p_span,
    p_indices, p_accepted, p_start, p_cu_seqlens, p_initial, p_z, p_norm_weight, p_out,
    stride_x, stride_x_k, stride_x_v, first_k, first_v, stride_w_c, stride_w_t, stride_cs_n, stride_cs_c, stride_cs_w,
    stride_a_t, stride_a_k, stride_a_h, stride_b_t, stride_b_k, stride_b_h, stride_state, stride_rk_n, stride_ru_n,
    stride_rg_n, stride_span, stride_indices, stride_start, stride_z_t, stride_z_k, stride_z_h, stride_out_t,
    stride_out_h,
    has_start, has_initial, scale, eps, num_sequences, num_tokens, num_slots, slots, most, num_k_heads, null_index,
    is_sigmoid, zero_padding,
    K: gl.constexpr, V: gl.constexpr, W: gl.constexpr, RATIO: gl.constexpr, BV: gl.constexpr, NBUF: gl.constexpr,
    RB: gl.constexpr, L: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    VERIFY: gl.constexpr = p_cu_seqlens is not None
    REPLAY: gl.constexpr = p_ring_k is not None
    NORM: gl.constexpr = p_z is not None
    IO: gl.constexpr = p_x.dtype.element_ty
    STATE: gl.constexpr = p_state.dtype.element_ty
    HALF_IO: gl.constexpr = IO.primitive_bitwidth == 16
    # Products with a state are exact on tensor cores where it is of the io dtype, or parts of that hold its bits; which
    # is more work than sums are for one token.
    PARTS: gl.constexpr = 1 if STATE == IO else 3
    # fp16 holds the updates where these are fp16: larger ones would be infinite.
    UPDATE: gl.constexpr = p_ring_u.dtype.element_ty if REPLAY else IO
    SPLITS: gl.constexpr = HALF_IO and (gl.bfloat16 == IO or (STATE == IO and UPDATE == IO))
    MATRIX: gl.constexpr = SPLITS and (PARTS == 1 or L > 1)
    VEC: gl.constexpr = 128 // STATE.primitive_bitwidth
    VEC_IO: gl.constexpr = 128 // IO.primitive_bitwidth
    BY_HEAD: gl.constexpr = V // BV
    STEPS: gl.constexpr = RATIO * BY_HEAD
    SUB: gl.constexpr = min(BV, 32)  # rows that are in registers at a time where a state is changed
    M: gl.constexpr = max(16, 2 * L)  # rows of a matrix product at least
    N: gl.constexpr = max(8, 2 * L) if HALF_IO else 2 * L  # columns of products: q and k of each token, and idle ones
    TILE: gl.constexpr = gl.BlockedLayout([1, VEC], [4, 8], [num_warps, 1], [1, 0])
    TOKENS: gl.constexpr = gl.BlockedLayout([L, 1], [1, 32], [1, num_warps], [1, 0])
    GATES: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [num_warps, 1], [0, 1])
    VECTORS: gl.constexpr = gl.BlockedLayout([RB, 1], [1, 32], [1, num_warps], [1, 0])
    ROWS: gl.constexpr = gl.BlockedLayout([1, V // 32], [1, 32], [num_warps, 1], [1, 0])
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [num_warps, 1], [16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(VEC, 1, 8, [1, 0])
    SHARED_IO: gl.constexpr = gl.SwizzledSharedLayout(VEC_IO, 1, 8, [1, 0])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    BY_ROW: gl.constexpr = gl.BlockedLayout([1, N], [32, 1], [num_warps, 1], [1, 0])
    OF_V: gl.constexpr = gl.SliceLayout(0, VECTORS)
    LEVELS: gl.constexpr = 1 + (N > 2) + (N > 4) + (N > 8)
    BY_K: gl.constexpr = gl.SliceLayout(0, TILE)
    BY_V: gl.constexpr = gl.SliceLayout(1, TILE)

    i_p = gl.program_id(0)
    i_hk = i_p % num_k_heads
    i_b = (i_p // num_k_heads).to(gl.int64)
    num_v_heads = num_k_heads * RATIO
    fresh = i_p < 0
    accepted = i_p * 0 + 1
    if VERIFY:
        # Under zero_padding the grid has one sequence more: the tokens past cu_seqlens[-1].
        start = gl.load(p_cu_seqlens + i_b).to(gl.int64)
        end = num_tokens.to(gl.int64)
        row = null_index.to(gl.int64)  # of the state to start from
        first_row = row  # of conv_state
        if i_b < num_sequences:
            end = gl.load(p_cu_seqlens + i_b + 1).to(gl.int64)
            if start < end:
                first_row = gl.load(p_indices + i_b * stride_indices).to(gl.int64)
                # has_initial_state, if absent, is any bytes, of which the first is read.
                fresh = (has_initial != 0) & (gl.load(p_initial + i_b * has_initial).to(gl.int32) == 0)
                accepted = gl.maximum(gl.load(p_accepted + i_b).to(gl.int32), 1)
                row = first_row
                if not REPLAY:
                    # What nobody starts from is not looked up: its number may be anything.
                    own = fresh | (first_row <= null_index)
                    i_start = gl.where(own | (has_start != 0), 0, accepted - 1)
                    row = gl.where(own, first_row, gl.load(p_start + i_b * stride_start + i_start).to(gl.int64))
        length = (end - start).to(gl.int32)
    else:
        start = i_b
        length = 1
        row = gl.load(p_indices + i_b * stride_indices).to(gl.int64)
        first_row = row
    p_out += start * stride_out_t + i_hk * RATIO * stride_out_h
    if row <= null_index:
        if zero_padding != 0:
            o_z = gl.arange(0, RATIO, layout=gl.SliceLayout(1, ROWS))[:, None] * stride_out_h
            o_z = o_z + gl.arange(0, V, layout=gl.SliceLayout(0, ROWS))[None, :]
            for i_t in range(length):
                gl.store(p_out + i_t * stride_out_t + o_z, gl.zeros([RATIO, V], p_out.dtype.element_ty, ROWS))
        return

    # What is loaded into registers is asked for first: behind the states of all programs it would wait for them.
    if REPLAY:
        p_span += row * stride_span + i_hk * 2
        first = gl.load(p_span)
        held = gl.load(p_span + 1) + accepted - 1
    p_x += start * stride_x
    p_conv_state += first_row * stride_cs_n
    p_history = p_conv_state + gl.where(fresh, 0, accepted - 1) * stride_cs_w
    o_t = gl.arange(0, L, layout=gl.SliceLayout(1, TOKENS))[:, None]
    o_c = gl.arange(0, 2 * K, layout=gl.SliceLayout(0, TOKENS))
    o_x = i_hk * stride_x_k + o_c // K * first_k + o_c % K
    o_c = (o_c // K * num_k_heads + i_hk) * K + o_c % K
    x_qk = conv_inputs(
        p_x, p_history, p_weight, p_bias, o_t, o_x, o_c, length, fresh, stride_x, stride_w_c, stride_w_t, stride_cs_c,
        stride_cs_w, W, L,
    )  # fmt: skip
    o_cv = gl.arange(0, RATIO * V, layout=gl.SliceLayout(0, TOKENS))
    o_x = first_v + i_hk * stride_x_v + o_cv
    o_cv = 2 * num_k_heads * K + i_hk * (RATIO * V) + o_cv
    x_v = conv_inputs(
        p_x, p_history, p_weight, p_bias, o_t, o_x, o_cv, length, fresh, stride_x, stride_w_c, stride_w_t, stride_cs_c,
        stride_cs_w, W, L,
    )  # fmt: skip
    o_g = gl.arange(0, L * RATIO, layout=gl.SliceLayout(1, GATES))[:, None]
    o_one = gl.arange(0, 1, layout=gl.SliceLayout(0, GATES))[None, :]
    i_t = gl.minimum(o_g // RATIO, length - 1)
    i_h = i_hk * RATIO + o_g % RATIO + o_one
    a = gl.load(p_a + start * stride_a_t + i_hk * stride_a_k + i_t * stride_a_t + o_g % RATIO * stride_a_h + o_one)
    b = gl.load(p_b + start * stride_b_t + i_hk * stride_b_k + i_t * stride_b_t + o_g % RATIO * stride_b_h + o_one)
    A_log = gl.load(p_A_log + i_h)
    dt_bias = gl.load(p_dt_bias + i_h)
    o_l = gl.arange(0, L * RATIO, layout=gl.SliceLayout(1, ROWS))[:, None]
    o_f = gl.arange(0, V, layout=gl.SliceLayout(0, ROWS))
    wanted_rows = (o_l // RATIO < length) & (o_f >= 0)[None, :]
    if NORM:
        p_z += start * stride_z_t + i_hk * stride_z_k
        p_z = p_z + o_l // RATIO * stride_z_t + o_l % RATIO * stride_z_h + o_f[None, :]
        b_z = gl.load(p_z, mask=wanted_rows, other=0.0)
        norm_weight = gl.load(p_norm_weight + o_f)
    targets = ()
    for t in gl.static_range(L):
        if VERIFY and not REPLAY:
            p_target = p_indices + i_b * stride_indices + gl.minimum(t, num_slots - 1)
            targets = targets + (gl.load(p_target).to(gl.int64),)
        else:
            targets = targets + (row,)

    # The states, tile by tile, on their way.
    o_k = gl.arange(0, K, layout=BY_K)
    s_state = gl.allocate_shared_memory(STATE, [NBUF, BV, K], SHARED)
    p_state += i_hk * (RATIO * V * K)
    p_tile = p_state + row * stride_state + gl.arange(0, BV, layout=BY_V)[:, None] * K + o_k[None, :]
    for i in gl.static_range(NBUF):
        copy_to_shared(s_state.index(i), p_tile + i * (BV * K))
        async_copy.commit_group()

    # Convolution, norms, gates: into shared memory, as everyone needs them.
    b_qk = normalised(convolved(x_qk, p_conv_state, p_bias, o_t, o_c, length, stride_cs_c, stride_cs_w, W, IO), L, K)
    s_tokens = gl.allocate_shared_memory(IO, [M, K], SHARED_IO)  # rows 2t: q, 2t+1: k, again and again
    b_all = gl.reshape(b_qk, [1, 2 * L, K])
    AGAIN: gl.constexpr = b_all.type.layout
    b_all = b_all + gl.zeros([M // (2 * L), 1, 1], IO, AGAIN)
    s_tokens.store(gl.reshape(b_all, [M, K]))
    if not (REPLAY and MATRIX):
        # In fp32 once more: what multiplies tiles is otherwise unpacked for each of them.
        s_exact = gl.allocate_shared_memory(gl.float32, [2 * L, K], PLAIN)
        s_exact.store(b_qk.to(gl.float32))
    s_v = gl.allocate_shared_memory(IO, [L * RATIO, V], PLAIN)
    b_v = convolved(x_v, p_conv_state, p_bias, o_t, o_cv, length, stride_cs_c, stride_cs_w, W, IO)
    s_v.reshape([L, RATIO * V]).store(b_v)
    s_g = gl.allocate_shared_memory(gl.float32, [L * RATIO, 1], PLAIN)
    s_beta = gl.allocate_shared_memory(gl.float32, [L * RATIO, 1], PLAIN)
    g = log_decay(a.to(gl.float32), A_log.to(gl.float32), dt_bias.to(gl.float32))
    s_g.store(g)
    s_beta.store(sigmoid(b.to(gl.float32)))

    if REPLAY:
        first = gl.where(fresh, 0, first)
        held = gl.where(fresh, 0, held)
        folds = fresh | (held + 2 * most > slots)
        next_slot = wrapped(first + held, slots)
        p_ring_k += row * stride_rk_n + i_hk * K
        p_ring_u += row * stride_ru_n + i_hk * (RATIO * V)
        p_ring_g += row * stride_rg_n + i_hk * RATIO
        KEYS: gl.constexpr = gl.BlockedLayout([1, VEC_IO], [32 * VEC_IO // K, K // VEC_IO], [num_warps, 1], [1, 0])
        UPDATES: gl.constexpr = gl.BlockedLayout([1, 128 // UPDATE.primitive_bitwidth], [1, 32], [num_warps, 1], [1, 0])
        SCAN: gl.constexpr = gl.BlockedLayout([1, 1], [RB, 32 // RB], [1, num_warps], [0, 1])
        # The ring's updates, which are wanted behind the states. What a mask leaves out is zeros there.
        s_rk = gl.allocate_shared_memory(IO, [RB, K], SHARED_IO if SPLITS else PLAIN)
        s_ru = gl.allocate_shared_memory(UPDATE, [RB, RATIO * V], PLAIN)
        o_j = gl.arange(0, RB, layout=gl.SliceLayout(1, KEYS))[:, None]
        o_n = gl.arange(0, K, layout=gl.SliceLayout(0, KEYS))[None, :]
        slot = wrapped(first + o_j, slots)
        copy_to_shared(s_rk, p_ring_k + slot * (num_k_heads * K) + o_n, mask=(o_j < held) & (o_n >= 0))
        o_j = gl.arange(0, RB, layout=gl.SliceLayout(1, UPDATES))[:, None]
        o_n = gl.arange(0, RATIO * V, layout=gl.SliceLayout(0, UPDATES))[None, :]
        slot = wrapped(first + o_j, slots)
        copy_to_shared(s_ru, p_ring_u + slot * (num_v_heads * V) + o_n, mask=(o_j < held) & (o_n >= 0))
        async_copy.commit_group()
        # Gates of the updates behind each.
        o_j = gl.arange(0, RB, layout=gl.SliceLayout(1, SCAN))[:, None]
        o_n = gl.arange(0, RATIO, layout=gl.SliceLayout(0, SCAN))[None, :]
        slot = wrapped(first + o_j + 1, slots)
        x_rg = gl.load(p_ring_g + slot * num_v_heads + o_n, mask=(o_j + 1 < held) & (o_n >= 0), other=0.0)
        x_oldest = gl.load(p_ring_g + first * num_v_heads + o_n, mask=(held > 0) & (o_n >= 0), other=0.0)
        # What the step's tokens leave there, u aside.
        slot = wrapped(next_slot + o_g // RATIO, slots)
        gl.store(p_ring_g + slot * num_v_heads + o_g % RATIO + o_one, g, mask=(o_g // RATIO < length) & (o_one >= 0))
        PAIRS: gl.constexpr = b_qk.type.layout
        o_i = gl.arange(0, 2 * L, layout=gl.SliceLayout(1, PAIRS))[:, None]
        o_n = gl.arange(0, K, layout=gl.SliceLayout(0, PAIRS))[None, :]
        slot = wrapped(next_slot + o_i // 2, slots)
        wanted = (o_i % 2 == 1) & (o_i // 2 < length) & (o_n >= 0)
        gl.store(p_ring_k + slot * (num_k_heads * K) + o_n, b_qk, mask=wanted)

    s_dots = gl.allocate_shared_memory(gl.float32, [M, N], PLAIN)  # of tokens with tokens
    s_p = gl.allocate_shared_memory(gl.float32, [V if MATRIX or not REPLAY else RATIO * V, N], PLAIN)  # of states
    if not REPLAY:
        s_u = gl.allocate_shared_memory(gl.float32, [L * RATIO, V], PLAIN)
    s_o = gl.allocate_shared_memory(IO, [L * RATIO, V], PLAIN)
    barrier()
    if HALF_IO:
        b_tokens = s_tokens.slice(0, N).permute([1, 0]).load(RIGHT)
        s_dots.store(mma_v2(s_tokens.load(LEFT), b_tokens, gl.zeros([M, N], gl.float32, MMA)))
    else:
        products(s_exact, s_exact, s_dots.slice(0, 2 * L), 2 * L, N, num_warps)

    o_sub = gl.arange(0, SUB, layout=BY_V)[:, None] * K + o_k[None, :]
    if REPLAY:
        # Every thread has read the span.
        gl.store(p_span, gl.where(folds, next_slot, first))
        gl.store(p_span + 1, gl.where(folds, 0, held) + 1)
        s_kept = gl.allocate_shared_memory(gl.float32, [RATIO, 1], PLAIN)
        s_fold = gl.allocate_shared_memory(gl.float32, [RATIO, RB], PLAIN)
        if folds:
            behind, left = ring_decays(x_rg, x_oldest, o_j)
            s_kept.permute([1, 0]).store(gl.exp(left))
            s_fold.permute([1, 0]).store(gl.exp(behind))
            async_copy.wait_group(0)
        b_products = ()
        for i in gl.static_range(STEPS):
            # Committed behind this tile: the other first ones, the ring, and what was asked for since.
            if i < NBUF:
                async_copy.wait_group(NBUF - i + min(i, STEPS - NBUF))
            else:
                async_copy.wait_group(min(i, STEPS - NBUF) - (i - NBUF) - 1)
            barrier()
            s_tile = s_state.index(i % NBUF)
            # A fold rounds the state, so products are of what was there before, and outputs do not meet the rounding.
            if MATRIX:
                b_products = b_products + (matrix_products(s_tile, s_tokens, BV, K, N, PARTS, num_warps),)
            else:
                products(s_tile, s_exact, s_p.slice(i * BV, BV), BV, 2 * L, num_warps)
            if folds:
                barrier()
                s_update = s_ru.slice(i * BV, BV, dim=1)
                s_kept_r = s_kept.slice(i // BY_HEAD, 1)
                s_fold_r = s_fold.slice(i // BY_HEAD, 1)
                if SPLITS:
                    fold_by_matrix(
                        s_tile, s_rk, s_update, s_kept_r.load(MMA), s_fold_r.load(LEFT), fresh, BV, K,
                        2 if PARTS == 1 else PARTS, num_warps,
                    )  # fmt: skip
                else:
                    fold(s_tile, s_rk, s_update, s_kept_r, s_fold_r, fresh, BV, RB, TILE, SUB)
                barrier()
                p_new = p_state + row * stride_state + i * (BV * K)
                for h in gl.static_range(BV // SUB):
                    gl.store(p_new + h * SUB * K + o_sub, s_tile.slice(h * SUB, SUB).load(TILE))
            if i + NBUF < STEPS:
                barrier()
                copy_to_shared(s_tile, p_tile + (i + NBUF) * (BV * K))
                async_copy.commit_group()

        # The weight of each update in S_n k and S_n q of each token.
        s_weights = gl.allocate_shared_memory(gl.float32, [2 * L * RATIO, RB], PLAIN)
        s_rdots = gl.allocate_shared_memory(gl.float32, [RB, N], PLAIN)
        s_left = gl.allocate_shared_memory(gl.float32, [RATIO, 1], PLAIN)
        behind, left = ring_decays(x_rg, x_oldest, o_j)
        s_left.permute([1, 0]).store(left)
        async_copy.wait_group(0)
        barrier()
        if HALF_IO:
            s_rdots.store(mma_v2(s_rk.load(LEFT), b_tokens, gl.zeros([RB, N], gl.float32, MMA)))
        else:
            products(s_rk, s_exact, s_rdots, RB, N, num_warps)
        barrier()
        for t in gl.static_range(L):
            behind += s_g.slice(t * RATIO, RATIO).permute([1, 0]).load(SCAN)
            for n in gl.static_range(2):
                dots = s_rdots.slice(2 * t + n, 1, dim=1).load(SCAN)
                s_weights.slice((2 * t + n) * RATIO, RATIO).permute([1, 0]).store(gl.exp(behind) * dots)

    o_u = gl.arange(0, V, layout=OF_V)[None, :]
    o_0 = gl.arange(0, 1, layout=gl.SliceLayout(1, VECTORS))[:, None]
    for r in gl.static_range(RATIO):
        s_head = s_p
        if REPLAY:
            if MATRIX:
                for c in gl.static_range(BY_HEAD):
                    s_p.slice(c * BV, BV).store(b_products[r * BY_HEAD + c])
            else:
                s_head = s_p.slice(r * V, V)
        else:
            for c in gl.static_range(BY_HEAD):
                # Committed behind this tile: the other first ones, and what was asked for since.
                if r * BY_HEAD + c < NBUF:
                    async_copy.wait_group(NBUF - 1 - (r * BY_HEAD + c) + min(r * BY_HEAD, STEPS - NBUF))
                else:
                    async_copy.wait_group(min(r * BY_HEAD, STEPS - NBUF) - (r * BY_HEAD + c - NBUF) - 1)
                barrier()
                s_tile = s_state.index((r * BY_HEAD + c) % NBUF)
                if MATRIX:
                    s_p.slice(c * BV, BV).store(matrix_products(s_tile, s_tokens, BV, K, N, PARTS, num_warps))
                else:
                    products(s_tile, s_exact, s_p.slice(c * BV, BV), BV, 2 * L, num_warps)
        barrier()

        # One token after the other, on vectors alone: S_t k = exp(l) S_0 k + the sum of exp(l_s) (k_s . k) u_s
        left = gl.zeros([1, 1], gl.float32, VECTORS)
        if REPLAY:
            b_ru = s_ru.slice(r * V, V, dim=1).load(VECTORS).to(gl.float32)
            b_ru += b_ru * 0.0  # an infinite update makes products of S_n NaN: its k has both signs
            left = s_left.slice(r, 1).load(VECTORS)
        # A thread's rows of the products with the state: q's and k's of each token.
        b_p = columns(s_head.load(BY_ROW), V, N, LEVELS)
        gs = ()
        updates = ()
        for t in gl.static_range(L):
            g_t = s_g.slice(t * RATIO + r, 1).load(VECTORS)
            left = left + g_t
            decay = gl.exp(left)
            S_q = gl.convert_layout(b_p[2 * t], OF_V)[None, :]
            S_k = gl.convert_layout(b_p[2 * t + 1], OF_V)[None, :]
            if VERIFY:
                zero = 0.0
                if t == 0:  # later ones meet this one's: NaN where k has it, as zeros times k are
                    zero *= s_dots.slice(1, 1).slice(1, 1, dim=1).load(VECTORS)
                S_q = gl.where(fresh, 0.0, S_q)
                S_k = gl.where(fresh, zero, S_k)
            S_q *= decay
            S_k *= decay
            if REPLAY:
                w_q = s_weights.slice(2 * t * RATIO + r, 1).permute([1, 0]).load(VECTORS)
                w_k = s_weights.slice((2 * t + 1) * RATIO + r, 1).permute([1, 0]).load(VECTORS)
                S_q += gl.sum(w_q * b_ru, axis=0)[None, :]
                S_k += gl.sum(w_k * b_ru, axis=0)[None, :]
            between = g_t
            for s in gl.static_range(t):
                # from the newest backwards: a cumulative sum would lose small gates behind a large one
                s_dot = s_dots.slice(2 * (t - 1 - s) + 1, 1)
                w = gl.exp(between)
                S_q += w * s_dot.slice(2 * t, 1, dim=1).load(VECTORS) * updates[t - 1 - s]
                S_k += w * s_dot.slice(2 * t + 1, 1, dim=1).load(VECTORS) * updates[t - 1 - s]
                between = between + gs[t - 1 - s]
            v = s_v.slice(t * RATIO + r, 1).load(VECTORS).to(gl.float32)
            u = s_beta.slice(t * RATIO + r, 1).load(VECTORS) * (v - S_k)
            u_n = u + u * 0.0  # as above: products of what an infinite update makes of the state are NaN
            o = scale * (S_q + s_dots.slice(2 * t + 1, 1).slice(2 * t, 1, dim=1).load(VECTORS) * u_n)
            s_o.slice(t * RATIO + r, 1).store(o.to(IO))
            if REPLAY:
                slot_t = wrapped(next_slot + t, slots)
                wanted = (o_0 + t < length) & (o_u >= 0)
                gl.store(p_ring_u + slot_t * (num_v_heads * V) + r * V + o_u + o_0, u.to(UPDATE), mask=wanted)
            else:
                s_u.slice(t * RATIO + r, 1).store(u)
            gs = gs + (g_t,)
            updates = updates + (u_n,)

        if not REPLAY:
            barrier()
            for c in gl.static_range(BY_HEAD):
                s_old = s_state.index((r * BY_HEAD + c) % NBUF)
                for h in gl.static_range(BV // SUB):
                    b_s = s_old.slice(h * SUB, SUB).load(TILE).to(gl.float32)
                    b_s = gl.where(fresh, 0.0, b_s)
                    for t in gl.static_range(L):
                        if t < length:
                            k_n = s_exact.slice(2 * t + 1, 1).load(TILE)
                            s_un = s_u.slice(t * RATIO + r, 1).slice(c * BV + h * SUB, SUB, dim=1)
                            d_n = gl.exp(s_g.slice(t * RATIO + r, 1).load(TILE))
                            b_s = d_n * b_s + s_un.permute([1, 0]).load(TILE) * k_n
                            if (targets[t] > null_index) & (t < num_slots):
                                p_new = p_state + targets[t] * stride_state + (r * V + c * BV + h * SUB) * K + o_sub
                                gl.store(p_new, b_s.to(STATE))
                if r * BY_HEAD + c + NBUF < STEPS:
                    barrier()
                    copy_to_shared(s_old, p_tile + (r * BY_HEAD + c + NBUF) * (BV * K))
                    async_copy.commit_group()
        barrier()

    b_o = s_o.load(ROWS)
    if NORM:
        weight = norm_weight.to(gl.float32)[None, :]
        b_o = rms_norm_gated(b_o.to(gl.float32), b_z.to(gl.float32), weight, V, eps, is_sigmoid)
    p_line = p_out + o_l // RATIO * stride_out_t + o_l % RATIO * stride_out_h + o_f[None, :]
    gl.store(p_line, b_o.to(p_out.dtype.element_ty), mask=wanted_rows)


# What a launch for an op without a ring passes in the ring's place.
NO_RING = {
    "p_ring_k": None, "p_ring_u": None, "p_ring_g": None, "p_span": None, "stride_rk_n": 0, "stride_ru_n": 0,
    "stride_rg_n": 0, "stride_span": 0, "slots": 0, "most": 0, "RB": 1,
}  # fmt: skip


def step_options(staging: Staging, ratio: int, V: int, tokens: int, slots: int = 0) -> dict[str, Any]:
    """What a launch adds: tiles, for sequences of at most `tokens` tokens, and Triton's options.

    Args:
        ratio: value heads of a key head.
        slots: of a ring; 0: the op has none.
    """
    rows, buffers, warps = staging.rows, staging.buffers, staging.num_warps
    if tokens > 4:  # a thread has all tokens of its channels, so there have to be more threads
        rows, buffers, warps = min(2 * rows, V), -(-buffers // 2), 8
    if slots == 0:  # a state that is written is gone through twice, so all of a head's has to be there
        buffers = max(buffers, V // rows)
    return {
        "BV": rows, "NBUF": min(buffers, ratio * V // rows), "L": triton.next_power_of_2(tokens),
        # A channel must not be two threads': see `convolved`.
        "num_warps": min(warps, ratio * V // 32), **({"maxnreg": staging.registers} if staging.registers else {}),
    }  # fmt: skip
