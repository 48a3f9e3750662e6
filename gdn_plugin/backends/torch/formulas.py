"""The formulas that the `torch` ops share, in fp32, and what keeps the caller's global settings out of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

L2_NORM_EPS = 1e-6


def l2_norm(x: Tensor) -> Tensor:
    """x * rsqrt(sum(x^2) + 1e-6) over the last dim, in fp32, rounded to x's dtype."""
    y = x.float()
    return (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + L2_NORM_EPS)).to(x.dtype)


def gates(a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """(g, beta) fp32: g = -exp(A_log) * softplus(a + dt_bias), the natural log of the decay, and beta = sigmoid(b)."""
    g = -torch.exp(A_log.float()) * softplus(a.float() + dt_bias.float())
    return g, torch.sigmoid(b.float())


def norm_and_gate(x: Tensor, z: Tensor, weight: Tensor, eps: float, gate: str) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight * gate(z) over the last dim, in fp32."""
    x, z = x.float(), z.float()
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()
    return normed * (silu(z) if gate == "silu" else torch.sigmoid(z))


@contextlib.contextmanager
def full_fp32() -> Iterator[None]:
    """Matrix products of fp32 in fp32, whatever the caller has set."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # the caller has used the settings by backend, beside which this one does not speak
        before = None
    if before is None:
        with _full_fp32_by_backend():
            yield
        return
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def _full_fp32_by_backend() -> Iterator[None]:
    settings = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = "none"  # inherited, as it may have been
            if setting.fp32_precision != precision:
                setting.fp32_precision = precision
