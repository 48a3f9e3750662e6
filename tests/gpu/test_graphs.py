"""Every op captured in a CUDA graph and replayed with new values in the same tensors: bit-equal to a plain call."""

from __future__ import annotations

import pytest
import torch

from gdn_plugin.bench import contenders
from gdn_plugin.bench.shapes import Shape
from gdn_plugin.bench.workload import Workload, make_workload

LAYER = Shape("graph", 4, 8)
LENS = {"prefill": (64, 1, 129), "conv_prologue": (64, 1, 129), "verify": (4, 2, 3)}
MUTABLE = ("mixed_qkv", "q", "k", "v", "g", "beta", "a", "b", "state", "conv_state")


def load(w: Workload, seed: int) -> None:
    fresh = make_workload(LAYER, w.lens, device="cuda", seed=seed, rows=w.state.shape[0])
    for name in MUTABLE:
        getattr(w, name).copy_(getattr(fresh, name))


def captured_equals_eager(op: str, backend: str, w: Workload) -> None:
    call = contenders.ours(op, backend)(w)
    load(w, 1)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for seed in (2, 3):
        load(w, seed)
        graph.replay()
        replayed, state, conv = out.clone(), w.state.clone(), w.conv_state.clone()
        load(w, seed)
        eager = call().clone()
        assert torch.isfinite(eager).all()
        assert torch.equal(replayed, eager)
        assert torch.equal(state, w.state) and torch.equal(conv, w.conv_state)


@pytest.mark.parametrize("op", ["conv_prologue", "prefill", "verify"])
def test_triton_captured(backend_function, op):
    backend_function("triton", op)
    captured_equals_eager(op, "triton", make_workload(LAYER, LENS[op], device="cuda", rows=20))


@pytest.mark.parametrize("batch", [1, 8, 64, 256])
@pytest.mark.parametrize("op", ["decode", "fused_decode"])
def test_triton_decode_captured(backend_function, op, batch):
    backend_function("triton", op)
    captured_equals_eager(op, "triton", make_workload(LAYER, (1,) * batch, device="cuda", rows=batch + 3))


def test_torch_fallback_prefill_captured():
    """The fallback that always works has to work in a graph too: no host synchronisation."""
    captured_equals_eager("prefill", "torch", make_workload(LAYER, LENS["prefill"], device="cuda", rows=20))


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=["fp32-pool", "bf16-pool"])
def test_layers_on_flashinfers_decode_captured_on_the_metadata_of_the_run_before(backend_function, state_dtype):
    """What the layers of a step share is made in the graph, so that replays see the row numbers of their own step."""
    backend_function("flashinfer", "decode")
    from gdn_plugin.hosts.vllm.core import Core, Parameters, Shape
    from gdn_plugin.hosts.vllm.metadata import Batch, DecodePart
    from gdn_plugin.registry import probe, select

    batch, rows, name = 4, 9, str(state_dtype).removeprefix("torch.")
    shape = Shape("bfloat16", name, LAYER.num_k_heads, LAYER.num_v_heads, LAYER.head_k_dim, LAYER.head_v_dim, 4)
    selection = select(probe("cuda"), shape.problems(), {"decode": "flashinfer"})
    cores = [Core(shape, selection) for _ in range(2)]
    w = make_workload(LAYER, (1,) * batch, device="cuda", rows=rows, state_dtype=state_dtype)
    parameters = Parameters(w.conv_weight, None, w.A_log, w.dt_bias, w.conv_state, w.state)
    indices = torch.tensor([3, 1, 0, 0], dtype=torch.int32, device="cuda")
    shared = Batch(batch, decode=DecodePart(batch, indices, w.cu_seqlens))
    out = torch.zeros(2, *w.out.shape, dtype=w.out.dtype, device="cuda")

    def step(these: Batch) -> None:
        for core, result in zip(cores, out, strict=True):
            core.run(these, w.mixed_qkv, w.a, w.b, parameters, result)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(shared)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(shared)
    pools = w.state.clone(), w.conv_state.clone()
    for named in ([5, 2, 7, 0], [8, 0, 4, 6]):
        indices.copy_(torch.tensor(named, dtype=torch.int32))
        found = []
        for run in (graph.replay, lambda: step(Batch(batch, decode=shared.decode))):
            w.state.copy_(pools[0])
            w.conv_state.copy_(pools[1])
            run()
            # Padding shares row 0, which is anyone's to write where the pool is bf16.
            found.append((out.clone(), w.state[1:].clone(), w.conv_state.clone()))
        for replayed, eager in zip(*found, strict=True):
            assert torch.equal(replayed, eager)


@pytest.mark.parametrize("real", [1, 5, 8])
def test_padded_decode_leaves_real_rows_alone(backend_function, real):
    """A batch padded to a captured size gives the real rows bit for bit what the unpadded batch gives."""
    function = backend_function("triton", "fused_decode")
    batch = 8
    results = []
    for size in (real, batch):
        w = make_workload(LAYER, (1,) * batch, device="cuda", rows=batch + 3)
        w.state_indices[real:] = 0
        w.state[0] = float("nan")
        out = torch.zeros_like(w.out)
        function(w.mixed_qkv[:size], w.conv_weight, None, w.conv_state, w.a[:size], w.b[:size], w.A_log, w.dt_bias,
                 w.state, w.state_indices[:size], 4, 128, 128, w.scale, w.z[:size], w.norm_weight, 1e-6, "silu", 0,
                 out[:size], False)  # fmt: skip
        results.append((out[:real].clone(), w.state[w.state_indices[:real].long()].clone()))
        assert torch.isnan(w.state[0]).all()
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("backend", ["triton", "flashinfer"])
def test_flashinfer_and_triton_agree(backend_function, backend):
    """Any mix of phases is legal because all share one state layout: prefill by one, decode by triton."""
    prefill, decode = backend_function(backend, "prefill"), backend_function("triton", "decode")
    w = make_workload(LAYER, (65, 130), device="cuda")
    gate = w.g.exp()
    prefill(w.q, w.k, w.v, gate, w.beta, w.state, w.state_indices, w.cu_seqlens, None, w.scale, False, True, 130, -1,
            w.out, None, None, 0, False)  # fmt: skip
    reference = make_workload(LAYER, (65, 130), device="cuda")
    truth = backend_function("reference", "prefill")
    truth(reference.q, reference.k, reference.v, gate, reference.beta, reference.state, reference.state_indices,
          reference.cu_seqlens, None, w.scale, False, True, 130, -1, reference.out, None, None, 0, False)  # fmt: skip
    step = slice(0, 2)
    for x in (w, reference):
        decode(x.q[step], x.k[step], x.v[step], x.a[step], x.b[step], x.A_log, x.dt_bias, x.state, x.state_indices,
               x.scale, False, -1, x.out[step], False)  # fmt: skip
    error = (w.out.float() - reference.out.float()).norm() / reference.out.float().norm()
    assert error < 2e-2
