"""Whether a call of an op may leave PyTorch's dispatcher out.

From Python through the dispatcher back into Python takes 5 microseconds, an eighth of a decode step of one sequence on
a CPU. Where nothing stands between the call and the implementation the way round is the same call: in inference mode
(which hosts run in), with plain CPU tensors, and with no dispatch or function mode, functorch level, tracing or
profiler active. On a GPU a step is a graph's replay, and the way round costs nothing.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def _present(module: object, name: str) -> bool:
    return callable(getattr(module, name, None))


# Private, but the only way to ask; a torch that has moved one of them takes the dispatcher always.
_CAN_ASK = (
    _present(torch._C, "_len_torch_dispatch_stack")
    and _present(torch._C, "_len_torch_function_stack")
    and _present(getattr(torch._C, "_functorch", None), "maybe_current_level")
    and _present(torch.autograd, "_profiler_enabled")
)

_NO_DISPATCH = Tensor.__torch_dispatch__


@functools.cache
def _plain(kind: type) -> bool:
    """Whether tensors of this type are just tensors (parameters are), not wrappers with a meaning of their own."""
    return getattr(kind, "__torch_dispatch__", None) is _NO_DISPATCH


def possible(*tensors: Tensor | None) -> bool:
    """Called outside of torch.compile only.

    Args:
        tensors: every tensor of the call. A wrapper, a fake, a view with a pending negation or a lazy zero is more than
            its memory says, which only the dispatcher knows; other devices show in the first.
    """
    if not (
        _CAN_ASK
        and torch.is_inference_mode_enabled()
        and tensors[0] is not None
        and tensors[0].is_cpu
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.maybe_current_level() is None
        and not torch.autograd._profiler_enabled()
        and not torch.jit.is_tracing()
    ):
        return False
    for x in tensors:  # noqa: SIM110 - a generator would cost a microsecond
        if x is not None and (not _plain(type(x)) or x.is_neg() or x._is_zerotensor()):
            return False
    return True
