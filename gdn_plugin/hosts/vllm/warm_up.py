"""Everything compiled before serving: kernels by their own lists of variants, then one batch of every kind.

Called in the profile run, when no cache has been allocated and nothing has been captured; and again when the host binds
its pools, for the kernels that a backend compiles for a pool's own size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gdn_plugin import ops
from gdn_plugin.hosts.vllm.core import Core
from gdn_plugin.hosts.vllm.cpu_memory import keep_freed_memory
from gdn_plugin.hosts.vllm.metadata import CHECKPOINT_ALIGNMENT, Batch, Checkpoints, DecodePart, PrefillPart, SpecPart

# Row 0 is the null block.
FIRST_ROW = 1

# Below vLLM's own logger, so that its handlers and its level apply.
_log = logging.getLogger("vllm.gdn_plugin")
_done: set[tuple[object, ...]] = set()


def pool_rows(core: Core) -> int:
    """Rows that the pools for `run` need."""
    return FIRST_ROW + max(2 * core.shape.spec_tokens, 3)


def warm_up(core: Core, device: torch.device, fused_norm: bool, run: Callable[[Batch], None]) -> None:
    """Compile what a layer of this shape can reach. Once a process for each shape, choice and device.

    Args:
        fused_norm: whether the gated norm is part of the layer's decode step.
        run: sends a batch through the layer's core on pools of `pool_rows` rows that nobody else uses.
    """
    key = (core.shape, tuple(core.selection.backends().items()), device, fused_norm)
    if key in _done:
        return
    _done.add(key)
    if device.type == "cpu":
        keep_freed_memory()
    for choice in core.selection.choices.values():
        ops.warm_up(choice.problem, backend=choice.name, device=device.type)
    for batch in batches(core, device):
        run(batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def warm_up_pool(core: Core, state: Tensor) -> None:
    """Compile what is compiled for the pool's own size and strides. Once a process for each layout of a pool.

    Args:
        state: the layer's state pool, as the host has just bound it; its null block may be written.
    Raises:
        Whatever the compiler of a backend that was asked for by name raises. Under auto that is logged, and the kernels
        are compiled by the first steps.
    """
    key = (core.shape, tuple(core.selection.backends().items()), state.device, state.dtype, state.shape, state.stride())
    if key in _done:
        return
    _done.add(key)
    for choice in core.selection.choices.values():
        try:
            ops.warm_up(choice.problem, backend=choice.name, device=state.device.type, pool=state)
        except Exception as exc:  # a compiler may raise anything, and what auto chose must not stop the engine here
            if choice.request != "auto":
                raise
            _log.warning("gdn_plugin: %s on %s was not compiled ahead: %s", choice.problem.op, choice.name, exc)


def batches(core: Core, device: torch.device) -> Iterator[Batch]:
    """A batch of each kind that the host can send: prefill, fresh and carried; decode; both; speculative; mixed."""
    decode = _decode(2, device)
    yield Batch(num_tokens=CHECKPOINT_ALIGNMENT + 3, prefill=_prefill(core, 0, device))
    yield Batch(num_tokens=2, decode=decode)
    yield Batch(num_tokens=CHECKPOINT_ALIGNMENT + 5, decode=decode, prefill=_prefill(core, 2, device))
    if core.shape.checkpoints:
        yield Batch(num_tokens=CHECKPOINT_ALIGNMENT + 3, prefill=_prefill(core, 0, device, checkpoints=True))
    if core.shape.spec_tokens:
        tokens = core.shape.spec_tokens
        yield Batch(num_tokens=tokens + 1, spec=_spec(tokens, device))


def _int32(values: list[int] | list[list[int]], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def _decode(count: int, device: torch.device) -> DecodePart:
    return DecodePart(
        count=count,
        state_indices=_int32([FIRST_ROW, 0], device)[:count],
        cu_seqlens=torch.arange(count + 1, dtype=torch.int32, device=device),
    )


def _prefill(core: Core, first: int, device: torch.device, checkpoints: bool = False) -> PrefillPart:
    long, short = CHECKPOINT_ALIGNMENT + 1, 2
    kept = None
    if checkpoints:
        history = torch.arange(1 - core.shape.conv_width, 0, device=device)
        kept = Checkpoints(
            every=CHECKPOINT_ALIGNMENT,
            count=1,
            cu_starts=_int32([0, 1, 1], device),
            emitted=torch.zeros(1, dtype=torch.int64, device=device),
            rows=torch.full((1,), FIRST_ROW + 2, dtype=torch.int64, device=device),
            conv_tokens=CHECKPOINT_ALIGNMENT + history[None],
        )
    return PrefillPart(
        first=first,
        count=long + short,
        tokens=None,
        state_indices=_int32([FIRST_ROW, FIRST_ROW + 1], device),
        cu_seqlens=_int32([0, long, long + short], device),
        has_initial_state=torch.tensor([False, True], device=device),
        max_seqlen=long,
        checkpoints=kept,
    )


def _spec(tokens: int, device: torch.device) -> SpecPart:
    rows = [[FIRST_ROW + i * tokens + j for j in range(tokens)] for i in range(2)]
    return SpecPart(
        count=tokens + 1,
        tokens=None,
        state_indices=_int32(rows, device),
        cu_seqlens=_int32([0, tokens, tokens + 1], device),
        num_accepted_tokens=_int32([1, 1], device),
    )
