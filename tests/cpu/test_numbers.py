"""Backend `cpu` against the float64 reference, at every instruction-set level that this machine can run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gdn_plugin.backends.cpu import build, kernels
from gdn_plugin.ops.cases import (
    Heads,
    conv_prologue_case,
    decode_case,
    fused_decode_case,
    prefill_case,
    verify_case,
)
from tests.support.checks import check

conv_prologue, fused_decode = kernels.CONV_PROLOGUE.run, kernels.FUSED_DECODE.run
prefill, decode, verify = kernels.PREFILL.run, kernels.DECODE.run, kernels.VERIFY.run
LEVELS = [level.name for level in build.levels()]
IO = [torch.float32, torch.bfloat16, torch.float16]
STATE = [torch.float32, torch.bfloat16, torch.float16]
HEADS = {
    "model": Heads(1, 2, 128, 128),
    "small": Heads(2, 4, 16, 8),
    "odd": Heads(1, 3, 20, 37),
    "wide": Heads(2, 2, 64, 144),
}


def name(x: object) -> str:
    return str(x).removeprefix("torch.")


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    with build.forced_level(request.param):
        yield request.param


@pytest.fixture(params=HEADS)
def heads(request: pytest.FixtureRequest) -> Heads:
    return HEADS[request.param]


def precision(level: str, io: torch.dtype) -> str:
    """The tolerance column: only prefill's bf16 dot products round operands to the io dtype."""
    return "io" if level == "avx512_bf16" and io == torch.bfloat16 else "fp32"


@pytest.mark.parametrize("io", IO, ids=name)
@pytest.mark.parametrize("state", STATE, ids=name)
def test_prefill(level: str, heads: Heads, io: torch.dtype, state: torch.dtype) -> None:
    case = prefill_case(
        (1, 31, 0, 32, 33, 97), heads, io, state, fresh=(1,), padding=(3,), pad_tokens=3, gap=5, index_stride=3,
        use_qk_l2norm=True,
    )  # fmt: skip
    check(prefill, case, precision=precision(level, io))


@pytest.mark.parametrize("io", IO, ids=name)
# Not harsh with exp: the reference takes log(exp(g)), which is -inf where exp(g) is 0 in fp32.
@pytest.mark.parametrize(
    ("gate", "exp_gate"),
    [("none", False), ("none", True), ("strong", False), ("strong", True), ("harsh", False)],
    ids=["none", "none-exp", "strong", "strong-exp", "harsh"],
)
def test_prefill_gates(level: str, io: torch.dtype, gate: str, exp_gate: bool) -> None:
    case = prefill_case((65, 130), Heads(1, 2, 64, 64), io, gate=gate, exp_gate=exp_gate, offsets_dtype=torch.int64)
    check(prefill, case, precision=precision(level, io))


@pytest.mark.parametrize("io", IO, ids=name)
def test_prefill_correlated_keys(level: str, io: torch.dtype) -> None:
    case = prefill_case((192,), Heads(1, 1, 128, 128), io, keys="correlated", fresh=None)
    check(prefill, case, precision=precision(level, io))


@pytest.mark.parametrize("state", STATE, ids=name)
def test_prefill_checkpoints(level: str, state: torch.dtype) -> None:
    lens = (130, 64, 1, 63, 200)
    case = prefill_case(lens, Heads(2, 4, 64, 32), torch.float32, state, checkpoint_every=64, fresh=(0,), padding=(1,))
    check(prefill, case)


def test_prefill_null_row_and_out_op(level: str) -> None:
    case = prefill_case((40, 3, 7), io_dtype=torch.bfloat16, null_index=0, padding=(1,), pad_tokens=5)
    check(prefill, case, precision=precision(level, torch.bfloat16), zero_padding=False)


@pytest.mark.parametrize("io", IO, ids=name)
@pytest.mark.parametrize("state", STATE, ids=name)
def test_decode(level: str, heads: Heads, io: torch.dtype, state: torch.dtype) -> None:
    check(decode, decode_case(5, heads, io, state, padding=(2,), gap=3, index_stride=2))


@pytest.mark.parametrize("zero_padding", [True, False], ids=["zeros", "leaves"])
def test_decode_null_row(level: str, zero_padding: bool) -> None:
    case = decode_case(
        6, Heads(1, 2, 128, 64), torch.bfloat16, null_index=0, padding=(0, 5), gate_dtype=torch.float32,
        use_qk_l2norm=False,
    )  # fmt: skip
    check(decode, case, zero_padding=zero_padding)


@pytest.mark.parametrize("io", IO, ids=name)
@pytest.mark.parametrize("state", STATE, ids=name)
@pytest.mark.parametrize("layout", ["DS", "SD"])
def test_fused_decode(level: str, heads: Heads, io: torch.dtype, state: torch.dtype, layout: str) -> None:
    case = fused_decode_case(4, heads, io, state, layout=layout, padding=(1,), gap=3, extra_columns=2, null_index=0)
    check(fused_decode, case)


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_fused_decode_options(level: str, width: int, norm: bool) -> None:
    case = fused_decode_case(
        3, Heads(1, 2, 32, 48), torch.bfloat16, conv_dtype=torch.float32, width=width, bias=False, norm=norm,
        gate="sigmoid", gate_dtype=torch.float32,
    )  # fmt: skip
    check(fused_decode, case)


@pytest.mark.parametrize("io", IO, ids=name)
@pytest.mark.parametrize("layout", ["DS", "SD"])
@pytest.mark.parametrize("exp_gate", [False, True], ids=["log", "exp"])
def test_conv_prologue(level: str, heads: Heads, io: torch.dtype, layout: str, exp_gate: bool) -> None:
    case = conv_prologue_case(
        (1, 2, 0, 64, 65, 130, 3), heads, io, layout=layout, fresh=(1, 4), padding=(3,), pad_tokens=3, gap=5,
        exp_gate=exp_gate,
    )  # fmt: skip
    check(conv_prologue, case)


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("layout", ["DS", "SD"])
def test_conv_prologue_speculative(level: str, width: int, layout: str) -> None:
    case = conv_prologue_case(
        (3, 1, 4, 2), Heads(1, 2, 32, 16), torch.bfloat16, accepted=(1, 4, 2, 3), width=width, layout=layout,
        padding=(3,), null_index=0, fresh=None, bias=False, state_dtype=None,
    )  # fmt: skip
    check(conv_prologue, case)


@pytest.mark.parametrize("io", IO, ids=name)
@pytest.mark.parametrize("state", STATE, ids=name)
def test_verify(level: str, heads: Heads, io: torch.dtype, state: torch.dtype) -> None:
    check(verify, verify_case((3, 1, 4, 0, 2), heads, io, state, padding=(4,), pad_tokens=2, gap=3, index_stride=3))
    check(verify, verify_case((3, 1, 4, 0, 2), heads, io, state, start_rows=True, padding=(4,)))
