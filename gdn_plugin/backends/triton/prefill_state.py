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

A token that is not finite spoils its chunk from the start: where M and P are zero the products above still see 0 * NaN.
But it spoils no row of the state that the recurrence does not spoil as well, and a spoilt row stays so. So a program
looks at its rows once, behind its last chunk, and where some are spoilt it goes through its tokens one by one, as
decode would, until those rows are: what that gives replaces their outputs. It is slow, and the price of the chunks
being left as they are; where all is finite it costs a load of the last token's output.
"""

# ruff: noqa: RUF005 - Triton has no unpacking of tuples
from __future__ import annotations

import triton
import triton.language as tl

from gdn_plugin.backends.triton.gates import delta_step
from gdn_plugin.backends.triton.launch import counted
from gdn_plugin.backends.triton.prefill_solve import find_sequence


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


@triton.jit
def start_state(
    p_state, p_has_initial, p_segment, i_b, i_g, is_copied, o_state, o_rows, o_identity, o_k,
    HV: tl.constexpr, V: tl.constexpr, K: tl.constexpr, SEGMENT_SIZE: tl.constexpr, BLOCKS: tl.constexpr,
    BK: tl.constexpr, TRANSITION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state before the first chunk of segment i_g, in BLOCKS column blocks.

    is_copied: the initial state is to be read from the sequence's first slot, where the transition left it.
    """
    if i_g == 0:
        if p_has_initial is not None:
            started = tl.load(p_has_initial + i_b).to(tl.int32)
            b_s = load_columns(p_state, o_state < started * (HV * V * K), BLOCKS, BK)
        else:
            b_s = load_columns(p_state, None, BLOCKS, BK)
        if p_segment is not None and not TRANSITION:  # noqa: SIM102 - a compile-time condition
            if is_copied:
                b_s = (tl.load(p_segment + V * K + o_rows),)
    else:
        if TRANSITION:
            b_s = (tl.where(o_identity[:, None] == o_k[None, :], 1.0, 0.0),)
        elif p_segment is not None:
            b_fold = tl.load(p_segment + o_rows)
            o_phi = V * K + o_k[:, None] * K + o_k[None, :]
            for _ in tl.range(1, i_g, num_stages=1):
                p_segment += HV * SEGMENT_SIZE
                b_phi = tl.load(p_segment + o_phi)
                b_fold = tl.dot(b_fold, b_phi, acc=tl.load(p_segment + o_rows), input_precision=PRECISION)
            b_s = (b_fold,)
        else:
            b_s = (tl.zeros([o_rows.shape[0], BK], dtype=tl.float32),) * BLOCKS
    return b_s


@triton.jit
def is_spoilt(b_x):
    return (tl.abs(b_x) < float("inf")) == 0


@counted
@triton.jit(
    do_not_specialize=["stride_g_t", "stride_g_h", "stride_beta_t", "stride_beta_h", "stride_indices", "num_sequences",
                       "null_index", "exp_gate", "checkpoint_chunks", "segment_chunks"],
    do_not_specialize_on_alignment=["p_g", "p_beta", "p_cu_seqlens", "p_indices", "p_has_initial",
                                    "p_checkpoint_starts"],
)  # fmt: skip
def prefill_state_kernel(
    p_q, p_k, p_v, p_g, p_beta, p_out, p_state,
    p_indices, p_cu_seqlens, p_has_initial,
    p_m, p_p, p_decay, p_segments, p_checkpoints, p_checkpoint_starts,
    stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_v_t, stride_v_h, stride_g_t, stride_g_h, stride_beta_t,
    stride_beta_h, stride_out_t, stride_out_h, stride_state, stride_checkpoints,
    stride_indices, num_sequences, null_index, exp_gate, checkpoint_chunks, segment_chunks, scale,
    HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
    TRANSITION: tl.constexpr, SAME_STRIDES: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    SEARCH: tl.constexpr,
):  # fmt: skip
    """One program: one sequence or segment of one, one value head, BV rows of its state; row blocks fastest.

    Without `p_segments`, grid (B * HV * V / BV,). Reads the state from pool row state_indices[b] (zeros where
    has_initial is False) and writes the final state back to it; writes the sequence's rows of `out`; with
    checkpoints, the state after every `checkpoint_chunks` chunks to rows from checkpoint_starts[b].
    With `p_segments` [slots, HV, V + max(K, V), K] fp32, grid (slots * HV * V / BV,): as above for one segment.
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

    if p_segments is not None:
        i_b = find_sequence(p_cu_seqlens, num_sequences, i_s, segment_chunks * 64, SEARCH).to(tl.int64)
        if i_b < 0:
            return
    else:
        i_b = i_s
    start = tl.load(p_cu_seqlens + i_b).to(tl.int64)
    length = (tl.load(p_cu_seqlens + i_b + 1).to(tl.int64) - start).to(tl.int32)
    row = tl.load(p_indices + i_b * stride_indices).to(tl.int64)
    if row <= null_index:
        return
    i_g = 0
    first_chunk = 0
    last_chunk = tl.cdiv(length, 64)
    if p_segments is not None:
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
    p_segment = None
    if p_segments is not None:
        tl.static_assert(BK == K, "segments are folded with whole rows of the state")
        p_segment = p_segments + ((i_s - i_g) * HV + i_h) * SEGMENT_SIZE
    is_copied = last_chunk * 64 < length
    # The state, in K // BK column blocks.
    b_s = start_state(
        p_state + row * stride_state + o_state, p_has_initial, p_segment, i_b, i_g, is_copied, o_state, o_rows, o_v - V,
        o_k, HV, V, K, SEGMENT_SIZE, K // BK, BK, TRANSITION, PRECISION,
    )  # fmt: skip
    if TRANSITION:  # noqa: SIM102 - a compile-time condition
        if i_g == 0:
            tl.store(p_segment + V * K + o_rows, b_s[0])

    # Only the scalar bases move from chunk to chunk and are 64-bit; offsets inside a chunk are shared by every turn.
    slot = start // 64 + i_b + first_chunk
    start += first_chunk * 64
    p_k_chunk = p_k + start * stride_k_t + i_hk * stride_k_h
    p_q_chunk = p_q + start * stride_q_t + i_hk * stride_q_h
    p_v_chunk = p_v + start * stride_v_t + i_h * stride_v_h
    p_out_chunk = p_out + start * stride_out_t + i_h * stride_out_h
    p_m += (slot * HV + i_h) * 4096
    p_p += (slot * HV + i_h) * 4096
    p_decay += (slot * HV + i_h) * 128
    o_kk = o_t[:, None] * stride_k_t + o_k[None, :]
    o_vv = o_t[:, None] * stride_v_t + o_v[None, :]
    o_q = o_kk if SAME_STRIDES else o_t[:, None] * stride_q_t + o_k[None, :]
    o_o = o_vv if SAME_STRIDES else o_t[:, None] * stride_out_t + o_v[None, :]
    o_m = o_t[:, None] * 64 + o_t[None, :]

    # Offsets hoisted out of the loop would be held in registers over all of it.
    for i in tl.range(first_chunk, last_chunk, disable_licm=OUTPUT_FIRST):
        m_t = i * 64 + o_t < length
        b_k = ()
        for j in tl.static_range(K // BK):
            b_k = b_k + (tl.load(p_k_chunk + j * BK + o_kk, mask=m_t[:, None], other=0.0).to(DOT),)
        if not OUTPUT_FIRST:
            b_m = tl.load(p_m + o_m).to(DOT)
        b_decay = tl.load(p_decay + o_t)  # exp(G)
        if OUTPUT_FIRST:
            b_o = dot_columns(b_s, p_q_chunk + o_q, m_t[:, None], K // BK, BK, DOT, PRECISION) * b_decay[None, :]
        if TRANSITION:
            b_v = tl.load(p_v_chunk + o_vv, mask=m_t[:, None] & (o_v < V)[None, :], other=0.0)
        else:
            b_v = tl.load(p_v_chunk + o_vv, mask=m_t[:, None], other=0.0)
        b_v = tl.trans(b_v).to(tl.float32)
        b_r = tl.dot(b_s[0].to(DOT), tl.trans(b_k[0]), input_precision=PRECISION)
        for j in tl.static_range(1, K // BK):
            b_r = tl.dot(b_s[j].to(DOT), tl.trans(b_k[j]), acc=b_r, input_precision=PRECISION)
        b_r = b_v - b_r * b_decay[None, :]
        if not (TRANSITION or OUTPUT_FIRST):
            b_o = dot_columns(b_s, p_q_chunk + o_q, m_t[:, None], K // BK, BK, DOT, PRECISION) * b_decay[None, :]
        if OUTPUT_FIRST:
            b_m = tl.load(p_m + o_m).to(DOT)
        b_d = tl.dot(b_r.to(DOT), tl.trans(b_m), input_precision=PRECISION)
        if OUTPUT_FIRST:
            store_output(b_o, b_d, p_p + o_m, p_out_chunk + o_o, m_t[:, None], scale, DOT, PRECISION)
        # Loaded only here: held from the top, it would cost registers that a state of 128 columns does not leave.
        b_rest = tl.load(p_decay + 64 + o_t)  # exp(G_last - G)
        b_w = (b_d * b_rest[None, :]).to(DOT)
        last = tl.load(p_decay + 63)
        b_next = ()
        for j in tl.static_range(K // BK):
            if OUTPUT_FIRST:  # noqa: SIM108 - read again: all blocks from above would not fit in registers either
                b_kj = tl.load(p_k_chunk + j * BK + o_kk, mask=m_t[:, None], other=0.0).to(DOT)
            else:
                b_kj = b_k[j]
            b_next = b_next + (tl.dot(b_w, b_kj, acc=b_s[j] * last, input_precision=PRECISION),)
        b_s = b_next
        if not TRANSITION:
            if not OUTPUT_FIRST:
                store_output(b_o, b_d, p_p + o_m, p_out_chunk + o_o, m_t[:, None], scale, DOT, PRECISION)
            if p_checkpoints is not None:  # noqa: SIM102 - a compile-time condition
                if ((i + 1) % checkpoint_chunks == 0) & ((i + 1) * 64 <= length):
                    i_c = tl.load(p_checkpoint_starts + i_b).to(tl.int64) + (i + 1) // checkpoint_chunks - 1
                    p_check = p_checkpoints + i_c * stride_checkpoints + o_state
                    for j in tl.static_range(K // BK):
                        tl.store(p_check + j * BK, b_s[j].to(p_checkpoints.dtype.element_ty))
        p_k_chunk += stride_k_t * 64
        p_q_chunk += stride_q_t * 64
        p_v_chunk += stride_v_t * 64
        p_out_chunk += stride_out_t * 64
        p_m += HV * 4096
        p_p += HV * 4096
        p_decay += HV * 128

    if TRANSITION:
        tl.store(p_segments + (i_s * HV + i_h) * SEGMENT_SIZE + o_rows, b_s[0])
    else:
        num_tokens = tl.minimum(last_chunk * 64, length) - first_chunk * 64
        # Asked for again: kept, they and what is made of them would take registers from the loop above.
        row = tl.load(p_indices + i_b * stride_indices).to(tl.int64)
        start = tl.load(p_cu_seqlens + i_b).to(tl.int64) + first_chunk * 64
        p_state += row * stride_state + i_h * V * K
        p_out += start * stride_out_t + i_h * stride_out_h
        p_last = p_out + (num_tokens - 1) * stride_out_t
        # Rows of the state that are spoilt have spoilt the last output. (And the last query spoils it alone: then this
        # goes through all tokens in vain.) The pool keeps what such rows were until they have been rewritten.
        tl.debug_barrier()
        b_spoilt = is_spoilt(tl.load(p_last + o_v).to(tl.float32))
        is_end = last_chunk * 64 >= length
        if is_end:
            for j in tl.static_range(K // BK):
                b_done = b_s[j].to(p_state.dtype.element_ty)
                tl.store(p_state + o_rows + j * BK, b_done, mask=b_spoilt[:, None] == 0)
        if tl.max(b_spoilt.to(tl.int32), axis=0) != 0:
            # Few rows at a time and one loop for rows and tokens: a nest of two takes registers from the loop above.
            ROWS: tl.constexpr = BV if BV < 32 else 32
            o_kf = tl.arange(0, K)
            p_q += start * stride_q_t + i_hk * stride_q_h
            p_k += start * stride_k_t + i_hk * stride_k_h
            p_v += start * stride_v_t + i_h * stride_v_h
            p_g += start * stride_g_t + i_h * stride_g_h
            p_beta += start * stride_beta_t + i_h * stride_beta_h
            b_rows = tl.zeros([ROWS], dtype=tl.int1)
            b_sf = tl.zeros([ROWS, K], dtype=tl.float32)
            first_row = 0
            i_t = 0
            while first_row < BV:
                o_vf = i_v * BV + first_row + tl.arange(0, ROWS)
                o_rows_f = o_vf[:, None] * K + o_kf[None, :]
                if i_t == 0:
                    b_rows = is_spoilt(tl.load(p_last + o_vf).to(tl.float32))
                    b_start = start_state(
                        p_state + o_rows_f, p_has_initial, p_segment, i_b, i_g, is_end == 0, i_h * V * K + o_rows_f,
                        o_rows_f, o_vf, o_kf, HV, V, K, SEGMENT_SIZE, 1, K, False, PRECISION,
                    )  # fmt: skip
                    b_sf = b_start[0]
                    tl.debug_barrier()  # All threads have read the last output before any of them rewrites it.
                i_tf = i_t.to(tl.int64)
                b_qf = tl.load(p_q + i_tf * stride_q_t + o_kf).to(tl.float32)
                b_kf = tl.load(p_k + i_tf * stride_k_t + o_kf).to(tl.float32)
                b_vf = tl.load(p_v + i_tf * stride_v_t + o_vf).to(tl.float32)
                g = tl.load(p_g + i_tf * stride_g_t)
                beta = tl.load(p_beta + i_tf * stride_beta_t)
                decay = tl.where(exp_gate != 0, g, tl.exp(g))
                b_sf, b_of = delta_step(b_sf, b_qf, b_kf, b_vf, decay, beta, scale)
                tl.store(p_out + i_tf * stride_out_t + o_vf, b_of.to(p_out.dtype.element_ty), mask=b_rows)
                # A token spoils a row as a whole: its first column tells.
                b_fine = is_spoilt(tl.sum(tl.where(o_kf[None, :] == 0, b_sf, 0.0), axis=1)) == 0
                i_t += 1
                if (tl.max((b_rows & b_fine).to(tl.int32), axis=0) == 0) | (i_t >= num_tokens):
                    if is_end:
                        tl.store(p_state + o_rows_f, b_sf.to(p_state.dtype.element_ty), mask=b_rows[:, None])
                    first_row += ROWS
                    i_t = 0
