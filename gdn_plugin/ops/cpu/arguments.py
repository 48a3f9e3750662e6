"""Tensors as the structs of csrc/arguments.h: eight-byte fields in the same order, packed into bytes.

Packing by hand takes a few microseconds a call, which a decode step of one sequence notices.
"""

from __future__ import annotations

from struct import Struct

import torch
from torch import Tensor

from gdn_plugin.ops.cpu import build

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_REFUSALS = {
    1: "cu_seqlens: expected offsets that start at 0 or later, do not decrease and stay within the tokens, the columns"
    " of state_indices and those of conv_state",
    2: "state_indices: expected rows of the pool",
    3: "num_accepted_tokens: expected no more than the columns of state_indices or conv_state allow",
    4: "checkpoint_cu_starts: expected rows of checkpoints",
}

Fields = tuple[int, ...]


def dtype_code(name: str, x: Tensor) -> int:
    try:
        return _DTYPES[x.dtype]
    except KeyError:
        raise ValueError(f"{name}: expected float32, bfloat16 or float16, got {x.dtype}") from None


def rows(name: str, x: Tensor | None) -> Fields:
    """[rows, heads, dim] with a dense last dim; None is absent."""
    if x is None:
        return (0, 0, 0, 0)
    row, head, inner = x.stride()
    if inner != 1 and x.shape[2] != 1:
        raise ValueError(f"{name}: expected a last dim of stride 1, got strides {x.stride()}")
    return (x.data_ptr(), dtype_code(name, x), row, head)


def matrix(name: str, x: Tensor) -> Fields:
    return (x.data_ptr(), dtype_code(name, x), *x.stride())


def vector(name: str, x: Tensor | None) -> Fields:
    return (0, 0, 0) if x is None else (x.data_ptr(), dtype_code(name, x), x.stride(0))


def integers(name: str, x: Tensor | None) -> Fields:
    """int32 or int64, [n]; of a matrix, the stride is the last dim's."""
    if x is None:
        return (0, 0, 0)
    if x.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: expected int32 or int64, got {x.dtype}")
    return (x.data_ptr(), x.stride(-1), int(x.dtype == torch.int64))


def flags(name: str, x: Tensor | None) -> Fields:
    """[n] bool."""
    if x is None:
        return (0, 0)
    if x.dtype != torch.bool:
        raise ValueError(f"{name}: expected bool, got {x.dtype}")
    return (x.data_ptr(), x.stride(0))


def pool(name: str, x: Tensor | None) -> Fields:
    """[N, Hv, V, K], dense inside a row."""
    if x is None:
        return (0, 0, 0, 0)
    row, *inner = x.stride()
    _, _, values, keys = x.shape
    if inner != [values * keys, keys, 1]:
        raise ValueError(f"{name}: expected rows that are dense inside, got strides {x.stride()} for {tuple(x.shape)}")
    return (x.data_ptr(), dtype_code(name, x), row, x.shape[0])


def conv(mixed_qkv: Tensor, weight: Tensor, bias: Tensor | None, conv_state: Tensor) -> Fields:
    row, channel, column = conv_state.stride()
    return (
        *matrix("mixed_qkv", mixed_qkv), *matrix("conv_weight", weight), *vector("conv_bias", bias),
        conv_state.data_ptr(), dtype_code("conv_state", conv_state), row, channel, column, conv_state.shape[0],
        conv_state.shape[2], weight.shape[1],
    )  # fmt: skip


def gates(a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor) -> Fields:
    return (*matrix("a", a), *matrix("b", b), *vector("A_log", A_log), *vector("dt_bias", dt_bias))


def call(op: str, layout: Struct, *fields: float) -> None:
    """Run gdn_<op> on the packed fields.

    Raises:
        ValueError: index values that would lead outside of a tensor; nothing has been written.
    """
    refusal = build.function(f"gdn_{op}")(layout.pack(*fields))
    if refusal:
        raise ValueError(f"gdn.{op}: {_REFUSALS[refusal]}")
