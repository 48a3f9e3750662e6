"""Where auto takes flashinfer for prefill: the measured rows, and every one of them reachable."""

from __future__ import annotations

import pytest

from gdn_plugin.registry import Platform, choose
from gdn_plugin.registry.preferences import PREFERENCES

pytestmark = pytest.mark.usefixtures("complete_build")


@pytest.mark.parametrize(
    ("sm", "value_heads", "sequences", "tokens", "expected"),
    [
        ("sm_100", 32, 0, 0, "flashinfer"),
        ("sm_103", 32, 0, 0, "flashinfer"),
        ("sm_100", 8, 8, 8192, "flashinfer"),
        ("sm_100", 8, 1, 512, "triton"),
        ("sm_100", 8, 1, 8192, "flashinfer"),
        ("sm_90", 32, 0, 0, "flashinfer"),
        ("sm_90", 16, 1, 64, "flashinfer"),
        ("sm_90", 14, 0, 0, "triton"),
        ("sm_90", 8, 1, 2048, "triton"),
        ("sm_90", 8, 1, 65536, "flashinfer"),
        ("sm_90", 8, 1, 1024, "triton"),
        ("sm_90", 64, 4, 8192, "flashinfer"),
        ("sm_120", 8, 0, 0, "triton"),
        ("sm_120", 8, 1, 65536, "flashinfer"),
    ],
)
def test_prefill(problem, sm, value_heads, sequences, tokens, expected):
    case = problem(num_k_heads=2, num_v_heads=value_heads, num_sequences=sequences, num_tokens=tokens)
    assert choose(Platform.simulated(sm), case).name == expected


def test_without_the_context_parallel_route_few_sequences_starve(problem):
    old = Platform.simulated("sm_100", features={"flashinfer.prefill.use_cp": None})
    few = problem(num_k_heads=2, num_v_heads=8, num_sequences=1, num_tokens=8192)
    choice = choose(old, few)
    assert choice.name == "triton"
    assert "starves this device below 1/4 wave" in choice.describe()
    assert choose(old, few, "flashinfer").name == "flashinfer"


@pytest.mark.parametrize(
    ("op", "why"),
    [("decode", "auto takes triton, whose fused decode is one launch"), ("verify", "not measured to be faster")],
)
def test_decode_and_verify_wait_to_be_asked(problem, op, why):
    choice = choose(Platform.simulated("sm_100"), problem(op))
    assert choice.name == "triton"
    assert f"not flashinfer: {why}" in choice.describe()


@pytest.mark.parametrize("row", PREFERENCES, ids=lambda row: f"{row.op}-{row.sms[0]}-{row.wins}-{row.max_waves}")
def test_every_row_has_its_source_and_a_loss_its_reason(row):
    assert row.source
    assert row.wins or row.reason
