"""Arithmetic that several kernels share: gates, SiLU, L2 norm and one step of the delta rule.

Everything here takes and gives fp32. Values that the contract rounds go through `round_to` first.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """x rounded to `dtype`, as fp32."""
    return x.to(dtype).to(tl.float32)


@triton.jit
def silu(x):
    """x / (1 + exp(-x)) in six instructions: with tl.exp and a division, which mind denormals, it is eleven.

    rsqrt is good to 2^-22.9, so its square to 2^-21.9, as a division is.
    """
    r = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
    return x * r * r


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def rms_norm_gated(x, z, weight, D: tl.constexpr, eps, is_sigmoid):
    """RMSNorm of rows x [R, D], times weight [R or 1, D], times sigmoid(z) or, where is_sigmoid is 0, silu(z)."""
    r = tl.rsqrt(1.0 + tl.exp2(z * -1.4426950408889634))  # see `silu`
    return x * tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None] * weight * (tl.where(is_sigmoid != 0, 1.0, z) * r * r)


@triton.jit
def log_decay(a, A_log, dt_bias):
    """g = -exp(A_log) * softplus(a + dt_bias), softplus(x) = x past 20 as in PyTorch."""
    x = a + dt_bias
    e = tl.exp(tl.minimum(x, 20.0, propagate_nan=tl.PropagateNan.ALL))
    u = 1.0 + e
    # log1p(e) without its cancellation (Kahan): exact where u rounds to 1, and the rounding of u divides out elsewhere
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return -tl.exp(A_log) * tl.where(x > 20.0, x, log1p)


@triton.jit
def l2_normalise(x, dtype: tl.constexpr, wanted=True):
    """x [D] fp32 -> x * rsqrt(sum(x^2) + 1e-6), rounded to `dtype`, as fp32; x as it is where it is not `wanted`."""
    return round_to(x * tl.where(wanted, tl.rsqrt(tl.sum(x * x, axis=0) + 1e-6), 1.0), dtype)


@triton.jit
def delta_step(S, q, k, v, decay, beta, scale):
    """One token of the gated delta rule on a tile of the state.

    S [BV, K], q and k [K], v [BV], all fp32; decay = exp(g) and beta are scalars. Returns (new S, o [BV]).

    Both products with the state are taken of the OLD state, so that their reductions do not wait for each other:
    S_new q = decay * (S q) + delta * (k . q).
    """
    Sk = tl.sum(S * k[None, :], axis=1)
    Sq = tl.sum(S * q[None, :], axis=1)
    kq = tl.sum(k * q, axis=0)
    delta = beta * (v - decay * Sk)
    o = scale * (decay * Sq + delta * kq)
    return decay * S + delta[:, None] * k[None, :], o
