"""NaN and infinity come out of backend `cpu` where the recurrence puts them: nowhere earlier, and in nobody else's."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from gdn_plugin.backends.cpu import build, kernels
from gdn_plugin.backends.reference import recurrence as reference
from gdn_plugin.ops.cases import (
    Case,
    Heads,
    conv_prologue_case,
    decode_case,
    fused_decode_case,
    prefill_case,
    verify_case,
)
from gdn_plugin.registry import BackendOp
from tests.support.checks import bits

HEADS = Heads(2, 4, 20, 37)
LENS = (1, 70, 34)
TOKENS = [0, 1, 2, 4, 5, 32, 33, 70, 71, 104]  # first, last and only one of a sequence, of a chunk, of a block of four
IO = [torch.float32, torch.bfloat16]


@pytest.fixture(params=[level.name for level in build.levels()])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    with build.forced_level(request.param):
        yield request.param


def results(op: BackendOp, case: Case, spoil: Callable[[dict[str, Tensor]], None]) -> dict[str, Tensor]:
    arguments = case.arguments(zero_padding=True)
    spoil(arguments)
    op.run(**arguments)
    return case.results(arguments)


def same_places(op: str, case: Case, spoil: Callable[[dict[str, Tensor]], None]) -> dict[str, Tensor]:
    """Both hold NaN, +inf and -inf at the same places, and something is not finite at all; returns what cpu made."""
    got = results(getattr(kernels, op.upper()), case, spoil)
    want = results(getattr(reference, op.upper()), case, spoil)
    anywhere = False
    for name, wanted in want.items():
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            where = (kind(got[name]) != kind(wanted)).nonzero()
            assert not len(where), f"{name}: {kind.__name__} differs at {where[:5].tolist()} and {len(where)} in all"
        anywhere |= bool((~torch.isfinite(wanted)).any())
    assert anywhere
    return got


@pytest.mark.parametrize("io", IO, ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("fresh", [(), (0, 1, 2)], ids=["from state", "fresh"])
@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta"])
def test_a_nan_token_of_prefill(level: str, name: str, fresh: tuple[int, ...], io: torch.dtype) -> None:
    case = prefill_case(LENS, HEADS, io, fresh=fresh, gate="none")
    clean = results(kernels.PREFILL, case, lambda arguments: None)["out"]
    for token in TOKENS:

        def spoil(arguments: dict[str, Tensor], token: int = token) -> None:
            arguments[name] = arguments[name].clone()
            arguments[name][token, 1, ...].view(-1)[-1:] = float("nan")  # one element of a head

        got = same_places("prefill", case, spoil)["out"]
        earlier = torch.equal(bits(got[:token]), bits(clean[:token]))
        assert earlier, f"token {token} changed an earlier one"


@pytest.mark.parametrize("io", IO, ids=lambda x: str(x)[6:])
def test_states_of_prefill_that_are_not_finite(level: str, io: torch.dtype) -> None:
    case = prefill_case(LENS, HEADS, io, fresh=(), gate="none")

    def spoil(arguments: dict[str, Tensor]) -> None:
        rows = arguments["state_indices"].tolist()
        arguments["state"][rows[0], 1, 5, 7] = float("nan")
        arguments["state"][rows[2], 2, 36, 19] = float("nan")

    same_places("prefill", case, spoil)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("name", ["q", "k", "a", "b", "v"])
@pytest.mark.parametrize("op", ["decode", "verify"])
def test_one_token_at_a_time(level: str, op: str, name: str, value: float) -> None:
    case = decode_case(4, HEADS) if op == "decode" else verify_case((3, 1, 4), HEADS)

    def spoil(arguments: dict[str, Tensor]) -> None:
        arguments[name] = arguments[name].clone()
        arguments[name][1, 1, ...] = value

    if name in ("a", "b") and value == value:
        # An infinite gate is a decay of 0 or 1, an infinite b a beta of 0 or 1: nothing becomes infinite.
        case_got = results(getattr(kernels, op.upper()), case, spoil)
        case_want = results(getattr(reference, op.upper()), case, spoil)
        torch.testing.assert_close(case_got["out"], case_want["out"], rtol=1e-4, atol=1e-5)
    else:
        same_places(op, case, spoil)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("channel", [0, 45, 100], ids=["q", "k", "v"])
def test_the_convolution(level: str, channel: int, value: float) -> None:
    case = conv_prologue_case((5, 70), HEADS)

    def spoil(arguments: dict[str, Tensor]) -> None:
        arguments["mixed_qkv"] = arguments["mixed_qkv"].clone()
        arguments["mixed_qkv"][68, channel] = value

    same_places("conv_prologue", case, spoil)


@pytest.mark.parametrize("name", ["a", "b", "mixed_qkv", "z"])
def test_fused_decode(level: str, name: str) -> None:
    case = fused_decode_case(4, HEADS)

    def spoil(arguments: dict[str, Tensor]) -> None:
        arguments[name] = arguments[name].clone()
        arguments[name][2, 1, ...] = float("nan")

    same_places("fused_decode", case, spoil)
