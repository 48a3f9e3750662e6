"""The Triton fused_decode under Triton's interpreter, against the float64 reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from gdn_plugin.backends.triton import workspace
from gdn_plugin.backends.triton.configs import FEW_HEADS, Tile
from gdn_plugin.backends.triton.fused_decode import TILES
from gdn_plugin.backends.triton.fused_decode import run as fused_decode
from gdn_plugin.backends.triton.launch import launch_count
from gdn_plugin.ops.cases import Heads, fused_decode_case
from tests.support.checks import check, run

SMALL = Heads(1, 2, 64, 64)
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def counters_are_left_zero():
    yield
    for region in workspace.regions():
        assert not bool(region.any()), "a launch left a counter behind; the next one would miscount"


@pytest.mark.parametrize("heads", [(1, 1), (2, 4), (1, 3), (2, 12), (1, 8)], ids=lambda x: "x".join(map(str, x)))
@pytest.mark.parametrize("block_v", [16, 64], ids=["split", "whole"])
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "plain"])
def test_groups_and_splits(heads, block_v, norm):
    """Every way a group can be finished: one program or many, the norm in registers or by the last program."""
    function = partial(fused_decode, config=Tile(block_v * 64, 4))
    check(function, fused_decode_case(2, Heads(*heads, 64, 64), norm=norm))


@pytest.mark.parametrize("dims", [(64, 128), (128, 64), (256, 256)], ids=lambda x: "x".join(map(str, x)))
def test_dims(dims):
    check(fused_decode, fused_decode_case(1, Heads(1, 2, *dims)))


@pytest.mark.parametrize("io_dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("state_dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("gate", ["silu", "sigmoid"])
def test_dtypes(io_dtype, state_dtype, gate):
    check(fused_decode, fused_decode_case(2, SMALL, io_dtype, state_dtype, gate=gate))


@pytest.mark.parametrize("layout", ["DS", "SD"])
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("extra_columns", [0, 3])
def test_conv_layouts(layout, width, extra_columns):
    case = fused_decode_case(
        2, SMALL, BF16, conv_dtype=FP32, layout=layout, width=width, extra_columns=extra_columns, bias=width != 3
    )
    check(fused_decode, case)


@pytest.mark.parametrize("zero_padding", [True, False], ids=["returning", "out"])
@pytest.mark.parametrize("null_index", [-1, 0])
def test_padding_and_strides(zero_padding, null_index):
    case = fused_decode_case(5, SMALL, padding=(1, 4), null_index=null_index, index_stride=3, gap=8, page_tail=40)
    check(fused_decode, case, zero_padding=zero_padding)


def test_one_launch():
    case = fused_decode_case(4, SMALL, padding=(2,))
    before = launch_count()
    run(fused_decode, case)
    assert launch_count() - before == 1


@pytest.mark.parametrize("K", [64, 128, 256])
@pytest.mark.parametrize("V", [64, 128, 256])
@pytest.mark.parametrize("num_heads", [1, 10 * FEW_HEADS])
@pytest.mark.parametrize("state_dtype", [FP32, BF16], ids=str)
def test_configurations_divide_a_head(K, V, num_heads, state_dtype):
    tile = TILES.tile(90, state_dtype, num_heads, K, V)
    assert V % tile.block_v(K, V) == 0
    assert tile.block_v(K, V) * K <= 128 * 32 * tile.num_warps  # state values a thread holds


def test_counters_grow_and_stay():
    """A captured graph may hold any address that was ever handed out."""
    device = torch.device("cpu")
    first = workspace.counters(device, 1)
    large = workspace.counters(device, 2 * workspace.REGION)
    assert large.numel() > workspace.REGION and workspace.counters(device, 1).data_ptr() == large.data_ptr()
    kept = [region for allocation in workspace.regions() for region in allocation.view(-1, workspace.REGION)]
    assert first.data_ptr() in [region.data_ptr() for region in kept]
