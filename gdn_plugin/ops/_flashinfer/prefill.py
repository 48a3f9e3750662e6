"""Backend `flashinfer`, prefill: the pool in place, one call, nothing before or after it as the host calls it.

The kernel's own launches: one on the regular route, four (chunk inverses, chunk transfers, fix-up, outputs) on the
context-parallel route that FlashInfer takes by itself where sequences times heads do not fill the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdn_plugin.ops._flashinfer.api import flashinfer_api
from gdn_plugin.ops._flashinfer.arguments import (
    as_its_shape_says,
    is_dense,
    need_alignment,
    need_contiguous,
    need_dtype,
)
from gdn_plugin.ops._flashinfer.warm_up import compile_count, warm_up

__all__ = ["compile_count", "prefill", "warm_up"]

_L2_EPS = 1e-6


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
    """Chunked gated delta rule over packed sequences (Yang et al., arXiv:2412.06464), by FlashInfer.

    One FlashInfer call and no launch of ours where exp_gate is True, has_initial_state is None, use_qk_l2norm is
    False and zero_padding is False: what conv_prologue(exp_gate=True, state=...) prepares. Every other form costs a
    launch, openly: exp(g); zeroing fresh rows; FlashInfer's norm of q and k; zeroing `out`.

    Padding sequences: FlashInfer has no mask for them, and a launch would be needed to make one. So the caller leaves
    them out: `state_indices` holds no negative number, and a sequence on a row <= null_index is empty in `cu_seqlens`.
    Such rows (vLLM's null block, row 0) may be read and written with what they hold already. A padding sequence
    that has tokens would be computed, on its row, as if it were not padding.
    Tokens past cu_seqlens[-1] have to be finite (conv_prologue writes zeros): tiles of 64 tokens are loaded whole, and
    0 * NaN is NaN, as an H100 showed.

    Args:
        q, k: [T, Hk, K] bf16 or fp16, contiguous, K = 128.
        v, out: [T, Hv, V] of q's dtype, contiguous, V = 128. Rows of `out` past cu_seqlens[-1] are left alone, or
            zero with zero_padding.
        g: [T, Hv] fp32, contiguous: exp(log decay) with exp_gate, else the log decay.
        beta: [T, Hv] fp32, contiguous.
        state: [N, Hv, V, K] fp32 or bf16, any dim-0 stride; the rows named are overwritten.
        state_indices: [B] int32, unique. A strided vector is made dense by one launch.
        cu_seqlens: [B + 1] int32 or int64, on an 8-byte boundary.
        has_initial_state: [B] bool, or None where fresh rows hold zeros already.
        max_seqlen: longest sequence, 0 = unknown: lets the context-parallel route launch smaller grids.
        checkpoints: [C, Hv, V, K] of the pool's dtype, contiguous.
        checkpoint_cu_starts: [B + 1] int32 or int64, on an 8-byte boundary.
    Raises:
        ValueError: an argument that FlashInfer would refuse or copy.
        BackendLoadError: FlashInfer cannot be imported.
    """
    batch, tokens = cu_seqlens.shape[0] - 1, q.shape[0]
    need_contiguous(q=q, k=k, v=v, g=g, beta=beta, out=out, cu_seqlens=cu_seqlens, checkpoints=checkpoints)
    need_contiguous(checkpoint_cu_starts=checkpoint_cu_starts)
    need_dtype((torch.bfloat16, torch.float16), q=q)
    need_dtype((q.dtype,), k=k, v=v, out=out)
    need_dtype((torch.float32,), g=g, beta=beta)
    need_dtype((torch.float32, torch.bfloat16), state=state)
    need_dtype((state.dtype,), checkpoints=checkpoints)
    need_alignment(16, q=q, k=k, v=v, g=g, beta=beta, out=out, state=state, checkpoints=checkpoints)
    need_alignment(8, cu_seqlens=cu_seqlens, checkpoint_cu_starts=checkpoint_cu_starts)
    if zero_padding:
        out.zero_()
    if batch <= 0 or tokens == 0:
        return

    api = flashinfer_api()
    if not is_dense(state_indices):
        from gdn_plugin.ops._flashinfer.rows import ALL_LIVE, start_rows

        state_indices = start_rows(state_indices, ALL_LIVE, padding=0)
    elif batch == 1:
        state_indices = as_its_shape_says(state_indices)
    if has_initial_state is not None:
        from gdn_plugin.ops._flashinfer.rows import zero_fresh

        zero_fresh(state, state_indices, has_initial_state, cu_seqlens, null_index)
    if not exp_gate:
        g = torch.exp(g)
    if checkpoints is not None and checkpoints.shape[0] == 0:
        checkpoints = checkpoint_cu_starts = None  # no sequence is long enough for one

    arguments = {
        "q": q,
        "k": k,
        "v": v,
        "g": g,
        "beta": beta,
        # FlashInfer reads 0.0 as "the default": run with another scale, the result of which is thrown away below.
        "scale": scale if scale != 0.0 else 1.0,
        "output_final_state": True,
        "cu_seqlens": cu_seqlens,
        "output": out,
        "state_checkpoints": checkpoints,
        "checkpoint_cu_starts": checkpoint_cu_starts,
        "checkpoint_every_n_tokens": checkpoint_every if checkpoints is not None else 0,
    }
    if api.prefill_in_place:
        # "auto" may leave this project's own kernels for generated ones that read cu_seqlens back to the host.
        arguments |= api.prefill.only(backend="flashinfer", max_seqlen=_bound(max_seqlen, tokens, batch))
        api.prefill.call(
            **arguments,
            initial_state=state,
            output_state=state,
            state_indices=state_indices,
            use_qk_l2norm_in_kernel=use_qk_l2norm,
        )
    else:
        _prefill_copying(arguments, state, state_indices, use_qk_l2norm)
    if scale == 0.0:
        out.zero_()


def _bound(max_seqlen: int, tokens: int, batch: int) -> int:
    """FlashInfer's bound on the longest sequence, which it wants between the mean length and the packed length.

    A hint of 0 is no bound, so the packed length, which is safe, takes its place; a hint below the mean (tokens past
    cu_seqlens[-1] count as tokens here) is raised to it.
    """
    if max_seqlen <= 0:
        return tokens
    return min(max(max_seqlen, -(-tokens // batch)), tokens)


def _prefill_copying(arguments: dict, state: Tensor, state_indices: Tensor, use_qk_l2norm: bool) -> None:
    """FlashInfer before 0.7, which knows no `state_indices`: states are gathered in fp32 and scattered back.

    Its kernels off SM 100 take fp32 states alone, and its own norm of q and k was not yet honoured everywhere.
    """
    checkpoints = arguments["state_checkpoints"]
    if checkpoints is not None and checkpoints.dtype != torch.float32:
        raise ValueError("checkpoints: FlashInfer before 0.7 (no in-place state) writes them in float32 alone")
    if checkpoints is not None:
        arguments["checkpoint_cu_starts"] = arguments["checkpoint_cu_starts"].to(torch.int64)
    if use_qk_l2norm:
        for name in ("q", "k"):
            x = arguments[name].float()
            normed = x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _L2_EPS)
            arguments[name] = normed.to(arguments[name].dtype)
    rows = state_indices.to(torch.int64)
    initial = state.index_select(0, rows).float()
    final = torch.empty_like(initial)
    flashinfer_api().prefill.call(**arguments, initial_state=initial, output_state=final)
    state.index_copy_(0, rows, final.to(state.dtype))
