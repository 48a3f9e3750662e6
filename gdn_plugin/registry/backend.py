"""Backends are rows: a name, a lazy target, checks, where the row is preferred, and what it wants of its caller."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from typing import Any

from gdn_plugin.registry.errors import BackendLoadError, Verdict
from gdn_plugin.registry.platform import Platform
from gdn_plugin.registry.problem import Problem

# None, or one sentence with what is needed and what was found.
Check = Callable[[Platform, Problem], str | None]


@dataclass(frozen=True, slots=True)
class Variant:
    """One kernel that a `BackendOp` can launch.

    Args:
        name: readable, unique among the variants of a problem.
        compile: makes the kernel ready on the current device, for this process; touches nobody's data. A second time
            costs nothing.
        kept: what is compiled is kept on disk, where `compile` finds it in any process: others may compile it ahead,
            `gdn_plugin.tools.compile` says how.
    """

    name: str
    compile: Callable[[], object]
    kept: bool = field(default=False, kw_only=True)


def _no_variants(platform: Platform, problem: Problem, pool: Any = None) -> Iterable[Variant]:
    return ()


def _nothing_compiled() -> int:
    return 0


@dataclass(frozen=True, slots=True)
class BackendOp:
    """What a row's target names: how a backend runs one op.

    Args:
        run: called with the arguments of the op's record by name, those that it names in its signature, every output
            among them and preallocated (with `zero_padding`: whether rows of padding tokens in `out` must become zero,
            or may also stay as they were); returns nothing. A call that asks for more than it names is refused.
        variants: variants(platform, problem, pool=None) lists every kernel that `run` can launch for calls of the
            problem, whatever their numbers of sequences and tokens. With `pool`, the state pool that calls will bring,
            it lists what is compiled for that pool's own size and strides, and nothing else.
        compile_count: kernels that this backend has compiled in this process so far. Ops of one backend may share one
            function; it is then counted once.
        interleaved: `run` takes projections with interleaved heads as they come (see gdn_plugin.ops), in whose shape
            the key heads are a dim more; without it they are sorted in front of it.
    """

    run: Callable[..., None]
    variants: Callable[..., Iterable[Variant]] = _no_variants
    compile_count: Callable[[], int] = _nothing_compiled
    interleaved: bool = False


@dataclass(frozen=True, slots=True)
class Wants:
    """In what form a backend takes its arguments as they are. Any other form costs it a launch more, or is refused.

    Args:
        exp_gate: prefill: exp(g) in place of g.
        zeroed_fresh_rows: prefill: has_initial_state None, and zeros in the pool rows of sequences that start fresh.
        dense_rows: state_indices side by side in memory.
        scratch_row: padding "scratch" or "none": its kernels have no mask for padding sequences.
        contiguous: q, k, v, g and beta contiguous.
    """

    exp_gate: bool = False
    zeroed_fresh_rows: bool = False
    dense_rows: bool = False
    scratch_row: bool = False
    contiguous: bool = False


@dataclass(frozen=True, slots=True)
class Backend:
    """One way to run one op.

    Args:
        name: what a user asks for.
        target: "module:OBJECT", a `BackendOp`; imported by `load`, never by a check.
        checks: each says None, or why this row cannot run the problem here.
        preferred: says None where auto may take this row, or why it should not; without it, auto may take
            the row wherever it can run.
        wants: in what form its kernels take their arguments without another launch.
        notes: sentences worth telling where the row does run ("copying: ..."); they refuse nothing.
        install: what to install where the row cannot be loaded.
        by_size: whether the self-check, on a GPU, also runs sizes at which kernels change with the numbers of sequences
            and tokens.
    """

    name: str
    target: str
    checks: tuple[Check, ...] = ()
    preferred: Check | None = None
    wants: Wants = Wants()
    notes: tuple[Check, ...] = ()
    install: str = ""
    by_size: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """A backend for one problem, and how it came to be chosen.

    Args:
        name: of the chosen backend.
        backend: its row; `load(choice.backend)` gives the `BackendOp`.
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


def left_out(run: Callable[..., None], names: Iterable[str]) -> frozenset[str]:
    """Those of `names` that are no argument of a `BackendOp.run`."""
    known = _parameters(run)
    return frozenset() if known is None else frozenset(names) - known


@functools.cache
def _parameters(run: Callable[..., None]) -> frozenset[str] | None:
    """The names of the arguments that a function takes; None where it takes any."""
    parameters = inspect.signature(run).parameters
    return None if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) else frozenset(parameters)


def split_request(request: str) -> tuple[str, ...]:
    """The names of a request, "flashinfer, triton" -> ("flashinfer", "triton")."""
    return tuple(name for name in (part.strip() for part in request.split(",")) if name)


def in_build(target: str) -> bool:
    """Whether the module of a "module:OBJECT" target exists, found without importing any part of it."""
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


def load(backend: Backend) -> BackendOp:
    """The `BackendOp` that a row points to.

    Raises:
        BackendLoadError: the module cannot be imported or has no such object; the cause is chained.
    """
    module, _, name = backend.target.partition(":")
    try:
        loaded = importlib.import_module(module)
    except (Exception, SystemExit) as exc:  # whatever an import does, it is this backend that cannot be loaded
        hint = f"importing {module} failed: {exc}"
        raise BackendLoadError(backend.name, hint + (f"; {backend.install}" if backend.install else "")) from exc
    try:
        found = getattr(loaded, name)
    except AttributeError as exc:
        raise BackendLoadError(backend.name, f"{module} has no {name!r} in this build") from exc
    if not isinstance(found, BackendOp):
        raise BackendLoadError(backend.name, f"{backend.target} is a {type(found).__name__}, not a BackendOp")
    return found
