"""A GPU that is not here, as far as Triton's compilation sees."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace


@contextmanager
def stand_in(sm: int) -> Iterator[list[str]]:
    """Yields the names of the kernels that are loaded onto it."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    loads: list[str] = []
    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 232448},
        load_binary=lambda name, *rest: loads.append(name) or (object(), object(), 64, 0, 1024),
        unload_module=lambda module: None,
    )
    was = driver._active
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", sm, 32),
            launcher_cls=lambda source, metadata: lambda *args: None,
            utils=utils,
        )
    )
    try:
        yield loads
    finally:
        driver._active = was
