"""The door: what a launch becomes, what is counted, and what is only written down."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch

from gdn_plugin.backends.triton import launch as module
from gdn_plugin.backends.triton.launch import (
    compile_count,
    counted,
    device_sm,
    launch,
    launch_count,
    recorded,
)
from gdn_plugin.ops import cases
from gdn_plugin.ops.dispatch import backend_op
from gdn_plugin.ops.record import OPS
from gdn_plugin.registry.probe import triton_interprets
from tests.support.checks import check
from tests.support.memory import Launches

CPU = torch.device("cpu")
MAKERS = {
    "conv_prologue": cases.conv_prologue_case,
    "decode": cases.decode_case,
    "fused_decode": cases.fused_decode_case,
    "verify": cases.verify_case,
    "fused_verify": cases.fused_verify_case,
    "gated_norm": cases.gated_norm_case,
    "replay_decode": cases.replay_decode_case,
    "replay_verify": cases.replay_verify_case,
    "replay_fold": cases.replay_fold_case,
}


class Kernel:
    """What `launch` and `compile_count` see of a JITFunction that compiles at each launch, on device 0."""

    def __init__(self):
        self.device_caches = {}
        self.ran = []

    def __getitem__(self, grid):
        def run(**arguments):
            self.ran.append((grid, arguments))
            self.device_caches.setdefault(0, ({}, {}))[0][len(self.ran)] = "compiled"

        return run


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(module, "_kernels", list(module._kernels))
    return counted(Kernel())


def test_a_launch_is_tritons_own(kernel):
    before = launch_count()
    launch(kernel, (4, 2), x=1, BLOCK=64, num_warps=4)
    assert kernel.ran == [((4, 2), {"x": 1, "BLOCK": 64, "num_warps": 4})] and launch_count() - before == 1


def test_an_empty_grid_is_no_launch(kernel):
    before = launch_count()
    launch(kernel, (0,), x=1)
    with recorded(90) as recording:
        launch(kernel, (3, 0), x=1)
    assert not kernel.ran and not recording.launches and launch_count() == before


def test_compilations_are_counted_on_every_device(kernel):
    before = compile_count()
    launch(kernel, (1,), x=1)
    assert compile_count() - before == 1
    kernel.device_caches[1] = ({"a": 1, "b": 2}, {})
    assert compile_count() - before == 3


def test_interpreted_kernels_count_nothing(kernel):
    before = compile_count()
    counted(SimpleNamespace())
    assert compile_count() == before and triton_interprets()


@pytest.mark.parametrize("op", ["fused_verify", "replay_verify"])
def test_one_sequence_whose_accepted_count_is_a_column(op):
    """[1] of any stride is contiguous; without has_initial_state it lends its address to the kernel."""
    case = MAKERS[op]((2,), cases.Heads(1, 2, 64, 64), slots=2, fresh=None)
    table = torch.zeros(1, 9, dtype=torch.int32)
    table[0, 0] = case.args["num_accepted_tokens"][0]
    case.args["num_accepted_tokens"] = table[:, 0]
    check(backend_op(op, "triton").run, case)


def test_recording_writes_down_and_launches_nothing(kernel):
    before = launch_count()
    with recorded(103) as recording:
        assert device_sm(CPU) == 103
        launch(kernel, (2,), x=1, num_warps=1)
        with recorded(80) as inner:
            assert device_sm(CPU) == 80
            launch(kernel, (3,), x=2)
        assert device_sm(CPU) == 103
    assert [(one.grid, one.arguments) for one in recording.launches] == [((2,), {"x": 1, "num_warps": 1})]
    assert [one.grid for one in inner.launches] == [(3,)]
    assert not kernel.ran and launch_count() == before and device_sm(CPU) == 0


def test_recording_ends_with_an_error_and_is_one_threads_own(kernel):
    seen = []
    with pytest.raises(RuntimeError, match="launcher"), recorded(90):
        other = threading.Thread(target=lambda: seen.append(device_sm(CPU)))
        other.start()
        other.join()
        raise RuntimeError("launcher")
    assert seen == [0]
    launch(kernel, (1,), x=1)
    assert len(kernel.ran) == 1


@pytest.mark.parametrize("interleaved", [False, True], ids=["flat", "interleaved"])
@pytest.mark.parametrize("op", MAKERS)
def test_an_op_is_one_launch_and_nothing_of_atens(op, interleaved):
    """Whatever the layout of the projections: no copy in front, no fill behind."""
    run = backend_op(op, "triton").run
    of_projections = {"interleaved": interleaved, "gap": 8} if OPS[op].projections else {}
    case = MAKERS[op](heads=cases.Heads(2, 4, 64, 64), device="meta", **of_projections)
    with recorded(90):
        run(**case.arguments())  # a workspace is made once
    arguments = case.arguments()
    with recorded(90) as recording, Launches() as aten:
        run(**arguments)
    (one,) = recording.launches
    assert op.startswith(one.kernel.__name__.removesuffix("_kernel")) and not aten.names
