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

import torch
import triton.language as tl
from torch import Tensor

from gdn_plugin.ops._triton import configs
from gdn_plugin.ops._triton.configs import PrefillConfig
from gdn_plugin.ops._triton.launch import device_sm, interpreting, launch
from gdn_plugin.ops._triton.prefill_solve import prefill_solve_kernel
from gdn_plugin.ops._triton.prefill_state import prefill_state_kernel

CHUNK = 64
DIMS = (64, 128, 256)
# Sequences a solve program looks at at a time when it searches cu_seqlens.
SEARCH = 256
DTYPES = {torch.bfloat16: ("bfloat16", tl.bfloat16), torch.float16: ("float16", tl.float16),
          torch.float32: ("float32", tl.float32)}  # fmt: skip


def num_slots(num_tokens: int, num_sequences: int) -> int:
    """Chunk slots that hold any packing of `num_tokens` into `num_sequences`, padding rows behind them included."""
    return -(-num_tokens // CHUNK) + num_sequences


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    state_indices: Tensor,
    cu_seqlens: Tensor,
    has_initial_state: Tensor | None,
    scale: float,
    use_qk_l2norm: bool,
    exp_gate: bool,
    max_seqlen: int,
    null_index: int,
    out: Tensor,
    checkpoints: Tensor | None,
    checkpoint_cu_starts: Tensor | None,
    checkpoint_every: int,
    zero_padding: bool,
) -> None:
    """Chunked gated delta rule over packed sequences (Yang et al., arXiv:2412.06464, sec. 3.3) in at most 3 launches.

    Args:
        q, k: [T, Hk, K] bf16, fp16 or fp32, last stride 1, others any.
        v: [T, Hv, V], dtype of q, last stride 1, others any.
        g: [T, Hv] fp32, natural log of the decay (its exponential with `exp_gate`), any strides.
        beta: [T, Hv] fp32, any strides.
        state: [N, Hv, V, K] fp32 or bf16, inner three dims dense; rows of non-empty sequences are overwritten.
        state_indices: [B] int32 or int64, any stride; <= null_index skips the sequence.
        cu_seqlens: [B + 1] int32 or int64, contiguous.
        has_initial_state: [B] bool or None (all True), contiguous; False starts from zero whatever the row holds.
        max_seqlen: the host's longest sequence, 0 unknown; only chooses how long segments are.
        out: [T, Hv, V], last stride 1; rows that no sequence owns are zeroed with `zero_padding`, else left.
        checkpoints: [C, Hv, V, K] or None, inner three dims dense.
        checkpoint_cu_starts: [B + 1] int32; `checkpoint_every`: tokens, a multiple of 64.
    Raises:
        ValueError: K or V not in {64, 128, 256}, a last stride that is not 1, or inner dims of a pool not dense.
    """
    config = configs.lookup(configs.PREFILL, device_sm(q.device), q.shape[2], v.shape[2], DTYPES[q.dtype][0])
    prefill_with_config(
        q, k, v, g, beta, state, state_indices, cu_seqlens, has_initial_state, scale, use_qk_l2norm, exp_gate,
        max_seqlen, null_index, out, checkpoints, checkpoint_cu_starts, checkpoint_every, zero_padding, config=config,
    )  # fmt: skip


def prefill_with_config(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    state_indices: Tensor,
    cu_seqlens: Tensor,
    has_initial_state: Tensor | None,
    scale: float,
    use_qk_l2norm: bool,
    exp_gate: bool,
    max_seqlen: int,
    null_index: int,
    out: Tensor,
    checkpoints: Tensor | None,
    checkpoint_cu_starts: Tensor | None,
    checkpoint_every: int,
    zero_padding: bool,
    *,
    config: PrefillConfig,
) -> None:
    """`prefill` with a configuration given by the caller (tuning scripts); the same contract."""
    num_tokens, num_k_heads, head_k_dim = q.shape
    num_v_heads, head_v_dim = v.shape[1:]
    num_sequences = cu_seqlens.shape[0] - 1
    check_arguments(q, k, v, state, out, cu_seqlens, has_initial_state, checkpoints, checkpoint_every)
    if num_tokens == 0:
        return

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
        prefill_solve_kernel,
        (slots * (num_v_heads // heads),),
        q_in, k_in, g, beta, out, state_indices, cu_seqlens, m, p, decay,
        q if use_qk_l2norm else None, k if use_qk_l2norm else None,
        q_in.stride(0), q_in.stride(1), k_in.stride(0), k_in.stride(1), g.stride(0), g.stride(1),
        beta.stride(0), beta.stride(1), out.stride(0), out.stride(1),
        state_indices.stride(0), num_tokens, num_sequences, null_index,
        HK=num_k_heads, HV=num_v_heads, K=head_k_dim, V=head_v_dim, BK=min(config.solve_block_k, head_k_dim),
        HEADS=heads, L2NORM=use_qk_l2norm, EXP_GATE=exp_gate, ZERO_PADDING=zero_padding, DOT=dot,
        PRECISION=precision, SOLVE_PRECISION=solve_precision, SEARCH=SEARCH,
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
        launch(
            prefill_state_kernel,
            (units * num_v_heads * (rows // block_v),),
            q, k, v, out, state, state_indices, cu_seqlens, has_initial_state, m, p, decay, segments,
            checkpoints, checkpoint_cu_starts if checkpoints is not None else None,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), out.stride(0), out.stride(1),
            state.stride(0), checkpoints.stride(0) if checkpoints is not None else 0,
            state_indices.stride(0), num_sequences, null_index, checkpoint_every // CHUNK, segment_chunks, scale,
            HK=num_k_heads, HV=num_v_heads, K=head_k_dim, V=head_v_dim, BV=block_v,
            BK=min(config.state_block_k, head_k_dim), TRANSITION=transition,
            SAME_STRIDES=same_strides, DOT=dot, PRECISION=precision, SEARCH=SEARCH, num_warps=warps, num_stages=stages,
        )  # fmt: skip


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
    if interpreting():
        return tl.float32, "ieee", "ieee"
    precision = "tf32x3" if dtype == torch.float32 else "tf32"
    return DTYPES[dtype][1], precision, config.solve_precision if dtype == torch.bfloat16 else "tf32x3"


def check_arguments(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, out: Tensor, cu_seqlens: Tensor, has_initial_state: Tensor | None,
    checkpoints: Tensor | None, checkpoint_every: int,
) -> None:  # fmt: skip
    """What these kernels need beyond the op's own checks (which have compared shapes, dtypes and devices)."""
    if q.shape[2] not in DIMS or v.shape[2] not in DIMS:
        raise ValueError(f"triton prefill needs K and V in {DIMS}, got K={q.shape[2]}, V={v.shape[2]}")
    for name, tensor in (("q", q), ("k", k), ("v", v), ("out", out), ("cu_seqlens", cu_seqlens),
                         ("has_initial_state", has_initial_state)):  # fmt: skip
        if tensor is not None and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name} needs last stride 1, got strides {tensor.stride()}")
    for name, tensor in (("state", state), ("checkpoints", checkpoints)):
        if tensor is None:
            continue
        dense = (tensor.shape[2] * tensor.shape[3], tensor.shape[3], 1)
        if tensor.stride()[1:] != dense:
            raise ValueError(f"{name} needs inner strides {dense}, got {tensor.stride()[1:]}")
    if checkpoints is not None and (checkpoint_every <= 0 or checkpoint_every % CHUNK):
        raise ValueError(f"checkpoint_every needs to be a positive multiple of {CHUNK}, got {checkpoint_every}")
