"""First launch of the Triton prefill: everything of a chunk that does not depend on the state.

With G_i the sum of log decays g up to and including token i of a chunk of 64, and for i >= j

    A_ij = beta_i * exp(G_i - G_j) * (k_i . k_j)      (strictly lower)
    M    = (I + A)^-1 * diag(beta)
    P_ij = exp(G_i - G_j) * (q_i . k_j)               (lower)

the new values of the chunk are D = M (V - diag(exp(G)) K S^T) and its output is
scale * (diag(exp(G)) Q S^T + P D) (Yang et al., arXiv:2412.06464, sec. 3.3, with the inverse applied to the
residual instead of to V and K apart: the difference is taken in fp32 before anything is rounded, which is
what keeps strongly correlated keys accurate, and 16 KiB a chunk and head is written instead of 40).

Everything is done on blocks of 16x16 tokens, of which only the ten on and below the diagonal exist. A block is 8
registers a thread of one warp, so a program is one warp (`solve_warps`): what an operand layout costs is a few
shuffles inside the warp and no barrier, and a multiprocessor holds eight or more programs that hide each other's
latency.

The inverse is built of inverses of diagonal blocks, exactly, not as a power series: from blocks of 1 to 64 by six
doublings, which is as stable as substitution and far shorter than 63 rows in turn. Exponents are only ever taken of
G_i - G_j with i >= j, so nothing overflows however strong the decay: on the diagonal blocks as they are, below them
as exp(G_i - B) * exp(B - G_j) with B the sum before row block i, both at most 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

CHUNK = tl.constexpr(64)
# exp(-100) is zero in fp32 for any purpose here; a bound keeps sums of logs of a zero decay finite and precise.
LOG_DECAY_MIN = tl.constexpr(-100.0)


@triton.jit
def find_sequence(cu_seqlens_ptr, num_sequences, slot, size, BLOCK: tl.constexpr):
    """Sequence whose run of slots holds `slot`, a slot being `size` tokens; -1 before the first.

    Sequence b owns the slots from cu_seqlens[b] // size + b: its ceil(L / size) pieces always fit below the next
    sequence's first slot, so no prefix sum over the lengths is needed and T // size + B slots hold any packing.
    """
    count = tl.zeros([BLOCK], dtype=tl.int32)
    for first in range(0, num_sequences, BLOCK):
        o_b = first + tl.arange(0, BLOCK)
        b_first = tl.load(cu_seqlens_ptr + o_b, mask=o_b < num_sequences, other=0).to(tl.int64) // size + o_b
        count += ((b_first <= slot) & (o_b < num_sequences)).to(tl.int32)
    return tl.sum(count, axis=0) - 1


@triton.jit
def invert_block(b_a, PRECISION: tl.constexpr):
    """(I + A)^-1 of a strictly lower A [16, 16] fp32.

    With D the inverses of the diagonal blocks of s and L the lower left quarters of those of 2 s, the inverses of the
    blocks of 2 s are D - D L D; from blocks of 2 (where it is I - A) to 16.
    """
    o_r = tl.arange(0, 16)[:, None]
    o_c = tl.arange(0, 16)[None, :]
    b_d = tl.where(o_r == o_c, 1.0, tl.where((o_r // 2) == (o_c // 2), -b_a, 0.0))
    for level in tl.static_range(1, 4):
        # Rows and columns that share a block of 2 s and not one of s, below the diagonal: A is strictly lower.
        b_l = tl.where(((o_r >> (level + 1)) == (o_c >> (level + 1))) & ((o_r >> level) != (o_c >> level)), b_a, 0.0)
        b_l = tl.dot(b_d, b_l, input_precision=PRECISION)
        b_d -= tl.dot(b_l, b_d, input_precision=PRECISION)
    return b_d


@triton.jit
def load_rows(p_x, stride_t, num_rows, BLOCK: tl.constexpr, col, COLS: tl.constexpr):
    """Rows 16 * BLOCK to 16 * BLOCK + 15 and columns col to col + COLS of a chunk, zeros past its `num_rows` tokens."""
    o_t = 16 * BLOCK + tl.arange(0, 16)
    o_x = o_t[:, None] * stride_t + (col + tl.arange(0, COLS))[None, :]
    return tl.load(p_x + o_x, mask=(o_t < num_rows)[:, None], other=0.0)


@triton.jit
def inverse_norm(p_x, stride_t, num_rows, BLOCK: tl.constexpr, K: tl.constexpr, COLS: tl.constexpr):
    """1 / |x| of 16 rows."""
    b_sum = tl.zeros([16], dtype=tl.float32)
    for col in tl.static_range(0, K, COLS):
        b_x = load_rows(p_x, stride_t, num_rows, BLOCK, col, COLS).to(tl.float32)
        b_sum += tl.sum(b_x * b_x, axis=1)
    return tl.rsqrt(b_sum + 1e-6)


@triton.jit
def normalize_rows(p_x, p_norm, stride_t, num_rows, BLOCK: tl.constexpr, HK: tl.constexpr, K: tl.constexpr,
                   COLS: tl.constexpr):  # fmt: skip
    """Write 16 rows over their norms to p_norm, whose token stride is HK * K."""
    b_r = inverse_norm(p_x, stride_t, num_rows, BLOCK, K, COLS)
    o_t = 16 * BLOCK + tl.arange(0, 16)
    for col in tl.static_range(0, K, COLS):
        b_x = load_rows(p_x, stride_t, num_rows, BLOCK, col, COLS).to(tl.float32) * b_r[:, None]
        o_x = o_t[:, None] * (HK * K) + (col + tl.arange(0, COLS))[None, :]
        tl.store(p_norm + o_x, b_x.to(p_norm.dtype.element_ty), mask=(o_t < num_rows)[:, None])


@triton.jit
def load_operand(p_x, stride_t, num_rows, b_r, BLOCK: tl.constexpr, col, COLS: tl.constexpr, L2NORM: tl.constexpr,
                 DOT: tl.constexpr):  # fmt: skip
    """`load_rows` as an operand; with L2NORM times b_r and rounded to the io dtype, as the stored norm is."""
    b_x = load_rows(p_x, stride_t, num_rows, BLOCK, col, COLS)
    if L2NORM:
        b_x = (b_x.to(tl.float32) * b_r[:, None]).to(p_x.dtype.element_ty)
    return b_x.to(DOT)


@triton.jit
def lower_products(p_x, x_stride_t, p_y, y_stride_t, num_rows, K: tl.constexpr, COLS: tl.constexpr,
                   SAME: tl.constexpr, L2NORM: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The ten blocks [16, 16] of X Y^T, fp32, on and below the diagonal, row by row; SAME: Y is X."""
    x_r0 = tl.zeros([16], dtype=tl.float32)
    x_r1 = tl.zeros([16], dtype=tl.float32)
    x_r2 = tl.zeros([16], dtype=tl.float32)
    x_r3 = tl.zeros([16], dtype=tl.float32)
    y_r0 = tl.zeros([16], dtype=tl.float32)
    y_r1 = tl.zeros([16], dtype=tl.float32)
    y_r2 = tl.zeros([16], dtype=tl.float32)
    y_r3 = tl.zeros([16], dtype=tl.float32)
    if L2NORM:
        x_r0 = inverse_norm(p_x, x_stride_t, num_rows, 0, K, COLS)
        x_r1 = inverse_norm(p_x, x_stride_t, num_rows, 1, K, COLS)
        x_r2 = inverse_norm(p_x, x_stride_t, num_rows, 2, K, COLS)
        x_r3 = inverse_norm(p_x, x_stride_t, num_rows, 3, K, COLS)
        y_r0 = inverse_norm(p_y, y_stride_t, num_rows, 0, K, COLS)
        y_r1 = inverse_norm(p_y, y_stride_t, num_rows, 1, K, COLS)
        y_r2 = inverse_norm(p_y, y_stride_t, num_rows, 2, K, COLS)
        y_r3 = inverse_norm(p_y, y_stride_t, num_rows, 3, K, COLS)
    b_00 = tl.zeros([16, 16], dtype=tl.float32)
    b_10 = tl.zeros([16, 16], dtype=tl.float32)
    b_11 = tl.zeros([16, 16], dtype=tl.float32)
    b_20 = tl.zeros([16, 16], dtype=tl.float32)
    b_21 = tl.zeros([16, 16], dtype=tl.float32)
    b_22 = tl.zeros([16, 16], dtype=tl.float32)
    b_30 = tl.zeros([16, 16], dtype=tl.float32)
    b_31 = tl.zeros([16, 16], dtype=tl.float32)
    b_32 = tl.zeros([16, 16], dtype=tl.float32)
    b_33 = tl.zeros([16, 16], dtype=tl.float32)
    for col in tl.static_range(0, K, COLS):
        b_x0 = load_operand(p_x, x_stride_t, num_rows, x_r0, 0, col, COLS, L2NORM, DOT)
        b_x1 = load_operand(p_x, x_stride_t, num_rows, x_r1, 1, col, COLS, L2NORM, DOT)
        b_x2 = load_operand(p_x, x_stride_t, num_rows, x_r2, 2, col, COLS, L2NORM, DOT)
        b_x3 = load_operand(p_x, x_stride_t, num_rows, x_r3, 3, col, COLS, L2NORM, DOT)
        if SAME:
            b_y0 = tl.trans(b_x0)
            b_y1 = tl.trans(b_x1)
            b_y2 = tl.trans(b_x2)
            b_y3 = tl.trans(b_x3)
        else:
            b_y0 = tl.trans(load_operand(p_y, y_stride_t, num_rows, y_r0, 0, col, COLS, L2NORM, DOT))
            b_y1 = tl.trans(load_operand(p_y, y_stride_t, num_rows, y_r1, 1, col, COLS, L2NORM, DOT))
            b_y2 = tl.trans(load_operand(p_y, y_stride_t, num_rows, y_r2, 2, col, COLS, L2NORM, DOT))
            b_y3 = tl.trans(load_operand(p_y, y_stride_t, num_rows, y_r3, 3, col, COLS, L2NORM, DOT))
        b_00 = tl.dot(b_x0, b_y0, acc=b_00, input_precision=PRECISION)
        b_10 = tl.dot(b_x1, b_y0, acc=b_10, input_precision=PRECISION)
        b_11 = tl.dot(b_x1, b_y1, acc=b_11, input_precision=PRECISION)
        b_20 = tl.dot(b_x2, b_y0, acc=b_20, input_precision=PRECISION)
        b_21 = tl.dot(b_x2, b_y1, acc=b_21, input_precision=PRECISION)
        b_22 = tl.dot(b_x2, b_y2, acc=b_22, input_precision=PRECISION)
        b_30 = tl.dot(b_x3, b_y0, acc=b_30, input_precision=PRECISION)
        b_31 = tl.dot(b_x3, b_y1, acc=b_31, input_precision=PRECISION)
        b_32 = tl.dot(b_x3, b_y2, acc=b_32, input_precision=PRECISION)
        b_33 = tl.dot(b_x3, b_y3, acc=b_33, input_precision=PRECISION)
    return b_00, b_10, b_11, b_20, b_21, b_22, b_30, b_31, b_32, b_33


@triton.jit
def sum_gates(p_g, stride, num_rows, hi, lo, BLOCK: tl.constexpr, EXP_GATE: tl.constexpr):
    """Sums of log decays up to and including each of 16 tokens, after `hi + lo` before them, and the sum after them.

    A strong decay followed by mild ones leaves differences of large sums: multiples of 1/64 (hi) add up exactly, and
    what is left of each g (lo) adds up to at most 1.
    """
    o_t = 16 * BLOCK + tl.arange(0, 16)
    b_g = tl.load(p_g + o_t * stride, mask=o_t < num_rows, other=1.0 if EXP_GATE else 0.0)
    if EXP_GATE:
        b_g = tl.log(b_g)
    b_g = tl.maximum(b_g, LOG_DECAY_MIN)
    b_hi = tl.floor(b_g * 64.0) * 0.015625
    b_lo = b_g - b_hi
    hi_after = hi + tl.sum(b_hi, axis=0)
    lo_after = lo + tl.sum(b_lo, axis=0)
    return hi + tl.cumsum(b_hi, axis=0), lo + tl.cumsum(b_lo, axis=0), hi_after, lo_after


@triton.jit
def diagonal_decays(b_hi, b_lo):
    """exp(G_i - G_j) [16, 16] of a diagonal block, 0 above the diagonal."""
    o_t = tl.arange(0, 16)
    b_diff = (b_hi[:, None] - b_hi[None, :]) + (b_lo[:, None] - b_lo[None, :])
    return tl.exp(tl.where(o_t[:, None] >= o_t[None, :], b_diff, float("-inf")))


@triton.jit
def store_block(p_x, b_x, ROW: tl.constexpr, COL: tl.constexpr):
    """Store block (ROW, COL) of a [64, 64] matrix."""
    o_t = tl.arange(0, 16)
    tl.store(p_x + (16 * ROW + o_t)[:, None] * 64 + (16 * COL + o_t)[None, :], b_x.to(p_x.dtype.element_ty))


@triton.jit
def zero_above_diagonal(p_x):
    """Zero the six blocks above the diagonal of a [64, 64] matrix."""
    o_r = tl.arange(0, 16)[:, None]
    o_c = tl.arange(0, 64)[None, :]
    b_x = tl.zeros([16, 64], dtype=p_x.dtype.element_ty)
    for row in tl.static_range(3):
        tl.store(p_x + (16 * row + o_r) * 64 + o_c, b_x, mask=(o_c >= 16 * row + 16) & (o_r >= 0))


@triton.jit(
    do_not_specialize=["num_tokens", "num_sequences", "null_index", "index_stride"],
    do_not_specialize_on_alignment=["g_ptr", "beta_ptr", "cu_seqlens_ptr", "state_indices_ptr"],
)
def prefill_solve_kernel(
    q_ptr, k_ptr, g_ptr, beta_ptr, out_ptr,
    state_indices_ptr, cu_seqlens_ptr,
    m_ptr, p_ptr, decay_ptr, q_norm_ptr, k_norm_ptr,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, g_stride_t, g_stride_h, beta_stride_t, beta_stride_h,
    out_stride_t, out_stride_h,
    index_stride, num_tokens, num_sequences, null_index,
    HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    L2NORM: tl.constexpr, EXP_GATE: tl.constexpr, ZERO_PADDING: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, SOLVE_PRECISION: tl.constexpr, COLS: tl.constexpr,
    SEARCH: tl.constexpr,
):  # fmt: skip
    """One program: one chunk slot and one value head.

    Grid (num_slots * HV,), heads fastest. q and k are read COLS columns at a time. Slot s of a sequence (see
    `find_sequence`) gets m [slot, HV, 64, 64], p [slot, HV, 64, 64] (io dtype) and decay [slot, HV, 2, 64] fp32, which
    holds exp(G) and exp(G_last - G); with L2NORM also q_norm and k_norm [num_tokens, HK, K]. Rows past the sequence's
    end count as tokens with q = k = 0, g = 0, beta = 0. With ZERO_PADDING the rows of `out` that no sequence owns are
    zeroed here: those of padding sequences by their own slots, those past cu_seqlens[-1] by the slots behind the last.
    """
    i_p = tl.program_id(0)
    i_s = (i_p // HV).to(tl.int64)
    i_h = i_p % HV
    o_t = tl.arange(0, 64)
    o_v = tl.arange(0, V)

    end = tl.load(cu_seqlens_ptr + num_sequences).to(tl.int64)
    if i_s >= end // 64 + num_sequences:
        if ZERO_PADDING:
            o_row = end + (i_s - end // 64 - num_sequences) * 64 + o_t
            p_o = out_ptr + o_row[:, None] * out_stride_t + i_h * out_stride_h + o_v[None, :]
            tl.store(p_o, tl.zeros([64, V], dtype=out_ptr.dtype.element_ty), mask=(o_row < num_tokens)[:, None])
        return
    i_b = find_sequence(cu_seqlens_ptr, num_sequences, i_s, 64, SEARCH)
    if i_b < 0:
        return
    start = tl.load(cu_seqlens_ptr + i_b).to(tl.int64)
    stop = tl.load(cu_seqlens_ptr + i_b + 1).to(tl.int64)
    first = start + (i_s - start // 64 - i_b) * 64
    if first >= stop:
        return
    o_row = first + o_t
    m_t = o_row < stop
    if tl.load(state_indices_ptr + i_b.to(tl.int64) * index_stride) <= null_index:
        if ZERO_PADDING:
            p_o = out_ptr + o_row[:, None] * out_stride_t + i_h * out_stride_h + o_v[None, :]
            tl.store(p_o, tl.zeros([64, V], dtype=out_ptr.dtype.element_ty), mask=m_t[:, None])
        return

    num_rows = tl.minimum(stop - first, 64).to(tl.int32)
    i_hk = i_h // (HV // HK)
    p_k = k_ptr + first * k_stride_t + i_hk * k_stride_h
    p_q = q_ptr + first * q_stride_t + i_hk * q_stride_h
    if L2NORM:  # noqa: SIM102 - a compile-time condition
        if i_h % (HV // HK) == 0:
            p_kn = k_norm_ptr + (first * HK + i_hk) * K
            p_qn = q_norm_ptr + (first * HK + i_hk) * K
            for block in tl.static_range(4):
                normalize_rows(p_k, p_kn, k_stride_t, num_rows, block, HK, K, COLS)
                normalize_rows(p_q, p_qn, q_stride_t, num_rows, block, HK, K, COLS)

    # Before the decays: registers are what is short.
    b_00, b_10, b_11, b_20, b_21, b_22, b_30, b_31, b_32, b_33 = lower_products(
        p_q, q_stride_t, p_k, k_stride_t, num_rows, K, COLS, False, L2NORM, DOT, PRECISION
    )

    p_g = g_ptr + first * g_stride_t + i_h * g_stride_h
    b_hi0, b_lo0, hi0, lo0 = sum_gates(p_g, g_stride_t, num_rows, 0.0, 0.0, 0, EXP_GATE)
    b_hi1, b_lo1, hi1, lo1 = sum_gates(p_g, g_stride_t, num_rows, hi0, lo0, 1, EXP_GATE)
    b_hi2, b_lo2, hi2, lo2 = sum_gates(p_g, g_stride_t, num_rows, hi1, lo1, 2, EXP_GATE)
    b_hi3, b_lo3, hi3, lo3 = sum_gates(p_g, g_stride_t, num_rows, hi2, lo2, 3, EXP_GATE)
    i_w = i_s * HV + i_h
    o_i = tl.arange(0, 16)
    p_d = decay_ptr + i_w * 128 + o_i
    tl.store(p_d, tl.exp(b_hi0 + b_lo0))
    tl.store(p_d + 16, tl.exp(b_hi1 + b_lo1))
    tl.store(p_d + 32, tl.exp(b_hi2 + b_lo2))
    tl.store(p_d + 48, tl.exp(b_hi3 + b_lo3))
    # exp(G_last - G), which is also what row block 4 would have of its columns; and those of row blocks 1 to 3.
    tl.store(p_d + 64, tl.exp((hi3 - b_hi0) + (lo3 - b_lo0)))
    tl.store(p_d + 80, tl.exp((hi3 - b_hi1) + (lo3 - b_lo1)))
    tl.store(p_d + 96, tl.exp((hi3 - b_hi2) + (lo3 - b_lo2)))
    tl.store(p_d + 112, tl.exp((hi3 - b_hi3) + (lo3 - b_lo3)))
    b_c10 = tl.exp((hi0 - b_hi0) + (lo0 - b_lo0))[None, :]
    b_c20 = tl.exp((hi1 - b_hi0) + (lo1 - b_lo0))[None, :]
    b_c21 = tl.exp((hi1 - b_hi1) + (lo1 - b_lo1))[None, :]
    b_c30 = tl.exp((hi2 - b_hi0) + (lo2 - b_lo0))[None, :]
    b_c31 = tl.exp((hi2 - b_hi1) + (lo2 - b_lo1))[None, :]
    b_c32 = tl.exp((hi2 - b_hi2) + (lo2 - b_lo2))[None, :]
    b_r1 = tl.exp((b_hi1 - hi0) + (b_lo1 - lo0))[:, None]
    b_r2 = tl.exp((b_hi2 - hi1) + (b_lo2 - lo1))[:, None]
    b_r3 = tl.exp((b_hi3 - hi2) + (b_lo3 - lo2))[:, None]
    b_e0 = diagonal_decays(b_hi0, b_lo0)
    b_e1 = diagonal_decays(b_hi1, b_lo1)
    b_e2 = diagonal_decays(b_hi2, b_lo2)
    b_e3 = diagonal_decays(b_hi3, b_lo3)

    p_p = p_ptr + i_w * 4096
    p_m = m_ptr + i_w * 4096
    zero_above_diagonal(p_p)
    zero_above_diagonal(p_m)
    store_block(p_p, b_00 * b_e0, 0, 0)
    store_block(p_p, b_10 * b_r1 * b_c10, 1, 0)
    store_block(p_p, b_11 * b_e1, 1, 1)
    store_block(p_p, b_20 * b_r2 * b_c20, 2, 0)
    store_block(p_p, b_21 * b_r2 * b_c21, 2, 1)
    store_block(p_p, b_22 * b_e2, 2, 2)
    store_block(p_p, b_30 * b_r3 * b_c30, 3, 0)
    store_block(p_p, b_31 * b_r3 * b_c31, 3, 1)
    store_block(p_p, b_32 * b_r3 * b_c32, 3, 2)
    store_block(p_p, b_33 * b_e3, 3, 3)

    p_beta = beta_ptr + first * beta_stride_t + i_h * beta_stride_h
    b_b0 = tl.load(p_beta + o_i * beta_stride_t, mask=o_i < num_rows, other=0.0)
    b_b1 = tl.load(p_beta + (16 + o_i) * beta_stride_t, mask=16 + o_i < num_rows, other=0.0)
    b_b2 = tl.load(p_beta + (32 + o_i) * beta_stride_t, mask=32 + o_i < num_rows, other=0.0)
    b_b3 = tl.load(p_beta + (48 + o_i) * beta_stride_t, mask=48 + o_i < num_rows, other=0.0)
    b_00, b_10, b_11, b_20, b_21, b_22, b_30, b_31, b_32, b_33 = lower_products(
        p_k, k_stride_t, p_k, k_stride_t, num_rows, K, COLS, True, L2NORM, DOT, PRECISION
    )
    b_r1 *= b_b1[:, None]
    b_r2 *= b_b2[:, None]
    b_r3 *= b_b3[:, None]
    below = o_i[:, None] > o_i[None, :]
    b_m00 = invert_block(tl.where(below, b_00 * b_e0 * b_b0[:, None], 0.0), SOLVE_PRECISION)
    b_m11 = invert_block(tl.where(below, b_11 * b_e1 * b_b1[:, None], 0.0), SOLVE_PRECISION)
    b_m22 = invert_block(tl.where(below, b_22 * b_e2 * b_b2[:, None], 0.0), SOLVE_PRECISION)
    b_m33 = invert_block(tl.where(below, b_33 * b_e3 * b_b3[:, None], 0.0), SOLVE_PRECISION)
    # [[B11, 0], [A21, B22]] has the inverse [[B11^-1, 0], [-B22^-1 A21 B11^-1, B22^-1]]: from blocks of 16 to 32.
    b_t = tl.dot(b_10 * b_r1 * b_c10, b_m00, input_precision=SOLVE_PRECISION)
    b_m10 = -tl.dot(b_m11, b_t, input_precision=SOLVE_PRECISION)
    b_t = tl.dot(b_32 * b_r3 * b_c32, b_m22, input_precision=SOLVE_PRECISION)
    b_m32 = -tl.dot(b_m33, b_t, input_precision=SOLVE_PRECISION)
    # And from 32 to 64, block by block.
    b_20 = b_20 * b_r2 * b_c20
    b_21 = b_21 * b_r2 * b_c21
    b_30 = b_30 * b_r3 * b_c30
    b_31 = b_31 * b_r3 * b_c31
    b_t20 = tl.dot(b_20, b_m00, input_precision=SOLVE_PRECISION)
    b_t20 = -tl.dot(b_21, b_m10, acc=b_t20, input_precision=SOLVE_PRECISION)
    b_t21 = -tl.dot(b_21, b_m11, input_precision=SOLVE_PRECISION)
    b_t30 = tl.dot(b_30, b_m00, input_precision=SOLVE_PRECISION)
    b_t30 = -tl.dot(b_31, b_m10, acc=b_t30, input_precision=SOLVE_PRECISION)
    b_t31 = -tl.dot(b_31, b_m11, input_precision=SOLVE_PRECISION)
    b_m20 = tl.dot(b_m22, b_t20, input_precision=SOLVE_PRECISION)
    b_m21 = tl.dot(b_m22, b_t21, input_precision=SOLVE_PRECISION)
    b_m30 = tl.dot(b_m32, b_t20, input_precision=SOLVE_PRECISION)
    b_m30 = tl.dot(b_m33, b_t30, acc=b_m30, input_precision=SOLVE_PRECISION)
    b_m31 = tl.dot(b_m32, b_t21, input_precision=SOLVE_PRECISION)
    b_m31 = tl.dot(b_m33, b_t31, acc=b_m31, input_precision=SOLVE_PRECISION)

    store_block(p_m, b_m00 * b_b0[None, :], 0, 0)
    store_block(p_m, b_m10 * b_b0[None, :], 1, 0)
    store_block(p_m, b_m11 * b_b1[None, :], 1, 1)
    store_block(p_m, b_m20 * b_b0[None, :], 2, 0)
    store_block(p_m, b_m21 * b_b1[None, :], 2, 1)
    store_block(p_m, b_m22 * b_b2[None, :], 2, 2)
    store_block(p_m, b_m30 * b_b0[None, :], 3, 0)
    store_block(p_m, b_m31 * b_b1[None, :], 3, 1)
    store_block(p_m, b_m32 * b_b2[None, :], 3, 2)
    store_block(p_m, b_m33 * b_b3[None, :], 3, 3)
