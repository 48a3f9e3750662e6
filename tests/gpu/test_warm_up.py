"""After warm-up nothing compiles, whatever a call's numbers of sequences and tokens are."""

from __future__ import annotations

import pytest
import torch

from gdn_plugin import ops
from gdn_plugin.ops import cases
from gdn_plugin.registry import OPS, Problem, judge, load, probe, rows

HEADS = [(2, 4), (4, 8), (16, 32), (16, 48)]
LENS = [(1,), (64,), (100, 1), (65,) * 3, (500,) * 8, (30,) * 32, (5000,), (16384,), (1, 2000, 3)]
BATCHES = [1, 2, 3, 8, 32, 100]
DRAFTS = 4


def calls(problem: Problem):
    """Lengths that a host may bring."""
    if problem.op in ("decode", "fused_decode", "replay_decode", "replay_fold"):
        return [(1,) * n for n in BATCHES]
    if problem.op == "gated_norm":
        return [(1,), (3,), (257,), (16384,)]
    if problem.max_spec_tokens:
        return [(problem.max_spec_tokens,) * n for n in BATCHES]
    return LENS


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: "x".join(map(str, heads)))
@pytest.mark.parametrize("backend", ["triton", "flashinfer"])
@pytest.mark.parametrize("op", OPS)
def test_nothing_compiles_after_warm_up(backend_function, monkeypatch, op, backend, heads, state_dtype):
    backend_function(backend, op)
    monkeypatch.setenv("GDN_PLUGIN_SELF_CHECK", "0")
    row = next(row for row in rows(op) if row.name == backend)
    dense = op == "verify" and backend == "flashinfer" and state_dtype == "float32"
    problem = Problem(
        op, "bfloat16", state_dtype, *heads, 128, 128, padded_pool=not dense,
        max_spec_tokens=DRAFTS if op in ("verify", "fused_verify", "replay_verify") else 0,
        ring=16 if op.startswith("replay_") else 0,
        padding="none" if op == "verify" else "scratch" if op in ("prefill", "decode") else "any",
        bias_dtype="bfloat16", qk_l2norm=False,
    )  # fmt: skip
    verdict = judge(row, probe("cuda"), problem)
    if not verdict.supported:
        pytest.skip(f"{backend} does not run {problem}: {verdict.reasons[0]}")
    ops.warm_up(problem, backend, "cuda")
    compiled = ops.compile_count()
    moved = []
    for i, lens in enumerate(calls(problem)):
        given = cases.case(problem, lens, wants=row.wants, device="cuda", seed=i, fresh=(0,)).arguments(copy=False)
        if backend == "flashinfer" and op in ("decode", "verify") and problem.padded_pool and state_dtype == "bfloat16":
            ops.warm_up(problem, backend, "cuda", pool=given["state"])  # compiled for the pool's own size
            compiled = ops.compile_count()
        load(row).run(**given)
        torch.cuda.synchronize()
        if ops.compile_count() != compiled:
            moved.append((len(lens), max(lens), ops.compile_count() - compiled))
            compiled = ops.compile_count()
    assert moved == [], "kernels compiled at (sequences, longest, how many)"
