"""Tensors as the structs of csrc/arguments.h: eight-byte fields in the same order, packed into bytes.

Packing by hand takes a few microseconds a call, which a decode step of one sequence notices.
"""

from __future__ import annotations

from struct import Struct
from typing import NoReturn

import torch
from torch import Tensor

from gdn_plugin.ops.cpu import build

_REFUSALS = {
    1: "cu_seqlens: expected offsets that start at 0 or later, do not decrease and stay within the tokens, the columns"
    " of state_indices and those of conv_state",
    2: "state_indices (verify: or start_rows): expected rows of the pool",
    3: "num_accepted_tokens: expected no more than the columns of state_indices or conv_state allow",
    4: "checkpoint_cu_starts: expected rows of checkpoints",
}

Fields = tuple[int, ...]


_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_WIDE = {torch.int32: 0, torch.int64: 1}


def _refuse(name: str, x: Tensor) -> NoReturn:
    raise ValueError(f"{name}: expected float32, bfloat16 or float16, got {x.dtype}") from None


def rows(name: str, x: Tensor | None) -> Fields:
    """[rows, heads, dim] with a dense last dim; None is absent."""
    if x is None:
        return (0, 0, 0, 0)
    row, head, inner = x.stride()
    if inner != 1 and x.shape[2] != 1:
        raise ValueError(f"{name}: expected a last dim of stride 1, got strides {x.stride()}")
    try:
        return (x.data_ptr(), _CODES[x.dtype], row, head)
    except KeyError:
        _refuse(name, x)


def matrix(name: str, x: Tensor) -> Fields:
    try:
        return (x.data_ptr(), _CODES[x.dtype], *x.stride())
    except KeyError:
        _refuse(name, x)


def vector(name: str, x: Tensor | None) -> Fields:
    if x is None:
        return (0, 0, 0)
    try:
        return (x.data_ptr(), _CODES[x.dtype], *x.stride())
    except KeyError:
        _refuse(name, x)


def integers(name: str, x: Tensor | None) -> Fields:
    """int32 or int64, [n]; of a matrix, the stride is the last dim's."""
    if x is None:
        return (0, 0, 0)
    try:
        return (x.data_ptr(), x.stride()[-1], _WIDE[x.dtype])
    except KeyError:
        raise ValueError(f"{name}: expected int32 or int64, got {x.dtype}") from None


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
    row, head, value, key = x.stride()
    count, _, values, keys = x.shape
    if key != 1 or value != keys or head != values * keys:
        raise ValueError(f"{name}: expected rows that are dense inside, got strides {x.stride()} for {tuple(x.shape)}")
    try:
        return (x.data_ptr(), _CODES[x.dtype], row, count)
    except KeyError:
        _refuse(name, x)


def conv(mixed_qkv: Tensor, weight: Tensor, bias: Tensor | None, conv_state: Tensor) -> Fields:
    row, channel, column = conv_state.stride()
    count, _, columns = conv_state.shape
    try:
        code = _CODES[conv_state.dtype]
    except KeyError:
        _refuse("conv_state", conv_state)
    return (
        *matrix("mixed_qkv", mixed_qkv), *matrix("conv_weight", weight), *vector("conv_bias", bias),
        conv_state.data_ptr(), code, row, channel, column, count, columns, weight.shape[1],
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
