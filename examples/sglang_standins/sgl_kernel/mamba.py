"""Stands in for SGLang's compiled GDN kernels on a CPU: the recurrence, one token after the other.

Written apart from gdn_plugin, which is compared with it. Rows below 0 are padding.
"""

import functools
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d_fn_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    conv_states: Tensor,
    has_initial_state: Tensor,
    cache_indices: Tensor,
    query_start_loc: Tensor,
    seq_lens_cpu: Any,
    **unused: Any,
) -> Tensor:
    """x [dim, T] packed; conv_states [N, dim, W-1] holds the last inputs of each sequence."""
    out, starts = torch.zeros_like(x), query_start_loc.tolist()
    for i, row in enumerate(cache_indices.tolist()):
        tokens = slice(starts[i], starts[i + 1])
        if row < 0 or tokens.start == tokens.stop:
            continue
        before = conv_states[row] if has_initial_state[i] else torch.zeros_like(conv_states[row])
        inputs = torch.cat([before.to(x.dtype), x[:, tokens]], dim=1)
        out[:, tokens] = _conv(inputs, weight, bias).to(x.dtype)
        conv_states[row] = inputs[:, 1 - weight.shape[1] :].to(conv_states.dtype)
    return out


def causal_conv1d_update_cpu(
    x: Tensor, conv_states: Tensor, weight: Tensor, bias: Tensor | None, activation: str, conv_state_indices: Tensor
) -> Tensor:
    """x [B, dim], one token a sequence."""
    out = torch.zeros_like(x)
    for i, row in enumerate(conv_state_indices.tolist()):
        if row < 0:
            continue
        inputs = torch.cat([conv_states[row].to(x.dtype), x[i][:, None]], dim=1)
        out[i] = _conv(inputs, weight, bias)[:, 0].to(x.dtype)
        conv_states[row] = inputs[:, 1:].to(conv_states.dtype)
    return out


def chunk_gated_delta_rule_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor,
    head_first: bool,
    use_qk_l2norm_in_kernel: bool,
    initial_state_indices: Tensor,
    **unused: Any,
) -> tuple[Tensor, None, None]:
    """q, k [1, T, Hk, K], v [1, T, Hv, V], g and beta [1, T, Hv]; rows of initial_state [N, Hv, V, K] move on."""
    _say_once()
    out, starts = torch.zeros_like(v), cu_seqlens.tolist()
    ratio = v.shape[2] // q.shape[2]
    q = (_l2(q[0]) * q.shape[-1] ** -0.5).repeat_interleave(ratio, 1)
    k = _l2(k[0]).repeat_interleave(ratio, 1)
    decay, beta, values = g[0].float().exp(), beta[0].float(), v[0].float()
    for i, row in enumerate(initial_state_indices.tolist()):
        if row < 0:
            continue
        state = initial_state[row].float()
        for t in range(starts[i], starts[i + 1]):
            state = state * decay[t][:, None, None]
            update = beta[t][:, None] * (values[t] - torch.einsum("hvk,hk->hv", state, k[t]))
            state = state + update[:, :, None] * k[t][:, None, :]
            out[0, t] = torch.einsum("hvk,hk->hv", state, q[t]).to(v.dtype)
        initial_state[row] = state.to(initial_state.dtype)
    return out, None, None


def fused_gdn_gating_cpu(A_log: Tensor, a: Tensor, b: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    g = -A_log.float().exp() * F.softplus(a.float() + dt_bias.float())
    return g[None], torch.sigmoid(b.float())[None]


def fused_sigmoid_gating_delta_rule_update_cpu(
    *,
    A_log: Tensor,
    dt_bias: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state_source: Tensor,
    initial_state_indices: Tensor,
    cu_seqlens: Tensor,
    **unused: Any,
) -> Tensor:
    g, beta = fused_gdn_gating_cpu(A_log, a, b, dt_bias)
    pool, rows = initial_state_source, initial_state_indices
    return chunk_gated_delta_rule_cpu(q, k, v, g, beta, pool, cu_seqlens, False, True, rows)[0]


@functools.cache
def _say_once() -> None:
    print("sglang_standins: the stand-in's recurrence serves", file=sys.stderr, flush=True)


def _conv(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """SiLU of the causal convolution of [dim, W-1 + T]: [dim, T]."""
    windows = inputs.float().unfold(1, weight.shape[1], 1)
    y = torch.einsum("dtw,dw->dt", windows, weight.float())
    return F.silu(y if bias is None else y + bias.float()[:, None])


def _l2(x: Tensor) -> Tensor:
    return x.float() * torch.rsqrt(x.float().square().sum(-1, keepdim=True) + 1e-6)
