"""Arguments as a decode step usually brings them: a few conditions that together imply every check of `validate`.

A decode step of one sequence takes the kernel 20 microseconds on a CPU, and as long again were it checked argument by
argument with a message ready for each. These functions only say whether nothing can be wrong; where they do not know
(False), `validate` finds out, and words it. They read metadata alone and keep nothing between calls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gdn_plugin.ops.validate import GATES, IO_DTYPES, STATE_DTYPES

_FP32, _INT32 = torch.float32, torch.int32


def _gates(
    a: Any, b: Any, A_log: Any, dt_bias: Any, tokens: int, heads: int, io: torch.dtype, device: torch.device
) -> bool:
    by_token, by_head = (tokens, heads), (heads,)
    return (
        isinstance(a, Tensor)
        and isinstance(b, Tensor)
        and isinstance(A_log, Tensor)
        and isinstance(dt_bias, Tensor)
        and a.shape == by_token
        and b.shape == by_token
        and ((dtype := a.dtype) is io or dtype is _FP32)
        and ((dtype := b.dtype) is io or dtype is _FP32)
        and a.stride()[1] == 1
        and b.stride()[1] == 1
        and A_log.shape == by_head
        and dt_bias.shape == by_head
        and A_log.dtype is _FP32
        and ((dtype := dt_bias.dtype) is io or dtype is _FP32)
        and A_log.is_contiguous()
        and dt_bias.is_contiguous()
        and a.device == device
        and b.device == device
        and A_log.device == device
        and dt_bias.device == device
    )


def _pool(
    state: Any, state_indices: Any, null_index: Any, tokens: int, heads: int, V: int, K: int, device: torch.device
) -> bool:
    if not (isinstance(state, Tensor) and isinstance(state_indices, Tensor) and type(null_index) is int):
        return False
    size, stride = state.shape, state.stride()
    return (
        len(size) == 4
        and size[1] == heads
        and size[2] == V
        and size[3] == K
        and stride[3] == 1
        and stride[2] == K
        and stride[1] == V * K
        and stride[0] >= heads * V * K
        and state.dtype in STATE_DTYPES
        and state_indices.shape == (tokens,)
        and state_indices.dtype is _INT32
        and -1 <= null_index < 2**31
        and state.device == device
        and state_indices.device == device
    )


def _rows(x: Any, shape: tuple[int, ...], io: torch.dtype, device: torch.device) -> bool:
    """[T, heads, dim] with a dense last dim."""
    return isinstance(x, Tensor) and x.shape == shape and x.dtype is io and x.stride()[2] == 1 and x.device == device


def _out(out: Any, shape: tuple[int, ...], io: torch.dtype, device: torch.device) -> bool:
    return out is None or (
        isinstance(out, Tensor)
        and out.shape == shape
        and out.dtype is io
        and out.is_contiguous()
        and out.device == device
    )


def decode(
    q: Any, k: Any, v: Any, a: Any, b: Any, A_log: Any, dt_bias: Any, state: Any, state_indices: Any,
    use_qk_l2norm: Any, null_index: Any, out: Any,
) -> bool:  # fmt: skip
    """Whether `validate.decode` would find nothing; False where this does not know."""
    if not (isinstance(q, Tensor) and isinstance(v, Tensor)):
        return False
    shape, values, io, device = q.shape, v.shape, q.dtype, q.device
    if len(shape) != 3 or len(values) != 3 or io not in IO_DTYPES:
        return False
    tokens, key_heads, K = shape
    own, heads, V = values
    return (
        own == tokens
        and key_heads > 0
        and heads > 0
        and heads % key_heads == 0
        and K > 0
        and V > 0
        and q.stride()[2] == 1
        and _rows(k, shape, io, device)
        and _rows(v, values, io, device)
        and (use_qk_l2norm is True or use_qk_l2norm is False)
        and _gates(a, b, A_log, dt_bias, tokens, heads, io, device)
        and _pool(state, state_indices, null_index, tokens, heads, V, K, device)
        and _out(out, values, io, device)
    )


def fused_decode(
    mixed_qkv: Any, conv_weight: Any, conv_bias: Any, conv_state: Any, a: Any, b: Any, A_log: Any, dt_bias: Any,
    state: Any, state_indices: Any, num_k_heads: Any, head_k_dim: Any, head_v_dim: Any, z: Any, norm_weight: Any,
    norm_eps: Any, gate: Any, null_index: Any, out: Any,
) -> bool:  # fmt: skip
    """Whether `validate.fused_decode` would find nothing; False where this does not know."""
    if not (isinstance(mixed_qkv, Tensor) and isinstance(a, Tensor) and type(norm_eps) is float and norm_eps >= 0):
        return False
    if not (type(num_k_heads) is type(head_k_dim) is type(head_v_dim) is int):
        return False
    shape, per_head, io, device = mixed_qkv.shape, a.shape, mixed_qkv.dtype, mixed_qkv.device
    if len(shape) != 2 or len(per_head) != 2 or io not in IO_DTYPES:
        return False
    tokens, dim = shape
    heads = per_head[1]
    rows = (tokens, heads, head_v_dim)
    return (
        num_k_heads > 0
        and head_k_dim > 0
        and head_v_dim > 0
        and heads > 0
        and heads % num_k_heads == 0
        and dim == 2 * num_k_heads * head_k_dim + heads * head_v_dim
        and mixed_qkv.stride()[1] == 1
        and _convolution(conv_weight, conv_bias, conv_state, dim, io, device)
        and _gates(a, b, A_log, dt_bias, tokens, heads, io, device)
        and _pool(state, state_indices, null_index, tokens, heads, head_v_dim, head_k_dim, device)
        and _norm(z, norm_weight, rows, head_v_dim, io, device)
        and gate in GATES
        and _out(out, rows, io, device)
    )


def _convolution(weight: Any, bias: Any, conv_state: Any, dim: int, io: torch.dtype, device: torch.device) -> bool:
    if bias is not None or not (isinstance(weight, Tensor) and isinstance(conv_state, Tensor)):
        return False
    taps, size, stride = weight.shape, conv_state.shape, conv_state.stride()
    if len(taps) != 2 or len(size) != 3:
        return False
    width, columns = taps[1], size[2]
    return (
        taps[0] == size[1] == dim
        and 2 <= width <= 8
        and columns >= width - 1
        and ((stride[1] == 1 and stride[2] >= dim) or (stride[2] == 1 and stride[1] >= columns))
        and stride[0] >= dim * columns
        and ((dtype := weight.dtype) is io or dtype is _FP32)
        and conv_state.dtype in IO_DTYPES
        and weight.device == device
        and conv_state.device == device
    )


def _norm(z: Any, weight: Any, rows: tuple[int, ...], V: int, io: torch.dtype, device: torch.device) -> bool:
    if z is None or weight is None:
        return z is weight
    return (
        _rows(z, rows, io, device)
        and isinstance(weight, Tensor)
        and weight.shape == (V,)
        and ((dtype := weight.dtype) is io or dtype is _FP32)
        and weight.is_contiguous()
        and weight.device == device
    )
