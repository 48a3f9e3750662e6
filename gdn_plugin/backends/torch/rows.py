"""Pool rows by index without looking at the indices: what the `torch` backend does in place of masks and `.item()`.

A padding sequence has no row. It must not be written, and dropping it would need its position on the host. So a
sequence that is not live repeats the write of the first live one: the same row, the same value. Where none is live, all
of them rewrite row 0 with what it holds.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gather(pool: Tensor, rows: Tensor, live: Tensor, dtype: torch.dtype) -> Tensor:
    """pool[rows] in `dtype`, zeros where not live: [B, ...]."""
    if pool.shape[0] == 0:
        return torch.zeros(rows.shape[0], *pool.shape[1:], dtype=dtype, device=pool.device)
    picked = pool.index_select(0, torch.where(live, rows, 0)).to(dtype)
    return torch.where(live.view(-1, *[1] * (pool.dim() - 1)), picked, 0)


def scatter(pool: Tensor, rows: Tensor, live: Tensor, values: Tensor) -> None:
    """pool[rows] = values where live; every other row keeps its bits.

    Args:
        rows: [B] int64, unique where live.
        live: [B] bool.
        values: [B, ...] of any dtype.
    """
    if pool.shape[0] == 0 or rows.shape[0] == 0:
        return
    own = torch.arange(rows.shape[0], device=rows.device)
    source = torch.where(live, own, live.int().argmax())
    target = torch.where(live.any(), rows.index_select(0, source), 0)
    # Only read where nothing is live; row 0 then keeps its value.
    kept = pool.narrow(0, 0, 1)
    new = torch.where(live.any(), values.to(pool.dtype).index_select(0, source), kept)
    pool.index_copy_(0, target, new)
