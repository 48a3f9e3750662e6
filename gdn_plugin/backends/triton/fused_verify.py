"""fused_verify: the whole step of speculative tokens in one launch: conv, gates, L2 norm, recurrence, gated RMSNorm.

A program owns BV rows of one value head's state for one sequence, as in `verify`, and walks that sequence's tokens with
the tile in registers. It works out the convolution of that head's q and k and of its own BV channels of v itself, a
token at a time, from a window of the last W-1 inputs that it also keeps in registers.

What is shared between programs, and who writes it (the plan of `fused_decode`, for a window that moves):

- conv_state of a key head's q and k is read by all programs of the group of Hv/Hk value heads that share it: columns
  n-1..n+W-3, n tokens having been accepted. Columns 0..W-3+L are written, L tokens having come, and the two overlap.
  Each program reads the columns once, before its first token, and uses every one of them for that token, so that the
  read is over when the program passes the barrier in front of its ticket. The program that draws the group's last
  ticket writes all columns, after its ticket: every read by another program comes before that program's release, which
  the last one has acquired. Nobody waits: a program that is not last just ends.
- The channels of v belong to one program, which reads them at the start and writes them behind the same barrier.
- The RMSNorm needs a head's whole V: parts of `out` are stored as they come, and the last program normalises the
  group's rows of all tokens. Where V = BV the norm is done in registers.
- State rows: a program reads its (head, tile) of the start row before it writes any row, and no other program reads or
  writes that (head, tile) of any of the sequence's rows.
- mixed_qkv, z, a and b are nobody's to write, so the new columns are read there again by whoever stores them.

A padding sequence and an empty one draw no tickets: all programs of a group see the same row numbers and offsets. A
fresh sequence (has_initial_state False) reads neither pool. Counters are those of `fused_decode`, which says how they
are kept.

What it must move, B sequences of L tokens, i bytes an element of tokens and conv_state, s of the state:
    state     B * (1 + L) * Hv*V*K * s
    tokens    B * L * (dim + 2*Hv*V) * i            mixed_qkv and z in, out out
    history   B * dim * ((W-1) + (W-2+L)) * i
At B = 64, L = 4, Hk 16, Hv 32, K = V = 128 and 2 bytes: 336 + 8 + 9 = 353 MB, 105 us at 3.35 TB/s. In three launches
the parts move q, k, v, out, g and beta once more each way. As written the programs request 411 MB: a group's Hv/Hk *
V/BV programs (8 there, BV = 32) each read the key head's (L + W) * 2*K inputs and history and W * 2*K weights, from L1
or L2 all but once; `out` makes one more round trip through L2 for the norm. Operations: 7 a state element and token,
0.94 GFLOP there, and 2*W a channel and token for the convolution, 0.02, the one of q and k once a program. A token's
inputs are asked for while the token before is worked on, and its state is stored while the next one is.
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
from gdn_plugin.backends.triton.launch import any_flags, compile_count, counted, device_sm, launch
from gdn_plugin.backends.triton.staged import NO_RING, Staging, Stagings, staged_kernel, step_options
from gdn_plugin.backends.triton.variants import KernelVariant, fused_forms, variants_of
from gdn_plugin.backends.triton.workspace import counters
from gdn_plugin.registry import BackendOp, Platform, Problem

ROWS = 8  # what the tail of a sequence handles at a time: new columns of conv_state, and rows of `out` to normalise


@triton.jit
def conv_inputs(p_weight, p_bias, p_history, o_c, readable, stride_w_c, stride_w_t, stride_cs_c, stride_cs_w,
                W: tl.constexpr):  # fmt: skip
    """(the W taps of channels o_c, their bias, the W-1 inputs from column p_history on, oldest first), all fp32.

    Channels from `readable` on have zeros for a history.
    """
    taps = ()
    window = ()
    for i in tl.static_range(W):
        taps = taps + (tl.load(p_weight + o_c * stride_w_c + i * stride_w_t).to(tl.float32),)
    for i in tl.static_range(W - 1):
        b_old = tl.load(p_history + o_c * stride_cs_c + i * stride_cs_w, mask=o_c < readable, other=0.0)
        window = window + (b_old.to(tl.float32),)
    b_bias = tl.zeros_like(taps[0])
    if p_bias is not None:
        b_bias = tl.load(p_bias + o_c).to(tl.float32)
    return taps, b_bias, window


@triton.jit
def convolve(b_x, window, taps, b_bias, dtype: tl.constexpr, W: tl.constexpr):
    """(conv and SiLU of the token b_x behind `window`, rounded to the io dtype; the window that ends with it)."""
    b_x = b_x.to(tl.float32)
    b_acc = b_bias + b_x * taps[W - 1]
    moved = ()
    for i in tl.static_range(W - 1):
        b_acc += window[i] * taps[i]
        if i > 0:
            moved = moved + (window[i],)
    return round_to(silu(b_acc), dtype), moved + (b_x,)


@triton.jit
def store_history(p_conv_state, p_x, o_x, o_c, window, length, stride_x, stride_cs_c, stride_cs_w,
                  W: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """Columns 0..W-3 become the last W-2 inputs of `window`, those behind them the sequence's `length` tokens.

    o_x: where the inputs of channels o_c are from p_x, the first token, on.
    """
    for i in tl.static_range(W - 2):
        tl.store(p_conv_state + o_c * stride_cs_c + i * stride_cs_w, window[i + 1].to(p_conv_state.dtype.element_ty))
    p_conv_state += (W - 2) * stride_cs_w
    for i in range(0, length, ROWS):
        o_t = (i + tl.arange(0, ROWS))[:, None]
        b_x = tl.load(p_x + o_t * stride_x + o_x[None, :], mask=o_t < length, other=0.0)
        p_new = p_conv_state + o_c[None, :] * stride_cs_c + o_t * stride_cs_w
        tl.store(p_new, b_x.to(tl.float32).to(p_conv_state.dtype.element_ty), mask=o_t < length)


@triton.jit
def normalise_parts(p_out, p_z, p_norm_weight, length, stride_out_t, stride_out_h, stride_z_t, stride_z_h, eps,
                    is_sigmoid, V: tl.constexpr, RATIO: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """The gated norm of a group's `length` tokens in place, from p_out and p_z on, whose parts others stored."""
    o_f = tl.arange(0, V)
    b_weight = tl.load(p_norm_weight + o_f).to(tl.float32)[None, :]
    for i in range(0, length * RATIO, ROWS):
        o_r = i + tl.arange(0, ROWS)  # (token, value head of the group)
        o_t = (o_r // RATIO)[:, None]
        o_h = (o_r % RATIO)[:, None]
        mask = (o_r < length * RATIO)[:, None]
        b_z = tl.load(p_z + o_t * stride_z_t + o_h * stride_z_h + o_f[None, :], mask=mask, other=0.0)
        p_part = p_out + o_t * stride_out_t + o_h * stride_out_h + o_f[None, :]
        # .cg: from L2, where the other programs' stores are
        b_part = tl.load(p_part, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
        b_y = rms_norm_gated(b_part, b_z.to(tl.float32), b_weight, V, eps, is_sigmoid)
        tl.store(p_part, b_y.to(p_out.dtype.element_ty), mask=mask)


@counted
@triton.jit(
    do_not_specialize=["stride_w_c", "stride_w_t", "stride_cs_n", "stride_cs_c", "stride_cs_w", "stride_a_t",
                       "stride_a_k", "stride_a_h", "stride_b_t", "stride_b_k", "stride_b_h", "stride_indices",
                       "stride_start", "has_start", "has_initial", "num_sequences", "num_tokens", "num_slots",
                       "num_k_heads", "null_index", "is_sigmoid", "zero_padding"],
    do_not_specialize_on_alignment=["p_a", "p_b", "p_A_log", "p_dt_bias", "p_indices", "p_accepted", "p_start",
                                    "p_cu_seqlens", "p_initial", "p_weight", "p_bias", "p_conv_state", "p_counters"],
)  # fmt: skip
def fused_verify_kernel(
    p_x, p_weight, p_bias, p_conv_state, p_a, p_b, p_A_log, p_dt_bias, p_state, p_indices, p_accepted, p_start,
    p_cu_seqlens, p_initial, p_z, p_norm_weight, p_out, p_counters,
    stride_x, stride_x_k, stride_x_v, first_k, first_v, stride_w_c, stride_w_t, stride_cs_n, stride_cs_c, stride_cs_w,
    stride_a_t, stride_a_k, stride_a_h, stride_b_t, stride_b_k, stride_b_h, stride_state, stride_indices, stride_start,
    stride_z_t, stride_z_k, stride_z_h, stride_out_t, stride_out_h,
    has_start, has_initial, scale, eps, num_sequences, num_tokens, num_slots, num_k_heads, null_index, is_sigmoid,
    zero_padding,
    K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, RATIO: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    NV: tl.constexpr = V // BV
    NORM: tl.constexpr = p_z is not None
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

    # Under zero_padding the grid has one sequence more: the tokens past cu_seqlens[-1].
    start = tl.load(p_cu_seqlens + i_b).to(tl.int64)
    end = num_tokens.to(tl.int64)
    row = null_index.to(tl.int64)  # of the state to start from
    first_row = row  # of conv_state
    first_column = row
    fresh = False
    if i_b < num_sequences:
        end = tl.load(p_cu_seqlens + i_b + 1).to(tl.int64)
        if start < end:
            first_row = tl.load(p_indices + i_b * stride_indices).to(tl.int64)
            # Start rows are the table itself, or a table of one column; has_initial_state, if absent, any bytes.
            fresh = (has_initial != 0) & (tl.load(p_initial + i_b).to(tl.int32) == 0)
            first_column = tl.maximum(tl.load(p_accepted + i_b).to(tl.int64) - 1, 0)
            # What nobody starts from is not looked up: its number may be anything.
            own = fresh | (first_row <= null_index)
            i_start = tl.where(own | (has_start != 0), 0, first_column)
            row = tl.where(own, first_row, tl.load(p_start + i_b * stride_start + i_start).to(tl.int64))
    p_out += start * stride_out_t
    length = end - start
    if row <= null_index:
        if zero_padding != 0:
            for i_t in range(length):
                p_o = p_out + i_t * stride_out_t + i_h * stride_out_h + o_v
                tl.store(p_o, tl.zeros([BV], dtype=tl.float32).to(p_out.dtype.element_ty))
        return

    p_state += i_h * (V * K) + i_v * (BV * K)
    o_s = tl.arange(0, BV)[:, None] * K + o_k[None, :]
    # A scalar flag itself the interpreter rejects as a mask.
    m_s = (o_v < tl.where(fresh, 0, V))[:, None]
    b_s = tl.load(p_state + row * stride_state + o_s, mask=m_s, other=0.0).to(tl.float32)
    A_log = tl.load(p_A_log + i_h).to(tl.float32)
    dt_bias = tl.load(p_dt_bias + i_h).to(tl.float32)
    p_x += start * stride_x
    p_a += start * stride_a_t + i_hk * stride_a_k + i_r * stride_a_h
    p_b += start * stride_b_t + i_hk * stride_b_k + i_r * stride_b_h
    p_indices += i_b * stride_indices
    p_conv_state += first_row * stride_cs_n
    p_history = p_conv_state + first_column * stride_cs_w
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
    target = null_index.to(tl.int64)  # the row of the token before
    for i_t in range(length):
        # The next token's inputs are asked for before anything is stored: the compiler may not move loads above
        # stores, and their latency would otherwise be paid once a token.
        i_next = tl.minimum(i_t + 1, length - 1)
        x_q_next = tl.load(p_x + i_next * stride_x + o_xq)
        x_k_next = tl.load(p_x + i_next * stride_x + o_xk)
        x_v_next = tl.load(p_x + i_next * stride_x + o_xv)
        a_next = tl.load(p_a + i_next * stride_a_t)
        b_next = tl.load(p_b + i_next * stride_b_t)
        target_next = tl.load(p_indices + i_t, mask=i_t < num_slots, other=null_index).to(tl.int64)
        if NORM and NV == 1:
            b_z = tl.load(p_z + (start + i_t) * stride_z_t + i_hk * stride_z_k + i_r * stride_z_h + o_v)
        if target > null_index:
            tl.store(p_state + target * stride_state + o_s, b_s.to(p_state.dtype.element_ty))
        b_q, window_q = convolve(x_q, window_q, taps_q, bias_q, IO, W)
        b_k, window_k = convolve(x_k, window_k, taps_k, bias_k, IO, W)
        b_v, window_v = convolve(x_v, window_v, taps_v, bias_v, IO, W)
        b_q = l2_normalise(b_q, IO)
        b_k = l2_normalise(b_k, IO)
        decay = tl.exp(log_decay(a.to(tl.float32), A_log, dt_bias))
        b_s, b_o = delta_step(b_s, b_q, b_k, b_v, decay, sigmoid(b.to(tl.float32)), scale)
        if NORM and NV == 1:
            b_weight = tl.load(p_norm_weight + o_v).to(tl.float32)[None, :]
            b_y = rms_norm_gated(round_to(b_o, IO)[None, :], b_z.to(tl.float32)[None, :], b_weight, V, eps, is_sigmoid)
            b_o = tl.reshape(b_y, [V])
        tl.store(p_out + i_t * stride_out_t + i_h * stride_out_h + o_v, b_o.to(p_out.dtype.element_ty))
        x_q, x_k, x_v, a, b, target = x_q_next, x_k_next, x_v_next, a_next, b_next, target_next

    # Every thread of this program has read its history, and its parts of `out` are stored, before anything below.
    tl.debug_barrier()
    store_history(p_conv_state, p_x, o_xv, c_v, old_v, length, stride_x, stride_cs_c, stride_cs_w, W, ROWS)
    ticket = NV * RATIO - 1
    if NV * RATIO > 1:
        p_counters += i_b * num_k_heads + i_hk
        ticket = tl.atomic_add(p_counters, 1, sem="acq_rel", scope="gpu")
    # Stored behind the atomic: its release would otherwise wait for the whole tile to reach L2.
    if target > null_index:
        tl.store(p_state + target * stride_state + o_s, b_s.to(p_state.dtype.element_ty))
    if ticket == NV * RATIO - 1:
        if NV * RATIO > 1:
            # The other threads of this program are ordered behind the one that made the atomic access.
            tl.debug_barrier()
            tl.store(p_counters, 0)
        if NORM and NV > 1:
            p_gate = p_z + start * stride_z_t + i_hk * stride_z_k
            normalise_parts(
                p_out + i_hk * RATIO * stride_out_h, p_gate, p_norm_weight, length, stride_out_t, stride_out_h,
                stride_z_t, stride_z_h, eps, is_sigmoid, V, RATIO, ROWS,
            )  # fmt: skip
        store_history(p_conv_state, p_x, o_xq, c_q, old_q, length, stride_x, stride_cs_c, stride_cs_w, W, ROWS)
        store_history(p_conv_state, p_x, o_xk, c_k, old_k, length, stride_x, stride_cs_c, stride_cs_w, W, ROWS)


# H100 80GB, torch 2.11, triton 3.6, 2026-11-27, norm inside, K = V = 128, bf16 io, elements/warps, us at Hk 16, Hv 32,
# sequences x tokens:
#     bf16 state  1x4   8x4  64x2  64x4  128x6      fp32 state  8x4  64x4
#     4096/4      9.1    27   130   190    501                   48   299
#     4096/2     10.0    26   126   182    473                   42   271
#     8192/2     12.1    21   101   151    398                   41   266
#     16384/4      13    21         155    410                   41   264
# and 128x6 of an fp32 state 16384/4 710, 8192/4 745. Smaller tiles are slower by as much as they repeat the convolution
# of q and k. Other GPUs and dims take the rows of fused_decode, and other numbers of heads these, untimed.
TILES = Tiles(
    {
        (0, 0, 0, ""): (Tile(4096, 4), Tile(4096, 2)),
        (90, 128, 128, ""): (Tile(4096, 4), Tile(8192, 2)),
        (90, 128, 128, "float32"): (Tile(4096, 4), Tile(16384, 4)),
    }
)

# The same, staged, rows/buffers/warps, sequences x tokens 1x4, 8x4, 64x2, 64x4, 64x6, 64x8: bf16 state 64/4/4 12, 15.7,
# 80, 133; 64/2/4 12, 16.4, 82, 138; past four tokens, not held, 186 and 240. The tiles above in these runs:
# 9.1, -, -, 152, 206, 259. fp32: 128/1/8 37.6 at 8x4, 259 at 64x4; 64/2/8 38.1, 263; the tiles above 39.1, 265.
# Past four tokens on an H200, 2026-11-29, 64x5, 64x6, 128x5, 128x6: bf16 151, 167, 297, 329, held to 128 registers 130,
# 147, 247, 284; fp32 314, 387, 628, 779, held to 128 292, 327, 608, 685, the tile above 271, 312, 522, 605 (4096/2 and
# 8192/2 the same, 8192/4 578 at 128x5, 16384/8 706; staged in 32 or 64 rows 794 to 992 there). Fewer, 8x5, 8x6, 16x6:
# bf16 20.8, 23.9, 44.6, held 20.7, 23.1, 39.1; fp32 41.1, 47.5, 96.4, held 53.6, 59.3, 76.8, the tile 41.1, 46.9, 87.1.
_HALF = (None, Staging(64, 4, 4), Staging(64, 4, 4))
STAGINGS = Stagings(
    {
        (0, 0, 0, ""): (None, None, None),
        (90, 128, 128, "bfloat16"): _HALF,
        (90, 128, 128, "float16"): _HALF,
        (90, 128, 128, "float32"): (None, Staging(128, 1, 8, tokens=4), Staging(128, 1, 8, tokens=4)),
    }
)


def run(
    *, mixed_qkv: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, conv_state: Tensor, a: Tensor, b: Tensor,
    A_log: Tensor, dt_bias: Tensor, state: Tensor, state_indices: Tensor, num_accepted_tokens: Tensor,
    cu_seqlens: Tensor, num_k_heads: int, head_k_dim: int, head_v_dim: int, has_initial_state: Tensor | None,
    start_rows: Tensor | None, scale: float, z: Tensor | None, norm_weight: Tensor | None, norm_eps: float, gate: str,
    null_index: int, out: Tensor, zero_padding: bool, config: Tile | Staging | None = None,
) -> None:  # fmt: skip
    """Packed speculative tokens from mixed_qkv [T, dim] or [T, Hk, dim/Hk] to out [T, Hv, V], state_indices [B, S].

    Sequence i starts from row state_indices[i, n_i - 1], or start_rows[i] where given, and from the columns n_i - 1 on
    of conv_state's row state_indices[i, 0]; its state after token t lands in row state_indices[i, t]. Without an
    initial state it starts from zeros and reads no row. With z and norm_weight, out is RMSNorm(o) * weight * gate(z).
    Sequences whose first or start row is <= null_index touch no pool; their `out` is zeroed under zero_padding and left
    otherwise.

    Args:
        config: for a tuning script; else the tables'.
    """
    num_tokens, num_v_heads = a.shape[0], A_log.shape[0]
    batch, num_slots = state_indices.shape
    ratio = num_v_heads // num_k_heads
    start = state_indices if start_rows is None else start_rows
    initial = any_flags(num_accepted_tokens) if has_initial_state is None else has_initial_state
    normed = z is not None and norm_weight is not None
    arguments = {
        "p_x": mixed_qkv, "p_weight": conv_weight, "p_bias": conv_bias, "p_conv_state": conv_state, "p_a": a, "p_b": b,
        "p_A_log": A_log, "p_dt_bias": dt_bias, "p_state": state, "p_indices": state_indices,
        "p_accepted": num_accepted_tokens, "p_start": start, "p_cu_seqlens": cu_seqlens, "p_initial": initial,
        "p_z": z if normed else None, "p_norm_weight": norm_weight if normed else None, "p_out": out,
        **qkv_strides(mixed_qkv, num_k_heads, num_v_heads, head_k_dim, head_v_dim),
        **value_strides("a", a, num_k_heads, num_v_heads), **value_strides("b", b, num_k_heads, num_v_heads),
        **value_strides("z", z if normed else out, num_k_heads, num_v_heads),
        "stride_w_c": conv_weight.stride(0), "stride_w_t": conv_weight.stride(1),
        "stride_cs_n": conv_state.stride(0), "stride_cs_c": conv_state.stride(1), "stride_cs_w": conv_state.stride(2),
        "stride_state": state.stride(0), "stride_indices": state_indices.stride(0), "stride_start": start.stride(0),
        "stride_out_t": out.stride(0), "stride_out_h": out.stride(1), "has_start": int(start_rows is not None),
        "has_initial": int(has_initial_state is not None), "scale": scale, "eps": norm_eps, "num_sequences": batch,
        "num_tokens": num_tokens, "num_slots": num_slots, "num_k_heads": num_k_heads, "null_index": null_index,
        "is_sigmoid": int(gate == "sigmoid"), "zero_padding": int(zero_padding),
        "K": head_k_dim, "V": head_v_dim, "W": conv_weight.shape[1], "RATIO": ratio,
    }  # fmt: skip
    sequences = batch + int(zero_padding)  # the last are the tokens past cu_seqlens[-1]
    config = config or STAGINGS.staging(state, batch, num_k_heads, num_slots)
    if isinstance(config, Staging):
        options = step_options(config, ratio, head_v_dim, num_slots)
        launch(staged_kernel, (sequences * num_k_heads,), **arguments, **NO_RING, **options)
        return
    tile = config or TILES.tile(device_sm(a.device), state.dtype, batch * num_v_heads, head_k_dim, head_v_dim)
    block_v = tile.block_v(head_k_dim, head_v_dim)
    programs = num_v_heads * (head_v_dim // block_v)
    launch(
        fused_verify_kernel, (sequences * programs,), **arguments,
        p_counters=counters(mixed_qkv.device, batch * num_k_heads) if programs > num_k_heads else None,
        BV=block_v, ROWS=ROWS, num_warps=tile.num_warps, num_stages=1,
    )  # fmt: skip


def variants(platform: Platform, problem: Problem, pool: Tensor | None = None) -> list[KernelVariant]:
    """See BackendOp.variants and `variants_of`."""
    return variants_of(run, fused_forms, platform, problem, pool)


FUSED_VERIFY = BackendOp(run=run, variants=variants, compile_count=compile_count, interleaved=True)
