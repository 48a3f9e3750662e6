"""What the host has compiled before it serves: every variant of every choice once, those of a pool once a layout."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch

from gdn_plugin.hosts import warm_up as host
from gdn_plugin.hosts.core import Core, Shape
from gdn_plugin.ops import dispatch
from gdn_plugin.registry import BackendOp, Selection, Variant, probe, select

SHAPE = Shape("bfloat16", "bfloat16", 4, 8, 64, 64, 4, spec_tokens=3, null_index=0, padding="scratch")
LOG = logging.getLogger(__name__)
POOL = torch.zeros(9, 8 * 64 * 64 + 128, dtype=torch.bfloat16)[:, : 8 * 64 * 64].unflatten(1, (8, 64, 64))


class Compiler:
    """Stands in for every backend: says what it was asked to compile, and fails on request."""

    def __init__(self) -> None:
        self.compiled: list[tuple[str, bool]] = []
        self.broken = ""

    def __call__(self, op: str, backend: str) -> BackendOp:
        def variants(platform: Any, problem: Any, pool: Any = None) -> Iterable[Variant]:
            assert problem.op == op
            return [Variant(f"{op}-{number}", lambda: self.compile(op, pool is not None)) for number in range(2)]

        return BackendOp(lambda **arguments: None, variants=variants)

    def compile(self, op: str, of_pool: bool) -> None:
        if op == self.broken:
            raise RuntimeError("no ptxas")
        self.compiled.append((op, of_pool))


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    made = Compiler()
    monkeypatch.setattr(dispatch, "backend_op", made)
    monkeypatch.setattr(dispatch, "_working", lambda platform, pick: pick({}))
    monkeypatch.setattr(host, "_done", set())
    monkeypatch.setattr(host, "_ready", 0)
    monkeypatch.setattr(host, "Finalize", lambda *_, **__: None)
    host._tell_at_the_end.cache_clear()
    return made


# Both phases are fused: their own ops have no work.
REACHED = set(SHAPE.problems()) - {"decode", "verify"}


def core(request: str = "auto", shape: Shape = SHAPE) -> Core:
    selection = select(probe("cpu"), shape.problems(), {"prefill": "torch", "decode": "torch", "verify": "torch"})
    choices = {op: replace(choice, request=request) for op, choice in selection.choices.items()}
    return Core(shape, Selection(selection.platform, MappingProxyType(choices), selection.requests))


def test_every_variant_of_what_a_layer_comes_to_is_compiled_once(compiler: Compiler) -> None:
    for _ in range(3):  # layers of one shape
        host.warm_up(core(), torch.device("cpu"), LOG)
    assert sorted(compiler.compiled) == sorted((op, False) for op in REACHED for _ in range(2))
    host.warm_up(core(shape=replace(SHAPE, num_v_heads=4)), torch.device("cpu"), LOG)
    assert len(compiler.compiled) == 4 * len(REACHED)


def test_a_pool_is_compiled_for_once_a_layout(compiler: Compiler) -> None:
    """vLLM binds a small pool first, to measure what CUDA graphs take, and the real one later."""
    for pool, new in ((POOL, True), (POOL.clone(), True), (POOL, False), (POOL[:5], True), (POOL[4:], False)):
        before = len(compiler.compiled)
        host.warm_up_pool(core(), pool, LOG)
        assert (len(compiler.compiled) > before) == new
    assert all(of_pool for _, of_pool in compiler.compiled)


def test_a_compiler_that_fails_stops_only_what_was_asked_for_by_name(compiler: Compiler) -> None:
    compiler.broken = "fused_decode"
    with pytest.raises(RuntimeError, match="no ptxas"):
        host.warm_up_pool(core("torch"), POOL, LOG)
    lines: list[str] = []
    logger: Any = SimpleNamespace(warning=lambda form, *given: lines.append(form % given))
    host.warm_up_pool(core(), POOL[:7], logger)
    assert lines == ["gdn_plugin: fused_decode on torch was not compiled ahead: no ptxas"]
    assert {op for op, _ in compiler.compiled} >= REACHED - {"fused_decode"}


def test_the_log_has_the_counter_at_the_start_and_what_came_after(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    count = 5
    at_the_end: list[Any] = []
    monkeypatch.setattr(host.ops, "compile_count", lambda: count)
    monkeypatch.setattr(host, "Finalize", lambda of, call, exitpriority: at_the_end.append(call))
    with caplog.at_level(logging.INFO, LOG.name):
        host.warm_up(core(), torch.device("cpu"), LOG)
        host.warm_up_pool(core(), POOL, LOG)
        host._tell_at_the_end(LOG)
        (tell,) = at_the_end
        tell()
        count = 7
        tell()
    warmed, none, two = caplog.records
    assert "warmed up in" in warmed.message and "5 kernels in this process" in warmed.message
    assert none.message.endswith("compiled since start-up: 0") and none.levelno == logging.INFO
    assert two.message.endswith("compiled since start-up: 2") and two.levelno == logging.WARNING
