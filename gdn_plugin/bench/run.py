"""Runs one comparison: numbers first, then interleaved timings; a row a contender with its distance to the limit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch

from gdn_plugin.bench import contenders, shapes, timing, workload

DECODE_OPS = ("decode", "fused_decode")
# Largest relative error ‖out - ref‖ / ‖ref‖ at which a contender is still timed; bf16 outputs differ by about 4e-3.
LARGEST_ERROR = 2e-2


@dataclass(slots=True)
class Row:
    """One contender on one shape and mix. `ratio` is the first contender's time over this one's (above 1: faster).

    `bytes` and `flops` are what the op must at least move and do (`shapes.Cost`), the same for every contender.
    """

    op: str
    shape: str
    mix: str
    contender: str
    us: float | None
    ratio: float | None
    bandwidth_share: float | None
    matmul_share: float | None
    floor_us: float
    error: float | None
    mode: str
    tokens: int
    bytes: int
    flops: int
    note: str = ""

    @property
    def work(self) -> str:
        return f"{self.op} {self.shape} {self.mix} {self.mode}"


def cost(op: str, shape: shapes.Shape, lens: tuple[int, ...], state_bytes: int = 4) -> shapes.Cost:
    if op == "prefill":
        return shapes.prefill_cost(shape, lens, state=state_bytes)
    if op == "conv_prologue":
        return shapes.prologue_cost(shape, lens)
    if op == "fused_decode":
        return shapes.fused_decode_cost(shape, len(lens), state=state_bytes)
    return shapes.decode_cost(shape, len(lens), tokens=max(lens), state=state_bytes)


def _error(
    op: str,
    name: str,
    shape: shapes.Shape,
    lens: tuple[int, ...],
    device: str,
    dtype: torch.dtype,
    state_dtype: torch.dtype,
) -> float:
    """Relative error of `name` against `reference` on the mix cut to 4 sequences of at most 257 tokens."""
    small = tuple(min(length, 257) for length in lens[:4])

    def inputs() -> workload.Workload:
        return workload.make_workload(
            shape, small, device=device, dtype=dtype, state_dtype=state_dtype, rows=sum(small) + 8
        )

    got = contenders.maker(op, name)(inputs())()
    want = contenders.ours(op, "reference")(inputs())()
    return float((got.float() - want.float()).norm() / want.float().norm())


def compare(
    op: str,
    names: Iterable[str],
    shape: shapes.Shape,
    mix: str,
    *,
    device: str,
    limits: dict[str, float],
    dtype: torch.dtype = torch.bfloat16,
    state_dtype: torch.dtype = torch.float32,
    graph: bool = False,
    seconds: float = 10.0,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Times `names` (backends of ours or `contenders.OTHERS`) on one op, shape and batch mix.

    Args:
        mix: see `shapes.parse_mix`; for decode "32" means 32 sequences of one token.
        limits: what `timing.ceilings` measured on this machine.
        graph: replay a CUDA graph of the call instead of calling it (CUDA only).
        seconds: how long the timing of this comparison may take.
    """
    lens = (1,) * int(mix) if op in DECODE_OPS and mix.isdigit() else shapes.parse_mix(mix)
    least = cost(op, shape, lens, state_bytes=state_dtype.itemsize)
    floor = least.floor_us(limits["copy_bytes_per_s"], limits["matmul_flops_per_s"])
    calls: dict[str, timing.Call] = {}
    errors: dict[str, float] = {}
    notes: dict[str, str] = {}
    mode = "graph" if graph else "eager"
    names = list(names)
    for name in names:
        progress(f"{op} {shape.name} {mix}: {name}")
        try:
            errors[name] = _error(op, name, shape, lens, device, dtype, state_dtype)
            if not errors[name] < LARGEST_ERROR:
                notes[name] = f"wrong numbers: relative error {errors[name]:.1e}, not timed"
                continue
            rows = sum(lens) + 2 if op == "verify" else None
            call = contenders.maker(op, name)(
                workload.make_workload(shape, lens, device=device, dtype=dtype, state_dtype=state_dtype, rows=rows)
            )
            call()
            calls[name] = timing.capture(call) if graph else call
        except Exception as exc:  # a contender that fails is a row of the report, not the end of the run
            notes[name] = f"{type(exc).__name__}: {str(exc).splitlines()[0] if str(exc) else ''}"[:200]
    with torch.inference_mode():  # as hosts call them
        samples = timing.interleaved(calls, device=device, seconds=seconds) if calls else {}
    base = next((timing.median(samples[name]) for name in names if name in samples), None)
    out = []
    for name in names:
        us = timing.median(samples[name]) if name in samples else None
        out.append(
            Row(
                op=op,
                shape=shape.name,
                mix=mix,
                contender=name,
                us=us,
                ratio=base / us if us and base else None,
                bandwidth_share=least.bytes / (us * 1e-6) / limits["copy_bytes_per_s"] if us else None,
                matmul_share=least.flops / (us * 1e-6) / limits["matmul_flops_per_s"] if us else None,
                floor_us=floor,
                error=errors.get(name),
                mode=mode,
                tokens=sum(lens),
                bytes=least.bytes,
                flops=least.flops,
                note=notes.get(name, ""),
            )
        )
    return out


def host_overhead_us(op: str, backend: str, device: str) -> float:
    """Host time of one call in microseconds: a problem so small that the device does next to nothing."""
    import time

    lens = (1,) if op in DECODE_OPS else (2,)
    call = contenders.ours(op, backend)(
        workload.make_workload(shapes.Shape("overhead", 1, 1, 64, 64), lens, device=device, rows=8)
    )
    for _ in range(20):
        call()
    times = []
    for _ in range(200):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
        if device == "cuda":
            torch.cuda.synchronize()
    return timing.median(times)


def as_json(rows: list[Row]) -> list[dict[str, object]]:
    return [asdict(row) for row in rows]
