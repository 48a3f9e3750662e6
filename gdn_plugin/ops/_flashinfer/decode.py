"""Backend `flashinfer`, decode: one token a sequence, pool rows by index.

FlashInfer means two things by a negative row: with an fp32 pool the sequence is skipped and its output zeroed; with a
bf16 pool it runs on row 0, which it reads and writes. Neither knows vLLM's null block, row 0. Here both become the
contract's: rows <= null_index are padding. Where the caller's own numbers say that already, and they lie side by side
on a boundary, FlashInfer's kernel is the only launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdn_plugin.ops._flashinfer.api import flashinfer_api
from gdn_plugin.ops._flashinfer.arguments import (
    as_its_shape_says,
    is_aligned,
    is_dense,
    need_alignment,
    need_contiguous,
    need_dtype,
    need_unit_inner_stride,
)
from gdn_plugin.ops._flashinfer.warm_up import compile_count, warm_up, warm_up_pool

__all__ = ["check_recurrent_arguments", "compile_count", "decode", "warm_up", "warm_up_pool"]

# FlashInfer compiles for indices that start on such a boundary (16 would do for fp32 pools).
INDEX_ALIGNMENT = 32


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    state_indices: Tensor,
    scale: float,
    use_qk_l2norm: bool,
    null_index: int,
    out: Tensor,
    zero_padding: bool,
) -> None:
    """One token of the gated delta rule a sequence, by FlashInfer.

    Launches: FlashInfer's kernel; one of ours before it, for row numbers, where `state_indices` is strided or starts
    off a 32-byte boundary, or where null_index >= 0 with an fp32 pool (map padding to -1 once a step instead, and pass
    null_index=-1); one of ours behind it with a bf16 pool and zero_padding. FlashInfer fills two small tensors when it
    first meets a batch size: run each size once before capturing it.

    Output of padding: zero with an fp32 pool. With a bf16 pool and without zero_padding it is S_0 q, S_0 being what the
    pool's row 0 holds: zero for the q = 0 that conv_prologue writes for padding.

    Args:
        q, k: [B, Hk, K] bf16, last stride 1, K = 128.
        v, out: [B, Hv, V] bf16, last stride 1, V = 128.
        a, b: [B, Hv] bf16, any row stride; fp32 too with an fp32 pool.
        A_log: [Hv] fp32.
        dt_bias: [Hv] bf16 or fp32.
        state: [N, Hv, V, K] fp32 or bf16, any dim-0 stride (fp32: a multiple of 4 elements). With a bf16 pool row 0
            is scratch: padding runs on it.
        state_indices: [B] int32, unique among live sequences.
        null_index: rows up to it are padding. A bf16 pool needs >= 0, because row 0 then belongs to no sequence.
    Raises:
        ValueError: an argument that FlashInfer would refuse or copy, or a bf16 pool with null_index < 0.
        BackendLoadError: FlashInfer cannot be imported.
    """
    batch = q.shape[0]
    check_recurrent_arguments(q, k, v, a, b, A_log, dt_bias, state, null_index, out)
    if batch == 0:
        return
    skips_padding = state.dtype == torch.float32
    rows = state_indices
    off_boundary = not (is_dense(rows) and is_aligned(rows, INDEX_ALIGNMENT))
    # A bf16 pool's kernel takes row 0 for padding as it is, and other null rows for sequences.
    if off_boundary or null_index > (-1 if skips_padding else 0):
        from gdn_plugin.ops._flashinfer.rows import start_rows

        rows = start_rows(rows, null_index, padding=-1 if skips_padding else 0)
    elif batch == 1:
        rows = as_its_shape_says(rows)

    entry = flashinfer_api().decode
    entry.call(
        q=q.unsqueeze(1),
        k=k.unsqueeze(1),
        v=v.unsqueeze(1),
        state=None,
        A_log=A_log,
        a=a.unsqueeze(1),
        dt_bias=dt_bias,
        b=b.unsqueeze(1),
        scale=scale,
        output=out.unsqueeze(1),
        use_qk_l2norm=use_qk_l2norm,
        initial_state=state,
        initial_state_indices=rows,
        # "auto" may leave these kernels for generated ones.
        **entry.only(backend="flashinfer"),
    )
    if zero_padding and not skips_padding:
        from gdn_plugin.ops._flashinfer.rows import zero_padding as zero_padding_rows

        zero_padding_rows(out, state_indices, null_index)


def check_recurrent_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    null_index: int,
    out: Tensor,
    *,
    fp32_gates: bool = True,
) -> None:
    """What decode and verify ask of their arguments. Raises ValueError.

    Args:
        fp32_gates: whether this kernel reads fp32 gates as they are; verify converts them to bf16, by copies.
    """
    need_dtype((torch.bfloat16,), q=q, k=k, v=v, out=out)
    need_dtype((torch.float32, torch.bfloat16), state=state, dt_bias=dt_bias)
    need_dtype((torch.float32,), A_log=A_log)
    gates = (torch.bfloat16, torch.float32) if fp32_gates and state.dtype == torch.float32 else (torch.bfloat16,)
    need_dtype(gates, a=a, b=b)
    need_unit_inner_stride(q=q, k=k, v=v, a=a, b=b, out=out)
    need_contiguous(A_log=A_log, dt_bias=dt_bias)
    alignment = 16 if state.dtype == torch.float32 else 32
    need_alignment(alignment, q=q, k=k, v=v, state=state, out=out)
    if state.dtype == torch.float32 and state.stride(0) % 4:
        raise ValueError(
            f"state: backend flashinfer needs a dim-0 stride that is a multiple of 4, got {state.stride(0)}"
        )
    if state.dtype == torch.bfloat16:
        need_alignment(32, A_log=A_log, dt_bias=dt_bias)
        if null_index < 0:
            raise ValueError(
                "null_index: with a bfloat16 pool FlashInfer runs padding on row 0 of the pool, so that row must "
                f"belong to no sequence: pass null_index >= 0 and keep it free, got {null_index}"
            )
