"""Self-check: a chosen kernel runs one small problem and is compared with the plain recurrence before first use.

The problem has the layer's own heads, dims, dtypes and pool layout, so the kernel variants checked are those that will
serve. It holds what kernels get wrong: a sequence longer than a chunk, an empty one, a fresh one in a poisoned row, a
padding one; rows that nothing names must stay bit-identical.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from gdn_plugin import settings
from gdn_plugin.registry import (
    Backend,
    BackendError,
    Platform,
    Problem,
    Selection,
    SelfCheckError,
    load,
    select,
)

_log = logging.getLogger(__name__)

# Largest error allowed, relative to the root mean square of the right result, by io dtype. Looser than the tests'
# table: this one tells a working kernel from a broken one on a machine nobody has seen, where errors are of order 1.
# fp32 allows for tensor cores that round operands to TF32.
LIMITS = {"bfloat16": 0.04, "float16": 0.01, "float32": 0.01, "float64": 0.01}
# A single element may be off by this much more than the whole.
ELEMENT_FACTOR = 16.0
# Backends whose kernels take only what a host prepares for them (selfcheck_cases.build).
PREPARED = ("flashinfer",)


@dataclass(frozen=True, slots=True)
class CheckResult:
    """How one backend did on one op.

    Args:
        errors: relative error by result ("out", "state", ...), against the root mean square of the right one.
        max_errors: largest absolute error by result.
        limit: what `errors` may be.
        seconds: of the run, compilation included.
        failure: one sentence on what is wrong; None where the backend passed.
    """

    backend: str
    op: str
    errors: Mapping[str, float]
    max_errors: Mapping[str, float]
    limit: float
    seconds: float
    failure: str | None

    @property
    def ok(self) -> bool:
        return self.failure is None


def resolve(
    platform: Platform, problems: Mapping[str, Problem], requests: Mapping[str, str] | None = None
) -> Selection:
    """`registry.select`, with every chosen kernel checked on this machine (unless GDN_PLUGIN_SELF_CHECK=0).

    Under auto a kernel that fails is left out, with a warning, and the next one is chosen.

    Args:
        platform: of this machine: the kernels run on it.
        problems: by op.
        requests: by phase.
    Raises:
        SelfCheckError: a backend that was asked for by name failed its check.
        NoBackendError: a named request cannot run, or under auto every backend failed.
    """
    excluded: dict[str, dict[str, str]] = {}
    while True:
        selection = select(platform, problems, requests, excluded=excluded)
        if not settings.self_check():
            return selection
        failed = False
        for op, choice in selection.choices.items():
            result = check(choice.backend, choice.problem, platform.device)
            if result.failure is None:
                continue
            reason = f"self-check failed: {result.failure}"
            if choice.request != "auto":
                raise SelfCheckError(
                    f"backend {choice.name!r}, asked for {choice.problem}, failed its self-check: {result.failure}. "
                    "Ask for auto to use another backend, or set GDN_PLUGIN_SELF_CHECK=0 to use it all the same."
                )
            _log.warning("gdn_plugin: %s is not used for %s: %s", choice.name, choice.problem, reason)
            excluded.setdefault(op, {})[choice.name] = reason
            failed = True
        if not failed:
            return selection


def check(backend: Backend, problem: Problem, device: str) -> CheckResult:
    """The self-check of a backend, run once a process for each backend, op and family of problems.

    Typical sizes do not change which kernel runs and are left out of the family.
    """
    return _cached(backend, replace(problem, num_sequences=0, num_tokens=0), device)


@functools.cache
def _cached(backend: Backend, problem: Problem, device: str) -> CheckResult:
    return run(backend, problem, device)


def run(backend: Backend, problem: Problem, device: str) -> CheckResult:
    """Run the small problem through a backend and through the recurrence. Whatever goes wrong is in the result."""
    from gdn_plugin import selfcheck_cases

    limit = LIMITS[problem.dtype]
    errors: dict[str, float] = {}
    largest: dict[str, float] = {}
    failure: str | None = None
    seconds = 0.0
    try:
        function = load(backend)
        case = selfcheck_cases.build(problem, device, prepared=backend.name in PREPARED)
        start = time.perf_counter()
        got = case.run(function)
        seconds = time.perf_counter() - start
        want = case.truth()
        for name in want:
            errors[name], largest[name], rms = selfcheck_cases.compare(got[name], want[name])
            # Written so that NaN fails.
            if not (errors[name] <= limit and largest[name] <= limit * ELEMENT_FACTOR * rms) and failure is None:
                failure = (
                    f"{name} of {problem.op} is off by {errors[name]:.2g} of its size (allowed {limit:.2g}), "
                    f"by {largest[name]:.2g} at most"
                )
        failure = failure or case.trespass()
    except BackendError as exc:
        failure = str(exc)
    except Exception as exc:  # a kernel may fail in any way; the policy (raise or move on) is the caller's
        failure = f"{type(exc).__name__}: {exc}".strip()
    return CheckResult(backend.name, problem.op, errors, largest, limit, seconds, failure)
