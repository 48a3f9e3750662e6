"""Look-up of launch configurations: tables by (sm, K, V, dtype), in each op's own file, never tuned at run time.

An autotuner would stall the first request, and it runs out of memory once the KV cache is allocated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from gdn_plugin.ops.record import dtype_name

# sm 0, K 0, V 0 and dtype "" stand for "any".
Key = tuple[int, int, int, str]
Row = TypeVar("Row")

# Fewer (sequence, value head) pairs than this are "few": heads are then split finer, so that all multiprocessors work.
FEW_HEADS = 256


class Table(Generic[Row]):
    """Rows by `Key`; every table has an any-row."""

    def __init__(self, rows: Mapping[Key, Row]) -> None:
        self.rows = rows
        self._found: dict[tuple[int, int, int, torch.dtype], Row] = {}

    def lookup(self, sm: int, head_k_dim: int, head_v_dim: int, dtype: torch.dtype) -> Row:
        """The row for a device and problem.

        A row that names the dtype beats one that does not, then one for this sm beats one for its family (sm_103: 100),
        which beats any sm, then one that names K and V beats one that names K, and that one that names neither.

        Raises:
            KeyError: no row fits.
        """
        key = (sm, head_k_dim, head_v_dim, dtype)
        found = self._found.get(key)
        if found is None:
            found = self._found[key] = self._search(*key)
        return found

    def _search(self, sm: int, head_k_dim: int, head_v_dim: int, dtype: torch.dtype) -> Row:
        for wanted_dtype in (dtype_name(dtype), ""):
            for wanted_sm in (sm, sm // 10 * 10, 0):
                for dims in ((head_k_dim, head_v_dim), (head_k_dim, 0), (0, head_v_dim), (0, 0)):
                    row = self.rows.get((wanted_sm, *dims, wanted_dtype))
                    if row is not None:
                        return row
        raise KeyError(f"no configuration row for sm={sm}, K={head_k_dim}, V={head_v_dim}, dtype={dtype}")


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program of decode, verify or fused_decode owns: `elements` values of one head's [V, K] state.

    They have to stay in registers, at most 128 a thread; and at small batches there have to be at least as many
    programs as a large GPU has multiprocessors (132 on H100, 148 on B200).
    """

    elements: int
    num_warps: int

    def block_v(self, head_k_dim: int, head_v_dim: int) -> int:
        """Rows of the state that these are."""
        return max(4, min(head_v_dim, self.elements // head_k_dim))


class Tiles(Table[tuple[Tile, Tile]]):
    """(for few heads, for many), by the state's dtype."""

    def tile(self, sm: int, state_dtype: torch.dtype, num_heads: int, head_k_dim: int, head_v_dim: int) -> Tile:
        """num_heads: sequences * value heads of the call."""
        return self.lookup(sm, head_k_dim, head_v_dim, state_dtype)[num_heads >= FEW_HEADS]
