"""vLLM's scheduler with drafts that end before a block does, where a sequence's one row holds a ring.

Changes:  Scheduler._mamba_block_aligned_split (vllm.v1.core.sched.scheduler), by which the scheduler sizes a request's
          steps in "align" mode: with replay and drafts it leaves out drafts that would reach the end of a block of
          states. The token that fills a block comes alone.
Why:      Where accepted drafts reach a block's end, or the step behind them begins another block, the host takes the
          state behind so many accepted tokens to the other block, from that draft's own row. A ring has all drafts in
          one row. Now only such states are moved as are behind a step's first token: that is what a page stands for.
Versions: 0.32, 0.33, with both model runners, asynchronous scheduling too. Put in by the entry point, since the
          scheduler may be in another process than the layers; it asks the specs of the pages that the layers have made.
Retires:  with replay's own copies at a block's end; then a step or two a block have their drafts again.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

MODULE = "vllm.v1.core.sched.scheduler"
_METHOD = "_mamba_block_aligned_split"
_BLOCK = "_gdn_plugin_block"  # on a scheduler: tokens of a block of states with a ring; 0: there are none


def keep_within() -> bool:
    """Change the host's Scheduler, which must have been imported. Idempotent.

    Returns:
        Whether it was changed by this call.
    """
    scheduler = importlib.import_module(MODULE).Scheduler
    split = getattr(scheduler, _METHOD)
    if hasattr(split, "_gdn_plugin"):
        return False

    @functools.wraps(split)
    def split_and_trim(self: Any, request: Any, num_new_tokens: int, local: int = 0, external: int = 0) -> int:
        count: int = split(self, request, num_new_tokens, local, external)
        block = _block(self)
        if not block:
            return count
        start = request.num_computed_tokens + local + external
        return trimmed(count, start, request.num_tokens, request.num_output_placeholders, block)

    split_and_trim._gdn_plugin = True  # type: ignore[attr-defined]
    setattr(scheduler, _METHOD, split_and_trim)
    return True


def is_in() -> bool:
    """Whether this host's Scheduler is changed."""
    return hasattr(getattr(importlib.import_module(MODULE).Scheduler, _METHOD, None), "_gdn_plugin")


def trimmed(count: int, start: int, known: int, in_flight: int, block: int) -> int:
    """How many of `count` tokens from `start` on a step may have.

    Args:
        known: tokens of the request that are no drafts.
        in_flight: tokens of steps whose outcome is not known yet, one a step and its drafts; `start` counts them all as
            accepted, so that the real start may be lower by their drafts.
    """
    certain = known + in_flight - start
    if count <= certain:  # no drafts
        return count
    last = known + in_flight - 1  # position of the last token that is no draft, at the most; and at the least:
    first = last - max(in_flight - 1, 0)
    end = (first // block + 1) * block  # of the block that `first` is in
    return certain + max(0, min(count - certain, end - 2 - last))


def _block(scheduler: Any) -> int:
    found = getattr(scheduler, _BLOCK, None)
    if found is None:
        import torch  # not with this module, which the entry point imports in every process

        groups = scheduler.kv_cache_config.kv_cache_groups if scheduler.num_spec_tokens else ()
        specs = [spec for group in groups for spec in _specs(group.kv_cache_spec)]
        # Conv, state and a ring, which alone is of integers; what else a host may have keeps its steps.
        found = next((spec.block_size for spec in specs if tuple(getattr(spec, "dtypes", ())[2:]) == (torch.int32,)), 0)
        setattr(scheduler, _BLOCK, found)
    return int(found)


def _specs(spec: Any) -> list[Any]:
    """A group's spec, or those of its layers where they differ."""
    return list(getattr(spec, "kv_cache_specs", {}).values()) or [spec]
