"""The Triton fused_verify under Triton's interpreter, against the float64 reference. Its races have their own file."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from gdn_plugin.backends.triton import staged, workspace
from gdn_plugin.backends.triton.configs import FEW_HEADS, Tile
from gdn_plugin.backends.triton.fused_verify import ROWS, STAGINGS, TILES
from gdn_plugin.backends.triton.fused_verify import run as fused_verify
from gdn_plugin.backends.triton.launch import launch_count
from gdn_plugin.ops.cases import Heads, fused_verify_case
from tests.support.checks import check, run

SMALL = Heads(1, 2, 64, 64)
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def counters_are_left_zero():
    yield
    for region in workspace.regions():
        assert not bool(region.any()), "a launch left a counter behind; the next one would miscount"


@pytest.mark.parametrize("heads", [(1, 1), (2, 4), (1, 3)], ids=lambda x: "x".join(map(str, x)))
@pytest.mark.parametrize("block_v", [16, 64], ids=["split", "whole"])
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "plain"])
def test_groups_and_splits(heads, block_v, norm):
    """Every way a group can be finished: one program or many, the norm in registers or by the last program."""
    function = partial(fused_verify, config=Tile(block_v * 64, 4))
    check(function, fused_verify_case((3, 1), Heads(*heads, 64, 64), norm=norm, fresh=(1,)))


@pytest.mark.parametrize("length", [1, ROWS - 1, ROWS, ROWS + 1])
@pytest.mark.parametrize("accepted", [1, 2, ROWS + 1])
def test_the_window_moves_by_what_was_accepted(length, accepted):
    """Columns read and columns written overlap in every way, in one round of the tail's tile and in two."""
    check(fused_verify, fused_verify_case((length,), SMALL, slots=ROWS + 1, accepted=(accepted,)))


@pytest.mark.parametrize("dims", [(64, 128), (128, 64), (256, 256)], ids=lambda x: "x".join(map(str, x)))
def test_dims(dims):
    check(fused_verify, fused_verify_case((2,), Heads(1, 2, *dims)))


@pytest.mark.parametrize("io_dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("state_dtype", [FP32, FP16, BF16], ids=str)
def test_dtypes(io_dtype, state_dtype):
    check(fused_verify, fused_verify_case((3, 2), SMALL, io_dtype, state_dtype, gate="sigmoid", fresh=(1,)))


@pytest.mark.parametrize("layout", ["DS", "SD"])
@pytest.mark.parametrize("width", [2, 3, 4, 8])
def test_conv_layouts(layout, width):
    case = fused_verify_case(
        (3, 1), SMALL, BF16, conv_dtype=FP32, layout=layout, width=width, extra_columns=2, bias=width != 3
    )
    check(fused_verify, case)


@pytest.mark.parametrize("zero_padding", [True, False], ids=["returning", "out"])
@pytest.mark.parametrize("null_index", [-1, 0])
@pytest.mark.parametrize("start_rows", [False, True], ids=["accepted", "start rows"])
def test_padding_and_strides(zero_padding, null_index, start_rows):
    case = fused_verify_case(
        (2, 3, 0, 1), SMALL, padding=(1,), pad_tokens=3, null_index=null_index, index_stride=3, gap=8, page_tail=40,
        start_rows=start_rows, fresh=(3,),
    )  # fmt: skip
    check(fused_verify, case, zero_padding=zero_padding)


@pytest.mark.parametrize("where", ["first row", "start row"])
def test_either_row_makes_a_sequence_padding(where):
    """The first row, which is conv_state's too, or the one to start from."""
    case = fused_verify_case((2, 3), SMALL, accepted=(3, 1), padding=(0,))
    rows = case.args["state_indices"]
    rows[0] = torch.tensor([3, 4, 5, 6]) + int(rows.max())  # beyond the pools: reading them would fault or show
    rows[0, 0 if where == "first row" else 2] = -1
    if where == "start row":  # then how many were accepted is read
        case.args["num_accepted_tokens"][0] = 3
    check(fused_verify, case)


@pytest.mark.parametrize("zero_padding", [True, False], ids=["returning", "out"])
def test_one_launch(zero_padding):
    """Of a ragged batch with fresh sequences, padding and the norm: the whole step."""
    case = fused_verify_case((2, 0, 1, 4), SMALL, pad_tokens=2, padding=(2,), fresh=(0,))
    before = launch_count()
    run(fused_verify, case, zero_padding=zero_padding)
    assert launch_count() - before == 1


@pytest.mark.parametrize("K", [64, 128, 256])
@pytest.mark.parametrize("V", [64, 128, 256])
@pytest.mark.parametrize("num_heads", [1, 10 * FEW_HEADS])
@pytest.mark.parametrize("state_dtype", [FP32, BF16], ids=str)
def test_configurations_divide_a_head(K, V, num_heads, state_dtype):
    tile = TILES.tile(90, state_dtype, num_heads, K, V)
    assert V % tile.block_v(K, V) == 0
    assert tile.block_v(K, V) * K <= 128 * 32 * tile.num_warps  # state values a thread holds


@pytest.mark.parametrize(
    ("state_dtype", "sequences", "tokens", "expected"),
    [(FP32, 64, 4, True), (FP32, 64, 5, False), (FP32, 8, 6, False), (BF16, 64, 8, True), (BF16, 64, 9, False)],
)
def test_many_drafts_of_an_fp32_state_are_not_staged(monkeypatch, state_dtype, sequences, tokens, expected):
    """With four drafts the staged kernel took 1.36 times vLLM's time at 64 sequences, the other's at 8."""
    monkeypatch.setattr(staged, "device_sm", lambda device: 90)
    state = torch.empty(1, 32, 128, 128, dtype=state_dtype, device="meta")
    assert (STAGINGS.staging(state, sequences, 16, tokens) is not None) == expected
