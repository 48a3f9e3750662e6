"""`decode` of backend `cpu`: csrc/recurrent.h."""

from __future__ import annotations

from struct import Struct

from torch import Tensor

from gdn_plugin.ops.cpu import arguments as pack
from gdn_plugin.ops.cpu.build import compile_count, warm_up

__all__ = ["compile_count", "decode", "warm_up"]

_LAYOUT = Struct("=6q 12q 14q 4q 3q d2q 4q q")


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    state_indices: Tensor,
    scale: float,
    use_qk_l2norm: bool,
    null_index: int,
    out: Tensor,
    zero_padding: bool,
) -> None:
    """One token a sequence, fp32 throughout; see gdn_plugin.ops.decode."""
    (sequences, key_heads, key_dim), (_, value_heads, value_dim) = q.shape, v.shape
    pack.call(
        "decode", _LAYOUT,
        sequences, sequences, key_heads, value_heads, key_dim, value_dim,
        *pack.rows("q", q), *pack.rows("k", k), *pack.rows("v", v), *pack.gates(a, b, A_log, dt_bias),
        *pack.pool("state", state), *pack.integers("state_indices", state_indices),
        scale, use_qk_l2norm, null_index,
        *pack.rows("out", out), zero_padding,
    )  # fmt: skip
