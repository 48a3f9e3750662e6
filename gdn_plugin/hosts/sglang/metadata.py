"""SGLang's batches turned into op arguments. Imports nothing of SGLang: hand-made objects test it.

`metadata` is the host's `ForwardMetadata`, made anew for each step and shared by all layers, so what is made of it is
kept on it; `forward_batch` its `ForwardBatch`. An extend is a prefill of any number of sequences; decodes that share a
step with one ("mixed chunk") are sequences of one token in it.

Which states an extend keeps for the prefix cache ("extra_buffer") is planned here, from what the scheduler asks for.
The host's own plan of it, whose form changes with the host's version and kernels, is not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gdn_plugin.hosts.batch import Batch, Checkpoints, DecodePart, PrefillPart, Shared, plan_checkpoints

# SGLang's slot 0 holds no sequence: its allocator starts at 1, padding that runs eagerly names it, nobody reads what is
# written to it. A replayed decode graph names -1 instead, which `decode_batch` turns into 0 where it must.
NULL_INDEX, PADDING = 0, "scratch"

_SHARED, _EXTEND = "_gdn_plugin_shared", "_gdn_plugin_extend"


def decode_batch(metadata: Any, num_tokens: int, layer: object, masked: bool) -> Batch:
    """One token a sequence. May be called while a graph is captured: the graph reads the host's static tensors.

    Args:
        num_tokens: tokens of the layer's input, padding included.
        layer: who asks; what is made on the device is made by the first layer of a step.
        masked: the kernels leave every row <= 0 alone. If not, they take row 0 for padding and nothing below it.
    """
    rows = metadata.mamba_cache_indices
    count = min(num_tokens, rows.shape[0])
    shared = _kept(metadata, _SHARED, Shared)
    rows = rows[:count]
    if not masked:
        rows = shared.get("rows", layer, lambda: rows.clamp(min=NULL_INDEX))
    # Whatever the batch holds now, a replay of its graph may be padded.
    part = DecodePart(count=count, state_indices=rows, cu_seqlens=metadata.query_start_loc[: count + 1], padded=True)
    return Batch(num_tokens=count, decode=part, shared=shared)


def extend_batch(metadata: Any, forward_batch: Any, conv_history: int, chunk: int) -> Batch:
    """Sequences of any length, with the states to keep for the prefix cache. Made once a step; never captured.

    Args:
        conv_history: W - 1, inputs that the convolution remembers.
        chunk: the host keeps states at multiples of this many tokens of an extend; a multiple of 64.
    """
    return _kept(metadata, _EXTEND, lambda: _extend(metadata, forward_batch, conv_history, chunk))


def _extend(metadata: Any, forward_batch: Any, conv_history: int, chunk: int) -> Batch:
    cu_seqlens = metadata.query_start_loc
    sequences = cu_seqlens.shape[0] - 1
    count = metadata.logical_num_tokens
    lengths = forward_batch.extend_seq_lens_cpu
    part = PrefillPart(
        first=0,
        count=count,
        tokens=None,
        state_indices=metadata.mamba_cache_indices[:sequences],
        cu_seqlens=cu_seqlens,
        has_initial_state=forward_batch.extend_prefix_lens[:sequences] > 0,
        max_seqlen=int(max(lengths)) if lengths is not None and len(lengths) == sequences else 0,
        checkpoints=_checkpoints(metadata, forward_batch, conv_history, chunk),
    )
    return Batch(num_tokens=count, prefill=part)


def _checkpoints(metadata: Any, forward_batch: Any, conv_history: int, chunk: int) -> Checkpoints | None:
    """The last whole chunk of each extend that is tracked; a sequence's track length may pass its last token by one."""
    if not metadata.has_mamba_track_mask or forward_batch.mamba_track_seqlens is None:
        return None
    cu_seqlens = metadata.query_start_loc
    sequences = cu_seqlens.shape[0] - 1
    tracked = _numbers(forward_batch.mamba_prefill_track_mask_cpu, forward_batch.mamba_track_mask, sequences)
    ends = _numbers(forward_batch.mamba_track_seqlens_cpu, forward_batch.mamba_track_seqlens, sequences)
    begins = _numbers(forward_batch.extend_prefix_lens_cpu, forward_batch.extend_prefix_lens, sequences)
    offsets = [
        max(end - begin, 0) // chunk * chunk if wanted else 0
        for wanted, end, begin in zip(tracked, ends, begins, strict=True)
    ]
    # The slots as the metadata has them: translated where the pool's slots are virtual.
    return plan_checkpoints(
        offsets, metadata.mamba_track_indices, cu_seqlens, metadata.logical_num_tokens, conv_history
    )


def _numbers(on_cpu: Sequence[int] | Tensor | None, tensor: Tensor, count: int) -> list[int]:
    """A number for each sequence, from the copy that the scheduler keeps where it is of this batch."""
    values = on_cpu if on_cpu is not None and len(on_cpu) == count else tensor
    return [int(value) for value in (values.tolist() if isinstance(values, torch.Tensor) else values)][:count]


def _kept(metadata: Any, name: str, make: Any) -> Any:
    made = getattr(metadata, name, None)
    if made is None:
        made = make()
        setattr(metadata, name, made)
    return made
