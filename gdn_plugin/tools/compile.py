"""Compiles kernels for a GPU that need not be present and reads what the compiler says of them.

Triton's kernels compile in processes of their own (`workers` of them), FlashInfer's in the one that its DSL needs.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from gdn_plugin import child
from gdn_plugin.registry import OPS, PHASE_OF_OP, USUAL_SLOTS, Platform, Problem, load, rows
from gdn_plugin.tools.compile_flashinfer import ARCHS, arch_list

SMS = (80, 90, 100, 103, 120)
BACKENDS = ("triton", "flashinfer", "cpu")
HOST = "vllm"  # in place of a backend's name: what its room launches itself


# (backend's name, problem, variant's name)
Job = tuple[str, Problem, str]


@dataclass(frozen=True, slots=True)
class Row:
    """One compiled kernel.

    Args:
        registers, spills, shared: None where they could not be read.
        error: "" unless it failed.
        cached: it was in the cache on disk already.
        artifact: a file of it there, or "".
    """

    backend: str
    name: str
    seconds: float
    registers: int | None = None
    spills: int | None = None
    shared: int | None = None
    error: str = ""
    cached: bool = False
    artifact: str = ""


def triton_problems(num_k_heads: int = 16, num_v_heads: int = 32) -> list[Problem]:
    """What is compiled by default.

    bf16 with an fp32 state at K = V = 128, with all that a problem may leave open; every other dtype there, and every
    other pair of dims in these dtypes, as hosts have it. The replay ops, which only hosts call, with equal dims alone.
    """
    kinds = [("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float16"), ("float16", "float32"),
             ("float32", "float32")]  # fmt: skip
    cases = [(io, state, 128, 128) for io, state in kinds]
    cases += [("bfloat16", "float32", K, V) for K in (64, 128, 256) for V in (64, 128, 256) if (K, V) != (128, 128)]
    norms = {(io, "float32", V, V) for io, _, _, V in cases}  # gated_norm has neither a state nor a K

    def facts(op: str, case: tuple[str, str, int, int]) -> dict[str, Any]:
        ring = USUAL_SLOTS if op.startswith("replay_") else 0
        if case == cases[0] and not ring:
            return {}
        return {"bias_dtype": case[0], "qk_l2norm": False, "ring": ring}

    return [
        Problem(op, io, state, num_k_heads, num_v_heads, K, V, padded_pool=True,
                max_spec_tokens=4 if PHASE_OF_OP[op] == "verify" else 0, **facts(op, (io, state, K, V)))
        for op in OPS
        for io, state, K, V in (sorted(norms) if op == "gated_norm" else cases)
        if K == V or not op.startswith("replay_")
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
    platform = Platform.simulated(f"sm_{sm}")
    with tempfile.TemporaryDirectory() as scratch:
        environment = {"TRITON_CACHE_DIR": scratch if cache_dir is None else str(triton_cache(cache_dir))}
        jobs = [
            ("triton", problem, variant.name) for problem in problems for variant in triton_variants(problem, platform)
        ]
        for _, row in compile_jobs(platform, jobs, workers or os.cpu_count() or 2, environment):
            yield row


def triton_cache(cache_dir: str | os.PathLike[str]) -> Path:
    """Where in a cache folder Triton's is: TRITON_CACHE_DIR."""
    return Path(os.path.abspath(cache_dir), "triton")


def compile_jobs(
    platform: Platform, jobs: Sequence[Job], workers: int, environment: Mapping[str, str] | None = None
) -> Iterator[tuple[Job, Row]]:
    """Each job with its row, in the order in which they end.

    Args:
        platform: what is compiled for; it need not be here.
        environment: variables of the processes, beside this one's.
    """
    # CuTe DSL leaves a kernel's GPU code in a folder: by default in the current one.
    with (
        tempfile.TemporaryDirectory(prefix="gdn-plugin-") as dumps,
        _Pool(platform, workers, {"CUTE_DSL_DUMP_DIR": dumps, **(environment or {})}) as pool,
    ):
        running = {pool.submit(compile_variant, platform, *job): job for job in jobs}
        for done in as_completed(running):
            job = running[done]
            try:
                yield job, done.result()
            except BrokenProcessPool:
                yield job, Row(job[0], job[2], 0.0, error="a compiling process died before this one was done")


class _Pool(ProcessPoolExecutor):
    """Fresh processes: a fork of a process that has torch's threads may hang, and would inherit a CUDA context."""

    def __init__(self, platform: Platform, workers: int, environment: Mapping[str, str]) -> None:
        super().__init__(workers, get_context("spawn"), _begin, (platform.sm, dict(environment)))

    def __exit__(self, kind: type[BaseException] | None, *more: Any) -> bool | None:
        """Whoever leaves early, by Ctrl-C say, waits neither for what is queued nor for what is being compiled."""
        if kind is not None:
            for process in self._processes.values():  # kill_workers() from Python 3.14 on
                process.kill()
        return super().__exit__(kind, *more)


def host_jobs(problem: Problem) -> list[Job]:
    """What vLLM's room launches beside the ops: moves of states, for either model runner and any problem."""
    from gdn_plugin.hosts.vllm.state_moves import VARIANTS

    return [(HOST, problem, name) for names in VARIANTS.values() for name in names]


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


def _begin(sm: int | None, environment: Mapping[str, str]) -> None:
    child.end_with_parent()
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ |= environment
    _keep_ptxas()
    if sm in ARCHS:  # read when FlashInfer and its DSL are imported
        os.environ.setdefault("CUTE_DSL_ARCH", ARCHS[sm])
        os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", arch_list(sm))


def _keep_ptxas() -> None:
    """Triton's kernels are found under the version of the ptxas that made them: here the one that the caller has.

    FlashInfer names another one when it is imported, which a worker does between two of Triton's kernels.
    """
    with contextlib.suppress(ImportError, AttributeError):  # no Triton, or one without the tool
        from triton import knobs

        os.environ.setdefault("TRITON_PTXAS_BLACKWELL_PATH", knobs.nvidia.ptxas_blackwell.path)


_listed: dict[tuple[str, Problem, str], list[Any]] = {}


def variants(backend: str, platform: Platform, problem: Problem) -> list[Any]:
    """What a backend can launch for a problem on a platform. A worker is asked for them one by one, and lists once."""
    key = (backend, problem, str(platform))
    if key not in _listed:
        (row,) = (row for row in rows(problem.op) if row.name == backend)
        _listed[key] = list(load(row).variants(platform, problem))
    return _listed[key]


def triton_variants(problem: Problem, platform: Platform) -> list[Any]:
    """The variants of a problem on a platform; each has `compile_for(sm)`."""
    return variants("triton", platform, problem)


def compile_variant(platform: Platform, backend: str, problem: Problem, name: str) -> Row:
    """In a worker: variants hold functions, so the worker makes its own list and takes one."""
    start = time.perf_counter()
    try:
        if backend == HOST:
            return replace(_compile_moves(name, platform), seconds=time.perf_counter() - start)
        (variant,) = (one for one in variants(backend, platform, problem) if one.name == name)
        make = {"triton": _compile_triton, "flashinfer": _compile_flashinfer}[backend]
        row = make(variant, platform)
    except Exception as exc:  # whatever a compiler throws is this row's finding, and the others go on
        text = f"{type(exc).__name__}: {exc}".strip().splitlines()
        row = Row(backend, name, 0.0, error=text[0])
    return replace(row, seconds=time.perf_counter() - start)


def _compile_triton(variant: Any, platform: Platform) -> Row:
    assert platform.sm is not None
    return _triton_row("triton", variant.name, functools.partial(variant.compile_for, platform.sm))


def _compile_moves(name: str, platform: Platform) -> Row:
    from gdn_plugin.backends.triton.variants import pretended
    from gdn_plugin.hosts.vllm.patches.align_copies import RING
    from gdn_plugin.hosts.vllm.state_moves import compile_variant

    assert platform.sm is not None
    with pretended(platform.sm):
        return _triton_row(HOST, name, functools.partial(compile_variant, name, RING))


def _triton_row(backend: str, name: str, compile_it: Callable[[], Any]) -> Row:
    from triton import knobs

    from gdn_plugin.tools.resources import resources

    heard: list[tuple[bool, str]] = []

    def listener(*, metadata_group: Mapping[str, str], cache_hit: bool, **_: Any) -> None:
        heard.append((cache_hit, next((path for path in metadata_group.values() if path.endswith(".json")), "")))

    with knobs.compilation.scope():
        knobs.compilation.listener = listener
        compiled = compile_it()
    read = resources(compiled.asm["cubin"])
    cached, artifact = heard[-1] if heard else (True, "")
    return Row(
        backend, name, 0.0, read.registers if read else None, read.spills if read else None, compiled.metadata.shared,
        cached=cached, artifact=artifact,
    )  # fmt: skip


def _compile_flashinfer(variant: Any, platform: Platform) -> Row:
    from gdn_plugin.tools.simulated import simulated_device

    arch = ARCHS[platform.sm or 0]
    with simulated_device(arch, compile_kernels=True, cache=True, sm_count=platform.sm_count) as recording:
        variant.compile()
        artifact = str(recording.artifacts[0]) if recording.artifacts else ""
        return Row("flashinfer", variant.name, 0.0, cached=not recording.compiled, artifact=artifact)


def main(order: str) -> None:
    """The command that `gdn_plugin.ops.ahead` starts: a JSON object a kernel on standard output."""
    platform, workers, jobs = pickle.loads(Path(order).read_bytes())
    for _, row in compile_jobs(platform, jobs, workers):
        shown = {"name": row.name, "seconds": row.seconds, "cached": row.cached, "artifact": row.artifact}
        print(json.dumps(shown | {"error": row.error}), flush=True)


if __name__ == "__main__":
    # By its own name, under which its functions and classes are found in the processes that it starts.
    importlib.import_module("gdn_plugin.tools.compile").main(sys.argv[1])
