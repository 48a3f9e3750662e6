"""From a request to a backend that works here: the choice, what it falls back to, its self-check, its warm-up.

One place for hosts, which resolve a layer's ops together when it is built, and for standalone calls, which resolve one
op when they first bring a problem. A second call costs a dictionary lookup, and in a compiled graph the name is a
constant.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from operator import index
from typing import Any

import torch
from torch import Tensor

from gdn_plugin import registry, settings
from gdn_plugin.ops import ahead, selfcheck
from gdn_plugin.ops.record import DTYPES, Op
from gdn_plugin.registry import (
    PHASES,
    Backend,
    BackendOp,
    Choice,
    Platform,
    Problem,
    Selection,
    SelfCheckError,
    choose,
    judge,
    load,
    probe,
    rows,
    select,
)

_log = logging.getLogger(__name__)
_loaded: dict[tuple[str, str], BackendOp] = {}
_choices: dict[tuple[object, ...], str] = {}
_current: ContextVar[Selection | Mapping[str, str] | None] = ContextVar("gdn_plugin_selection", default=None)


def resolve(
    problems: Mapping[str, Problem],
    requests: Mapping[str, str] | None = None,
    device: str | torch.device | None = None,
    *,
    compile_ahead: bool = False,
) -> Selection:
    """A backend for each op of a layer, loaded and, unless GDN_PLUGIN_SELF_CHECK=0, checked on this machine.

    Under auto a backend that cannot be loaded, cannot be built or gives wrong numbers is left out, with a warning, and
    the next one is chosen.

    Args:
        problems: by op.
        requests: by phase; None follows the GDN_PLUGIN_* variables.
        device: a torch device or its type; by default the probed one.
        compile_ahead: for a host, which comes to `Selection.reached` alone: nothing else is checked, and on CUDA all
            that those can launch is compiled first, by processes side by side, for whoever warms up next.
    Raises:
        NoBackendError: a named request cannot run, or under auto nothing is left.
        BackendLoadError, SelfCheckError: a backend that was asked for by name failed.
        SettingsError: a GDN_PLUGIN_* variable is wrong.
    """
    wanted = _requested() if requests is None else requests
    platform = _platform(device)
    return _working(
        platform, lambda excluded: select(platform, problems, wanted, excluded=excluded), ready=compile_ahead
    )


def _platform(device: str | torch.device | None) -> Platform:
    return probe() if device is None else probe(torch.device(device).type)


def _requested() -> dict[str, str]:
    """By phase, from the environment."""
    return {phase: request.value for phase, request in registry.requests().items()}


def _working(
    platform: Platform, pick: Callable[[Mapping[str, Mapping[str, str]]], Selection], *, ready: bool = False
) -> Selection:
    """What `pick` selects once every backend that does not work here is excluded (by op and name, with the reason).

    Args:
        ready: for a host, see `resolve`; on CUDA, what was compiled ahead must come into this process too.
    Raises:
        SettingsError: a GDN_PLUGIN_* variable is wrong, whether or not this request would have read it.
    """
    registry.requests()
    excluded: dict[str, dict[str, str]] = {}
    while True:
        selection = pick(excluded)
        works = True
        with contextlib.closing(_in_turn(selection, ready)) as choices:
            for choice in choices:
                trouble = _trouble(choice, platform, ready)
                if trouble is not None:
                    excluded.setdefault(choice.problem.op, {})[choice.name] = trouble
                    works = False
        if works:
            return selection


def _in_turn(selection: Selection, ready: bool) -> Generator[Choice]:
    yield from ahead.in_turn(selection.reached(), selection.platform) if ready else selection.choices.values()


def _trouble(choice: Choice, platform: Platform, get_ready: bool = False) -> str | None:
    """Why auto cannot keep its choice, said in the log; None where the backend works.

    Raises:
        BackendLoadError, SelfCheckError: it does not work and was asked for by name.
    """
    try:
        ready = backend_op(choice.problem.op, choice.name)
        ran = settings.self_check() and selfcheck.require(choice.backend, choice.problem, platform)
        if not ran and platform.device == "cpu":
            warm(ready, platform, choice.problem)  # a compiler may fail, and auto must survive it
        if get_ready and platform.device == "cuda":
            _bring_in(ready, platform, choice.problem)
    except Exception as exc:  # a compiler or a third party's module may raise anything
        if choice.request != "auto":
            if isinstance(exc, SelfCheckError):
                raise SelfCheckError(
                    f"backend {choice.name!r}, asked for {choice.problem}: {exc}. "
                    "Ask for auto to use another backend, or set GDN_PLUGIN_SELF_CHECK=0 to use it all the same."
                ) from exc.__cause__
            raise
        _log.warning("gdn_plugin: %s: %s is not used: %s", choice.problem.op, choice.name, exc)
        return str(exc)
    return None


def _bring_in(ready: BackendOp, platform: Platform, problem: Problem) -> None:
    """Load what was compiled ahead, and compile what others cannot, at once.

    Until it warms up, a host may change where compilers look: vLLM sets TRITON_CACHE_DIR when it compiles its model.
    In a thread of its own: the caller's default device is not the kernels'.
    """
    gpu = torch.cuda.current_device()

    def compile_all() -> None:
        torch.cuda.set_device(gpu)
        for variant in ready.variants(platform, problem):
            variant.compile()

    with ThreadPoolExecutor(1) as thread:
        thread.submit(compile_all).result()


def backend_op(op: str, backend: str) -> BackendOp:
    """What runs `op` in `backend`; imported on first use.

    Raises:
        ValueError: no row of this name offers the op.
        BackendLoadError: one does, and cannot be imported.
    """
    try:
        return _loaded[op, backend]
    except KeyError:
        found = _loaded[op, backend] = load(_row(op, backend))
        return found


def _row(op: str, backend: str) -> Backend:
    for row in rows(op):
        if row.name == backend:
            return row
    names = ", ".join(row.name for row in rows(op))
    raise ValueError(f"gdn.{op}: backend: expected one of {names}, got {backend!r}")


def forget() -> None:
    """Drop every loaded backend and every choice: a row was added or replaced."""
    _loaded.clear()
    _choices.clear()


@contextlib.contextmanager
def use(selection: Selection | Mapping[str, str]) -> Iterator[None]:
    """What `backend=None` means inside the block.

    Args:
        selection: resolved choices, or requests by phase, as {"prefill": "torch"}; a phase that is left out follows the
            environment. A graph compiled inside keeps the choice it was traced with.
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


def for_call(device: str, backend: str | None, facts: tuple[Any, ...]) -> str:
    """The name of the backend for one call, from its facts; it goes into the op's schema.

    Args:
        backend: None for the current selection, a name, or a request such as "flashinfer,triton".
        facts: see `facts`.
    Raises:
        NoBackendError: nothing that was asked for can run this problem, with every reason.
    """
    return _for_call(device, backend or "", facts)


def facts(record: Op, arguments: Mapping[str, Any], out: Any) -> tuple[Any, ...]:
    """The fields of a call's Problem, in order, from metadata.

    Args:
        arguments: the call's inputs, checked.
        out: the call's output buffer or buffers, or None.

    index() makes a symbolic size of a traced call a guarded constant; `True if ... else False` does it for a stride.
    """
    lead, state = arguments[record.lead], arguments.get("state")
    key_heads, value_heads, K, V = [index(record.size(letter, arguments)) for letter in record.heads]
    checkpoints, a = arguments.get("checkpoints"), arguments.get("a")
    slots, ragged = 0, False
    if "S" in record.letters:
        slots = index(record.size("S", arguments))
        even = arguments.get("padding") == "none" and lead.shape[0] == slots * arguments["state_indices"].shape[0]
        ragged = not even
    elif "conv_state" in arguments and ("ring_k" in arguments or arguments.get("num_accepted_tokens") is not None):
        slots = index(arguments["conv_state"].shape[2] - arguments["conv_weight"].shape[1] + 2)
    strided = unaligned = False
    if not lead.is_cpu:  # only GPU kernels ask
        strided, unaligned = _strided(arguments), _unaligned(arguments, out)
    return (
        record.name,
        DTYPES[lead.dtype],
        "float32" if state is None else DTYPES[state.dtype],
        key_heads,
        value_heads,
        K,
        V,
        True if state is not None and state.stride(0) != value_heads * K * V else False,  # noqa: SIM210
        checkpoints is not None,
        slots,
        0,
        0,
        ragged,
        "" if checkpoints is None or state is None or checkpoints.dtype == state.dtype else DTYPES[checkpoints.dtype],
        arguments.get("padding", "any"),
        strided,
        unaligned,
        "" if a is None or a.dtype == lead.dtype else DTYPES[a.dtype],
        index(arguments["ring_k"].shape[1]) if "ring_k" in arguments else 0,
    )


def _strided(arguments: Mapping[str, Any]) -> bool:
    return any(not arguments[name].is_contiguous() for name in ("q", "k", "v", "g", "beta") if name in arguments)


# Tensors whose alignment reaches a kernel. Others (gates, parameters, row numbers, offsets) are small: a backend that
# minds copies them, and a host's are slices that start anywhere.
_ALIGNED = ("q", "k", "v", "g", "beta", "mixed_qkv", "x", "z", "state", "conv_state", "checkpoints")


def _unaligned(arguments: Mapping[str, Any], out: Any) -> bool:
    """Whether such a tensor starts off a 32-byte boundary, or rows of a pool lie off a 16-byte one.

    Asked of the storage offset: an allocator's blocks start on 512 bytes, and a fake tensor has no address.
    """
    buffers = out if isinstance(out, (tuple, list)) else (out,)
    for x in (*(arguments.get(name) for name in _ALIGNED), *buffers):
        if x is not None and x.storage_offset() * x.itemsize % 32 != 0:
            return True
    pool = arguments.get("state")
    return True if pool is not None and pool.stride(0) * pool.itemsize % 16 != 0 else False  # noqa: SIM210


def _used(op: str, phase: str) -> tuple[Selection | None, str]:
    """What `use` says of an op: (the selection that has it, a request for its phase)."""
    current = _current.get()
    if isinstance(current, Selection):
        return (current if op in current else None), ""
    return None, (current or {}).get(phase, "")


@torch.compiler.assume_constant_result
def _for_call(device: str, named: str, facts: tuple[Any, ...]) -> str:
    """The backend for Problem(*facts) on a device type; `named` is a request, "" for the current selection."""
    op = facts[0]
    phase = registry.PHASE_OF_OP[op]
    selection, given = _used(op, phase)
    key: tuple[Any, ...]
    if selection is not None and not named:
        chosen = selection[op]
        key = (device, selection.platform.sm, chosen.name, chosen.request, facts)
    else:
        key = (device, named, given, facts, settings.backend_request(phase), settings.backend_request())
    try:
        return _choices[key]
    except KeyError:
        if selection is not None and not named:
            name = _still(selection, device, Problem(*facts))
        else:
            name = _choose(device, Problem(*facts), named, given)
        _choices[key] = name
        return name


def _still(selection: Selection, device: str, problem: Problem) -> str:
    """The resolved backend where it can run this call too; else what its request gives for the call.

    A layer is resolved for the calls that its host has announced. One with other facts (rows off a boundary, say) goes
    to another backend under auto or by a list, and raises where the backend was asked for by name.
    """
    chosen, platform = selection[problem.op], selection.platform
    if judge(chosen.backend, platform, problem).supported:
        return chosen.name
    return _choose(device, problem, chosen.request, "")


def _choose(device: str, problem: Problem, named: str, given: str) -> str:
    """`named` is for this op alone and does not follow its phase; `given` is what `use` says of the phase."""
    platform, op = probe(device), problem.op
    if named:
        return _working(
            platform,
            lambda excluded: Selection(
                platform, {op: choose(platform, problem, named, excluded=excluded.get(op))}, {problem.phase: named}
            ),
        )[op].name
    requests = _requested() | ({problem.phase: given} if given else {})
    return resolve({op: problem}, requests, device)[op].name


def warm_up(
    problem: Problem,
    backend: str | None = None,
    device: str | torch.device | None = None,
    pool: Tensor | None = None,
) -> str:
    """Compile every kernel that the problem's backend can launch, before serving and before capture.

    Args:
        backend: a name or request; None for the current selection.
        device: a torch device or its type; by default the probed one.
        pool: the state pool that calls will bring. Call without it first, and again with it once it is allocated:
            then what a backend compiles for a pool's own size and strides is compiled, and nothing else.
    Returns:
        the backend's name.
    """
    platform = _platform(device)
    selection, given = _used(problem.op, problem.phase)
    if selection is not None and not backend:
        name = selection[problem.op].name
    else:
        name = _choose(platform.device, problem, backend or "", given)
    warm(backend_op(problem.op, name), platform, problem, pool)
    return name


def warm(ready: BackendOp, platform: Platform, problem: Problem, pool: Tensor | None = None) -> None:
    """Compile the variants of one backend's op."""
    for variant in ready.variants(platform, problem, pool):
        variant.compile()


def compile_count() -> int:
    """Kernels compiled by this process so far, by every backend that was loaded. Does not move after warm-up."""
    return sum(count() for count in {ready.compile_count for ready in _loaded.values()})
