"""vLLM's prompts of one token among drafts: rows that nothing has been computed of, and that are to start from zero.

Changes:  GDNAttentionMetadataBuilder.build and .update_block_table (vllm.v1.attention.backends.gdn_attn): the metadata
          they return says for each speculative row whether it has an initial state.
          GPUModelRunner.gather_batch_req_state (vllm.v1.worker.gpu.model_runner, the runner "V2"): a padded prompt of
          one token is marked as a row that runs as a decode, where every layer with a state is the plugin's.
Why:      The scheduler puts placeholder drafts behind a prompt of one token (or a tail of one) that joins a running
          batch, so that the batch stays uniform for its graph.
          V1: such a row is speculative, has no computed token, and starts from whatever its recycled block holds:
          another user's state. Stock vLLM serves it so: vllm#45237, vllm#53051, vllm#55178.
          V2: a tail is marked and runs so, a prompt is not. It is prefilled with its placeholders, and no prefill takes
          tokens back: the first answer is right, the later ones go on as if zeros had followed the prompt. Stock vLLM
          serves it so. Marked it is speculative, as in V1. The step has no full decode graph, as before.
Versions: 0.32, 0.33.
Retires:  with the first vLLM whose GDN metadata has an initial-state mask of speculative rows, and whose V2 marks such
          prompts; none yet.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from typing import Any

import torch
from torch import Tensor

from gdn_plugin.hosts.core import log_once

# Below vLLM's own logger, so that its handlers and its level apply.
_log = logging.getLogger("vllm.gdn_plugin")

_MODULE = "vllm.v1.attention.backends.gdn_attn"
_CLASS = "GDNAttentionMetadataBuilder"
_FACT = "_gdn_plugin_spec_has_initial_state"  # on metadata: [rows] bool
_BUFFER = "_gdn_plugin_has_initial_state"  # on a builder: what _FACT is a view of, at an address that graphs keep
_DIRTY = "_gdn_plugin_some_fresh"  # on a builder: the buffer is not all True

_RUNNER_MODULE = "vllm.v1.worker.gpu.model_runner"
_GATHER = "gather_batch_req_state"
# Of a step's rows, in numpy: read, and the last one written.
_FIELDS = (
    *("num_scheduled_tokens", "num_draft_tokens_np", "num_computed_prefill_tokens_np", "is_prefilling_np"),
    "prefill_runs_as_decode_np",
)


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


def mark_fresh_rows() -> bool:
    """Have Model Runner V2 run padded prompts of one token as decodes, where this process has it. Idempotent.

    Call it where `tell_fresh_rows` is in: a row that runs as a decode starts from its block unless that is told. On a
    runner that it does not know it changes nothing and says so in one line.

    Returns:
        Whether the runner was changed by this call.
    """
    module = sys.modules.get(_RUNNER_MODULE)  # a runner builds the layers, so with V2 it has been imported
    if module is None:
        return False
    runner = getattr(module, "GPUModelRunner", None)
    gather = getattr(runner, _GATHER, None)
    has = getattr(getattr(module, "BatchReqState", None), "_fields", ())
    lacks = [name for name in _FIELDS if name not in has]
    if gather is None or lacks:
        _say_not_marked(f"{_RUNNER_MODULE} has no {', '.join(lacks) or _GATHER}")
        return False
    if hasattr(gather, "_gdn_plugin"):
        return False

    @functools.wraps(gather)
    def gather_and_mark(self: Any, *args: Any, **kwargs: Any) -> Any:
        gathered = gather(self, *args, **kwargs)
        if gathered[0] is not None:  # None: a dummy step
            _mark(self, gathered[0])
        return gathered

    gather_and_mark._gdn_plugin = True  # type: ignore[attr-defined]
    setattr(runner, _GATHER, gather_and_mark)
    return True


def _mark(runner: Any, batch: Any) -> None:
    """Mark a step's padded prompts of one token, as the host marks padded tails."""
    marked, drafts = batch.prefill_runs_as_decode_np, batch.num_draft_tokens_np
    if marked is None or drafts is None:  # no prefill, or one that is spread over ranks; no drafts
        return
    fresh = batch.is_prefilling_np & (batch.num_computed_prefill_tokens_np == 0)
    padded = fresh & (drafts > 0) & (batch.num_scheduled_tokens - drafts == 1)
    if not padded.any():
        return
    layers = runner.vllm_config.compilation_config.static_forward_context
    with_state = {name: layer for name, layer in layers.items() if hasattr(type(layer), "mamba_type")}
    others = [name for name, layer in with_state.items() if getattr(layer, "_gdn_core", None) is None]
    if len(others) == len(with_state):  # another engine of this process
        return
    if others:
        _say_not_marked(f"{others[0]} has a state and is not the plugin's")
    elif getattr(runner, "adaptive_verification", None) is not None:
        _say_not_marked("with adaptive verification a row's length does not tell that it is fresh")
    else:
        marked[padded] = True


def _say_not_marked(why: str) -> None:
    log_once(_log, logging.WARNING, f"gdn_plugin: vLLM prefills prompts of one token with placeholder drafts: {why}")


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
