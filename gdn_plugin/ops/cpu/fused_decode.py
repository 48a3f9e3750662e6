"""`fused_decode` of backend `cpu`: csrc/conv.h."""

from __future__ import annotations

from struct import Struct

from torch import Tensor

from gdn_plugin.ops.cpu import arguments as pack
from gdn_plugin.ops.cpu.build import compile_count, warm_up

__all__ = ["compile_count", "fused_decode", "warm_up"]

_LAYOUT = Struct("=6q 19q 14q 4q 3q d 4q 3q d2q 4q q")


def fused_decode(
    mixed_qkv: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    conv_state: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    state_indices: Tensor,
    num_k_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    scale: float,
    z: Tensor | None,
    norm_weight: Tensor | None,
    norm_eps: float,
    gate: str,
    null_index: int,
    out: Tensor,
    zero_padding: bool,
) -> None:
    """The whole decode step, fp32 throughout; see gdn_plugin.ops.fused_decode."""
    sequences, value_heads = a.shape
    if z is None or norm_weight is None:
        z = norm_weight = None
    pack.call(
        "fused_decode", _LAYOUT,
        sequences, sequences, num_k_heads, value_heads, head_k_dim, head_v_dim,
        *pack.conv(mixed_qkv, conv_weight, conv_bias, conv_state), *pack.gates(a, b, A_log, dt_bias),
        *pack.pool("state", state), *pack.integers("state_indices", state_indices),
        scale, *pack.rows("z", z), *pack.vector("norm_weight", norm_weight), norm_eps, gate == "sigmoid", null_index,
        *pack.rows("out", out), zero_padding,
    )  # fmt: skip
