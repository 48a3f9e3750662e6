"""Backend `reference`: the recurrence written down as it reads, a plain loop over sequences and tokens.

It is every test's truth and is meant to be read, not to be fast: it synchronises with the device, runs anywhere, and
"auto" never chooses it. Formulas: Yang et al., "Gated Delta Networks", arXiv:2412.06464, section 3; per value head,

    S <- exp(g_t) * S;    S <- S + beta_t * (v_t - S k_t) k_t^T;    o_t = scale * S q_t

All arithmetic is in `compute_dtype`: fp32, or fp64 on request. Values that the contract rounds (q and k behind the
norm, SiLU outputs, o before the gated norm) are rounded to the io dtype in both modes. Results are cast to whatever
dtype the buffers have, so a caller who hands fp64 pools and outputs gets the fp64 truth.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from gdn_plugin.registry import BackendOp

L2_NORM_EPS = 1e-6


def l2_norm(x: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """x * rsqrt(sum(x^2) + 1e-6) over the last dim, computed in `compute_dtype`, rounded to x's dtype."""
    y = x.to(compute_dtype)
    return (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + L2_NORM_EPS)).to(x.dtype)


def gates(
    a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, compute_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """(g, beta): g = -exp(A_log) * softplus(a + dt_bias), the natural log of the decay, and beta = sigmoid(b)."""
    g = -torch.exp(A_log.to(compute_dtype)) * softplus(a.to(compute_dtype) + dt_bias.to(compute_dtype))
    return g, torch.sigmoid(b.to(compute_dtype))


def norm_and_gate(x: Tensor, z: Tensor, weight: Tensor, eps: float, gate: str, compute_dtype: torch.dtype) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight * gate(z) over the last dim."""
    x, z = x.to(compute_dtype), z.to(compute_dtype)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(compute_dtype)
    return x * (silu(z) if gate == "silu" else torch.sigmoid(z))


def repeat_heads(x: Tensor, value_heads: int) -> Tensor:
    """[Hk, K] -> [Hv, K]: value head h reads key head h // (Hv // Hk)."""
    return x.repeat_interleave(value_heads // x.shape[0], 0)


def _step(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One token: S [Hv, V, K], q and k [Hk, K], v [Hv, V], g and beta [Hv], all in S's dtype. Returns (S, o)."""
    k, q = repeat_heads(k, v.shape[0]).unsqueeze(1), repeat_heads(q, v.shape[0]).unsqueeze(1)
    S = torch.exp(g)[:, None, None] * S
    delta = beta[:, None] * (v - (S * k).sum(-1))  # no matmul: its precision is a setting of the caller's
    S = S + delta.unsqueeze(-1) * k
    return S, scale * (S * q).sum(-1)


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, use_qk_l2norm: bool, compute_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    if use_qk_l2norm:
        q, k = l2_norm(q, compute_dtype), l2_norm(k, compute_dtype)
    return q.to(compute_dtype), k.to(compute_dtype), v.to(compute_dtype)


def conv_prologue(
    mixed_qkv: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, conv_state: Tensor, state_indices: Tensor,
    cu_seqlens: Tensor, has_initial_state: Tensor | None, num_accepted_tokens: Tensor | None, a: Tensor, b: Tensor,
    A_log: Tensor, dt_bias: Tensor, state: Tensor | None, num_k_heads: int, head_k_dim: int, head_v_dim: int,
    exp_gate: bool, null_index: int, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *,
    compute_dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    """Causal depthwise conv + SiLU + split + L2 norm + gates; updates conv_state, zeroes fresh rows of `state`."""
    io = mixed_qkv.dtype
    width = conv_weight.shape[1]
    weight = conv_weight.to(compute_dtype)
    bias = torch.zeros_like(weight[:, 0]) if conv_bias is None else conv_bias.to(compute_dtype)
    key_dim = num_k_heads * head_k_dim
    offsets, rows = cu_seqlens.tolist(), state_indices.tolist()

    for x in (q, k, v, beta):
        x.zero_()  # what padding tokens and those of padding sequences hold at the end
    g.fill_(1.0 if exp_gate else 0.0)

    for i, row in enumerate(rows):
        start, end = offsets[i], offsets[i + 1]
        if row <= null_index or start == end:
            continue
        fresh = has_initial_state is not None and not bool(has_initial_state[i])
        first = 0 if num_accepted_tokens is None else max(int(num_accepted_tokens[i]) - 1, 0)
        if fresh:
            history = torch.zeros_like(weight[:, : width - 1])
        else:
            history = conv_state[row, :, first : first + width - 1].to(compute_dtype)
        inputs = torch.cat((history, mixed_qkv[start:end].to(compute_dtype).transpose(0, 1)), dim=1)
        conv = (inputs.unfold(1, width, 1) * weight[:, None, :]).sum(-1) + bias[:, None]  # [dim, L]
        x = silu(conv).to(io).transpose(0, 1)  # [L, dim]
        length = end - start
        q[start:end] = l2_norm(x[:, :key_dim].reshape(length, num_k_heads, head_k_dim), compute_dtype)
        k[start:end] = l2_norm(x[:, key_dim : 2 * key_dim].reshape(length, num_k_heads, head_k_dim), compute_dtype)
        v[start:end] = x[:, 2 * key_dim :].reshape(length, -1, head_v_dim)
        log_decay, strength = gates(a[start:end], b[start:end], A_log, dt_bias, compute_dtype)
        g[start:end] = torch.exp(log_decay) if exp_gate else log_decay
        beta[start:end] = strength
        if num_accepted_tokens is None:
            conv_state[row, :, : width - 1] = inputs[:, -(width - 1) :]
        else:  # the next step may accept any prefix of these tokens, so all of them stay, behind W-2 older ones
            conv_state[row, :, : width - 2 + length] = inputs[:, 1:]
        if state is not None and fresh:
            state[row] = 0


def prefill(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, state_indices: Tensor,
    cu_seqlens: Tensor, has_initial_state: Tensor | None, scale: float, use_qk_l2norm: bool, exp_gate: bool,
    max_seqlen: int, null_index: int, padding: str, out: Tensor, checkpoints: Tensor | None,
    checkpoint_cu_starts: Tensor | None, checkpoint_every: int, zero_padding: bool, *,
    compute_dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    """The recurrence over packed sequences; final states land in their pool rows."""
    if zero_padding:
        out.zero_()
    q, k, v = _prepare(q, k, v, use_qk_l2norm, compute_dtype)
    log_decay = torch.log(g.to(compute_dtype)) if exp_gate else g.to(compute_dtype)
    strength = beta.to(compute_dtype)
    offsets, rows = cu_seqlens.tolist(), state_indices.tolist()
    for i, row in enumerate(rows):
        start, end = offsets[i], offsets[i + 1]
        if row <= null_index or start == end:
            continue
        fresh = has_initial_state is not None and not bool(has_initial_state[i])
        S = torch.zeros_like(state[row], dtype=compute_dtype) if fresh else state[row].to(compute_dtype)
        for t in range(start, end):
            S, out[t] = _step(S, q[t], k[t], v[t], log_decay[t], strength[t], scale)
            done = t - start + 1
            if checkpoints is not None and checkpoint_cu_starts is not None and done % checkpoint_every == 0:
                checkpoints[int(checkpoint_cu_starts[i]) + done // checkpoint_every - 1] = S
        state[row] = S


def decode(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, state: Tensor,
    state_indices: Tensor, scale: float, use_qk_l2norm: bool, null_index: int, padding: str, out: Tensor,
    zero_padding: bool, *, compute_dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    """One token a sequence."""
    if zero_padding:
        out.zero_()
    q, k, v = _prepare(q, k, v, use_qk_l2norm, compute_dtype)
    log_decay, strength = gates(a, b, A_log, dt_bias, compute_dtype)
    for i, row in enumerate(state_indices.tolist()):
        if row <= null_index:
            continue
        state[row], out[i] = _step(state[row].to(compute_dtype), q[i], k[i], v[i], log_decay[i], strength[i], scale)


def fused_decode(
    mixed_qkv: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, conv_state: Tensor, a: Tensor, b: Tensor,
    A_log: Tensor, dt_bias: Tensor, state: Tensor, state_indices: Tensor, num_k_heads: int, head_k_dim: int,
    head_v_dim: int, scale: float, z: Tensor | None, norm_weight: Tensor | None, norm_eps: float, gate: str,
    null_index: int, out: Tensor, zero_padding: bool, *, compute_dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    """conv_prologue, decode and the gated RMSNorm for one token a sequence, in that order."""
    batch, value_heads = a.shape
    new = mixed_qkv.new_empty
    q, k = new(batch, num_k_heads, head_k_dim), new(batch, num_k_heads, head_k_dim)
    v = new(batch, value_heads, head_v_dim)
    g, beta = (torch.empty(batch, value_heads, dtype=compute_dtype, device=a.device) for _ in range(2))
    one_each = torch.arange(batch + 1, dtype=torch.int32, device=a.device)
    conv_prologue(
        mixed_qkv, conv_weight, conv_bias, conv_state, state_indices, one_each, None, None, a, b, A_log, dt_bias, None,
        num_k_heads, head_k_dim, head_v_dim, False, null_index, q, k, v, g, beta, compute_dtype=compute_dtype,
    )  # fmt: skip
    o = torch.zeros(batch, value_heads, head_v_dim, dtype=compute_dtype, device=a.device)
    decode(
        q, k, v, a, b, A_log, dt_bias, state, state_indices, scale, False, null_index, "any", o, True,
        compute_dtype=compute_dtype,
    )  # fmt: skip
    if z is not None and norm_weight is not None:
        o = norm_and_gate(o.to(mixed_qkv.dtype), z, norm_weight, norm_eps, gate, compute_dtype)
    for i, row in enumerate(state_indices.tolist()):
        if row > null_index:
            out[i] = o[i]
        elif zero_padding:
            out[i] = 0


def verify(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, state: Tensor,
    state_indices: Tensor, num_accepted_tokens: Tensor, cu_seqlens: Tensor, start_rows: Tensor | None, scale: float,
    use_qk_l2norm: bool, null_index: int, padding: str, out: Tensor, zero_padding: bool, *,
    compute_dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    """Speculative tokens: starts from row state_indices[i, n_i - 1], writes the state after token t to row [i, t].

    With start_rows a sequence starts from start_rows[i]. A sequence whose start row is padding is padding; a single row
    to be written that is padding is skipped.
    """
    if zero_padding:
        out.zero_()
    q, k, v = _prepare(q, k, v, use_qk_l2norm, compute_dtype)
    log_decay, strength = gates(a, b, A_log, dt_bias, compute_dtype)
    offsets, rows = cu_seqlens.tolist(), state_indices.tolist()
    for i, own in enumerate(rows):
        start, end = offsets[i], offsets[i + 1]
        if start == end:
            continue
        origin = own[max(int(num_accepted_tokens[i]) - 1, 0)] if start_rows is None else int(start_rows[i])
        if origin <= null_index:
            continue
        S = state[origin].to(compute_dtype)
        for t in range(start, end):
            S, out[t] = _step(S, q[t], k[t], v[t], log_decay[t], strength[t], scale)
            if own[t - start] > null_index:
                state[own[t - start]] = S


def fused_verify(
    mixed_qkv: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, conv_state: Tensor, a: Tensor, b: Tensor,
    A_log: Tensor, dt_bias: Tensor, state: Tensor, state_indices: Tensor, num_accepted_tokens: Tensor,
    cu_seqlens: Tensor, num_k_heads: int, head_k_dim: int, head_v_dim: int, has_initial_state: Tensor | None,
    start_rows: Tensor | None, scale: float, z: Tensor | None, norm_weight: Tensor | None, norm_eps: float, gate: str,
    null_index: int, out: Tensor, zero_padding: bool, *, compute_dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    """conv_prologue, verify and the gated RMSNorm for each sequence in turn.

    A sequence whose first row, or the row that it would start from, is padding is padding.
    """
    if zero_padding:
        out.zero_()
    offsets = cu_seqlens.tolist()
    for i, own in enumerate(state_indices.tolist()):
        start, end = offsets[i], offsets[i + 1]
        here, one = slice(start, end), slice(i, i + 1)
        fresh = has_initial_state is not None and not bool(has_initial_state[i])
        if start == end or own[0] <= null_index:
            continue
        if fresh:
            origin = own[0]
        else:
            origin = own[max(int(num_accepted_tokens[i]) - 1, 0)] if start_rows is None else int(start_rows[i])
        if origin <= null_index:
            continue
        length, value_heads = end - start, a.shape[1]
        q, k = (mixed_qkv.new_empty(length, num_k_heads, head_k_dim) for _ in range(2))
        v = mixed_qkv.new_empty(length, value_heads, head_v_dim)
        g, beta = (torch.empty(length, value_heads, dtype=compute_dtype, device=a.device) for _ in range(2))
        conv_prologue(
            mixed_qkv[here], conv_weight, conv_bias, conv_state, state_indices[one, 0], cu_seqlens[i : i + 2] - start,
            None if has_initial_state is None else has_initial_state[one], num_accepted_tokens[one], a[here], b[here],
            A_log, dt_bias, None, num_k_heads, head_k_dim, head_v_dim, False, null_index, q, k, v, g, beta,
            compute_dtype=compute_dtype,
        )  # fmt: skip
        S = torch.zeros_like(state[own[0]], dtype=compute_dtype) if fresh else state[origin].to(compute_dtype)
        o = torch.empty(length, value_heads, head_v_dim, dtype=compute_dtype, device=a.device)
        q, k, v = (x.to(compute_dtype) for x in (q, k, v))
        for t in range(length):
            S, o[t] = _step(S, q[t], k[t], v[t], g[t], beta[t], scale)
            if own[t] > null_index:
                state[own[t]] = S
        if z is not None and norm_weight is not None:
            o = norm_and_gate(o.to(mixed_qkv.dtype), z[here], norm_weight, norm_eps, gate, compute_dtype)
        out[here] = o


def gated_norm(
    x: Tensor, z: Tensor, weight: Tensor, eps: float, gate: str, out: Tensor, *,
    compute_dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    """RMSNorm of x times gate(z); `out` may be x."""
    out.copy_(norm_and_gate(x, z, weight, eps, gate, compute_dtype))


CONV_PROLOGUE = BackendOp(conv_prologue)
PREFILL = BackendOp(prefill)
DECODE = BackendOp(decode)
FUSED_DECODE = BackendOp(fused_decode)
VERIFY = BackendOp(verify)
FUSED_VERIFY = BackendOp(fused_verify)
GATED_NORM = BackendOp(gated_norm)
