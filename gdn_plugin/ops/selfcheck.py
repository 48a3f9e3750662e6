"""Self-check: a chosen kernel runs small problems and is compared with the plain recurrence before first use.

The problems have the layer's own heads, dims, dtypes and pool layout and, on a GPU, the sizes by which kernels are
chosen, so the kernels checked are those that will serve. They hold what kernels get wrong: a sequence longer than a
chunk, an empty one, a fresh one in a poisoned row, a padding one with tokens; whatever nothing names must stay
bit-identical. That a backend passed is remembered on disk, by device, versions and problem, so that a start pays for it
once; that it failed is not.
"""

from __future__ import annotations

import contextvars
import functools
import hashlib
import json
import logging
import os
import time
import traceback
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gdn_plugin
from gdn_plugin import cache
from gdn_plugin.ops import cases
from gdn_plugin.registry import Backend, BackendError, Platform, Problem, SelfCheckError, load, rows
from gdn_plugin.registry.backend import left_out

_log = logging.getLogger(__name__)

# Largest error allowed, relative to the root mean square of the right result, by io dtype. Looser than the tests'
# table: this one tells a working kernel from a broken one on a machine nobody has seen, where errors are of order 1.
# fp32 allows for tensor cores that round operands to TF32.
LIMITS = {"bfloat16": 0.04, "float16": 0.01, "float32": 0.01, "float64": 0.01}
# A single element may be off by this much more than the whole.
ELEMENT_FACTOR = 16.0
# (sequence, value head) pairs of the larger problems, by which Triton's tables have other tiles and staged kernels, and
# the most bytes of states there, eight tokens of an fp32 one at K = V = 128; a larger one is left out. Beside a pool
# there are a copy, what of it must be written, and a byte for each of its bytes.
CROWDS = (256, 1024)
MOST_BYTES = 1 << 29
TRUTH = "reference"
_under_way: contextvars.ContextVar[frozenset[str]] = contextvars.ContextVar("gdn_plugin_checks", default=frozenset())


@dataclass(frozen=True, slots=True)
class CheckResult:
    """How one backend did on one op.

    Args:
        errors: largest relative error by result ("out", "state", ...), against the root mean square of the right one.
        max_errors: largest absolute error by result.
        limit: what `errors` may be.
        seconds: of the runs, compilation included.
        failure: one sentence on what is wrong; None where the backend passed.
        cause: the exception behind the failure, if there was one.
        whole: whether every problem was run: the larger ones are not where the device has no memory for them.
    """

    backend: str
    op: str
    errors: Mapping[str, float]
    max_errors: Mapping[str, float]
    limit: float
    seconds: float
    failure: str | None
    cause: Exception | None = None
    whole: bool = True

    @property
    def ok(self) -> bool:
        return self.failure is None


def require(row: Backend, problem: Problem, platform: Platform) -> bool:
    """See to it that a backend was checked on this machine for problems of this kind: now, in this process, or earlier.

    Nothing is checked on a device without values, and while a CUDA graph is captured.

    Returns:
        Whether it ran in this process, so that whatever it has to compile is there.
    Raises:
        SelfCheckError: it failed. The cause is chained.
    """
    if row.name == TRUTH or platform.device == "meta" or _capturing(platform):
        return False
    # Typical sizes do not change which kernels there are.
    result = _checked(row, replace(problem, num_sequences=0, num_tokens=0), platform)
    if result is not None and result.failure is not None:
        raise SelfCheckError(f"self-check failed: {result.failure}") from result.cause
    return result is not None


def _capturing(platform: Platform) -> bool:
    return platform.device == "cuda" and torch.cuda.is_current_stream_capturing()


@functools.cache
def _checked(row: Backend, problem: Problem, platform: Platform) -> CheckResult | None:
    """The result of a check; None where an earlier process has seen it pass."""
    verdict = _verdict_file(row, problem, platform)
    if verdict is not None and verdict.exists():
        return None
    result = run(row, problem, platform.device)
    if result.ok and result.whole and verdict is not None:
        text = {"backend": row.name, "problem": asdict(problem), "seconds": result.seconds}
        try:
            draft = verdict.with_suffix(f".{os.getpid()}")
            draft.write_text(json.dumps(text), encoding="utf-8")
            draft.replace(verdict)  # in one step: another process may be looking
        except OSError as exc:  # a full or read-only disk: the next process checks again
            _log.debug("gdn_plugin: the verdict on %s could not be kept: %s", row.name, exc)
    return result


def _verdict_file(row: Backend, problem: Problem, platform: Platform) -> Path | None:
    """Where it is kept that the plugin's own backend passed; None for third parties', whose code has no name here."""
    if not row.target.startswith("gdn_plugin."):
        return None
    facts = (platform.device, platform.sm, platform.cuda, platform.sm_count, sorted(platform.packages.items()),
             sorted(platform.features.items()), row.name, row.target, str(problem), fingerprint())  # fmt: skip
    try:
        folder = cache.folder("self-check")
    except cache.CacheError:
        return None
    return folder / f"{hashlib.sha256(repr(facts).encode()).hexdigest()[:32]}.json"


@functools.cache
def fingerprint() -> str:
    """Of the plugin's own sources: other kernels are other verdicts, whatever the version says."""
    digest = hashlib.sha256()
    root = Path(gdn_plugin.__file__).parent
    for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".h", ".cpp")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()


def run(row: Backend, problem: Problem, device: str) -> CheckResult:
    """Run the small problems through a backend and through the recurrence. Whatever goes wrong is in the result.

    In a thread of its own: the caller's default device, autocast, grad mode and tracing are the caller's thread's.

    Args:
        device: as the platform names it.
    """
    device = "cuda" if device == "rocm" else device  # as torch calls it
    if row.target in _under_way.get():
        # A backend that calls the op that it offers would be checked inside its own check, without end.
        said = f"{row.name} calls {problem.op} without naming a backend, which may be itself"
        return CheckResult(row.name, problem.op, {}, {}, LIMITS[problem.dtype], 0.0, said)
    gpu = torch.cuda.current_device() if device == "cuda" else None
    context = contextvars.copy_context()
    context.run(_under_way.set, _under_way.get() | {row.target})

    def plainly() -> CheckResult:
        if gpu is not None:
            torch.cuda.set_device(gpu)
        return context.run(_run, row, problem, device)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(plainly).result()


def small_cases(row: Backend, problem: Problem, device: str) -> Iterator[cases.Case]:
    """The calls that are checked, in the form that the backend wants; the smallest first."""
    few = _few(problem)
    yield _case(row, problem, few, device)
    if device == "cpu" or not row.by_size:
        return
    if problem.op == "conv_prologue":  # long sequences, in blocks of several steps, are never drafts
        long = (1 << 16) // (2 * problem.num_k_heads + problem.num_v_heads)
        yield _case(row, replace(problem, max_spec_tokens=0), [long, 0, 2, 2], device)
        return
    tokens = max(problem.max_spec_tokens, 1) if problem.phase == "verify" else 1
    # One alone; of few heads a prefill is then cut into segments.
    yield _case(row, problem, [300 if problem.op == "prefill" else tokens], device)
    states = 1 if problem.ring else tokens  # of a sequence
    state = problem.head_k_dim * problem.head_v_dim * getattr(torch, problem.state_dtype).itemsize
    for pairs in CROWDS:
        if pairs * states * state <= MOST_BYTES:
            crowd = [tokens] * -(-pairs // problem.num_v_heads)
            yield _case(row, problem, few[:-1] + crowd + few[-1:], device)


def _few(problem: Problem) -> list[int]:
    """Tokens of each sequence of the smallest call."""
    spec = problem.max_spec_tokens or 2
    return {
        "prefill": [67, 0, 5, 2],  # fresh in a poisoned row, empty, carried, padding with tokens
        "conv_prologue": [5, 0, 2, 2] if not problem.max_spec_tokens else [spec, 0, 1, 1],
        "verify": [spec, spec, spec] if not problem.ragged else [spec, 1, 1],
        "fused_verify": [1, spec, 0, 1],  # fresh, carried, empty, padding
        "replay_verify": [1, spec, spec, 0, 1],
        "replay_decode": [1, 1, 1, 1],  # an empty ring, one half full, a full one, padding
        "replay_fold": [1, 1, 1, 1],
    }.get(problem.op, [1, 1, 1])


def _case(row: Backend, problem: Problem, lens: list[int], device: str) -> cases.Case:
    """The first sequence is fresh and the last one, of several, is padding."""
    padding = (len(lens) - 1,) if len(lens) > 1 else ()
    return cases.case(
        problem, lens, wants=row.wants, device=device, seed=20241209, fresh=(0,), padding=padding, pad_tokens=2
    )


def _run(row: Backend, problem: Problem, device: str) -> CheckResult:
    limit = LIMITS[problem.dtype]
    errors: dict[str, float] = {}
    largest: dict[str, float] = {}
    failure: str | None = None
    cause: Exception | None = None
    seconds, done, whole = 0.0, 0, True
    compared = (_compare(row, case, limit, errors, largest) for case in small_cases(row, problem, device))
    try:
        for took, failure in compared:
            seconds += took
            done += 1
            if failure is not None:
                break
    except BackendError as exc:
        failure, cause = str(exc), exc
    except Exception as exc:  # a kernel may fail in any way; the policy (raise or move on) is the caller's
        if done and isinstance(exc, torch.OutOfMemoryError):
            whole = False
            _log.info("gdn_plugin: no memory for the larger problems of the self-check of %s: %s", problem.op, exc)
        else:
            failure, cause = f"{type(exc).__name__}: {exc}".strip(), exc
    if cause is not None:
        traceback.clear_frames(cause.__traceback__)  # results are kept, and the frames hold pools
    return CheckResult(row.name, problem.op, errors, largest, limit, seconds, failure, cause, whole)


def _compare(
    row: Backend, case: cases.Case, limit: float, errors: dict[str, float], largest: dict[str, float]
) -> tuple[float, str | None]:
    """One call: (seconds of the backend, what is wrong); its errors are merged into those of the calls before."""
    with torch.no_grad():
        arguments = case.arguments(zero_padding=True)
        start = time.perf_counter()
        _call(row, arguments)
        if case.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        truth = case.precise_arguments(torch.float32)
        _call(next(row for row in rows(case.op) if row.name == TRUTH), truth)
        got, want = case.results(arguments), case.results(truth)
        failure: str | None = None
        for name in want:
            error, most, size = _distance(got.pop(name).cpu(), want[name])
            # Written so that NaN fails.
            if not (error <= limit and most <= limit * ELEMENT_FACTOR * size) and failure is None:
                failure = (
                    f"{name} of {case.op} is off by {error:.2g} of its size (allowed {limit:.2g}), "
                    f"by {most:.2g} at most"
                )
            # In this order NaN stays.
            errors[name], largest[name] = max(error, errors.get(name, 0.0)), max(most, largest.get(name, 0.0))
        return seconds, failure or case.trespass(arguments)


def _call(row: Backend, arguments: Mapping[str, Any]) -> None:
    """Run a backend on the arguments that it names."""
    run = load(row).run
    run(**{name: value for name, value in arguments.items() if name not in left_out(run, arguments)})


def _distance(got: Tensor, want: Tensor) -> tuple[float, float, float]:
    """(error relative to the size of `want`, largest absolute error, root mean square of `want`); NaN stays NaN."""
    if want.numel() == 0:
        return 0.0, 0.0, 0.0
    difference = got.float() - want.float()
    size = max(float(torch.linalg.vector_norm(want.float())), 1e-30)
    error = float(torch.linalg.vector_norm(difference)) / size
    # max() of a tensor with NaN is NaN, which no limit allows
    return error, float(difference.abs().max()), size / want.numel() ** 0.5
