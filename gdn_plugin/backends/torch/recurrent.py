"""Backend `torch`, all but prefill: the ops in plain vectorised PyTorch, on any device.

Nothing reads a tensor's values on the host, so every call can be captured in a CUDA graph. State rows are gathered,
updated in fp32 and scattered back (see `rows`); batches are cut so that a gathered block stays within _BLOCK elements.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from gdn_plugin.backends.torch.formulas import full_fp32, gates, l2_norm, norm_and_gate
from gdn_plugin.backends.torch.rows import gather, scatter
from gdn_plugin.registry import BackendOp

_BLOCK = 1 << 24  # elements of fp32 state gathered at a time: 64 MiB
_CONV_TOKENS = 256  # tokens convolved at a time on the CPU, to stay in its cache


def _split(x: Tensor, num_k_heads: int, head_k_dim: int, head_v_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of SiLU outputs x [T, dim] in the io dtype: split and L2-normalised."""
    key_dim = num_k_heads * head_k_dim
    q, k, v = x.split((key_dim, key_dim, x.shape[1] - 2 * key_dim), dim=1)
    return (
        l2_norm(q.unflatten(1, (num_k_heads, head_k_dim))),
        l2_norm(k.unflatten(1, (num_k_heads, head_k_dim))),
        v.unflatten(1, (-1, head_v_dim)),
    )


def conv_prologue(
    mixed_qkv: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, conv_state: Tensor, state_indices: Tensor,
    cu_seqlens: Tensor, has_initial_state: Tensor | None, num_accepted_tokens: Tensor | None, a: Tensor, b: Tensor,
    A_log: Tensor, dt_bias: Tensor, state: Tensor | None, num_k_heads: int, head_k_dim: int, head_v_dim: int,
    exp_gate: bool, null_index: int, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor,
) -> None:  # fmt: skip
    """See gdn_plugin.ops.conv_prologue."""
    device, tokens, batch = mixed_qkv.device, mixed_qkv.shape[0], state_indices.shape[0]
    if tokens == 0 or batch == 0 or conv_state.shape[0] == 0:  # no sequence has a token and a row
        for x in (q, k, v, beta):
            x.zero_()
        g.fill_(1.0 if exp_gate else 0.0)
        return
    reach = conv_weight.shape[1] - 1  # inputs a token looks back on
    rows, offsets = state_indices.long(), cu_seqlens.long()
    starts, lens = offsets[:-1], offsets.diff()
    live = (rows > null_index) & (lens > 0)
    started = live if has_initial_state is None else live & has_initial_state

    # History [B, W-1, dim] in conv_state's dtype: a sequence's last W-1 inputs before this call, or zeros.
    steps = torch.arange(reach, device=device)
    first = 0 if num_accepted_tokens is None else (num_accepted_tokens.long() - 1).clamp(min=0).view(-1, 1)
    columns = (steps + first).clamp(max=conv_state.shape[2] - 1).expand(batch, reach)
    safe_row = torch.where(started, rows, 0)
    history = conv_state[safe_row[:, None], :, columns]  # [B, W-1, dim]
    history = torch.where(started.view(-1, 1, 1), history, 0)

    position = torch.arange(tokens, device=device)
    owner = torch.searchsorted(offsets, position, right=True) - 1
    real = owner < batch
    owner = owner.clamp(max=batch - 1)
    real = real & live[owner]
    into = position - starts[owner]  # position in its sequence
    # Each input's row in (mixed_qkv, history): `back` tokens ago, or, before the sequence's start, in its history.
    inputs = torch.cat((mixed_qkv, history.flatten(0, 1)))
    back = torch.arange(reach + 1, device=device).view(-1, 1)
    source = torch.where(into >= back, position - back, tokens + owner * reach + reach - back + into)
    source = torch.where(real, source, 0)
    weight = conv_weight.float().t().contiguous()  # [W, dim], the last row is the current token's
    block = _CONV_TOKENS if device.type == "cpu" else max(tokens, 1)
    for t0 in range(0, tokens, block):
        here = slice(t0, min(t0 + block, tokens))
        x = inputs.index_select(0, source[0, here]) * weight[reach]
        for ago in range(1, reach + 1):
            x.addcmul_(inputs.index_select(0, source[ago, here]), weight[reach - ago])
        if conv_bias is not None:
            x += conv_bias
        y = torch.where(real[here, None], silu(x), 0).to(mixed_qkv.dtype)
        for buffer, part in zip((q, k, v), _split(y, num_k_heads, head_k_dim, head_v_dim), strict=True):
            buffer[here] = part
    log_decay, strength = gates(a, b, A_log, dt_bias)
    decay = torch.exp(log_decay) if exp_gate else log_decay
    g.copy_(torch.where(real[:, None], decay, 1.0 if exp_gate else 0.0))
    beta.copy_(torch.where(real[:, None], strength, 0.0))

    if num_accepted_tokens is None:  # the last W-1 inputs
        column = lens[:, None] + steps  # in (history, the sequence)
        taken = torch.where(column < reach, tokens + torch.arange(batch, device=device)[:, None] * reach + column, 0)
        taken = torch.where(column < reach, taken, starts[:, None] + column - reach)
        taken = torch.where(live[:, None], taken, 0)
        kept = inputs[taken]  # [B, W-1, dim]
        scatter(conv_state[:, :, :reach], rows, live, kept.transpose(1, 2))
    else:  # W-2 inputs of the past, then every input of this step
        column = torch.arange(conv_state.shape[2], device=device).expand(batch, -1) + 1
        past = column < reach
        written = live[:, None] & (column < reach + lens[:, None])
        taken = torch.where(past, tokens + torch.arange(batch, device=device)[:, None] * reach + column, 0)
        taken = torch.where(past, taken, starts[:, None] + column - reach)
        new = inputs[torch.where(written, taken, 0)].transpose(1, 2).to(conv_state.dtype)
        old = conv_state.index_select(0, torch.where(live, rows, 0))
        scatter(conv_state, rows, live, torch.where(written[:, None, :], new, old))
    if state is not None and has_initial_state is not None:
        fresh = live & ~has_initial_state
        for i0, i1 in blocks(state, batch):
            zeros = torch.zeros(1, dtype=state.dtype, device=device).expand(i1 - i0, *state.shape[1:])
            scatter(state, rows[i0:i1], fresh[i0:i1], zeros)


def blocks(state: Tensor, batch: int) -> list[tuple[int, int]]:
    """Cuts of a batch whose gathered states stay within _BLOCK elements."""
    size = max(1, _BLOCK // max(state[0].numel() if state.shape[0] else 1, 1))
    return [(i, min(i + size, batch)) for i in range(0, batch, size)]


def step(
    S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One token each: S [B, Hv, V, K], q, k [B, Hk, K], v [B, Hv, V], g, beta [B, Hv]; (new S, o, u), all fp32.

    u [B, Hv, V] = beta (v - exp(g) S k).
    """
    (batch, key_heads, K), (_, value_heads, V) = k.shape, v.shape
    ratio = value_heads // key_heads
    shape = (batch, key_heads, ratio * V, K)  # the value heads of one key head are one matrix
    S = S * torch.exp(g)[..., None, None]
    with full_fp32():
        seen = torch.matmul(S.view(shape), k.float().unsqueeze(-1)).view(batch, value_heads, V)
    u = (v.float() - seen) * beta.unsqueeze(-1)
    # u and k carry the strides of v and k, which may be any.
    S = S + (u.reshape(batch, key_heads, ratio * V, 1) * k.float().unsqueeze(-2)).reshape(S.shape)
    with full_fp32():
        o = torch.matmul(S.view(shape), q.float().unsqueeze(-1)).view(batch, value_heads, V)
    return S, o * scale, u


def _recur(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, rows: Tensor, live: Tensor, scale: float
) -> Tensor:
    """One token a sequence from and to pool rows; returns o [B, Hv, V] fp32, zeros where not live."""
    parts = [torch.zeros(0, *v.shape[1:], dtype=torch.float32, device=v.device)]
    for i0, i1 in blocks(state, rows.shape[0]):
        cut = slice(i0, i1)
        S = gather(state, rows[cut], live[cut], torch.float32)
        S, o, _ = step(S, q[cut], k[cut], v[cut], g[cut], beta[cut], scale)
        scatter(state, rows[cut], live[cut], S)
        parts.append(torch.where(live[cut, None, None], o, 0.0))
    return torch.cat(parts)


def store(out: Tensor, o: Tensor, live: Tensor, zero_padding: bool) -> None:
    padding = 0 if zero_padding else out
    out.copy_(torch.where(live.view(-1, 1, 1), o.to(out.dtype), padding))


def decode(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, state: Tensor,
    state_indices: Tensor, scale: float, use_qk_l2norm: bool, null_index: int, padding: str, out: Tensor,
    zero_padding: bool,
) -> None:  # fmt: skip
    """See gdn_plugin.ops.decode."""
    if use_qk_l2norm:
        q, k = l2_norm(q), l2_norm(k)
    g, beta = gates(a, b, A_log, dt_bias)
    rows = state_indices.long()
    live = rows > null_index
    store(out, _recur(q, k, v, g, beta, state, rows, live, scale), live, zero_padding)


def fused_decode(
    mixed_qkv: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, conv_state: Tensor, a: Tensor, b: Tensor,
    A_log: Tensor, dt_bias: Tensor, state: Tensor, state_indices: Tensor, num_k_heads: int, head_k_dim: int,
    head_v_dim: int, scale: float, z: Tensor | None, norm_weight: Tensor | None, norm_eps: float, gate: str,
    null_index: int, out: Tensor, zero_padding: bool,
) -> None:  # fmt: skip
    """See gdn_plugin.ops.fused_decode."""
    reach = conv_weight.shape[1] - 1
    rows = state_indices.long()
    live = rows > null_index
    recent = conv_state[:, :, :reach]
    history = gather(recent, rows, live, conv_state.dtype)  # [B, dim, W-1]
    inputs = torch.cat((history, mixed_qkv.unsqueeze(-1)), dim=2)
    scatter(recent, rows, live, inputs[:, :, 1:])
    x = (inputs.float() * conv_weight).sum(-1)
    if conv_bias is not None:
        x += conv_bias
    q, k, v = _split(silu(x).to(mixed_qkv.dtype), num_k_heads, head_k_dim, head_v_dim)
    g, beta = gates(a, b, A_log, dt_bias)
    o = _recur(q, k, v, g, beta, state, rows, live, scale)
    if z is not None and norm_weight is not None:
        o = norm_and_gate(o.to(mixed_qkv.dtype), z, norm_weight, norm_eps, gate)
    store(out, o, live, zero_padding)


def verify(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, state: Tensor,
    state_indices: Tensor, num_accepted_tokens: Tensor, cu_seqlens: Tensor, start_rows: Tensor | None, scale: float,
    use_qk_l2norm: bool, null_index: int, padding: str, out: Tensor, zero_padding: bool,
) -> None:  # fmt: skip
    """See gdn_plugin.ops.verify. One vectorised step a token slot: S of them, whatever the lengths are."""
    if q.shape[0] == 0:
        return
    if use_qk_l2norm:
        q, k = l2_norm(q), l2_norm(k)
    g, beta = gates(a, b, A_log, dt_bias)
    tokens, slots = q.shape[0], state_indices.shape[1]
    rows, offsets = state_indices.long(), cu_seqlens.long()
    starts, lens = offsets[:-1], offsets.diff()
    if start_rows is None:
        origin = rows.gather(1, (num_accepted_tokens.long() - 1).clamp(0, slots - 1)[:, None]).squeeze(1)
    else:
        origin = start_rows.long()
    live = (origin > null_index) & (lens > 0)
    result = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    written = torch.zeros(tokens, dtype=torch.bool, device=out.device)
    for i0, i1 in blocks(state, rows.shape[0]):
        cut = slice(i0, i1)
        S = gather(state, origin[cut], live[cut], torch.float32)
        for t in range(slots):
            here = live[cut] & (t < lens[cut])
            token = torch.where(here, starts[cut] + t, 0)
            S, o, _ = step(S, q[token], k[token], v[token], g[token], beta[token], scale)
            scatter(state, rows[cut, t], here & (rows[cut, t] > null_index), S)
            scatter(result, token, here, o)
            scatter(written, token, here, here)
    store(out, result, written, zero_padding)


def fused_verify(
    mixed_qkv: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, conv_state: Tensor, a: Tensor, b: Tensor,
    A_log: Tensor, dt_bias: Tensor, state: Tensor, state_indices: Tensor, num_accepted_tokens: Tensor,
    cu_seqlens: Tensor, num_k_heads: int, head_k_dim: int, head_v_dim: int, has_initial_state: Tensor | None,
    start_rows: Tensor | None, scale: float, z: Tensor | None, norm_weight: Tensor | None, norm_eps: float, gate: str,
    null_index: int, out: Tensor, zero_padding: bool,
) -> None:  # fmt: skip
    """See gdn_plugin.ops.fused_verify. Its three ops in turn; a fresh sequence starts from its first row, zeroed."""
    first = state_indices[:, 0]
    if start_rows is None:
        accepted = (num_accepted_tokens.long() - 1).clamp(0, state_indices.shape[1] - 1)
        start_rows = state_indices.gather(1, accepted[:, None]).squeeze(1)
    if has_initial_state is not None:
        start_rows = torch.where(has_initial_state, start_rows, first)
    padding = (first <= null_index) | (start_rows <= null_index)
    start_rows = torch.where(padding, null_index, start_rows)
    tokens, value_heads = a.shape
    new = mixed_qkv.new_empty
    q, k = new(tokens, num_k_heads, head_k_dim), new(tokens, num_k_heads, head_k_dim)
    v, o = new(tokens, value_heads, head_v_dim), new(tokens, value_heads, head_v_dim)
    g, beta = (torch.empty(tokens, value_heads, dtype=torch.float32, device=a.device) for _ in range(2))
    conv_prologue(
        mixed_qkv, conv_weight, conv_bias, conv_state, torch.where(padding, null_index, first), cu_seqlens,
        has_initial_state, num_accepted_tokens, a, b, A_log, dt_bias, state, num_k_heads, head_k_dim, head_v_dim, False,
        null_index, q, k, v, g, beta,
    )  # fmt: skip
    verify(
        q, k, v, a, b, A_log, dt_bias, state, state_indices, num_accepted_tokens, cu_seqlens, start_rows, scale, False,
        null_index, "any", o, True,
    )  # fmt: skip
    result = o.float() if z is None or norm_weight is None else norm_and_gate(o, z, norm_weight, norm_eps, gate)
    owner = torch.searchsorted(cu_seqlens.long(), torch.arange(tokens, device=a.device), right=True) - 1
    real = owner < padding.shape[0]
    store(out, result, real & ~padding[torch.where(real, owner, 0)], zero_padding)


CONV_PROLOGUE = BackendOp(conv_prologue)
DECODE = BackendOp(decode)
FUSED_DECODE = BackendOp(fused_decode)
VERIFY = BackendOp(verify)
FUSED_VERIFY = BackendOp(fused_verify)
