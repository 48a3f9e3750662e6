"""Backend `flashinfer`, verify: speculative tokens, each token's state to its own pool row.

FlashInfer's kernels take [B, S, ...] tensors: every sequence brings the same number of tokens. A host whose batches are
ragged says so in its Problem and is refused by a check; a ragged batch that comes all the same, by its token count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdn_plugin.ops._flashinfer.api import Entry, flashinfer_api
from gdn_plugin.ops._flashinfer.arguments import as_its_shape_says, is_aligned, is_dense, need_contiguous, need_dtype
from gdn_plugin.ops._flashinfer.decode import INDEX_ALIGNMENT, check_recurrent_arguments, decode
from gdn_plugin.ops._flashinfer.warm_up import compile_count, warm_up, warm_up_pool
from gdn_plugin.registry.errors import BackendLoadError

__all__ = ["bf16_kernel", "compile_count", "verify", "warm_up", "warm_up_pool"]


def verify(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    state_indices: Tensor,
    num_accepted_tokens: Tensor,
    cu_seqlens: Tensor,
    start_rows: Tensor | None,
    scale: float,
    use_qk_l2norm: bool,
    null_index: int,
    out: Tensor,
    zero_padding: bool,
) -> None:
    """S tokens of the gated delta rule a sequence, every state kept, by FlashInfer.

    Launches: FlashInfer's kernel alone where `start_rows` is given, it and `state_indices` are dense and on a 32-byte
    boundary, and null_index is -1 with an fp32 pool. Else one of ours before it makes those numbers (FlashInfer wants
    each sequence's start row, [B], and cannot index with num_accepted_tokens). With zero_padding one of ours behind it
    zeroes the output of padding, which is else left (fp32 pool) or S_0 q as in `decode` (bf16 pool). With S = 1 this
    is decode.

    Args:
        q, k: [B * S, Hk, K] bf16, last stride 1; v, out [B * S, Hv, V] bf16. Every sequence has S tokens, or none
            where it is padding (its S rows are then padding rows). T != B * S raises; a ragged batch whose missing
            tokens are made up by padding behind cu_seqlens[-1] cannot be told from its shapes and must not be passed.
        a, b: [B * S, Hv] bf16.
        state: [N, Hv, V, K]; fp32: contiguous (FlashInfer's scatter of states knows no row padding); bf16: any dim-0
            stride, and row 0 is scratch.
        state_indices: [B, S] int32, any strides; in a live sequence every row is a live row.
        num_accepted_tokens: [B] int32. cu_seqlens: [B + 1]; empty sequences are padding.
        start_rows: [B] int32, dense. Where no launch of ours is needed nobody looks at cu_seqlens, so that empty
            sequences have to be padding here too, and with a bf16 pool their rows in state_indices null rows >= 0.
    Raises:
        ValueError: an argument that FlashInfer would refuse, copy or misread.
        BackendLoadError: FlashInfer cannot be imported, or has no such kernel for bf16 pools.
    """
    batch, width = state_indices.shape
    check_recurrent_arguments(q, k, v, a, b, A_log, dt_bias, state, null_index, out, fp32_gates=width == 1)
    need_dtype((torch.int32,), num_accepted_tokens=num_accepted_tokens, state_indices=state_indices)
    need_dtype((torch.int32,), start_rows=start_rows)
    need_contiguous(num_accepted_tokens=num_accepted_tokens, cu_seqlens=cu_seqlens, start_rows=start_rows)
    if q.shape[0] != batch * width:
        raise ValueError(
            f"q: backend flashinfer needs {width} tokens of every sequence, as state_indices {(batch, width)} says, "
            f"so {batch * width} rows; got {q.shape[0]} (a ragged batch: use triton)"
        )
    if width == 1 and start_rows is not None:
        raise ValueError(
            "start_rows: backend flashinfer takes them with 2 tokens a sequence or more; with one it runs its decode, "
            "which writes the row that it reads"
        )
    if batch == 0 or width == 0:
        return
    skips_padding = state.dtype == torch.float32
    if skips_padding and width > 1:
        need_contiguous(state=state)

    start, rows = start_rows, state_indices
    if start is None or not _as_they_are(start, rows) or null_index > (-1 if skips_padding else 0):
        from gdn_plugin.ops._flashinfer.rows import verify_rows

        padding = -1 if skips_padding else 0
        start, rows = verify_rows(state_indices, num_accepted_tokens, cu_seqlens, null_index, padding, start_rows)
    elif batch == 1:
        start, rows = as_its_shape_says(start), as_its_shape_says(rows)
    if width == 1:
        # `start` holds what decode takes for padding already, so that needs no launch of its own.
        decode(q, k, v, a, b, A_log, dt_bias, state, start, scale, use_qk_l2norm, -1 if skips_padding else null_index,
               out, zero_padding)  # fmt: skip
        return
    q, k, v, a, b, result = (x.unflatten(0, (batch, width)) for x in (q, k, v, a, b, out))
    shared = {
        "q": q,
        "k": k,
        "v": v,
        "A_log": A_log,
        "a": a,
        "dt_bias": dt_bias,
        "b": b,
        "scale": scale,
        "output": result,
        "initial_state_indices": start,
        "ssm_state_indices": rows,
        "disable_state_update": False,
    }
    if skips_padding:
        flashinfer_api().verify_fp32.call(**shared, initial_state=state, use_qk_l2norm=use_qk_l2norm)
    else:
        bf16_kernel().call(**shared, initial_state_source=state, use_qk_l2norm_in_kernel=use_qk_l2norm)
    if zero_padding:
        from gdn_plugin.ops._flashinfer.rows import zero_padding as zero_padding_rows

        zero_padding_rows(out, start, null_index, tokens=width)


def _as_they_are(start: Tensor, rows: Tensor) -> bool:
    """Whether FlashInfer's kernels, compiled for dense and aligned row numbers, can read these."""
    dense = is_dense(start) and rows.is_contiguous()
    return dense and is_aligned(start, INDEX_ALIGNMENT) and is_aligned(rows, INDEX_ALIGNMENT)


def bf16_kernel() -> Entry:
    """FlashInfer's multi-token kernel for bf16 pools, if it scatters states by row."""
    entry = flashinfer_api().verify_bf16
    if entry is None or not entry.accepts("ssm_state_indices"):
        raise BackendLoadError(
            "flashinfer", hint="this FlashInfer has no gdn_kernels.gated_delta_rule_mtp(ssm_state_indices=...)"
        )
    return entry
