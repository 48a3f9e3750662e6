"""Argument checks of the public ops: metadata only, before anything is written, readable when they fail.

Every message names the op and the argument, says what was expected and what came. Nothing here looks at a tensor's
values: a range or uniqueness check would copy from the device. Those are in `debug`, under GDN_PLUGIN_DEBUG=1.

The functions are also what torch.compile traces, so they compare sizes and strides and do nothing cleverer.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

IO_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STATE_DTYPES = (torch.float32, torch.bfloat16)
INDEX = (torch.int32,)
OFFSETS = (torch.int32, torch.int64)
FP32 = (torch.float32,)
BOOL = (torch.bool,)
GATES = ("silu", "sigmoid")
CHUNK = 64
# Where a size, dtype or device was read from: messages name it beside the argument that differs from it.
_SIZES = "Hk, K, V as num_k_heads, head_k_dim, head_v_dim; Hv of a"
_PACKED, _SPLIT = "Hv of a; K, V as head_k_dim, head_v_dim", "Hv, V of v; K of q"
_BY_Q, _BY_MIXED = "[T, Hv] (T of q, Hv of v)", "[T, Hv] (T of mixed_qkv, Hv of a)"
_TOKENS_HEADS = {
    "conv_prologue": _BY_MIXED, "prefill": _BY_Q, "decode": _BY_Q, "fused_decode": _BY_MIXED, "verify": _BY_Q
}  # fmt: skip
_HEADS = {"conv_prologue": _PACKED, "prefill": _SPLIT, "decode": _SPLIT, "fused_decode": _PACKED, "verify": _SPLIT}
_PER_HEAD = {op: f"[Hv] ({origin})" for op, origin in _HEADS.items()}
LEAD = {"conv_prologue": "mixed_qkv", "prefill": "q", "decode": "q", "fused_decode": "mixed_qkv", "verify": "q"}


def fail(op: str, name: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"gdn.{op}: {name}: expected {expected}, got {got}")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)


def _shape_of(x: Any) -> str:
    return f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"{type(x).__name__} {x!r}"


def _tensor(op: str, name: str, x: Any, rank: int, dtypes: tuple[torch.dtype, ...], like: Tensor | None) -> None:
    """Type, rank, dtype and device."""
    if not isinstance(x, Tensor):
        fail(op, name, "a tensor", f"{type(x).__name__} {x!r}")
    if x.dim() != rank:
        fail(op, name, f"{rank} dimensions", f"shape {tuple(x.shape)}")
    if x.dtype not in dtypes:
        beside = "" if like is None else f" ({LEAD[op]} is {_names((like.dtype,))})"
        fail(op, name, _names(dtypes) + beside, _names((x.dtype,)))
    if like is not None and x.device != like.device:
        fail(op, name, f"a tensor on {like.device}, as {LEAD[op]} is", str(x.device))


def _sized(
    op: str, name: str, x: Any, shape: tuple[int, ...], dims: str, dtypes: tuple[torch.dtype, ...], like: Tensor | None
) -> None:
    """`_tensor`, and the exact size, which `dims` spells in letters."""
    if isinstance(x, Tensor) and x.shape == shape and x.dtype in dtypes and (like is None or x.device == like.device):
        return  # the usual case, in one step: this runs on every call
    _tensor(op, name, x, len(shape), dtypes, like)
    if x.shape != shape:
        fail(op, name, f"shape {dims} = {tuple(shape)}", tuple(x.shape))


def _inner_one(op: str, name: str, x: Tensor) -> None:
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        fail(op, name, "last stride 1", f"strides {x.stride()} for shape {tuple(x.shape)}")


def _contiguous(op: str, name: str, x: Tensor) -> None:
    if not x.is_contiguous():
        fail(op, name, "a contiguous tensor", f"strides {x.stride()} for shape {tuple(x.shape)}")


def _integer(op: str, name: str, x: Any, minimum: int) -> None:
    if isinstance(x, bool) or not isinstance(x, (int, torch.SymInt)):
        fail(op, name, f"an int >= {minimum}", f"{type(x).__name__} {x!r}")
    if x < minimum:
        fail(op, name, f"an int >= {minimum}", x)
    if x >= 2**31:  # kernels take it in 32 bits
        fail(op, name, "an int below 2**31", x)


def _flag(op: str, name: str, x: Any) -> None:
    if not isinstance(x, bool):
        fail(op, name, "a bool", f"{type(x).__name__} {x!r}")


def scale(op: str, value: Any, head_k_dim: int) -> float:
    """The scale to use: K^-0.5 where None was given (0.0 is a scale)."""
    if value is None:
        return float(head_k_dim) ** -0.5
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        fail(op, "scale", "a number or None", f"{type(value).__name__} {value!r}")
    return float(value)


def backend(op: str, value: Any) -> None:
    if value is not None and not isinstance(value, str):
        fail(op, "backend", "the name of a backend or None", f"{type(value).__name__} {value!r}")


def _qkv(op: str, q: Any, k: Any, v: Any) -> tuple[int, int, int, int, int]:
    """T, Hk, Hv, K, V of q, k [T, Hk, K] and v [T, Hv, V]; last strides 1, other strides any."""
    _tensor(op, "q", q, 3, IO_DTYPES, None)
    tokens, key_heads, key_dim = q.shape
    io = (q.dtype,)
    _sized(op, "k", k, (tokens, key_heads, key_dim), "[T, Hk, K] (of q)", io, q)
    _tensor(op, "v", v, 3, io, q)
    if v.shape[0] != tokens:
        fail(op, "v", f"T = {tokens} tokens, as q has", _shape_of(v))
    if key_heads < 1 or v.shape[1] < 1 or v.shape[1] % key_heads != 0:
        fail(op, "v", f"a multiple of Hk = {key_heads} heads (of q)", _shape_of(v))
    if key_dim < 1 or v.shape[2] < 1:
        fail(op, "q" if key_dim < 1 else "v", "at least one element a head", _shape_of(q if key_dim < 1 else v))
    for name, x in (("q", q), ("k", k), ("v", v)):
        _inner_one(op, name, x)
    return tokens, key_heads, v.shape[1], key_dim, v.shape[2]


def _state(op: str, state: Any, value_heads: int, V: int, K: int, like: Tensor) -> None:
    """[N, Hv, V, K], inner three dims dense, rows apart by any stride that does not make them overlap."""
    _tensor(op, "state", state, 4, STATE_DTYPES, like)
    if state.shape[1:] != (value_heads, V, K):
        fail(op, "state", f"shape [N, Hv, V, K] = [N, {value_heads}, {V}, {K}] ({_HEADS[op]})", tuple(state.shape))
    if state.stride(3) != 1 or state.stride(2) != K or state.stride(1) != V * K:
        fail(op, "state", f"dense rows, strides (any, {V * K}, {K}, 1)", f"strides {state.stride()}")
    if state.shape[0] > 1 and state.stride(0) < value_heads * V * K:
        fail(op, "state", f"rows at least {value_heads * V * K} elements apart", f"strides {state.stride()}")


def _conv_state(op: str, conv_state: Any, dim: int, columns: int, like: Tensor) -> None:
    """[N, dim, W-1 or more], dense in either order of the last two dims."""
    _tensor(op, "conv_state", conv_state, 3, IO_DTYPES, like)
    if conv_state.shape[1] != dim or conv_state.shape[2] < columns:
        fail(op, "conv_state", f"shape [N, {dim}, {columns} or more] (W of conv_weight)", tuple(conv_state.shape))
    width, by_dim, by_column = conv_state.shape[2], conv_state.stride(1), conv_state.stride(2)
    if not ((by_column == 1 and by_dim >= width) or (by_dim == 1 and by_column >= dim)):
        fail(op, "conv_state", "one of its last two strides 1 and no overlap", f"strides {conv_state.stride()}")
    if conv_state.shape[0] > 1 and conv_state.stride(0) < dim * width:
        fail(op, "conv_state", f"rows at least {dim * width} elements apart", f"strides {conv_state.stride()}")


def _indices(op: str, state_indices: Any, null_index: Any, like: Tensor) -> int:
    """B, of state_indices [B] int32 with any stride."""
    _tensor(op, "state_indices", state_indices, 1, INDEX, like)
    _integer(op, "null_index", null_index, -1)
    return state_indices.shape[0]


def _per_sequence(
    op: str, name: str, x: Any, size: int, dims: str, dtypes: tuple[torch.dtype, ...], like: Tensor
) -> None:
    _sized(op, name, x, (size,), dims, dtypes, like)
    _contiguous(op, name, x)


def _gates(op: str, a: Any, b: Any, A_log: Any, dt_bias: Any, tokens: int, value_heads: int, like: Tensor) -> None:
    raw = (like.dtype, torch.float32)
    for name, x in (("a", a), ("b", b)):
        _sized(op, name, x, (tokens, value_heads), _TOKENS_HEADS[op], raw, like)
        _inner_one(op, name, x)
    for name, x, dtypes in (("A_log", A_log, FP32), ("dt_bias", dt_bias, raw)):
        _sized(op, name, x, (value_heads,), _PER_HEAD[op], dtypes, like)
        _contiguous(op, name, x)


def _out(op: str, name: str, out: Any, shape: tuple[int, ...], dims: str, dtype: torch.dtype, like: Tensor) -> None:
    _sized(op, name, out, shape, dims, (dtype,), like)
    _contiguous(op, name, out)


def _conv(
    op: str, mixed_qkv: Any, conv_weight: Any, conv_bias: Any, conv_state: Any, a: Any, num_k_heads: Any, K: Any, V: Any
) -> tuple[int, int]:
    """T and Hv, behind the checks of everything the convolution needs."""
    for name, value in (("num_k_heads", num_k_heads), ("head_k_dim", K), ("head_v_dim", V)):
        _integer(op, name, value, 1)
    _tensor(op, "mixed_qkv", mixed_qkv, 2, IO_DTYPES, None)
    _tensor(op, "a", a, 2, (mixed_qkv.dtype, torch.float32), mixed_qkv)
    tokens, value_heads = mixed_qkv.shape[0], a.shape[1]
    if value_heads < 1 or value_heads % num_k_heads != 0:
        fail(op, "a", f"[T, Hv] with Hv a multiple of num_k_heads = {num_k_heads}", _shape_of(a))
    dim = 2 * num_k_heads * K + value_heads * V
    if mixed_qkv.shape[1] != dim:
        fail(op, "mixed_qkv", f"shape [T, 2*Hk*K + Hv*V] = [T, {dim}] ({_SIZES})", tuple(mixed_qkv.shape))
    _inner_one(op, "mixed_qkv", mixed_qkv)
    weights = (mixed_qkv.dtype, torch.float32)
    _tensor(op, "conv_weight", conv_weight, 2, weights, mixed_qkv)
    if conv_weight.shape[0] != dim or not 2 <= conv_weight.shape[1] <= 8:
        fail(op, "conv_weight", f"shape [{dim}, W] with 2 <= W <= 8 (dim of mixed_qkv)", tuple(conv_weight.shape))
    if conv_bias is not None:
        _sized(op, "conv_bias", conv_bias, (dim,), "[dim]", weights, mixed_qkv)
        _contiguous(op, "conv_bias", conv_bias)
    _conv_state(op, conv_state, dim, conv_weight.shape[1] - 1, mixed_qkv)
    return tokens, value_heads


def conv_prologue(
    mixed_qkv: Any, conv_weight: Any, conv_bias: Any, conv_state: Any, state_indices: Any, cu_seqlens: Any,
    has_initial_state: Any, a: Any, b: Any, A_log: Any, dt_bias: Any, num_k_heads: Any, head_k_dim: Any,
    head_v_dim: Any, state: Any, exp_gate: Any, num_accepted_tokens: Any, null_index: Any, out: Any,
) -> None:  # fmt: skip
    op = "conv_prologue"
    tokens, value_heads = _conv(
        op, mixed_qkv, conv_weight, conv_bias, conv_state, a, num_k_heads, head_k_dim, head_v_dim
    )
    _gates(op, a, b, A_log, dt_bias, tokens, value_heads, mixed_qkv)
    batch = _indices(op, state_indices, null_index, mixed_qkv)
    _per_sequence(op, "cu_seqlens", cu_seqlens, batch + 1, "[B+1] (B of state_indices)", OFFSETS, mixed_qkv)
    if has_initial_state is not None:
        _per_sequence(op, "has_initial_state", has_initial_state, batch, "[B] (B of state_indices)", BOOL, mixed_qkv)
    if num_accepted_tokens is not None:
        _per_sequence(
            op, "num_accepted_tokens", num_accepted_tokens, batch, "[B] (B of state_indices)", INDEX, mixed_qkv
        )
    if state is not None:
        _state(op, state, value_heads, head_v_dim, head_k_dim, mixed_qkv)
    _flag(op, "exp_gate", exp_gate)
    if out is None:
        return
    if not isinstance(out, (tuple, list)) or len(out) != 5:
        fail(op, "out", "five tensors (q, k, v, g, beta)", f"{type(out).__name__}")
    io, key = mixed_qkv.dtype, (tokens, num_k_heads, head_k_dim)
    _out(op, "out.q", out[0], key, "[T, Hk, K]", io, mixed_qkv)
    _out(op, "out.k", out[1], key, "[T, Hk, K]", io, mixed_qkv)
    _out(op, "out.v", out[2], (tokens, value_heads, head_v_dim), "[T, Hv, V]", io, mixed_qkv)
    _out(op, "out.g", out[3], (tokens, value_heads), "[T, Hv]", torch.float32, mixed_qkv)
    _out(op, "out.beta", out[4], (tokens, value_heads), "[T, Hv]", torch.float32, mixed_qkv)


def prefill(
    q: Any, k: Any, v: Any, g: Any, beta: Any, state: Any, state_indices: Any, cu_seqlens: Any, has_initial_state: Any,
    use_qk_l2norm: Any, exp_gate: Any, max_seqlen: Any, null_index: Any, out: Any, checkpoints: Any,
    checkpoint_cu_starts: Any, checkpoint_every: Any,
) -> None:  # fmt: skip
    op = "prefill"
    tokens, _, value_heads, K, V = _qkv(op, q, k, v)
    for name, x in (("g", g), ("beta", beta)):
        _sized(op, name, x, (tokens, value_heads), _TOKENS_HEADS[op], FP32, q)
    _state(op, state, value_heads, V, K, q)
    batch = _indices(op, state_indices, null_index, q)
    _per_sequence(op, "cu_seqlens", cu_seqlens, batch + 1, "[B+1] (B of state_indices)", OFFSETS, q)
    if has_initial_state is not None:
        _per_sequence(op, "has_initial_state", has_initial_state, batch, "[B] (B of state_indices)", BOOL, q)
    _flag(op, "use_qk_l2norm", use_qk_l2norm)
    _flag(op, "exp_gate", exp_gate)
    _integer(op, "max_seqlen", max_seqlen, 0)
    _integer(op, "checkpoint_every", checkpoint_every, 0)
    if checkpoints is None:
        if checkpoint_cu_starts is not None:
            fail(op, "checkpoints", "a tensor, since checkpoint_cu_starts is given", None)
        if checkpoint_every != 0:
            fail(op, "checkpoint_every", "0, since checkpoints is None", checkpoint_every)
    else:
        _tensor(op, "checkpoints", checkpoints, 4, STATE_DTYPES, q)
        if checkpoints.shape[1:] != (value_heads, V, K):
            fail(op, "checkpoints", f"shape [C, Hv, V, K] = [C, {value_heads}, {V}, {K}]", tuple(checkpoints.shape))
        _contiguous(op, "checkpoints", checkpoints)
        if checkpoint_cu_starts is None:
            fail(op, "checkpoint_cu_starts", "a tensor, since checkpoints is given", None)
        _per_sequence(
            op, "checkpoint_cu_starts", checkpoint_cu_starts, batch + 1, "[B+1] (B of state_indices)", INDEX, q
        )
        if checkpoint_every == 0 or checkpoint_every % CHUNK != 0:
            fail(op, "checkpoint_every", f"a positive multiple of {CHUNK}", checkpoint_every)
    if out is not None:
        _out(op, "out", out, (tokens, value_heads, V), "[T, Hv, V]", q.dtype, q)


def decode(
    q: Any, k: Any, v: Any, a: Any, b: Any, A_log: Any, dt_bias: Any, state: Any, state_indices: Any,
    use_qk_l2norm: Any, null_index: Any, out: Any,
) -> None:  # fmt: skip
    op = "decode"
    tokens, _, value_heads, K, V = _qkv(op, q, k, v)
    _gates(op, a, b, A_log, dt_bias, tokens, value_heads, q)
    _state(op, state, value_heads, V, K, q)
    if _indices(op, state_indices, null_index, q) != tokens:
        fail(op, "state_indices", f"shape [B] = ({tokens},), one a token of {LEAD[op]}", tuple(state_indices.shape))
    _flag(op, "use_qk_l2norm", use_qk_l2norm)
    if out is not None:
        _out(op, "out", out, (tokens, value_heads, V), "[B, Hv, V]", q.dtype, q)


def fused_decode(
    mixed_qkv: Any, conv_weight: Any, conv_bias: Any, conv_state: Any, a: Any, b: Any, A_log: Any, dt_bias: Any,
    state: Any, state_indices: Any, num_k_heads: Any, head_k_dim: Any, head_v_dim: Any, z: Any, norm_weight: Any,
    norm_eps: Any, gate: Any, null_index: Any, out: Any,
) -> None:  # fmt: skip
    op = "fused_decode"
    tokens, value_heads = _conv(
        op, mixed_qkv, conv_weight, conv_bias, conv_state, a, num_k_heads, head_k_dim, head_v_dim
    )
    _gates(op, a, b, A_log, dt_bias, tokens, value_heads, mixed_qkv)
    _state(op, state, value_heads, head_v_dim, head_k_dim, mixed_qkv)
    if _indices(op, state_indices, null_index, mixed_qkv) != tokens:
        fail(op, "state_indices", f"shape [B] = ({tokens},), one a token of {LEAD[op]}", tuple(state_indices.shape))
    shape = (tokens, value_heads, head_v_dim)
    if (z is None) != (norm_weight is None):
        missing, given = ("z", "norm_weight") if z is None else ("norm_weight", "z")
        fail(op, missing, f"a tensor, since {given} is given", None)
    if z is not None:
        _sized(op, "z", z, shape, "[B, Hv, V]", (mixed_qkv.dtype,), mixed_qkv)
        _inner_one(op, "z", z)
        weights = (mixed_qkv.dtype, torch.float32)
        _sized(op, "norm_weight", norm_weight, (head_v_dim,), "[V] (head_v_dim)", weights, mixed_qkv)
        _contiguous(op, "norm_weight", norm_weight)
    if isinstance(norm_eps, bool) or not isinstance(norm_eps, (int, float)) or not norm_eps >= 0:
        fail(op, "norm_eps", "a number >= 0", f"{type(norm_eps).__name__} {norm_eps!r}")
    if gate not in GATES:
        fail(op, "gate", " or ".join(repr(g) for g in GATES), repr(gate))
    if out is not None:
        _out(op, "out", out, shape, "[B, Hv, V]", mixed_qkv.dtype, mixed_qkv)


def verify(
    q: Any, k: Any, v: Any, a: Any, b: Any, A_log: Any, dt_bias: Any, state: Any, state_indices: Any,
    num_accepted_tokens: Any, cu_seqlens: Any, start_rows: Any, use_qk_l2norm: Any, null_index: Any, out: Any,
) -> None:  # fmt: skip
    op = "verify"
    tokens, _, value_heads, K, V = _qkv(op, q, k, v)
    _gates(op, a, b, A_log, dt_bias, tokens, value_heads, q)
    _state(op, state, value_heads, V, K, q)
    _tensor(op, "state_indices", state_indices, 2, INDEX, q)
    if state_indices.shape[1] < 1:
        fail(op, "state_indices", "shape [B, S] with S >= 1", tuple(state_indices.shape))
    _inner_one(op, "state_indices", state_indices)
    _integer(op, "null_index", null_index, -1)
    batch = state_indices.shape[0]
    _per_sequence(op, "num_accepted_tokens", num_accepted_tokens, batch, "[B] (B of state_indices)", INDEX, q)
    _per_sequence(op, "cu_seqlens", cu_seqlens, batch + 1, "[B+1] (B of state_indices)", OFFSETS, q)
    if start_rows is not None:
        _per_sequence(op, "start_rows", start_rows, batch, "[B] (B of state_indices)", INDEX, q)
    _flag(op, "use_qk_l2norm", use_qk_l2norm)
    if out is not None:
        _out(op, "out", out, (tokens, value_heads, V), "[T, Hv, V]", q.dtype, q)
