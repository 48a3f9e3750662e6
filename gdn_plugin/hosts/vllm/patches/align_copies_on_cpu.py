"""vLLM's copies of states between cache blocks, for CPUs without Triton.

Changes:  precopy_mamba_align_fused_kernel and postprocess_mamba_fused_kernel (vllm.v1.worker.mamba_utils): Python
          functions stand in for the two Triton kernels, in the host's own way of replacing kernels.
Why:      With prefix caching ("align") and speculation together vLLM moves states by these kernels, and on a CPU
          without a Triton backend the engine dies at the first step: "'function' object is not subscriptable". It
          replaces some kernels there by functions; these two it lacks. Put in only where a GDN layer would run into
          the gap.
Versions: 0.32, 0.33.
Retires:  with the first vLLM that has replacements of its own; this one then changes nothing.
"""

from __future__ import annotations

import ctypes
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_MODULE = "vllm.v1.worker.mamba_utils"


def fill_gap() -> list[str]:
    """Put in what is missing; idempotent.

    Returns:
        names of the kernels replaced; empty where Triton runs on this CPU, where the host has its own replacement, or
        where its kernels do not take the arguments that these functions know.
    """
    if importlib.import_module("vllm.triton_utils").HAS_TRITON:
        return []
    host = importlib.import_module(_MODULE)
    dispatcher = importlib.import_module("vllm.triton_utils.dispatcher")
    wanted: dict[str, Callable[..., None]] = {
        "precopy_mamba_align_fused_kernel": precopy_align,
        "postprocess_mamba_fused_kernel": postprocess_align,
    }
    replaced = []
    for name, replacement in wanted.items():
        kernel = getattr(host, name, None)
        if kernel is None or isinstance(kernel, dispatcher.KernelOverride):
            continue
        theirs = list(getattr(kernel, "arg_names", None) or inspect.signature(kernel).parameters)
        ours = [p.name for p in inspect.signature(replacement).parameters.values() if p.kind != p.VAR_KEYWORD]
        if theirs[: len(ours)] == ours:
            # As the host's own register_kernels does it; that one also searches every module for copies of the
            # kernel, trips over objects it does not expect there, and these two are only used where they are defined.
            setattr(host, name, dispatcher.KernelOverride(kernel, replacement))
            replaced.append(f"{_MODULE}.{name}")
    return replaced


def precopy_align(
    mamba_state_idx_ptr: Tensor,
    src_col_ptr: Tensor,
    token_bias_ptr: Tensor,
    block_table_ptrs_ptr: Tensor,
    block_table_stride_req: int,
    state_base_addrs_ptr: Tensor,
    state_block_strides_ptr: Tensor,
    state_elem_sizes_ptr: Tensor,
    state_inner_sizes_ptr: Tensor,
    state_conv_widths_ptr: Tensor,
    state_group_indices_ptr: Tensor,
    state_dim_row_count_ptr: Tensor,
    state_dim_row_stride_ptr: Tensor,
    idx_mapping_ptr: Tensor | None,
    num_reqs: int,
    **constants: Any,
) -> None:
    """Before a step: a sequence that enters a new block takes its state there.

    Args:
        mamba_state_idx_ptr, src_col_ptr: [requests] block column that the step writes, and the one before (-1: fresh).
        token_bias_ptr: [requests] accepted tokens - 1.
        others: addresses and sizes of every state of every layer, see `_State`.
    """
    states = _states(
        state_base_addrs_ptr,
        state_block_strides_ptr,
        state_elem_sizes_ptr,
        state_inner_sizes_ptr,
        state_conv_widths_ptr,
        state_group_indices_ptr,
        state_dim_row_count_ptr,
        state_dim_row_stride_ptr,
        rows_are_dims=constants["CONV_STATE_DIM_FIRST"],
    )
    tables = block_table_ptrs_ptr.tolist()
    for request in _requests(idx_mapping_ptr, num_reqs):
        source, target = int(src_col_ptr[request]), int(mamba_state_idx_ptr[request])
        if source < 0 or source == target:
            continue
        for state in states:
            table = tables[state.group] + 4 * request * block_table_stride_req
            state.copy(table, source, target, int(token_bias_ptr[request]))


def postprocess_align(
    num_accepted_tokens_ptr: Tensor,
    mamba_state_idx_ptr: Tensor,
    num_scheduled_tokens_ptr: Tensor | None,
    num_computed_tokens_ptr: Tensor,
    num_draft_tokens_ptr: Tensor | None,
    block_table_ptrs_ptr: Tensor,
    block_table_stride_req: int,
    state_base_addrs_ptr: Tensor,
    state_block_strides_ptr: Tensor,
    state_elem_sizes_ptr: Tensor,
    state_inner_sizes_ptr: Tensor,
    state_conv_widths_ptr: Tensor,
    state_group_indices_ptr: Tensor,
    state_dim_row_count_ptr: Tensor,
    state_dim_row_stride_ptr: Tensor,
    num_accepted_tokens_out_ptr: Tensor,
    idx_mapping_ptr: Tensor | None,
    num_reqs: int,
    **constants: Any,
) -> None:
    """After a step: where the accepted tokens reach a block's end, the state there goes to that block.

    `num_accepted_tokens_out_ptr` becomes 1 for a sequence whose state was moved within its own block.
    """
    states = _states(
        state_base_addrs_ptr,
        state_block_strides_ptr,
        state_elem_sizes_ptr,
        state_inner_sizes_ptr,
        state_conv_widths_ptr,
        state_group_indices_ptr,
        state_dim_row_count_ptr,
        state_dim_row_stride_ptr,
        rows_are_dims=constants["CONV_STATE_DIM_FIRST"],
    )
    tables = block_table_ptrs_ptr.tolist()
    block_size = constants["block_size"]
    for request in _requests(idx_mapping_ptr, num_reqs):
        accepted = int(num_accepted_tokens_ptr[request])
        computed = int(num_computed_tokens_ptr[request])
        if num_scheduled_tokens_ptr is None or num_draft_tokens_ptr is None:  # `computed` is the count after the step
            running = computed - accepted + 1
        else:
            running = computed + int(num_scheduled_tokens_ptr[request]) - int(num_draft_tokens_ptr[request])
        boundary = (running + accepted - 1) // block_size * block_size
        if boundary < running:
            continue
        source, target, bias = int(mamba_state_idx_ptr[request]), boundary // block_size - 1, boundary - running
        if source == target:
            num_accepted_tokens_out_ptr[request] = 1
            if bias == 0:
                continue
        for state in states:
            state.copy(tables[state.group] + 4 * request * block_table_stride_req, source, target, bias)


@dataclass(frozen=True, slots=True)
class _State:
    """One state of one layer in memory.

    Args:
        base: address of block 0; stride: bytes between blocks.
        token: bytes of one step of the convolution's window (or of the whole recurrent state).
        width: steps of that window; 0 for the recurrent state.
        rows, row_stride: where the window is the inner dimension, how many of them a block has and bytes between.
        group: of the block table.
    """

    base: int
    stride: int
    token: int
    width: int
    rows: int
    row_stride: int
    group: int

    def copy(self, table: int, source: int, target: int, bias: int) -> None:
        """Move a sequence's state from one block column to another, `bias` accepted tokens further on.

        Args:
            table: address of the sequence's row of the block table (int32).
        """
        to = self.base + _block(table, target) * self.stride
        if not self.width:  # one recurrent state a token: the accepted one lies `bias` columns on
            ctypes.memmove(to, self.base + _block(table, source + bias) * self.stride, self.token)
            return
        start = self.base + _block(table, source) * self.stride + bias * self.token
        for row in range(self.rows):
            offset = row * self.row_stride
            ctypes.memmove(to + offset, start + offset, (self.width - bias) * self.token)


def _block(table: int, column: int) -> int:
    return ctypes.c_int32.from_address(table + 4 * column).value


def _requests(idx_mapping: Tensor | None, count: int) -> list[int]:
    if idx_mapping is None:
        return list(range(count))
    return [slot for slot in idx_mapping[:count].tolist() if slot >= 0]


def _states(
    bases: Tensor,
    strides: Tensor,
    elements: Tensor,
    inners: Tensor,
    widths: Tensor,
    groups: Tensor,
    row_counts: Tensor,
    row_strides: Tensor,
    *,
    rows_are_dims: bool,
) -> list[_State]:
    columns = (bases, strides, elements, inners, widths, groups, row_counts, row_strides)
    found = []
    for base, stride, element, inner, width, group, rows, row_stride in zip(
        *(column.tolist() for column in columns), strict=True
    ):
        by_dim = rows_are_dims and width > 0
        found.append(
            _State(
                base=base % 2**64,  # kept as int64 by the host
                stride=stride,
                token=element if by_dim else inner * element,
                width=width,
                rows=rows if by_dim else 1,
                row_stride=row_stride if by_dim else 0,
                group=group,
            )
        )
    return found
