"""The fp32 reference against itself in float64, over every builder: this also proves the builders and the checks."""

from __future__ import annotations

import pytest
import torch

from gdn_plugin.ops import cases
from gdn_plugin.ops.cases import Heads
from tests.support.checks import check, reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BUILDERS = {
    "conv_prologue": cases.conv_prologue_case,
    "prefill": cases.prefill_case,
    "decode": cases.decode_case,
    "fused_decode": cases.fused_decode_case,
    "verify": cases.verify_case,
    "fused_verify": cases.fused_verify_case,
    "replay_decode": cases.replay_decode_case,
    "replay_verify": cases.replay_verify_case,
    "replay_fold": cases.replay_fold_case,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", BUILDERS)
def test_fp32_matches_fp64(op, dtype):
    more = {} if op == "replay_fold" else {"gap": 5}
    check(reference(op), BUILDERS[op](io_dtype=dtype, padding=(1,), index_stride=2, **more))


@pytest.mark.parametrize("zero_padding", [True, False], ids=["returning", "out"])
@pytest.mark.parametrize("op", [op for op in BUILDERS if op not in ("conv_prologue", "replay_fold")])
def test_padding_rows(op, zero_padding):
    more = {} if op.endswith("decode") else {"pad_tokens": 4}
    case = BUILDERS[op](padding=(0, 2), null_index=0, state_dtype=torch.bfloat16, **more)
    check(reference(op), case, zero_padding=zero_padding)


@pytest.mark.parametrize("layout", ["DS", "SD"])
@pytest.mark.parametrize("accepted", [None, (1, 3, 2, 1)], ids=["plain", "speculative"])
def test_conv_layouts(layout, accepted):
    case = cases.conv_prologue_case(
        lens=(3, 1, 0, 2),
        layout=layout,
        accepted=accepted,
        extra_columns=2,
        fresh=None if accepted else (1,),
        pad_tokens=3,
    )
    check(reference("conv_prologue"), case)


def test_prefill_checkpoints_and_fresh_rows():
    heads = Heads(1, 3, 8, 24)
    case = cases.prefill_case((0, 128, 63, 200), heads, fresh=(1, 3), checkpoint_every=64, exp_gate=True, pad_tokens=2)
    check(reference("prefill"), case)


def test_check_catches_a_wrong_backend():
    """The checker itself can fail: a wrong number, a stray write, an unwritten output."""

    def off_by_a_bit(*, state, out, **rest):
        reference("decode")(state=state, out=out, **rest)
        out[0, 0, 0] *= 1.01

    def stray(*, state, out, **rest):
        reference("decode")(state=state, out=out, **rest)
        torch.as_strided(state, (1,), (1,), state.stride(0) - 1).fill_(0)

    def lazy(*, state, out, **rest):
        reference("decode")(state=state, out=torch.empty_like(out), **rest)

    for wrong, message in ((off_by_a_bit, "out of"), (stray, "that nothing names"), (lazy, "not finite")):
        with pytest.raises(AssertionError, match=message):
            check(wrong, cases.decode_case())
