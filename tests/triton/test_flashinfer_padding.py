"""Padding, as FlashInfer's functions are told of it: no row of a live sequence, or of nobody, is ever named for it.

Plain loops stand in FlashInfer's place and keep the row numbers that come. Every row that no sequence may touch is
compared bit by bit, and row 0, the scratch row, holds NaN to begin with.
"""

from __future__ import annotations

import pytest
import torch

from gdn_plugin.backends.flashinfer import decode, prefill, verify
from tests.flashinfer.stand_in import Seen

HK, HV, D, ROWS = 2, 4, 8, 9
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
NAN = float("nan")


@pytest.fixture
def seen(monkeypatch):
    seen = Seen()
    for module in (prefill, decode, verify):
        monkeypatch.setattr(module, "flashinfer_api", seen.api)
    return seen


def normal(*shape, dtype=BF16, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pool(dtype):
    state = normal(ROWS, HV, D, D, dtype=dtype, seed=7)
    state[0] = NAN
    return state


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def strided(x, stride):
    held = torch.full((len(x) * stride,), ROWS - 1, dtype=x.dtype)
    held[::stride] = x
    return held[::stride]


def inputs(tokens):
    return {
        "q": normal(tokens, HK, D, seed=1),
        "k": torch.nn.functional.normalize(normal(tokens, HK, D, seed=2).float(), dim=-1).bfloat16(),
        "v": normal(tokens, HV, D, seed=3),
        "out": torch.full((tokens, HV, D), NAN, dtype=BF16),
        "scale": 0.5,
        "use_qk_l2norm": False,
    }


def gates(tokens):
    return {
        "a": normal(tokens, HV, seed=4),
        "b": normal(tokens, HV, seed=5),
        "A_log": torch.zeros(HV),
        "dt_bias": torch.zeros(HV, dtype=BF16),
    }


def check(run, arguments, live_rows, live_tokens, padding):
    """Live sequences come out as they do alone; padding comes out as zeros, and no other row has changed."""
    before = arguments["state"].clone()
    run(**arguments)
    scratch = [0] if padding == "scratch" else []
    others = [row for row in range(ROWS) if row not in (*live_rows, *scratch)]
    bits = torch.int32 if before.dtype == FP32 else torch.int16
    assert torch.equal(arguments["state"][others].view(bits), before[others].view(bits)), "a row of nobody was written"
    assert not torch.equal(arguments["state"][live_rows], before[live_rows])
    assert not arguments["state"][live_rows].isnan().any()
    out, live = arguments["out"], torch.zeros(len(arguments["out"]), dtype=torch.bool)
    live[live_tokens] = True
    assert not out[live].isnan().any() and (out[live] != 0).any(-1).all()
    rest = out[~live]
    assert (rest == 0).all() if arguments["zero_padding"] else ((rest == 0) | rest.isnan()).all()


@pytest.mark.parametrize("zero_padding", [False, True], ids=["out", "returning"])
@pytest.mark.parametrize("stride", [1, 3], ids=["dense", "strided"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_prefill_with_a_scratch_row(seen, dtype, stride, zero_padding):
    """A live sequence, padding with tokens, a fresh one, empty padding, padding with tokens, and tokens of nobody."""
    lens, rows = (5, 70, 3, 0, 1, 66), int32(4, 0, 2, 0, 0, 0)
    tokens = sum(lens) + 4
    arguments = inputs(tokens) | {
        "g": -torch.rand(tokens, HV),
        "beta": torch.rand(tokens, HV),
        "state": pool(dtype),
        "state_indices": strided(rows, stride),
        "cu_seqlens": int32(0, *torch.tensor(lens).cumsum(0).tolist()),
        "has_initial_state": torch.tensor([True, False, False, True, True, False]),
        "exp_gate": False,
        "max_seqlen": 0,
        "null_index": 0,
        "padding": "scratch",
        "checkpoints": None,
        "checkpoint_cu_starts": None,
        "checkpoint_every": 0,
        "zero_padding": zero_padding,
    }
    check(prefill.PREFILL.run, arguments, [2, 4], [*range(5), *range(75, 78)], "scratch")
    assert seen.rows == [rows.tolist()], "row 0 for padding and for nothing else"


@pytest.mark.parametrize("zero_padding", [False, True], ids=["out", "returning"])
@pytest.mark.parametrize("stride", [1, 3], ids=["dense", "strided"])
@pytest.mark.parametrize(
    ("dtype", "padding", "null_index", "given", "handed"),
    [
        (BF16, "scratch", 0, (3, 0, 5, 0), (3, 0, 5, 0)),
        (FP32, "scratch", 0, (3, 0, 5, 0), (3, -1, 5, -1)),
        (FP32, "any", 0, (3, 0, 5, -4), (3, -1, 5, -1)),
        (FP32, "any", 2, (3, 1, 5, 2), (3, -1, 5, -1)),
        (FP32, "any", -1, (3, -1, 5, -7), (3, -1, 5, -7)),
    ],
    ids=["bf16-scratch", "fp32-scratch", "fp32-null-block", "fp32-null-rows", "fp32-negative"],
)
def test_decode(seen, dtype, padding, null_index, given, handed, stride, zero_padding):
    arguments = inputs(4) | gates(4)
    arguments |= {"state": pool(dtype), "state_indices": strided(int32(*given), stride), "null_index": null_index}
    arguments |= {"padding": padding, "zero_padding": zero_padding}
    check(decode.DECODE.run, arguments, [3, 5], [0, 2], padding)
    assert seen.rows == [list(handed)]


@pytest.mark.parametrize("given", [False, True], ids=["accepted", "start-rows"])
@pytest.mark.parametrize("stride", [0, 2], ids=["dense", "strided"])
@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_verify(seen, dtype, width, stride, given):
    """Without padding: what FlashInfer is told, and that each token's state lands in its row."""
    named = torch.arange(1, 1 + 2 * width, dtype=torch.int32).view(2, width)
    table = torch.full((2, width + stride), ROWS - 1, dtype=torch.int32)
    table[:, :width] = named
    accepted, begins = int32(width, 1), [int(named[0, width - 1]), int(named[1, 0])]
    if given:
        begins = [8, 7]
    state = pool(dtype)
    arguments = inputs(2 * width) | gates(2 * width)
    arguments |= {
        "state": state,
        "state_indices": table[:, :width],
        "num_accepted_tokens": int32(99, 99) if given else accepted,
        "cu_seqlens": int32(0, width, 2 * width),
        "start_rows": int32(*begins) if given else None,
        "null_index": 0,
        "padding": "none",
        "zero_padding": False,
    }
    origin = state[begins].clone()
    check(verify.VERIFY.run, arguments, named.flatten().tolist(), [*range(2 * width)], "none")
    assert seen.rows == [begins if width == 1 else [*begins, *named.flatten().tolist()]]
    again = Seen()
    again.verify(
        *(arguments[name].unflatten(0, (2, width)) for name in ("q", "k", "v")), arguments["A_log"],
        arguments["a"].unflatten(0, (2, width)), arguments["dt_bias"], arguments["b"].unflatten(0, (2, width)), 0.5,
        torch.empty(2, width, HV, D, dtype=BF16), int32(0, 1), torch.arange(2, 2 + 2 * width).view(2, width).int(),
        False, wanted := torch.cat((origin, torch.empty(2 * width, HV, D, D, dtype=dtype))),
    )  # fmt: skip
    assert torch.equal(state[named.flatten().long()], wanted[2:])
