"""Which backend a call goes to, and the hooks of backends."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from gdn_plugin import ops
from gdn_plugin.ops import dispatch
from gdn_plugin.registry import Backend, BackendLoadError, NoBackendError, Problem, probe, select
from tests.support import cases

PROBLEM = Problem("decode", "float32", "float32", 2, 4, 16, 8)


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in ("", "_PREFILL", "_DECODE", "_VERIFY"):
        monkeypatch.delenv(f"GDN_PLUGIN{name}_BACKEND", raising=False)
    dispatch.forget()
    yield
    dispatch.forget()


@pytest.fixture
def used(monkeypatch):
    """Names of the backends that calls went to."""
    names = []
    original = dispatch.function

    def spy(op, backend):
        names.append(backend)
        return original(op, "torch")

    monkeypatch.setattr("gdn_plugin.ops.library.function", spy)
    return names


def decode(**kw):
    case = cases.decode_case(2)
    return ops.decode(**case.args, state=case.pools["state"].view, **kw)


def prologue(**kw):
    case = cases.conv_prologue_case((2,))
    return ops.conv_prologue(**case.args, **{n: p.view for n, p in case.pools.items()}, **kw)


def test_a_name_forces_it(used):
    decode(backend="reference")
    assert used == ["reference"]


def test_a_list_is_tried_in_order(used):
    decode(backend="flashinfer,reference")
    assert used == ["reference"]


@pytest.mark.parametrize("name", ["flashinfer", "nonsense"])
def test_a_name_that_cannot_run_raises(name):
    with pytest.raises(NoBackendError, match=name):
        decode(backend=name)


def test_environment(used, monkeypatch):
    monkeypatch.setenv("GDN_PLUGIN_BACKEND", "torch")
    decode()
    monkeypatch.setenv("GDN_PLUGIN_DECODE_BACKEND", "reference")
    decode()
    assert used == ["torch", "reference"]


def test_use_wins_over_the_environment(used, monkeypatch):
    monkeypatch.setenv("GDN_PLUGIN_DECODE_BACKEND", "reference")
    with ops.use({"decode": "torch"}):
        decode()
    with ops.use({"prefill": "torch"}):
        decode()
    assert used == ["torch", "reference"]


def test_use_takes_a_selection(used):
    with ops.use(select(probe("cpu"), {"decode": PROBLEM}, {"decode": "reference"})):
        decode()
    assert used == ["reference"]


def test_use_refuses_an_unknown_phase():
    with pytest.raises(ValueError, match="prefil"), ops.use({"prefil": "torch"}):
        pass


def test_the_prologue_follows_prefill(used):
    with ops.use({"prefill": "reference"}):
        prologue()
    assert used == ["reference"]


def test_auto_never_takes_the_reference(used):
    decode()
    prologue()
    assert used and "reference" not in used


def test_auto_passes_over_a_backend_that_cannot_be_imported(monkeypatch, caplog):
    broken = Backend("broken", "gdn_plugin.ops.nothing_here:decode")
    table = (broken, *dispatch.rows("decode"))
    monkeypatch.setattr("gdn_plugin.registry.choice.rows", lambda op: table)
    monkeypatch.setattr("gdn_plugin.registry.choice.in_build", lambda target: True)
    monkeypatch.setattr(dispatch, "rows", lambda op: table)
    assert dispatch.resolve("decode", None, torch.zeros(1), None, (2, 4, 16, 8)) != "broken"
    assert "broken" in caplog.text
    with pytest.raises(BackendLoadError, match="broken"):
        dispatch.resolve("decode", "broken", torch.zeros(1), None, (2, 4, 16, 8))


@pytest.fixture
def made_up(monkeypatch):
    """A backend `made_up` for decode with both hooks."""
    module = types.ModuleType("made_up_backend")
    module.warmed = []
    module.decode = lambda *args: None
    module.compile_count = lambda: len(module.warmed)
    module.warm_up = module.warmed.append
    module.warm_up_pool = lambda problem, pool: module.warmed.append((problem, pool))
    monkeypatch.setitem(sys.modules, "made_up_backend", module)
    row = Backend("made_up", "made_up_backend:decode")
    monkeypatch.setattr(dispatch, "rows", lambda op: (row,))
    monkeypatch.setattr(
        dispatch,
        "choose",
        lambda *args, excluded: types.SimpleNamespace(name="made_up", backend=row, request="made_up"),
    )
    yield module
    dispatch._modules.pop("made_up_backend", None)


def test_warm_up_and_compile_count(made_up):
    before = ops.compile_count()
    assert ops.warm_up(PROBLEM, "made_up") == "made_up"
    assert made_up.warmed == [PROBLEM]
    assert ops.compile_count() == before + 1


def test_warm_up_with_a_pool_is_a_hook_of_its_own(made_up):
    pool = torch.zeros(1)
    assert ops.warm_up(PROBLEM, "made_up", pool=pool) == "made_up"
    assert made_up.warmed == [(PROBLEM, pool)]


def test_warm_up_of_a_backend_without_kernels():
    assert ops.warm_up(PROBLEM, "torch") == "torch"
    assert ops.warm_up(PROBLEM, "torch", pool=torch.zeros(1)) == "torch"


def test_a_second_call_is_a_dictionary_lookup(monkeypatch):
    """After the first call nothing is chosen or imported again."""
    with ops.use({"decode": "torch"}):
        decode()

    def fail(*args, **kwargs):
        raise AssertionError("chosen or loaded a second time")

    for name in ("choose", "select", "load", "probe", "rows"):
        monkeypatch.setattr(dispatch, name, fail)
    with ops.use({"decode": "torch"}):
        decode()


def test_another_device_type_is_another_choice():
    metadata = ("decode", "float32", "float32", 2, 4, 16, 8)
    assert dispatch._resolve("cpu", "", metadata) in ("cpu", "torch")
    assert dispatch._resolve("meta", "", metadata) == "torch"
