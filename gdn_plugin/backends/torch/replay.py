"""Backend `torch`, replay: the ring's updates as two short products beside the anchor's, vectorised over sequences.

With w_j = exp(sum of g behind update j) and w = exp(sum of all g), for the n updates of a row

    S_n x = w S_0 x + sum_j w_j (k_j . x) u_j    S_n = w S_0 + sum_j w_j u_j k_j^T

Sums of g are taken from the end, so that a gate that wipes the state leaves those behind it exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdn_plugin.backends.torch.formulas import full_fp32, norm_and_gate
from gdn_plugin.backends.torch.recurrent import blocks, conv_prologue, step, store
from gdn_plugin.backends.torch.rows import gather, scatter
from gdn_plugin.registry import BackendOp


class _Rings:
    """The updates of some rows in their order, fp32, zeros where there are none: k [B, R, Hk, K], u [B, R, Hv, V].

    Args:
        live: [B] bool, rows whose ring is read.
        accepted: [B], tokens of the step before that count.
    """

    def __init__(
        self, ring_k: Tensor, ring_u: Tensor, ring_g: Tensor, ring_span: Tensor, rows: Tensor, live: Tensor,
        accepted: Tensor,
    ) -> None:  # fmt: skip
        self.slots = ring_k.shape[1]
        span = gather(ring_span, rows, live, torch.int64)[:, 0]
        self.first = span[:, 0]
        self.held = torch.where(live, span[:, 1] + accepted - 1, 0)
        order = torch.arange(self.slots, device=rows.device)
        at = (self.first[:, None] + order) % self.slots
        self.holds = order < self.held[:, None]
        own = torch.where(live, rows, 0)[:, None]

        def take(ring: Tensor) -> Tensor:
            picked = ring[own, at].float() if ring.shape[0] else ring.new_zeros(*at.shape, *ring.shape[2:]).float()
            return torch.where(self.holds.view(*at.shape, *[1] * (ring.dim() - 2)), picked, 0)

        self.k, self.u, g = take(ring_k), take(ring_u), take(ring_g)
        # [B, R, Hv]: the sum of g behind each update, and of all of them
        self.behind = torch.cat((g[:, 1:].flip(1).cumsum(1).flip(1), torch.zeros_like(g[:, :1])), 1)
        self.all = g.sum(1)

    def state(self, S: Tensor) -> Tensor:
        """S_n [B, Hv, V, K] of anchors S."""
        ratio = S.shape[1] // self.k.shape[2]
        u = torch.where(self.holds[..., None, None], torch.exp(self.behind)[..., None] * self.u, 0)
        k = self.k.repeat_interleave(ratio, 2)
        with full_fp32():
            added = torch.matmul(u.permute(0, 2, 3, 1), k.permute(0, 2, 1, 3))
        return torch.exp(self.all)[..., None, None] * S + added


def replay_verify(
    mixed_qkv: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, conv_state: Tensor, a: Tensor, b: Tensor,
    A_log: Tensor, dt_bias: Tensor, state: Tensor, ring_k: Tensor, ring_u: Tensor, ring_g: Tensor, ring_span: Tensor,
    state_indices: Tensor, num_accepted_tokens: Tensor, cu_seqlens: Tensor, num_k_heads: int, head_k_dim: int,
    head_v_dim: int, has_initial_state: Tensor | None, scale: float, z: Tensor | None, norm_weight: Tensor | None,
    norm_eps: float, gate: str, null_index: int, out: Tensor, zero_padding: bool,
) -> None:  # fmt: skip
    """See gdn_plugin.ops.replay_verify. The ring becomes a state, which one vectorised step a token slot moves on."""
    tokens, value_heads = a.shape
    most = conv_state.shape[2] - conv_weight.shape[1] + 2
    rows, offsets = state_indices.long(), cu_seqlens.long()
    starts, lens = offsets[:-1], offsets.diff()
    live = (rows > null_index) & (lens > 0)
    started = live if has_initial_state is None else live & has_initial_state
    new = mixed_qkv.new_empty
    q, k = new(tokens, num_k_heads, head_k_dim), new(tokens, num_k_heads, head_k_dim)
    v = new(tokens, value_heads, head_v_dim)
    g, beta = (torch.empty(tokens, value_heads, dtype=torch.float32, device=a.device) for _ in range(2))
    conv_prologue(
        mixed_qkv, conv_weight, conv_bias, conv_state, state_indices, cu_seqlens, has_initial_state,
        num_accepted_tokens, a, b, A_log, dt_bias, None, num_k_heads, head_k_dim, head_v_dim, False, null_index, q, k,
        v, g, beta,
    )  # fmt: skip
    result = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    written = torch.zeros(tokens, dtype=torch.bool, device=out.device)
    for i0, i1 in blocks(state, rows.shape[0]):
        cut = slice(i0, i1)
        rings = _Rings(ring_k, ring_u, ring_g, ring_span, rows[cut], started[cut], num_accepted_tokens[cut].long())
        S = rings.state(gather(state, rows[cut], started[cut], torch.float32))
        full = rings.held + 2 * most > rings.slots
        scatter(state, rows[cut], live[cut] & (full | ~started[cut]), S)
        first = torch.where(full, (rings.first + rings.held) % rings.slots, rings.first)
        held = torch.where(full, 0, rings.held)
        for t in range(most):
            here = live[cut] & (t < lens[cut])
            token = torch.where(here, starts[cut] + t, 0)
            S, o, u = step(S, q[token], k[token], v[token], g[token], beta[token], scale)
            slot = (first + held + t) % rings.slots
            for ring, x in ((ring_k, k[token]), (ring_u, u), (ring_g, g[token])):
                _put(ring, rows[cut], slot, here, x)
            scatter(result, token, here, o)
            scatter(written, token, here, here)
        spans = torch.stack((first, held + 1), 1)[:, None].expand(-1, ring_span.shape[1], 2)
        scatter(ring_span, rows[cut], live[cut], spans)
    if z is not None and norm_weight is not None:
        result = norm_and_gate(result.to(mixed_qkv.dtype), z, norm_weight, norm_eps, gate)
    store(out, result, written, zero_padding)


def _put(ring: Tensor, rows: Tensor, slot: Tensor, here: Tensor, x: Tensor) -> None:
    """ring[rows, slot] = x where `here`; every other slot keeps its bits."""
    if ring.shape[0] == 0:
        return
    mine = torch.arange(ring.shape[1], device=rows.device) == slot[:, None]
    mine = mine.view(*mine.shape, *[1] * (ring.dim() - 2))
    kept = ring.index_select(0, torch.where(here, rows, 0))
    scatter(ring, rows, here, torch.where(mine, x.unsqueeze(1).to(ring.dtype), kept))


def replay_decode(
    mixed_qkv: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, conv_state: Tensor, a: Tensor, b: Tensor,
    A_log: Tensor, dt_bias: Tensor, state: Tensor, ring_k: Tensor, ring_u: Tensor, ring_g: Tensor, ring_span: Tensor,
    state_indices: Tensor, num_k_heads: int, head_k_dim: int, head_v_dim: int, scale: float, z: Tensor | None,
    norm_weight: Tensor | None, norm_eps: float, gate: str, null_index: int, out: Tensor, zero_padding: bool,
) -> None:  # fmt: skip
    """See gdn_plugin.ops.replay_decode: replay_verify of one token a sequence, one having been accepted."""
    batch, device = a.shape[0], a.device
    ones = torch.ones(batch, dtype=torch.int32, device=device)
    one_each = torch.arange(batch + 1, dtype=torch.int32, device=device)
    replay_verify(
        mixed_qkv, conv_weight, conv_bias, conv_state, a, b, A_log, dt_bias, state, ring_k, ring_u, ring_g, ring_span,
        state_indices, ones, one_each, num_k_heads, head_k_dim, head_v_dim, None, scale, z, norm_weight, norm_eps, gate,
        null_index, out, zero_padding,
    )  # fmt: skip


def replay_fold(
    ring_k: Tensor, ring_u: Tensor, ring_g: Tensor, ring_span: Tensor, state: Tensor, state_indices: Tensor,
    has_initial_state: Tensor | None, num_accepted_tokens: Tensor | None, null_index: int,
) -> None:  # fmt: skip
    """See gdn_plugin.ops.replay_fold."""
    rows = state_indices.long()
    live = rows > null_index
    started = live if has_initial_state is None else live & has_initial_state
    accepted = torch.ones_like(rows) if num_accepted_tokens is None else num_accepted_tokens.long()
    for i0, i1 in blocks(state, rows.shape[0]):
        cut = slice(i0, i1)
        rings = _Rings(ring_k, ring_u, ring_g, ring_span, rows[cut], started[cut], accepted[cut])
        S = rings.state(gather(state, rows[cut], started[cut], torch.float32))
        scatter(state, rows[cut], rings.held > 0, S)
        zeros = torch.zeros(1, *ring_span.shape[1:], dtype=ring_span.dtype, device=rows.device)
        scatter(ring_span, rows[cut], live[cut], zeros.expand(i1 - i0, *ring_span.shape[1:]))


REPLAY_DECODE = BackendOp(replay_decode)
REPLAY_VERIFY = BackendOp(replay_verify)
REPLAY_FOLD = BackendOp(replay_fold)
