"""vLLM's GDN attention metadata turned into op arguments: what in a batch is decode, prefill and speculative.

Nothing here imports vLLM: the metadata is read by attribute, so hand-made objects test it. Everything is made of views
and of values the host already has on the CPU; nothing synchronises with the device. Layers of a model share one
metadata object a step, so its translation is kept on it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gdn_plugin.hosts.batch import Batch, Checkpoints, DecodePart, PrefillPart, SpecPart, plan_checkpoints
from gdn_plugin.hosts.vllm.patches.fresh_speculative_rows import has_initial_state

# vLLM's block 0, the null block, holds no sequence: padding rows name it, and whatever is written to it nobody reads.
NULL_INDEX, PADDING = 0, "scratch"

_CACHE_ATTRIBUTE = "_gdn_plugin_batch"


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
    decode = _decode(metadata) if metadata.num_decodes > 0 and not speculative else None
    prefill = _prefill(metadata, conv_history, speculative) if metadata.num_prefills > 0 else None
    spec = _spec(metadata, others) if speculative else None
    # Decodes stand in front of prefills; speculative rows and prefills take turns.
    return Batch(
        num_tokens=sum(part.count for part in (decode, prefill, spec) if part is not None),
        decode=decode,
        prefill=prefill,
        spec=spec,
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
    alone = metadata.num_prefills == 0
    # Decodes alone may be padded to the size of a CUDA graph: the extra rows name the null block.
    count = min(metadata.num_actual_tokens if alone else metadata.num_decode_tokens, rows.shape[0])
    starts = _tensor(metadata, "non_spec_query_start_loc")
    return DecodePart(
        count=count,
        state_indices=rows[:count],
        cu_seqlens=starts[: count + 1],
        padded=alone and _padded(rows, count, metadata.num_decode_tokens),
    )


def _padded(rows: Tensor, count: int, real: int) -> bool:
    """Whether padding may stand among `count` tokens, `real` of which the host counts.

    On a GPU, of a batch that could be captured: whatever it holds now, its replays may be padded.
    """
    return not rows.is_cpu or count > real


def _prefill(metadata: Any, conv_history: int, speculative: bool) -> PrefillPart:
    cu_seqlens = _tensor(metadata, "prefill_query_start_loc")
    if speculative:
        tokens = _tensor(metadata, "non_spec_token_indx")
        first, count = 0, tokens.shape[0]
    else:
        tokens = None
        first, count = metadata.num_decode_tokens, metadata.num_prefill_tokens
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
    """The states to keep. `checkpoint` has a row for every non-speculative sequence; offset 0 means none."""
    if checkpoint is None or not any(checkpoint.offsets or ()):
        return None
    decodes = len(checkpoint.offsets) - (cu_seqlens.shape[0] - 1)  # rows before the prefills
    rows = checkpoint.state_indices[decodes:]
    return plan_checkpoints(checkpoint.offsets[decodes:], rows, cu_seqlens, num_tokens, conv_history)


def _spec(metadata: Any, others: bool) -> SpecPart:
    rows = _tensor(metadata, "spec_state_indices_tensor")
    sequences = metadata.num_spec_decodes
    tokens = _tensor(metadata, "spec_token_indx") if others else None
    count = metadata.num_actual_tokens if tokens is None else tokens.shape[0]
    started = has_initial_state(metadata)
    if started is None:
        raise ValueError("the metadata of speculative rows does not say which of them are fresh")
    return SpecPart(
        count=count,
        tokens=tokens,
        state_indices=rows[:sequences],
        cu_seqlens=_tensor(metadata, "spec_query_start_loc")[: sequences + 1],
        num_accepted_tokens=_tensor(metadata, "num_accepted_tokens")[:sequences],
        has_initial_state=started[:sequences],
        padded=tokens is None and _padded(rows, count, metadata.num_spec_decode_tokens),
    )
