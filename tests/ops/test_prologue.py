"""conv_prologue beside the contract (tests/contract): a prompt in parts, and any shape."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gdn_plugin import ops
from gdn_plugin.ops.cases import Heads, conv_prologue_case
from tests.support.checks import check
from tests.support.public import public

OUTPUTS = ("q", "k", "v", "g", "beta")


def test_two_chunks_equal_one(backend):
    """A prompt cut in two, conv_state carried between, gives what the whole prompt gives."""
    case = conv_prologue_case((11,), fresh=(0,))
    w = {n: x for n, x in case.args.items() if n not in ("cu_seqlens", "has_initial_state")}
    whole = {n: p.clone().view for n, p in case.pools.items()}
    split = {n: p.clone().view for n, p in case.pools.items()}
    offsets = torch.tensor([0, 11], dtype=torch.int32)
    fresh, carried = torch.tensor([False]), torch.tensor([True])
    want = ops.conv_prologue(**w, **whole, cu_seqlens=offsets, has_initial_state=fresh, backend="reference")
    parts = []
    for first, last, initial in ((0, 2, fresh), (2, 3, carried), (3, 11, carried)):
        cut = w | {n: w[n][first:last] for n in ("mixed_qkv", "a", "b")}
        offsets = torch.tensor([0, last - first], dtype=torch.int32)
        parts.append(ops.conv_prologue(**cut, **split, cu_seqlens=offsets, has_initial_state=initial, backend=backend))
    for i, name in enumerate(OUTPUTS):
        assert torch.allclose(torch.cat([p[i] for p in parts]), want[i], atol=1e-5), name
    row = int(w["state_indices"][0])
    assert torch.equal(split["conv_state"][row], whole["conv_state"][row])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    lens=st.lists(st.integers(0, 7), min_size=1, max_size=5).filter(sum),
    heads=st.sampled_from([Heads(1, 1, 4, 4), Heads(2, 4, 8, 4), Heads(1, 3, 4, 12)]),
    width=st.integers(2, 4),
    layout=st.sampled_from(["DS", "SD"]),
    speculative=st.booleans(),
    pad_tokens=st.sampled_from([0, 3]),
    data=st.data(),
)
def test_any_shape(lens, heads, width, layout, speculative, pad_tokens, data):
    some = st.sets(st.integers(0, len(lens) - 1))
    accepted = data.draw(st.lists(st.integers(1, 4), min_size=len(lens), max_size=len(lens))) if speculative else None
    case = conv_prologue_case(
        lens, heads, width=width, layout=layout, accepted=accepted, fresh=tuple(data.draw(some)),
        padding=tuple(data.draw(some)), pad_tokens=pad_tokens,
    )  # fmt: skip
    check(public("conv_prologue", "torch"), case)
