"""Where the contract's tests run: on this CPU, on a GPU, or under Triton's interpreter.

Each test file of this folder says `SITE = CPU`. A file elsewhere imports one with `*` and names another site, and its
tests run there: tests/gpu/test_contract.py, tests/triton/test_contract.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from gdn_plugin.ops.cases import Heads
from gdn_plugin.registry import OPS, probe, rows


@dataclass(frozen=True)
class Site:
    """A place to run.

    Args:
        heads: of the calls, what every backend there takes.
        io: dtype of tokens where a case names none.
        backends: those that are tried.
        runs: those that must run every case; the others may refuse some, as the registry says.
        slow: a case runs in one form, in turn: returning, into buffers, into buffers whose padding is to be zeroed.
    """

    device: str
    heads: Heads
    io: torch.dtype
    backends: tuple[str, ...]
    runs: frozenset[str]
    slow: bool = False


def _cpu() -> Site:
    runs = {"reference", "torch"} | ({"cpu"} if probe("cpu").has("cpu.cxx_compiler") else set())
    return Site("cpu", Heads(2, 4, 16, 8), torch.float32, ("reference", "torch", "cpu", "flashinfer"), frozenset(runs))


CPU = _cpu()
INTERPRETER = Site("cpu", Heads(1, 2, 64, 64), torch.float32, ("triton",), frozenset({"triton"}), slow=True)
GPU = Site(
    "cuda",
    Heads(4, 16, 128, 128),
    torch.bfloat16,
    ("reference", "torch", "triton", "flashinfer"),
    frozenset({"reference", "torch", "triton"}),
)


@pytest.fixture
def site(request: pytest.FixtureRequest) -> Site:
    return request.module.SITE


@pytest.fixture(autouse=True)
def no_self_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests are the check."""
    monkeypatch.setenv("GDN_PLUGIN_SELF_CHECK", "0")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """(op, name, backend): the module's TABLE of (op, name) times the site's backends that offer the op.

    Where the module says NOBODY_REFUSES, only backends are tried that must run every case.
    """
    if "backend" not in metafunc.fixturenames:
        return
    site, table = metafunc.module.SITE, metafunc.module.TABLE
    offers = {op: {row.name for row in rows(op)} for op in OPS}
    who_runs = [name for name in site.backends if not metafunc.module.NOBODY_REFUSES or name in site.runs]
    calls = [(op, name, who) for op, name in table for who in who_runs if who in offers[op]]
    if "form" not in metafunc.fixturenames:
        metafunc.parametrize(("op", "name", "backend"), calls, ids=lambda x: x)
        return
    forms = []
    for i, (op, name, who) in enumerate(calls):
        own = ("returning", "out", "zeroed") if "padding" in name else ("returning", "out")
        forms += [(op, name, who, form) for j, form in enumerate(own) if not site.slow or i % len(own) == j]
    metafunc.parametrize(("op", "name", "backend", "form"), forms, ids=lambda x: x)
