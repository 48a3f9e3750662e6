"""What the wrappers ask of the device: FlashInfer's kernel, and nothing of torch's around it.

FlashInfer's public functions run with their own argument checks, on fake tensors, so these tests also show that it
takes our dtypes, shapes and strides on every architecture.
"""

from __future__ import annotations

import functools
import warnings

import pytest
import torch

from gdn_plugin import ops
from gdn_plugin.ops import dispatch, library
from gdn_plugin.ops._flashinfer.decode import decode
from gdn_plugin.ops._flashinfer.prefill import prefill
from gdn_plugin.ops._flashinfer.verify import verify
from gdn_plugin.registry import Platform
from tests.flashinfer.calls import checkpoint_args, decode_args, empty, prefill_args, verify_args

CP_STEPS = 4  # chunk inverses, chunk transfers, fix-up, outputs


def launched(device, counter, function, arguments, *, first=False):
    """Names of FlashInfer's launches, our launches, aten's kernels. The first call fills FlashInfer's own caches."""
    if not first:
        function(**arguments)
        device.reset()
    with counter:
        function(**arguments)
    return device.launches, device.own_launches, counter.kernels


@pytest.mark.parametrize("with_checkpoints", [False, True], ids=["plain", "checkpoints"])
def test_prefill_is_one_launch(device, counter, state_dtype, with_checkpoints):
    arguments = prefill_args(state_dtype, batch=8)
    if with_checkpoints:
        arguments |= checkpoint_args(state_dtype, batch=8)
    theirs, ours, aten = launched(device, counter, prefill, arguments, first=True)
    assert len(theirs) == 1
    assert (ours, aten) == ([], [])


def test_few_sequences_take_the_context_parallel_route_without_a_warning(device, counter, state_dtype):
    arguments = prefill_args(state_dtype, batch=1) | checkpoint_args(state_dtype, batch=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # FlashInfer's, where it cannot take the route it wants
        theirs, ours, aten = launched(device, counter, prefill, arguments)
    assert len(theirs) == CP_STEPS
    assert all(name.startswith("CPDeltaRule") for name in theirs)
    assert (ours, aten) == ([], [])


@pytest.mark.parametrize(
    ("changes", "ours", "aten"),
    [
        ({"exp_gate": False}, [], ["aten.exp.default"]),
        ({"zero_padding": True}, [], ["aten.zero_.default"]),
        ({"has_initial_state": (8, torch.bool)}, ["zero_fresh_kernel"], []),
        ({"scale": 0.0}, [], ["aten.zero_.default"]),
        ({"state_indices": "strided"}, ["start_rows_kernel"], []),
    ],
    ids=["log-gate", "returning", "fresh-rows", "zero-scale", "strided-rows"],
)
def test_every_other_form_of_prefill_costs_what_it_says(h100, counter, changes, ours, aten):
    changes = {
        name: empty(value[0], dtype=value[1]) if isinstance(value, tuple) else value for name, value in changes.items()
    }
    if changes.get("state_indices") == "strided":
        changes["state_indices"] = empty(16, dtype=torch.int32).as_strided((8,), (2,))
    found = launched(h100, counter, prefill, prefill_args(torch.float32, **changes))
    assert found == (["_FullyFusedDeltaRuleSm90"], ours, aten)


def test_prefill_of_nothing_launches_nothing(h100, counter):
    assert launched(h100, counter, prefill, prefill_args(torch.float32, tokens=0)) == ([], [], [])


def test_fp32_decode_is_one_launch(device, counter):
    theirs, ours, aten = launched(device, counter, decode, decode_args(torch.float32))
    assert theirs == ["run_gdn_decode_kernel_small_batch_pretranspose"]
    assert (ours, aten) == ([], [])


def test_fp32_decode_maps_the_null_block_in_one_launch_more(device, counter):
    theirs, ours, aten = launched(device, counter, decode, decode_args(torch.float32, null_index=0))
    assert (len(theirs), ours, aten) == (1, ["start_rows_kernel"], [])


@pytest.mark.parametrize("batch", [1, 17, 64])
def test_bf16_decode_is_one_launch(device, counter, batch):
    theirs, ours, aten = launched(device, counter, decode, decode_args(torch.bfloat16, batch=batch))
    assert (len(theirs), ours, aten) == (1, [], [])


def test_a_returning_bf16_decode_zeroes_padding_in_one_launch_more(device, counter):
    theirs, ours, aten = launched(device, counter, decode, decode_args(torch.bfloat16, zero_padding=True))
    assert (len(theirs), ours, aten) == (1, ["zero_padding_kernel"], [])


@pytest.mark.parametrize("where", ["strided", "off-boundary"])
def test_row_numbers_that_decode_cannot_read_are_copied_in_one_launch(h100, counter, state_dtype, where):
    held = empty(16, dtype=torch.int32)
    rows = held.as_strided((5,), (2,)) if where == "strided" else held.as_strided((5,), (1,), 3)
    theirs, ours, aten = launched(h100, counter, decode, decode_args(state_dtype, state_indices=rows))
    assert (len(theirs), ours, aten) == (1, ["start_rows_kernel"], [])


def start_rows(state_dtype, batch=5):
    """As a caller hands them over for one launch: an fp32 pool's padding is -1 in them."""
    return {
        "start_rows": empty(batch, dtype=torch.int32),
        "null_index": -1 if state_dtype == torch.float32 else 0,
    }


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("batch", [1, 17, 64])
def test_verify_with_start_rows_is_one_launch(device, counter, state_dtype, batch, width):
    arguments = verify_args(state_dtype, batch=batch, width=width) | start_rows(state_dtype, batch)
    theirs, ours, aten = launched(device, counter, verify, arguments)
    assert (len(theirs), ours, aten) == (1, [], [])


@pytest.mark.parametrize(
    ("changes", "ours"),
    [
        ({"start_rows": None}, ["start_rows_kernel"]),
        ({"zero_padding": True}, ["zero_padding_kernel"]),
        ({"state_indices": 6}, ["start_rows_kernel"]),
        ({"null_index": 0}, ["start_rows_kernel"]),
    ],
    ids=["start-rows-looked-up", "returning", "strided-rows", "null-block"],
)
def test_every_other_form_of_verify_costs_what_it_says(h100, counter, state_dtype, changes, ours):
    if "state_indices" in changes:
        changes = {"state_indices": empty(5, changes["state_indices"], dtype=torch.int32).as_strided((5, 4), (6, 1))}
    if "null_index" in changes and state_dtype == torch.bfloat16:
        ours = []  # its kernel runs padding on the null block
    arguments = verify_args(state_dtype) | start_rows(state_dtype) | changes
    theirs, own, aten = launched(h100, counter, verify, arguments)
    assert (len(theirs), own, aten) == (1, ours, [])


def test_verify_of_one_token_is_decode(device, counter):
    theirs, ours, aten = launched(device, counter, verify, verify_args(torch.float32, width=1))
    assert theirs == ["run_gdn_decode_kernel_small_batch_pretranspose"]
    assert (ours, aten) == (["start_rows_kernel"], [])


@pytest.mark.parametrize("function", [decode, verify], ids=["decode", "verify"])
def test_an_empty_batch_launches_nothing(h100, counter, function):
    arguments = (decode_args if function is decode else verify_args)(torch.float32, batch=0)
    assert launched(h100, counter, function, arguments) == ([], [], [])


OPS = {
    "prefill": lambda state: prefill_args(state, batch=8),
    "decode": decode_args,
    "verify": lambda state: verify_args(state) | start_rows(state),
}


@pytest.mark.parametrize("op", OPS)
def test_the_ops_come_down_to_that_one_launch(device, counter, state_dtype, op, monkeypatch):
    """The public function takes the host's tensors, and what its op runs is FlashInfer's kernel alone."""
    simulated = Platform.simulated(device.arch.removesuffix("a"), cuda="13.0")
    monkeypatch.setattr(dispatch, "probe", lambda kind=None: simulated)
    dispatch.forget()
    arguments = OPS[op](state_dtype)
    given = {name: value for name, value in arguments.items() if name != "zero_padding"}
    try:
        assert getattr(ops, op)(**given, backend="flashinfer") is given["out"]
        run = getattr(library, f"run_{op}")  # of fake tensors the op itself asks for shapes alone
        call = functools.partial(run, backend="flashinfer")
        assert [len(found) for found in launched(device, counter, call, arguments)] == [1, 0, 0]
    finally:
        dispatch.forget()
