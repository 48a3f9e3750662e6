"""Compile FlashInfer's GDN kernels for a GPU that need not be there, through this plugin's own wrappers.

`compile_all` starts a process for the architecture (the CuTe DSL serves one a process) and yields a row a kernel. With
a cache folder the objects stay where FlashInfer finds them when it runs with FLASHINFER_WORKSPACE_BASE set to that
folder. FlashInfer 0.7.2 keeps decode, verify and the SM 100 prefill kernel on disk; its SM 90 and SM 120 prefill and
its context-parallel kernels live in memory alone, are compiled by every process, and have no artefact. What is kept is
named by architecture, heads, dtypes, scale and (SM 100 prefill) multiprocessor count, and holds for the same versions
of the CuTe DSL and the same FlashInfer files at the same path: build an image's cache inside that image.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gdn_plugin.cache import CacheError, folder
from gdn_plugin.registry.backend import BackendOp, Variant, load
from gdn_plugin.registry.platform import SM_COUNTS, Platform
from gdn_plugin.registry.probe import installed_packages
from gdn_plugin.registry.problem import Problem
from gdn_plugin.registry.table import CUTLASS_DSL_INSTALL, rows

ARCHS = {90: "sm_90a", 100: "sm_100a", 103: "sm_103a", 120: "sm_120a"}
_OPS = ("prefill", "decode", "verify")


@dataclass(frozen=True, slots=True)
class CompileRow:
    """One kernel.

    Args:
        kernel: FlashInfer's name of it.
        case: the call that asked for it.
        seconds: to compile.
        registers, spills, shared: see `resources.Resources`; None where they could not be read.
        artifact: object file in the cache folder, or "".
        error: what went wrong, or "".
    """

    kernel: str
    case: str
    seconds: float
    registers: int | None = None
    spills: int | None = None
    shared: int | None = None
    artifact: str = ""
    error: str = ""


def problems(
    *,
    num_k_heads: int = 16,
    num_v_heads: int = 32,
    dtype: str = "bfloat16",
    state_dtypes: Sequence[str] = ("float32", "bfloat16"),
    max_spec_tokens: int = 4,
    ops: Sequence[str] = _OPS,
) -> list[Problem]:
    """What is compiled: every op with every pool type; prefill with checkpoints and without."""
    return [
        Problem(
            op, dtype, state_dtype, num_k_heads, num_v_heads, 128, 128, checkpoints=op == "prefill",
            max_spec_tokens=max_spec_tokens if op == "verify" else 0,
        )
        for op in ops
        for state_dtype in state_dtypes
    ]  # fmt: skip


def compile_all(
    sm: int,
    cache_dir: str | os.PathLike[str] | None = None,
    *,
    wanted: Sequence[Problem] | None = None,
    sm_count: int | None = None,
    few: bool = False,
) -> Iterator[CompileRow]:
    """Compile in a process of its own; rows come as kernels are done.

    Args:
        sm: 90, 100, 103 or 120.
        cache_dir: where the objects stay; by default nothing is kept.
        wanted: problems; by default `problems()`.
        sm_count: multiprocessors of the GPU; by default those of the architecture's usual part.
        few: one call of each problem, the largest (prefill: the regular route), instead of every variant.
    Raises:
        ValueError: FlashInfer has no GDN kernels for this architecture.
    """
    if sm not in ARCHS:
        raise ValueError(f"sm={sm} is not valid for backend flashinfer; choose one of: {', '.join(map(str, ARCHS))}")
    environment = os.environ | {"CUTE_DSL_ARCH": ARCHS[sm], "PYTHONUNBUFFERED": "1"}
    environment["FLASHINFER_CUDA_ARCH_LIST"] = arch_list(sm)
    # The package may be on sys.path by the current folder alone.
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (*sys.path, environment.get("PYTHONPATH", ""))))
    if cache_dir is not None:
        environment["FLASHINFER_WORKSPACE_BASE"] = str(Path(cache_dir).resolve())
    order = {
        "problems": [dataclasses.asdict(problem) for problem in (problems() if wanted is None else wanted)],
        "sm_count": SM_COUNTS[sm] if sm_count is None else sm_count,
        "cache": cache_dir is not None,
        "few": few,
    }
    with (
        # The DSL hands a kernel's GPU code over as a file beside what else it dumps: by default in the current folder.
        tempfile.TemporaryDirectory(prefix="gdn-plugin-") as dumps,
        subprocess.Popen(
            [sys.executable, "-m", "gdn_plugin.tools.compile_flashinfer", ARCHS[sm], json.dumps(order)],
            env=environment | {"CUTE_DSL_DUMP_DIR": dumps},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as child,
    ):
        assert child.stdout is not None and child.stderr is not None
        finished = False
        try:
            for line in child.stdout:
                if line.startswith(_ROW):
                    yield CompileRow(**json.loads(line.removeprefix(_ROW)))
                finished = finished or line.startswith(_DONE)
        finally:
            if not finished:
                child.kill()  # the caller stopped reading
        errors = child.stderr.read()
    if not finished:
        last = [line for line in errors.splitlines() if line.strip()][-1:] or [f"exit status {child.returncode}"]
        yield CompileRow("", "", 0.0, error=f"the compiling process ended early: {last[0]}")


def arch_list(sm: int) -> str:
    """FLASHINFER_CUDA_ARCH_LIST of a GPU: the name of FlashInfer's folder, for which it else asks the devices here."""
    return f"{sm // 10}.{sm % 10}"


def compiler_trouble(sm: int, kept_in: Path | None = None) -> str | None:
    """None where FlashInfer's smallest GDN kernel compiles for this architecture, else a sentence that says why not.

    A compiler that is installed and broken (libraries for the wrong CUDA, a version that miscompiles, a crash) passes
    every check of versions. So it is asked once, and the answer is kept on disk for the versions that gave it.

    Args:
        sm: 90, 100, 103 or 120.
        kept_in: folder for the answer; by default one in the plugin's cache.
    """
    versions = dict(sorted(installed_packages().items()))
    key = hashlib.sha256(json.dumps([sm, versions]).encode()).hexdigest()[:16]
    kept = None
    try:
        kept = (folder("flashinfer") if kept_in is None else kept_in) / f"compiler-{key}.json"
        return json.loads(kept.read_text(encoding="utf-8"))["trouble"]
    except (CacheError, OSError, ValueError, KeyError):
        pass  # not asked yet, or unreadable: ask
    (wanted,) = problems(ops=("decode",), state_dtypes=("float32",))
    errors = [row.error for row in compile_all(sm, wanted=[wanted], few=True) if row.error]
    trouble = f"the CuTe DSL does not compile for sm_{sm}a: {errors[0]}; {CUTLASS_DSL_INSTALL}" if errors else None
    if kept is not None:
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps({"trouble": trouble, "sm": sm, "versions": versions}), encoding="utf-8")
        except OSError:
            pass  # a read-only home: the next call asks again
    return trouble


_ROW = "row: "
_DONE = "done"


def _child(arch: str, order: dict) -> None:
    """Compile for `arch` in this process, which was started for it, and print rows."""
    from gdn_plugin.tools.resources import resources
    from gdn_plugin.tools.simulated import simulated_device

    sm_count = order["sm_count"]
    platform = Platform.simulated(arch.rstrip("a"), sm_count=sm_count)
    with simulated_device(arch, compile_kernels=True, cache=order["cache"], sm_count=sm_count) as recording:
        for problem in (Problem(**fields) for fields in order["problems"]):
            wanted = list(_flashinfer(problem.op).variants(platform, problem))
            for case in _few(problem, wanted) if order["few"] else wanted:
                recording.reset()
                error = ""
                try:
                    case.compile()
                except Exception as exc:  # whatever a compiler throws is this row's finding, and others follow
                    error = f"{type(exc).__name__}: {exc}".partition("\n")[0]
                artifacts = [str(path) for path in recording.artifacts] or [""]
                for compiled in recording.compiled:
                    row = CompileRow(compiled.kernel, case.name, round(compiled.seconds, 2), artifact=artifacts[0])
                    read = resources(compiled.cubin)
                    _print(dataclasses.replace(row, **dataclasses.asdict(read)) if read else row)
                if error:
                    _print(CompileRow("", case.name, 0.0, error=error))
    print(_DONE)


def _flashinfer(op: str) -> BackendOp:
    return load(next(row for row in rows(op) if row.name == "flashinfer"))


def _few(problem: Problem, wanted: list[Variant]) -> list[Variant]:
    """Of each problem one call: the largest in the form that hosts ask for (prefill: the regular route)."""
    hosts = [variant for variant in wanted if not {"l2norm", "start_rows"} & set(variant.name.split())]
    return [variant for variant in hosts if "dt_bias=" not in variant.name][-1:]


def _print(row: CompileRow) -> None:
    print(_ROW + json.dumps(dataclasses.asdict(row)), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="the process that compile_all starts")
    parser.add_argument("arch")
    parser.add_argument("order")
    arguments = parser.parse_args()
    _child(arguments.arch, json.loads(arguments.order))
