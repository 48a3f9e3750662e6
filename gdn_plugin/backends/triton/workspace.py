"""Counters for the programs of a launch that have to know which of them is last."""

from __future__ import annotations

import torch
from torch import Tensor

REGION = 1 << 16  # counters a stream gets: 1024 sequences x 64 key heads
REGIONS = 8  # streams served from the one allocation that a device's first call makes

# Never freed: a captured graph holds the addresses.
_allocations: list[Tensor] = []
_free: dict[torch.device, list[Tensor]] = {}
_current: dict[tuple[torch.device, int], Tensor] = {}


def counters(device: torch.device, count: int) -> Tensor:
    """At least `count` int32 zeros on `device`, for the current stream alone; whoever takes them leaves them zero.

    The first call on a device allocates and zeroes for several streams at once, so that a stream first seen during
    capture finds its counters ready. Only a ninth stream, or more than 65536 counters, allocates again.
    """
    if device.type == "meta":  # a launcher that is driven without a GPU
        return torch.empty(count, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    region = _current.get((device, stream))
    if region is not None and region.numel() >= count:
        return region
    if device not in _free:
        pool = torch.zeros(REGIONS, REGION, dtype=torch.int32, device=device)
        _allocations.append(pool)
        _free[device] = list(pool)
    if count <= REGION and _free[device]:
        region = _free[device].pop()
    else:
        region = torch.zeros(max(count, REGION), dtype=torch.int32, device=device)
        _allocations.append(region)
    _current[device, stream] = region
    return region


def regions() -> list[Tensor]:
    """Everything ever allocated here, for tests: all zero whenever no launch is under way."""
    return list(_allocations)
