"""conv_prologue: everything between the projection and the recurrence, in one launch.

Grid: (blocks of tokens) x (2*Hk + Hv heads, and one slot for the gates). A block lies inside one sequence, so the
history of a token is either in the rows before it or, for the first W-1 tokens of the first block, in conv_state.
Which block is which is worked out on the device from cu_seqlens: at most cdiv(T, BT) + B + 1 blocks exist, known from
shapes alone, and the surplus ones exit. The tokens past cu_seqlens[-1] are treated as one padding sequence more, and
the outputs of padding are zeros; so every element of the outputs is written here and no fill is launched.

A program's tile is [R, D]: R runs of neighbouring tokens, all D channels of a head. It slides along the runs, RUN
tokens a step: asks for the next step's RUN rows before it computes this one's, and carries the W-1 inputs before them
in registers. So each input is read once, but for the W-1 in front of each run.

Cost: T * (2*Hk*K + Hv*V) elements are read and as many written, and T * 2*Hv gates of either kind: 537 MB at T = 16384,
Hk 16, Hv 32, K = V = 128 in bf16. An output takes W multiply-adds, a SiLU (two of the special functions' slots) and,
for q and k, its share of a sum: instructions bound this kernel as much as bytes do, so what a program does once (which
block it is, weights, history) is done for several steps.

How the conv_state update stays free of races: of all the programs that handle a channel, only the one with a sequence's
first block reads that channel's history, and it alone also writes the new state, whose inputs it reads straight from
mixed_qkv (which nobody writes). Inside that program a barrier stands between the last read of the history, by any
thread, and the first write. Rows of `state` are zeroed by the same first-block programs, a value head each. Both are
done before the tokens: what they need would take registers all along the loop.
"""

# ruff: noqa: RUF005, SIM102 - Triton has no unpacking of tuples, and decides an outer `is not None` when it compiles
from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn_plugin.backends.triton.configs import Table
from gdn_plugin.backends.triton.gates import log_decay, round_to, sigmoid, silu
from gdn_plugin.backends.triton.heads import qkv_strides, value_strides
from gdn_plugin.backends.triton.launch import compile_count, counted, device_sm, launch
from gdn_plugin.backends.triton.variants import KernelVariant, either, variants_of
from gdn_plugin.registry import BackendOp, Platform, Problem


@triton.jit
def find_block(p_cu_seqlens, i_block, num_sequences, num_tokens, BT):
    """Which sequence block i_block belongs to: (sequence, its first token, its length, block within the sequence).

    Sequence num_sequences is the tail of padding tokens. A block past the end comes back with a start past its length.
    """
    BS: tl.constexpr = 128
    i_seq = tl.zeros([], dtype=tl.int32)
    skipped = tl.zeros([], dtype=tl.int32)  # blocks of the sequences before i_seq
    total = tl.zeros([], dtype=tl.int32)
    for i in range(0, num_sequences, BS):
        o_s = i + tl.arange(0, BS)
        m_s = o_s < num_sequences
        first = tl.load(p_cu_seqlens + o_s, mask=m_s, other=0).to(tl.int32)
        past = tl.load(p_cu_seqlens + o_s + 1, mask=m_s, other=0).to(tl.int32)
        blocks = (past - first + BT - 1) // BT
        ends = total + tl.cumsum(blocks, axis=0)
        before = m_s & (ends <= i_block)
        i_seq += tl.sum(before.to(tl.int32), axis=0)
        skipped += tl.sum(tl.where(before, blocks, 0), axis=0)
        total += tl.sum(blocks, axis=0)
    start = tl.load(p_cu_seqlens + i_seq).to(tl.int64)
    end = tl.load(p_cu_seqlens + i_seq + 1, mask=i_seq < num_sequences, other=num_tokens).to(tl.int64)
    return i_seq, start, end - start, (i_block - skipped).to(tl.int64)


@triton.jit
def conv_head(
    p_x, p_weight, p_bias, p_conv_state, p_out, i_channel, stride_x, stride_w_c, stride_w_t, stride_cs_c, stride_cs_w,
    stride_out, length, i_block, room, steps, first_column, num_columns, readable, writable, is_padding,
    D: tl.constexpr, W: tl.constexpr, R: tl.constexpr, RUN: tl.constexpr, NORM: tl.constexpr, SPECULATIVE: tl.constexpr,
):  # fmt: skip
    """One head of one block, whose first channel, in the order of conv_weight and conv_state, is i_channel.

    p_x and p_out point at the head in the block's first token, p_conv_state at the pool row; `room` tokens of the
    sequence are left from there on.
    """
    o_d = tl.arange(0, D)
    o_c = i_channel + o_d
    o_r = tl.arange(0, R) * (steps * RUN)  # [R], first token of each run, counted from the block's first
    p_history = p_conv_state + o_c * stride_cs_c
    keep = W - 1 + first_column  # history column of token -1, plus one
    # Padding: with inputs, weights and bias of 0 everything is 0 without a select an element.
    seen = tl.where(is_padding, 0, room)
    m_d = o_d < tl.where(is_padding, 0, D)
    weight = ()
    for i in tl.static_range(W):
        b_weight = tl.load(p_weight + o_c * stride_w_c + i * stride_w_t, mask=m_d, other=0.0)
        weight = weight + (b_weight.to(tl.float32),)
    b_bias = tl.zeros([D], dtype=tl.float32)
    if p_bias is not None:
        b_bias = tl.load(p_bias + o_c, mask=m_d, other=0.0).to(tl.float32)

    p_run = p_x + o_r.to(tl.int64)[:, None] * stride_x + o_d[None, :]
    p_y = p_out + o_r.to(tl.int64)[:, None] * stride_out + o_d[None, :]
    before = tl.where((i_block == 0) | is_padding, 0, W - 1)  # inputs in front of the block, as far as they matter
    window = ()  # the W-1 inputs in front of the next ones of every run
    for j in tl.static_range(W - 1):
        o_t = o_r + (j - (W - 1))
        b_x = tl.load(p_run + (j - (W - 1)) * stride_x, mask=((o_t >= -before) & (o_t < seen))[:, None], other=0.0)
        # Only the first run of a first block starts before the sequence does.
        b_old = tl.load(
            p_history + (j - (W - 1) + keep) * stride_cs_w,
            mask=o_d < tl.where(readable & (i_block == 0), D, 0),  # a scalar flag itself the interpreter rejects
            other=0.0,
        )
        window = window + (tl.where((o_t < -before)[:, None], b_old.to(tl.float32)[None, :], b_x.to(tl.float32)),)

    if writable & (i_block == 0):
        KEPT: tl.constexpr = W - 2 if SPECULATIVE else W - 1
        columns = ()
        for i in tl.static_range(KEPT):
            # Plain: the last W-1 inputs up to the sequence's end. Speculative: the last W-2 before its first token.
            pos = i - KEPT + (0 * length if SPECULATIVE else length)
            b_late = tl.load(p_x + pos * stride_x + o_d, mask=o_d < tl.where(pos >= 0, D, 0), other=0.0)
            b_early = tl.load(
                p_history + (pos + keep) * stride_cs_w, mask=o_d < tl.where((pos < 0) & readable, D, 0), other=0.0
            )
            columns = columns + (tl.where(pos < 0, b_early.to(tl.float32), b_late.to(tl.float32)),)
        tl.debug_barrier()
        for i in tl.static_range(KEPT):
            tl.store(p_history + i * stride_cs_w, columns[i].to(p_conv_state.dtype.element_ty))
        if SPECULATIVE:
            # Any prefix of these tokens may be accepted by the next step, so all of them stay.
            for i_t in range(tl.minimum(length, num_columns - (W - 2))):
                b_late = tl.load(p_x + i_t * stride_x + o_d)
                tl.store(p_history + (W - 2 + i_t) * stride_cs_w, b_late.to(p_conv_state.dtype.element_ty))

    num_steps = tl.minimum(steps, (room + RUN - 1) // RUN)
    rows = ()  # of the next step
    for j in tl.static_range(RUN):
        rows = rows + (tl.load(p_run, mask=(o_r + j < seen)[:, None], other=0.0),)
        p_run += stride_x
    for i_s in range(num_steps):
        inputs = window
        for j in tl.static_range(RUN):
            inputs = inputs + (rows[j].to(tl.float32),)
        there = tl.where(i_s + 1 < num_steps, seen, 0)
        rows = ()
        for j in tl.static_range(RUN):
            m_t = o_r + ((i_s + 1) * RUN + j) < there
            rows = rows + (tl.load(p_run, mask=m_t[:, None], other=0.0),)
            p_run += stride_x
        for j in tl.static_range(RUN):
            b_acc = tl.zeros([R, D], dtype=tl.float32) + b_bias[None, :]
            for w in tl.static_range(W):
                b_acc += inputs[j + w] * weight[w][None, :]
            b_y = round_to(silu(b_acc), p_out.dtype.element_ty)
            if NORM:
                b_y = b_y * tl.rsqrt(tl.sum(b_y * b_y, axis=1) + 1e-6)[:, None]
            m_t = o_r + (i_s * RUN + j) < room
            tl.store(p_y, b_y.to(p_out.dtype.element_ty), mask=m_t[:, None])
            p_y += stride_out
        window = inputs[RUN:]


@counted
@triton.jit(
    do_not_specialize=["stride_w_c", "stride_w_t", "stride_cs_n", "stride_cs_c", "stride_cs_w", "stride_a_t",
                       "stride_a_k", "stride_a_h", "stride_b_t", "stride_b_k", "stride_b_h", "stride_indices",
                       "num_tokens", "num_sequences", "num_k_heads", "num_v_heads", "num_columns", "null_index",
                       "exp_gate", "steps"],
    do_not_specialize_on_alignment=["p_a", "p_b", "p_A_log", "p_dt_bias", "p_indices", "p_cu_seqlens", "p_has_initial",
                                    "p_accepted", "p_bias", "p_weight", "p_conv_state"],
)  # fmt: skip
def conv_prologue_kernel(
    p_x, p_weight, p_bias, p_conv_state, p_indices, p_cu_seqlens, p_has_initial, p_accepted, p_a, p_b, p_A_log,
    p_dt_bias, p_state, p_q, p_k, p_v, p_g, p_beta,
    stride_x, stride_x_k, stride_x_v, first_k, first_v, stride_w_c, stride_w_t, stride_cs_n, stride_cs_c, stride_cs_w,
    stride_indices, stride_a_t, stride_a_k, stride_a_h, stride_b_t, stride_b_k, stride_b_h, stride_state,
    num_tokens, num_sequences, num_k_heads, num_v_heads, num_columns, null_index, exp_gate, steps,
    K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, R: tl.constexpr, RUN: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    BT = R * RUN * steps
    ratio = num_v_heads // num_k_heads
    num_slots = 2 * num_k_heads + num_v_heads + 1
    i_p = tl.program_id(0)
    i_slot = i_p % num_slots
    i_b, start, length, i_block = find_block(p_cu_seqlens, i_p // num_slots, num_sequences, num_tokens, BT)
    if i_block * BT >= length:
        return
    room = tl.minimum(length - i_block * BT, BT).to(tl.int32)
    start += i_block * BT  # of the block, from here on
    row = tl.load(p_indices + i_b * stride_indices, mask=i_b < num_sequences, other=null_index).to(tl.int64)
    is_padding = row <= null_index  # the tail of padding tokens is a sequence on a null row

    if i_slot == num_slots - 1:
        o_h = tl.arange(0, BH)
        o_a = o_h // ratio * stride_a_k + o_h % ratio * stride_a_h
        o_b = o_h // ratio * stride_b_k + o_h % ratio * stride_b_h
        A_log = tl.load(p_A_log + o_h, mask=o_h < num_v_heads, other=0.0).to(tl.float32)
        dt_bias = tl.load(p_dt_bias + o_h, mask=o_h < num_v_heads, other=0.0).to(tl.float32)
        for i in range(0, room, R * RUN):
            o_i = i + tl.arange(0, R * RUN)
            o_t = start + o_i
            mask = (o_i < room)[:, None] & (o_h < num_v_heads)[None, :]
            b_a = tl.load(p_a + o_t[:, None] * stride_a_t + o_a[None, :], mask=mask, other=0.0)
            b_b = tl.load(p_b + o_t[:, None] * stride_b_t + o_b[None, :], mask=mask, other=0.0)
            b_g = tl.where(is_padding, 0.0, log_decay(b_a.to(tl.float32), A_log[None, :], dt_bias[None, :]))
            b_g = tl.where(exp_gate != 0, tl.exp(b_g), b_g)
            b_beta = tl.where(is_padding, 0.0, sigmoid(b_b.to(tl.float32)))
            o_out = o_t[:, None] * num_v_heads + o_h[None, :]
            tl.store(p_g + o_out, b_g, mask=mask)
            tl.store(p_beta + o_out, b_beta, mask=mask)
        return

    writable = row > null_index
    readable = writable
    if p_has_initial is not None:
        initial = tl.load(p_has_initial + i_b, mask=i_b < num_sequences, other=0)
        readable = writable & (initial.to(tl.int32) != 0)
    first_column = tl.zeros([], dtype=tl.int64)
    if p_accepted is not None:
        accepted = tl.load(p_accepted + i_b, mask=i_b < num_sequences, other=1).to(tl.int64)
        first_column = tl.maximum(accepted - 1, 0)
    p_x += start * stride_x
    p_conv_state += tl.where(writable, row, 0) * stride_cs_n

    if i_slot < 2 * num_k_heads:
        is_query = i_slot < num_k_heads
        i_hk = i_slot - tl.where(is_query, 0, num_k_heads)
        p_x += i_hk * stride_x_k + tl.where(is_query, 0, first_k)
        p_out = tl.where(is_query, p_q, p_k) + i_hk * K
        conv_head(
            p_x, p_weight, p_bias, p_conv_state, p_out + start * (num_k_heads * K), i_slot * K,
            stride_x, stride_w_c, stride_w_t, stride_cs_c, stride_cs_w, num_k_heads * K,
            length, i_block, room, steps, first_column, num_columns, readable, writable, is_padding,
            K, W, R, RUN, True, p_accepted is not None,
        )  # fmt: skip
    else:
        i_h = i_slot - 2 * num_k_heads
        if p_state is not None:
            if writable & (readable == 0) & (i_block == 0):
                BZ: tl.constexpr = V * K if V * K < 2048 else 2048
                p_rows = p_state + row * stride_state + i_h.to(tl.int64) * (V * K) + tl.arange(0, BZ)
                for i in range(0, V * K, BZ):
                    tl.store(p_rows + i, tl.zeros([BZ], dtype=p_state.dtype.element_ty))
        p_x += first_v + i_h // ratio * stride_x_v + i_h % ratio * V
        conv_head(
            p_x, p_weight, p_bias, p_conv_state, p_v + start * (num_v_heads * V) + i_h * V,
            2 * num_k_heads * K + i_h * V, stride_x, stride_w_c, stride_w_t, stride_cs_c, stride_cs_w,
            num_v_heads * V, length, i_block, room, steps, first_column, num_columns, readable, writable, is_padding,
            V, W, R, RUN, False, p_accepted is not None,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class PrologueConfig:
    """A step of a program: `runs` rows of a tile, each `run_length` tokens further. A block is one step or several.

    Args:
        registers: most that a thread may have; None leaves it to the compiler.
    """

    runs: int
    run_length: int
    num_warps: int
    registers: int | None = None

    @property
    def step(self) -> int:
        """Tokens of a step."""
        return self.runs * self.run_length


# (for short sequences, for long ones), by the io dtype. H100 80GB, torch 2.11, triton 3.6, 2026-11-28, K = V = 128,
# bf16, Hk 16, Hv 32, runs x run_length/warps, us by steps of a block:
#               8x2048: 4     8    12    16    1x2048: 2     3     4     8
#     1x8/1           197   205   210   213         31.8  31.3  30.6  31.0
#     2x4/1           221   218   220   222         36.6  34.6  34.0  36.7
#     1x4/1           216   212   213   215         35.2  32.9  32.6  33.2
#     2x8/1           246   238   241   242         40.1  38.3  38.2  38.2
# 8x2048 moves 544 MB, which a copy does in 181 us at 3.0 TB/s. With a step's rows asked for in that step, 1x8/1 took
# 209 and 33.1 at 4 steps, and 2x4/1 at 8, which served then, 211 and 30.3; asking for weights before the block is found
# did not help. The day before, that way: 1x4/1 6.4 at 1x256 and 11.2 at 64x4, 2x4/1 6.8 and 13.3. On sm_100 ptxas stops
# at 96 registers by itself and spills, hence the rows (compiled, not run).
_SHORT = PrologueConfig(runs=1, run_length=4, num_warps=1)
_LONG = PrologueConfig(runs=1, run_length=8, num_warps=1)
CONFIGS: Table[tuple[PrologueConfig, PrologueConfig]] = Table(
    {
        (0, 0, 0, ""): (_SHORT, _LONG),
        (100, 0, 0, ""): (_SHORT, replace(_LONG, registers=184)),
        (100, 128, 128, ""): (_SHORT, replace(_LONG, registers=128)),
        (100, 128, 128, "float32"): (_SHORT, replace(_LONG, registers=160)),
    }
)
MAX_STEPS = 4
PROGRAMS = 2000  # of one warp: fifteen on each of an H100's 132 multiprocessors


def choose_config(
    sm: int, dtype: torch.dtype, head_k_dim: int, head_v_dim: int, num_tokens: int, num_sequences: int
) -> PrologueConfig:  # fmt: skip
    """By the mean length, since lengths are on the device: short steps where a long one would be mostly empty."""
    short, long = CONFIGS.lookup(sm, head_k_dim, head_v_dim, dtype)
    return short if num_tokens <= long.step * max(num_sequences, 1) // 2 else long


def choose_steps(config: PrologueConfig, num_tokens: int, num_sequences: int, slots: int, width: int) -> int:
    """Steps of a block: more share the cost of a program, and leave enough programs and blocks that are mostly full.

    A run is never shorter than the convolution's history, which then comes from conv_state for a block's first run
    alone.
    """
    steps = 1
    while steps < MAX_STEPS:
        block = 2 * steps * config.step
        if block * PROGRAMS > num_tokens * slots or 2 * block * num_sequences > num_tokens:
            break
        steps *= 2
    return max(steps, triton.cdiv(width - 1, config.run_length))


def run(
    *, mixed_qkv: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, conv_state: Tensor, state_indices: Tensor,
    cu_seqlens: Tensor, has_initial_state: Tensor | None, num_accepted_tokens: Tensor | None, a: Tensor, b: Tensor,
    A_log: Tensor, dt_bias: Tensor, state: Tensor | None, num_k_heads: int, head_k_dim: int, head_v_dim: int,
    exp_gate: bool, null_index: int, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor,
    config: PrologueConfig | None = None,
) -> None:  # fmt: skip
    """Causal conv + SiLU + split + L2 norm + gates of mixed_qkv [T, dim] into q, k, v, g, beta (contiguous).

    mixed_qkv, a and b also with interleaved heads: [T, Hk, dim/Hk], [T, Hk, Hv/Hk].

    Updates conv_state rows in place and, with `state`, zeroes the rows of sequences without an initial state. Tokens
    past cu_seqlens[-1] and those of padding sequences (index <= null_index) give zeros (g: 1 under exp_gate); rows of
    padding and empty sequences stay as they are.

    Args:
        config: for a tuning script; else the table's.
    """
    num_tokens = mixed_qkv.shape[0]
    num_sequences = cu_seqlens.shape[0] - 1
    num_v_heads = A_log.shape[0]
    width = conv_weight.shape[1]
    config = config or choose_config(
        device_sm(q.device), q.dtype, head_k_dim, head_v_dim, num_tokens, num_sequences
    )  # fmt: skip
    if has_initial_state is None:
        state = None  # no sequence starts fresh
    slots = 2 * num_k_heads + num_v_heads + 1
    steps = choose_steps(config, num_tokens, num_sequences, slots, width)
    # With no token nothing is written, not even conv_state.
    blocks = triton.cdiv(num_tokens, config.step * steps) + num_sequences + 1 if num_tokens else 0
    launch(
        conv_prologue_kernel, (blocks * slots,),
        p_x=mixed_qkv, p_weight=conv_weight, p_bias=conv_bias, p_conv_state=conv_state, p_indices=state_indices,
        p_cu_seqlens=cu_seqlens, p_has_initial=has_initial_state, p_accepted=num_accepted_tokens, p_a=a, p_b=b,
        p_A_log=A_log, p_dt_bias=dt_bias, p_state=state, p_q=q, p_k=k, p_v=v, p_g=g, p_beta=beta,
        **qkv_strides(mixed_qkv, num_k_heads, num_v_heads, head_k_dim, head_v_dim),
        **value_strides("a", a, num_k_heads, num_v_heads), **value_strides("b", b, num_k_heads, num_v_heads),
        stride_w_c=conv_weight.stride(0), stride_w_t=conv_weight.stride(1),
        stride_cs_n=conv_state.stride(0), stride_cs_c=conv_state.stride(1), stride_cs_w=conv_state.stride(2),
        stride_indices=state_indices.stride(0), stride_state=0 if state is None else state.stride(0),
        num_tokens=num_tokens, num_sequences=num_sequences, num_k_heads=num_k_heads, num_v_heads=num_v_heads,
        num_columns=conv_state.shape[2], null_index=null_index, exp_gate=int(exp_gate),
        steps=steps, K=head_k_dim, V=head_v_dim, W=width, R=config.runs, RUN=config.run_length,
        BH=triton.next_power_of_2(num_v_heads), num_warps=config.num_warps, num_stages=1,
        maxnreg=config.registers,
    )  # fmt: skip


def calls(arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """With rows to zero, without, and none that starts fresh; speculative or not; dt_bias in io dtype and fp32."""
    fresh, accepted = arguments["has_initial_state"], arguments["num_accepted_tokens"]
    rows = ((fresh, arguments["state"]), (fresh, None), (None, None))
    for dt_bias, (initial, state), taken in itertools.product(
        either(arguments["dt_bias"]), rows, dict.fromkeys((None, accepted))
    ):
        yield arguments | {
            "dt_bias": dt_bias, "has_initial_state": initial, "num_accepted_tokens": taken, "state": state
        }  # fmt: skip


def variants(platform: Platform, problem: Problem, pool: Tensor | None = None) -> list[KernelVariant]:
    """See BackendOp.variants and `variants_of`."""
    return variants_of(run, calls, platform, problem, pool)


CONV_PROLOGUE = BackendOp(run=run, variants=variants, compile_count=compile_count, interleaved=True)
