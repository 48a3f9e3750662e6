"""`conv_prologue` of backend `cpu`: csrc/conv.h."""

from __future__ import annotations

from struct import Struct

from torch import Tensor

from gdn_plugin.ops.cpu import arguments as pack
from gdn_plugin.ops.cpu.build import compile_count, warm_up

__all__ = ["compile_count", "conv_prologue", "warm_up"]

_LAYOUT = Struct("=6q 19q 6q 2q 3q 14q 4q 2q 12q 8q")


def conv_prologue(
    mixed_qkv: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    conv_state: Tensor,
    state_indices: Tensor,
    cu_seqlens: Tensor,
    has_initial_state: Tensor | None,
    num_accepted_tokens: Tensor | None,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor | None,
    num_k_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    exp_gate: bool,
    null_index: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
) -> None:
    """Convolution, SiLU, split, L2 norm, gates and state updates in one pass; see gdn_plugin.ops.conv_prologue."""
    pack.call(
        "conv_prologue", _LAYOUT,
        mixed_qkv.shape[0], cu_seqlens.shape[0] - 1, num_k_heads, v.shape[1], head_k_dim, head_v_dim,
        *pack.conv(mixed_qkv, conv_weight, conv_bias, conv_state),
        *pack.integers("state_indices", state_indices), *pack.integers("cu_seqlens", cu_seqlens),
        *pack.flags("has_initial_state", has_initial_state),
        *pack.integers("num_accepted_tokens", num_accepted_tokens), *pack.gates(a, b, A_log, dt_bias),
        *pack.pool("state", state),
        exp_gate, null_index,
        *pack.rows("q", q), *pack.rows("k", k), *pack.rows("v", v), *pack.matrix("g", g), *pack.matrix("beta", beta),
    )  # fmt: skip
