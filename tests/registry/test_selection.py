"""The ops of a layer, resolved together."""

from __future__ import annotations

import copy

import pytest

from gdn_plugin.registry import OPS, Backend, NoBackendError, Platform, select

pytestmark = pytest.mark.usefixtures("complete_build")

REPLAY = ("replay_decode", "replay_verify", "replay_fold")


@pytest.fixture
def layer(problem):
    return {op: problem(op) for op in OPS}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "sm_100",
            dict.fromkeys(OPS, "triton") | {"prefill": "flashinfer"},
        ),
        ("sm_80", dict.fromkeys(OPS, "triton")),
        ("cpu", dict.fromkeys(OPS, "cpu") | dict.fromkeys(("fused_verify", *REPLAY), "torch")),
    ],
)
def test_auto(layer, name, expected):
    selection = select(Platform.simulated(name), layer)
    assert selection.backends() == expected
    assert selection.fuses("decode")
    # The C++ backend verifies in parts, which a fused op of another backend must not take from it.
    assert selection.fuses("verify") == (name != "cpu")
    assert selection.requests == {"prefill": "auto", "decode": "auto", "verify": "auto"}


def test_ops_without_a_setting_follow_their_phase(layer):
    selection = select(Platform.simulated("sm_100"), layer, {"prefill": "torch", "decode": "reference"})
    assert selection.backends() == {
        "conv_prologue": "torch",
        "prefill": "torch",
        "decode": "reference",
        "fused_decode": "reference",
        "verify": "triton",
        "fused_verify": "triton",
        "gated_norm": "torch",
        "replay_decode": "reference",
        "replay_verify": "triton",
        "replay_fold": "torch",
    }
    assert selection.fuses("decode") and selection.fuses("verify")


def test_a_backend_without_the_op_leaves_it_to_auto(layer):
    selection = select(Platform.simulated("sm_100"), layer, {"prefill": "flashinfer", "decode": "flashinfer"})
    assert selection["conv_prologue"].name == "triton"
    assert selection["conv_prologue"].request == "auto"
    assert selection["fused_decode"].name == "triton"
    # The fused step would take decode away from the backend that was asked for.
    assert not selection.fuses("decode") and selection.fuses("verify")
    named = select(Platform.simulated("sm_100"), layer, {"verify": "flashinfer"})
    assert named["fused_verify"].name == "triton" and not named.fuses("verify")


def test_a_list_is_followed_in_its_own_order(layer):
    selection = select(
        Platform.simulated("sm_80"), layer, {"prefill": "flashinfer,torch", "decode": "flashinfer,triton"}
    )
    assert selection["prefill"].name == "torch"
    assert selection["conv_prologue"].name == "torch"
    assert selection["decode"].name == selection["fused_decode"].name == "triton"


def test_a_named_phase_that_cannot_run_raises(layer):
    with pytest.raises(NoBackendError, match="gdn::verify as requested"):
        select(Platform.simulated("cpu"), layer, {"verify": "flashinfer"})


def test_excluded_backends_are_left_out_by_op(layer):
    selection = select(Platform.simulated("cpu"), layer, excluded={"decode": {"cpu": "self-check failed"}})
    assert selection["decode"].name == "torch"
    assert selection["prefill"].name == "cpu"
    assert not selection.fuses("decode")


def test_describe_is_a_line_a_choice(layer):
    lines = select(Platform.simulated("sm_80"), layer).describe()
    assert len(lines) == len(OPS)
    assert "prefill: triton (auto); not flashinfer: needs SM 90/100/103/120, this device is 80" in lines


def test_only_what_is_asked_for_is_resolved(layer):
    selection = select(Platform.simulated("cpu"), {"prefill": layer["prefill"]})
    assert "prefill" in selection and "decode" not in selection
    assert not selection.fuses("decode") and not selection.fuses("verify")
    assert select(Platform.simulated("cpu"), {"fused_decode": layer["fused_decode"]}).fuses("decode")


def test_bad_arguments(layer):
    with pytest.raises(ValueError, match="phase 'conv_prologue' is not valid; choose one of: prefill, decode, verify"):
        select(Platform.simulated("cpu"), layer, {"conv_prologue": "torch"})
    with pytest.raises(ValueError, match="is for 'decode'"):
        select(Platform.simulated("cpu"), {"prefill": layer["decode"]})


def test_third_parties_serve_single_ops(layer, third_party):
    third_party(mine={"verify": Backend("mine", "json:loads")})
    assert select(Platform.simulated("cpu"), layer)["verify"].name == "mine"
    assert select(Platform.simulated("cpu"), layer)["prefill"].name == "cpu"


def test_it_copies_and_does_not_change(layer):
    selection = select(Platform.simulated("sm_100"), layer)
    assert copy.deepcopy(selection) == selection
    with pytest.raises(TypeError):
        selection.choices["prefill"] = selection.choices["decode"]


@pytest.mark.parametrize(
    ("name", "requests", "left_out"),
    [
        ("sm_100", {}, {"decode", "verify"}),
        ("cpu", {}, {"decode", "fused_verify"}),
        ("sm_100", {"decode": "flashinfer"}, {"fused_decode", "verify"}),
        ("sm_100", {"verify": "flashinfer"}, {"decode", "fused_verify"}),
    ],
)
def test_a_layer_comes_to_an_op_of_a_phase_or_to_its_fused_one(layer, name, requests, left_out):
    selection = select(Platform.simulated(name), layer, requests)
    assert {choice.problem.op for choice in selection.reached()} == set(OPS) - left_out
    alone = select(Platform.simulated(name), {"decode": layer["decode"]})
    assert [choice.problem.op for choice in alone.reached()] == ["decode"]
