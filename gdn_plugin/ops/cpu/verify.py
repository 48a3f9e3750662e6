"""`verify` of backend `cpu`: csrc/recurrent.h."""

from __future__ import annotations

from struct import Struct

from torch import Tensor

from gdn_plugin.ops.cpu import arguments as pack
from gdn_plugin.ops.cpu.build import compile_count, warm_up

__all__ = ["compile_count", "verify", "warm_up"]

_LAYOUT = Struct("=6q 12q 14q 4q 3q 2q 9q d2q 4q q")


def verify(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    state_indices: Tensor,
    num_accepted_tokens: Tensor,
    cu_seqlens: Tensor,
    start_rows: Tensor | None,
    scale: float,
    use_qk_l2norm: bool,
    null_index: int,
    out: Tensor,
    zero_padding: bool,
) -> None:
    """Speculative tokens, fp32 throughout and between a sequence's tokens; see gdn_plugin.ops.verify."""
    (tokens, key_heads, key_dim), (_, value_heads, value_dim) = q.shape, v.shape
    pack.call(
        "verify", _LAYOUT,
        tokens, state_indices.shape[0], key_heads, value_heads, key_dim, value_dim,
        *pack.rows("q", q), *pack.rows("k", k), *pack.rows("v", v), *pack.gates(a, b, A_log, dt_bias),
        *pack.pool("state", state), *pack.integers("state_indices", state_indices),
        state_indices.stride(0), state_indices.shape[1],
        *pack.integers("num_accepted_tokens", num_accepted_tokens), *pack.integers("cu_seqlens", cu_seqlens),
        *pack.integers("start_rows", start_rows),
        scale, use_qk_l2norm, null_index,
        *pack.rows("out", out), zero_padding,
    )  # fmt: skip
