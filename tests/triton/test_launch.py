"""The launcher's own cache of compiled kernels, against Triton's rules and with a stand-in for the driver."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from gdn_plugin.ops._triton import launch as module
from gdn_plugin.ops._triton.launch import compile_count, launch, launch_count, specialisation

BASE = torch.zeros(64, dtype=torch.bfloat16)
VALUES = [None, 0, 1, 2, 15, 16, 32, 48, -1, -16, 2**31 - 1, 2**31, 2**31 + 1, 2**40, 2**40 + 1, -(2**31), -(2**31) - 1,
          2**63, 1.0, 0.5, True, False, BASE, BASE[1:], BASE[8:], BASE.float(), BASE.to(torch.int32)]  # fmt: skip


@pytest.mark.parametrize("plain", [False, True])
def test_never_coarser_than_tritons_rules(plain):
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    backend = make_backend(GPUTarget("cuda", 90, 32))
    for one, other in itertools.combinations(VALUES, 2):
        if specialisation((one,), (plain,)) == specialisation((other,), (plain,)):
            theirs = [native_specialize_impl(backend, x, False, not plain, True) for x in (one, other)]
            assert theirs[0] == theirs[1], (one, other)


def test_values_that_change_from_call_to_call_share_a_kernel():
    assert specialisation((17, 0.5, BASE), (True, False, False)) == specialisation(
        (1, 2.0, BASE[8:]), (True, False, False)
    )


class Kernel:
    """What `launch` sees of a JITFunction; `ran` holds the (grid, arguments) of each launch, by which way it went."""

    def __init__(self):
        names = (("x", False), ("n", True), ("BLOCK", False))
        self.params = [SimpleNamespace(name=name, do_not_specialize=plain) for name, plain in names]
        self.pre_run_hooks = []
        self.device_caches = {0: ({},)}
        self.slow, self.fast = [], []

    def __getitem__(self, grid):
        def run(*args, **kwargs):
            self.slow.append((grid, args, kwargs))
            self.device_caches[0][0][len(self.slow)] = None
            return SimpleNamespace(run=lambda *a: self.fast.append(a), function="function", packed_metadata="metadata")

        return run


@pytest.fixture
def kernel(monkeypatch):
    device = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: f"stream {device}")
    knobs = SimpleNamespace(launch_enter_hook=None, launch_exit_hook=None)
    monkeypatch.setattr(module, "_triton", lambda: (SimpleNamespace(active=device), knobs))
    monkeypatch.setattr(module, "_known", {})
    kernel = Kernel()
    kernel.knobs = knobs
    return kernel


def test_a_known_kernel_goes_to_the_driver_as_triton_would(kernel):
    before = launch_count()
    launch(kernel, (3,), BASE, 5, BLOCK=64, num_warps=4)
    launch(kernel, (4, 2), BASE[8:], 7, BLOCK=64, num_warps=4)
    assert [args for _, args, _ in kernel.slow] == [(BASE, 5)]
    assert kernel.fast == [(4, 2, 1, "stream 0", "function", "metadata", None, None, None, kernel.fast[0][9], 7, 64)]
    assert kernel.fast[0][9].data_ptr() == BASE[8:].data_ptr()
    assert (launch_count() - before, compile_count()) == (2, 1)


@pytest.mark.parametrize("args", [(BASE[1:], 5), (BASE.float(), 5), (None, 5), (BASE, 2**31)], ids=range(4))
def test_another_kind_of_argument_is_compiled(kernel, args):
    launch(kernel, (3,), BASE, 5, BLOCK=64, num_warps=4)
    launch(kernel, (3,), *args, BLOCK=64, num_warps=4)
    assert (len(kernel.slow), len(kernel.fast)) == (2, 0)


def test_options_and_constants_are_told_apart(kernel):
    for block, warps in ((64, 4), (32, 4), (64, 8)):
        launch(kernel, (3,), BASE, 5, BLOCK=block, num_warps=warps)
    assert (len(kernel.slow), len(kernel.fast)) == (3, 0)


def test_hooks_go_tritons_own_way(kernel):
    launch(kernel, (1,), BASE, 5, BLOCK=64, num_warps=4)
    kernel.knobs.launch_enter_hook = SimpleNamespace(calls=[])
    launch(kernel, (1,), BASE, 5, BLOCK=64, num_warps=4)
    assert len(kernel.fast) == 1
    kernel.knobs.launch_enter_hook = SimpleNamespace(calls=[print])
    launch(kernel, (1,), BASE, 5, BLOCK=64, num_warps=4)
    assert (len(kernel.slow), len(kernel.fast)) == (2, 1)


def test_an_empty_grid_is_no_launch(kernel):
    before = launch_count()
    launch(kernel, (0,), BASE, 5, BLOCK=64, num_warps=4)
    assert launch_count() == before and not kernel.slow
