"""`gdn-plugin bench`: numbers checked first, then interleaved timings, medians and ratios."""

from __future__ import annotations

import argparse
import re
import textwrap
from pathlib import Path

from gdn_plugin.registry import DTYPES, backend_names
from gdn_plugin.tools.cli.problem import STATE_DTYPES
from gdn_plugin.tools.cli.values import BadArguments, as_json, count, names, output, picture, seconds, slots, write

MIXES = {
    "prefill": ("1x2048", "8x512"),
    "conv_prologue": ("1x2048",),
    "decode": ("1", "32"),
    "fused_decode": ("1", "32"),
    "verify": ("8x4",),
    "fused_verify": ("8x4",),
    "gated_norm": ("1x2048",),
    "replay_decode": ("1", "32"),
    "replay_verify": ("8x4",),
    "replay_fold": ("32x1",),  # of rings that the first call has emptied: what asking costs
}
# Whom `contenders.OTHERS` knows; a test holds the two together, so that --help need not import torch.
OTHERS = ("vllm", "transformers", "fla", "flashinfer-as-vllm", "flashinfer-raw")

ENGINE_ONLY = ("model", "rounds", "speculative", "replay", "tensor_parallel", "prefix_cache", "turns", "repeats")
OPS_ONLY = ("op", "phase", "backend", "against", "mix", "graph")


def _against(text: str) -> tuple[str, ...]:
    """An argparse type: as `names`. How many numbers a backend's kernel takes is known where it runs."""
    numbered = re.findall(rf"\b(?:{'|'.join(backend_names())}):\d+(?:/\d+)*", text)
    return names(lambda: (*OTHERS, *backend_names(), *numbered))(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", action="append", choices=tuple(MIXES), help="an op; may be repeated (default: all)")
    parser.add_argument(
        "--phase", action="append", choices=("prefill", "decode", "verify"), help="the same as --op, by phase"
    )
    parser.add_argument(
        "--backend", type=names(backend_names), help="ours, joined by commas (default: all this machine can run)"
    )
    parser.add_argument(
        "--against",
        type=_against,
        default=(),
        help="vllm, transformers, fla, flashinfer-raw, flashinfer-as-vllm, or a backend of ours, also with a "
        "configuration in place of its tables', the fields in order: triton:64/2/4 (with --graph)",
    )
    parser.add_argument("--shape", default="qwen3-next", help="a named shape, or Hk,Hv,K,V (--list names them)")
    parser.add_argument("--mix", help="batch mixes joined by commas: 8x1024, 1+64+513, ragged; decode: 32")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES[:3])
    parser.add_argument("--state-dtype", choices=STATE_DTYPES, help="float32; of an engine: the model's own")
    parser.add_argument("--graph", action="store_true", help="replay CUDA graphs (CUDA only)")
    parser.add_argument("--seconds", type=seconds, default=10.0, help="time for one comparison (default 10)")
    parser.add_argument("--json", type=output, metavar="FILE", help="write the rows, after each comparison")
    parser.add_argument("--plot", type=picture, metavar="FILE", help="draw them as PNG (needs matplotlib)")
    parser.add_argument("--list", action="store_true", help="the named shapes, models and rounds")
    group = parser.add_argument_group("the real engine (of the above it takes --dtype, --state-dtype, --json, --plot)")
    group.add_argument("--engine", action="store_true", help="time vLLM, stock and with the plugin, in turn")
    group.add_argument(
        "--model", metavar="MODEL", help="a folder, a hub's name, or a size by name (qwen3.5-4b; without a GPU: tiny)"
    )
    group.add_argument("--rounds", type=names(_rounds), help="joined by commas (prefill,decode,few)")
    group.add_argument("--speculative", type=count, metavar="N", help="drafts a step, in rounds that have some (3)")
    group.add_argument(
        "--replay", type=slots, metavar="R", help="also the plugin with GDN_PLUGIN_REPLAY=R (then the other has 0)"
    )
    group.add_argument("--tensor-parallel", type=count, metavar="N", help="GPUs of each engine (1)")
    group.add_argument("--prefix-cache", action="store_true", default=None, help="with vLLM's prefix cache")
    group.add_argument("--turns", type=count, metavar="N", help="engines of each kind (2, so that a drift shows)")
    group.add_argument("--repeats", type=count, metavar="N", help="of each round in each engine (3)")


def run(args: argparse.Namespace) -> int:
    from gdn_plugin.tools import models
    from gdn_plugin.tools.bench import shapes
    from gdn_plugin.tools.bench.engine import ROUNDS

    if args.list:
        for name, heads in shapes.SHAPES.items():
            print(f"{name:18} Hk={heads.k_heads:<3} Hv={heads.v_heads:<3} K={heads.k_dim:<4} V={heads.v_dim}")
        print("\nmodels of --engine:")
        for name, size in models.SIZES.items():
            print(f"  {name:16}{size.about}")
        print("rounds of --engine:")
        for name, one in ROUNDS.items():
            print(f"  {name:16}{one.about}")
        return 0
    if args.engine:
        return _engine(args)
    for name in ENGINE_ONLY:
        if getattr(args, name) is not None:
            raise BadArguments(f"--{name.replace('_', '-')} belongs to --engine")
    state_dtype = args.state_dtype or "float32"

    import torch
    from tqdm import tqdm

    from gdn_plugin.tools.bench import report, timing
    from gdn_plugin.tools.bench.run import Row, able, as_rows, compare, host_overhead_us

    ops = tuple(dict.fromkeys((args.op or []) + (args.phase or []))) or tuple(MIXES)
    mixes = {op: tuple(args.mix.split(",")) if args.mix is not None else MIXES[op] for op in ops}
    try:
        heads = shapes.parse_shape(args.shape)
        for op in ops:
            for mix in mixes[op]:
                shapes.parse_batch(op, mix)
    except ValueError as exc:
        raise BadArguments(str(exc)) from exc
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.graph and device != "cuda":
        raise BadArguments("--graph needs a CUDA device, and there is none")

    ours = {op: list(args.backend or able(op, heads, args.dtype, state_dtype)) for op in ops}
    contenders = {op: tuple(dict.fromkeys((*ours[op], *args.against))) for op in ops}
    rows: list[Row] = []
    overhead: dict[str, float] = {}
    facts = report.machine(device)
    limits: dict[str, float] = {}

    def save() -> None:
        if args.json:
            data = {"machine": facts, "limits": limits, "rows": as_rows(rows), "host_overhead_us": overhead}
            write(args.json, as_json(data))

    steps = sum((1 + len(mixes[op])) * len(contenders[op]) for op in ops)
    with tqdm(total=steps, disable=None, leave=False, bar_format="{n}/{total} {desc}") as bar:

        def progress(text: str) -> None:
            bar.update()
            bar.set_description_str(text)

        bar.set_description_str("measuring copy bandwidth and matmul rate")
        limits |= timing.ceilings(device)
        try:
            for op in ops:
                for mix in mixes[op]:
                    rows += compare(
                        op,
                        contenders[op],
                        args.shape,
                        mix,
                        device=device,
                        limits=limits,
                        dtype=args.dtype,
                        state_dtype=state_dtype,
                        graph=args.graph,
                        seconds=args.seconds,
                        progress=progress,
                    )
                    save()
                for name in ours[op]:
                    progress(f"{op}: host time of a call of {name}")
                    if any(row.op == op and row.contender == name and row.us for row in rows):
                        overhead[f"{op} {name}"] = host_overhead_us(op, name, heads, args.dtype, state_dtype, device)
                        save()
        finally:  # what was measured before an interruption is shown as well
            bar.close()
            if rows:
                print(_text(facts, limits, rows, overhead), flush=True)
    if args.plot:
        _plot(rows, args.plot, facts)
    return 0 if any(row.us for row in rows) else 1


def _text(facts: dict[str, str], limits: dict[str, float], rows: list, overhead: dict[str, float]) -> str:
    from gdn_plugin.tools.bench import report

    copy, matmul = limits["copy_bytes_per_s"], limits["matmul_flops_per_s"]
    lines = [
        textwrap.fill(", ".join(f"{key} {value}" for key, value in facts.items()), 80),
        f"copy {copy / 1e9:.0f} GB/s (read + write), bf16 matmul {matmul / 1e9:.0f} GFLOP/s\n",
        report.table(rows),
    ]
    if overhead:
        lines.append("\none call of a problem of next to no work, in us of host time:")
        lines += [f"  {name:30}{us:8.1f}" for name, us in overhead.items()]
    return "\n".join(lines)


def _plot(rows: list, path: Path, facts: dict[str, str]) -> None:
    from gdn_plugin.tools.bench import report

    report.plot(rows, path, "  ".join(f"{key} {value}" for key, value in facts.items()))


def _rounds() -> tuple[str, ...]:
    from gdn_plugin.tools.bench.engine import ROUNDS

    return tuple(ROUNDS)


def _engine(args: argparse.Namespace) -> int:
    import torch

    from gdn_plugin.tools.bench import engine

    for name in OPS_ONLY:
        if getattr(args, name):
            raise BadArguments(f"--{name} is about ops, and --engine about the whole engine")
    cuda = torch.cuda.is_available()
    rounds = args.rounds or engine.DEFAULT_ROUNDS
    if args.speculative and not any(engine.ROUNDS[name].speculation for name in rounds):
        raise BadArguments("--speculative: none of these rounds has drafts; --rounds ngram, mtp or blocks has")
    plan = engine.Plan(
        model=("qwen3.5-4b" if cuda else "tiny") if args.model is None else args.model,
        rounds=rounds,
        drafts=args.speculative or 3,
        dtype=args.dtype,
        state_dtype=args.state_dtype or "",
        turns=args.turns or 2,
        repeats=args.repeats or 3,
        cuda=cuda,
        replay=args.replay or 0,
        tensor_parallel=args.tensor_parallel or 1,
        prefix_cache=bool(args.prefix_cache),
    )
    return engine.main(plan, args.json, args.plot)
