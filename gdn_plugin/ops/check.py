"""The argument checks of every op, derived from its record: metadata only, before anything is written.

Every message names the op and the argument, says what was expected and what came. Nothing here looks at a tensor's
values: a range or uniqueness check would copy from the device. Those are in `values`, under GDN_PLUGIN_DEBUG=1.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from gdn_plugin.ops.record import ANY, CONV_ROWS, DENSE, FLOATS, INNER, IO, IO_OR_FP32, ROWS, Argument, Op, dtype_name


def fail(op: str, name: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"gdn.{op}: {name}: expected {expected}, got {got}")


def call(record: Op, arguments: Mapping[str, Any], out: Any, backend: object) -> None:
    """Check a call of the public function.

    Args:
        out: None, the output buffer, or a sequence of them for an op with several outputs.
    Raises:
        ValueError: the first thing that is wrong.
    """
    if backend is not None and not isinstance(backend, str):
        fail(record.name, "backend", "the name of a backend or None", f"{type(backend).__name__} {backend!r}")
    sizes = inputs(record, arguments)
    if out is None:
        return
    buffers: Sequence[Any] = (out,)
    if len(record.outputs) > 1:
        if not isinstance(out, (tuple, list)) or len(out) != len(record.outputs):
            names = ", ".join(output.name for output in record.outputs)
            fail(record.name, "out", f"{len(record.outputs)} tensors ({names})", type(out).__name__)
        buffers = out
    outputs(record, arguments, buffers, sizes)


def inputs(record: Op, arguments: Mapping[str, Any]) -> dict[str, int]:
    """Check every input. Returns what the record's letters stand for."""
    op, lead = record.name, arguments[record.lead]
    sizes: dict[str, int] = {}
    for argument in record.values:
        _plain(op, argument, arguments[argument.name], sizes)
    io, device = (lead.dtype, lead.device) if isinstance(lead, Tensor) else (None, None)
    worked_out: list[tuple[Argument, Tensor]] = []
    for argument in record.tensors:
        x = arguments[argument.name]
        if x is None and argument.optional:
            continue
        allowed = _allowed(argument.dtypes, None if x is lead else io)
        good = isinstance(x, Tensor) and x.dtype in allowed and x.device == device
        shape = x.shape if good else ()
        if len(shape) != len(argument.shape):
            shares = argument.of_shares
            if shares is None or len(shape) != len(shares.shape):
                _wrong_tensor(op, argument.name, argument, x, lead, record.lead)
            argument = shares
        for dim, letter in argument.letters:
            size = shape[dim]
            if sizes.setdefault(letter, size) != size:
                _wrong_shape(record, argument.name, argument, x, sizes)
        if argument.expressions:
            worked_out.append((argument, x))
        layout = argument.layout
        if layout == DENSE:
            if not x.is_contiguous():
                _layout(op, argument.name, layout, x)
        elif layout != ANY and not (layout == INNER and x.stride(-1) == 1):
            _layout(op, argument.name, layout, x)
    for rule in record.rules:
        broken = rule(arguments)
        if broken is not None:
            fail(op, *broken)
    for argument, x in worked_out:
        _expressions(record, argument.name, argument, x, sizes)
    return sizes


def outputs(record: Op, arguments: Mapping[str, Any], buffers: Sequence[Any], sizes: dict[str, int]) -> None:
    lead = arguments[record.lead]
    for argument, buffer in zip(record.outputs, buffers, strict=True):
        name = "out" if len(record.outputs) == 1 else f"out.{argument.name}"
        allowed = _allowed(argument.dtypes, lead.dtype)
        good = isinstance(buffer, Tensor) and buffer.dtype in allowed and buffer.device == lead.device
        if not good or buffer.dim() != len(argument.shape):
            _wrong_tensor(record.name, name, argument, buffer, lead, record.lead)
        if tuple(buffer.shape) != tuple(sizes[letter] for letter in argument.shape):
            _wrong_shape(record, name, argument, buffer, sizes)
        _layout(record.name, name, argument.layout, buffer)


def _plain(op: str, argument: Argument, value: Any, sizes: dict[str, Any]) -> None:
    """A value that is no tensor: its type and range."""
    name, kind, least = argument.name, argument.kind, argument.minimum or 0
    got = f"{type(value).__name__} {value!r}"
    if kind == "bool":
        if not isinstance(value, bool):
            fail(op, name, "a bool", got)
    elif kind == "str":
        if value not in argument.choices:
            fail(op, name, " or ".join(repr(choice) for choice in argument.choices), repr(value))
    elif kind == "float":
        if value is None and argument.optional:
            return
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
        if not number or (argument.minimum is not None and not value >= least):
            wanted = "a number" if argument.minimum is None else f"a number >= {least}"
            fail(op, name, wanted + " or None" * argument.optional, got)
    else:
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            fail(op, name, f"an int >= {least}", got)
        if value < least:
            fail(op, name, f"an int >= {least}", value)
        if value >= 2**31:  # kernels take it in 32 bits
            fail(op, name, "an int below 2**31", value)
        for letter in argument.shape:
            sizes[letter] = value


def _wrong_tensor(op: str, name: str, argument: Argument, x: Any, lead: Any, lead_name: str) -> NoReturn:
    """What of its type, rank, dtype or device is wrong."""
    if not isinstance(x, Tensor):
        fail(op, name, "a tensor", f"{type(x).__name__} {x!r}")
    ranks = [len(shape) for shape in (argument.shape, argument.interleaved) if shape]
    if x.dim() not in ranks:
        fail(op, name, f"{' or '.join(map(str, ranks))} dimensions", f"shape {tuple(x.shape)}")
    allowed = _allowed(argument.dtypes, None if x is lead else lead.dtype)
    if x.dtype not in allowed:
        beside = "" if x is lead else f" ({lead_name} is {dtype_name(lead.dtype)})"
        fail(op, name, " or ".join(dict.fromkeys(map(dtype_name, allowed))) + beside, dtype_name(x.dtype))
    fail(op, name, f"a tensor on {lead.device}, as {lead_name} is", str(x.device))


@functools.cache
def _allowed(dtypes: Any, io: torch.dtype | None) -> tuple[torch.dtype, ...]:
    """The dtypes that a record's word stands for; `io` is None for the leading tensor itself."""
    if dtypes == IO:
        return FLOATS if io is None else (io,)
    return (io or torch.float32, torch.float32) if dtypes == IO_OR_FP32 else dtypes


def _expressions(record: Op, name: str, argument: Argument, x: Tensor, sizes: dict[str, int]) -> None:
    """Sizes that follow from others: "B+1", "2*Hk*K+Hv*V", "W-1.."."""
    for dim, spelled in argument.expressions:
        wanted, size = _work_out(spelled, sizes), x.shape[dim]
        if size != wanted and not (spelled.endswith("..") and size > wanted):
            _wrong_shape(record, name, argument, x, sizes)


def _work_out(spelled: str, sizes: Mapping[str, int]) -> int:
    """The value of a sum or difference of products of letters, numbers and letters divided by letters."""
    total = 0
    for sign, factors in _terms(spelled):
        for factor in factors:
            sign *= factor if isinstance(factor, int) else _quotient(*(sizes[letter] for letter in factor))
        total += sign
    return total


def _quotient(size: int, by: int = 1) -> int:
    """-1, which is no tensor's size, where it has a remainder."""
    return size // by if by and size % by == 0 else -1


@functools.cache
def _terms(spelled: str) -> tuple[tuple[int, tuple[int | tuple[str, ...], ...]], ...]:
    """ "2*K+Hv/Hk*V-1" -> ((1, (2, ("K",))), (1, (("Hv", "Hk"), ("V",))), (-1, (1,)))."""
    return tuple(
        (-1 if sign == "-" else 1, tuple(int(x) if x.isdigit() else tuple(x.split("/")) for x in term.split("*")))
        for sign, term in re.findall(r"([+-]?)([^+-]+)", spelled.removesuffix(".."))
    )


def _wrong_shape(record: Op, name: str, argument: Argument, x: Tensor, sizes: Mapping[str, int]) -> NoReturn:
    wanted: list[str] = []
    used: dict[str, str] = {}
    for spelled in argument.shape:
        letters = re.findall(r"[A-Za-z]+", spelled)
        known = all(letter in sizes for letter in letters) and letters
        wanted.append(f"{_work_out(spelled, sizes)}{' or more' * spelled.endswith('..')}" if known else spelled)
        sources = {letter: record.letters[letter][0] for letter in letters if letter in record.letters}
        used |= {letter: source for letter, source in sources.items() if source != name}
    origin = ", ".join(f"{letter} of {source}" for letter, source in used.items())
    spelled = ", ".join(part.removesuffix("..") for part in argument.shape)
    expected = f"shape [{spelled}] = ({', '.join(wanted)})" + (f" ({origin})" if origin else "")
    fail(record.name, name, expected, tuple(x.shape))


def _layout(op: str, name: str, layout: str, x: Tensor) -> None:
    if layout == INNER:
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            fail(op, name, "last stride 1", f"strides {x.stride()} for shape {tuple(x.shape)}")
    elif layout == DENSE:
        if not x.is_contiguous():
            fail(op, name, "a contiguous tensor", f"strides {x.stride()} for shape {tuple(x.shape)}")
    elif layout == ROWS:
        strides = [math.prod(x.shape[dim + 1 :]) for dim in range(1, x.dim())]
        # A dim of one element has no stride to speak of.
        if any(n > 1 and has != wants for n, has, wants in zip(x.shape[1:], x.stride()[1:], strides, strict=True)):
            fail(op, name, f"dense rows, strides (any, {', '.join(map(str, strides))})", f"strides {x.stride()}")
        _apart(op, name, x, math.prod(x.shape[1:]))
    elif layout == CONV_ROWS:
        _, dim, columns = x.shape
        by_dim, by_column = x.stride(1), x.stride(2)
        if not ((by_column == 1 and by_dim >= columns) or (by_dim == 1 and by_column >= dim)):
            fail(op, name, "one of its last two strides 1 and no overlap", f"strides {x.stride()}")
        _apart(op, name, x, dim * columns)


def _apart(op: str, name: str, x: Tensor, size: int) -> None:
    if x.shape[0] > 1 and x.stride(0) < size:
        fail(op, name, f"rows at least {size} elements apart", f"strides {x.stride()}")
