"""Every op captured in a CUDA graph and replayed with new values in the same tensors: bit-equal to a plain call."""

from __future__ import annotations

import pytest
import torch

from gdn_plugin import ops
from gdn_plugin.ops import cases
from gdn_plugin.ops.cases import Case, Heads
from gdn_plugin.ops.record import OPS
from tests.support.checks import assert_close
from tests.tolerances import tolerance

HEADS = Heads(4, 8, 128, 128)
BF16, FP32 = torch.bfloat16, torch.float32
DEVICE = "cuda"
LENS = {"prefill": (64, 1, 129), "conv_prologue": (64, 1, 129), "verify": (4, 2, 3), "fused_verify": (4, 2, 3),
        "replay_verify": (4, 2, 3)}  # fmt: skip


def make(op: str, batch: int = 3, seed: int = 0) -> Case:
    first = LENS.get(op, batch)
    return getattr(cases, f"{op}_case")(first, HEADS, BF16, device=DEVICE, seed=seed)


def captured_equals_eager(op: str, backend: str, batch: int = 3) -> None:
    case = make(op, batch)
    fixed = {name: x for name, x in case.arguments().items() if name in OPS[op].names}
    moving = [name for name, x in fixed.items() if isinstance(x, torch.Tensor) and x.is_floating_point()]
    pools = {name: fixed[name] for name in case.pools}
    # Counts of the rows that these row numbers name, which a step moves on.
    counts = {name: x.clone() for name, x in pools.items() if name not in moving}

    def load(seed: int) -> None:
        for name, x in counts.items():
            pools[name].copy_(x)
        fresh = make(op, batch, seed).arguments()
        for name in moving:
            fixed[name].copy_(fresh[name].nan_to_num() if name in pools else fresh[name])

    def call() -> list[torch.Tensor]:
        result = getattr(ops, op)(**fixed, backend=backend)
        return list(result) if isinstance(result, tuple) else [result]

    load(1)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for seed in (2, 3):
        load(seed)
        graph.replay()
        replayed = [x.clone() for x in (*out, *pools.values())]
        load(seed)
        eager = [*call(), *pools.values()]
        assert all(torch.isfinite(x).all() for x in eager)
        assert all(torch.equal(x, y) for x, y in zip(replayed, eager, strict=True))


@pytest.mark.parametrize("op", ["conv_prologue", "prefill", "verify", "fused_verify", "gated_norm", "replay_verify"])
def test_triton_captured(backend_function, op):
    backend_function("triton", op)
    captured_equals_eager(op, "triton")


@pytest.mark.parametrize("batch", [1, 8, 64, 256])
@pytest.mark.parametrize("op", ["decode", "fused_decode", "replay_decode"])
def test_triton_decode_captured(backend_function, op, batch):
    backend_function("triton", op)
    captured_equals_eager(op, "triton", batch)


def test_torch_fallback_prefill_captured():
    """The fallback that always works has to work in a graph too: no host synchronisation."""
    captured_equals_eager("prefill", "torch")


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=["fp32-pool", "bf16-pool"])
def test_layers_on_flashinfers_decode_captured_on_the_metadata_of_the_run_before(backend_function, state_dtype):
    """What the layers of a step share is made in the graph, so that replays see the row numbers of their own step."""
    backend_function("flashinfer", "decode")
    from gdn_plugin.hosts.batch import Batch, DecodePart
    from gdn_plugin.hosts.core import Core, Parameters, Shape
    from gdn_plugin.registry import probe, select

    batch, rows, name = 4, 9, str(state_dtype).removeprefix("torch.")
    shape = Shape("bfloat16", name, *HEADS, 4, null_index=0, padding="scratch")
    selection = select(probe("cuda"), shape.problems(), {"decode": "flashinfer"})
    cores = [Core(shape, selection) for _ in range(2)]
    w = cases.fused_decode_case(batch, HEADS, BF16, state_dtype, pool_rows=rows, device=DEVICE).arguments()
    for name in ("state", "conv_state"):
        w[name].copy_(torch.randn(w[name].shape, device=DEVICE) * 0.1)
    parameters = Parameters(w["conv_weight"], None, w["A_log"], w["dt_bias"], w["conv_state"], w["state"])
    offsets = torch.arange(batch + 1, dtype=torch.int32, device=DEVICE)
    table = torch.tensor([[3, 9], [1, 9], [0, 9], [0, 9]], dtype=torch.int32, device="cuda")
    indices = table[:, 0]
    shared = Batch(batch, decode=DecodePart(batch, indices, offsets, padded=True))
    out = torch.zeros(2, *w["out"].shape, dtype=BF16, device="cuda")

    def step(these: Batch) -> None:
        for core, result in zip(cores, out, strict=True):
            core.run(these, w["mixed_qkv"], w["a"], w["b"], parameters, result)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(shared)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(shared)
    pools = w["state"].clone(), w["conv_state"].clone()
    for named in ([5, 2, 7, 0], [8, 0, 4, 6]):
        indices.copy_(torch.tensor(named, dtype=torch.int32))
        found = []
        for run in (graph.replay, lambda: step(Batch(batch, decode=shared.decode))):
            w["state"].copy_(pools[0])
            w["conv_state"].copy_(pools[1])
            run()
            # Padding shares row 0, which is anyone's to write where the pool is bf16.
            found.append((out.clone(), w["state"][1:].clone(), w["conv_state"].clone()))
        for replayed, eager in zip(*found, strict=True):
            assert torch.equal(replayed, eager)


def test_a_captured_speculative_step_starts_this_steps_fresh_rows_from_nothing(backend_function):
    """Which rows are fresh is read at replay; NaN in the rows of a former user does not show, in any replay."""
    backend_function("triton", "verify")
    from gdn_plugin.hosts.batch import Batch, SpecPart
    from gdn_plugin.hosts.core import Core, GatedNorm, Parameters, Shape
    from gdn_plugin.registry import probe, select

    batch, slots, width = 4, 3, 4
    key_heads, value_heads, K, V = HEADS
    dim, tokens = 2 * key_heads * K + value_heads * V, batch * slots
    shape = Shape("bfloat16", "float32", *HEADS, width, spec_tokens=slots, null_index=0, padding="scratch")
    core = Core(shape, select(probe("cuda"), shape.problems(), dict.fromkeys(("prefill", "verify"), "triton")))
    torch.manual_seed(0)

    def randn(*size: int, dtype: torch.dtype = BF16) -> torch.Tensor:
        return torch.randn(*size, dtype=dtype, device=DEVICE)

    pools = randn(1 + tokens, dim, width - 2 + slots), randn(1 + tokens, value_heads, V, K, dtype=FP32) * 0.1
    conv_state, state = pools[0].clone(), pools[1].clone()
    parameters = Parameters(
        randn(dim, width), None, randn(value_heads, dtype=FP32), randn(value_heads), conv_state, state
    )
    x, gates, z = randn(tokens, dim), randn(tokens, value_heads), randn(tokens, value_heads, V)
    out = torch.full_like(z, float("nan"))
    norm = GatedNorm(z, randn(V), 1e-6, "silu")
    started = torch.ones(batch, dtype=torch.bool, device=DEVICE)
    part = SpecPart(
        count=tokens,
        tokens=None,
        state_indices=torch.arange(1, tokens + 1, dtype=torch.int32, device=DEVICE).view(batch, slots),
        cu_seqlens=torch.arange(0, tokens + 1, slots, dtype=torch.int32, device=DEVICE),
        num_accepted_tokens=torch.ones(batch, dtype=torch.int32, device=DEVICE),
        has_initial_state=started,
        padded=True,
    )

    def step() -> None:
        core.run(Batch(tokens, spec=part), x, gates, gates, parameters, out, norm)

    def load(fresh: list[int], poison: float) -> None:
        conv_state.copy_(pools[0])
        state.copy_(pools[1])
        started.fill_(True)
        for row in fresh:
            started[row] = False
            for pool in (conv_state, state):
                pool[part.state_indices[row].long()] = poison

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for fresh in ([], [1], [0, 3], [], [2]):
        results = []
        for run, poison in ((step, 0.0), (graph.replay, float("nan"))):
            load(fresh, poison)
            run()
            results.append((out.clone(), state.clone()))
        assert all(torch.isfinite(one).all() for one in results[1])
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("real", [1, 5, 8])
def test_padded_decode_leaves_real_rows_alone(backend_function, real):
    """A batch padded to a captured size gives the real rows bit for bit what the unpadded batch gives."""
    function = backend_function("triton", "fused_decode")
    results = []
    for size in (real, 8):
        given = cases.fused_decode_case(8, HEADS, BF16, null_index=0, device=DEVICE).arguments()
        given["state_indices"][real:] = 0
        for name in ("mixed_qkv", "a", "b", "z", "state_indices", "out"):
            given[name] = given[name][:size]
        function(**given)
        results.append((given["out"][:real].clone(), given["state"][given["state_indices"][:real].long()].clone()))
        assert torch.isnan(given["state"][0]).all()
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("backend", ["triton", "flashinfer"])
def test_prefill_by_one_and_decode_by_another(backend_function, backend):
    """Any mix of phases is legal because all share one state layout."""
    case = cases.prefill_case((65, 130), HEADS, BF16, exp_gate=True, fresh=None, promise="none", device=DEVICE)
    step = cases.decode_case(2, HEADS, BF16, device=DEVICE, seed=1).arguments()
    outs = []
    for name in (backend, "reference"):
        given = case.arguments()
        backend_function(name, "prefill")(**given)
        shared = {
            "state": given["state"],
            "state_indices": given["state_indices"],
            "out": torch.zeros_like(step["out"]),
        }
        backend_function("triton", "decode")(**step | shared)
        outs.append(shared["out"])
    assert_close("out", outs[0], outs[1], tolerance("decode", BF16, BF16, "io"))
