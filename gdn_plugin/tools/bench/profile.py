"""What one call launches on the device, by kernel name and time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel, copy or fill of a call: how often it ran and how long in all, in microseconds a call."""

    name: str
    count: float
    us: float


def launches(call: Callable[[], object], repeats: int = 10) -> list[Launch]:
    """Every device activity of `call`, longest first. CUDA only."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    count: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            count[event.name] += 1
            total[event.name] += event.device_time
    return sorted(
        (Launch(name, count[name] / repeats, total[name] / repeats) for name in count), key=lambda row: -row.us
    )


def table(title: str, rows: list[Launch]) -> str:
    lines = [f"{title}: {sum(r.count for r in rows):.0f} launches, {sum(r.us for r in rows):.1f} us"]
    lines += [f"  {row.count:4.0f} x {row.us:9.1f} us  {row.name[:56]}" for row in rows]
    return "\n".join(lines)
