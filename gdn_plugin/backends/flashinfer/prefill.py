"""Backend `flashinfer`, prefill: the pool in place, one call, nothing before or after it as the host calls it.

The kernel's own launches: one on the regular route, four (chunk inverses, chunk transfers, fix-up, outputs) on the
context-parallel route that FlashInfer takes by itself where sequences times heads do not fill the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gdn_plugin.backends.flashinfer.api import compile_count, flashinfer_api
from gdn_plugin.backends.flashinfer.tensors import plain, scratch, settled, sizes
from gdn_plugin.registry.backend import BackendOp, Variant
from gdn_plugin.registry.platform import Platform
from gdn_plugin.registry.problem import Problem

_L2_EPS = 1e-6
_CHUNK = 64  # tokens FlashInfer works on at a time, and the smallest checkpoint interval
# FlashInfer compiles for offsets that start on such a boundary.
_OFFSETS_BOUNDARY = 8


def run(
    *,
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
    padding: str,
    checkpoints: Tensor | None,
    checkpoint_cu_starts: Tensor | None,
    checkpoint_every: int,
    out: Tensor,
    zero_padding: bool,
) -> None:
    """Chunked gated delta rule over packed sequences (Yang et al., arXiv:2412.06464), by FlashInfer.

    One FlashInfer call and no launch of ours where padding is "none", exp_gate is True, has_initial_state is None and
    use_qk_l2norm is False: what conv_prologue(exp_gate=True, state=...) prepares. Every other form costs a launch,
    openly: padding "scratch"; exp(g); zeroing fresh rows; FlashInfer's norm of q and k; a scale of 0; row numbers that
    are strided; offsets that are int64 or start off an 8-byte boundary.

    FlashInfer has no mask for padding sequences. With padding "scratch" they are computed on row 0 like any other, and
    the launch behind zeroes their tokens in `out`, and those behind the last sequence. The tokens of all of these have
    to be finite: tiles of 64 tokens are loaded whole, and 0 * NaN is NaN, as an H100 showed. Checkpoints of a padding
    sequence that has tokens are written like any other's.

    Args:
        q, k: [T, Hk, K] bf16 or fp16, contiguous, on a 16-byte boundary, K = 128.
        v, out: [T, Hv, V] of q's dtype, the same, V = 128.
        g: [T, Hv] fp32, the same: exp(log decay) with exp_gate, else the log decay.
        beta: [T, Hv] fp32, the same.
        state: [N, Hv, V, K] fp32, bf16 or fp16, rows on 16-byte boundaries; the rows named are overwritten.
        state_indices: [B] int32, unique among live sequences.
        cu_seqlens: [B + 1] int32 or int64.
        has_initial_state: [B] bool, or None where fresh rows hold zeros already.
        max_seqlen: longest sequence, 0 = unknown: lets the context-parallel route launch smaller grids.
        padding: "none" or "scratch".
        checkpoints: [C, Hv, V, K] of the pool's dtype, contiguous, on a 16-byte boundary.
        checkpoint_cu_starts: [B + 1] int32.
        zero_padding: of no consequence: with "scratch" padding tokens come out as zeros, with "none" there are none.
    """
    batch, tokens = state_indices.shape[0], q.shape[0]
    if batch == 0 or tokens == 0:
        if zero_padding:
            out.zero_()
        return
    api = flashinfer_api()
    q, k, v, g, beta, result = (plain(x) for x in (q, k, v, g, beta, out))
    # Another type of offsets would be another kernel, compiled while serving.
    offsets = settled(cu_seqlens.to(torch.int32), _OFFSETS_BOUNDARY)
    indices = state_indices
    if batch > 1 and indices.stride(0) != 1:
        from gdn_plugin.backends.flashinfer.rows import ALL_LIVE, start_rows

        indices = start_rows(indices, ALL_LIVE, padding=0)
    if has_initial_state is not None:
        from gdn_plugin.backends.flashinfer.rows import zero_fresh

        zero_fresh(state, indices, has_initial_state, offsets, null_index)
    if checkpoints is None or checkpoint_cu_starts is None or checkpoints.shape[0] == 0:
        checkpoints, starts, checkpoint_every = None, None, 0  # no sequence is long enough for one
    else:
        checkpoints, starts = plain(checkpoints), settled(checkpoint_cu_starts, _OFFSETS_BOUNDARY)

    arguments = {
        "q": q,
        "k": k,
        "v": v,
        "g": g if exp_gate else torch.exp(g),
        "beta": beta,
        # FlashInfer reads 0.0 as "the default": run with another scale, the result of which is thrown away below.
        "scale": scale if scale != 0.0 else 1.0,
        "output_final_state": True,
        "cu_seqlens": offsets,
        "output": result,
        "state_checkpoints": checkpoints,
        "checkpoint_cu_starts": starts,
        "checkpoint_every_n_tokens": checkpoint_every,
    }
    if api.prefill_in_place:
        # "auto" may leave this project's own kernels for generated ones that read cu_seqlens back to the host.
        arguments |= api.prefill.only(backend="flashinfer", max_seqlen=_bound(max_seqlen, tokens, batch))
        api.prefill.call(
            **arguments,
            initial_state=state,
            output_state=state,
            state_indices=indices,
            use_qk_l2norm_in_kernel=use_qk_l2norm,
        )
    else:
        _prefill_copying(arguments, state, indices, use_qk_l2norm)
    if scale == 0.0:
        out.zero_()
    elif padding != "none":
        from gdn_plugin.backends.flashinfer.rows import zero_padding as zero_padding_tokens

        zero_padding_tokens(out, indices, null_index, offsets)


def _bound(max_seqlen: int, tokens: int, batch: int) -> int:
    """FlashInfer's bound on the longest sequence, which it wants between the mean length and the packed length.

    A hint of 0 is no bound, so the packed length, which is safe, takes its place; a hint below the mean (tokens past
    cu_seqlens[-1] count as tokens here) is raised to it.
    """
    if max_seqlen <= 0:
        return tokens
    return min(max(max_seqlen, -(-tokens // batch)), tokens)


def _prefill_copying(arguments: dict[str, Any], state: Tensor, indices: Tensor, use_qk_l2norm: bool) -> None:
    """FlashInfer before 0.7, which knows no `state_indices`: states are gathered in fp32 and scattered back.

    Its kernels off SM 100 take fp32 states alone, and its own norm of q and k was not yet honoured everywhere.
    """
    if arguments["checkpoint_cu_starts"] is not None:
        arguments["checkpoint_cu_starts"] = arguments["checkpoint_cu_starts"].to(torch.int64)
    if use_qk_l2norm:
        for name in ("q", "k"):
            x = arguments[name].float()
            normed = x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _L2_EPS)
            arguments[name] = normed.to(arguments[name].dtype)
    rows = indices.to(torch.int64)
    initial = state.index_select(0, rows).float()
    final = torch.empty_like(initial)
    flashinfer_api().prefill.call(**arguments, initial_state=initial, output_state=final)
    state.index_copy_(0, rows, final.to(state.dtype))


def variants(platform: Platform, problem: Problem, pool: Tensor | None = None) -> Iterator[Variant]:
    """Every kernel of prefill: both routes, with checkpoints and without, the norm, and ours around them.

    Nothing is compiled for a pool's own size, so nothing with `pool`.
    """
    if pool is not None:
        return
    sm_count = platform.sm_count or 132
    fills_device = -(-sm_count // problem.num_v_heads)
    for batch in dict.fromkeys((*sizes(fills_device - 1), fills_device)):
        for checkpoints in (False, True) if problem.checkpoints else (False,):
            # FlashInfer keeps the regular route's kernel of SM 100 alone; the others every process compiles.
            kept = platform.sm in (100, 103) and batch == fills_device
            yield _variant(problem, batch, checkpoints, use_qk_l2norm=bool(problem.qk_l2norm), kept=kept)
    if problem.qk_l2norm is None:  # a launch before the kernel, the same for every call
        yield _variant(problem, 1, False, use_qk_l2norm=True)


def _variant(problem: Problem, batch: int, checkpoints: bool, use_qk_l2norm: bool, kept: bool = False) -> Variant:
    words = ["checkpoints"] * checkpoints + ["l2norm"] * use_qk_l2norm
    name = " ".join((f"prefill {problem.dtype} state={problem.state_dtype} B={batch}", *words))
    told = replace(problem, checkpoints=checkpoints, qk_l2norm=use_qk_l2norm)
    return Variant(name, partial(_compile, told, batch), kept=kept)


def _compile(problem: Problem, batch: int) -> None:
    """One call on scratch tensors, in the form that needs the most of our own launches too."""
    given = scratch(problem, [_CHUNK] * batch, exp_gate=True, hint_seqlen=True, pool_rows=batch)
    offsets = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
    rows = torch.arange(2 * batch, dtype=torch.int32, device="cuda") // 2  # each twice: a column of a wider table
    given |= {"state_indices": rows.as_strided((batch,), (2,)), "cu_seqlens": offsets * _CHUNK}
    if problem.checkpoints:
        given["checkpoint_cu_starts"] = offsets
    run(**given)


PREFILL = BackendOp(run, variants, compile_count)
