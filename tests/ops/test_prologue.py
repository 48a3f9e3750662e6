"""conv_prologue against the float64 reference: both conv-state layouts, speculative rows, fresh and padding rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gdn_plugin import ops
from tests.support.cases import Heads, conv_prologue_case
from tests.support.checks import check, run_reference
from tests.support.public import PROLOGUE_OUTPUTS, public

BF16 = torch.bfloat16
CASES = {
    "default": {},
    "shorter than the window": {"lens": (1, 2, 3, 4), "fresh": (1,)},
    "long": {"lens": (300, 0, 257), "fresh": (2,), "heads": Heads(1, 2, 8, 8)},
    "SD layout": {"layout": "SD", "extra_columns": 2, "fresh": (0,)},
    "all fresh": {"fresh": (0, 1, 2), "layout": "SD"},
    "has_initial_state None": {"fresh": None},
    "padding sequences": {"padding": (0, 2), "index_stride": 2},
    "only padding": {"padding": (0, 1, 2), "fresh": (1,)},
    "null block 0": {"padding": (1,), "null_index": 0, "fresh": (0,)},
    "padding tokens": {"pad_tokens": 5, "gap": 4},
    "padding tokens, exp gate": {"pad_tokens": 5, "exp_gate": True},
    "no state, no bias": {"state_dtype": None, "bias": False},
    "bf16": {"io_dtype": BF16, "state_dtype": BF16, "gap": 3, "fresh": (0,)},
    "bf16, fp32 conv state and gates": {"io_dtype": BF16, "conv_dtype": torch.float32, "gate_dtype": torch.float32},
    "fp16, ratio 8": {"io_dtype": torch.float16, "heads": Heads(2, 16, 8, 24)},
    "width 2": {"width": 2, "lens": (3, 1, 0)},
    "width 3, int64 offsets": {"width": 3, "offsets_dtype": torch.int64},
    "speculative": {"lens": (0, 1, 2, 4, 3), "accepted": (1, 2, 3, 4, 1), "padding": (3,), "fresh": None},
    "speculative, SD": {"lens": (3, 3), "accepted": (1, 3), "layout": "SD", "extra_columns": 5, "pad_tokens": 2},
    "speculative, width 2": {"lens": (2, 3), "accepted": (2, 1), "width": 2, "state_dtype": None},
}


@pytest.mark.parametrize("name", CASES)
def test_cases(backend, name):
    check(public("conv_prologue", backend), conv_prologue_case(**CASES[name]))


def test_out_buffers(backend):
    """`out=` fills the caller's buffers, and returns them."""
    case = conv_prologue_case((5, 2), pad_tokens=1)
    buffers = [torch.full(*case.outputs[n][:1], float("nan"), dtype=case.outputs[n][1]) for n in PROLOGUE_OUTPUTS]
    pools = {n: p.clone().view for n, p in case.pools.items()}
    result = ops.conv_prologue(**case.args, **pools, out=buffers, backend=backend)
    truth = run_reference(case).outputs
    for name, buffer, got in zip(PROLOGUE_OUTPUTS, buffers, result, strict=True):
        assert got is buffer
        assert torch.allclose(buffer.double(), truth[name], atol=1e-5), name


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
    for i, name in enumerate(PROLOGUE_OUTPUTS):
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
