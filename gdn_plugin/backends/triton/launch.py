"""The one door through which this room's kernels are launched. It counts, and it can write down instead of launching.

A launch is counted in Python, so a replayed CUDA graph counts nothing. Compilations are not hooked: `compile_count`
adds up what the kernels' in-process caches hold, which leaves Triton's single compilation hook to whoever wants it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

Kernel = TypeVar("Kernel")

_launches = 0
_kernels: list[Any] = []


@dataclass(frozen=True, slots=True)
class Launch:
    """What `launch` was asked for: the kernel, its grid, and its arguments and Triton's options by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]


@dataclass(slots=True)
class Recording:
    """The launches made under `recorded`, in order, as on a device of compute capability `sm`."""

    sm: int
    launches: list[Launch] = field(default_factory=list)


_recording: ContextVar[Recording | None] = ContextVar("gdn_plugin_triton_recording", default=None)


@contextmanager
def recorded(sm: int) -> Iterator[Recording]:
    """Inside, in this thread, `launch` launches nothing and `device_sm` answers `sm` (10 * major + minor).

    Launchers can then be driven on meta tensors, for a GPU that is not here.
    """
    recording = Recording(sm)
    token = _recording.set(recording)
    try:
        yield recording
    finally:
        _recording.reset(token)


def counted(kernel: Kernel) -> Kernel:
    """Decorates a `@triton.jit` function that `launch` starts: `compile_count` looks at it."""
    _kernels.append(kernel)
    return kernel


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """`kernel[grid](**arguments)`, Triton's options among the arguments. A grid with a zero dimension is no launch."""
    global _launches
    if 0 in grid:
        return
    recording = _recording.get()
    if recording is not None:
        recording.launches.append(Launch(kernel, grid, arguments))
        return
    _launches += 1
    kernel[grid](**arguments)


def any_flags(x: Tensor) -> Tensor:
    """A pointer to bools whose bytes do not matter, where flags are absent: one variant of a kernel then serves both.

    x: [n] integers, neighbours; one alone may have any stride. Not a pool, which may have no rows and no memory.
    """
    return x.as_strided(x.shape, (1,)).view(torch.bool)


def device_sm(device: torch.device) -> int:
    """10 * major + minor of a CUDA device; 0 off CUDA, where kernels run under the interpreter."""
    recording = _recording.get()
    return _device_sm(device) if recording is None else recording.sm


@functools.cache
def _device_sm(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def launch_count() -> int:
    """Launches made through `launch` since the process began."""
    return _launches


def compile_count() -> int:
    """Kernels that this process holds compiled, of every op of this room that is loaded, on all devices.

    Those that came from Triton's cache on disk count too. 0 under the interpreter.
    """
    # `device_caches` is as near to public as Triton has it: device -> (key -> compiled kernel, ...). Interpreted
    # kernels have none.
    caches = (getattr(kernel, "device_caches", {}) for kernel in _kernels)
    return sum(len(cache[0]) for devices in caches for cache in devices.values())
