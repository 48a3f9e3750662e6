"""choose: requests, traces and errors, over rows made for the purpose."""

from __future__ import annotations

import pickle
import sys
from types import ModuleType

import pytest

from gdn_plugin.registry import Backend, BackendLoadError, BackendOp, NoBackendError, Platform, choose, load
from gdn_plugin.registry.checks import needs_sm, never

CPU = Platform.simulated("cpu")
ROWS = (
    Backend("fast", "json:loads", checks=(needs_sm(100), lambda platform, problem: "needs luck, found none")),
    Backend("shy", "json:loads", preferred=never("not measured")),
    Backend("plain", "json:loads", notes=(lambda platform, problem: "copying",)),
    Backend("spare", "json:loads"),
)


def test_auto_takes_the_first_supported_and_preferred(problem):
    choice = choose(CPU, problem(), candidates=ROWS)
    assert (choice.name, choice.request) == ("plain", "auto")
    assert [v.backend for v in choice.verdicts] == ["fast", "shy", "plain", "spare"]
    assert [(v.supported, v.preferred) for v in choice.verdicts] == [
        (False, False),
        (True, False),
        (True, True),
        (True, True),
    ]
    assert choice.verdicts[0].reasons == ("needs SM 100, this device is cpu", "needs luck, found none")


def test_describe_gives_the_reason_each_better_row_lost(problem):
    line = choose(CPU, problem(), candidates=ROWS).describe()
    assert line == (
        "prefill: plain (auto) [copying]; not fast: needs SM 100, this device is cpu, needs luck, found none; "
        "not shy: not measured"
    )


@pytest.mark.parametrize(
    ("request_", "name"),
    [("shy", "shy"), ("spare", "spare"), ("fast,spare", "spare"), (" fast , plain,spare", "plain")],
)
def test_names_are_tried_in_order_preferred_or_not(problem, request_, name):
    choice = choose(CPU, problem(), request_, candidates=ROWS)
    assert choice.name == name
    assert "asked for" in choice.describe()
    assert "not shy" not in choice.describe()


def test_a_named_request_never_falls_back(problem):
    with pytest.raises(NoBackendError) as caught:
        choose(CPU, problem(), "fast", candidates=ROWS)
    message = str(caught.value)
    assert message.startswith("no backend can run gdn::prefill as requested ('fast') for prefill(dtype=bfloat16")
    assert "  fast:\n    - needs SM 100, this device is cpu\n    - needs luck, found none" in message
    assert "plain:" not in message
    assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args


def test_an_unknown_name_is_told_from_one_that_cannot_run(problem):
    with pytest.raises(
        NoBackendError, match=r"no backend of this name offers prefill; did you mean 'plain'\?"
    ) as caught:
        choose(CPU, problem(), "plian,fast", candidates=ROWS)
    assert "needs luck" in str(caught.value)
    assert "backends of prefill: fast, shy, plain, spare" in str(caught.value)


def test_excluded_rows_lose_with_their_reason(problem):
    out = {"plain": "self-check failed: out is off"}
    choice = choose(CPU, problem(), candidates=ROWS, excluded=out)
    assert choice.name == "spare"
    assert "not plain: self-check failed: out is off" in choice.describe()
    with pytest.raises(NoBackendError, match="out is off"):
        choose(CPU, problem(), "plain", candidates=ROWS, excluded=out)


def test_auto_raises_only_where_no_row_is_left(problem):
    with pytest.raises(NoBackendError):
        choose(CPU, problem(), candidates=ROWS[:2])


def test_a_broken_check_speaks_against_its_row_only(problem):
    broken = Backend("broken", "json:loads", checks=(lambda platform, problem: problem.nothing,))
    choice = choose(CPU, problem(), candidates=(broken, *ROWS))
    assert choice.name == "plain"
    assert "a check is broken: AttributeError" in choice.verdicts[0].reasons[0]


def test_load_gives_the_function_and_says_why_it_cannot(monkeypatch):
    module = ModuleType("gdn_test_backend")
    module.run = BackendOp(lambda: "ran")
    module.plain = lambda: "ran"
    monkeypatch.setitem(sys.modules, "gdn_test_backend", module)
    assert load(Backend("mine", "gdn_test_backend:run")).run() == "ran"
    with pytest.raises(BackendLoadError, match="gdn_test_backend:plain is a function, not a BackendOp"):
        load(Backend("mine", "gdn_test_backend:plain"))
    with pytest.raises(BackendLoadError, match="has no 'walk'"):
        load(Backend("mine", "gdn_test_backend:walk"))
    with pytest.raises(BackendLoadError, match=r"importing gdn_not_there failed.*pip install it") as caught:
        load(Backend("mine", "gdn_not_there:run", install="pip install it"))
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)
    assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args
