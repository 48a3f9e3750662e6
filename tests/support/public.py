"""The public ops dressed as backend functions, so that `checks.check` runs a case through everything a user calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gdn_plugin import ops
from gdn_plugin.registry import Problem, judge, probe, rows
from tests.support.cases import Case

PROLOGUE_OUTPUTS = ("q", "k", "v", "g", "beta")


def public(op: str, backend: str | None) -> Callable[..., None]:
    """Calls gdn_plugin.ops.<op>: the returning op where zero_padding is True, else the `_out` op."""
    call = getattr(ops, op)

    def prologue(**args: Any) -> None:
        buffers = [args.pop(name) for name in PROLOGUE_OUTPUTS]
        for buffer, result in zip(buffers, call(**args, backend=backend), strict=True):
            buffer.copy_(result)

    def other(*, out: Any, zero_padding: bool, **args: Any) -> None:
        if zero_padding:
            out.copy_(call(**args, backend=backend))
        else:
            assert call(**args, out=out, backend=backend) is out

    return prologue if op == "conv_prologue" else other


def precision(op: str, backend: str, io_dtype: torch.dtype) -> str:
    """The tolerance table's column: backend `cpu` multiplies matrices of bf16 io in bf16, as its docstring says."""
    return "io" if (op, backend, io_dtype) == ("prefill", "cpu", torch.bfloat16) else "fp32"


def op_args(case: Case, backend: str, *, variant: str = "") -> tuple[Any, ...]:
    """The positional arguments of torch.ops.gdn.<op><variant> for a case, on copies of its pools."""
    name = case.op + variant
    schema = getattr(torch.ops.gdn, name).default._schema
    given: dict[str, Any] = {**case.args, "backend": backend}
    given |= {n: p.clone().view for n, p in case.pools.items()}
    if variant:
        device = case.args["A_log"].device if "A_log" in case.args else case.args["q"].device
        given |= {n: torch.zeros(shape, dtype=dtype, device=device) for n, (shape, dtype) in case.outputs.items()}
    return tuple(given[argument.name] for argument in schema.arguments)


def supported(op: str, **problem: Any) -> list[str]:
    """Backends that can run a problem of this kind on this machine's CPU, auto-preferred or not."""
    defaults = {"dtype": "float32", "state_dtype": "float32", "num_k_heads": 2, "num_v_heads": 4}
    full = Problem(op, **(defaults | {"head_k_dim": 16, "head_v_dim": 8} | problem))
    return [row.name for row in rows(op) if judge(row, probe("cpu"), full).supported]
