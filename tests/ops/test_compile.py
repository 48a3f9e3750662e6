"""torch.compile over the public functions: full graphs, equal to eager, one graph for every batch size, no copies."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from gdn_plugin import ops
from gdn_plugin.ops import cases, dispatch
from gdn_plugin.ops.cases import Heads
from gdn_plugin.registry import BackendOp
from tests.support.checks import assert_close
from tests.tolerances import COMPILED

HEADS = Heads(2, 4, 16, 8)
SIZES = {"num_k_heads": HEADS.k_heads, "head_k_dim": HEADS.k_dim, "head_v_dim": HEADS.v_dim}
PER_TOKEN = ("mixed_qkv", "a", "b", "z")
PER_SEQUENCE = ("state_indices", "cu_seqlens", "has_initial_state", "num_accepted_tokens")
ROWS = 12


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layer(w, pools, buffer):
    """A prefill as a host runs it: arithmetic, prologue, prefill into a slice of the host's buffer, arithmetic."""
    q, k, v, g, beta = ops.conv_prologue(
        w["mixed_qkv"] * 1.5, w["conv_weight"], w["conv_bias"], pools["conv_state"], w["state_indices"],
        w["cu_seqlens"], w["has_initial_state"], w["a"], w["b"], w["A_log"], w["dt_bias"], **SIZES,
        state=pools["state"], backend="torch",
    )  # fmt: skip
    out = buffer[: w["mixed_qkv"].shape[0]]
    ops.prefill(q, k, v, g, beta, pools["state"], w["state_indices"], w["cu_seqlens"], out=out, backend="torch")
    return torch.relu(out) + 1


def step(w, pools, buffer):
    """A decode step, returning op, with the norm behind it."""
    out = ops.fused_decode(
        w["mixed_qkv"] * 1.5, w["conv_weight"], w["conv_bias"], pools["conv_state"], w["a"], w["b"], w["A_log"],
        w["dt_bias"], pools["state"], w["state_indices"], **SIZES, z=w["z"], norm_weight=w["norm_weight"],
        backend="torch",
    )  # fmt: skip
    buffer[: out.shape[0]] = out
    return out * 2


def speculate(w, pools, buffer):
    out = buffer[: w["q"].shape[0]]
    ops.verify(
        w["q"], w["k"], w["v"], w["a"], w["b"], w["A_log"], w["dt_bias"], pools["state"], w["state_indices"],
        w["num_accepted_tokens"], w["cu_seqlens"], out=out, backend="torch",
    )  # fmt: skip
    return out.sum(-1)


def plain_decode(w, pools, buffer):
    return ops.decode(
        w["q"], w["k"], w["v"], w["a"], w["b"], w["A_log"], w["dt_bias"], pools["state"], w["state_indices"],
        backend="torch",
    ).float()  # fmt: skip


def replay(w, pools, buffer):
    """Tokens that a ring keeps, and the fold of every row."""
    out = buffer[: w["mixed_qkv"].shape[0]]
    rings = (pools["state"], pools["ring_k"], pools["ring_u"], pools["ring_g"], pools["ring_span"])
    ops.replay_verify(
        w["mixed_qkv"] * 1.5, w["conv_weight"], w["conv_bias"], pools["conv_state"], w["a"], w["b"], w["A_log"],
        w["dt_bias"], *rings, w["state_indices"], w["num_accepted_tokens"], w["cu_seqlens"], **SIZES, z=w["z"],
        norm_weight=w["norm_weight"], out=out, backend="torch",
    )  # fmt: skip
    ops.replay_fold(*rings[1:], rings[0], w["state_indices"], backend="torch")
    return out * 2


def replay_step(w, pools, buffer):
    out = ops.replay_decode(
        w["mixed_qkv"] * 1.5, w["conv_weight"], w["conv_bias"], pools["conv_state"], w["a"], w["b"], w["A_log"],
        w["dt_bias"], pools["state"], pools["ring_k"], pools["ring_u"], pools["ring_g"], pools["ring_span"],
        w["state_indices"], **SIZES, z=w["z"], norm_weight=w["norm_weight"], backend="torch",
    )  # fmt: skip
    buffer[: out.shape[0]] = out
    return out * 2


LAYERS = {
    "layer": (layer, lambda n, **kw: cases.conv_prologue_case([3 + i for i in range(n)], HEADS, fresh=(0,), **kw)),
    "step": (step, lambda n, **kw: cases.fused_decode_case(n, HEADS, **kw)),
    "speculate": (speculate, lambda n, **kw: cases.verify_case([1 + i % 3 for i in range(n)], HEADS, slots=3, **kw)),
    "replay": (
        replay,
        lambda n, **kw: cases.replay_verify_case([1 + i % 3 for i in range(n)], HEADS, slots=3, fresh=None, **kw),
    ),
    "replay_step": (replay_step, lambda n, **kw: cases.replay_decode_case(n, HEADS, **kw)),
    "plain_decode": (plain_decode, lambda n, **kw: cases.decode_case(n, HEADS, **kw)),
}


def inputs(case, pool_rows):
    """Dicts of inputs, pools of a fixed number of rows (a real pool does not grow with the batch), and a buffer."""
    w = {n: x for n, x in case.args.items() if isinstance(x, torch.Tensor) or x is None}
    pools = {}
    for name, pool in case.pools.items():
        wide = cases.pages(pool_rows, {name: (pool.view.shape[1:], pool.view.dtype)}, page_tail=8)[name].view
        wide[: pool.view.shape[0]] = pool.view
        pools[name] = wide
    tokens = next(iter(case.outputs.values()))[0][0]
    buffer = torch.zeros(64, HEADS.v_heads, HEADS.v_dim, dtype=case.io_dtype)
    for name, x in w.items():
        if x is not None and (x.shape[0] == tokens or name in PER_SEQUENCE) and x.dim() and name != "A_log":
            torch._dynamo.mark_dynamic(x, 0)
    return w, pools, buffer


@pytest.mark.parametrize("io_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_compiled_equals_eager(name, io_dtype):
    """fullgraph=True with inductor: outputs and every bit of the pools."""
    function, build = LAYERS[name]
    case = build(3, io_dtype=io_dtype)
    w, pools, buffer = inputs(case, ROWS)
    _, eager_pools, eager_buffer = inputs(case, ROWS)
    want = function(w, eager_pools, eager_buffer)
    got = torch.compile(function, fullgraph=True)(w, pools, buffer)
    assert_close(name, got, want, COMPILED[io_dtype])
    assert_close("buffer", buffer, eager_buffer, COMPILED[io_dtype])
    for pool, expected in zip(pools.values(), eager_pools.values(), strict=True):
        untouched = torch.isnan(expected)
        assert torch.equal(torch.isnan(pool), untouched)
        assert_close("pool", pool[~untouched], expected[~untouched], COMPILED[io_dtype])


@pytest.mark.parametrize("name", LAYERS)
def test_one_graph_for_every_batch_size(name):
    function, build = LAYERS[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for batch in (3, 2, 5, 7):
        w, pools, buffer = inputs(build(batch), 40)
        _, eager_pools, eager_buffer = inputs(build(batch), 40)
        assert_close(name, compiled(w, pools, buffer), function(w, eager_pools, eager_buffer), COMPILED[torch.float32])
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", LAYERS)
def test_every_size_symbolic(name):
    """dynamic=True makes head counts and dims symbolic too; the choice of a backend turns them into constants."""
    function, build = LAYERS[name]
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (3, 2, 5):
        w, pools, buffer = inputs(build(batch), 40)
        _, eager_pools, eager_buffer = inputs(build(batch), 40)
        assert_close(name, compiled(w, pools, buffer), function(w, eager_pools, eager_buffer), COMPILED[torch.float32])


def test_backend_of_none_is_a_constant(monkeypatch):
    """The choice is made while tracing; the graph carries the name, and the resolver is not in it."""
    graphs = []

    def capture(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def run(w, pools):
        return ops.decode(
            w["q"], w["k"], w["v"], w["a"], w["b"], w["A_log"], w["dt_bias"], pools["state"], w["state_indices"]
        )

    w, pools, _ = inputs(cases.decode_case(3, HEADS), ROWS)
    with ops.use({"decode": "torch"}):
        torch.compile(run, fullgraph=True, backend=capture)(w, pools)
    (node,) = [n for n in graphs[0].graph.nodes if "gdn.decode" in str(n.target)]
    assert node.args[-1] == "torch"


def test_the_pool_itself_is_passed(monkeypatch):
    """Inductor may not copy a pool (gigabytes) around a mutating op, nor the host's buffer."""
    seen = []

    real = dispatch.backend_op("decode", "torch")

    def spy(**arguments):
        seen.append((arguments["state"].data_ptr(), arguments["out"].data_ptr()))
        real.run(**arguments)

    monkeypatch.setitem(dispatch._loaded, ("decode", "torch"), BackendOp(spy))
    w, pools, buffer = inputs(cases.decode_case(3, HEADS), ROWS)

    def run(w, pools, buffer):
        out = buffer[: w["q"].shape[0]]
        return ops.decode(
            w["q"] * 1.0, w["k"], w["v"], w["a"], w["b"], w["A_log"], w["dt_bias"], pools["state"], w["state_indices"],
            out=out, backend="torch",
        )  # fmt: skip

    torch.compile(run, fullgraph=True)(w, pools, buffer)
    assert seen == [(pools["state"].data_ptr(), buffer.data_ptr())]


def test_the_first_call_of_a_process_may_be_a_compiled_one():
    """Nothing that a call needs waits for a call outside of a graph."""
    program = """
import torch
from gdn_plugin import ops
from gdn_plugin.ops import cases
from gdn_plugin.ops.record import OPS

torch._dynamo.config.recompile_limit = len(OPS)  # one lambda serves them all
for name, record in OPS.items():
    given = getattr(cases, f"{name}_case")().arguments()
    given = {argument: given[argument] for argument in record.names}
    call = torch.compile(lambda op=getattr(ops, name), **arguments: op(**arguments), fullgraph=True, backend="eager")
    call(**given)
print("compiled", *OPS)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout.startswith("compiled"), done.stderr[-2000:]
