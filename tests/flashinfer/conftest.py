"""FlashInfer's GDN functions on a pretended device. Without the packages these tests are skipped, by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gdn_plugin.tools.simulated import ARCHS, Recording, simulated_device

NEEDED = {"flashinfer": "flashinfer-python", "cutlass": "nvidia-cutlass-dsl[cu13]"}

_ALLOCATIONS = {"aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    for item in items:
        if missing and "/tests/flashinfer/" in item.path.as_posix():
            item.add_marker(pytest.mark.skip(reason=f"not installed: {', '.join(missing)}"))


class KernelCounter(TorchDispatchMode):
    """Names of the aten operators that would run on the device: everything but views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        metadata = func.is_view or func.namespace == "prim"  # "prim::device" asks a fake tensor where it lives
        if not metadata and func._schema.name not in _ALLOCATIONS:
            self.kernels.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=sorted(ARCHS, key=ARCHS.get))
def device(request: pytest.FixtureRequest) -> Iterator[Recording]:
    """A simulated device of each architecture; kernels are recorded and not compiled."""
    with simulated_device(request.param) as recording:
        yield recording


@pytest.fixture
def h100() -> Iterator[Recording]:
    with simulated_device("sm_90a") as recording:
        yield recording


@pytest.fixture
def counter() -> KernelCounter:
    return KernelCounter()


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32-pool", "bf16-pool"])
def state_dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param
