"""The recurrence over chunks of the Triton prefill, the output with it, and its split over segments of a sequence.

A program holds BV rows of one head's state S [V, K] in fp32 registers and walks chunks of 64 tokens. With M, P,
exp(G) and exp(G_last - G) of the first launch (prefill_solve), everything transposed so that the state is always
the left operand of a dot and never leaves registers:

    R^T = V^T - (S K^T) diag(exp(G))
    D^T = R^T M^T
    O^T = scale * ((S Q^T) diag(exp(G)) + D^T P^T)
    S   = exp(G_last) S + (D^T diag(exp(G_last - G))) K

States between chunks are not written to memory unless checkpoints are asked for.

Few sequences x heads leave most of a GPU idle behind this chain. Then sequences are cut into segments of
`segment_chunks` chunks. A segment maps the state S before it to S Phi + H, and the same recurrence yields both: H from
a start of zero, Phi from a start of the identity with v = 0. One more launch computes them for all segments but each
sequence's last, in parallel; the programs of the last launch fold those before their own segment and go on from there.
Segment 0's start is known, so it needs no Phi; its rows keep a copy of the initial state instead, because the pool
row may already hold the final state when segment 0's program of the last launch comes to run.
"""

# ruff: noqa: RUF005 - Triton has no unpacking of tuples
from __future__ import annotations

import triton
import triton.language as tl

from gdn_plugin.ops._triton.prefill_solve import find_sequence


@triton.jit
def load_columns(p_first, mask, BLOCKS: tl.constexpr, BK: tl.constexpr):
    """BLOCKS tiles in fp32, BK columns apart, zero where masked off."""
    blocks = ()
    for j in tl.static_range(BLOCKS):
        blocks = blocks + (
            tl.load(p_first + j * BK, mask=mask, other=0.0 if mask is not None else None).to(tl.float32),
        )
    return blocks


@triton.jit
def dot_columns(b_s, p_first, mask, BLOCKS: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """The state times the transpose of rows that are loaded in BLOCKS tiles BK columns apart."""
    b_x = tl.load(p_first, mask=mask, other=0.0).to(DOT)
    b_o = tl.dot(b_s[0].to(DOT), tl.trans(b_x), input_precision=PRECISION)
    for j in tl.static_range(1, BLOCKS):
        b_x = tl.load(p_first + j * BK, mask=mask, other=0.0).to(DOT)
        b_o = tl.dot(b_s[j].to(DOT), tl.trans(b_x), acc=b_o, input_precision=PRECISION)
    return b_o


@triton.jit
def store_output(b_o, b_d, p_p, p_o, mask, scale, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """scale * (b_o + D^T P^T), transposed back to tokens."""
    b_p = tl.load(p_p).to(DOT)
    b_o = tl.dot(b_d.to(DOT), tl.trans(b_p), acc=b_o, input_precision=PRECISION) * scale
    tl.store(p_o, tl.trans(b_o).to(p_o.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["index_stride", "num_sequences", "null_index", "checkpoint_chunks", "segment_chunks"],
    do_not_specialize_on_alignment=[
        "cu_seqlens_ptr", "state_indices_ptr", "has_initial_ptr", "checkpoint_starts_ptr",
    ],
)  # fmt: skip
def prefill_state_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, state_ptr,
    state_indices_ptr, cu_seqlens_ptr, has_initial_ptr,
    m_ptr, p_ptr, decay_ptr, segments_ptr, checkpoints_ptr, checkpoint_starts_ptr,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, out_stride_t, out_stride_h,
    state_stride, checkpoint_stride,
    index_stride, num_sequences, null_index, checkpoint_chunks, segment_chunks, scale,
    HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
    TRANSITION: tl.constexpr, SAME_STRIDES: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    SEARCH: tl.constexpr,
):  # fmt: skip
    """One program: one sequence or segment of one, one value head, BV rows of its state; row blocks fastest.

    Without `segments_ptr`, grid (B * HV * V / BV,). Reads the state from pool row state_indices[b] (zeros where
    has_initial is False) and writes the final state back to it; writes the sequence's rows of `out`; with
    checkpoints, the state after every `checkpoint_chunks` chunks to rows from checkpoint_starts[b].
    With `segments_ptr` [slots, HV, V + max(K, V), K] fp32, grid (slots * HV * V / BV,): as above for one segment.
    TRANSITION: grid (slots * HV * (V + K) / BV,): fills the slots' rows, H above Phi, and writes nothing else.
    SAME_STRIDES: q has k's token stride and out has v's, which saves registers.
    BK: columns of the state a dot takes; K unless operands are fp32, whose halves for TF32 would not fit in registers.
    Empty and padding sequences and slots without a segment exit at once.
    """
    NV: tl.constexpr = V // BV
    BLOCKS: tl.constexpr = (V + K) // BV if TRANSITION else NV
    # The chain from state to state is the longest, so the output waits for it; fp32 operands leave no registers for
    # what that keeps alive.
    OUTPUT_FIRST: tl.constexpr = BK != K
    SEGMENT_SIZE: tl.constexpr = (V + (K if K > V else V)) * K
    i_p = tl.program_id(0)
    i_v = i_p % BLOCKS
    i_h = (i_p // BLOCKS) % HV
    i_s = (i_p // (BLOCKS * HV)).to(tl.int64)
    i_hk = i_h // (HV // HK)

    if segments_ptr is not None:
        i_b = find_sequence(cu_seqlens_ptr, num_sequences, i_s, segment_chunks * 64, SEARCH).to(tl.int64)
        if i_b < 0:
            return
    else:
        i_b = i_s
    start = tl.load(cu_seqlens_ptr + i_b).to(tl.int64)
    length = (tl.load(cu_seqlens_ptr + i_b + 1).to(tl.int64) - start).to(tl.int32)
    row = tl.load(state_indices_ptr + i_b * index_stride).to(tl.int64)
    if row <= null_index:
        return
    i_g = 0
    first_chunk = 0
    last_chunk = tl.cdiv(length, 64)
    if segments_ptr is not None:
        i_g = (i_s - start // (segment_chunks * 64) - i_b).to(tl.int32)
        first_chunk = i_g * segment_chunks
        last_chunk = tl.minimum(first_chunk + segment_chunks, last_chunk)
        if TRANSITION:  # noqa: SIM102 - a compile-time condition
            # The last segment leads nowhere, and segment 0 needs no Phi.
            if (last_chunk * 64 >= length) | ((i_g == 0) & (i_v >= NV)):
                return
    if first_chunk * 64 >= length:
        return

    o_t = tl.arange(0, 64)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    o_rows = o_v[:, None] * K + o_k[None, :]
    o_state = i_h * V * K + o_rows
    p_state = state_ptr + row * state_stride + o_state
    if segments_ptr is not None:
        tl.static_assert(BK == K, "segments are folded with whole rows of the state")
        p_segment = segments_ptr + ((i_s - i_g) * HV + i_h) * SEGMENT_SIZE
    # The state, in K // BK column blocks.
    if i_g == 0:
        if has_initial_ptr is not None:
            started = tl.load(has_initial_ptr + i_b).to(tl.int32)
            b_s = load_columns(p_state, o_state < started * (HV * V * K), K // BK, BK)
        else:
            b_s = load_columns(p_state, None, K // BK, BK)
        if segments_ptr is not None:
            if TRANSITION:
                tl.store(p_segment + V * K + o_rows, b_s[0])
            elif last_chunk * 64 < length:
                b_s = (tl.load(p_segment + V * K + o_rows),)
    else:
        if TRANSITION:
            b_s = (tl.where(o_v[:, None] - V == o_k[None, :], 1.0, 0.0),)
        elif segments_ptr is not None:
            b_fold = tl.load(p_segment + o_rows)
            o_phi = V * K + o_k[:, None] * K + o_k[None, :]
            for _ in tl.range(1, i_g, num_stages=1):
                p_segment += HV * SEGMENT_SIZE
                b_phi = tl.load(p_segment + o_phi)
                b_fold = tl.dot(b_fold, b_phi, acc=tl.load(p_segment + o_rows), input_precision=PRECISION)
            b_s = (b_fold,)
        else:
            b_s = (tl.zeros([BV, BK], dtype=tl.float32),) * (K // BK)

    # Only the scalar bases move from chunk to chunk and are 64-bit; offsets inside a chunk are shared by every turn.
    slot = start // 64 + i_b + first_chunk
    start += first_chunk * 64
    p_k = k_ptr + start * k_stride_t + i_hk * k_stride_h
    p_q = q_ptr + start * q_stride_t + i_hk * q_stride_h
    p_v = v_ptr + start * v_stride_t + i_h * v_stride_h
    p_o = out_ptr + start * out_stride_t + i_h * out_stride_h
    p_m = m_ptr + (slot * HV + i_h) * 4096
    p_p = p_ptr + (slot * HV + i_h) * 4096
    p_d = decay_ptr + (slot * HV + i_h) * 128
    o_kk = o_t[:, None] * k_stride_t + o_k[None, :]
    o_vv = o_t[:, None] * v_stride_t + o_v[None, :]
    o_q = o_kk if SAME_STRIDES else o_t[:, None] * q_stride_t + o_k[None, :]
    o_o = o_vv if SAME_STRIDES else o_t[:, None] * out_stride_t + o_v[None, :]
    o_m = o_t[:, None] * 64 + o_t[None, :]

    # Offsets hoisted out of the loop would be held in registers over all of it.
    for i in tl.range(first_chunk, last_chunk, disable_licm=OUTPUT_FIRST):
        m_t = i * 64 + o_t < length
        b_k = ()
        for j in tl.static_range(K // BK):
            b_k = b_k + (tl.load(p_k + j * BK + o_kk, mask=m_t[:, None], other=0.0).to(DOT),)
        if not OUTPUT_FIRST:
            b_m = tl.load(p_m + o_m).to(DOT)
        b_decay = tl.load(p_d + o_t)  # exp(G)
        if OUTPUT_FIRST:
            b_o = dot_columns(b_s, p_q + o_q, m_t[:, None], K // BK, BK, DOT, PRECISION) * b_decay[None, :]
        if TRANSITION:
            b_v = tl.load(p_v + o_vv, mask=m_t[:, None] & (o_v < V)[None, :], other=0.0)
        else:
            b_v = tl.load(p_v + o_vv, mask=m_t[:, None], other=0.0)
        b_v = tl.trans(b_v).to(tl.float32)
        b_r = tl.dot(b_s[0].to(DOT), tl.trans(b_k[0]), input_precision=PRECISION)
        for j in tl.static_range(1, K // BK):
            b_r = tl.dot(b_s[j].to(DOT), tl.trans(b_k[j]), acc=b_r, input_precision=PRECISION)
        b_r = b_v - b_r * b_decay[None, :]
        if not (TRANSITION or OUTPUT_FIRST):
            b_o = dot_columns(b_s, p_q + o_q, m_t[:, None], K // BK, BK, DOT, PRECISION) * b_decay[None, :]
        if OUTPUT_FIRST:
            b_m = tl.load(p_m + o_m).to(DOT)
        b_d = tl.dot(b_r.to(DOT), tl.trans(b_m), input_precision=PRECISION)
        if OUTPUT_FIRST:
            store_output(b_o, b_d, p_p + o_m, p_o + o_o, m_t[:, None], scale, DOT, PRECISION)
        # Loaded only here: held from the top, it would cost registers that a state of 128 columns does not leave.
        b_rest = tl.load(p_d + 64 + o_t)  # exp(G_last - G)
        b_w = (b_d * b_rest[None, :]).to(DOT)
        last = tl.load(p_d + 63)
        b_next = ()
        for j in tl.static_range(K // BK):
            if OUTPUT_FIRST:  # noqa: SIM108 - read again: all blocks from above would not fit in registers either
                b_kj = tl.load(p_k + j * BK + o_kk, mask=m_t[:, None], other=0.0).to(DOT)
            else:
                b_kj = b_k[j]
            b_next = b_next + (tl.dot(b_w, b_kj, acc=b_s[j] * last, input_precision=PRECISION),)
        b_s = b_next
        if not TRANSITION:
            if not OUTPUT_FIRST:
                store_output(b_o, b_d, p_p + o_m, p_o + o_o, m_t[:, None], scale, DOT, PRECISION)
            if checkpoints_ptr is not None:  # noqa: SIM102 - a compile-time condition
                if ((i + 1) % checkpoint_chunks == 0) & ((i + 1) * 64 <= length):
                    i_c = tl.load(checkpoint_starts_ptr + i_b).to(tl.int64) + (i + 1) // checkpoint_chunks - 1
                    p_check = checkpoints_ptr + i_c * checkpoint_stride + o_state
                    for j in tl.static_range(K // BK):
                        tl.store(p_check + j * BK, b_s[j].to(checkpoints_ptr.dtype.element_ty))
        p_k += k_stride_t * 64
        p_q += q_stride_t * 64
        p_v += v_stride_t * 64
        p_o += out_stride_t * 64
        p_m += HV * 4096
        p_p += HV * 4096
        p_d += HV * 128

    if TRANSITION:
        tl.store(segments_ptr + (i_s * HV + i_h) * SEGMENT_SIZE + o_rows, b_s[0])
    elif last_chunk * 64 >= length:
        for j in tl.static_range(K // BK):
            tl.store(p_state + j * BK, b_s[j].to(state_ptr.dtype.element_ty))
