"""States of sequences moved between blocks of the prefix cache, on a GPU: one launch for all layers.

The host's two kernels have a program for each sequence, state of a layer and sixteenth of it, which look whether there
is something to move; at nearly every step there is not, and looking takes 10 us a layer at 256 sequences (H200). Here a
few programs look at all sequences at once, and share the work where there is some: 1 to 3 MB a layer that is moved.
What is known of each state is the host's own metadata (MambaSpecDecodeGPUContext), with two kinds more, see
`patches.align_copies`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_SEQUENCES = 1024  # looked at together
_UNIT = 1024  # elements moved together
_SHARES = 16  # programs that share a state
_INTEGERS = ("table_stride", "block_size", "num_sequences", "num_states")
_ADDRESSES = (
    "column_ptr", "from_column_ptr", "bias_ptr", "accepted_ptr", "computed_ptr", "scheduled_ptr", "drafts_ptr",
    "accepted_out_ptr", "slots_ptr", "tables_ptr", "bases_ptr", "strides_ptr", "elements_ptr", "inner_ptr",
    "widths_ptr", "groups_ptr", "rows_ptr", "row_strides_ptr",
)  # fmt: skip


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_ADDRESSES)
def move_states_kernel(
    column_ptr,
    from_column_ptr,
    bias_ptr,
    accepted_ptr,
    computed_ptr,
    scheduled_ptr,
    drafts_ptr,
    accepted_out_ptr,
    slots_ptr,
    tables_ptr,
    table_stride,
    bases_ptr,
    strides_ptr,
    elements_ptr,
    inner_ptr,
    widths_ptr,
    groups_ptr,
    rows_ptr,
    row_strides_ptr,
    block_size,
    num_sequences,
    num_states,
    SEQUENCES: tl.constexpr,
    UNIT: tl.constexpr,
    SHARES: tl.constexpr,
    RING: tl.constexpr,
):
    """Before a step (from_column_ptr is given) a sequence that enters a block takes its state there; after a step the
    state at a block's end, where accepted drafts went past it, goes to that block.

    Grid: any number of programs. What is known of sequences is [slots] int32, found by `slots_ptr` [sequences] if there
    is one.
    """
    for first in range(0, num_sequences, SEQUENCES):
        rows = first + tl.arange(0, SEQUENCES)
        valid = rows < num_sequences
        slot = rows
        if slots_ptr is not None:
            slot = tl.load(slots_ptr + rows, mask=valid, other=-1).to(tl.int32)
            valid = valid & (slot >= 0)
        column = tl.load(column_ptr + slot, mask=valid, other=0)
        if from_column_ptr is not None:
            source, target = tl.load(from_column_ptr + slot, mask=valid, other=-1), column
            bias = tl.load(bias_ptr + slot, mask=valid, other=0)
            moving = valid & (source >= 0) & (source != target)
        else:
            accepted = tl.load(accepted_ptr + slot, mask=valid, other=1)
            end = tl.load(computed_ptr + slot, mask=valid, other=0)  # tokens that there are behind the step
            if scheduled_ptr is not None:
                end += tl.load(scheduled_ptr + slot, mask=valid, other=0)
                end += accepted - 1 - tl.load(drafts_ptr + slot, mask=valid, other=0)
            begin = end - accepted + 1  # of which the state in the sequence's row has seen so many
            reached = end // block_size * block_size
            source, target, bias = column, reached // block_size - 1, reached - begin
            here = valid & (reached >= begin) & (source == target)
            if tl.program_id(0) == 0:
                tl.store(accepted_out_ptr + slot, 1, mask=here)
            moving = valid & (reached >= begin) & ((source != target) | (bias != 0))
        rank = tl.cumsum(moving.to(tl.int32), 0) - 1
        count = tl.sum(moving.to(tl.int32), 0)
        for item in range(tl.program_id(0), count * num_states * SHARES, tl.num_programs(0)):
            mine = moving & (rank == item // (num_states * SHARES))
            _move_share(
                tl.sum(tl.where(mine, slot, 0), 0),
                tl.sum(tl.where(mine, source, 0), 0),
                tl.sum(tl.where(mine, target, 0), 0),
                tl.sum(tl.where(mine, bias, 0), 0),
                item // SHARES % num_states,
                item % SHARES,
                tables_ptr,
                table_stride,
                bases_ptr,
                strides_ptr,
                elements_ptr,
                inner_ptr,
                widths_ptr,
                groups_ptr,
                rows_ptr,
                row_strides_ptr,
                UNIT,
                SHARES,
                RING,
            )


@triton.jit
def _move_share(
    slot,
    source,
    target,
    bias,
    state,
    share,
    tables_ptr,
    table_stride,
    bases_ptr,
    strides_ptr,
    elements_ptr,
    inner_ptr,
    widths_ptr,
    groups_ptr,
    rows_ptr,
    row_strides_ptr,
    UNIT: tl.constexpr,
    SHARES: tl.constexpr,
    RING: tl.constexpr,
):
    """A share of one state of one sequence."""
    base, stride = tl.load(bases_ptr + state), tl.load(strides_ptr + state)
    element, inner = tl.load(elements_ptr + state).to(tl.int64), tl.load(inner_ptr + state)
    width = tl.load(widths_ptr + state)
    rows, row_stride = tl.load(rows_ptr + state).to(tl.int64), tl.load(row_strides_ptr + state)
    table = tl.load(tables_ptr + tl.load(groups_ptr + state)).to(tl.pointer_type(tl.int32))
    table += slot.to(tl.int64) * table_stride
    own_row = tl.where(width == 0, bias, 0)  # one row a token
    source_block = tl.load(table + source + own_row).to(tl.int64)
    target_block = tl.load(table + target).to(tl.int64)
    old, new = base + source_block * stride, base + target_block * stride
    if width > 0:
        # The convolution's window moves on. A program has its channels for itself and goes from token to token, so
        # that it may be within one block.
        channels, to_channel, to_token = inner, element, inner * element
        if rows > 0:  # the window is the inner dimension
            channels, to_channel, to_token = rows, row_stride, element
        for first in range(share * UNIT, channels, SHARES * UNIT):
            channel = first + tl.arange(0, UNIT)
            for token in range(width - bias):
                at = channel * to_channel + token * to_token
                _copy(old + bias * to_token + at, new + at, channel < channels, element)
    elif width == RING:
        # Words, of which the second of each key head's pair in the span counts.
        each = tl.cdiv(tl.cdiv(inner, SHARES), UNIT) * UNIT
        for first in range(share * each, tl.minimum(share * each + each, inner), UNIT):
            word = first + tl.arange(0, UNIT)
            valid = word < inner
            value = tl.load((old + word * 4).to(tl.pointer_type(tl.int32)), mask=valid)
            place = word - row_stride  # in the span
            counts = (place >= 0) & (place < rows) & (place % 2 == 1)
            tl.store((new + word * 4).to(tl.pointer_type(tl.int32)), value + tl.where(counts, bias, 0), mask=valid)
    elif source_block != target_block:
        size = inner * element
        # In words where all of it lies so, as GDN states do.
        step = tl.where((old | new | size) % 4 == 0, 4, element)
        units = size // step
        each = tl.cdiv(tl.cdiv(units, SHARES), UNIT) * UNIT
        for first in range(share * each, tl.minimum(share * each + each, units), UNIT):
            at = first + tl.arange(0, UNIT)
            _copy(old + at * step, new + at * step, at < units, step)


@triton.jit
def _copy(old, new, valid, size):
    """Elements of `size` bytes: 1, 2 or 4."""
    if size == 4:
        value = tl.load(old.to(tl.pointer_type(tl.int32)), mask=valid)
        tl.store(new.to(tl.pointer_type(tl.int32)), value, mask=valid)
    elif size == 2:
        half = tl.load(old.to(tl.pointer_type(tl.int16)), mask=valid)
        tl.store(new.to(tl.pointer_type(tl.int16)), half, mask=valid)
    else:
        byte = tl.load(old.to(tl.pointer_type(tl.int8)), mask=valid)
        tl.store(new.to(tl.pointer_type(tl.int8)), byte, mask=valid)


def move_states(
    *,
    columns: Tensor,
    states: tuple[Any, ...],
    count: int,
    slots: Tensor | None,
    ring: int,
    from_columns: Tensor | None = None,
    biases: Tensor | None = None,
    accepted: Tensor | None = None,
    computed: Tensor | None = None,
    scheduled: Tensor | None = None,
    drafts: Tensor | None = None,
    accepted_out: Tensor | None = None,
    block_size: int = 1,
) -> None:
    """Launch the kernel.

    Args:
        columns: [slots] block column of a sequence's running state; before a step the one it goes to.
        states: the host's block tables, the stride of them, and per state addresses, sizes, kinds and groups.
        count: sequences.
        slots: [sequences] the slot of each, -1 to leave it out; None: they are in order.
        ring: the width by which a ring is known.
        from_columns, biases: before a step: the column it comes from, -1 for a fresh one; accepted drafts.
        accepted, computed, scheduled, drafts: after a step: accepted tokens; tokens that are computed, behind the step
            or, with the other two, before it.
        accepted_out: becomes 1 where a state moved on within its block.
    """
    arguments = _arguments(
        states, slots, ring, column_ptr=columns, from_column_ptr=from_columns, bias_ptr=biases, accepted_ptr=accepted,
        computed_ptr=computed, scheduled_ptr=scheduled, drafts_ptr=drafts, accepted_out_ptr=accepted_out,
        block_size=block_size, num_sequences=count,
    )  # fmt: skip
    move_states_kernel[(_programs(columns.device),)](**arguments)


# What a model runner can launch.
VARIANTS = {
    "V1": ("before a step, V1", "after a step, V1"),
    "V2": ("before a step, V2", "after a step, V2"),
}


def compile_variant(name: str, ring: int) -> Any:
    """One of VARIANTS, compiled for the current device as a launch looks for it: Triton's CompiledKernel."""
    ints, longs = (torch.empty(1, dtype=dtype, device="meta") for dtype in (torch.int32, torch.int64))
    states = (longs, 1, longs, longs, ints, longs, ints, ints, ints, longs)
    v1, before = name.endswith("V1"), name.startswith("before")
    of_v1 = ints if v1 else None
    step: dict[str, Tensor | None] = dict.fromkeys(_ADDRESSES[: _ADDRESSES.index("slots_ptr")])
    step |= {"column_ptr": ints}
    if before:
        step |= {"from_column_ptr": ints, "bias_ptr": ints}
    else:
        step |= {"accepted_ptr": ints, "computed_ptr": ints, "accepted_out_ptr": ints}
        step |= {"scheduled_ptr": of_v1, "drafts_ptr": of_v1}
    arguments = _arguments(states, None if v1 else longs, ring, **step, block_size=1, num_sequences=1)
    return move_states_kernel.warmup(grid=(1,), **arguments)


def compile_count() -> int:
    """Variants that this process holds compiled, as `gdn_plugin.backends.triton.launch` counts its kernels."""
    devices = getattr(move_states_kernel, "device_caches", {})
    return sum(len(cache[0]) for cache in devices.values())


def _arguments(states: tuple[Any, ...], slots: Tensor | None, ring: int, **step: Any) -> dict[str, Any]:
    names = (
        "tables_ptr", "table_stride", "bases_ptr", "strides_ptr", "elements_ptr", "inner_ptr", "widths_ptr",
        "groups_ptr", "rows_ptr", "row_strides_ptr",
    )  # fmt: skip
    of_states = dict(zip(names, states, strict=True))
    constants = {"SEQUENCES": _SEQUENCES, "UNIT": _UNIT, "SHARES": _SHARES, "RING": ring}
    return {**step, "slots_ptr": slots, **of_states, "num_states": of_states["bases_ptr"].numel(), **constants}


@functools.cache
def _programs(device: torch.device) -> int:
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
