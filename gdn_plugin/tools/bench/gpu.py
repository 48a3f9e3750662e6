"""The first thing to run on a GPU: profile, benchmarks and sweeps, each within minutes, JSON and a log left behind.

python -m gdn_plugin.tools.bench.gpu --out DIR [steps ...]        (make gpu runs the GPU tests first, then this)
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from gdn_plugin.tools.bench import profile, report, run, timing
from gdn_plugin.tools.cli.values import as_json, seconds, write

HEADS = ("qwen3-next", "qwen3-next-tp2", "qwen3-next-tp4", "qwen3-next-tp8")
PREFILL_MIXES = ("1x2048", "1x8192", "1x32768", "8x1024", "32x256", "ragged")
DECODE_MIXES = ("1", "8", "64", "256", "512")
PREFILL = ("triton", "flashinfer", "fla", "flashinfer-as-vllm", "flashinfer-raw")


class Job:
    """Collects rows and writes them after every comparison, so that a run cut short loses nothing."""

    def __init__(self, out: Path, seconds: float) -> None:
        self.out, self.seconds = out, seconds
        self.limits = timing.ceilings("cuda")
        self.rows: list[run.Row] = []
        self.extra: dict[str, object] = {}

    def compare(
        self,
        op: str,
        names: tuple[str, ...],
        shape: str,
        mix: str,
        *,
        graph: bool,
        state_dtype: str = "float32",
    ) -> None:
        rows = run.compare(
            op,
            names,
            shape,
            mix,
            device="cuda",
            limits=self.limits,
            graph=graph,
            seconds=self.seconds,
            state_dtype=state_dtype,
        )
        self.rows += rows
        print(report.table(rows), flush=True)
        self.save()
        torch.cuda.empty_cache()

    def save(self) -> None:
        data = {
            "machine": report.machine("cuda"),
            "limits": self.limits,
            "rows": run.as_rows(self.rows),
            **self.extra,
        }
        write(self.out / "results.json", as_json(data))


def bench_prefill(job: Job) -> None:
    for shape in HEADS:
        for mix in PREFILL_MIXES:
            job.compare("prefill", PREFILL, shape, mix, graph=False)


def bench_prefill_graph(job: Job) -> None:
    for shape in HEADS:
        for mix in PREFILL_MIXES:
            job.compare("prefill", ("triton", "flashinfer"), shape, mix, graph=True)


def bench_decode(job: Job) -> None:
    for mix in DECODE_MIXES:
        for graph in (True, False) if mix in ("1", "64") else (True,):
            job.compare("decode", ("triton", "flashinfer", "fla"), "qwen3-next", mix, graph=graph)
            job.compare("fused_decode", ("triton",), "qwen3-next", mix, graph=graph)
        for state_dtype in ("float32", "bfloat16"):
            job.compare("replay_decode", ("triton",), "qwen3-next", mix, graph=True, state_dtype=state_dtype)
        job.compare("decode", ("triton", "flashinfer"), "qwen3-next", mix, graph=True, state_dtype="bfloat16")
        job.compare("fused_decode", ("triton",), "qwen3-next", mix, graph=True, state_dtype="bfloat16")
    for mix in ("1", "64", "256"):
        job.compare("fused_decode", ("triton",), "qwen3-next-tp8", mix, graph=True)
    job.compare("replay_fold", ("triton",), "qwen3-next", "64x1", graph=True)


def bench_verify(job: Job) -> None:
    """fp32 pools too, although padded ones are more than FlashInfer's verify can do; bf16 ones it can."""
    for mix in ("1x4", "8x4", "64x2", "64x4", "64x6", "128x4"):
        job.compare("verify", ("triton",), "qwen3-next", mix, graph=True)
        job.compare("verify", ("triton", "flashinfer"), "qwen3-next", mix, graph=True, state_dtype="bfloat16")
        for state_dtype in ("float32", "bfloat16"):
            job.compare("fused_verify", ("triton",), "qwen3-next", mix, graph=True, state_dtype=state_dtype)
            job.compare("replay_verify", ("triton",), "qwen3-next", mix, graph=True, state_dtype=state_dtype)


def bench_norm(job: Job) -> None:
    for mix in ("1x64", "8x1024", "8x2048"):
        job.compare("gated_norm", ("triton", "torch"), "qwen3-next", mix, graph=True)


def bench_prologue(job: Job) -> None:
    for shape in ("qwen3-next", "qwen3-next-tp8"):
        for mix in ("1x2048", "1x8192", "8x1024", "32x256"):
            job.compare("conv_prologue", ("triton", "torch"), shape, mix, graph=False)


def profiles(job: Job) -> None:
    """Launches of one layer's core: ours with conv_prologue, and what users run today from q, k, v, g, beta on."""
    found: dict[str, object] = {}
    for name in ("triton", "flashinfer"):
        _profile(found, f"prefill 8x1024, ours with {name}", "8x1024", ("conv_prologue", "triton"), ("prefill", name))
    for name in ("fla", "flashinfer-as-vllm"):
        _profile(found, f"prefill 8x1024 from q, k, v on, {name}", "8x1024", ("prefill", name))
    _profile(found, "decode B=64, ours", "64", ("fused_decode", "triton"))
    for name in ("triton", "flashinfer", "fla"):
        _profile(found, f"decode B=64 from q, k, v on, {name}", "64", ("decode", name))
    job.extra["profiles"] = found
    job.save()


def _profile(found: dict[str, object], title: str, mix: str, *calls: tuple[str, str]) -> None:
    """Profiles (op, contender) pairs of one batch called one after the other."""
    try:
        made = [run.make_call(op, name, "qwen3-next", mix, device="cuda") for op, name in calls]
        rows = profile.launches(lambda: [call() for call in made])
    except Exception as exc:  # one contender that cannot run must not end the others' profiles
        print(f"{title}: not run: {type(exc).__name__}: {exc}", flush=True)
        return
    print(profile.table(title, rows), flush=True)
    found[title] = [{"name": row.name, "count": row.count, "us": row.us} for row in rows]


STEPS = {
    "profile": profiles,
    "decode": bench_decode,
    "verify": bench_verify,
    "prologue": bench_prologue,
    "norm": bench_norm,
    "prefill": bench_prefill,
    "prefill-graph": bench_prefill_graph,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gdn_plugin.tools.bench.gpu", description=__doc__)
    parser.add_argument("steps", nargs="*", metavar="step", help=f"any of {', '.join(STEPS)}; all when none is named")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--seconds", type=seconds, default=2.0, help="time for one comparison")
    args = parser.parse_args(argv)
    unknown = [step for step in args.steps if step not in STEPS]
    if unknown:
        parser.error(f"unknown step {unknown[0]!r}; choose from {', '.join(STEPS)}")
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was run", file=sys.stderr)
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    job = Job(args.out, args.seconds)
    print(report.machine("cuda"), job.limits, flush=True)
    for step in args.steps or STEPS:
        start = time.monotonic()
        STEPS[step](job)
        print(f"[{step}: {time.monotonic() - start:.0f} s]", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
