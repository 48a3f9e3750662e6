"""Triton backend of `prefill`: two launches, three for few sequences x heads, nothing on the host but shapes.

Launch 1 (prefill_solve) works over chunks x heads in parallel and leaves two 64x64 matrices and two vectors of
decays a chunk and head; launch 2 (prefill_state) walks each sequence's chunks, updates the state and writes the
output. Chunk slots come from T and B alone; each program finds its sequence in cu_seqlens on the device.

Why two and not three. A chunk and value head at K = V = 128, bf16, in KiB moved (q, k re-read a value head):

    design                                                   solve   recurrence  output   sum
    W, U, states and new values in memory, output apart       64       96          96     256
    W, U, P in memory, output in the recurrence               88       88           -     176
    M, P in memory, output in the recurrence (this one)       48       80           -     128

and in MFLOP (x 10^6): KK^T 1.0, QK^T 1.0, inverse 0.2, then S K^T 2.1, M R 1.0, S Q^T 2.1, P D 1.0, D K 2.1 = 10.5.
The recurrence is the serial part: at one sequence its chain of dots a chunk sets the time, so `block_v` splits V
until programs cover the GPU (K, Q, M, P are then read once a V block, from L2), and where that is not enough the
sequences are cut into segments with one launch more (prefill_state): 2.2 times the recurrence's operations, in
parallel, and (2 V or V + K) * K * 4 bytes a segment and head.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gdn_plugin.backends.triton.configs import Table
from gdn_plugin.backends.triton.launch import compile_count, device_sm, launch
from gdn_plugin.backends.triton.prefill_solve import prefill_solve_kernel
from gdn_plugin.backends.triton.prefill_state import prefill_state_kernel
from gdn_plugin.backends.triton.variants import KernelVariant, variants_of
from gdn_plugin.registry import BackendOp, Platform, Problem
from gdn_plugin.registry.probe import triton_interprets

CHUNK = 64
# Sequences a solve program looks at at a time when it searches cu_seqlens.
SEARCH = 256
DOT_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@dataclass(frozen=True)
class PrefillConfig:
    """How one prefill is launched.

    Args:
        solve_warps: warps of a solve program.
        solve_block_k: columns of q and k that a solve program multiplies at a time (at most K).
        solve_heads: value heads of one key head that a solve program does (halved until it divides Hv / Hk).
        solve_stages: pipelining depth of the solve kernel.
        solve_registers: a bound on registers a thread, for ptxas; None leaves it to its own, which spills on sm_100.
        solve_precision: of the dots that build the inverse, for bf16 io ("tf32" or "tf32x3"; fp16 and fp32 io always
            take "tf32x3"). M is rounded to bf16 afterwards: TF32 raised the rms error of the new values by 0 % (random
            keys) to 10 % (keys equal but for 0.1 % noise, no decay; 23 % where operands are rounded, not truncated),
            measured on the CPU. On an H100 8x1024 at 16x32 heads takes 125 us with "tf32" and 185 with "tf32x3".
        block_v: rows of the state that a state program holds.
        state_block_k: columns of the state a dot takes at a time (at most K, and K where sequences are cut).
        state_warps: its warps.
        state_stages: its pipelining depth (chunks in flight).
        full_programs: with fewer state programs than this, sequences are cut into segments or, where they are not,
            V is split finer, both with the `small_` values; 0 never splits for that.
        segment_programs: where half as many programs of small_block_v are more than there are, sequences are cut
            into segments until there are about as many (one launch more); 0 never cuts. K = 256 is never cut: the
            transition does not fit in shared memory.
        segment_min_chunks: shortest segment worth its overhead.
        small_block_v, small_warps, small_stages: block_v, state_warps and state_stages of cut or finer split launches.
        cut_stages: pipelining depth where sequences are cut; the transition takes registers that depth 3 would spill.
    """

    solve_warps: int = 4
    solve_block_k: int = 256
    solve_heads: int = 1
    solve_stages: int = 1
    solve_registers: int | None = None
    solve_precision: str = "tf32"
    block_v: int = 64
    state_block_k: int = 256
    state_warps: int = 4
    state_stages: int = 2
    full_programs: int = 0
    segment_programs: int = 0
    segment_min_chunks: int = 4
    small_block_v: int = 64
    small_warps: int = 4
    small_stages: int = 2
    cut_stages: int = 2


# Sources: registers, spills and shared memory read from `gdn-plugin compile` for sm_80 to sm_120, and reasoning about
# occupancy; the state launches of sm_90 are timed (H100 80GB, torch 2.11, triton 3.6, 2026-11-23, bf16, K = V = 128,
# us of the state launches, block_v/warps/stages):
#
#     heads  sequences  whole 64/4/2  split 32/4/3  cut 32/4/3, 128 programs
#     16x32  8x1024              134           211  (whole 128/8/2: 136)
#     16x32  1x8192              332           283  331 (64/4/2, 264 programs: 264 with one launch more)
#     16x32  1x2048               90            77  not cut (64/4/2, 264 programs: 90)
#     2x4    8x1024               41            36  not cut
#     2x4    1x8192              277           246  88 (32/4/2: 90)
#     2x4    1x2048               64            55  36
#
# The solve launch at 16x32, 8x1024: 125 us with 4 warps, 264 with 8, 149 with two heads a program.
#
# wgmma wants 64 rows a warpgroup; two of them a program (64/4/2 is as fast, and spills 8 bytes with a bf16 state). With
# fewer programs than half the multiprocessors, smaller ones and a chunk more in flight.
_WGMMA = PrefillConfig(
    block_v=128, state_warps=8, small_block_v=32, small_stages=3, full_programs=66, segment_programs=128
)
# Three TF32 products a dot: slow, and registers are what is short. For checking numbers, not for serving.
_FP32 = PrefillConfig(solve_warps=8, solve_block_k=16, block_v=16, state_block_k=32, state_warps=8, state_stages=1)

CONFIGS = Table(
    {
        # mma.sync: more rows than 32 of 128 columns spill; so do q and k in whole rows beside their products.
        (0, 0, 0, ""): PrefillConfig(solve_block_k=64, block_v=32, small_block_v=32, segment_programs=256),
        (0, 64, 0, ""): PrefillConfig(solve_block_k=32, block_v=32, small_block_v=32, segment_programs=256),
        (0, 256, 0, ""): PrefillConfig(solve_block_k=64, block_v=16, state_warps=8),
        (90, 0, 0, ""): _WGMMA,
        # Cut sequences in smaller programs: in fp16 those of 32 rows spill 16 bytes where bf16's do not.
        (90, 128, 0, "float16"): replace(_WGMMA, small_block_v=16),
        (90, 256, 0, ""): PrefillConfig(solve_block_k=64, block_v=32, state_warps=8),
        # tcgen05: the same rows over 8 warps, which is what keeps 128 columns from spilling.
        (100, 0, 0, ""): PrefillConfig(solve_registers=255, state_warps=8, small_warps=8, segment_programs=296),
        (100, 256, 0, ""): PrefillConfig(solve_block_k=64, block_v=32, state_warps=8),
        (0, 0, 0, "float32"): _FP32,
        (90, 128, 0, "float32"): replace(_FP32, state_block_k=64),
    }
)


def num_slots(num_tokens: int, num_sequences: int) -> int:
    """Chunk slots that hold any packing of `num_tokens` into `num_sequences`, padding rows behind them included."""
    return -(-num_tokens // CHUNK) + num_sequences


def fit_heads(heads: int, ratio: int) -> int:
    """The largest power-of-two part of `heads` that divides the head ratio."""
    while ratio % heads:
        heads //= 2
    return heads


def state_launches(config: PrefillConfig, head_k_dim: int, head_v_dim: int) -> tuple[tuple[int, int, int], ...]:
    """(block_v, warps, stages) of the state launches: whole sequences, V split finer, sequences cut into segments."""
    whole = (min(config.block_v, head_v_dim), config.state_warps, config.state_stages)
    split = (min(config.small_block_v, head_v_dim), config.small_warps, config.small_stages)
    cut = (min(config.small_block_v, head_v_dim, head_k_dim), config.small_warps, config.cut_stages)
    return whole, split, cut


def state_launch(
    config: PrefillConfig, head_k_dim: int, head_v_dim: int, segment_chunks: int, states: int
) -> tuple[int, int, int]:
    """The one of `state_launches` for `states` sequences x value heads."""
    whole, split, cut = state_launches(config, head_k_dim, head_v_dim)
    if segment_chunks:
        return cut
    return split if states * (head_v_dim // whole[0]) < config.full_programs else whole


def choose_segment_chunks(
    config: PrefillConfig, num_tokens: int, num_sequences: int, num_v_heads: int, head_k_dim: int, head_v_dim: int,
    max_seqlen: int,
) -> int:  # fmt: skip
    """Chunks a segment, 0 to leave sequences whole. From shapes and the host's hint alone: a wrong hint costs time."""
    programs = num_sequences * num_v_heads * -(-head_v_dim // config.small_block_v)
    cuts = config.segment_programs // max(programs, 1)
    if cuts < 2 or head_k_dim > 128:
        return 0
    longest = min(max_seqlen, num_tokens) if max_seqlen > 0 else num_tokens
    chunks = -(-longest // CHUNK)
    segment_chunks = max(-(-chunks // cuts), config.segment_min_chunks)
    return segment_chunks if segment_chunks < chunks else 0


def dot_types(dtype: torch.dtype, config: PrefillConfig) -> tuple[tl.dtype, str, str]:
    """(operand dtype, precision of dots, precision of the inverse's dots) of the kernels for an io dtype.

    fp32 io is multiplied as three TF32 products, which is fp32-accurate. The interpreter gets bf16 and fp16 dots
    wrong, so under it operands are fp32.
    """
    if triton_interprets():
        return tl.float32, "ieee", "ieee"
    precision = "tf32x3" if dtype == torch.float32 else "tf32"
    return DOT_TYPES[dtype], precision, config.solve_precision if dtype == torch.bfloat16 else "tf32x3"


def run(
    *, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, state_indices: Tensor,
    cu_seqlens: Tensor, has_initial_state: Tensor | None, scale: float, use_qk_l2norm: bool, exp_gate: bool,
    max_seqlen: int, null_index: int, padding: str, checkpoints: Tensor | None, checkpoint_cu_starts: Tensor | None,
    checkpoint_every: int, out: Tensor, zero_padding: bool, config: PrefillConfig | None = None,
) -> None:  # fmt: skip
    """Chunked gated delta rule over packed sequences (Yang et al., arXiv:2412.06464, sec. 3.3) in at most 3 launches.

    Args:
        q, k: [T, Hk, K] bf16, fp16 or fp32, last stride 1, others any.
        v: [T, Hv, V], dtype of q, last stride 1, others any.
        g: [T, Hv] fp32, natural log of the decay (its exponential with `exp_gate`), any strides.
        beta: [T, Hv] fp32, any strides.
        state: [N, Hv, V, K] fp32, bf16 or fp16, inner three dims dense; rows of non-empty sequences are overwritten.
        state_indices: [B] int32 or int64, any stride; <= null_index skips the sequence, whatever `padding` says of it.
        cu_seqlens: [B + 1] int32 or int64, contiguous.
        has_initial_state: [B] bool or None (all True), contiguous; False starts from zero whatever the row holds.
        max_seqlen: the host's longest sequence, 0 unknown; only chooses how long segments are.
        checkpoints: [C, Hv, V, K] or None, inner three dims dense.
        checkpoint_cu_starts: [B + 1] int32; `checkpoint_every`: tokens, a multiple of 64.
        out: [T, Hv, V], last stride 1; rows that no sequence owns are zeroed with `zero_padding`, else left.
        config: for a tuning script; else the table's.
    """
    num_tokens, num_k_heads, head_k_dim = q.shape
    num_v_heads, head_v_dim = v.shape[1:]
    num_sequences = cu_seqlens.shape[0] - 1
    if num_tokens == 0:
        return
    config = config or CONFIGS.lookup(device_sm(q.device), head_k_dim, head_v_dim, q.dtype)

    slots = num_slots(num_tokens, num_sequences)
    m = torch.empty((slots, num_v_heads, CHUNK, CHUNK), dtype=q.dtype, device=q.device)
    p = torch.empty_like(m)
    decay = torch.empty((slots, num_v_heads, 2, CHUNK), dtype=torch.float32, device=q.device)
    q_in, k_in = q, k
    if use_qk_l2norm:
        q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        k = torch.empty(k.shape, dtype=k.dtype, device=k.device)

    dot, precision, solve_precision = dot_types(q.dtype, config)
    heads = fit_heads(config.solve_heads, num_v_heads // num_k_heads)
    launch(
        prefill_solve_kernel, (slots * (num_v_heads // heads),),
        p_q=q_in, p_k=k_in, p_g=g, p_beta=beta, p_out=out, p_indices=state_indices, p_cu_seqlens=cu_seqlens,
        p_m=m, p_p=p, p_decay=decay, p_q_norm=q if use_qk_l2norm else None, p_k_norm=k if use_qk_l2norm else None,
        stride_q_t=q_in.stride(0), stride_q_h=q_in.stride(1), stride_k_t=k_in.stride(0), stride_k_h=k_in.stride(1),
        stride_g_t=g.stride(0), stride_g_h=g.stride(1), stride_beta_t=beta.stride(0), stride_beta_h=beta.stride(1),
        stride_out_t=out.stride(0), stride_out_h=out.stride(1), stride_indices=state_indices.stride(0),
        num_tokens=num_tokens, num_sequences=num_sequences, null_index=null_index, exp_gate=int(exp_gate),
        zero_padding=int(zero_padding),
        HK=num_k_heads, HV=num_v_heads, K=head_k_dim, V=head_v_dim, BK=min(config.solve_block_k, head_k_dim),
        HEADS=heads, L2NORM=use_qk_l2norm, DOT=dot, PRECISION=precision, SOLVE_PRECISION=solve_precision, SEARCH=SEARCH,
        num_warps=config.solve_warps, num_stages=config.solve_stages, maxnreg=config.solve_registers,
    )  # fmt: skip
    segment_chunks = choose_segment_chunks(config, num_tokens, num_sequences, num_v_heads, head_k_dim, head_v_dim,
                                           max_seqlen)  # fmt: skip
    block_v, warps, stages = state_launch(config, head_k_dim, head_v_dim, segment_chunks,
                                          num_sequences * num_v_heads)  # fmt: skip
    units, segments = num_sequences, None
    if segment_chunks:
        units += -(-num_tokens // (CHUNK * segment_chunks))
        size = (units, num_v_heads, head_v_dim + max(head_k_dim, head_v_dim), head_k_dim)
        segments = torch.empty(size, dtype=torch.float32, device=q.device)
    same_strides = q.stride(0) == k.stride(0) and out.stride(0) == v.stride(0)
    for transition in (True, False) if segment_chunks else (False,):
        rows = head_v_dim + (head_k_dim if transition else 0)
        points = None if transition else checkpoints
        launch(
            prefill_state_kernel, (units * num_v_heads * (rows // block_v),),
            p_q=q, p_k=k, p_v=v, p_g=g, p_beta=beta, p_out=out, p_state=state, p_indices=state_indices,
            p_cu_seqlens=cu_seqlens, p_has_initial=has_initial_state, p_m=m, p_p=p, p_decay=decay, p_segments=segments,
            p_checkpoints=points, p_checkpoint_starts=None if points is None else checkpoint_cu_starts,
            stride_q_t=q.stride(0), stride_q_h=q.stride(1), stride_k_t=k.stride(0), stride_k_h=k.stride(1),
            stride_v_t=v.stride(0), stride_v_h=v.stride(1), stride_g_t=g.stride(0), stride_g_h=g.stride(1),
            stride_beta_t=beta.stride(0), stride_beta_h=beta.stride(1), stride_out_t=out.stride(0),
            stride_out_h=out.stride(1), stride_state=state.stride(0),
            stride_checkpoints=0 if points is None else points.stride(0), stride_indices=state_indices.stride(0),
            num_sequences=num_sequences, null_index=null_index, exp_gate=int(exp_gate),
            checkpoint_chunks=checkpoint_every // CHUNK, segment_chunks=segment_chunks, scale=scale,
            HK=num_k_heads, HV=num_v_heads, K=head_k_dim, V=head_v_dim, BV=block_v,
            BK=min(config.state_block_k, head_k_dim), TRANSITION=transition, SAME_STRIDES=same_strides, DOT=dot,
            PRECISION=precision, SEARCH=SEARCH, num_warps=warps, num_stages=stages,
        )  # fmt: skip


def calls(arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """With q and k to normalise and without, states to start from given or all, checkpoints or not."""
    for norm, initial in itertools.product((False, True), (arguments["has_initial_state"], None)):
        call = arguments | {"use_qk_l2norm": norm, "has_initial_state": initial}
        yield call
        yield call | {"checkpoints": None, "checkpoint_cu_starts": None, "checkpoint_every": 0}


def variants(platform: Platform, problem: Problem, pool: Tensor | None = None) -> list[KernelVariant]:
    """See BackendOp.variants and `variants_of`."""
    return variants_of(run, calls, platform, problem, pool)


PREFILL = BackendOp(run=run, variants=variants, compile_count=compile_count)
