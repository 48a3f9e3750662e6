"""vLLM's moves of states between cache blocks, with the prefix cache ("align" mode).

Changes:  precopy_mamba_align_fused_kernel and postprocess_mamba_fused_kernel (vllm.v1.worker.mamba_utils): on a GPU one
          kernel of ours, on a CPU without Triton Python functions, put in the host's own way of replacing kernels. And
          MambaSpecDecodeGPUContext.initialize_from_forward_context: behind it the states of pages with a ring are
          known as such.
Why:      Where accepted drafts reach a block's end, or the step behind them begins another block, the host moves the
          state behind so many accepted tokens to the other block, from that draft's own row. A ring has all drafts in
          one row: the page is moved as it is, and its span counts the accepted drafts. Without a ring the kernel does
          what the host's do, and takes next to no time where nothing is to be moved. On a CPU the host has no kernel
          to run, and the engine dies at the first step: "'function' object is not subscriptable".
Versions: 0.32, 0.33, with both model runners. Applied in align mode: on a GPU always, on a CPU with drafts.
Retires:  with the first vLLM whose moves know states of other kinds; none yet.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from gdn_plugin.hosts.warm_up import count_too

_MODULE = "vllm.v1.worker.mamba_utils"
_CONTEXT = "MambaSpecDecodeGPUContext"
# What stands in `state_conv_widths`, which is 0 for a state of one row a token:
WHOLE = -1  # moved as it is
RING = -2  # and its span counts the accepted drafts; in place of a window's rows the span's ints and its first word

_STATES = (
    "block_table_ptrs_ptr", "block_table_stride_req", "state_base_addrs_ptr", "state_block_strides_ptr",
    "state_elem_sizes_ptr", "state_inner_sizes_ptr", "state_conv_widths_ptr", "state_group_indices_ptr",
    "state_dim_row_count_ptr", "state_dim_row_stride_ptr",
)  # fmt: skip
# The host's kernels, with their arguments up to the constants.
_KERNELS = {
    "precopy_mamba_align_fused_kernel": (
        "mamba_state_idx_ptr", "src_col_ptr", "token_bias_ptr", *_STATES, "idx_mapping_ptr", "num_reqs",
    ),
    "postprocess_mamba_fused_kernel": (
        "num_accepted_tokens_ptr", "mamba_state_idx_ptr", "num_scheduled_tokens_ptr", "num_computed_tokens_ptr",
        "num_draft_tokens_ptr", *_STATES, "num_accepted_tokens_out_ptr", "idx_mapping_ptr", "num_reqs",
    ),
}  # fmt: skip

Call = dict[str, Any]  # a launch's arguments, by the host's names

_hosts_own: dict[str, Any] = {}  # kernels that are replaced
_warm: set[str] = set()  # model runners whose variants are compiled


def can_take_over(device_type: str) -> bool:
    """Whether `take_over` puts the change in, or has: the host has these two kernels, with the arguments that are known
    here, nobody else has replaced them, and on a CPU they do not run in Triton."""
    if device_type == "cpu" and importlib.import_module("vllm.triton_utils").HAS_TRITON:
        return False
    host = importlib.import_module(_MODULE)
    known = hasattr(host, _CONTEXT) and all(
        tuple(_arguments(getattr(host, name, None)))[: len(names)] == names for name, names in _KERNELS.items()
    )
    if not known or _hosts_own:
        return known
    override = importlib.import_module("vllm.triton_utils.dispatcher").KernelOverride
    return not any(isinstance(getattr(host, name), override) for name in _KERNELS)


def take_over(device_type: str) -> bool:
    """Put the change in, where that can be; idempotent.

    Returns:
        Whether the host was changed by this call.
    """
    if _hosts_own or not can_take_over(device_type):
        return False
    host = importlib.import_module(_MODULE)
    dispatcher = importlib.import_module("vllm.triton_utils.dispatcher")
    runs = (_before_on_cpu, _after_on_cpu) if device_type == "cpu" else (_before_on_gpu, _after_on_gpu)
    for (name, names), run in zip(_KERNELS.items(), runs, strict=True):
        # As the host's own register_kernels does it; that one also searches every module for copies of the kernel,
        # trips over objects it does not expect there, and these two are only used where they are defined.
        _hosts_own[name] = getattr(host, name)
        setattr(host, name, dispatcher.KernelOverride(_hosts_own[name], _replacement(names, run)))
    context = getattr(host, _CONTEXT)
    initialize = context.initialize_from_forward_context
    if hasattr(initialize, "_gdn_plugin"):  # from before they were given back
        return True

    @functools.wraps(initialize)
    def initialize_and_mark(self: Any, kv_cache_config: Any, forward_context: Any, *args: Any, **kwargs: Any) -> None:
        first = not self.is_initialized
        initialize(self, kv_cache_config, forward_context, *args, **kwargs)
        if first:
            with getattr(host, "gpu_sync_allowed", contextlib.nullcontext)():  # as the host's own part of it
                mark(self, forward_context.values())

    initialize_and_mark._gdn_plugin = True  # type: ignore[attr-defined]
    context.initialize_from_forward_context = initialize_and_mark
    return True


def give_back() -> None:
    """The host's kernels in their places again: right for every page but those with a ring and drafts."""
    host = importlib.import_module(_MODULE)
    while _hosts_own:
        setattr(host, *_hosts_own.popitem())


def mark(context: Any, layers: Iterable[Any]) -> None:
    """Tell the states of pages with a ring from those of which a sequence has one row a token.

    Args:
        context: the host's, with what it knows of each state.
        layers: of the model; those with a ring have `gdn_ring_span`, and conv, state and ring in `kv_cache`.
    """
    states, rings = {}, {}
    for layer in layers:
        span = getattr(layer, "gdn_ring_span", None)
        if span is not None:
            _, state, ring = layer.kv_cache
            states[state.data_ptr()] = WHOLE
            rings[ring.data_ptr()] = span
    for i, address in enumerate(context.state_base_addrs.tolist()):
        address %= 2**64  # kept as int64 by the host
        if address in rings:
            context.state_conv_widths[i] = RING
            context.state_dim_row_stride[i], context.state_dim_row_count[i] = rings[address]
        elif address in states:
            context.state_conv_widths[i] = WHOLE


def warm_up(runner: str) -> None:
    """Compile what `take_over` put in on a GPU for a model runner, "V1" or "V2". Once a process.

    Raises:
        Whatever the compiler raises.
    """
    from gdn_plugin.hosts.vllm.state_moves import VARIANTS, compile_count, compile_variant

    if not _hosts_own or runner in _warm:
        return
    count_too(compile_count)
    for name in VARIANTS[runner]:
        # Asked for, the launcher loads the machine code onto the device.
        getattr(compile_variant(name, RING), "run", None)
    _warm.add(runner)


def _replacement(names: tuple[str, ...], run: Callable[[Call], None]) -> Callable[..., None]:
    def launch(*arguments: Any, **constants: Any) -> None:
        run({**dict(zip(names, arguments, strict=False)), **constants})

    return launch


def _arguments(kernel: Any) -> list[str]:
    if kernel is None:
        return []
    return list(getattr(kernel, "arg_names", None) or inspect.signature(kernel).parameters)


def _before_on_gpu(call: Call) -> None:
    from gdn_plugin.hosts.vllm.state_moves import move_states

    move_states(
        columns=call["mamba_state_idx_ptr"],
        from_columns=call["src_col_ptr"],
        biases=call["token_bias_ptr"],
        **_common(call),
    )


def _after_on_gpu(call: Call) -> None:
    from gdn_plugin.hosts.vllm.state_moves import move_states

    move_states(
        columns=call["mamba_state_idx_ptr"],
        accepted=call["num_accepted_tokens_ptr"],
        computed=call["num_computed_tokens_ptr"],
        scheduled=call["num_scheduled_tokens_ptr"],
        drafts=call["num_draft_tokens_ptr"],
        accepted_out=call["num_accepted_tokens_out_ptr"],
        block_size=call["block_size"],
        **_common(call),
    )


def _common(call: Call) -> dict[str, Any]:
    states = tuple(call[name] for name in _STATES)
    return {"states": states, "count": call["num_reqs"], "slots": call["idx_mapping_ptr"], "ring": RING}


def _before_on_cpu(call: Call) -> None:
    """A sequence that enters a new block takes its state there."""
    states, tables = _states(call), call["block_table_ptrs_ptr"].tolist()
    for slot in _slots(call):
        source, target = int(call["src_col_ptr"][slot]), int(call["mamba_state_idx_ptr"][slot])
        if source < 0 or source == target:
            continue
        for state in states:
            table = tables[state.group] + 4 * slot * call["block_table_stride_req"]
            state.move(table, source, target, int(call["token_bias_ptr"][slot]))


def _after_on_cpu(call: Call) -> None:
    """Where the accepted tokens reach a block's end, the state there goes to that block.

    `num_accepted_tokens_out_ptr` becomes 1 for a sequence whose state was moved on within its own block.
    """
    states, tables, block_size = _states(call), call["block_table_ptrs_ptr"].tolist(), call["block_size"]
    scheduled, drafts = call["num_scheduled_tokens_ptr"], call["num_draft_tokens_ptr"]
    for slot in _slots(call):
        accepted = int(call["num_accepted_tokens_ptr"][slot])
        end = int(call["num_computed_tokens_ptr"][slot])  # behind the step
        if scheduled is not None and drafts is not None:
            end += int(scheduled[slot]) - int(drafts[slot]) + accepted - 1
        running = end - accepted + 1
        boundary = end // block_size * block_size
        if boundary < running:
            continue
        source, target, bias = int(call["mamba_state_idx_ptr"][slot]), boundary // block_size - 1, boundary - running
        if source == target:
            call["num_accepted_tokens_out_ptr"][slot] = 1
            if bias == 0:
                continue
        for state in states:
            state.move(tables[state.group] + 4 * slot * call["block_table_stride_req"], source, target, bias)


@dataclass(frozen=True, slots=True)
class _State:
    """One state of one layer in memory.

    Args:
        base: address of block 0; stride: bytes between blocks.
        token: bytes of one step of the convolution's window (or of the whole state).
        width: steps of that window; else the kind, see above.
        rows, row_stride: where the window is the inner dimension, how many of them a block has and bytes between; of a
            ring the ints of its span and the first word of them.
        group: of the block table.
    """

    base: int
    stride: int
    token: int
    width: int
    rows: int
    row_stride: int
    group: int

    def move(self, table: int, source: int, target: int, bias: int) -> None:
        """Move a sequence's state from one block column to another, `bias` accepted tokens further on.

        Args:
            table: address of the sequence's row of the block table (int32).
        """
        to = self.base + _block(table, target) * self.stride
        start = self.base + _block(table, source) * self.stride
        if self.width > 0:
            start += bias * self.token
            for row in range(self.rows):
                offset = row * self.row_stride
                ctypes.memmove(to + offset, start + offset, (self.width - bias) * self.token)
            return
        if not self.width:  # one row a token: the accepted one lies `bias` columns on
            start = self.base + _block(table, source + bias) * self.stride
        ctypes.memmove(to, start, self.token)
        if self.width == RING:
            for word in range(self.row_stride + 1, self.row_stride + self.rows, 2):
                ctypes.c_int32.from_address(to + 4 * word).value += bias


def _block(table: int, column: int) -> int:
    return ctypes.c_int32.from_address(table + 4 * column).value


def _slots(call: Call) -> list[int]:
    mapping, count = call["idx_mapping_ptr"], call["num_reqs"]
    if mapping is None:
        return list(range(count))
    return [slot for slot in mapping[:count].tolist() if slot >= 0]


def _states(call: Call) -> list[_State]:
    columns = (call[name].tolist() for name in _STATES[2:])
    found = []
    for base, stride, element, inner, width, group, rows, row_stride in zip(*columns, strict=True):
        by_dim = call["CONV_STATE_DIM_FIRST"] and width > 0
        found.append(
            _State(
                base=base % 2**64,  # kept as int64 by the host
                stride=stride,
                token=element if by_dim else inner * element,
                width=width,
                rows=rows if by_dim or width == RING else 1,
                row_stride=row_stride if by_dim or width == RING else 0,
                group=group,
            )
        )
    return found
