"""The Triton decode under Triton's interpreter, against the float64 reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from gdn_plugin.backends.triton.configs import FEW_HEADS, Tile
from gdn_plugin.backends.triton.decode import TILES
from gdn_plugin.backends.triton.decode import run as decode
from gdn_plugin.backends.triton.launch import launch_count
from gdn_plugin.ops.cases import Heads, decode_case
from tests.support.checks import check, run

SMALL = Heads(1, 2, 64, 64)
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.mark.parametrize(
    "heads",
    [(1, 1, 64, 64), (2, 4, 64, 128), (1, 3, 128, 64), (1, 8, 64, 64), (1, 1, 256, 256)],
    ids=lambda x: "x".join(map(str, x)),
)
def test_heads_and_dims(heads):
    check(decode, decode_case(2, Heads(*heads)))


@pytest.mark.parametrize("io_dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("state_dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("use_qk_l2norm", [True, False], ids=["raw", "unit"])
def test_dtypes(io_dtype, state_dtype, use_qk_l2norm):
    check(decode, decode_case(3, SMALL, io_dtype, state_dtype, use_qk_l2norm=use_qk_l2norm))


def test_fp32_gates_beside_bf16_inputs():
    check(decode, decode_case(2, SMALL, BF16, gate_dtype=FP32))


@pytest.mark.parametrize("zero_padding", [True, False], ids=["returning", "out"])
@pytest.mark.parametrize("null_index", [-1, 0])
def test_padding_and_strides(zero_padding, null_index):
    case = decode_case(5, SMALL, padding=(1, 4), null_index=null_index, index_stride=3, gap=8, page_tail=40)
    check(decode, case, zero_padding=zero_padding)


@pytest.mark.parametrize("block_v", [4, 16, 64])
def test_any_split_of_a_head(block_v):
    check(partial(decode, config=Tile(block_v * SMALL.k_dim, 1)), decode_case(2, SMALL))


def test_one_launch():
    case = decode_case(4, SMALL, padding=(2,))
    before = launch_count()
    run(decode, case)
    assert launch_count() - before == 1


@pytest.mark.parametrize("K", [64, 128, 256])
@pytest.mark.parametrize("V", [64, 128, 256])
@pytest.mark.parametrize("num_heads", [1, FEW_HEADS, 10 * FEW_HEADS])
def test_configurations_divide_a_head(K, V, num_heads):
    tile = TILES.tile(90, FP32, num_heads, K, V)
    assert V % tile.block_v(K, V) == 0
    assert tile.block_v(K, V) * K <= 64 * 32 * tile.num_warps  # state values a thread holds


def test_batch_one_fills_a_gpu():
    """32 heads of 128x128 have to spread over at least the 148 multiprocessors of a B200."""
    assert 32 * 128 // TILES.tile(90, FP32, 32, 128, 128).block_v(128, 128) >= 148
