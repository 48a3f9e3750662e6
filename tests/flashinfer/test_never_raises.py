"""What a row's checks let through, its wrapper runs.

No refusal, ours or FlashInfer's, and no compiled kernel that meets another stride, type or boundary than it was
compiled for: a simulated device checks a kernel's arguments as a real one does.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gdn_plugin.registry import Platform
from gdn_plugin.registry.backend import load
from gdn_plugin.registry.choice import judge
from gdn_plugin.registry.problem import Problem
from gdn_plugin.registry.table import rows
from gdn_plugin.tools.simulated import forget_device, simulated_device
from tests.flashinfer.calls import D, empty

FP32, BF16, FP16, INT32, INT64 = torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64
# The first is the usual one, and comes half of the time.
DIMENSIONS: dict[str, tuple[Any, ...]] = {
    "heads": ((2, 4), (1, 1), (1, 2), (4, 8), (16, 32)),
    "io": (BF16, FP16, FP32),
    "state": (FP32, BF16, FP16),
    "batch": (3, 1, 0, 1, 2),
    "tokens": (2, 1, 3),  # of each sequence; prefill: times 61
    "extra": (0, 0, 5),  # tokens behind the last sequence
    "padding": ("none", "scratch", "any"),
    "null_index": (0, -1, 2),
    "index": ("plain", "strided", "offset"),
    "table": ("plain", "strided", "offset"),
    "given": (False, True),
    "given_offset": (0, 1),
    "bias": (BF16, FP32, FP16),
    "gates": (None, FP32, BF16),
    "gate_layout": ("plain", "projection", "offset"),
    "vector_offset": (0, 1, 4),
    "offsets": (INT32, INT64),
    "offsets_offset": (0, 1),
    "row_gap": (0, 8, 2, 3, 8192),
    "pool_offset": (0, 8, 16, 3),
    "pool_rows": (7, 1),
    "layout": ("plain", "projection", "offset", "odd-strides"),
    "norm": (False, True),
    "exp_gate": (True, False),
    "fresh": (None, True),
    "scale": (D**-0.5, 0.0, 1.7),
    "max_seqlen": (0, 1, 10**6),
    "checkpoints": (None, FP32, BF16, FP16, "none-written"),
    "zero_padding": (False, True),
}
CALLS = {"prefill": 300, "decode": 400, "verify": 1200}  # of each architecture; few of verify's pass its checks


def drawn(rng: random.Random) -> dict[str, Any]:
    return {name: rng.choice((values[0],) * len(values) + values) for name, values in DIMENSIONS.items()}


def heads_of(tokens: int, heads: int, dtype: torch.dtype, layout: str) -> Tensor:
    """[T, H, D]."""
    shape, row = (tokens, heads, D), heads * D
    if layout == "projection":
        return empty(tokens * (row + 64) + 64, dtype=dtype).as_strided(shape, (row + 64, D, 1), 64)
    if layout == "offset":
        return empty(tokens * row + 3, dtype=dtype).as_strided(shape, (row, D, 1), 3)
    if layout == "odd-strides":  # contiguous: a dim of size one may have any stride
        strides = (row if tokens > 1 else 7, D if heads > 1 else 5, 1)
        return empty(tokens * row + 64, dtype=dtype).as_strided(shape, strides)
    return empty(*shape, dtype=dtype)


def gate_of(tokens: int, heads: int, dtype: torch.dtype, layout: str) -> Tensor:
    """[T, Hv]."""
    stride, offset = {"plain": (heads, 0), "projection": (2 * heads, heads), "offset": (heads, 1)}[layout]
    return empty(tokens * stride + heads + 1, dtype=dtype).as_strided((tokens, heads), (stride, 1), offset)


def vector(size: int, dtype: torch.dtype, offset: int = 0, stride: int = 1) -> Tensor:
    return empty(size * stride + offset + 1, dtype=dtype).as_strided((size,), (stride,), offset)


def index_of(size: int, form: str) -> Tensor:
    if size == 1 and form != "offset":  # a column of one sequence has its table's stride
        return vector(1, INT32, 8, stride=9)
    return vector(size, INT32, 3 if form == "offset" else 0, stride=4 if form == "strided" else 1)


def pool_of(c: dict[str, Any]) -> Tensor:
    heads, count = c["heads"][1], c["pool_rows"]
    row = heads * D * D
    held = empty(count * (row + c["row_gap"]) + c["pool_offset"], dtype=c["state"])
    return held.as_strided((count, heads, D, D), (row + c["row_gap"], D * D, D, 1), c["pool_offset"])


def shared(c: dict[str, Any], tokens: int) -> dict[str, Any]:
    hk, hv = c["heads"]
    return {
        "q": heads_of(tokens, hk, c["io"], c["layout"]),
        "k": heads_of(tokens, hk, c["io"], c["layout"]),
        "v": heads_of(tokens, hv, c["io"], c["layout"]),
        "state": pool_of(c),
        "scale": c["scale"],
        "use_qk_l2norm": c["norm"],
        "null_index": 0 if c["padding"] == "scratch" else c["null_index"],
        "padding": c["padding"],
        "out": empty(tokens, hv, D, dtype=c["io"]),
        "zero_padding": c["zero_padding"],
    }


def gates(c: dict[str, Any], tokens: int) -> dict[str, Any]:
    hv, dtype = c["heads"][1], c["gates"] or c["io"]
    return {
        "a": gate_of(tokens, hv, dtype, c["gate_layout"]),
        "b": gate_of(tokens, hv, dtype, c["gate_layout"]),
        "A_log": vector(hv, FP32, c["vector_offset"]),
        "dt_bias": vector(hv, c["bias"], c["vector_offset"]),
    }


def prefill(c: dict[str, Any]) -> dict[str, Any]:
    batch, hv = c["batch"], c["heads"][1]
    # "none" promises that there are no tokens behind the last sequence.
    tokens = 61 * c["tokens"] * batch + (c["extra"] if c["padding"] != "none" else 0)
    if c["tokens"] == 1 and batch:
        tokens = 1  # one token, and the other sequences are empty
    saved = c["checkpoints"]
    dtype = c["state"] if saved == "none-written" else saved
    layout = "plain" if c["layout"] == "odd-strides" else c["layout"]
    return shared(c, tokens) | {
        "g": gate_of(tokens, hv, FP32, layout),
        "beta": gate_of(tokens, hv, FP32, layout),
        "state_indices": index_of(batch, c["index"]),
        "cu_seqlens": vector(batch + 1, c["offsets"], c["offsets_offset"]),
        "has_initial_state": None if c["fresh"] is None else vector(batch, torch.bool, 1),
        "exp_gate": c["exp_gate"],
        "max_seqlen": c["max_seqlen"],
        "checkpoints": None if saved is None else empty(0 if saved == "none-written" else 5, hv, D, D, dtype=dtype),
        "checkpoint_cu_starts": None if saved is None else vector(batch + 1, INT32, c["offsets_offset"]),
        "checkpoint_every": 0 if saved is None else 64,
    }


def decode(c: dict[str, Any]) -> dict[str, Any]:
    batch = c["batch"]
    return shared(c, batch) | gates(c, batch) | {"state_indices": index_of(batch, c["index"])}


def verify(c: dict[str, Any]) -> dict[str, Any]:
    batch, width = c["batch"], c["tokens"]
    tokens = batch * width + c["extra"]
    stride, offset = {"plain": (width, 0), "strided": (width + 2, 0), "offset": (width, 3)}[c["table"]]
    table = empty(batch * stride + 8, dtype=INT32).as_strided((batch, width), (stride, 1), offset)
    return (
        shared(c, tokens)
        | gates(c, tokens)
        | {
            "state_indices": table,
            "num_accepted_tokens": vector(batch, INT32, c["given_offset"]),
            "cu_seqlens": vector(batch + 1, c["offsets"]),
            "start_rows": vector(batch, INT32, c["given_offset"]) if c["given"] else None,
        }
    )


def problem_of(op: str, arguments: dict[str, Any]) -> Problem:
    """The facts of a call, as registry/problem.py says them."""

    def name(dtype: torch.dtype) -> str:
        return str(dtype).removeprefix("torch.")

    def byte_offset(x: Tensor) -> int:
        return x.storage_offset() * x.element_size()

    q, v, state = arguments["q"], arguments["v"], arguments["state"]
    large = [arguments.get(key) for key in ("q", "k", "v", "g", "beta", "out", "checkpoints", "state")]
    saved, table = arguments.get("checkpoints"), arguments["state_indices"]
    width = table.shape[1] if op == "verify" else 0
    inputs = [arguments[key] for key in ("q", "k", "v", "g", "beta") if key in arguments]
    row = state.shape[1] * state.shape[2] * state.shape[3]
    return Problem(
        op,
        name(q.dtype),
        name(state.dtype),
        q.shape[1],
        v.shape[1],
        D,
        D,
        padded_pool=state.stride(0) != row,
        checkpoints=saved is not None,
        checkpoint_dtype="" if saved is None else name(saved.dtype),
        max_spec_tokens=width,
        ragged=op == "verify" and (arguments["padding"] != "none" or q.shape[0] != width * table.shape[0]),
        padding=arguments["padding"],
        strided=any(not x.is_contiguous() for x in inputs),
        unaligned=any(byte_offset(x) % 32 for x in large if x is not None)
        or state.stride(0) * state.element_size() % 16 != 0,
        gate_dtype=name(arguments["a"].dtype) if "a" in arguments else "",
    )


OPS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"prefill": prefill, "decode": decode, "verify": verify}


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a", "sm_120a"])
@pytest.mark.parametrize("op", OPS)
def test_what_the_checks_let_through_runs(arch, op):
    rng = random.Random(f"{op} of today")  # the same calls on every architecture
    row = next(row for row in rows(op) if row.name == "flashinfer")
    run, platform = load(row).run, Platform.simulated(arch.removesuffix("a"))
    taken = refused = 0
    with simulated_device(arch) as device:
        for _ in range(CALLS[op]):
            form = drawn(rng)
            arguments = OPS[op](form)
            problem = problem_of(op, arguments)
            if not judge(row, platform, problem).supported:
                refused += 1
                continue
            device.reset()
            if rng.random() < 0.5:
                forget_device()  # so that odd calls are compiled for, too
            try:
                run(**arguments)
            except Exception as exc:  # whatever it is, the row's checks had let the call through
                pytest.fail(f"{problem}\n{form}\n{type(exc).__name__}: {exc}")
            taken += 1
            tokens = arguments["q"].shape[0]
            assert bool(device.launches) == bool(form["batch"] and tokens)
    assert taken > 50 and refused > 50, (taken, refused)


def test_a_kernel_that_meets_what_it_was_not_compiled_for_says_so(h100):
    """The simulated device's check of arguments can fail, so the test above can."""
    run = load(next(row for row in rows("decode") if row.name == "flashinfer")).run
    form = dict(zip(DIMENSIONS, (values[0] for values in DIMENSIONS.values()), strict=True)) | {"state": BF16}
    run(**decode(form))
    for wrong in ({"layout": "offset"}, {"pool_offset": 3}):
        with pytest.raises(ValueError, match="compiled for"):
            run(**decode(form | wrong))
