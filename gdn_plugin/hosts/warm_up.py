"""Everything compiled before serving, by the backends' own lists of variants.

Called by a host's room when nothing has been captured yet; and again, or at once, when its pools are there, for the
kernels that a backend compiles for a pool's own size.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from multiprocessing.util import Finalize

import torch
from torch import Tensor

from gdn_plugin import ops
from gdn_plugin.hosts.core import Core
from gdn_plugin.ops import ahead

_done: set[tuple[object, ...]] = set()
_ready = 0  # what `compile_count` said when the last warm-up ended
_counts: list[Callable[[], int]] = []  # of kernels of hosts' rooms


def warm_up(core: Core, device: torch.device, log: logging.Logger) -> None:
    """Compile what a layer of this shape can reach. Once a process for each shape, choice and device.

    Args:
        log: the host's room's, which its engine shows.
    """
    global _ready
    if not _first(core, device):
        return
    began = time.perf_counter()
    for choice in core.selection.reached():
        ops.warm_up(choice.problem, backend=choice.name, device=device.type)
    count = compile_count()
    before = ahead.totals
    log.info(
        "gdn_plugin: warmed up in %.1f s, %d kernels in this process; %d compiled ahead and %d found, awaited %.1f s",
        time.perf_counter() - began, count, before.made, before.found, before.seconds,
    )  # fmt: skip
    _ready = count
    _tell_at_the_end(log)


def warm_up_pool(core: Core, state: Tensor, log: logging.Logger) -> None:
    """Compile what is compiled for the pool's own size and strides. Once a process for each layout of a pool.

    Args:
        state: the layer's state pool, as the host has allocated it; its rows up to null_index may be written.
        log: as above.
    Raises:
        Whatever the compiler of a backend that was asked for by name raises. Under auto that is logged, and the kernels
        are compiled by the first steps.
    """
    global _ready
    if not _first(core, state.device, state.dtype, state.shape, state.stride()):
        return
    for choice in core.selection.reached():
        try:
            ops.warm_up(choice.problem, backend=choice.name, device=state.device.type, pool=state)
        except Exception as exc:  # a compiler may raise anything, and what auto chose must not stop the engine here
            if choice.request != "auto":
                raise
            log.warning("gdn_plugin: %s on %s was not compiled ahead: %s", choice.problem.op, choice.name, exc)
    _ready = compile_count()


def compile_count() -> int:
    """Kernels compiled by this process so far: the ops', and those of the host's room."""
    return ops.compile_count() + sum(count() for count in _counts)


def count_too(count: Callable[[], int]) -> None:
    """Kernels of a host's room, before they are compiled: `count` says how many are. Idempotent."""
    if count not in _counts:
        _counts.append(count)


@functools.cache
def _tell_at_the_end(log: logging.Logger) -> None:
    """From now on: when the process ends in order, say how many kernels serving has compiled. It should be none."""

    def tell() -> None:
        since = compile_count() - _ready
        log.log(logging.WARNING if since else logging.INFO, "gdn_plugin: kernels compiled since start-up: %d", since)

    Finalize(None, tell, exitpriority=0)  # unlike atexit, in processes of multiprocessing too


def _first(core: Core, *facts: object) -> bool:
    """Whether nothing has been compiled for this yet; from now on it has."""
    key = (core.shape, tuple(core.selection.backends().items()), *facts)
    if key in _done:
        return False
    _done.add(key)
    return True
