"""`gdn-plugin bench`: numbers checked first, then interleaved timings, medians and ratios."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from pathlib import Path

MIXES = {
    "prefill": ("1x2048", "8x512"),
    "conv_prologue": ("1x2048",),
    "decode": ("1", "32"),
    "fused_decode": ("1", "32"),
    "verify": ("8x4",),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", action="append", choices=tuple(MIXES), help="an op; may be repeated (default: all)")
    parser.add_argument(
        "--phase", action="append", choices=("prefill", "decode", "verify"), help="the same as --op, by phase"
    )
    parser.add_argument("--backend", help="our backends, joined by commas (default: all this machine can run)")
    parser.add_argument("--against", default="", help="vllm, transformers, fla, flashinfer-raw, flashinfer-as-vllm")
    parser.add_argument("--shape", default="qwen3-next", help="a named shape, or Hk,Hv,K,V (--list names them)")
    parser.add_argument("--mix", help="batch mixes joined by commas: 8x1024, 1+64+513, ragged; decode: 32")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--state-dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--graph", action="store_true", help="replay CUDA graphs (CUDA only)")
    parser.add_argument("--seconds", type=float, default=10.0, help="time for one comparison (default 10)")
    parser.add_argument(
        "--engine", type=Path, metavar="MODEL", help="throughput of vLLM on this model, stock and plugin"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them as PNG (needs matplotlib)")
    parser.add_argument("--list", action="store_true", help="the named shapes")


def run(args: argparse.Namespace) -> int:
    from gdn_plugin.bench import shapes

    if args.list:
        for shape in shapes.SHAPES.values():
            dims = f"K={shape.head_k_dim:<4} V={shape.head_v_dim}"
            print(f"{shape.name:18} Hk={shape.num_k_heads:<3} Hv={shape.num_v_heads:<3} {dims}")
        return 0
    if args.engine:
        from gdn_plugin.bench import engine

        return engine.main(args.engine, args.dtype)

    import torch

    from gdn_plugin.bench import report, timing
    from gdn_plugin.bench.run import Row, as_json, compare, host_overhead_us

    try:
        shape = shapes.parse_shape(args.shape)
        _check_names(args)
        for mix in (args.mix or "").split(","):
            if mix and not mix.isdigit():
                shapes.parse_mix(mix)
    except ValueError as error:
        print(f"gdn-plugin bench: {error}", file=sys.stderr)
        return 2
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.graph and device != "cuda":
        print("gdn-plugin bench: --graph needs a CUDA device, and there is none", file=sys.stderr)
        return 2

    progress = _Progress()
    progress("measuring copy bandwidth and matmul rate")
    limits = timing.ceilings(device)
    rows: list[Row] = []
    overhead: dict[str, float] = {}
    ops = tuple(dict.fromkeys((args.op or []) + (args.phase or []))) or tuple(MIXES)
    for op in ops:
        ours = args.backend.split(",") if args.backend else _able(op, shape, args.dtype, args.state_dtype)
        names = [*ours, *(name for name in args.against.split(",") if name)]
        for mix in args.mix.split(",") if args.mix else MIXES[op]:
            rows += compare(
                op,
                names,
                shape,
                mix,
                device=device,
                limits=limits,
                dtype=getattr(torch, args.dtype),
                state_dtype=getattr(torch, args.state_dtype),
                graph=args.graph,
                seconds=args.seconds,
                progress=progress,
            )
        for name in ours:
            if any(row.contender == name and row.us for row in rows):
                progress(f"{op}: host time of a call of {name}")
                overhead[f"{op} {name}"] = host_overhead_us(op, name, device)
    progress.end()
    facts = report.machine(device)
    print(textwrap.fill(", ".join(f"{key} {value}" for key, value in facts.items()), 80))
    copy, matmul = limits["copy_bytes_per_s"], limits["matmul_flops_per_s"]
    print(f"copy {copy / 1e9:.0f} GB/s (read + write), bf16 matmul {matmul / 1e9:.0f} GFLOP/s\n")
    print(report.table(rows))
    if overhead:
        print("\none call of a problem of next to no work, in us of host time:")
        print("\n".join(f"  {name:30}{us:8.1f}" for name, us in overhead.items()))
    if args.json:
        data = {"machine": facts, "limits": limits, "rows": as_json(rows), "host_overhead_us": overhead}
        args.json.write_text(json.dumps(data, indent=1))
    if args.plot:
        report.plot(rows, args.plot, "  ".join(f"{key} {value}" for key, value in facts.items()), limits)
    return 0 if any(row.us for row in rows) else 1


def _check_names(args: argparse.Namespace) -> None:
    """Backends, contenders and files that a long run would only trip over at its end."""
    from gdn_plugin.bench.contenders import OTHERS
    from gdn_plugin.registry import backend_names

    for flag, text, known in (
        ("--backend", args.backend or "", backend_names()),
        ("--against", args.against, (*OTHERS, *backend_names())),
    ):
        for name in filter(None, text.split(",")):
            if name not in known:
                raise ValueError(f"{flag} {name!r} is not known; choose of: {', '.join(known)}")
    for path in (args.json, args.plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"the folder of {path} does not exist")


def _able(op: str, shape: object, dtype: str, state_dtype: str) -> list[str]:
    """Our backends that can run this here, preferred ones first, without the reference (a loop over tokens)."""
    from gdn_plugin.bench.shapes import Shape
    from gdn_plugin.registry import Problem, judge, probe, rows

    assert isinstance(shape, Shape)
    platform = probe()
    problem = Problem(
        op, dtype, state_dtype, shape.num_k_heads, shape.num_v_heads, shape.head_k_dim, shape.head_v_dim, True
    )
    judged = [(row.name, judge(row, platform, problem)) for row in rows(op) if row.name != "reference"]
    able = [(name, verdict) for name, verdict in judged if verdict.supported]
    return [name for name, verdict in sorted(able, key=lambda pair: not pair[1].preferred)]


class _Progress:
    """One line that is written over on a terminal; nothing where the output is a file."""

    def __init__(self) -> None:
        self.shown = sys.stderr.isatty()

    def __call__(self, text: str) -> None:
        if self.shown:
            print(f"\r\033[K{text[:78]}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
