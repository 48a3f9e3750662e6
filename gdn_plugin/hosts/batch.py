"""One step's work for a layer, as op arguments: what is decode, prefill and speculative. Knows no host.

A host's own room translates its metadata to a `Batch`; `core` runs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Prefill emits states at multiples of this many tokens (the ops' rule for `checkpoint_every`).
CHECKPOINT_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class DecodePart:
    """One token a sequence, at the front of the batch.

    Args:
        count: tokens and sequences, padding rows included.
        state_indices: [count] int32.
        cu_seqlens: [count + 1] int32.
        padded: some sequences may be padding, in this step or in another that replays its captured graph.
    """

    count: int
    state_indices: Tensor
    cu_seqlens: Tensor
    padded: bool = False


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


def plan_checkpoints(
    offsets: Sequence[int], rows: Tensor, cu_seqlens: Tensor, num_tokens: int, conv_history: int
) -> Checkpoints | None:
    """Plan which emitted states a prefill keeps, at most one a sequence; None where none is wanted. No synchronisation.

    Args:
        offsets: for each sequence, how many of its tokens the kept state has seen; 0: none is kept.
        rows: [B] pool row of each sequence's kept state; read where an offset is not 0.
        cu_seqlens: [B + 1], on the device.
        num_tokens: cu_seqlens[-1], as the host knows it.
        conv_history: W - 1, inputs that the convolution remembers.
    Raises:
        ValueError: an offset is no multiple of 64.
    """
    wanted = [(sequence, offset) for sequence, offset in enumerate(offsets) if offset > 0]
    if not wanted:
        return None
    every = math.gcd(*(offset for _, offset in wanted))
    if every % CHECKPOINT_ALIGNMENT:
        raise ValueError(f"checkpoint offsets must be multiples of {CHECKPOINT_ALIGNMENT}, got {list(offsets)}")
    device = cu_seqlens.device
    listed = torch.tensor(wanted, dtype=torch.int64, pin_memory=device.type == "cuda")  # else the copy waits
    sequences, kept = listed.to(device, non_blocking=True).unbind(1)
    starts = cu_seqlens.to(torch.int64)
    cu_starts = torch.zeros_like(starts)
    torch.cumsum(starts.diff() // every, 0, out=cu_starts[1:])
    ends = starts[sequences] + kept
    return Checkpoints(
        every=every,
        count=num_tokens // every,
        cu_starts=cu_starts.to(torch.int32),
        emitted=cu_starts[sequences] + kept // every - 1,
        rows=rows[sequences].to(torch.int64),
        conv_tokens=ends[:, None] + torch.arange(-conv_history, 0, device=device),
    )


@dataclass(frozen=True, slots=True)
class PrefillPart:
    """Sequences of any length.

    Args:
        first, count: where its tokens are, when they are in one piece.
        tokens: [count] positions of its tokens, when speculative rows stand between them; None otherwise.
        state_indices: [B] int32.
        cu_seqlens: [B + 1] int32, from 0 to count.
        has_initial_state: [B] bool; False: no token of the sequence has been computed, its row holds anything.
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
        state_indices: [B, S] int32, a state row for each token that a sequence may bring; replay reads the first alone.
        cu_seqlens: [B + 1] int32.
        num_accepted_tokens: [B] int32, tokens accepted from the step before, at least 1; 1 for a sequence without an
            initial state.
        has_initial_state: [B] bool, as in PrefillPart: a prompt of one token may come with drafts behind it.
        padded: as in DecodePart.
    """

    count: int
    tokens: Tensor | None
    state_indices: Tensor
    cu_seqlens: Tensor
    num_accepted_tokens: Tensor
    has_initial_state: Tensor
    padded: bool = False


class Shared:
    """Tensors of a step that the first layer to ask makes on the device, and the other layers take.

    Who made one and asks again is in another run over the same metadata and makes it again: a host may capture a CUDA
    graph on the metadata of the run before the capture, and replays must make the tensor from the values of their own
    step.
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
    """One step's work. Decode and speculative rows never share a batch.

    Args:
        num_tokens: tokens that some part brings; they are the first ones of the step's tensors.
    """

    num_tokens: int
    decode: DecodePart | None = None
    prefill: PrefillPart | None = None
    spec: SpecPart | None = None
    shared: Shared = field(default_factory=Shared, compare=False)
