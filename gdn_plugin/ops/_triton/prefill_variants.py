"""Every compilation that prefill can ask for on one GPU: `variants` without a GPU, `warm_up` on one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gdn_plugin.ops._triton import configs
from gdn_plugin.ops._triton.prefill import (
    CHUNK,
    SEARCH,
    dot_types,
    fit_heads,
    prefill_with_config,
    state_launches,
)
from gdn_plugin.ops._triton.prefill_solve import prefill_solve_kernel
from gdn_plugin.ops._triton.prefill_state import prefill_state_kernel
from gdn_plugin.ops._triton.variants import Variant, make_variant
from gdn_plugin.registry import Problem

_TYPES = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}


def variants(problem: Problem, sm: int) -> Iterator[Variant]:
    """What `prefill_out` of `problem` compiles on compute capability `sm` with q, k, v as conv_prologue leaves them.

    Alignments are those of vLLM's tensors: strides of pools and projections are multiples of 16 elements.
    """
    K, V, hk, hv = problem.head_k_dim, problem.head_v_dim, problem.num_k_heads, problem.num_v_heads
    io, pool = _TYPES[problem.dtype], _TYPES[problem.state_dtype]
    label = f"K{K} V{V} {problem.dtype} state={problem.state_dtype}"
    config = configs.lookup(configs.PREFILL, sm, K, V, problem.dtype)
    dot, precision, solve_precision = dot_types(getattr(torch, problem.dtype), config)
    shared = {"HK": hk, "HV": hv, "K": K, "V": V, "DOT": dot, "PRECISION": precision, "SEARCH": SEARCH}
    types = {
        "q_ptr": io, "k_ptr": io, "v_ptr": io, "out_ptr": io, "m_ptr": io, "p_ptr": io, "q_norm_ptr": io,
        "k_norm_ptr": io, "g_ptr": "*fp32", "beta_ptr": "*fp32", "decay_ptr": "*fp32", "segments_ptr": "*fp32",
        "state_ptr": pool, "checkpoints_ptr": pool, "checkpoint_starts_ptr": "*i32", "state_indices_ptr": "*i32",
        "cu_seqlens_ptr": "*i32", "has_initial_ptr": "*i1", "scale": "fp32",
    }  # fmt: skip

    for norm, exp_gate in ((False, False), (False, True), (True, False)):
        constexprs: dict[str, Any] = shared | {
            "HEADS": fit_heads(config.solve_heads, hv // hk), "BK": min(config.solve_block_k, K), "L2NORM": norm,
            "EXP_GATE": exp_gate, "ZERO_PADDING": False, "SOLVE_PRECISION": solve_precision,
            "g_stride_h": 1, "beta_stride_h": 1,
        }  # fmt: skip
        if not norm:
            constexprs |= {"q_norm_ptr": None, "k_norm_ptr": None}
        name = f"prefill_solve {label}{' l2norm' if norm else ''}{' exp_gate' if exp_gate else ''}"
        yield make_variant(name, prefill_solve_kernel, _of(prefill_solve_kernel, types), constexprs,
                           unaligned(prefill_solve_kernel), config.solve_warps, config.solve_stages,
                           config.solve_registers)  # fmt: skip

    whole, split, cut_launch = state_launches(config, K, V)
    kinds = [(whole, False)]
    if config.full_programs and split != whole:
        kinds.append((split, False))
    if config.segment_programs and K <= 128:
        kinds.append((cut_launch, True))
    for (block_v, warps, stages), cut in kinds:
        for transition in (False, True) if cut else (False,):
            constexprs = shared | {
                "BV": block_v,
                "BK": min(config.state_block_k, K),
                "TRANSITION": transition,
                "SAME_STRIDES": True,
            }
            if not cut:
                constexprs["segments_ptr"] = None
            if not problem.checkpoints:
                constexprs |= {"checkpoints_ptr": None, "checkpoint_starts_ptr": None}
            kind = "transition" if transition else "segment" if cut else "sequence"
            yield make_variant(f"prefill_state {label} {kind} BV={block_v}", prefill_state_kernel,
                               _of(prefill_state_kernel, types), constexprs, unaligned(prefill_state_kernel), warps,
                               stages)  # fmt: skip


def warm_up(problem: Problem) -> None:
    """Compile on the current CUDA device by calling prefill on scratch memory, whole and cut into segments.

    As a host calls it: q and k normalised before, g a logarithm, padding left to the `_out` op's caller.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    hk, hv, K, V = problem.num_k_heads, problem.num_v_heads, problem.head_k_dim, problem.head_v_dim
    io, pool = getattr(torch, problem.dtype), getattr(torch, problem.state_dtype)
    major, minor = torch.cuda.get_device_capability(device)
    config = configs.lookup(configs.PREFILL, 10 * major + minor, K, V, problem.dtype)

    def zeros(*shape: int, dtype: torch.dtype = io) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    # Long enough for two segments when the configuration cuts at all.
    tokens = CHUNK * 2 * config.segment_min_chunks
    gates = zeros(tokens, hv, dtype=torch.float32)
    row = hv * V * K
    page = row + 16 * (2 * hk * K + hv * V if problem.padded_pool else 0)
    state = zeros(2 * page, dtype=pool).as_strided((2, hv, V, K), (page, V * K, K, 1))
    one = torch.ones(1, dtype=torch.int32, device=device)
    offsets = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    q, k, v = zeros(tokens, hk, K), zeros(tokens, hk, K), zeros(tokens, hv, V)
    out = torch.empty_like(v)
    starts = torch.tensor([0, tokens // CHUNK], dtype=torch.int32, device=device)
    points = (None, zeros(tokens // CHUNK, hv, V, K, dtype=pool)) if problem.checkpoints else (None,)
    fresh = torch.zeros(1, dtype=torch.bool, device=device)
    # (full_programs, segment_programs): whole, V split finer, cut.
    programs = hv * -(-V // config.small_block_v)
    kinds = [(0, 0)]
    if config.full_programs:
        kinds.append((10**9, 0))
    if config.segment_programs and K <= 128:
        kinds.append((0, 2 * programs))
    for (full, cut), check, initial in itertools.product(kinds, points, (None, fresh)):
        prefill_with_config(
            q, k, v, gates, gates, state, one, offsets, initial, K**-0.5, False, False, 0, 0, out,
            check, None if check is None else starts, 0 if check is None else CHUNK, False,
            config=replace(config, full_programs=full, segment_programs=cut),
        )  # fmt: skip


def unaligned(kernel: Any) -> tuple[str, ...]:
    """The arguments that the kernel's decorator keeps from being specialised."""
    return tuple(p.name for p in kernel.params if p.do_not_specialize or p.do_not_specialize_on_alignment)


def _of(kernel: Any, types: dict[str, str]) -> dict[str, str]:
    return {name: kind for name, kind in types.items() if name in kernel.arg_names}
