"""Backend `flashinfer`, verify: speculative tokens, each token's state to its own pool row.

FlashInfer's kernels take [B, S, ...] tensors, so checks let through what brings S tokens of every sequence, none of
them padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from gdn_plugin.backends.flashinfer.api import compile_count, flashinfer_api
from gdn_plugin.backends.flashinfer.decode import (
    BOUNDARY,
    MOST_WORK,
    compiled_for_the_pool,
    forms,
    gate_parameters,
    pool_of,
    step,
)
from gdn_plugin.backends.flashinfer.tensors import is_aligned, plain, scratch, settled, sizes
from gdn_plugin.registry.backend import BackendOp, Variant
from gdn_plugin.registry.platform import Platform
from gdn_plugin.registry.problem import Problem


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
    num_accepted_tokens: Tensor,
    cu_seqlens: Tensor,
    start_rows: Tensor | None,
    scale: float,
    use_qk_l2norm: bool,
    null_index: int,
    padding: str,
    out: Tensor,
    zero_padding: bool,
) -> None:
    """S tokens of the gated delta rule a sequence, every state kept, by FlashInfer.

    Launches: FlashInfer's kernel alone where `start_rows` is given and it and `state_indices` are dense and on a
    32-byte boundary. Else one of ours before it makes those numbers: FlashInfer wants each sequence's start row, and
    cannot index with num_accepted_tokens. With S = 1 it is decode's kernel, and row numbers that are strided or off a
    boundary cost a launch each.

    Args:
        q, k: [B * S, Hk, K] bf16, last stride 1, on a 32-byte boundary; v, out [B * S, Hv, V] bf16, the same.
        a, b: [B * S, Hv] bf16, any row stride. A_log, dt_bias: as in decode.
        state: [N, Hv, V, K]; fp32: rows side by side (FlashInfer's scatter of states knows no row padding); bf16: any
            dim-0 stride that keeps rows on 16-byte boundaries.
        state_indices: [B, S] int32, any strides.
        num_accepted_tokens: [B] int32, dense.
        cu_seqlens, null_index, padding, zero_padding: of no consequence: every sequence has S tokens, none is padding.
        start_rows: [B] int32, or None.
    """
    batch, width = state_indices.shape
    if batch == 0 or q.shape[0] == 0:
        return
    if width == 1:
        rows = settled(state_indices.select(1, 0), BOUNDARY)
        if start_rows is None:
            start, end = rows, None
        else:
            start, end = settled(start_rows, BOUNDARY), rows
        step(q, k, v, a, b, A_log, dt_bias, state, start, end, scale, use_qk_l2norm, out)
        return

    if start_rows is not None and _as_they_are(start_rows) and _as_they_are(state_indices):
        start, rows = plain(start_rows), plain(state_indices)
    else:
        from gdn_plugin.backends.flashinfer.rows import verify_rows

        start, rows = verify_rows(state_indices, num_accepted_tokens, start_rows)
    A_log, dt_bias = gate_parameters(A_log, dt_bias)
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
    api, state = flashinfer_api(), pool_of(state)
    if state.dtype == torch.float32:
        api.verify_fp32.call(**shared, initial_state=state, use_qk_l2norm=use_qk_l2norm)
    else:
        assert api.verify_bf16 is not None  # a check of the row looked for it
        api.verify_bf16.call(**shared, initial_state_source=state, use_qk_l2norm_in_kernel=use_qk_l2norm)


def _as_they_are(rows: Tensor) -> bool:
    """Whether FlashInfer's kernels, compiled for dense and aligned row numbers, can read these."""
    return rows.is_contiguous() and is_aligned(rows, BOUNDARY)


def variants(platform: Platform, problem: Problem, pool: Tensor | None = None) -> Iterator[Variant]:
    """Every kernel of verify with problem.max_spec_tokens tokens a sequence, and ours before them.

    With `pool` and without as in decode.
    """
    if not problem.max_spec_tokens or compiled_for_the_pool(problem) != (pool is not None):
        return
    width = problem.max_spec_tokens
    most = 1 if width == 1 and problem.state_dtype == "float32" else max(1, MOST_WORK // problem.num_v_heads)
    for form, told in forms(problem):
        for batch in sizes(most):
            # One token from a row given is another kernel than one token in place.
            for given in (False, True) if width == 1 or batch == 1 else (False,):
                name = f"verify {problem.dtype} state={problem.state_dtype} B={batch} S={width}{form}"
                name += " start_rows" if given else ""
                yield Variant(name, partial(_compile, told, batch, given, pool), kept=pool is None)


def _compile(problem: Problem, batch: int, given: bool, pool: Tensor | None) -> None:
    """One call on scratch tensors; of a pool given it touches row 0, whose values stay."""
    lens = [problem.max_spec_tokens] * batch
    run(**scratch(problem, lens, pool, promise="none", start_rows=given))


VERIFY = BackendOp(run, variants, compile_count)
