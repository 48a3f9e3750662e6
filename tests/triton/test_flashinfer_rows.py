"""The small kernels around FlashInfer's: which row a sequence starts from, and what is zeroed."""

from __future__ import annotations

import pytest
import torch

from gdn_plugin.backends.flashinfer import rows


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize(
    ("null_index", "padding", "wanted"),
    [(-1, -1, (4, 0, -1, 9)), (0, -1, (4, -1, -1, 9)), (0, 0, (4, 0, 0, 9)), (rows.ALL_LIVE, 0, (4, 0, -7, 9))],
    ids=["negative", "null-block", "scratch-row", "as-they-are"],
)
def test_start_rows(stride, null_index, padding, wanted):
    held = torch.full((4 * stride,), 77, dtype=torch.int32)
    held[::stride] = int32(4, 0, -7, 9)
    assert rows.start_rows(held[::stride], null_index, padding).tolist() == list(wanted)


@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_verify_rows(width):
    held = torch.arange(1, 1 + 3 * (width + 2), dtype=torch.int32).view(3, width + 2)[:, :width]
    start, table = rows.verify_rows(held, int32(1, width, 99), None)
    assert start.tolist() == [held[0, 0].item(), held[1, width - 1].item(), held[2, width - 1].item()]
    assert torch.equal(table, held) and table.is_contiguous()
    given = rows.verify_rows(held, int32(99, 99, 99), int32(7, 0, 8, 0, 9, 0)[::2])
    assert given[0].tolist() == [7, 8, 9] and torch.equal(given[1], table)


@pytest.mark.parametrize("value_dim", [5, 128])
def test_zero_padding_of_one_token_each(value_dim):
    heads = 2
    held = torch.full((3, heads + 1, value_dim + 4), float("nan"))
    out = held[:, :heads, :value_dim]
    rows.zero_padding(out, int32(5, 99, 0, 99, 1, 99)[::2], 0)
    zeroed = torch.zeros_like(held, dtype=torch.bool)
    zeroed[1, :heads, :value_dim] = True
    assert torch.equal(held == 0, zeroed) and torch.equal(held.isnan(), ~zeroed)


@pytest.mark.parametrize("offsets", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("heads", [3, 20])
def test_zero_padding_of_packed_sequences(heads, offsets):
    """Those of padding, long and short, and those behind the last sequence."""
    lens, named, value_dim, tail = (4, 70, 1, 0, 3), int32(5, 0, -1, 0, 1), 128, 6
    tokens = sum(lens) + tail
    held = torch.full((tokens + 2, heads, value_dim), float("nan"), dtype=torch.bfloat16)
    rows.zero_padding(held[1:-1], named, 0, torch.tensor([0, 4, 74, 75, 75, 78], dtype=offsets))
    zeroed = torch.zeros(tokens + 2, dtype=torch.bool)
    zeroed[1 + 4 : 1 + 75] = zeroed[1 + 78 : -1] = True
    assert torch.equal((held == 0).all(-1).all(-1), zeroed) and torch.equal(held.isnan().all(-1).all(-1), ~zeroed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_zero_fresh(dtype):
    """Only rows of sequences that start fresh, have tokens and are not padding; the gap between rows is not touched."""
    shape, gap = (6, 3, 40, 48), 16
    row = shape[1] * shape[2] * shape[3]
    held = torch.full((shape[0] * (row + gap),), float("nan"), dtype=dtype)
    state = held.as_strided(shape, (row + gap, shape[2] * shape[3], shape[3], 1))
    #                 fresh, has a state, padding, empty, fresh
    named = int32(2, 3, 0, 4, 5)
    has = torch.tensor([[False], [True], [False], [False], [False]])[:, 0]
    rows.zero_fresh(state, named, has, int32(0, 1, 2, 3, 3, 9), 0)
    zeroed = torch.zeros(shape[0], row + gap, dtype=torch.bool)
    zeroed[[2, 5], :row] = True
    found = held.view(shape[0], row + gap)
    assert torch.equal(found == 0, zeroed) and torch.equal(found.isnan(), ~zeroed)
