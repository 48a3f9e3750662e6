"""vLLM's metadata of speculative rows, with the one fact it lacks: which of them nothing has been computed of.

Changes:  GDNAttentionMetadataBuilder.build and .update_block_table (vllm.v1.attention.backends.gdn_attn): the metadata
          they return says for each speculative row whether it has an initial state.
Why:      The scheduler puts placeholder drafts behind a prompt of one token (or a tail of one) that joins a running
          batch, so that the batch stays uniform for its graph. Such a row is speculative, has no computed token, and
          starts from whatever its recycled block holds: another user's state. Stock vLLM serves it so:
          vllm#45237, vllm#53051, vllm#55178.
Versions: 0.32, 0.33, with both model runners.
Retires:  with the first vLLM whose GDN metadata has an initial-state mask of speculative rows; none yet.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

_MODULE = "vllm.v1.attention.backends.gdn_attn"
_CLASS = "GDNAttentionMetadataBuilder"
_FACT = "_gdn_plugin_spec_has_initial_state"  # on metadata: [rows] bool
_BUFFER = "_gdn_plugin_has_initial_state"  # on a builder: what _FACT is a view of, at an address that graphs keep
_DIRTY = "_gdn_plugin_some_fresh"  # on a builder: the buffer is not all True


def tell_fresh_rows() -> bool:
    """Put the fact into the metadata that the host's builders make. Idempotent.

    Returns:
        Whether the builder was changed by this call.
    """
    builder = getattr(importlib.import_module(_MODULE), _CLASS)
    if hasattr(builder.build, "_gdn_plugin"):
        return False
    build, update_block_table = builder.build, builder.update_block_table

    @functools.wraps(build)
    def build_and_tell(self: Any, common_prefix_len: int, common_attn_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        metadata = build(self, common_prefix_len, common_attn_metadata, *args, **kwargs)
        if metadata.num_spec_decodes > 0 and metadata.spec_sequence_masks_cpu is not None:
            setattr(metadata, _FACT, _tell(self, metadata, common_attn_metadata))
        return metadata

    @functools.wraps(update_block_table)
    def update_and_tell(self: Any, metadata: Any, *args: Any, **kwargs: Any) -> Any:
        updated = update_block_table(self, metadata, *args, **kwargs)
        # About the batch and not about blocks: shared, as the host shares the rest of the batch's facts.
        setattr(updated, _FACT, has_initial_state(metadata))
        return updated

    build_and_tell._gdn_plugin = True  # type: ignore[attr-defined]
    builder.build, builder.update_block_table = build_and_tell, update_and_tell
    return True


def has_initial_state(metadata: Any) -> Tensor | None:
    """[speculative rows, padding included] bool, on the device; None where the builder did not say.

    In a captured graph its address stays, and each step's values are written there before the replay.
    """
    return getattr(metadata, _FACT, None)


def _tell(builder: Any, metadata: Any, common: Any) -> Tensor:
    """The fact for one step, and 1 accepted token for fresh rows, whatever a former request left there.

    Read on the CPU, where the host's upper bounds of lengths are exact for rows without a computed token and above the
    step's own tokens for all others. A step without fresh rows, nearly every one, launches nothing.
    """
    lengths = common.query_start_loc_cpu.diff()
    flags = (common.seq_lens_cpu_upper_bound > lengths)[metadata.spec_sequence_masks_cpu]
    real = flags.shape[0]
    accepted = metadata.num_accepted_tokens
    buffer = _buffer(builder, accepted)
    started = buffer[: accepted.shape[0]]  # rows of padding behind the real ones: True, like any row of the null block
    if getattr(builder, _DIRTY):
        buffer.fill_(True)
        setattr(builder, _DIRTY, False)
    if not bool(flags.all()):
        setattr(builder, _DIRTY, True)
        started[:real].copy_(_pinned(flags, buffer), non_blocking=True)
        accepted[:real].masked_fill_(~started[:real], 1)
    return started


def _buffer(builder: Any, accepted: Tensor) -> Tensor:
    buffer: Tensor | None = getattr(builder, _BUFFER, None)
    if buffer is None:
        rows = max(builder.vllm_config.scheduler_config.max_num_seqs, builder.decode_cudagraph_max_bs)
        buffer = torch.ones(rows, dtype=torch.bool, device=accepted.device)
        setattr(builder, _BUFFER, buffer)
        setattr(builder, _DIRTY, False)
    return buffer


def _pinned(flags: Tensor, buffer: Tensor) -> Tensor:
    return flags.pin_memory() if buffer.is_cuda else flags
