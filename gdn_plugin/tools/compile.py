"""Compiles kernels for a GPU that need not be present and reads what the compiler says of them.

Triton's kernels compile in processes of their own (`workers` of them), FlashInfer's in the one that its DSL needs.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

from gdn_plugin.registry import OPS, PHASE_OF_OP, Platform, Problem, load, rows
from gdn_plugin.tools import child

SMS = (80, 90, 100, 103, 120)
BACKENDS = ("triton", "flashinfer")


@dataclass(frozen=True, slots=True)
class Row:
    """One compiled kernel. None where a number could not be read; `error` is "" unless it failed."""

    backend: str
    name: str
    seconds: float
    registers: int | None = None
    spills: int | None = None
    shared: int | None = None
    error: str = ""


def triton_problems(num_k_heads: int = 16, num_v_heads: int = 32) -> list[Problem]:
    """What is compiled by default: every dtype at K = V = 128, and every other pair of dims in bf16 with fp32 state."""
    kinds = [("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float16"), ("float16", "float32"),
             ("float32", "float32")]  # fmt: skip
    cases = [(io, state, 128, 128) for io, state in kinds]
    cases += [("bfloat16", "float32", K, V) for K in (64, 128, 256) for V in (64, 128, 256) if (K, V) != (128, 128)]
    norms = {(io, "float32", V, V) for io, _, _, V in cases}  # gated_norm has neither a state nor a K
    return [
        Problem(op, io, state, num_k_heads, num_v_heads, K, V, padded_pool=True,
                max_spec_tokens=4 if PHASE_OF_OP[op] == "verify" else 0)
        for op in OPS
        for io, state, K, V in (sorted(norms) if op == "gated_norm" else cases)
    ]  # fmt: skip


def compile_triton(
    sm: int, problems: Sequence[Problem], cache_dir: str | None = None, workers: int | None = None
) -> Iterator[Row]:
    """Rows in the order in which compilations end.

    Args:
        sm: one of `SMS`.
        cache_dir: becomes Triton's cache folder; by default a temporary one, so that everything really is compiled.
        workers: processes; by default one a core.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = scratch if cache_dir is None else os.path.join(os.path.abspath(cache_dir), "triton")
        count = workers or os.cpu_count() or 2
        # spawn: a fork of a process that has torch's threads may hang
        with ProcessPoolExecutor(count, get_context("spawn"), _worker, (folder,)) as pool:
            jobs = {
                pool.submit(compile_variant, sm, problem, index): variant.name
                for problem in problems
                for index, variant in enumerate(triton_variants(problem, sm))
            }
            for job in as_completed(jobs):
                try:
                    yield job.result()
                except BrokenProcessPool:
                    yield Row("triton", jobs[job], 0.0, error="a compiling process died before this one was done")


def flashinfer_problems(num_k_heads: int = 16, num_v_heads: int = 32, dtype: str | None = None) -> list[Problem]:
    """What is compiled by default: bf16 with either pool type. fp16 is prefill's alone, fp32 nobody's."""
    from gdn_plugin.tools.compile_flashinfer import problems

    dtype = dtype or "bfloat16"
    ops = {"bfloat16": ("prefill", "decode", "verify"), "float16": ("prefill",)}.get(dtype, ())
    return problems(num_k_heads=num_k_heads, num_v_heads=num_v_heads, dtype=dtype, ops=ops)


def compile_flashinfer(
    sm: int, problems: Sequence[Problem], cache_dir: str | None = None, sm_count: int | None = None
) -> Iterator[Row]:
    """FlashInfer's GDN kernels; the arguments are those of gdn_plugin.tools.compile_flashinfer.compile_all."""
    from gdn_plugin.tools.compile_flashinfer import compile_all

    for row in compile_all(sm, cache_dir, wanted=problems, sm_count=sm_count):
        name = " ".join(filter(None, (row.kernel, row.case)))
        yield Row("flashinfer", name, row.seconds, row.registers, row.spills, row.shared, row.error)


def _worker(cache_dir: str) -> None:
    child.end_with_parent()
    os.environ["TRITON_CACHE_DIR"] = cache_dir
    os.environ.pop("TRITON_INTERPRET", None)
    # Triton 3.9 fuses multiply and add by default and warns that this will change.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


def triton_variants(problem: Problem, sm: int) -> list[Any]:
    """The variants of a problem on an architecture; each has `compile_for(sm)`."""
    (row,) = (row for row in rows(problem.op) if row.name == "triton")
    return list(load(row).variants(Platform.simulated(f"sm_{sm}"), problem))


def compile_variant(sm: int, problem: Problem, index: int) -> Row:
    """In a worker: variants hold functions, so the worker makes its own list and takes one."""
    from gdn_plugin.tools.resources import resources

    variant = triton_variants(problem, sm)[index]
    start = time.perf_counter()
    try:
        compiled = variant.compile_for(sm)
    except Exception as exc:  # whatever a compiler throws is this row's finding, and the others go on
        text = f"{type(exc).__name__}: {exc}".strip().splitlines()
        return Row("triton", variant.name, time.perf_counter() - start, error=text[0])
    seconds = time.perf_counter() - start
    read = resources(compiled.asm["cubin"])
    return Row(
        "triton", variant.name, seconds, read.registers if read else None, read.spills if read else None,
        compiled.metadata.shared,
    )  # fmt: skip
