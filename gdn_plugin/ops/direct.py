"""Whether a call of an op may leave PyTorch's dispatcher out.

From Python through the dispatcher back into Python takes 5 microseconds, an eighth of a decode step of one sequence on
a CPU. Where nothing stands between the call and the implementation the way round is the same call: in inference mode
(which hosts run in), with plain CPU tensors, and with no dispatch or function mode, functorch level, tracing or
profiler active. On a GPU a step is a graph's replay, and the way round costs nothing.
"""

from __future__ import annotations

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


def possible(io: Tensor, state: Tensor) -> bool:
    """Called outside of torch.compile only.

    Args:
        io, state: what fake tensors, subclasses and other devices would show in.
    """
    return (
        _CAN_ASK
        and torch.is_inference_mode_enabled()
        and type(io) is Tensor
        and type(state) is Tensor
        and io.is_cpu
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.maybe_current_level() is None
        and not torch.autograd._profiler_enabled()
    )
