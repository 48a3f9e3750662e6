"""Kernels that are compiled for a pool's own size: the host has them compiled when it binds the pool."""

from __future__ import annotations

import logging

import pytest
import torch

from gdn_plugin import ops
from gdn_plugin.hosts.vllm import warm_up as host
from gdn_plugin.hosts.vllm.core import Core, Shape
from gdn_plugin.ops import dispatch
from gdn_plugin.ops._flashinfer.decode import decode
from gdn_plugin.registry import Platform, select
from tests.flashinfer.calls import HK, HV, D, decode_args, pool

H100 = Platform.simulated("sm_90", cuda="13.0")


@pytest.fixture(autouse=True)
def machine(h100, monkeypatch):
    """The host's and the dispatcher's view of the simulated device."""
    monkeypatch.setattr(dispatch, "probe", lambda device=None: H100)
    monkeypatch.setattr(host, "_done", set())
    dispatch.forget()
    yield h100
    dispatch.forget()


def core(state_dtype: str, **requests: str) -> Core:
    shape = Shape("bfloat16", state_dtype, HK, HV, D, D, conv_width=4)
    return Core(shape, select(H100, shape.problems(), requests))


def bound(core: Core, state: torch.Tensor) -> int:
    """How many kernels binding a pool compiles."""
    before = ops.compile_count()
    host.warm_up_pool(core, state)
    return ops.compile_count() - before


def test_binding_a_padded_bf16_pool_compiles_for_it_once():
    layers = [core("bfloat16", decode="flashinfer") for _ in range(3)]
    (problem,) = {layer.selection["decode"].problem for layer in layers}
    before = ops.compile_count()  # other tests compile in this process too
    ops.warm_up(problem, backend="flashinfer")
    assert ops.compile_count() == before, "what is compiled for a made-up pool serves no other"
    state = pool(torch.bfloat16)
    assert bound(layers[0], state) > 1
    assert [bound(layer, pool(torch.bfloat16)) for layer in layers] == [0, 0, 0]

    compiled = ops.compile_count()
    for batch in (*range(1, 20), 31, 33, 47, 63, 65, 1000):
        decode(**decode_args(torch.bfloat16, batch=batch, state=state))
    assert ops.compile_count() == compiled


def test_another_layout_is_compiled_for_too():
    """vLLM binds a small pool first, to measure what CUDA graphs take, and the real one later."""
    layer = core("bfloat16", decode="flashinfer")
    counts = [
        bound(layer, state) for state in (pool(torch.bfloat16), pool(torch.bfloat16)[:9], pool(torch.bfloat16, 64))
    ]
    assert counts[0] == counts[1] == counts[2] > 1


@pytest.mark.parametrize(
    ("state_dtype", "requests", "padding"),
    [
        ("float32", {"decode": "flashinfer"}, 8192),
        ("bfloat16", {"decode": "flashinfer"}, 0),
        ("bfloat16", {"prefill": "flashinfer"}, 8192),
        ("bfloat16", {}, 8192),
    ],
    ids=["fp32", "dense", "prefill-alone", "auto"],
)
def test_binding_any_other_pool_compiles_nothing(machine, state_dtype, requests, padding):
    state = pool(getattr(torch, state_dtype), padding)
    assert bound(core(state_dtype, **requests), state) == 0
    assert machine.launches == machine.own_launches == []


def test_a_compiler_that_fails_stops_only_what_was_asked_for_by_name(monkeypatch):
    def broken(problem, given):
        raise RuntimeError("no ptxas")

    monkeypatch.setattr("gdn_plugin.ops._flashinfer.decode.warm_up_pool", broken)
    named = core("bfloat16", decode="flashinfer")
    with pytest.raises(RuntimeError, match="no ptxas"):
        host.warm_up_pool(named, pool(torch.bfloat16))

    lines: list[str] = []
    monkeypatch.setattr(
        logging.getLogger("vllm.gdn_plugin"), "handle", lambda record: lines.append(record.getMessage())
    )
    monkeypatch.setattr("gdn_plugin.ops._triton.fused_decode.warm_up_pool", broken, raising=False)
    host.warm_up_pool(core("bfloat16"), pool(torch.bfloat16))
    assert lines == ["gdn_plugin: fused_decode on triton was not compiled ahead: no ptxas"]
