"""The verdict on a row, and the errors that show verdicts: the problem, then every candidate with all its reasons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gdn_plugin.registry.problem import Problem


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found about one row.

    Args:
        backend: the row's name.
        supported: it can run the problem.
        preferred: it can, and auto may take it.
        reasons: every reason against it: why it cannot run, or, where it can, why auto would pass it over.
        notes: what to know where it runs.
    """

    backend: str
    supported: bool
    preferred: bool
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class BackendError(RuntimeError):
    """Base of everything that can go wrong between a request and a kernel."""


class NoBackendError(BackendError):
    """A request that nothing can run. It never falls back.

    Attributes:
        problem: what was to be run.
        request: the request as it was made.
        verdicts: the trace, one verdict a candidate.
    """

    def __init__(self, problem: Problem, request: str, verdicts: Sequence[Verdict], hint: str = "") -> None:
        self.problem = problem
        self.request = request
        self.verdicts = tuple(verdicts)
        self.hint = hint
        lines = [f"no backend can run gdn::{problem.op} as requested ({request!r}) for {problem}"]
        for verdict in self.verdicts:
            lines.append(f"  {verdict.backend}:")
            lines.extend(f"    - {reason}" for reason in verdict.reasons or ("can run, but was not asked for",))
        if hint:
            lines.append(f"  {hint}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[type[NoBackendError], tuple[Problem, str, tuple[Verdict, ...], str]]:
        return type(self), (self.problem, self.request, self.verdicts, self.hint)


class BackendLoadError(BackendError):
    """A row's checks passed but its function could not be imported. The cause is chained."""

    def __init__(self, backend: str, hint: str = "") -> None:
        self.backend = backend
        self.hint = hint
        super().__init__(f"backend {backend!r} could not be loaded" + (f": {hint}" if hint else ""))

    def __reduce__(self) -> tuple[type[BackendLoadError], tuple[str, str]]:
        return type(self), (self.backend, self.hint)


class SelfCheckError(BackendError):
    """A backend asked for by name gave wrong numbers, or failed, on the self-check's small problems."""
