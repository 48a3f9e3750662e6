"""The gated RMSNorm behind a prefill on a CPU, where no fused kernel has it: csrc/norm.h. No op of its own."""

from __future__ import annotations

from struct import Struct

from torch import Tensor

from gdn_plugin.ops.cpu import arguments as pack

_LAYOUT = Struct("=3q 8q 3q d q")


def gated_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float, gate: str) -> None:
    """x <- x * rsqrt(mean(x^2) + eps) * weight * gate(z), in place, fp32 in between, rounded once.

    PyTorch's spelling of it makes eight fp32 tensors of x's size; this reads x and z once and writes x once.

    Args:
        x, z: [T, Hv, V], last stride 1, other strides any.
        weight: [V] contiguous.
        gate: "silu" or "sigmoid".
    """
    if z.shape != x.shape or weight.shape != x.shape[2:] or not weight.is_contiguous():
        raise ValueError(
            f"gated_norm: expected z like x {tuple(x.shape)} and a contiguous weight [V], got {tuple(z.shape)} and "
            f"{tuple(weight.shape)} of strides {weight.stride()}"
        )
    pack.call(
        "gated_norm", _LAYOUT,
        *x.shape, *pack.rows("x", x), *pack.rows("z", z), *pack.vector("weight", weight), eps, gate == "sigmoid",
    )  # fmt: skip
