"""Backend `reference`, replay: each row's updates are applied to its anchor, one after the other, before a step.

As `recurrence`, it is read rather than run: what a ring holds is turned into the state that it stands for by the
recurrence's own line, and the step is the recurrence's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdn_plugin.backends.reference.recurrence import conv_prologue, norm_and_gate, repeat_heads
from gdn_plugin.registry import BackendOp


def _held(ring_span: Tensor, row: int, accepted: int) -> tuple[int, int]:
    """(first slot, number of updates) of a row, `accepted` tokens of the step before counted."""
    first, held = (int(x) for x in ring_span[row, 0])
    return first, held + accepted - 1


def _replayed(
    state: Tensor, ring_k: Tensor, ring_u: Tensor, ring_g: Tensor, row: int, first: int, held: int, dtype: torch.dtype
) -> Tensor:
    """S_n [Hv, V, K]: S <- exp(g) S + u k^T for each update."""
    S = state[row].to(dtype)
    for j in range(held):
        slot = (first + j) % ring_k.shape[1]
        k = repeat_heads(ring_k[row, slot].to(dtype), S.shape[0])
        S = torch.exp(ring_g[row, slot].to(dtype))[:, None, None] * S
        S = S + ring_u[row, slot].to(dtype).unsqueeze(-1) * k.unsqueeze(1)
    return S


def replay_verify(
    mixed_qkv: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, conv_state: Tensor, a: Tensor, b: Tensor,
    A_log: Tensor, dt_bias: Tensor, state: Tensor, ring_k: Tensor, ring_u: Tensor, ring_g: Tensor, ring_span: Tensor,
    state_indices: Tensor, num_accepted_tokens: Tensor, cu_seqlens: Tensor, num_k_heads: int, head_k_dim: int,
    head_v_dim: int, has_initial_state: Tensor | None, scale: float, z: Tensor | None, norm_weight: Tensor | None,
    norm_eps: float, gate: str, null_index: int, out: Tensor, zero_padding: bool, *,
    compute_dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    """conv_prologue, the recurrence from the replayed state, and the gated RMSNorm, for each sequence in turn."""
    if zero_padding:
        out.zero_()
    slots, most = ring_k.shape[1], conv_state.shape[2] - conv_weight.shape[1] + 2
    offsets = cu_seqlens.tolist()
    for i, row in enumerate(state_indices.tolist()):
        start, end = offsets[i], offsets[i + 1]
        here, one = slice(start, end), slice(i, i + 1)
        if start == end or row <= null_index:
            continue
        length, value_heads = end - start, a.shape[1]
        q, k = (mixed_qkv.new_empty(length, num_k_heads, head_k_dim) for _ in range(2))
        v = mixed_qkv.new_empty(length, value_heads, head_v_dim)
        g, beta = (torch.empty(length, value_heads, dtype=compute_dtype, device=a.device) for _ in range(2))
        conv_prologue(
            mixed_qkv[here], conv_weight, conv_bias, conv_state, state_indices[one], cu_seqlens[i : i + 2] - start,
            None if has_initial_state is None else has_initial_state[one], num_accepted_tokens[one], a[here], b[here],
            A_log, dt_bias, None, num_k_heads, head_k_dim, head_v_dim, False, null_index, q, k, v, g, beta,
            compute_dtype=compute_dtype,
        )  # fmt: skip
        if has_initial_state is not None and not bool(has_initial_state[i]):
            S, first, held = torch.zeros_like(state[row], dtype=compute_dtype), 0, 0
            state[row] = 0
        else:
            first, held = _held(ring_span, row, int(num_accepted_tokens[i]))
            S = _replayed(state, ring_k, ring_u, ring_g, row, first, held, compute_dtype)
        if held + 2 * most > slots:
            state[row] = S
            first, held = (first + held) % slots, 0
        o = torch.empty(length, value_heads, head_v_dim, dtype=compute_dtype, device=a.device)
        for t in range(length):
            key, query = (repeat_heads(x[t].to(compute_dtype), value_heads).unsqueeze(1) for x in (k, q))
            S = torch.exp(g[t])[:, None, None] * S
            u = beta[t][:, None] * (v[t].to(compute_dtype) - (S * key).sum(-1))
            S = S + u.unsqueeze(-1) * key
            o[t] = scale * (S * query).sum(-1)
            slot = (first + held + t) % slots
            ring_k[row, slot], ring_u[row, slot], ring_g[row, slot] = k[t], u, g[t]
        ring_span[row, :, 0], ring_span[row, :, 1] = first, held + 1
        if z is not None and norm_weight is not None:
            o = norm_and_gate(o.to(mixed_qkv.dtype), z[here], norm_weight, norm_eps, gate, compute_dtype)
        out[here] = o


def replay_decode(
    mixed_qkv: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, conv_state: Tensor, a: Tensor, b: Tensor,
    A_log: Tensor, dt_bias: Tensor, state: Tensor, ring_k: Tensor, ring_u: Tensor, ring_g: Tensor, ring_span: Tensor,
    state_indices: Tensor, num_k_heads: int, head_k_dim: int, head_v_dim: int, scale: float, z: Tensor | None,
    norm_weight: Tensor | None, norm_eps: float, gate: str, null_index: int, out: Tensor, zero_padding: bool, *,
    compute_dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    """replay_verify of one token a sequence, one having been accepted."""
    # Its history is columns 0..W-2 and is shifted; what replay_verify writes behind it for one token is nothing.
    batch, device = a.shape[0], a.device
    ones = torch.ones(batch, dtype=torch.int32, device=device)
    one_each = torch.arange(batch + 1, dtype=torch.int32, device=device)
    replay_verify(
        mixed_qkv, conv_weight, conv_bias, conv_state, a, b, A_log, dt_bias, state, ring_k, ring_u, ring_g, ring_span,
        state_indices, ones, one_each, num_k_heads, head_k_dim, head_v_dim, None, scale, z, norm_weight, norm_eps, gate,
        null_index, out, zero_padding, compute_dtype=compute_dtype,
    )  # fmt: skip


def replay_fold(
    ring_k: Tensor, ring_u: Tensor, ring_g: Tensor, ring_span: Tensor, state: Tensor, state_indices: Tensor,
    has_initial_state: Tensor | None, num_accepted_tokens: Tensor | None, null_index: int, *,
    compute_dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    """Row by row: the replayed state is written, the spans become zero."""
    for i, row in enumerate(state_indices.tolist()):
        if row <= null_index:
            continue
        if has_initial_state is None or bool(has_initial_state[i]):
            accepted = 1 if num_accepted_tokens is None else int(num_accepted_tokens[i])
            first, held = _held(ring_span, row, accepted)
            if held:
                state[row] = _replayed(state, ring_k, ring_u, ring_g, row, first, held, compute_dtype)
        ring_span[row] = 0


REPLAY_DECODE = BackendOp(replay_decode)
REPLAY_VERIFY = BackendOp(replay_verify)
REPLAY_FOLD = BackendOp(replay_fold)
