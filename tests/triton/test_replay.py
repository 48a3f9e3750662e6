"""The Triton replay kernels under Triton's interpreter, against the float64 reference. Races: the file for them."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from gdn_plugin.backends.triton import staged, workspace
from gdn_plugin.backends.triton.configs import FEW_HEADS, Tile
from gdn_plugin.backends.triton.launch import launch_count
from gdn_plugin.backends.triton.replay import STAGINGS, TILES
from gdn_plugin.backends.triton.replay import run as replay_step
from gdn_plugin.backends.triton.replay import run_fold as replay_fold
from gdn_plugin.ops.cases import Heads, replay_decode_case, replay_fold_case, replay_verify_case
from tests.support.checks import check

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
    tile, dims = Tile(block_v * 64, 4), Heads(*heads, 64, 64)
    check(partial(replay_step, config=tile), replay_verify_case((3, 1, 2), dims, norm=norm, fresh=(1,)))
    check(partial(replay_step, config=tile), replay_decode_case(3, dims, norm=norm))
    check(partial(replay_fold, config=tile), replay_fold_case(3, dims))


@pytest.mark.parametrize("held", range(6))
def test_every_fill_of_a_ring_of_a_decode(held):
    """Six slots, of which one stays for the next token: from an empty ring to one that folds."""
    check(replay_step, replay_decode_case(2, SMALL, ring=6, held=(held, 5 - held)))


@pytest.mark.parametrize("ring", [6, 8, 9])
@pytest.mark.parametrize("accepted", [1, 2, 3])
def test_every_fill_of_a_ring_of_drafts(ring, accepted):
    most = ring - 3
    fills = range(accepted - 1, most + 1)
    check(
        replay_step,
        replay_verify_case(
            [1 + i % 3 for i in fills], SMALL, slots=3, ring=ring, held=fills, accepted=[accepted] * len(fills)
        ),
    )


@pytest.mark.parametrize("held", [(0, 1, 6), (5, 7, 7)])
def test_every_fill_of_a_fold(held):
    check(replay_fold, replay_fold_case(3, SMALL, ring=7, held=held))


@pytest.mark.parametrize("slot", [0, 3, 6], ids=["oldest", "middle", "newest"])
def test_an_update_that_wiped_the_state(slot):
    """A gate of -inf in rings that go on and in rings that fold; what was before it leaves nothing behind, nor NaN."""
    held = (7, 7, 7)
    for function, case in (
        (replay_step, replay_decode_case(3, SMALL, ring=9, held=held)),
        (replay_step, replay_decode_case(3, SMALL, ring=8, held=held)),
        (replay_step, replay_verify_case((3, 1, 2), SMALL, slots=3, ring=10, held=held, accepted=(1, 2, 3))),
        (replay_fold, replay_fold_case(3, SMALL, ring=9, held=held)),
    ):
        ring_g, span = case.pools["ring_g"].view, case.pools["ring_span"].view
        for row in case.args["state_indices"].long():
            ring_g[row, (span[row, 0, 0] + slot) % ring_g.shape[1], 0] = -float("inf")
        check(function, case)


@pytest.mark.parametrize("dims", [(64, 128), (128, 64), (256, 256)], ids=lambda x: "x".join(map(str, x)))
def test_dims(dims):
    check(replay_step, replay_verify_case((2, 1, 2), Heads(1, 2, *dims)))
    check(replay_fold, replay_fold_case(2, Heads(1, 2, *dims), held=(3, 8)))


@pytest.mark.parametrize("io_dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("state_dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("u_dtype", [FP32, BF16], ids=str)
def test_dtypes(io_dtype, state_dtype, u_dtype):
    given = {"io_dtype": io_dtype, "state_dtype": state_dtype, "u_dtype": u_dtype}
    check(replay_step, replay_verify_case((3, 2, 1), SMALL, **given, gate="sigmoid", fresh=(1,)))
    check(replay_fold, replay_fold_case(3, SMALL, **given))


@pytest.mark.parametrize("layout", ["DS", "SD"])
@pytest.mark.parametrize("width", [2, 3, 4, 8])
def test_conv_layouts(layout, width):
    given = {"conv_dtype": FP32, "layout": layout, "width": width, "bias": width != 3}
    check(replay_step, replay_verify_case((3, 1), SMALL, BF16, **given))
    check(replay_step, replay_decode_case(2, SMALL, BF16, extra_columns=2, **given))


@pytest.mark.parametrize("zero_padding", [True, False], ids=["returning", "out"])
@pytest.mark.parametrize("null_index", [-1, 0])
def test_padding_and_strides(zero_padding, null_index):
    given = {"null_index": null_index, "index_stride": 3, "page_tail": 40}
    case = replay_verify_case((2, 3, 0, 1), SMALL, padding=(1,), pad_tokens=3, gap=8, fresh=(3,), **given)
    check(replay_step, case, zero_padding=zero_padding)
    check(replay_step, replay_decode_case(4, SMALL, padding=(1,), gap=8, **given), zero_padding=zero_padding)
    check(replay_fold, replay_fold_case(4, SMALL, padding=(1,), fresh=(2,), accepted=(1, 1, 1, 2), **given))


def test_padding_alone():
    check(replay_step, replay_verify_case((2, 1), SMALL, padding=(0, 1), pool_rows=1))
    # Pools without memory, and no has_initial_state in whose place they could be read.
    check(replay_step, replay_verify_case((2, 1), SMALL, padding=(0, 1), fresh=None, pool_rows=0))
    check(replay_step, replay_decode_case(9, SMALL, padding=range(9), pool_rows=1))
    check(replay_fold, replay_fold_case(9, SMALL, padding=range(9), pool_rows=1))


@pytest.mark.parametrize("interleaved", [True, False])
def test_a_host_page(interleaved):
    """conv_state, state and ring behind one another in a page, projections that are slices."""
    given = {"shared": True, "layout": "SD", "interleaved": interleaved, "gap": 16}
    check(replay_step, replay_verify_case((2, 1, 3), Heads(2, 4, 64, 64), BF16, BF16, **given))
    check(replay_step, replay_decode_case(3, Heads(2, 4, 64, 64), BF16, BF16, **given))


def test_many_heads_take_the_other_tile():
    few, many = (TILES.tile(90, BF16, count, 64, 64) for count in (1, FEW_HEADS))
    assert few != many
    check(partial(replay_step, config=many), replay_decode_case(3, Heads(2, 4, 64, 64), BF16, BF16))


@pytest.mark.parametrize(
    ("sequences", "k_heads", "expected"), [(3, 16, False), (4, 16, True), (7, 8, False), (8, 8, True)]
)
def test_with_an_fp32_state_128_heads_are_staged(monkeypatch, sequences, k_heads, expected):
    """Below 256 too, where eight sequences on two ranks ran the other kernel, a third slower."""
    monkeypatch.setattr(staged, "device_sm", lambda device: 90)
    state = torch.empty(1, 2 * k_heads, 128, 128, device="meta")
    assert (STAGINGS.staging(state, sequences, k_heads) is not None) == expected


def test_one_launch():
    for function, case in (
        (replay_step, replay_verify_case((2, 1), SMALL)),
        (replay_step, replay_decode_case(2, SMALL)),
        (replay_fold, replay_fold_case(2, SMALL)),
    ):
        before = launch_count()
        check(function, case)
        assert launch_count() == before + 1
