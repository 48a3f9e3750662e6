"""Third parties' rows."""

from __future__ import annotations

import pytest

from gdn_plugin.registry import Backend, NoBackendError, Platform, backend_names, choose, rows
from gdn_plugin.registry.checks import needs_device, never
from gdn_plugin.registry.table import load_failures

MINE = Backend("mine", "json:loads", checks=(needs_device("cpu"),))


@pytest.mark.usefixtures("complete_build")
@pytest.mark.parametrize(
    "offer", [{"prefill": MINE}, {"prefill": [MINE]}, lambda: {"prefill": (MINE,)}], ids=["one", "several", "function"]
)
def test_rows_rank_above_the_plugins_own(third_party, problem, offer):
    third_party(mine=offer)
    assert rows("prefill")[0] == MINE
    assert "mine" not in [row.name for row in rows("decode")]
    assert "mine" in backend_names()
    assert choose(Platform.simulated("cpu"), problem()).name == "mine"
    on_gpu = choose(Platform.simulated("sm_100"), problem())
    assert on_gpu.name == "flashinfer"
    assert "not mine: needs a cpu device" in on_gpu.describe()


@pytest.mark.usefixtures("complete_build")
def test_a_row_may_wait_to_be_asked(third_party, problem):
    third_party(mine={"prefill": Backend("mine", "json:loads", preferred=never("experimental"))})
    assert choose(Platform.simulated("cpu"), problem()).name == "cpu"
    assert choose(Platform.simulated("cpu"), problem(), "mine").name == "mine"


@pytest.mark.usefixtures("complete_build")
@pytest.mark.parametrize(
    ("offer", "why"),
    [
        (RuntimeError("boom"), "RuntimeError: boom"),
        (["prefill"], "expected a mapping from op to Backend, got list"),
        ({"prefil": MINE}, "op 'prefil' is not valid; choose one of: conv_prologue, prefill"),
        ({"prefill": "mine"}, "expected Backend, got str"),
        ({"prefill": Backend("auto", "json:loads")}, "'auto' cannot be a backend's name"),
        ({"prefill": Backend("a,b", "json:loads")}, "'a,b' cannot be a backend's name"),
        ({"prefill": Backend("a", "json:loads", checks=never("x"))}, "a: checks must be a tuple of functions"),
        ({"prefill": Backend("a", "json:loads", checks=[never("x")])}, "a: checks must be a tuple of functions"),
        ({"prefill": Backend("a", "json:loads", notes=("x",))}, "a: notes must be a tuple of functions"),
        ({"prefill": Backend("a", "json:loads", wants={})}, "a: wants must be Wants(...); got {}"),
        (SystemExit(3), "SystemExit: 3"),
    ],
    ids=[
        "raises",
        "no mapping",
        "unknown op",
        "no row",
        "named auto",
        "named with a comma",
        "one check",
        "a list",
        "no functions",
        "no wants",
        "exits",
    ],
)
def test_a_broken_package_costs_its_own_rows_only(third_party, problem, caplog, offer, why):
    third_party(broken=offer, mine={"decode": MINE})
    assert rows("prefill")[0].name == "flashinfer"
    assert rows("decode")[0] == MINE
    assert why in load_failures()["broken"]
    assert why in caplog.text
    with pytest.raises(NoBackendError) as caught:
        choose(Platform.simulated("cpu"), problem(), "broken")
    assert why in str(caught.value)


@pytest.mark.usefixtures("complete_build")
def test_a_check_that_says_no_sentence_is_broken(third_party, problem):
    third_party(mine={"prefill": Backend("mine", "json:loads", checks=(lambda platform, problem: False,))})
    assert "not mine: a check is broken: it says False" in choose(Platform.simulated("cpu"), problem()).describe()


def test_a_taken_name_is_left_out_and_reported(third_party):
    third_party(
        a={"prefill": Backend("triton", "json:loads")},
        b={"prefill": MINE},
        c={"prefill": Backend("mine", "json:dumps")},
    )
    assert [row.target for row in rows("prefill") if row.name == "mine"] == ["json:loads"]
    assert [row.name for row in rows("prefill")].count("triton") == 1
    assert len(load_failures()) == 2
    assert "the name 'triton' is taken" in load_failures()["triton (prefill)"]


def test_without_third_parties_nothing_is_missing():
    assert load_failures() == {}
