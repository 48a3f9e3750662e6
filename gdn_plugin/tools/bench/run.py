"""Runs one comparison: numbers first, then interleaved timings; a row a contender with its distance to the limit."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gdn_plugin.ops import cases, selfcheck
from gdn_plugin.ops.cases import Case, Heads
from gdn_plugin.registry import PHASE_OF_OP, Problem, Wants, judge, load, probe, ring_slots, rows
from gdn_plugin.tools.bench import contenders, shapes, timing

# Largest error at which a contender is still timed; bf16 outputs differ by about 4e-3.
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


def problem(op: str, heads: Heads, dtype: str, state_dtype: str, lens: Sequence[int] = ()) -> Problem:
    """One op of a batch without padding, on pools whose rows are padded as a host's are."""
    if op == "gated_norm":
        return Problem(op, dtype, "float32", heads.v_heads, heads.v_heads, heads.v_dim, heads.v_dim)
    return Problem(
        op,
        dtype,
        state_dtype,
        *heads,
        padded_pool=True,
        padding="none" if op in ("prefill", "decode", "verify") else "any",
        max_spec_tokens=max(lens, default=0) if PHASE_OF_OP[op] == "verify" else 0,
        ragged=PHASE_OF_OP[op] == "verify" and len(set(lens)) > 1,
        ring=ring_slots(max(lens, default=0)) if op.startswith("replay_") else 0,
    )


def inputs(
    op: str,
    heads: Heads,
    lens: tuple[int, ...],
    dtype: str,
    state_dtype: str,
    device: str,
    wants: Wants = Wants(),  # noqa: B008
) -> Case:
    """A batch as a host brings it: longest length and start rows looked up, in the form that a backend wants."""
    features: dict[str, Any] = {}
    if op == "prefill":
        # Where vLLM's CPU op has the L2 norm of q and k inside, it is in everybody's time.
        features = {"hint_seqlen": True, "use_qk_l2norm": device == "cpu"}
    elif op == "verify":
        features = {"start_rows": True}
    return cases.case(problem(op, heads, dtype, state_dtype, lens), lens, wants=wants, device=device, **features)


def _wants(op: str, name: str) -> Wants:
    return next((row.wants for row in rows(op) if row.name == name.partition(":")[0]), Wants())


def error(case: Case, make: contenders.Maker) -> float:
    """Largest relative error ‖out - ref‖ / ‖ref‖ of a contender's outputs against the plain recurrence in fp32."""
    truth = case.precise_arguments(torch.float32)
    load(next(row for row in rows(case.op) if row.name == selfcheck.TRUTH)).run(**truth)
    found = 0.0
    for name, got in zip(case.outputs, make(case)(), strict=False):
        want = truth[name]
        found = max(found, float((got.cpu().float() - want).norm() / want.norm()))
    return found


def compare(
    op: str,
    names: Sequence[str],
    shape: str,
    mix: str,
    *,
    device: str,
    limits: dict[str, float],
    dtype: str = "bfloat16",
    state_dtype: str = "float32",
    graph: bool = False,
    seconds: float = 10.0,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Times `names` (see `contenders.maker`) on one op, shape and batch mix.

    Args:
        shape: see `shapes.parse_shape`.
        mix: see `shapes.parse_batch`.
        limits: what `timing.ceilings` measured on this machine.
        graph: replay a CUDA graph of the call instead of calling it (CUDA only).
        seconds: how long the timing of this comparison may take.
        progress: called with what comes next, once a contender.
    """
    heads, lens = shapes.parse_shape(shape), shapes.parse_batch(op, mix)
    small = tuple(min(length, 257) for length in lens[:4])
    sizes = (getattr(torch, name).itemsize for name in (dtype, state_dtype))
    least = shapes.cost(op, heads, lens, *sizes)
    floor = least.floor_us(limits["copy_bytes_per_s"], limits["matmul_flops_per_s"])
    calls: dict[str, timing.Call] = {}
    errors: dict[str, float] = {}
    notes: dict[str, str] = {}
    made: dict[Wants, Case] = {}  # contenders that want the same share inputs, on copies of its pools
    for name in names:
        progress(f"{op} {shape} {mix}: {name}")
        wants = _wants(op, name)
        try:
            make = contenders.maker(op, name)
            errors[name] = error(inputs(op, heads, small, dtype, state_dtype, device, wants), make)
            if not errors[name] < LARGEST_ERROR:  # NaN is wrong too
                notes[name] = f"wrong numbers: relative error {errors[name]:.1e}, not timed"
                continue
            if wants not in made:
                made[wants] = inputs(op, heads, lens, dtype, state_dtype, device, wants)
            call = make(made[wants])
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
                shape=shape,
                mix=mix,
                contender=name,
                us=us,
                ratio=base / us if us and base else None,
                bandwidth_share=least.bytes / (us * 1e-6) / limits["copy_bytes_per_s"] if us else None,
                matmul_share=least.flops / (us * 1e-6) / limits["matmul_flops_per_s"] if us else None,
                floor_us=floor,
                error=errors.get(name),
                mode="graph" if graph else "eager",
                tokens=sum(lens),
                bytes=least.bytes,
                flops=least.flops,
                note=notes.get(name, ""),
            )
        )
    return out


def make_call(
    op: str, name: str, shape: str, mix: str, *, device: str, dtype: str = "bfloat16", state_dtype: str = "float32"
) -> contenders.Call:
    """A contender's call on inputs of its own."""
    heads, lens = shapes.parse_shape(shape), shapes.parse_batch(op, mix)
    return contenders.maker(op, name)(inputs(op, heads, lens, dtype, state_dtype, device, _wants(op, name)))


def host_overhead_us(op: str, backend: str, heads: Heads, dtype: str, state_dtype: str, device: str) -> float:
    """Host time of one call in microseconds: of a layer's heads so few that the device does next to nothing."""
    lens = (1,) if op in shapes.DECODE_OPS else (2,)
    ratio = heads.v_heads // heads.k_heads
    k_heads = 1 if ratio > 1 else min(2, heads.k_heads)  # FlashInfer's decode takes two value heads or more
    few = heads._replace(k_heads=k_heads, v_heads=k_heads * ratio)
    case = inputs(op, few, lens, dtype, state_dtype, device, _wants(op, backend))
    call = contenders.ours(backend)(case)
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


def able(op: str, heads: Heads, dtype: str, state_dtype: str) -> list[str]:
    """Our backends that can run an op here, preferred ones first, without the truth (a loop over tokens)."""
    platform, asked = probe(), problem(op, heads, dtype, state_dtype)
    judged = [(row.name, judge(row, platform, asked)) for row in rows(op) if row.name != selfcheck.TRUTH]
    found = [(name, verdict) for name, verdict in judged if verdict.supported]
    return [name for name, verdict in sorted(found, key=lambda pair: not pair[1].preferred)]


def as_rows(rows: list[Row]) -> list[dict[str, object]]:
    return [asdict(row) for row in rows]
