"""Backends are rows: a name, a lazy target, checks, and where the row is preferred."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import PathFinder
from typing import Any

from gdn_plugin.registry.errors import BackendLoadError
from gdn_plugin.registry.platform import Platform
from gdn_plugin.registry.problem import Problem

# None, or one sentence with what is needed and what was found.
Check = Callable[[Platform, Problem], str | None]


@dataclass(frozen=True, slots=True)
class Backend:
    """One way to run one op.

    Args:
        name: what a user asks for.
        target: "module:function"; imported by `load`, never by a check. Its arguments are those that
            README's "Adding a backend" lists for the op, all outputs preallocated.
        checks: each says None, or why this row cannot run the problem here.
        preferred: says None where auto may take this row, or why it should not; without it, auto may take
            the row wherever it can run.
        notes: sentences worth telling where the row does run ("copying: ..."); they refuse nothing.
        install: what to install where the row cannot be loaded.
    """

    name: str
    target: str
    checks: tuple[Check, ...] = ()
    preferred: Check | None = None
    notes: tuple[Check, ...] = ()
    install: str = ""


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


@dataclass(frozen=True, slots=True)
class Choice:
    """A backend for one problem, and how it came to be chosen.

    Args:
        name: of the chosen backend.
        backend: its row; `load(choice.backend)` gives the function.
        verdicts: on every row of the op, best-ranked first.
        request: what was asked for: "auto", a name, or a list.
        problem: what it was chosen for.
    """

    name: str
    backend: Backend
    verdicts: tuple[Verdict, ...]
    request: str
    problem: Problem

    @property
    def verdict(self) -> Verdict:
        """The verdict on the chosen row."""
        return next(v for v in self.verdicts if v.backend == self.name)

    @property
    def lost(self) -> tuple[Verdict, ...]:
        """Verdicts on the rows ranked above the chosen one."""
        names = [v.backend for v in self.verdicts]
        return self.verdicts[: names.index(self.name)]

    def describe(self) -> str:
        """One line: what runs the op, why, and why each better-ranked backend lost."""
        asked = "auto" if self.request == "auto" else f"asked for: {self.request}"
        line = f"{self.problem.op}: {self.name} ({asked})"
        if self.verdict.notes:
            line += f" [{'; '.join(self.verdict.notes)}]"
        named = None if self.request == "auto" else split_request(self.request)
        for verdict in self.lost:
            if named is None or verdict.backend in named:
                line += f"; not {verdict.backend}: {', '.join(verdict.reasons)}"
        return line


def split_request(request: str) -> tuple[str, ...]:
    """The names of a request, "flashinfer, triton" -> ("flashinfer", "triton")."""
    return tuple(name for name in (part.strip() for part in request.split(",")) if name)


def in_build(target: str) -> bool:
    """Whether the module of a "module:function" target exists, found without importing any part of it."""
    module = target.partition(":")[0]
    if module in sys.modules:
        return True
    top, *rest = module.split(".")
    # Looking up a top-level name imports nothing; a dotted one would import its parents, torch with them.
    spec = importlib.util.find_spec(top)
    path = top
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return False
        path = f"{path}.{part}"
        spec = PathFinder.find_spec(path, list(spec.submodule_search_locations))
    return spec is not None


def load(backend: Backend) -> Callable[..., Any]:
    """The function a row points to.

    Raises:
        BackendLoadError: the module cannot be imported or has no such function; the cause is chained.
    """
    module, _, function = backend.target.partition(":")
    try:
        loaded = importlib.import_module(module)
    except Exception as exc:  # whatever a third-party import raises, it is this backend that cannot be loaded
        hint = f"importing {module} failed: {exc}"
        raise BackendLoadError(backend.name, hint + (f"; {backend.install}" if backend.install else "")) from exc
    try:
        return getattr(loaded, function)
    except AttributeError as exc:
        raise BackendLoadError(backend.name, f"{module} has no function {function!r} in this build") from exc
