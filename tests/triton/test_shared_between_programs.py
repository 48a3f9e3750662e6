"""What the programs of one launch share: no element is read or written where another program may be writing it.

The interpreter runs the programs one after the other, so that a race does not show in the numbers. Here every load,
store, barrier and ticket of a launch is written down, and the order that the kernel itself enforces is checked: of two
programs that touch an element which one of them writes, one must be done with it before its ticket, and the other must
touch it only behind its own, which is the group's last; a barrier stands on either side of a ticket, which one thread
draws for all. Within a program a barrier must stand between the two as well, where another of its threads may hold the
element. And whatever the order in which programs run, the numbers are right.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from gdn_plugin.backends.triton.configs import Tile
from gdn_plugin.backends.triton.fused_decode import run as fused_decode
from gdn_plugin.backends.triton.fused_verify import run as fused_verify
from gdn_plugin.backends.triton.replay import run as replay_step
from gdn_plugin.backends.triton.replay import run_fold
from gdn_plugin.ops.cases import (
    Heads,
    fused_decode_case,
    fused_verify_case,
    replay_decode_case,
    replay_fold_case,
    replay_verify_case,
)
from tests.support.checks import check

KERNELS = {
    "fused_decode": fused_decode, "fused_verify": fused_verify, "replay_decode": replay_step,
    "replay_verify": replay_step, "replay_fold": run_fold,
}  # fmt: skip
CASES = {
    "fused_decode": lambda heads, norm: fused_decode_case(2, heads, norm=norm),
    "fused_verify": lambda heads, norm: fused_verify_case((4, 1, 3, 2), heads, accepted=(1, 4, 3, 2), norm=norm),
    # An empty ring, one that is read round its end, one that folds, and a fresh row.
    "replay_decode": lambda heads, norm: replay_decode_case(3, heads, norm=norm),
    "replay_verify": lambda heads, norm: replay_verify_case((4, 1, 3, 2), heads, norm=norm, fresh=(3,)),
    "replay_fold": lambda heads, norm: replay_fold_case(3, heads),
}
POOLS = ("conv_state", "state", "ring_k", "ring_u", "ring_g", "ring_span", "out")
GROUPS = [((1, 1), 64), ((1, 1), 16), ((1, 3), 64), ((2, 4), 16)]


@dataclass(frozen=True)
class Access:
    """One program's load or store of a tile with an element, and behind how many of its barriers."""

    program: int
    barriers: int
    shape: tuple[int, ...]
    writes: bool


class Trace:
    """Accesses by address, and each program's ticket: (counter, barriers in front of it, its value)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.accesses: dict[int, list[Access]] = defaultdict(list)
        self.tickets: dict[int, tuple[int, int, int]] = {}
        self.program = self.barriers = 0
        builder = InterpreterBuilder
        load, store, barrier = builder.create_masked_load, builder.create_masked_store, builder.create_barrier
        atomic, index = builder.create_atomic_rmw, builder.set_grid_idx

        def set_grid_idx(this, x, y, z):
            self.program, self.barriers = x, 0
            return index(this, x, y, z)

        def create_masked_load(this, ptrs, mask, other, *rest):
            self.touch(ptrs, mask, writes=False)
            return load(this, ptrs, mask, other, *rest)

        def create_masked_store(this, ptrs, value, mask, *rest):
            self.touch(ptrs, mask, writes=True)
            return store(this, ptrs, value, mask, *rest)

        def create_barrier(this):
            self.barriers += 1
            return barrier(this)

        def create_atomic_rmw(this, op, ptr, *rest):
            drawn = atomic(this, op, ptr, *rest)
            assert self.program not in self.tickets, "a program draws one ticket"
            self.tickets[self.program] = int(np.ravel(ptr.data)[0]), self.barriers, int(np.ravel(drawn.data)[0])
            return drawn

        for made in (set_grid_idx, create_masked_load, create_masked_store, create_barrier, create_atomic_rmw):
            monkeypatch.setattr(builder, made.__name__, made)

    def touch(self, ptrs, mask, *, writes: bool) -> None:
        addresses = np.broadcast_to(ptrs.data, mask.data.shape)[mask.data]
        for address in np.unique(addresses).tolist():
            access = Access(self.program, self.barriers, mask.data.shape, writes)
            self.accesses[address].append(access)

    def ordered(self, one: Access, other: Access, last: dict[int, int]) -> bool:
        """Whether `one` comes before `other` in every run: behind a ticket that is its group's last."""
        if one.program not in self.tickets or other.program not in self.tickets:
            return False
        (counter, before, _), (same, behind, drawn) = self.tickets[one.program], self.tickets[other.program]
        return counter == same and one.barriers < before and other.barriers > behind and drawn == last[counter]


def addresses_of(x) -> set[int]:
    """Of x's elements; other pools may lie in the same storage."""
    storage = x.untyped_storage()
    element = torch.arange(storage.nbytes() // x.element_size()).as_strided(x.shape, x.stride(), x.storage_offset())
    return set((storage.data_ptr() + element.flatten() * x.element_size()).tolist())


@pytest.mark.parametrize(("heads", "block_v"), GROUPS, ids=str)
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "plain"])
@pytest.mark.parametrize("op", KERNELS)
def test_what_one_writes_no_other_may_be_touching(monkeypatch, op, heads, block_v, norm):
    case = CASES[op](Heads(*heads, 64, 64), norm)
    given = case.arguments(True)
    trace = Trace(monkeypatch)
    KERNELS[op](**given, config=Tile(block_v * 64, 4))
    group = heads[1] // heads[0] * (64 // block_v)
    last = {counter: group - 1 for counter, _, _ in trace.tickets.values()}
    assert len(trace.tickets) == (0 if group == 1 else len(last) * group)
    shared = 0
    windows = {name: addresses_of(given[name]) for name in POOLS if name in given}
    for address, accesses in trace.accesses.items():
        where = next((name for name, addresses in windows.items() if address in addresses), None)
        for one, other in itertools.combinations(accesses, 2):
            if where is None or not (one.writes or other.writes):
                continue
            if one.program != other.program:
                shared += 1
                fine = trace.ordered(one, other, last) or trace.ordered(other, one, last)
                assert fine, f"two programs race for an element of {where}: {one}, {other}"
            elif where in ("conv_state", "ring_span") or one.shape != other.shape:
                # Elsewhere a tile of one shape is loaded and stored by the same threads; channels, fewer than threads,
                # several threads may hold.
                fine = one.barriers != other.barriers
                assert fine, f"threads of a program race for an element of {where}: {one}, {other}"
    assert (shared > 0) == (group > 1), "the case shares nothing, and so proves nothing"


@pytest.mark.parametrize("order", ["reversed", "odd ones first"])
@pytest.mark.parametrize("op", KERNELS)
def test_programs_may_run_in_any_order(monkeypatch, op, order):
    set_grid_idx = InterpreterBuilder.set_grid_idx

    def reordered(this, x, y, z):
        count = this.grid_dim[0]
        odd = count // 2
        other = {"reversed": count - 1 - x, "odd ones first": 2 * x + 1 if x < odd else 2 * (x - odd)}[order]
        return set_grid_idx(this, other, y, z)

    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", reordered)
    check(partial(KERNELS[op], config=Tile(16 * 64, 4)), CASES[op](Heads(2, 6, 64, 64), True))
