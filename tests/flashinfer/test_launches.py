"""What the wrappers ask of the device: FlashInfer's kernel, and nothing of torch's around it.

FlashInfer's public functions run with their own argument checks, on fake tensors, so these tests also show that it
takes our dtypes, shapes and strides on every architecture.
"""

from __future__ import annotations

import warnings

import pytest
import torch

from gdn_plugin.ops._flashinfer.decode import decode
from gdn_plugin.ops._flashinfer.prefill import prefill
from gdn_plugin.ops._flashinfer.verify import verify
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
def test_bf16_decode_zeroes_padding_in_one_launch_more(device, counter, batch):
    theirs, ours, aten = launched(device, counter, decode, decode_args(torch.bfloat16, batch=batch))
    assert (len(theirs), ours, aten) == (1, ["zero_padding_kernel"], [])


@pytest.mark.parametrize("batch", [1, 17, 64])
def test_verify_is_one_launch_and_its_row_numbers(device, counter, state_dtype, batch):
    theirs, ours, aten = launched(device, counter, verify, verify_args(state_dtype, batch=batch))
    assert (len(theirs), aten) == (1, [])
    assert ours == ["start_rows_kernel"] + ["zero_padding_kernel"] * (state_dtype == torch.bfloat16)


def test_verify_of_one_token_is_decode(device, counter):
    theirs, ours, aten = launched(device, counter, verify, verify_args(torch.float32, width=1))
    assert theirs == ["run_gdn_decode_kernel_small_batch_pretranspose"]
    assert (ours, aten) == (["start_rows_kernel"], [])


@pytest.mark.parametrize("function", [decode, verify], ids=["decode", "verify"])
def test_an_empty_batch_launches_nothing(h100, counter, function):
    arguments = (decode_args if function is decode else verify_args)(torch.float32, batch=0)
    assert launched(h100, counter, function, arguments) == ([], [], [])
