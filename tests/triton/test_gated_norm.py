"""The Triton gated_norm under Triton's interpreter, against the float64 reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from gdn_plugin.backends.triton.gated_norm import NormConfig
from gdn_plugin.backends.triton.gated_norm import run as gated_norm
from gdn_plugin.backends.triton.launch import launch_count
from gdn_plugin.ops.cases import Heads, gated_norm_case
from tests.support.checks import check, run

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.mark.parametrize("gate", ["silu", "sigmoid"])
@pytest.mark.parametrize("io_dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("in_place", [True, False], ids=["in-place", "out"])
def test_dtypes(io_dtype, gate, in_place):
    check(gated_norm, gated_norm_case(5, Heads(1, 3, 64, 64), io_dtype, gate=gate, in_place=in_place))


@pytest.mark.parametrize("V", [64, 128, 256])
@pytest.mark.parametrize("tokens", [1, 7, 33])
@pytest.mark.parametrize("gap", [0, 8])
def test_rows_and_strides(tokens, V, gap):
    """Row counts that a program's rows do not divide, x and z slices of wider tensors."""
    check(gated_norm, gated_norm_case(tokens, Heads(1, 3, 64, V), BF16, gap=gap, in_place=gap > 0))


@pytest.mark.parametrize("elements", [64, 256, 4096])
def test_configurations(elements):
    case = gated_norm_case(9, Heads(1, 2, 64, 128), gap=4)
    check(partial(gated_norm, config=NormConfig(elements, 2)), case)


def test_head_strides():
    """z transposed: heads further apart than tokens."""
    case = gated_norm_case(6, Heads(1, 3, 64, 64))
    z = case.args["z"]
    case.args["z"] = z.transpose(0, 1).contiguous().transpose(0, 1)
    assert case.args["z"].stride() != z.stride()
    check(gated_norm, case)


def test_one_launch():
    before = launch_count()
    run(gated_norm, gated_norm_case(40, Heads(1, 4, 64, 64)))
    assert launch_count() - before == 1
    run(gated_norm, gated_norm_case(0, Heads(1, 4, 64, 64)))
    assert launch_count() - before == 1
