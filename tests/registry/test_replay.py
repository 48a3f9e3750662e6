"""Replay on or off: the request, the data, what stands in its way, and the sentence for each."""

from __future__ import annotations

import dataclasses

import pytest

from gdn_plugin.registry import PHASES, NoBackendError, Platform, Request, decide, replay, select

GPU, CPU = Platform.simulated("sm_90"), Platform.simulated("cpu")
ON = Request("16", "GDN_PLUGIN_REPLAY")


HEADS = (16, 32, 128, 128)
AUTO = Request("auto", "default")
OLDER = dataclasses.replace(GPU, packages=GPU.packages | {"triton": "3.5.1"})


@pytest.mark.parametrize("state", ["bfloat16", "float32"])
@pytest.mark.parametrize("heads", [(16, 16, 128, 128), HEADS, (8, 16, 128, 128), (16, 64, 128, 128)])
def test_auto_takes_what_an_engine_was_measured_faster_with(heads, state):
    decision = decide(GPU, AUTO, ("bfloat16", state), heads)
    assert decision.describe().startswith("replay: on, a ring of 16 slots (auto: on SM 90 an engine's decode")
    assert decide(GPU, AUTO, ("bfloat16", state), heads, 6).slots == 24


@pytest.mark.parametrize(
    ("platform", "state", "heads", "why"),
    [
        (GPU, "float16", HEADS, "not measured on this machine)"),
        (GPU, "float32", (16, 48, 128, 128), "not measured on this machine)"),
        (GPU, "bfloat16", (16, 32, 64, 64), "not measured on this machine)"),
        (OLDER, "bfloat16", HEADS, "not measured on this machine)"),
        (OLDER, "float32", HEADS, "not measured on this machine)"),
        (Platform.simulated("sm_100"), "float32", HEADS, "not measured on this machine)"),
        (CPU, "bfloat16", HEADS, "not measured on this machine)"),
    ],
)
def test_auto_waits_for_a_measurement(platform, state, heads, why):
    decision = decide(platform, AUTO, ("bfloat16", state), heads, obstacle=lambda: pytest.fail("nobody asked for it"))
    assert decision.slots == 0
    assert decision.describe().startswith("replay: off (auto leaves replay off")
    assert decision.describe().endswith(why)


def test_tokens_of_another_dtype_are_another_kernel():
    for dtype in ("float16", "float32"):
        assert decide(GPU, AUTO, (dtype, "float32"), HEADS).why.endswith("not measured on this machine")


def test_auto_goes_by_the_first_row_that_matches(monkeypatch):
    rows = (
        replay.Preference(0, "slower there", "x", sms=(90,), dtypes=("bfloat16", "float32")),
        replay.Preference(16, "measured faster", "y", sms=(90,)),
        replay.Preference(0, "not measured", "z"),
    )
    monkeypatch.setattr(replay, "PREFERENCES", rows)
    cases = ((GPU, "float32"), (GPU, "bfloat16"), (CPU, "bfloat16"))
    found = [decide(platform, AUTO, ("bfloat16", state), HEADS).describe() for platform, state in cases]
    assert found == [
        "replay: off (slower there)", "replay: on, a ring of 16 slots (measured faster)", "replay: off (not measured)"
    ]  # fmt: skip
    assert (
        decide(GPU, AUTO, ("bfloat16", "bfloat16"), HEADS, obstacle=lambda: "in the way").describe()
        == "replay: off (in the way)"
    )


def test_every_row_has_its_sentence_and_the_last_one_matches_all():
    for row in replay.PREFERENCES:
        assert row.reason and row.source
    last = replay.PREFERENCES[-1]
    assert all(x is None for x in (last.sms, last.dtypes, last.ratios, last.dims, last.triton))


SIZES = [("4", 0, 4), ("9", 0, 12), ("16", 4, 16), ("8", 4, 16), ("64", 2, 64), ("4", 6, 24)]


@pytest.mark.parametrize(("asked", "spec", "slots"), SIZES)
def test_a_ring_has_room_for_the_drafts(asked, spec, slots):
    decision = decide(CPU, Request(asked, "x"), ("bfloat16", "float32"), HEADS, spec)
    assert decision.slots == slots >= 2 * spec
    assert decision.describe() == f"replay: on, a ring of {slots} slots (asked for, x)"


def test_off_is_off():
    assert decide(GPU, Request("0", "x"), ("bfloat16", "float32"), HEADS).describe() == "replay: off (asked for, x)"


@pytest.mark.parametrize(
    ("backends", "spec", "refused"),
    [
        ({"decode": "cpu"}, 0, "cpu, asked for decode, has no replay_decode; these have it: triton, torch, reference"),
        ({"verify": "flashinfer,cpu"}, 4, "flashinfer,cpu, asked for verify, has no replay_verify"),
        ({"verify": "cpu"}, 0, None),
        ({"prefill": "cpu", "decode": "cpu,torch"}, 4, None),
        ({"decode": "auto"}, 4, None),
    ],
)  # fmt: skip
def test_a_backend_asked_for_by_name_keeps_its_work(backends, spec, refused):
    decision = decide(GPU, ON, ("bfloat16", "float32"), HEADS, spec, backends=backends)
    assert bool(decision.slots) == (refused is None)
    assert refused is None or decision.why.startswith(refused)


def test_what_takes_a_phase_s_place_follows_its_request_or_says_why_not(problem):
    ops = ("replay_decode", "replay_fold")
    problems = {op: problem(op, ring=8) for op in ops}
    named = select(CPU, problems, dict.fromkeys(PHASES, "torch"))
    assert named.backends() == dict.fromkeys(ops, "torch")
    assert [choice.problem.op for choice in named.reached()] == list(ops)
    assert select(CPU, problems, {"prefill": "cpu"}).backends() == dict.fromkeys(ops, "torch")
    with pytest.raises(NoBackendError, match="replay_decode"):
        select(CPU, problems, {"decode": "triton"})


@pytest.mark.parametrize("op", ["replay_decode", "replay_verify"])
def test_a_ring_that_no_kernel_can_hold_in_registers(op, problem):
    """Longer ones than a host takes are for whoever calls the op; Triton would compile without end, or fail."""
    assert select(GPU, {op: problem(op, ring=256)}).backends() == {op: "triton"}
    assert select(GPU, {op: problem(op, ring=257)}).backends() == {op: "torch"}
    assert select(GPU, {"replay_fold": problem("replay_fold", ring=257)}).backends() == {"replay_fold": "triton"}
    with pytest.raises(NoBackendError, match="needs a ring of at most 256 slots; got 257"):
        select(GPU, {op: problem(op, ring=257)}, dict.fromkeys(PHASES, "triton"))
