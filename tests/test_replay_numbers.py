"""The orders that docs/replay-numbers.md speaks of, after 1024 steps."""

from __future__ import annotations

import pytest
import torch

from gdn_plugin.tools import replay_numbers as numbers


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("gates", numbers.GATES)
def test_a_bf16_pool_is_nearer_to_the_truth_with_replay(gates):
    """By a factor of two and more; where decays are strong, with u in fp32."""
    ways = tuple(way for way in numbers.WAYS if way.state is torch.bfloat16)
    found = numbers.errors(gates, 1024, ways)
    written, low, high = (found[name] for name in ("written, bf16", "replay, bf16, u bf16", "replay, bf16, u fp32"))
    assert low < written, found
    assert 2 * high < written, found
    if gates != "strong":
        assert 2 * low < written, found


@pytest.mark.parametrize("gates", ["mild", "no decay"])
def test_an_fp32_pool_keeps_its_precision(gates):
    """With u in fp32 replay is what a written fp32 state is; with u in bf16 it is not."""
    found = numbers.errors(gates, 600, tuple(way for way in numbers.WAYS if way.state is torch.float32))
    assert found["replay, fp32, u fp32"] < 1e-6 and found["written, fp32"] < 1e-6
    assert 1e-4 < found["replay, fp32, u bf16"] < 5e-3
