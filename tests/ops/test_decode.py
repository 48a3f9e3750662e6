"""Ops of few tokens beside the contract (tests/contract): other layouts, blocks, any shape, one state."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gdn_plugin.backends.torch import recurrent as eager
from gdn_plugin.ops.cases import (
    Heads,
    decode_case,
    fused_decode_case,
    fused_verify_case,
    replay_decode_case,
    replay_fold_case,
    replay_verify_case,
    verify_case,
)
from gdn_plugin.ops.dispatch import backend_op
from tests.support.checks import check
from tests.support.public import public

HALF = torch.float16
BF16 = torch.bfloat16
OPS = {
    "decode": decode_case,
    "fused_decode": fused_decode_case,
    "verify": verify_case,
    "fused_verify": fused_verify_case,
    "replay_decode": replay_decode_case,
    "replay_verify": replay_verify_case,
    "replay_fold": replay_fold_case,
}


def heads_first(x):
    """x's values, laid out [heads, T, dim]."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("names", ["q", "k", "v", "qkv"])
@pytest.mark.parametrize("op", ["decode", "verify"])
def test_heads_first(backend, op, names):
    """Only the last stride of q, k and v is fixed."""
    case = OPS[op]()
    for name in names:
        case.args[name] = heads_first(case.args[name])
    check(public(op, backend), case)


@pytest.mark.parametrize("op", OPS)
def test_blocks_of_the_batch(op, monkeypatch):
    """A batch larger than one gathered block, blocks without a live sequence included."""
    monkeypatch.setattr(eager, "_BLOCK", 2 * Heads().v_heads * Heads().v_dim * Heads().k_dim)
    size = {"lens": (2, 1, 4, 3, 1, 2, 1)} if op.endswith("verify") else {"batch": 7}
    check(backend_op(op, "torch").run, OPS[op](**size, padding=(2, 3, 6)))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    lens=st.lists(st.integers(0, 5), min_size=1, max_size=5).filter(sum),
    ratio=st.sampled_from([1, 2, 3]),
    dims=st.tuples(st.sampled_from([4, 12, 16]), st.sampled_from([4, 8, 20])),
    io_dtype=st.sampled_from([torch.float32, BF16, HALF]),
    data=st.data(),
)
@pytest.mark.parametrize("op", ["verify", "fused_verify", "replay_verify"])
def test_verify_any_shape(op, lens, ratio, dims, io_dtype, data):
    slots = max(lens)
    accepted = data.draw(st.lists(st.integers(1, slots), min_size=len(lens), max_size=len(lens)))
    padding = tuple(data.draw(st.sets(st.integers(0, len(lens) - 1))))
    more = {"fresh": data.draw(st.sets(st.integers(0, len(lens) - 1)))} if op != "verify" else {}
    if op == "replay_verify":
        more["ring"] = data.draw(st.integers(2 * slots, 2 * slots + 9))
        more["held"] = [data.draw(st.integers(n - 1, more["ring"] - slots)) for n in accepted]
    heads = Heads(2, 2 * ratio, *dims)
    case = OPS[op](lens, heads, io_dtype, slots=slots, accepted=accepted, padding=padding, **more)
    check(public(op, "torch"), case)


def test_decode_continues_prefill(backend):
    """One more token by decode equals a prefill that is one token longer: the phases share one state layout."""
    from gdn_plugin import ops
    from gdn_plugin.ops.cases import prefill_case
    from tests.support.checks import assert_close
    from tests.tolerances import tolerance

    case = prefill_case((66,), Heads(2, 4, 16, 8), gate="none")
    w, pool = case.args, case.pools["state"]
    a = torch.linspace(-2, 2, 4).expand(66, 4)
    A_log, dt_bias = torch.full((4,), -1.0), torch.zeros(4)
    g = -torch.exp(A_log) * torch.nn.functional.softplus(a + dt_bias)
    beta = torch.sigmoid(a)
    whole, split = pool.clone().view, pool.clone().view
    offsets = torch.tensor([0, 66], dtype=torch.int32)
    want = ops.prefill(w["q"], w["k"], w["v"], g, beta, whole, w["state_indices"], offsets, backend="reference")
    ops.prefill(
        w["q"][:65], w["k"][:65], w["v"][:65], g[:65], beta[:65], split, w["state_indices"], offsets.clamp(max=65),
        backend=backend,
    )  # fmt: skip
    got = ops.decode(
        w["q"][65:], w["k"][65:], w["v"][65:], a[65:], a[65:], A_log, dt_bias, split, w["state_indices"],
        use_qk_l2norm=False, backend=backend,
    )  # fmt: skip
    tol = tolerance("prefill", torch.float32, torch.float32)
    row = int(w["state_indices"][0])
    assert_close("out", got, want[65:], tol)
    assert_close("state", split[row], whole[row], tol)
