"""Backend `flashinfer`, decode: one token a sequence, pool rows by index.

FlashInfer means two things by a negative row: with an fp32 pool the sequence is skipped and its output zeroed; with a
bf16 pool it runs on row 0, which it reads and writes. So an fp32 pool may have any padding, mapped to -1 where it does
not say that already; a bf16 pool's padding has to be row 0 itself, a row of nobody.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from gdn_plugin.backends.flashinfer.api import compile_count, flashinfer_api
from gdn_plugin.backends.flashinfer.tensors import is_aligned, plain, scratch, settled, sizes
from gdn_plugin.registry.backend import BackendOp, Variant
from gdn_plugin.registry.platform import Platform
from gdn_plugin.registry.problem import Problem

# FlashInfer compiles for row numbers, A_log and dt_bias that start on such a boundary (for fp32 pools less would do).
BOUNDARY = 32
# FlashInfer chooses tiles by sequences times value heads, and chooses the same ones from here on.
MOST_WORK = 2048


def run(
    *,
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
    padding: str,
    out: Tensor,
    zero_padding: bool,
) -> None:
    """One token of the gated delta rule a sequence, by FlashInfer.

    Launches: FlashInfer's kernel, and one of ours
    - before it, for row numbers: where `state_indices` is strided or starts off a 32-byte boundary, or where an fp32
      pool has padding and null_index >= 0 (map padding to -1 once a step instead, and pass null_index=-1);
    - behind it, with a bf16 pool and padding "scratch": zeros for the output of padding.
    FlashInfer fills two small tensors when it first meets a batch size: run each size once before capturing it.

    Args:
        q, k: [B, Hk, K] bf16, last stride 1, on a 32-byte boundary, K = 128.
        v, out: [B, Hv, V] bf16, the same, V = 128.
        a, b: [B, Hv] bf16, any row stride; fp32 too with an fp32 pool.
        A_log: [Hv] fp32.
        dt_bias: [Hv]; one that is neither bf16 nor fp32 costs a launch.
        state: [N, Hv, V, K] fp32 or bf16, rows on 16-byte boundaries.
        state_indices: [B] int32, unique among live sequences.
        padding: "none" or "scratch"; with an fp32 pool also "any".
        zero_padding: of no consequence: output of padding is zeros.
    """
    batch = q.shape[0]
    if batch == 0:
        return
    skips_padding = state.dtype == torch.float32
    rows = state_indices
    maps_padding = skips_padding and padding != "none" and null_index > -1
    if maps_padding or not (rows.is_contiguous() and is_aligned(rows, BOUNDARY)):
        from gdn_plugin.backends.flashinfer.rows import ALL_LIVE, start_rows

        rows = start_rows(rows, null_index if maps_padding else ALL_LIVE, padding=-1)
    step(q, k, v, a, b, A_log, dt_bias, state, plain(rows), None, scale, use_qk_l2norm, out)
    if padding != "none" and not skips_padding:
        from gdn_plugin.backends.flashinfer.rows import zero_padding as zero_padding_tokens

        zero_padding_tokens(out, state_indices, null_index)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    start: Tensor,
    end: Tensor | None,
    scale: float,
    use_qk_l2norm: bool,
    out: Tensor,
) -> None:
    """FlashInfer's kernel alone.

    Args:
        start: [B] int32, dense, on a boundary: the row that each sequence reads.
        end: the same: the row that it writes; None is `start`, for which FlashInfer has another kernel.
        The others as in `run`.
    """
    A_log, dt_bias = gate_parameters(A_log, dt_bias)
    entry = flashinfer_api().decode
    written = {} if end is None else {"output_state_indices": end}
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
        initial_state=pool_of(state),
        initial_state_indices=start,
        **written,
        # "auto" may leave these kernels for generated ones.
        **entry.only(backend="flashinfer"),
    )


def gate_parameters(A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """A_log and dt_bias as FlashInfer takes them: dense, on a boundary, dt_bias in bf16 or fp32."""
    if dt_bias.dtype not in (torch.bfloat16, torch.float32):
        dt_bias = dt_bias.float()
    return settled(A_log, BOUNDARY), settled(dt_bias, BOUNDARY)


def pool_of(state: Tensor) -> Tensor:
    """The pool; of one row, with the strides that its shape implies."""
    return plain(state) if state.shape[0] == 1 else state


def variants(platform: Platform, problem: Problem, pool: Tensor | None = None) -> Iterator[Variant]:
    """Every kernel of decode, and ours around them.

    A padded bf16 pool has kernels of its own for its very size and strides: they come with `pool`, and nothing else
    does. Row 0 of `pool` is run on and keeps its values.
    """
    if compiled_for_the_pool(problem) != (pool is not None):
        return
    # An fp32 pool's kernel is the same for every batch.
    most = 1 if problem.state_dtype == "float32" else max(1, MOST_WORK // problem.num_v_heads)
    for form, told in forms(problem):
        for batch in sizes(most):
            name = f"decode {problem.dtype} state={problem.state_dtype} B={batch}{form}"
            yield Variant(name, partial(_compile, told, batch, pool), kept=pool is None)


def compiled_for_the_pool(problem: Problem) -> bool:
    """Whether FlashInfer compiles decode and verify for the pool's size and strides."""
    return problem.state_dtype == "bfloat16" and problem.padded_pool


def forms(problem: Problem) -> Iterator[tuple[str, Problem]]:
    """The problem with nothing left open that FlashInfer compiles in, and words for a name.

    First what hosts ask for: q and k normed by conv_prologue, and dt_bias in the model's dtype.
    """
    for norm in (False, True) if problem.qk_l2norm is None else (problem.qk_l2norm,):
        for bias in (problem.bias_dtype,) if problem.bias_dtype else dict.fromkeys((problem.dtype, "float32")):
            words = (" l2norm" if norm else "") + (f" dt_bias={bias}" if bias != problem.dtype else "")
            yield words, replace(problem, qk_l2norm=norm, bias_dtype=bias)


def _compile(problem: Problem, batch: int, pool: Tensor | None) -> None:
    """One call on scratch tensors, of padding alone, in the form that needs the most of our own launches too."""
    run(**scratch(problem, [1] * batch, pool))


DECODE = BackendOp(run, variants, compile_count)
