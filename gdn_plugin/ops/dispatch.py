"""From a backend's name to its function, and from `backend=None` to a name.

A function is imported once a process; after that a call costs a dictionary lookup. The choice for `backend=None` is
made from metadata alone, is cached by it, and is a constant in a compiled graph.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from operator import index
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gdn_plugin.registry import (
    PHASES,
    Backend,
    Platform,
    Problem,
    Selection,
    choose,
    load,
    probe,
    rows,
    select,
)

_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float64: "float64"}
_log = logging.getLogger(__name__)
_functions: dict[tuple[str, str], Callable[..., None]] = {}
_modules: dict[str, None] = {}  # modules of loaded backends, in order, for compile_count
_choices: dict[tuple[object, ...], str] = {}
_current: ContextVar[Selection | Mapping[str, str] | None] = ContextVar("gdn_plugin_selection", default=None)


def function(op: str, backend: str) -> Callable[..., None]:
    """The function that runs `op` in `backend`; imported on first use.

    Raises:
        NoBackendError: no row of this name offers the op.
        BackendLoadError: it does, and cannot be imported.
    """
    try:
        return _functions[op, backend]
    except KeyError:
        row = _row(op, backend)
        loaded = load(row)
        _functions[op, backend] = loaded
        _modules[row.target.partition(":")[0]] = None
        return loaded


def _row(op: str, backend: str) -> Backend:
    for row in rows(op):
        if row.name == backend:
            return row
    names = ", ".join(row.name for row in rows(op))
    raise ValueError(f"gdn.{op}: backend: expected one of {names}, got {backend!r}")


def forget() -> None:
    """Drop every cached function and choice: a row was added or replaced."""
    _functions.clear()
    _choices.clear()


@contextlib.contextmanager
def use(selection: Selection | Mapping[str, str]) -> Iterator[None]:
    """What `backend=None` means inside the block.

    Args:
        selection: resolved choices (registry.select), or requests by phase, as {"prefill": "torch"}; a phase that is
            left out follows the environment. A graph compiled inside keeps the choice it was traced with.
    """
    if not isinstance(selection, Selection):
        for phase in selection:
            if phase not in PHASES:
                raise ValueError(f"phase {phase!r} is not valid; choose one of: {', '.join(PHASES)}")
    token = _current.set(selection)
    try:
        yield
    finally:
        _current.reset(token)


def _requests() -> dict[str, str]:
    """The request for each phase: `use`, then the phase's variable, then GDN_PLUGIN_BACKEND, then auto."""
    current = _current.get()
    given = {} if current is None or isinstance(current, Selection) else current
    everywhere = os.environ.get("GDN_PLUGIN_BACKEND", "").strip() or "auto"
    return {
        phase: given.get(phase) or os.environ.get(f"GDN_PLUGIN_{phase.upper()}_BACKEND", "").strip() or everywhere
        for phase in PHASES
    }


@torch.compiler.assume_constant_result
def _resolve(device: str, named: str, metadata: tuple[Any, ...]) -> str:
    """The backend for Problem(*metadata) on a device type; `named` is a request, "" for the current selection."""
    current = _current.get()
    if not named and isinstance(current, Selection) and metadata[0] in current:
        return current[metadata[0]].name
    requests = {} if named else _requests()
    key = (device, named, metadata, *requests.values())
    try:
        return _choices[key]
    except KeyError:
        name = _choices[key] = _choose(probe(device), Problem(*metadata), named, requests)
        return name


def _choose(platform: Platform, problem: Problem, named: str, requests: Mapping[str, str]) -> str:
    """A backend that can be loaded: auto passes over one that cannot, loudly; what was asked for raises."""
    op, broken = problem.op, dict[str, str]()
    while True:
        if named:  # for this op alone: unlike a phase's request, it does not fall back where the op is missing
            choice = choose(platform, problem, named, excluded=broken)
        else:
            choice = select(platform, {op: problem}, requests, excluded={op: broken})[op]
        try:
            function(op, choice.name)
            if choice.request == "auto" and platform.device == "cpu":
                _warm_up_hook(op, choice.name)(problem)  # builds on first use, and auto must survive a failing build
        except Exception as exc:  # a compiler or a third party's module may raise anything
            if choice.request != "auto":
                raise
            broken[choice.name] = str(exc)
            _log.warning("gdn_plugin: %s: %s; trying the next backend", op, exc)
        else:
            return choice.name


def resolve(
    op: str,
    backend: str | None,
    io: Tensor,
    state: Tensor | None,
    heads: tuple[int, int, int, int],
    *,
    checkpoints: bool = False,
    max_spec_tokens: int = 0,
) -> str:
    """The name that goes into the op's schema.

    Args:
        backend: None for the current selection, a name, or a request such as "flashinfer,triton".
        io: any io tensor, for dtype and device.
        state: the pool; None counts as a dense fp32 pool.
        heads: Hk, Hv, K, V.
    Raises:
        NoBackendError: nothing that was asked for can run this problem, with every reason.
    """
    # Spelled so that a symbolic size or stride of a traced call becomes a guarded constant; int() keeps it symbolic.
    padded = True if state is not None and state.stride(0) != heads[1] * heads[2] * heads[3] else False  # noqa: SIM210
    key_heads, value_heads, key_dim, value_dim = heads
    metadata = (
        op, _NAMES[io.dtype], "float32" if state is None else _NAMES[state.dtype], index(key_heads),
        index(value_heads), index(key_dim), index(value_dim), padded, checkpoints, index(max_spec_tokens),
    )  # fmt: skip
    return _resolve(io.device.type, backend or "", metadata)


def compile_count() -> int:
    """Kernels compiled by this process so far, over every backend that compiles. Does not move after warm-up."""
    # Modules of one backend may share one counter: each function counts once.
    counters = {getattr(sys.modules[module], "compile_count", None) for module in tuple(_modules)}
    return sum(count() for count in counters if count is not None)


def warm_up(problem: Problem, backend: str | None = None, device: str | None = None, pool: Tensor | None = None) -> str:
    """Compile every kernel variant the problem's backend can dispatch to, before serving and before capture.

    Args:
        backend: a name or request; None for the current selection.
        device: torch device type; by default the probed one.
        pool: the state pool that calls will bring. Call without it first, and again with it once it is allocated:
            then what a backend compiles for a pool's own size and strides is compiled, and nothing else.
    Returns:
        the backend's name. A backend without a `warm_up(problem)`, or with `pool` a `warm_up_pool(problem, pool)`, in
        its module has nothing to compile.
    """
    platform = probe() if device is None else probe(device)
    current = _current.get()
    if backend is None and isinstance(current, Selection) and problem.op in current:
        name = current[problem.op].name
        function(problem.op, name)
    else:
        name = _choose(platform, problem, backend or "", _requests())
    if pool is None:
        _warm_up_hook(problem.op, name)(problem)
    else:
        hook = getattr(_module(problem.op, name), "warm_up_pool", None)
        if hook is not None:
            hook(problem, pool)
    return name


def _warm_up_hook(op: str, name: str) -> Callable[[Problem], object]:
    """`warm_up` of a loaded backend's module; nothing to do where it has none."""
    return getattr(_module(op, name), "warm_up", lambda problem: None)


def _module(op: str, name: str) -> ModuleType:
    return sys.modules[_row(op, name).target.partition(":")[0]]


__all__ = ["compile_count", "forget", "function", "resolve", "use", "warm_up"]
