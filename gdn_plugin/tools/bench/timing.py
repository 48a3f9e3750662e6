"""Interleaved timing on CPU and CUDA, and the machine's own ceilings to compare with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]


def _cuda_us(call: Call, inner: int) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(inner):
        call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e3 / inner


def _cpu_us(call: Call, inner: int) -> float:
    start = time.perf_counter()
    for _ in range(inner):
        call()
    return (time.perf_counter() - start) * 1e6 / inner


def capture(call: Call, warm: int = 3, repeats: int = 1) -> Call:
    """`call`, captured `repeats` times in one CUDA graph; what comes back replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()

    def replay() -> None:
        graph.replay()

    replay.keeps = call  # type: ignore[attr-defined]  # the graph holds addresses, not the tensors behind them
    return replay


def interleaved(
    calls: dict[str, Call], *, device: str, rounds: int = 20, target_ms: float = 5.0, seconds: float = 20.0
) -> dict[str, list[float]]:
    """Microseconds a call, one sample a round for each variant, variants in turn so that drift hits all alike.

    Args:
        calls: name -> a call that takes no argument.
        device: "cuda" or "cpu".
        rounds: samples wanted for each variant.
        target_ms: time one sample should take; short calls are repeated inside a sample.
        seconds: stop after this long, at the end of a round, with at least three rounds done.
    """
    clock = _cuda_us if device == "cuda" else _cpu_us
    inner = {}
    for name, call in calls.items():
        call()
        once = clock(call, 1)
        inner[name] = max(1, min(200, int(target_ms * 1e3 / max(once, 1.0))))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    end = time.monotonic() + seconds
    for done in range(rounds):
        for name, call in calls.items():
            samples[name].append(clock(call, inner[name]))
        if done >= 2 and time.monotonic() > end:
            break
    return samples


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def ceilings(device: str) -> dict[str, float]:
    """Measured copy bandwidth (bytes read plus written a second) and bf16 matmul rate (FLOP a second)."""
    cuda = device == "cuda"
    source = torch.empty(2 * 1024**3 if cuda else 256 * 1024**2, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    size = 8192 if cuda else 1024
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(left)
    times = interleaved(
        {"copy": lambda: target.copy_(source), "matmul": lambda: torch.mm(left, right, out=product)},
        device=device,
        rounds=7,
    )
    return {
        "copy_bytes_per_s": 2 * source.numel() / (min(times["copy"]) * 1e-6),
        "matmul_flops_per_s": 2 * size**3 / (min(times["matmul"]) * 1e-6),
    }
