"""The one door through which Triton kernels are launched: it counts launches and compilations, and keeps them cheap.

A launch is counted in Python, so a replayed CUDA graph counts nothing. Compilations are not hooked: every
kernel that came through here is remembered, and `compile_count` adds up what their in-process caches hold.
That costs a launch nothing and leaves Triton's single compilation hook to whoever else wants it.

Triton's own launcher binds and specialises every argument again at each call, options and constants included, and
makes strings of them. Here a compiled kernel is remembered under what its machine code can depend on, by rules that
are never coarser than Triton's (`specialisation`), and is handed to the driver as Triton would. The first call of each
kind, a launch hook (profilers) and the interpreter go Triton's own way. Its debug switch is read at the first call.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_launches = 0


class _Known:
    """What is remembered of one kernel: its compiled forms, by device and specialisation."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        # The interpreter's kernels have no caches.
        self.compiles = hasattr(kernel, "device_caches")
        self.names = tuple(p.name for p in kernel.params) if self.compiles else ()
        self.plain = tuple(bool(p.do_not_specialize) for p in kernel.params) if self.compiles else ()
        # (compiled kernel, constants in the signature's order, behind the arguments)
        self.compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


# By id: hashing a JITFunction takes a lock, and the kernels held here keep their ids.
_known: dict[int, _Known] = {}


def interpreting() -> bool:
    """Whether kernels run under Triton's interpreter (TRITON_INTERPRET was set when they were decorated)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def device_sm(device: torch.device) -> int:
    """10 * major + minor of a CUDA device; 0 off CUDA, where kernels run under the interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def specialisation(args: tuple[Any, ...], plain: tuple[bool, ...]) -> list[Any]:
    """What the machine code of a kernel can depend on of its arguments.

    A tensor counts by its dtype and whether its address is a multiple of 16, an integer by its width, whether it is 1
    and whether it is a multiple of 16 (where `plain`, Triton's do_not_specialize, by its width alone), a float by its
    type, anything else by its value.
    """
    parts: list[Any] = []
    for arg, width_only in zip(args, plain, strict=False):
        kind = type(arg)
        if kind is int:
            part = 0 if width_only else 1 if arg == 1 else 16 if arg % 16 == 0 else 0
            if not -0x80000000 <= arg < 0x80000000:
                part += 100 if arg < 0x8000000000000000 else 200
            parts.append(part)
        elif arg is None or kind is float:
            parts.append(kind)
        elif isinstance(arg, Tensor):
            parts.append(arg.dtype if arg.data_ptr() % 16 == 0 else (arg.dtype,))
        else:
            parts.append((kind, arg))
    return parts


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
    """Run `kernel[grid](*args, **kwargs)`. A grid with a zero dimension launches (and counts) nothing.

    Args:
        kernel: a `@triton.jit` function of a module (held for the life of the process).
        args: its arguments, up to the first constant.
        kwargs: its constants and Triton's options.
    """
    global _launches
    if 0 in grid:
        return
    known = _known.get(id(kernel))
    if known is None:
        known = _known[id(kernel)] = _Known(kernel)
    _launches += 1
    if not known.compiles:
        kernel[grid](*args, **kwargs)
        return

    driver, runtime = _triton()
    device = driver.active.get_current_device()
    key = (device, *specialisation(args, known.plain), *kwargs.items())
    found = known.compiled.get(key)
    hooks = runtime.launch_enter_hook, runtime.launch_exit_hook
    # An empty chain of hooks is no hook.
    if found is None or kernel.pre_run_hooks or any(getattr(hook, "calls", hook) for hook in hooks):
        compiled = kernel[grid](*args, **kwargs)
        if compiled is not None and hasattr(compiled, "packed_metadata"):
            known.compiled[key] = compiled, constants(known.names[len(args) :], kwargs)
        return
    compiled, tail = found
    x, y, z = (*grid, 1, 1)[:3]
    stream = driver.active.get_current_stream(device)
    compiled.run(x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *args, *tail)


def constants(names: tuple[str, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """The values of the parameters `names`, all of which a launch names by keyword.

    Raises:
        KeyError: one is missing: a default would be Triton's to fill in, and our kernels have none.
    """
    return tuple(kwargs[name] for name in names)


def _triton() -> tuple[Any, Any]:
    """Triton's driver and its run-time knobs (both objects that Triton itself may swap the contents of)."""
    from triton import knobs
    from triton.runtime.driver import driver

    return driver, knobs.runtime


def launch_count() -> int:
    """Launches made through `launch` since the process began."""
    return _launches


def compile_count() -> int:
    """Kernel variants compiled in this process for every kernel launched here, on all devices (0 when interpreting)."""
    total = 0
    for known in _known.values():
        if known.compiles:
            total += sum(len(caches[0]) for caches in known.kernel.device_caches.values())
    return total
