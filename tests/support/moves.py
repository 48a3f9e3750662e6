"""Pages of sequences in blocks, as vLLM has them in "align" mode, and launches that move them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from gdn_plugin.hosts.vllm.patches import align_copies, replay_pages

BLOCK_SIZE, COLUMNS, WIDTH = 8, 5, 6
KEY_HEADS, VALUE_HEADS, DIM, SLOTS = 1, 3, 16, 8


@dataclass
class World:
    """Two groups of layers of one pool each, and what the host knows of them.

    Args:
        pools: bytes of each group's pages, [blocks, bytes], guarded by a block at both ends.
        tables: blocks of each sequence, by group.
        layers: one a group.
        call: a launch's arguments, but for those of a step.
    """

    pools: list[Tensor]
    tables: list[Tensor]
    layers: list[Any]
    call: dict[str, Any]


def ring_parts(dtype: torch.dtype, state_dtype: torch.dtype) -> tuple[replay_pages.State, ...]:
    shapes = (SLOTS, KEY_HEADS, DIM), (SLOTS, VALUE_HEADS, DIM), (SLOTS, VALUE_HEADS), (KEY_HEADS, 2)
    return tuple(zip(shapes, (dtype, state_dtype, torch.float32, torch.int32), strict=True))


def world(*, ring: bool, dim_first: bool, dtype: torch.dtype, state_dtype: torch.dtype, sequences: int, seed: int,
          device: str = "cpu") -> World:  # fmt: skip
    """The same bits on every device."""
    generator = torch.Generator().manual_seed(seed)
    channels = 2 * KEY_HEADS * DIM + VALUE_HEADS * DIM
    conv = (channels, WIDTH) if dim_first else (WIDTH, channels)
    states: list[tuple[tuple[int, ...], torch.dtype]] = [(conv, dtype), ((VALUE_HEADS, DIM, DIM), state_dtype)]
    span = None
    if ring:
        parts = ring_parts(dtype, state_dtype)
        states.append(replay_pages.ring_state(parts))
        span = replay_pages.span_of(parts)
    sizes = [torch.Size(shape).numel() * of.itemsize for shape, of in states]
    blocks = 2 + sequences * COLUMNS
    pools, layers, tables = [], [], []
    for _ in range(2):
        pool = torch.randint(0, 256, (blocks + 2, sum(sizes) + 32), dtype=torch.uint8, generator=generator).to(device)
        pages, first, views = pool[1:-1], 0, []
        for (shape, of), size in zip(states, sizes, strict=True):
            views.append(pages[:, first : first + size].view(of).unflatten(1, shape))
            first += size
        pools.append(pool)
        layers.append(SimpleNamespace(kv_cache=views, gdn_ring_span=span))
        order = torch.randperm(blocks - 2, generator=generator)[: sequences * COLUMNS].reshape(sequences, COLUMNS) + 1
        table = torch.zeros(sequences, COLUMNS + 3, dtype=torch.int32)
        table[:, :COLUMNS] = order
        tables.append(table.to(device))
    rows = [
        (
            view.data_ptr(), view.stride(0) * view.element_size(), view.element_size(),
            (1 if dim_first else view.stride(1)) if kind == 0 else view[0].numel(),
            WIDTH if kind == 0 else 0, group,
            channels if kind == 0 and dim_first else 0,
            view.stride(1) * view.element_size() if kind == 0 and dim_first else 0,
        )
        for group, layer in enumerate(layers) for kind, view in enumerate(layer.kv_cache)
    ]  # fmt: skip
    long, short = torch.int64, torch.int32
    dtypes = (long, long, short, long, short, short, short, long)
    columns = [
        torch.tensor(column, dtype=of, device=device)
        for column, of in zip(zip(*rows, strict=True), dtypes, strict=True)
    ]
    context = SimpleNamespace(
        state_base_addrs=columns[0], state_conv_widths=columns[4],
        state_dim_row_count=columns[6], state_dim_row_stride=columns[7],
    )  # fmt: skip
    align_copies.mark(context, layers)
    addresses = torch.tensor([table.data_ptr() for table in tables], dtype=long, device=device)
    of_states = (addresses, tables[0].stride(0), *columns)
    call = dict(zip(align_copies._STATES, of_states, strict=True)) | {"CONV_STATE_DIM_FIRST": dim_first}
    return World(pools, tables, layers, call)


def step(kind: str, sequences: int, seed: int, device: str = "cpu") -> dict[str, Any]:
    """A step's arguments. `kind`: "before", "after" (as V2 says it) or "after, V1"."""
    rng = random.Random(seed)

    def ints(make: Any) -> Tensor:
        return torch.tensor([make() for _ in range(sequences)], dtype=torch.int32, device=device)

    slots: list[int] = rng.sample(range(sequences), sequences)
    for left_out in range(0, sequences if sequences > 1 else 0, 5):
        slots[left_out] = -1
    mapping = None if kind == "after, V1" else torch.tensor(slots, dtype=torch.int64, device=device)  # as V2's
    common = {"idx_mapping_ptr": mapping, "num_reqs": max(1, sequences - 1)}
    if kind == "before":
        return common | {
            "mamba_state_idx_ptr": ints(lambda: rng.randrange(COLUMNS)),
            "src_col_ptr": ints(lambda: rng.randrange(-1, COLUMNS)),
            "token_bias_ptr": ints(lambda: rng.randrange(4)),
        }
    accepted, scheduled, computed, columns = [], [], [], []
    for _ in range(sequences):
        taken, drafts = rng.randint(1, 4), 3
        start = BLOCK_SIZE * rng.randint(1, COLUMNS - 1) - rng.choice([1, 1, 2, 2, 3, 6])  # computed before the step
        accepted.append(taken)
        scheduled.append(drafts + 1)
        computed.append(start if kind == "after, V1" else start + taken)
        # Where the host says that it is: the block of the last token that was scheduled; or of any before it.
        columns.append(rng.choice([(start + drafts) // BLOCK_SIZE, max(0, (start + taken) // BLOCK_SIZE - 1)]))

    def of(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    v1 = kind == "after, V1"
    return common | {
        "num_accepted_tokens_ptr": of(accepted),
        "mamba_state_idx_ptr": of(columns),
        "num_scheduled_tokens_ptr": of(scheduled) if v1 else None,
        "num_computed_tokens_ptr": of(computed),
        "num_draft_tokens_ptr": of([3] * sequences) if v1 else None,
        "num_accepted_tokens_out_ptr": of(accepted),
        "block_size": BLOCK_SIZE,
    }


def moved(kind: str, sequences: int, seed: int, on: str, device: str = "cpu", **facts: Any) -> list[Tensor]:
    """The pools and the counts of accepted tokens behind a launch of the kernel ("gpu") or of the functions ("cpu")."""
    there = world(sequences=sequences, seed=seed, device=device, **facts)
    call = there.call | step(kind, sequences, seed, device)
    name = f"_{'before' if kind == 'before' else 'after'}_on_{on}"
    getattr(align_copies, name)(call)
    out = call.get("num_accepted_tokens_out_ptr")
    return [x.cpu() for x in (*there.pools, *(() if out is None else (out,)))]
