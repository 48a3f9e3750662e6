"""What the wrappers ask of the device: FlashInfer's kernel, and nothing of torch's around it.

FlashInfer's public functions run with their own argument checks, on fake tensors, so these tests also show that it
takes our dtypes, shapes and strides on every architecture.
"""

from __future__ import annotations

import warnings

import pytest
import torch

from gdn_plugin.backends.flashinfer.decode import DECODE
from gdn_plugin.backends.flashinfer.prefill import PREFILL, _bound
from gdn_plugin.backends.flashinfer.verify import VERIFY
from tests.flashinfer.calls import decode_args, empty, prefill_args, verify_args

prefill, decode, verify = PREFILL.run, DECODE.run, VERIFY.run
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
    arguments = prefill_args(state_dtype, batch=8, checkpoints=with_checkpoints)
    theirs, ours, aten = launched(device, counter, prefill, arguments, first=True)
    assert len(theirs) == 1
    assert (ours, aten) == ([], [])


def test_few_sequences_take_the_context_parallel_route_without_a_warning(device, counter, state_dtype):
    arguments = prefill_args(state_dtype, batch=1, checkpoints=True)
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
        ({"zero_padding": True}, [], []),
        ({"padding": "scratch"}, ["zero_padding_kernel"], []),
        ({"padding": "scratch", "zero_padding": True}, ["zero_padding_kernel"], []),
        ({"has_initial_state": (8, torch.bool)}, ["zero_fresh_kernel"], []),
        ({"scale": 0.0}, [], ["aten.zero_.default"]),
        ({"state_indices": "strided"}, ["rows_kernel"], []),
        ({"cu_seqlens": (9, torch.int64)}, [], ["aten._to_copy.default"]),
        ({"cu_seqlens": "off-boundary"}, [], ["aten.clone.default"]),
    ],
    ids=[
        "log-gate",
        "returning",
        "scratch-row",
        "returning-scratch-row",
        "fresh-rows",
        "zero-scale",
        "strided-rows",
        "int64-offsets",
        "offsets-off-boundary",
    ],
)
def test_every_other_form_of_prefill_costs_what_it_says(h100, counter, changes, ours, aten):
    changes = {
        name: empty(value[0], dtype=value[1]) if isinstance(value, tuple) else value for name, value in changes.items()
    }
    if changes.get("state_indices") == "strided":
        changes["state_indices"] = empty(16, dtype=torch.int32).as_strided((8,), (2,))
    if changes.get("cu_seqlens") == "off-boundary":
        changes["cu_seqlens"] = empty(10, dtype=torch.int32).as_strided((9,), (1,), 1)
    found = launched(h100, counter, prefill, prefill_args(torch.float32, **changes))
    assert found == (["_FullyFusedDeltaRuleSm90"], ours, aten)


def test_the_norm_of_prefill_is_one_launch_of_flashinfers(device, counter, state_dtype):
    theirs, ours, aten = launched(device, counter, prefill, prefill_args(state_dtype, use_qk_l2norm=True))
    assert (theirs[0], len(theirs), ours, aten) == ("_launch", 2, [], [])


def test_prefill_of_fp16_pools(device, counter):
    theirs, ours, aten = launched(device, counter, prefill, prefill_args(torch.float16), first=True)
    assert (len(theirs), ours, aten) == (1, [], [])


def test_prefill_of_nothing_launches_nothing(h100, counter):
    assert launched(h100, counter, prefill, prefill_args(torch.float32, tokens=0)) == ([], [], [])


@pytest.mark.parametrize(
    ("hint", "tokens", "batch", "bound"),
    [(0, 100, 4, 100), (7, 100, 4, 25), (60, 100, 4, 60), (500, 100, 4, 100), (1, 1, 9, 1)],
    ids=["unknown", "below-the-mean", "known", "above-the-total", "more-sequences-than-tokens"],
)
def test_the_hint_on_the_longest_sequence_is_brought_into_flashinfers_range(hint, tokens, batch, bound):
    assert _bound(hint, tokens, batch) == bound


@pytest.mark.parametrize(
    ("padding", "null_index"), [("none", 0), ("any", -1)], ids=["no-padding", "padding-is-minus-1"]
)
def test_fp32_decode_is_one_launch(device, counter, padding, null_index):
    arguments = decode_args(torch.float32, padding=padding, null_index=null_index, zero_padding=True)
    theirs, ours, aten = launched(device, counter, decode, arguments)
    assert theirs == ["run_gdn_decode_kernel_small_batch_pretranspose"]
    assert (ours, aten) == ([], [])


@pytest.mark.parametrize("padding", ["any", "scratch"])
def test_fp32_decode_maps_null_rows_in_one_launch_more(device, counter, padding):
    theirs, ours, aten = launched(device, counter, decode, decode_args(torch.float32, padding=padding))
    assert (len(theirs), ours, aten) == (1, ["rows_kernel"], [])


@pytest.mark.parametrize("batch", [1, 17, 64])
def test_bf16_decode_is_one_launch(device, counter, batch):
    arguments = decode_args(torch.bfloat16, batch=batch, zero_padding=True)
    theirs, ours, aten = launched(device, counter, decode, arguments)
    assert (len(theirs), ours, aten) == (1, [], [])


@pytest.mark.parametrize("zero_padding", [False, True], ids=["out", "returning"])
def test_bf16_decode_zeroes_padding_in_one_launch_more(device, counter, zero_padding):
    arguments = decode_args(torch.bfloat16, padding="scratch", zero_padding=zero_padding)
    theirs, ours, aten = launched(device, counter, decode, arguments)
    assert (len(theirs), ours, aten) == (1, ["zero_padding_kernel"], [])


@pytest.mark.parametrize("where", ["strided", "off-boundary"])
def test_row_numbers_that_decode_cannot_read_are_copied_in_one_launch(h100, counter, state_dtype, where):
    held = empty(16, dtype=torch.int32)
    rows = held.as_strided((5,), (2,)) if where == "strided" else held.as_strided((5,), (1,), 3)
    theirs, ours, aten = launched(h100, counter, decode, decode_args(state_dtype, state_indices=rows))
    assert (len(theirs), ours, aten) == (1, ["rows_kernel"], [])


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("batch", [1, 17, 64])
def test_verify_with_start_rows_is_one_launch(device, counter, state_dtype, batch, width):
    arguments = verify_args(state_dtype, batch=batch, width=width, start_rows=empty(batch, dtype=torch.int32))
    theirs, ours, aten = launched(device, counter, verify, arguments | {"zero_padding": True})
    assert (len(theirs), ours, aten) == (1, [], [])


@pytest.mark.parametrize("changed", ["start_rows", "state_indices"])
def test_every_other_form_of_verify_costs_one_launch_more(h100, counter, state_dtype, changed):
    arguments = verify_args(state_dtype, start_rows=empty(5, dtype=torch.int32))
    if changed == "start_rows":
        arguments["start_rows"] = None
    else:
        arguments["state_indices"] = empty(5, 6, dtype=torch.int32).as_strided((5, 4), (6, 1))
    theirs, own, aten = launched(h100, counter, verify, arguments)
    assert (len(theirs), own, aten) == (1, ["rows_kernel"], [])


@pytest.mark.parametrize("start_rows", [False, True], ids=["in-place", "from-start-rows"])
def test_verify_of_one_token_is_decode(device, counter, state_dtype, start_rows):
    """FlashInfer's decode reads one row and writes another where it is asked to."""
    start = empty(5, dtype=torch.int32) if start_rows else None
    names = launched(device, counter, decode, decode_args(state_dtype))[0]
    counter.kernels.clear()
    arguments = verify_args(state_dtype, width=1, start_rows=start)
    assert launched(device, counter, verify, arguments) == (names, [], [])


@pytest.mark.parametrize("function", [decode, verify], ids=["decode", "verify"])
def test_an_empty_batch_launches_nothing(h100, counter, function):
    arguments = (decode_args if function is decode else verify_args)(torch.float32, batch=0)
    assert launched(h100, counter, function, arguments) == ([], [], [])
