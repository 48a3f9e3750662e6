"""The Triton verify under Triton's interpreter, against the float64 reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from gdn_plugin.backends.triton.configs import Tile
from gdn_plugin.backends.triton.launch import launch_count
from gdn_plugin.backends.triton.verify import run as verify
from gdn_plugin.ops.cases import Heads, verify_case
from tests.support.checks import check, run

SMALL = Heads(1, 2, 64, 64)
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.mark.parametrize("lens", [(1,), (4,), (4, 4), (3, 1, 4, 0, 2), (0, 0)], ids=lambda x: "+".join(map(str, x)))
def test_ragged_lengths(lens):
    check(verify, verify_case(lens, SMALL))


@pytest.mark.parametrize("accepted", [1, 2, 3, 4])
def test_start_row_is_read_before_it_is_overwritten(accepted):
    """Four tokens write all four rows, the one they started from included."""
    check(verify, verify_case((4, 2), SMALL, accepted=(accepted, accepted)))


@pytest.mark.parametrize(
    "heads", [(2, 2, 64, 128), (1, 3, 128, 64), (1, 1, 256, 256)], ids=lambda x: "x".join(map(str, x))
)
def test_heads_and_dims(heads):
    check(verify, verify_case((2, 1), Heads(*heads), slots=2))


@pytest.mark.parametrize("io_dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("state_dtype", [FP32, FP16, BF16], ids=str)
def test_dtypes(io_dtype, state_dtype):
    check(verify, verify_case((3, 2), SMALL, io_dtype, state_dtype))


def test_unit_keys_and_fp32_gates():
    check(verify, verify_case((3, 2), SMALL, BF16, use_qk_l2norm=False, gate_dtype=FP32))


@pytest.mark.parametrize("zero_padding", [True, False], ids=["returning", "out"])
@pytest.mark.parametrize("null_index", [-1, 0])
@pytest.mark.parametrize("offsets_dtype", [torch.int32, torch.int64], ids=str)
def test_padding_and_strides(zero_padding, null_index, offsets_dtype):
    case = verify_case(
        (2, 3, 0), SMALL, padding=(1,), pad_tokens=3, null_index=null_index, index_stride=3, gap=8,
        offsets_dtype=offsets_dtype,
    )  # fmt: skip
    check(verify, case, zero_padding=zero_padding)


@pytest.mark.parametrize("null_index", [-1, 0])
def test_start_rows_take_the_place_of_the_look_up(null_index):
    check(verify, verify_case((2, 3, 0, 4), SMALL, start_rows=True, padding=(1,), null_index=null_index))


@pytest.mark.parametrize("block_v", [8, 64])
def test_any_split_of_a_head(block_v):
    check(partial(verify, config=Tile(block_v * SMALL.k_dim, 4)), verify_case((2, 1), SMALL))


@pytest.mark.parametrize("zero_padding", [True, False], ids=["returning", "out"])
def test_one_launch(zero_padding):
    case = verify_case((2, 0, 1), SMALL, pad_tokens=2)
    before = launch_count()
    run(verify, case, zero_padding=zero_padding)
    assert launch_count() - before == 1
