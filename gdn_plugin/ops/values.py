"""Checks of tensor values, made only under GDN_PLUGIN_DEBUG=1: each copies from the device and so synchronises.

They run inside the ops, in front of the backend and before anything is written, so that they also see the values that a
compiled graph passes.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gdn_plugin.ops.check import fail


def check(op: str, arguments: Mapping[str, Any]) -> None:
    """Row numbers, offsets and counts of one call.

    Raises:
        ValueError: one of them leads outside of a tensor, names a row twice, or breaks a promise of `padding`.
    """
    rows = arguments.get("state_indices")
    if rows is None:
        return
    null_index = arguments["null_index"]
    if arguments.get("state") is not None:
        _rows(op, rows, arguments["state"].shape[0], null_index)
    if arguments.get("conv_state") is not None:
        _rows(op, rows if rows.dim() == 1 else rows[:, 0], arguments["conv_state"].shape[0], null_index)
    tokens = rows.shape[0]
    lens = [1] * tokens
    if "cu_seqlens" in arguments:
        tokens = arguments["mixed_qkv" if "mixed_qkv" in arguments else "q"].shape[0]
        lens = _offsets(op, arguments["cu_seqlens"], tokens)
    if rows.dim() == 2:
        _speculative(op, arguments, lens, null_index)
        rows = rows[:, 0]
    elif arguments.get("num_accepted_tokens") is not None and "conv_state" in arguments:
        most = arguments["conv_state"].shape[2] - arguments["conv_weight"].shape[1] + 2
        _accepted(op, arguments, _read(arguments, lens, rows, null_index), most)
        _at_most(op, lens, most)
    if "ring_span" in arguments:
        _spans(op, arguments, _read(arguments, lens, rows, null_index))
    if arguments.get("checkpoints") is not None:
        _checkpoint_starts(op, arguments, lens)
    _promises(op, arguments.get("padding", "any"), rows, null_index, tokens - sum(lens))


def _rows(op: str, rows: Tensor, pool_rows: int, null_index: int) -> None:
    """Every row that is not padding is in the pool and named once."""
    named = [row for row in rows.flatten().tolist() if row > null_index]
    if named and max(named) >= pool_rows:
        fail(op, "state_indices", f"rows below N = {pool_rows}", max(named))
    seen: set[int] = set()
    for row in named:
        if row in seen:
            fail(op, "state_indices", "unique rows", f"row {row} more than once")
        seen.add(row)


def _promises(op: str, padding: str, rows: Tensor, null_index: int, padding_tokens: int) -> None:
    """What `padding` says of rows <= null_index holds."""
    null = [row for row in rows.tolist() if row <= null_index]
    if padding == "none" and (null or padding_tokens):
        what = f"row {null[0]}" if null else f"{padding_tokens} tokens past cu_seqlens[-1]"
        fail(op, "padding", "no padding, as 'none' says", what)
    if padding == "scratch" and any(null):
        fail(op, "state_indices", "row 0 for padding, as padding='scratch' says", min(null))


def _offsets(op: str, cu_seqlens: Tensor, tokens: int) -> list[int]:
    """cu_seqlens starts at 0, never falls and stays within T. Returns the sequences' lengths."""
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0:
        fail(op, "cu_seqlens", "first offset 0", offsets[0])
    lens = [b - a for a, b in itertools.pairwise(offsets)]
    if lens and min(lens) < 0:
        fail(op, "cu_seqlens", "offsets that never fall", offsets)
    if offsets[-1] > tokens:
        fail(op, "cu_seqlens", f"offsets up to T = {tokens}", offsets[-1])
    return lens


def _speculative(op: str, arguments: Mapping[str, Any], lens: list[int], null_index: int) -> None:
    rows = arguments["state_indices"]
    slots = rows.shape[1]
    _at_most(op, lens, slots)
    starts, fused = arguments["start_rows"], "conv_state" in arguments
    # verify knows padding by the row that a sequence starts from, which it has to look up.
    read = _read(arguments, lens, rows[:, 0], null_index) if fused else [length > 0 for length in lens]
    if starts is None or fused:
        _accepted(op, arguments, read, slots)
    if starts is None:
        return
    pool_rows = arguments["state"].shape[0]  # two sequences may start from one
    for row, is_read in zip(starts.tolist(), read, strict=True):
        if is_read and row >= pool_rows:
            fail(op, "start_rows", f"rows below N = {pool_rows}", row)


def _read(arguments: Mapping[str, Any], lens: list[int], rows: Tensor, null_index: int) -> list[bool]:
    """Of which sequences the op reads what was before them: those with tokens, a row of their own, and a state."""
    initial = arguments.get("has_initial_state")
    carried = [True] * len(lens) if initial is None else initial.tolist()
    return [n > 0 and row > null_index and has for n, row, has in zip(lens, rows.tolist(), carried, strict=True)]


def _accepted(op: str, arguments: Mapping[str, Any], read: list[bool], most: int) -> None:
    for n, is_read in zip(arguments["num_accepted_tokens"].tolist(), read, strict=True):
        if is_read and not 1 <= n <= most:
            fail(op, "num_accepted_tokens", f"values from 1 to {most}", n)


def _spans(op: str, arguments: Mapping[str, Any], read: list[bool]) -> None:
    """What a ring holds is within it."""
    slots = arguments["ring_k"].shape[1]
    room = 0  # for the step's own tokens, which go behind even where what is held is folded
    if "conv_state" in arguments:
        room = arguments["conv_state"].shape[2] - arguments["conv_weight"].shape[1] + 2
    accepted = arguments.get("num_accepted_tokens")
    if accepted is not None:
        _accepted(op, arguments, read, slots)
    more = [0] * len(read) if accepted is None else [n - 1 for n in accepted.tolist()]
    for row, plus, is_read in zip(arguments["state_indices"].tolist(), more, read, strict=True):
        if not is_read:
            continue
        spans = arguments["ring_span"][row].tolist()
        first, held = spans[0]
        if not (0 <= first < slots and held >= 0 and held + plus + room <= slots):
            expected = (
                f"a first slot below R = {slots} and a number that fits, with {plus} accepted drafts and a step of "
                f"{room} tokens more"
            )
            fail(op, "ring_span", expected, (first, held))
        if any(span != spans[0] for span in spans):
            fail(op, "ring_span", "the same for every key head", spans)


def _at_most(op: str, lens: list[int], most: int) -> None:
    if lens and max(lens) > most:
        fail(op, "cu_seqlens", f"sequences of at most {most} tokens", max(lens))


def _checkpoint_starts(op: str, arguments: Mapping[str, Any], lens: list[int]) -> None:
    """Row ranges that fit the sequences and the buffer."""
    starts, every = arguments["checkpoint_cu_starts"].tolist(), arguments["checkpoint_every"]
    rows = arguments["checkpoints"].shape[0]
    for i, length in enumerate(lens):
        if starts[i] < 0 or starts[i + 1] - starts[i] < length // every or starts[i + 1] > rows:
            expected = f"{length // every} rows within [0, {rows}] for sequence {i} of {length} tokens"
            fail(op, "checkpoint_cu_starts", expected, f"{starts[i]} to {starts[i + 1]}")
