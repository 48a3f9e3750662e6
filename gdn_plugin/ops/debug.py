"""Checks of tensor values, made only under GDN_PLUGIN_DEBUG=1: each copies from the device and so synchronises.

They run inside the ops, in front of the backend and before anything is written, so that they also see the values a
compiled graph passes. While a CUDA graph is captured they are skipped (a copy would break the capture), and a replay
runs kernels only.
"""

from __future__ import annotations

import itertools
import os

import torch
from torch import Tensor

from gdn_plugin.ops.validate import fail


def enabled() -> bool:
    value = os.environ.get("GDN_PLUGIN_DEBUG")
    if value is None or value.strip() != "1":
        return False
    return not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


def rows(op: str, rows_named: Tensor, pool_rows: int, null_index: int) -> None:
    """Every row that is not padding is in the pool and named once."""
    named = [i for i in rows_named.flatten().tolist() if i > null_index]
    if named and max(named) >= pool_rows:
        fail(op, "state_indices", f"rows below N = {pool_rows}", max(named))
    seen: set[int] = set()
    for row in named:
        if row in seen:
            fail(op, "state_indices", "unique rows", f"row {row} more than once")
        seen.add(row)


def start_rows(op: str, start: Tensor, lens: list[int], pool_rows: int) -> None:
    """Rows that sequences start from are in the pool; those of empty sequences are not read, and two may be one."""
    for row, length in zip(start.tolist(), lens, strict=True):
        if length > 0 and row >= pool_rows:
            fail(op, "start_rows", f"rows below N = {pool_rows}", row)


def offsets(op: str, cu_seqlens: Tensor, tokens: int) -> list[int]:
    """cu_seqlens starts at 0, never falls and stays within T. Returns the sequences' lengths."""
    values = cu_seqlens.tolist()
    if values[0] != 0:
        fail(op, "cu_seqlens", "first offset 0", values[0])
    lens = [b - a for a, b in itertools.pairwise(values)]
    if lens and min(lens) < 0:
        fail(op, "cu_seqlens", "offsets that never fall", values)
    if values[-1] > tokens:
        fail(op, "cu_seqlens", f"offsets up to T = {tokens}", values[-1])
    return lens


def accepted(op: str, num_accepted_tokens: Tensor, most: int) -> None:
    for n in num_accepted_tokens.tolist():
        if not 1 <= n <= most:
            fail(op, "num_accepted_tokens", f"values from 1 to {most}", n)


def speculative_lens(op: str, lens: list[int], most: int) -> None:
    if lens and max(lens) > most:
        fail(op, "cu_seqlens", f"sequences of at most {most} tokens", max(lens))


def checkpoint_starts(op: str, starts: Tensor, lens: list[int], every: int, rows_given: int) -> None:
    """Row ranges that fit the sequences and the buffer."""
    values = starts.tolist()
    for i, length in enumerate(lens):
        if values[i] < 0 or values[i + 1] - values[i] < length // every or values[i + 1] > rows_given:
            fail(
                op, "checkpoint_cu_starts",
                f"{length // every} rows within [0, {rows_given}] for sequence {i} of {length} tokens",
                f"{values[i]} to {values[i + 1]}",
            )  # fmt: skip
