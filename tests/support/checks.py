"""Runs a Case through a backend function and holds the result against the float64 reference.

`check(function, case)` fails where: a live output or a written pool element is out of tolerance (tests/tolerances.py)
or still poisoned; any other bit of a pool's storage (other rows, page tails, columns past the written ones) changed; an
input changed; a byte around an output buffer changed; padding rows of a returning op are not zero, or those of an
`_out` op are neither zero nor as they were; padding tokens of conv_prologue differ from the reference's zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gdn_plugin.ops import heads
from gdn_plugin.ops.cases import Case
from gdn_plugin.ops.dispatch import backend_op
from gdn_plugin.ops.record import OPS
from tests.tolerances import Tolerance, tolerance

_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


class Result(NamedTuple):
    outputs: dict[str, Tensor]
    pools: dict[str, Tensor]


def bits(x: Tensor) -> Tensor:
    """x's bit pattern as integers, so that NaN equals itself."""
    return x.contiguous().view(_BITS[x.element_size()])


def assert_close(name: str, got: Tensor, want: Tensor, tol: Tolerance) -> None:
    """|got - want| <= rtol * |want| + atol * rms(want) everywhere; NaN and inf in `got` fail."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if want.numel() == 0:
        return
    assert torch.isfinite(want).all(), f"{name}: the reference itself is not finite; the case is wrong"
    assert torch.isfinite(got).all(), f"{name}: {int((~torch.isfinite(got)).sum())} of {got.numel()} not finite"
    error = (got - want).abs()
    excess = error - (tol.rtol * want.abs() + tol.atol * want.square().mean().sqrt())
    if bool((excess > 0).any()):
        at = int(excess.argmax())
        where = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), want.shape))
        raise AssertionError(
            f"{name}: {int((excess > 0).sum())} of {want.numel()} out of {tol}; worst at {where}: "
            f"got {got.flatten()[at]:.6g}, want {want.flatten()[at]:.6g}; max |error| {error.max():.3g}, "
            f"rms(want) {want.square().mean().sqrt():.3g}"
        )


def reference(op: str) -> Callable[..., None]:
    """Backend `reference`'s function for an op."""
    return backend_op(op, "reference").run


def run_reference(case: Case) -> Result:
    """The float64 truth, on the CPU."""
    args = case.precise_arguments(torch.float64)
    args |= heads.flat(OPS[case.op], args)
    reference(case.op)(**args, compute_dtype=torch.float64)
    return Result({n: args[n] for n in case.outputs}, {n: args[n] for n in case.pools})


def run(function: Callable[..., None], case: Case, *, zero_padding: bool = True) -> Result:
    """Calls a backend function on fresh copies of the pools with outputs full of NaN; checks what must survive."""
    args = case.arguments(zero_padding)
    before = {n: bits(x).clone() for n, x in case.args.items() if isinstance(x, Tensor) and x.dtype != torch.bool}
    function(**args)
    for name, was in before.items():
        assert torch.equal(bits(case.args[name]), was), f"input {name} was changed"
    stray = case.trespass(args)
    assert stray is None, stray
    return Result({n: args[n] for n in case.outputs}, {n: args[n] for n in case.pools})


def check(
    function: Callable[..., None], case: Case, *, precision: str = "fp32", zero_padding: bool = True,
    want: Result | None = None,
) -> Result:  # fmt: skip
    """See the module's docstring.

    Args:
        precision: the tolerance table's column, "fp32" or "io".
        want: what `run_reference` gave for the case, where it is checked more than once.
    """
    got = run(function, case, zero_padding=zero_padding)
    want = want or run_reference(case)
    live = case.live
    for name, out in got.outputs.items():
        out_cpu, truth = out.cpu(), want.outputs[name]
        tol = tolerance(case.op, case.io_dtype, out.dtype, precision)
        assert_close(f"{case.op}: {name}", out_cpu[live], truth[live], tol)
        padding = out_cpu[~live]
        if not case.has_zero_padding:
            assert torch.equal(padding.double(), truth[~live]), f"{case.op}: {name}: wrong value in padding tokens"
        elif zero_padding:
            assert bool((padding == 0).all()), f"{case.op}: {name}: padding rows of a returning op must be zero"
        else:
            assert bool(((padding == 0) | torch.isnan(padding)).all()), f"{case.op}: {name}: padding rows were written"
    for name, pool in got.pools.items():
        now, truth = case.written_in(name, pool.cpu()), case.written_in(name, want.pools[name])
        if name in ("conv_state", "ring_span"):  # raw inputs, cast to the pool's dtype, and counts: no arithmetic
            same = torch.equal(now, truth.to(pool.dtype))
            assert same, f"{case.op}: {name} does not hold what it must"
        else:
            tol = tolerance(case.op, case.io_dtype, pool.dtype, precision)
            assert_close(f"{case.op}: {name}", now, truth, tol)
    return got
