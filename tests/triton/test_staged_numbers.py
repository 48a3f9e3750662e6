"""The kernels that stage states through shared memory, against the float64 reference.

Here on the CPU, by tests/support/gluon_on_cpu.py; tests/gpu/test_staged.py runs the same on a GPU.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from gdn_plugin.backends.triton import fused_decode, fused_verify, replay
from gdn_plugin.backends.triton.staged import Staging, Stagings
from gdn_plugin.ops import cases
from gdn_plugin.ops.cases import Heads
from tests.support.checks import check, run_reference
from tests.support.gluon_on_cpu import gluon_on_cpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
QWEN = Heads(4, 8, 128, 128)
ALL, FEW_BUFFERS = Staging(64, 8, 8), Staging(32, 2, 4)
STEP = {"fused_decode": fused_decode, "fused_verify": fused_verify, "replay_decode": replay, "replay_verify": replay}
TABLES: dict[str, Stagings] = {
    "fused_decode": fused_decode.STAGINGS, "fused_verify": fused_verify.STAGINGS,
    "replay_decode": replay.STAGINGS, "replay_verify": replay.STAGINGS,
}  # fmt: skip
DECODES = ("fused_decode", "replay_decode")


DEVICE = "cpu"


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Yields the names of the kernels that ran."""
    with gluon_on_cpu(monkeypatch, fused_decode, fused_verify, replay) as seen:
        yield seen
        assert seen, "no staged kernel ran"


def staged(op, staging=FEW_BUFFERS):
    return partial(STEP[op].run, config=staging)


def case(op, lens=(3, 1, 4, 0, 2), heads=QWEN, io=BF16, state=BF16, **given):
    """Pages of the alignment that copies of 16 bytes want; of an op without ragged lengths one token each."""
    if op in DECODES:
        for name in ("pad_tokens", "fresh", "slots", "accepted", "start_rows"):
            given.pop(name, None)
        return getattr(cases, f"{op}_case")(len(lens), heads, io, state, page_tail=64, device=DEVICE, **given)
    return getattr(cases, f"{op}_case")(lens, heads, io, state, page_tail=64, device=DEVICE, **given)


@pytest.mark.parametrize("op", STEP)
@pytest.mark.parametrize("heads", [(1, 1), (2, 4), (2, 8)], ids=lambda x: "x".join(map(str, x)))
@pytest.mark.parametrize("staging", [ALL, FEW_BUFFERS], ids=["all", "two"])
@pytest.mark.parametrize("io,state", [(BF16, BF16), (BF16, FP32), (FP16, FP16), (FP32, FP32)], ids=str)
def test_heads_and_dtypes(op, heads, staging, io, state):
    if state == FP32 and staging is ALL:
        staging = Staging(32, 8, 8)  # 64 rows of fp32 are more than a program may have
    given = {"fresh": (1,), "pad_tokens": 3}
    check(staged(op, staging), case(op, heads=Heads(*heads, 128, 128), io=io, state=state, **given))


@pytest.mark.parametrize("op", STEP)
@pytest.mark.parametrize("layout", ["DS", "SD"])
@pytest.mark.parametrize("width", [2, 3, 4, 8])
def test_conv_layouts(op, layout, width):
    given = {} if op == "replay_verify" else {"extra_columns": 2}
    check(staged(op), case(op, layout=layout, width=width, conv_dtype=FP32, bias=width != 3, **given))


@pytest.mark.parametrize("op", STEP)
@pytest.mark.parametrize("zero_padding", [True, False], ids=["returning", "out"])
@pytest.mark.parametrize("null_index", [-1, 0])
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "plain"])
def test_padding_and_strides(op, zero_padding, null_index, norm):
    given = {"padding": (1, 4), "pad_tokens": 3, "null_index": null_index, "index_stride": 3, "gap": 8, "norm": norm}
    check(staged(op), case(op, gate="sigmoid", fresh=(2,), **given), zero_padding=zero_padding)


@pytest.mark.parametrize("op", STEP)
def test_a_host_page_of_interleaved_projections(op):
    check(staged(op), case(op, interleaved=True, shared=True, layout="SD", bias=False))


@pytest.mark.parametrize("op", ["fused_verify", "replay_verify"])
@pytest.mark.parametrize("length", [1, 2, 5, 8])
@pytest.mark.parametrize("accepted", [1, 2, 8])
def test_the_window_moves_by_what_was_accepted(op, length, accepted):
    given = {"ring": 32} if op == "replay_verify" else {}
    check(staged(op), case(op, (length, 8), slots=8, accepted=(accepted, 1), **given))


def test_fused_verify_from_start_rows_and_past_null_slots():
    check(staged("fused_verify"), case("fused_verify", (2, 3, 0, 1), start_rows=True, fresh=(3,)))
    check(staged("fused_verify"), case("fused_verify", (4, 4), accepted=(1, 2), null_slots=((0, 2), (1, 3))))


@pytest.mark.parametrize("io", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("state", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("ring", [6, 8, 32])
def test_every_fill_of_a_ring(ring, io, state):
    given = {"ring": ring, "io": io, "state": state}
    check(staged("replay_decode"), case("replay_decode", (1,) * ring, held=range(ring), **given))
    fills = range(1, ring - 2)
    given |= {"slots": 3, "held": fills, "accepted": [2] * len(fills)}
    check(staged("replay_verify"), case("replay_verify", [1 + i % 3 for i in fills], **given))


@pytest.mark.parametrize("op", ["replay_decode", "replay_verify"])
@pytest.mark.parametrize("io,state", [(BF16, BF16), (BF16, FP32), (FP16, FP16), (FP32, BF16)], ids=str)
def test_outputs_do_not_meet_the_rounding_of_a_fold(op, io, state):
    """A row says the same where its ring, of 8 slots, is full and folds as where there are 16 and it goes on."""
    said = []
    for slots in (8, 16):
        full = case(op, (1,), ring=16, held=(7,), accepted=(1,), fresh=None, slots=1, io=io, state=state)
        given = full.arguments()
        given |= {name: given[name][:, :slots] for name in ("ring_k", "ring_u", "ring_g")}
        staged(op)(**given)
        said.append(given["out"])
        row = given["state_indices"].reshape(-1)[0]
        assert (given["ring_span"][row, :, 1] == (1 if slots == 8 else 8)).all()
    assert torch.equal(*said)


@pytest.mark.parametrize("slot", [0, 3, 6], ids=["oldest", "middle", "newest"])
@pytest.mark.parametrize("ring", [8, 9, 16], ids=lambda n: f"ring{n}")
def test_an_update_that_wiped_the_state(slot, ring):
    """Leaves neither what was before it nor NaN, in rings that go on and in one that folds."""
    wiped = case("replay_decode", (1, 1, 1), ring=ring, held=(7, 7, 7))
    ring_g, span = wiped.pools["ring_g"].view, wiped.pools["ring_span"].view
    for row in wiped.args["state_indices"].long():
        ring_g[row, (span[row, 0, 0] + slot) % ring, 0] = -float("inf")
    check(staged("replay_decode"), wiped)


@pytest.mark.parametrize("op", STEP)
@pytest.mark.parametrize("io,state", [(BF16, BF16), (BF16, FP32), (FP32, FP32)], ids=str)
@pytest.mark.parametrize("what", [1, 2], ids=["key", "value"])
def test_a_first_key_or_value_that_is_infinite(op, io, state, what):
    """The key is NaN in one element behind the norm, and spoils all of the state, of a fresh sequence's zeros too.

    The value spoils a row of it, and by the gated norm all of its head's outputs.
    """
    spoilt = case(op, (2, 1, 2), fresh=(0, 1), io=io, state=state)
    channel = what * QWEN.k_heads * QWEN.k_dim + 5
    for token in (0, 2) if op in DECODES else (0, 2, 3):
        spoilt.args["mixed_qkv"][token, channel] = spoilt.args["conv_weight"][channel, -1].sign() * float("inf")
    got = spoilt.arguments()
    staged(op)(**got)
    truth = run_reference(spoilt)
    want = spoilt.results(truth.outputs | truth.pools)
    for name, x in spoilt.results(got).items():
        assert torch.equal(x.cpu().isfinite(), want[name].isfinite()), name


@pytest.mark.parametrize("io,state", [(FP16, FP16), (BF16, FP16)], ids=str)
def test_an_update_larger_than_fp16_holds(io, state):
    """Its product with k need not be: a fold does not make infinity of it."""
    large = case("replay_decode", (1,), io=io, state=state, ring=8, held=(7,), u_dtype=FP32)
    row = int(large.args["state_indices"][0])
    slot = (int(large.pools["ring_span"].view[row, 0, 0]) + 6) % 8
    large.pools["ring_u"].view[row, slot, 0, 5] = 1e5
    check(staged("replay_decode"), large)
