"""The public ops dressed as backend functions, so that `checks.check` runs a case through everything a user calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gdn_plugin import ops
from gdn_plugin.ops.cases import Case
from gdn_plugin.ops.record import OPS
from gdn_plugin.registry import Problem, judge, probe, rows


def public(op: str, backend: str | None, *, out: bool | None = None) -> Callable[..., None]:
    """Calls gdn_plugin.ops.<op>.

    Args:
        out: hand over buffers to fill, or take what the op returns. None: buffers where zero_padding is False. A case
            whose output is one of its inputs (gated_norm in place) always hands it over.
    """
    call, names = getattr(ops, op), [output.name for output in OPS[op].outputs]

    def run(**args: Any) -> None:
        zeroing = {"zero_padding": args.pop("zero_padding")} if "zero_padding" in args else {}
        buffers = [args.pop(name) for name in names]
        fill = bool(names) and not zeroing.get("zero_padding", True) if out is None else bool(names) and out
        if fill or any(buffer is x for buffer in buffers for x in args.values()):
            got = call(**args, **zeroing, out=buffers if len(names) > 1 else buffers[0], backend=backend)
            assert all(a is b for a, b in zip(got if len(names) > 1 else [got], buffers, strict=True))
            return
        got = call(**args, backend=backend)
        if not names:
            assert got is None
            return
        for buffer, result in zip(buffers, got if len(names) > 1 else [got], strict=True):
            assert result.is_contiguous() and result.dtype == buffer.dtype
            buffer.copy_(result)

    return run


def precision(op: str, backend: str | None, io_dtype: torch.dtype, device: str = "cpu") -> str:
    """The tolerance table's column: "io" for who multiplies matrices in the io dtype, as their docstrings say."""
    if backend in ("flashinfer", None):
        return "io"
    exact = io_dtype == torch.float32 and device == "cpu"
    return "io" if op == "prefill" and not exact and backend in ("triton", "cpu") else "fp32"


def op_args(case: Case, backend: str, *, variant: str = "") -> tuple[Any, ...]:
    """The positional arguments of torch.ops.gdn.<op><variant> for a case, on copies of its pools."""
    given = case.arguments() | {"backend": backend}
    for name, (shape, dtype) in case.outputs.items():
        given[name] = torch.zeros(shape, dtype=dtype, device=case.device)
    schema = getattr(torch.ops.gdn, case.op + variant).default._schema
    return tuple(given[argument.name] for argument in schema.arguments)


def supported(op: str, **problem: Any) -> list[str]:
    """Backends that can run a problem of this kind on this machine's CPU, auto-preferred or not."""
    defaults = {"dtype": "float32", "state_dtype": "float32", "num_k_heads": 2, "num_v_heads": 4}
    full = Problem(op, **(defaults | {"head_k_dim": 16, "head_v_dim": 8} | problem))
    return [row.name for row in rows(op) if judge(row, probe("cpu"), full).supported]
