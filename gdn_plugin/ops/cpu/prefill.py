"""`prefill` of backend `cpu`: csrc/prefill.h."""

from __future__ import annotations

from struct import Struct

from torch import Tensor

from gdn_plugin.ops.cpu import arguments as pack
from gdn_plugin.ops.cpu.build import compile_count, warm_up

__all__ = ["compile_count", "prefill", "warm_up"]

_LAYOUT = Struct("=6q 12q 8q 4q 6q 2q d3q 4q 4q 3q 2q")


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    state_indices: Tensor,
    cu_seqlens: Tensor,
    has_initial_state: Tensor | None,
    scale: float,
    use_qk_l2norm: bool,
    exp_gate: bool,
    max_seqlen: int,
    null_index: int,
    out: Tensor,
    checkpoints: Tensor | None,
    checkpoint_cu_starts: Tensor | None,
    checkpoint_every: int,
    zero_padding: bool,
) -> None:
    """Chunked delta rule over packed sequences; see gdn_plugin.ops.prefill.

    Where q is bf16 and the CPU has bf16 dot products, matrix operands are rounded to bf16 and sums are fp32; everywhere
    else all of it is fp32. `max_seqlen` is not needed here.
    """
    (tokens, key_heads, key_dim), (_, value_heads, value_dim) = q.shape, v.shape
    pack.call(
        "prefill", _LAYOUT,
        tokens, cu_seqlens.shape[0] - 1, key_heads, value_heads, key_dim, value_dim,
        *pack.rows("q", q), *pack.rows("k", k), *pack.rows("v", v), *pack.matrix("g", g), *pack.matrix("beta", beta),
        *pack.pool("state", state),
        *pack.integers("state_indices", state_indices), *pack.integers("cu_seqlens", cu_seqlens),
        *pack.flags("has_initial_state", has_initial_state),
        scale, use_qk_l2norm, exp_gate, null_index,
        *pack.rows("out", out),
        *pack.pool("checkpoints", checkpoints), *pack.integers("checkpoint_cu_starts", checkpoint_cu_starts),
        checkpoint_every, zero_padding,
    )  # fmt: skip
