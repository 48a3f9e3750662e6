"""vLLM's GDN attention metadata turned into op arguments: what in a batch is decode, prefill and speculative.

Nothing here imports vLLM: the metadata is read by attribute, so hand-made objects test it. Everything is made of views
and of values the host already has on the CPU; nothing synchronises with the device. Layers of a model share one
metadata object a step, so its translation is kept on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# vLLM's block 0 holds no sequence: padding rows name it.
NULL_INDEX = 0
# Prefill emits states at multiples of this many tokens (the ops' rule for `checkpoint_every`).
CHECKPOINT_ALIGNMENT = 64

_CACHE_ATTRIBUTE = "_gdn_plugin_batch"


@dataclass(frozen=True, slots=True)
class DecodePart:
    """One token a sequence, at the front of the batch.

    Args:
        count: tokens and sequences, padding rows included.
        state_indices: [count] int32; `NULL_INDEX` marks padding.
        cu_seqlens: [count + 1] int32.
    """

    count: int
    state_indices: Tensor
    cu_seqlens: Tensor


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """States to keep from the middle of a prefill, for the prefix cache. C of them, in pool rows of their own.

    Args:
        every: tokens between the states that the prefill op emits; a multiple of 64.
        count: rows the op may write, at most.
        cu_starts: [B + 1] int32, first emitted state of each sequence.
        emitted: [C] int64, which emitted state each checkpoint is.
        rows: [C] int64, pool row of each checkpoint.
        conv_tokens: [C, W - 1] int64, the tokens (counted from the part's first) that are its conv history.
    """

    every: int
    count: int
    cu_starts: Tensor
    emitted: Tensor
    rows: Tensor
    conv_tokens: Tensor


@dataclass(frozen=True, slots=True)
class PrefillPart:
    """Sequences of any length.

    Args:
        first, count: where its tokens are, when they are in one piece.
        tokens: [count] positions of its tokens, when speculative rows stand between them; None otherwise.
        state_indices: [B] int32.
        cu_seqlens: [B + 1] int32, from 0.
        has_initial_state: [B] bool.
        max_seqlen: at least the longest sequence; 0 where the host does not say.
    """

    first: int
    count: int
    tokens: Tensor | None
    state_indices: Tensor
    cu_seqlens: Tensor
    has_initial_state: Tensor
    max_seqlen: int
    checkpoints: Checkpoints | None


@dataclass(frozen=True, slots=True)
class SpecPart:
    """Rows that verify drafted tokens.

    Args:
        count: tokens, padding included where `tokens` is None.
        tokens: [count] positions of its tokens, when other rows stand between them; None: all tokens of the batch.
        state_indices: [B, S] int32, a state row for each token that a sequence may bring.
        cu_seqlens: [B + 1] int32.
        num_accepted_tokens: [B] int32, tokens accepted from the step before, at least 1.
    """

    count: int
    tokens: Tensor | None
    state_indices: Tensor
    cu_seqlens: Tensor
    num_accepted_tokens: Tensor


class Shared:
    """Tensors of a step that the first layer to ask makes on the device, and the other layers take.

    Who made one and asks again is in another run over the same metadata and makes it again: vLLM captures a CUDA graph
    on the metadata of the run before the capture, and replays must make the tensor from the values of their own step.
    """

    def __init__(self) -> None:
        self._made: dict[str, tuple[object, Tensor]] = {}

    def get(self, name: str, layer: object, make: Callable[[], Tensor]) -> Tensor:
        made = self._made.get(name)
        if made is None or made[0] is layer:
            made = self._made[name] = (layer, make())
        return made[1]


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's work. Decode and speculative rows never share a batch (the host sees to that)."""

    num_tokens: int
    decode: DecodePart | None = None
    prefill: PrefillPart | None = None
    spec: SpecPart | None = None
    shared: Shared = field(default_factory=Shared, compare=False)


def batch_of(metadata: Any, conv_history: int) -> Batch:
    """The translation of a `GDNAttentionMetadata`, made once for all layers that share the object.

    Args:
        conv_history: W - 1, inputs that the convolution remembers.
    """
    cached = getattr(metadata, _CACHE_ATTRIBUTE, None)
    if cached is None:
        cached = translate(metadata, conv_history)
        setattr(metadata, _CACHE_ATTRIBUTE, cached)
    return cached


def translate(metadata: Any, conv_history: int) -> Batch:
    """Make a `Batch` from a `GDNAttentionMetadata`.

    Raises:
        ValueError: the metadata lacks a tensor that its counts call for.
    """
    speculative = metadata.spec_sequence_masks is not None and metadata.num_spec_decodes > 0
    others = metadata.num_prefills > 0 or metadata.num_decodes > 0
    return Batch(
        num_tokens=metadata.num_actual_tokens,
        decode=_decode(metadata) if metadata.num_decodes > 0 and not speculative else None,
        prefill=_prefill(metadata, conv_history, speculative) if metadata.num_prefills > 0 else None,
        spec=_spec(metadata, others) if speculative else None,
    )


def _tensor(metadata: Any, name: str) -> Tensor:
    value = getattr(metadata, name)
    if value is None:
        raise ValueError(
            f"{name} is None in a batch of {metadata.num_decodes} decodes, {metadata.num_prefills} prefills and "
            f"{metadata.num_spec_decodes} speculative rows"
        )
    return value


def _decode(metadata: Any) -> DecodePart:
    rows = _tensor(metadata, "non_spec_state_indices_tensor")
    # A pure decode batch may be padded to the size of a CUDA graph: its extra rows name the null block.
    count = metadata.num_decode_tokens if metadata.num_prefills > 0 else metadata.num_actual_tokens
    count = min(count, rows.shape[0])
    starts = _tensor(metadata, "non_spec_query_start_loc")
    return DecodePart(count=count, state_indices=rows[:count], cu_seqlens=starts[: count + 1])


def _prefill(metadata: Any, conv_history: int, speculative: bool) -> PrefillPart:
    cu_seqlens = _tensor(metadata, "prefill_query_start_loc")
    if speculative:
        tokens = _tensor(metadata, "non_spec_token_indx")
        first, count = 0, tokens.shape[0]
    else:
        tokens = None
        first = metadata.num_decode_tokens
        count = metadata.num_actual_tokens - first
    return PrefillPart(
        first=first,
        count=count,
        tokens=tokens,
        state_indices=_tensor(metadata, "prefill_state_indices"),
        cu_seqlens=cu_seqlens,
        has_initial_state=_tensor(metadata, "prefill_has_initial_state"),
        max_seqlen=_longest(metadata.nums_dict),
        checkpoints=_checkpoints(metadata.checkpoint, cu_seqlens, metadata.num_prefill_tokens, conv_history),
    )


def _longest(nums_dict: dict[int, dict[str, Any]] | None) -> int:
    """A bound on the longest sequence, from the host's own plan of its convolution (blocks a sequence, on the CPU)."""
    bounds = [block * int(plan["nums"].max()) for block, plan in (nums_dict or {}).items() if len(plan["nums"])]
    return min(bounds, default=0)


def _checkpoints(checkpoint: Any, cu_seqlens: Tensor, num_tokens: int, conv_history: int) -> Checkpoints | None:
    """Plan the states to keep. `checkpoint` has a row for every non-speculative sequence; offset 0 means none."""
    if checkpoint is None or not any(checkpoint.offsets or ()):
        return None
    decodes = len(checkpoint.offsets) - (cu_seqlens.shape[0] - 1)  # rows before the prefills
    wanted = [(row, offset) for row, offset in enumerate(checkpoint.offsets) if offset > 0]
    every = math.gcd(*(offset for _, offset in wanted))
    if every % CHECKPOINT_ALIGNMENT:
        raise ValueError(f"checkpoint offsets must be multiples of {CHECKPOINT_ALIGNMENT}, got {checkpoint.offsets}")
    device = cu_seqlens.device
    rows, offsets = torch.tensor(wanted, dtype=torch.int64).to(device, non_blocking=True).unbind(1)
    sequences = rows - decodes
    starts = cu_seqlens.to(torch.int64)
    cu_starts = torch.zeros_like(starts)
    torch.cumsum(starts.diff() // every, 0, out=cu_starts[1:])
    ends = starts[sequences] + offsets
    return Checkpoints(
        every=every,
        count=num_tokens // every,
        cu_starts=cu_starts.to(torch.int32),
        emitted=cu_starts[sequences] + offsets // every - 1,
        rows=checkpoint.state_indices[rows].to(torch.int64),
        conv_tokens=ends[:, None] + torch.arange(-conv_history, 0, device=device),
    )


def _spec(metadata: Any, others: bool) -> SpecPart:
    rows = _tensor(metadata, "spec_state_indices_tensor")
    count = metadata.num_spec_decodes
    tokens = _tensor(metadata, "spec_token_indx") if others else None
    return SpecPart(
        count=metadata.num_actual_tokens if tokens is None else tokens.shape[0],
        tokens=tokens,
        state_indices=rows[:count],
        cu_seqlens=_tensor(metadata, "spec_query_start_loc")[: count + 1],
        num_accepted_tokens=_tensor(metadata, "num_accepted_tokens")[:count],
    )
