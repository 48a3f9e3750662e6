"""The ops of namespace `gdn`, made from their records: schema, implementation, fake, and the public function's call.

Each op that returns something has an `_out` form beside it that fills the caller's buffers; both mutate the pools they
say they do.
`Library.define` + `impl` + `register_fake` rather than `custom_op`: about a third of the overhead a call. One
implementation serves every device (CompositeExplicitAutograd): the backend's name is what selects the code.

What is the same for every backend is done here, once: nothing at all for no tokens, blanks for no sequences, heads
sorted for who does not take them interleaved, the caller's autocast and autograd out of the way, the device of the
tensors made current, and, under GDN_PLUGIN_DEBUG=1, the checks that synchronise. The arguments are checked by the
public functions and, where a graph is compiled, by the fakes; calling torch.ops.gdn.* directly skips that.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gdn_plugin import settings
from gdn_plugin.ops import check, dispatch, heads, values
from gdn_plugin.ops.record import OPS, REQUIRED, Argument, Op
from gdn_plugin.registry import BackendOp
from gdn_plugin.registry.backend import left_out

NAMESPACE = "gdn"
_KEY = "CompositeExplicitAutograd"
_PLAIN = (bool, int, float, str)


def public(record: Op) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a signature and its docstring the public function of an op.

    The function's parameters are the record's inputs, `out` where it has outputs, and `backend`; its body is not run.

    Raises:
        TypeError: at import, where the signature and the record differ in an argument or a default.
    """
    beside = {"out": None, "backend": None} if record.outputs else {"backend": None}
    wanted = {argument.name: argument.default for argument in record.inputs} | beside

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)
        names = tuple(signature.parameters)
        found = {n: REQUIRED if p.default is p.empty else p.default for n, p in signature.parameters.items()}
        if found != wanted:
            raise TypeError(f"gdn.{record.name}: record and signature differ: {found.items() ^ wanted.items()}")
        positional = tuple(n for n, p in signature.parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD)
        defaults = {n: p.default for n, p in signature.parameters.items() if p.default is not p.empty}

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            given = {**defaults, **dict(zip(positional, args)), **kwargs}  # noqa: B905 - too many are found below
            twice = args and kwargs and kwargs.keys() & {*positional[: len(args)]}
            if twice or len(given) != len(names) or len(args) > len(positional):
                signature.bind(*args, **kwargs)  # raises the TypeError that Python would
            return _call(record, given)

        return call

    return decorate


def _call(record: Op, given: dict[str, Any]) -> Any:
    """Check, fill in what depends on other arguments, choose the backend, call the op."""
    out, backend = given.pop("out", None), given.pop("backend")
    facts = _checked(record, given, out, backend)
    for name in record.floats:
        value = given[name]
        given[name] = float(_default(record, record.by_name[name], given) if value is None else value)
    chosen = dispatch.for_call(given[record.lead].device.type, backend, facts)
    arguments = [given[name] for name in record.names]
    if out is None:
        return _operators[record.name].default(*arguments, chosen)
    buffers = out if len(record.outputs) > 1 else (out,)
    _operators[f"{record.name}_out"].default(*arguments, *buffers, chosen)
    return tuple(buffers) if len(record.outputs) > 1 else out


_good: dict[tuple[Any, ...], tuple[Any, ...]] = {}
_MOST = 4096  # of them; an engine's decode steps need a few, its prefills bring new ones all the time


def _checked(record: Op, given: Mapping[str, Any], out: Any, backend: object) -> tuple[Any, ...]:
    """The facts of a call for `dispatch.for_call`; a compiled graph's fakes check, any other call is checked here.

    Checks and facts read metadata alone, so what was found good once is good again. In an engine on a CPU, whose caches
    a step's matrices have just emptied, that is about 0.1 ms less a step of a layer.

    Raises:
        ValueError: the first thing that is wrong.
    """
    if torch.compiler.is_compiling():
        return dispatch.facts(record, given, out)
    key = _metadata(record, given, out, backend)
    found = _good.get(key) if key is not None else None
    if found is None:
        check.call(record, given, out, backend)
        found = dispatch.facts(record, given, out)
        if key is not None:
            if len(_good) >= _MOST:
                _good.clear()
            _good[key] = found
    return found


def _metadata(record: Op, given: Mapping[str, Any], out: Any, backend: object) -> tuple[Any, ...] | None:
    """All that the checks look at, or None where it cannot be told (a tensor of a class of its own, a symbolic size).

    A value comes with its type: True equals 1, and is refused where 1 is not.
    """
    key: list[Any] = [record.name]
    try:
        several = len(record.outputs) > 1 and isinstance(out, (tuple, list))
        # By the record: the caller's keywords come in any order.
        for x in (*(given[name] for name in record.names), *(out if several else (out,)), backend):
            kind = type(x)
            if kind is Tensor or kind is Parameter:
                key += (x.shape, x.stride(), x.storage_offset(), x.dtype, x.device)
            elif x is None or kind in _PLAIN:
                key += (kind, x)
            else:
                return None
    except RuntimeError:  # a layout without strides
        return None
    return tuple(key)


def _default(record: Op, argument: Argument, arguments: Mapping[str, Any]) -> Any:
    """What an argument is where the caller says nothing: its default; K^-0.5 for a float that may be None."""
    if argument.kind == "float" and argument.optional:
        return float(record.size("K", arguments)) ** -0.5
    return argument.default


def _run(record: Op, arguments: dict[str, Any], backend: str) -> None:
    ready = dispatch.backend_op(record.name, backend)
    lead = arguments[record.lead]
    if lead.shape[0] == 0:
        return
    written = [x for name in record.written if (x := arguments[name]) is not None]
    surroundings = _surroundings(lead, written)
    if not surroundings:
        _run_plainly(record, ready, arguments, backend)
    else:
        with contextlib.ExitStack() as stack:
            for surrounding in surroundings:
                stack.enter_context(surrounding)
            _run_plainly(record, ready, arguments, backend)
    # Kernels write behind autograd's back, which has to know where a tensor that it keeps is no longer the same.
    torch.autograd.graph.increment_version([x for x in written if not x.is_inference()])


def _run_plainly(record: Op, ready: BackendOp, arguments: dict[str, Any], backend: str) -> None:
    """In the surroundings that a backend expects."""
    lead, rows = arguments[record.lead], arguments.get("state_indices")
    if rows is not None and rows.shape[0] == 0:
        if arguments.get("zero_padding", True):
            for output in record.outputs:
                arguments[output.name].fill_(output.blank(arguments))
        return
    if settings.debug() and not _capturing(lead):
        values.check(record.name, arguments)
    for name in _unknown(ready.run, record.name):
        if name == "zero_padding":  # a backend that leaves padding's rows alone: they are zeroed in front of it
            if arguments.pop(name):
                for output in record.outputs:
                    arguments[output.name].zero_()
            continue
        _leave_out(record, arguments, name, backend)
    if record.projections and not ready.interleaved:
        arguments |= heads.flat(record, arguments)
    ready.run(**arguments)


@functools.cache
def _unknown(run: Callable[..., None], op: str) -> frozenset[str]:
    """The op's arguments that a backend does not name."""
    return left_out(run, [argument.name for argument in OPS[op].arguments])


def _leave_out(record: Op, arguments: dict[str, Any], name: str, backend: str) -> None:
    """Take out an argument that the backend does not know: a hint, or one that asks for nothing."""
    argument = record.by_name[name]
    default = _default(record, argument, arguments)
    value = arguments[name]
    if not argument.hint and (value is not default and value != default):
        known = f"{default!r}, which is all that {backend!r} knows"
        check.fail(record.name, name, known, repr(value))
    del arguments[name]


def _surroundings(x: Tensor, written: Sequence[Tensor]) -> list[contextlib.AbstractContextManager[Any]]:
    """What keeps the caller's global state out of a backend; empty where there is nothing to keep out.

    Autograd: recorded, an input that requires grad would put the pools on a graph that grows with every call. Backward
    through an output is autograd's own warning that the op has none. A pool that was made in inference mode is written
    in inference mode: PyTorch refuses its in-place ops elsewhere. Kernels launch on the current device.
    """
    found: list[contextlib.AbstractContextManager[Any]] = []
    if torch.is_grad_enabled():
        found.append(torch.no_grad())
    if not torch.is_inference_mode_enabled() and any(y.is_inference() for y in written):
        found.append(torch.inference_mode())
    device = x.device.type
    if _has_autocast(device) and torch.is_autocast_enabled(device):
        found.append(torch.autocast(device, enabled=False))
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        found.append(torch.cuda.device(x.device))
    return found


@functools.cache
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def _capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured: a copy to the host would break it, and a replay runs kernels only."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _new_outputs(record: Op, arguments: Mapping[str, Any]) -> list[Tensor]:
    """Contiguous buffers, whatever the inputs' strides are."""
    lead = arguments[record.lead]
    return [
        lead.new_empty(
            [record.size(letter, arguments) for letter in output.shape],
            dtype=lead.dtype if isinstance(output.dtypes, str) else output.dtypes[0],
        )
        for output in record.outputs
    ]


def _result(record: Op, buffers: Sequence[Tensor]) -> Any:
    if not record.outputs:
        return None
    return tuple(buffers) if len(record.outputs) > 1 else buffers[0]


def _returning(record: Op, *args: Any) -> Any:
    arguments = dict(zip(record.names, args[:-1], strict=True))
    buffers = _new_outputs(record, arguments)
    arguments |= {output.name: buffer for output, buffer in zip(record.outputs, buffers, strict=True)}
    if "zero_padding" in arguments:
        arguments["zero_padding"] = True
    _run(record, arguments, args[-1])
    return _result(record, buffers)


def _filling(record: Op, *args: Any) -> None:
    names = (argument.name for argument in record.arguments)
    _run(record, dict(zip(names, args[:-1], strict=True)), args[-1])


def _fake_returning(record: Op, *args: Any) -> Any:
    arguments = dict(zip(record.names, args[:-1], strict=True))
    check.inputs(record, arguments)
    return _result(record, _new_outputs(record, arguments))


def _fake_filling(record: Op, *args: Any) -> None:
    arguments = dict(zip(record.names, args, strict=False))
    buffers = args[len(record.names) : -1]
    check.outputs(record, arguments, buffers, check.inputs(record, arguments))


_library = torch.library.Library(NAMESPACE, "DEF")
_operators: dict[str, Any] = {}
for _record in OPS.values():
    for _name, _out, _real, _fake in (
        (_record.name, False, _returning, _fake_returning),
        (f"{_record.name}_out", True, _filling, _fake_filling),
    )[: 1 + bool(_record.outputs)]:
        _library.define(_name + _record.schema(out=_out), tags=(torch.Tag.needs_fixed_stride_order,))
        _library.impl(_name, functools.partial(_real, _record), _KEY)
        torch.library.register_fake(f"{NAMESPACE}::{_name}", functools.partial(_fake, _record), lib=_library)
        _operators[_name] = getattr(getattr(torch.ops, NAMESPACE), _name)
