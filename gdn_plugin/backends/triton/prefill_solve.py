"""First launch of the Triton prefill: everything of a chunk that does not depend on the state.

With G_i the sum of log decays g up to and including token i of a chunk of 64, and for i >= j

    A_ij = beta_i * exp(G_i - G_j) * (k_i . k_j)      (strictly lower)
    M    = (I + A)^-1 * diag(beta)
    P_ij = exp(G_i - G_j) * (q_i . k_j)               (lower)

the new values of the chunk are D = M (V - diag(exp(G)) K S^T) and its output is
scale * (diag(exp(G)) Q S^T + P D) (Yang et al., arXiv:2412.06464, sec. 3.3, with the inverse applied to the
residual instead of to V and K apart: the difference is taken in fp32 before anything is rounded, which is
what keeps strongly correlated keys accurate, and 16 KiB a chunk and head is written instead of 40).

The inverse is built of inverses of diagonal blocks, exactly, not as a power series: from blocks of 1 to 64 by six
doublings, which is as stable as substitution and far shorter than 63 rows in turn. Exponents are only ever taken of
G_i - G_j with i >= j, so nothing overflows however strong the decay.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gdn_plugin.backends.triton.launch import counted

CHUNK = tl.constexpr(64)
# exp(-100) is zero in fp32 for any purpose here; a bound keeps sums of logs of a zero decay finite and precise.
LOG_DECAY_MIN = tl.constexpr(-100.0)


@triton.jit
def find_sequence(p_cu_seqlens, num_sequences, slot, size, BLOCK: tl.constexpr):
    """Sequence whose run of slots holds `slot`, a slot being `size` tokens; -1 before the first.

    Sequence b owns the slots from cu_seqlens[b] // size + b: its ceil(L / size) pieces always fit below the next
    sequence's first slot, so no prefix sum over the lengths is needed and T // size + B slots hold any packing.
    """
    count = tl.zeros([BLOCK], dtype=tl.int32)
    for first in range(0, num_sequences, BLOCK):
        o_b = first + tl.arange(0, BLOCK)
        b_first = tl.load(p_cu_seqlens + o_b, mask=o_b < num_sequences, other=0).to(tl.int64) // size + o_b
        count += ((b_first <= slot) & (o_b < num_sequences)).to(tl.int32)
    return tl.sum(count, axis=0) - 1


@triton.jit
def invert_unit_lower(b_a, PRECISION: tl.constexpr):
    """Blocks (top left, bottom left, bottom right), each [32, 32], of (I + A)^-1; A [64, 64] strictly lower fp32.

    A block [[B11, 0], [A21, B22]] of unit lower triangular matrices has the inverse
    [[B11^-1, 0], [-B22^-1 A21 B11^-1, B22^-1]]; from blocks of 1 up to 64, by doubling.
    """
    # Blocks of 2 to 16, on the four diagonal blocks of 16 at once. With D the inverses of the blocks of s and L the
    # lower left quarters of the blocks of 2 s, the step is D - D L D.
    b_blocks = tl.reshape(b_a, (4, 16, 4, 16))
    o_rb = tl.arange(0, 4)[:, None, None, None]
    o_cb = tl.arange(0, 4)[None, None, :, None]
    b_e = tl.sum(tl.where(o_rb == o_cb, b_blocks, 0.0), axis=2)
    o_r = tl.arange(0, 16)[None, :, None]
    o_c = tl.arange(0, 16)[None, None, :]
    # Rows and columns that share a block of 2 s and not one of s, below the diagonal: A is strictly lower.
    b_d = tl.where(o_r == o_c, 1.0, tl.where((o_r // 2) == (o_c // 2), -b_e, 0.0))
    for level in tl.static_range(1, 4):
        b_l = tl.where(((o_r >> (level + 1)) == (o_c >> (level + 1))) & ((o_r >> level) != (o_c >> level)), b_e, 0.0)
        b_l = tl.dot(b_d, b_l, input_precision=PRECISION)
        b_d -= tl.dot(b_l, b_d, input_precision=PRECISION)

    b_tl, b_br = tl.split(tl.permute(tl.reshape(b_d, (2, 2, 16, 16)), (0, 2, 3, 1)))
    b_bl = tl.sum(tl.where((o_rb % 2 == 1) & (o_cb == o_rb - 1), b_blocks, 0.0), axis=2)
    b_bl = tl.sum(tl.reshape(b_bl, (2, 2, 16, 16)), axis=1)
    b_bl = -tl.dot(tl.dot(b_br, b_bl, input_precision=PRECISION), b_tl, input_precision=PRECISION)
    b_d = tl.join(tl.join(b_tl, tl.zeros_like(b_tl)), tl.join(b_bl, b_br))  # [2, r, c, column half, row half]
    b_d = tl.reshape(tl.permute(b_d, (0, 4, 1, 3, 2)), (2, 32, 32))

    b_tl, b_br = tl.split(tl.permute(b_d, (1, 2, 0)))
    b_left, _ = tl.split(tl.permute(tl.reshape(b_a, (2, 32, 2, 32)), (0, 1, 3, 2)))
    _, b_bl = tl.split(tl.permute(b_left, (1, 2, 0)))
    b_bl = -tl.dot(tl.dot(b_br, b_bl, input_precision=PRECISION), b_tl, input_precision=PRECISION)
    return b_tl, b_bl, b_br


@counted
@triton.jit(
    do_not_specialize=["num_tokens", "num_sequences", "null_index", "stride_g_t", "stride_g_h", "stride_beta_t",
                       "stride_beta_h", "stride_indices", "exp_gate", "zero_padding"],
    do_not_specialize_on_alignment=["p_g", "p_beta", "p_cu_seqlens", "p_indices"],
)  # fmt: skip
def prefill_solve_kernel(
    p_q, p_k, p_g, p_beta, p_out,
    p_indices, p_cu_seqlens,
    p_m, p_p, p_decay, p_q_norm, p_k_norm,
    stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_g_t, stride_g_h, stride_beta_t, stride_beta_h,
    stride_out_t, stride_out_h,
    stride_indices, num_tokens, num_sequences, null_index, exp_gate, zero_padding,
    HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, HEADS: tl.constexpr,
    L2NORM: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, SOLVE_PRECISION: tl.constexpr,
    SEARCH: tl.constexpr,
):  # fmt: skip
    """One program: one chunk slot and HEADS value heads of one key head.

    Grid (num_slots * HV / HEADS,), heads fastest. Slot s of sequence b (see `find_sequence`) gets
    m [slot, HV, 64, 64], p [slot, HV, 64, 64] (io dtype) and decay [slot, HV, 2, 64] fp32, which holds exp(G) and
    exp(G_last - G); with L2NORM also q_norm and k_norm [num_tokens, HK, K]. Rows past the sequence's end count as
    tokens with q = k = 0, g = 0, beta = 0. With zero_padding the rows of `out` that no sequence owns are zeroed
    here: those of padding sequences by their own slots, those past cu_seqlens[-1] by the slots behind the last.
    """
    GROUPS: tl.constexpr = HV // HEADS
    i_p = tl.program_id(0)
    i_s = (i_p // GROUPS).to(tl.int64)
    i_h0 = (i_p % GROUPS) * HEADS
    o_t = tl.arange(0, 64)
    o_v = tl.arange(0, V)

    end = tl.load(p_cu_seqlens + num_sequences).to(tl.int64)
    if i_s >= end // 64 + num_sequences:
        if zero_padding != 0:
            o_row = end + (i_s - end // 64 - num_sequences) * 64 + o_t
            for i in range(HEADS):
                p_o = p_out + o_row[:, None] * stride_out_t + (i_h0 + i) * stride_out_h + o_v[None, :]
                tl.store(p_o, tl.zeros([64, V], dtype=p_out.dtype.element_ty), mask=(o_row < num_tokens)[:, None])
        return
    i_b = find_sequence(p_cu_seqlens, num_sequences, i_s, 64, SEARCH)
    if i_b < 0:
        return
    start = tl.load(p_cu_seqlens + i_b).to(tl.int64)
    stop = tl.load(p_cu_seqlens + i_b + 1).to(tl.int64)
    first = start + (i_s - start // 64 - i_b) * 64
    if first >= stop:
        return
    o_row = first + o_t
    m_t = o_row < stop
    if tl.load(p_indices + i_b.to(tl.int64) * stride_indices) <= null_index:
        if zero_padding != 0:
            for i in range(HEADS):
                p_o = p_out + o_row[:, None] * stride_out_t + (i_h0 + i) * stride_out_h + o_v[None, :]
                tl.store(p_o, tl.zeros([64, V], dtype=p_out.dtype.element_ty), mask=m_t[:, None])
        return

    # BK columns at a time: whole rows of q and k beside the products of both are more than registers hold in fp32.
    o_k = tl.arange(0, BK)
    i_hk = i_h0 // (HV // HK)
    p_k += o_row[:, None] * stride_k_t + i_hk * stride_k_h + o_k[None, :]
    p_q += o_row[:, None] * stride_q_t + i_hk * stride_q_h + o_k[None, :]
    if L2NORM:
        b_sk = tl.zeros([64], dtype=tl.float32)
        b_sq = tl.zeros([64], dtype=tl.float32)
        for i_k in tl.range(0, K, BK, num_stages=1):
            b_kf = tl.load(p_k + i_k, mask=m_t[:, None], other=0.0).to(tl.float32)
            b_qf = tl.load(p_q + i_k, mask=m_t[:, None], other=0.0).to(tl.float32)
            b_sk += tl.sum(b_kf * b_kf, axis=1)
            b_sq += tl.sum(b_qf * b_qf, axis=1)
        b_sk = tl.rsqrt(b_sk + 1e-6)
        b_sq = tl.rsqrt(b_sq + 1e-6)
    b_kk = tl.zeros([64, 64], dtype=tl.float32)
    b_qk = tl.zeros([64, 64], dtype=tl.float32)
    for i_k in tl.range(0, K, BK, num_stages=1):
        b_k = tl.load(p_k + i_k, mask=m_t[:, None], other=0.0)
        b_q = tl.load(p_q + i_k, mask=m_t[:, None], other=0.0)
        if L2NORM:
            b_k = (b_k.to(tl.float32) * b_sk[:, None]).to(p_k.dtype.element_ty)
            b_q = (b_q.to(tl.float32) * b_sq[:, None]).to(p_q.dtype.element_ty)
            if i_h0 % (HV // HK) == 0:
                o_n = o_row[:, None] * (HK * K) + i_hk * K + i_k + o_k[None, :]
                tl.store(p_k_norm + o_n, b_k, mask=m_t[:, None])
                tl.store(p_q_norm + o_n, b_q, mask=m_t[:, None])
        b_k = b_k.to(DOT)
        b_kk = tl.dot(b_k, tl.trans(b_k), acc=b_kk, input_precision=PRECISION)
        b_qk = tl.dot(b_q.to(DOT), tl.trans(b_k), acc=b_qk, input_precision=PRECISION)

    o_i = tl.arange(0, 32)
    for i in range(HEADS):
        i_h = i_h0 + i
        b_g = tl.load(p_g + o_row * stride_g_t + i_h * stride_g_h, mask=m_t, other=0.0)
        b_g = tl.where((exp_gate != 0) & m_t, tl.log(b_g), b_g)
        b_g = tl.maximum(b_g, LOG_DECAY_MIN, propagate_nan=tl.PropagateNan.ALL)
        # A strong decay followed by mild ones leaves differences of large sums: multiples of 1/64 add up exactly,
        # and what is left of each g adds up to at most 1.
        b_hi = tl.floor(b_g * 64.0) * 0.015625
        b_lo = b_g - b_hi
        hi_last = tl.sum(b_hi, axis=0)
        lo_last = tl.sum(b_lo, axis=0)
        b_hi = tl.cumsum(b_hi, axis=0)
        b_lo = tl.cumsum(b_lo, axis=0)
        i_w = i_s * HV + i_h
        tl.store(p_decay + i_w * 128 + o_t, tl.exp(b_hi + b_lo))
        tl.store(p_decay + i_w * 128 + 64 + o_t, tl.exp((hi_last - b_hi) + (lo_last - b_lo)))

        b_beta = tl.load(p_beta + o_row * stride_beta_t + i_h * stride_beta_h, mask=m_t, other=0.0)
        b_diff = (b_hi[:, None] - b_hi[None, :]) + (b_lo[:, None] - b_lo[None, :])
        b_ratio = tl.exp(tl.where(o_t[:, None] >= o_t[None, :], b_diff, float("-inf")))
        o_m = o_t[:, None] * 64 + o_t[None, :]
        tl.store(p_p + i_w * 4096 + o_m, (b_qk * b_ratio).to(p_p.dtype.element_ty))

        b_a = tl.where(o_t[:, None] > o_t[None, :], b_kk * b_ratio * b_beta[:, None], 0.0)
        b_tl, b_bl, b_br = invert_unit_lower(b_a, SOLVE_PRECISION)
        o_l = first + o_i
        o_h = first + 32 + o_i
        b_beta_l = tl.load(p_beta + o_l * stride_beta_t + i_h * stride_beta_h, mask=o_l < stop, other=0.0)
        b_beta_h = tl.load(p_beta + o_h * stride_beta_t + i_h * stride_beta_h, mask=o_h < stop, other=0.0)
        p_block = p_m + i_w * 4096 + o_i[:, None] * 64 + o_i[None, :]
        tl.store(p_block, (b_tl * b_beta_l[None, :]).to(p_m.dtype.element_ty))
        tl.store(p_block + 32, tl.zeros([32, 32], dtype=p_m.dtype.element_ty))
        tl.store(p_block + 32 * 64, (b_bl * b_beta_l[None, :]).to(p_m.dtype.element_ty))
        tl.store(p_block + 32 * 65, (b_br * b_beta_h[None, :]).to(p_m.dtype.element_ty))
