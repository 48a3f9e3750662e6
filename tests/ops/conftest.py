from __future__ import annotations

import pytest
import torch

# Always there; `cpu` where this machine can build it. Backends of other devices have test folders of their own.
NAMES = ("reference", "torch", "cpu")


@pytest.fixture(params=NAMES)
def backend(request):
    from tests.support.public import supported

    name = request.param
    if name not in supported("prefill"):
        pytest.skip(f"backend {name} cannot run here (no C++ compiler, or its kernels are missing from this build)")
    return name


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Shapes here are small: a second thread costs more than it saves, and other work may be running beside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
