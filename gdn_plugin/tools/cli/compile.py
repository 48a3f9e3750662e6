"""`gdn-plugin compile`: every kernel variant compiled for a GPU that need not be present."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict

from gdn_plugin.registry import DTYPES, OPS
from gdn_plugin.tools import compile as compilation
from gdn_plugin.tools.cli.problem import heads, pair
from gdn_plugin.tools.cli.values import as_json, count, folder
from gdn_plugin.tools.compile import BACKENDS, SMS, Row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sm", type=int, required=True, choices=SMS, help="compute capability, such as 90 for H100")
    parser.add_argument("--backend", choices=BACKENDS, help="only this one")
    parser.add_argument(
        "--cache", type=folder, metavar="DIR", help="keep what is compiled here; by default nothing is kept"
    )
    parser.add_argument("--workers", type=count, metavar="N", help="processes for Triton's kernels (one a core)")
    parser.add_argument("--json", action="store_true", help="the rows as JSON")
    parser.add_argument(
        "--sm-count", type=count, metavar="N", help="multiprocessors; FlashInfer's SM 100 prefill compiles them in"
    )
    group = parser.add_argument_group("which kernels (all by default)")
    group.add_argument("--op", action="append", choices=OPS, help="only this op; may be repeated")
    group.add_argument("--heads", type=heads, default=(16, 32), metavar="HK,HV", help="heads of a rank (16,32)")
    group.add_argument("--dims", type=pair, metavar="K,V", help="only these head dims")
    group.add_argument("--dtype", choices=DTYPES[:3], help="only this io dtype")
    group.add_argument("--state-dtype", choices=DTYPES[:3], help="only this dtype of the state")


def run(args: argparse.Namespace) -> int:
    # Under it Triton makes interpreted functions, which cannot be compiled; it is read when Triton is imported.
    os.environ.pop("TRITON_INTERPRET", None)
    rows: list[Row] = []
    if not args.json:
        print(f"{'seconds':>7} {'regs':>5} {'spills':>6} {'shared':>7}  kernel, for sm_{args.sm}", flush=True)
    for row in _rows(args):
        rows.append(row)
        if not args.json:
            print(_line(row), flush=True)
    failed = [row for row in rows if row.error]
    if args.json:
        print(as_json({"sm": args.sm, "rows": [asdict(row) for row in rows]}))
    else:
        spilling = sum(1 for row in rows if row.spills)
        print(f"{len(rows) - len(failed)} of {len(rows)} compiled, {spilling} with spills")
        if args.cache and any(row.backend == "flashinfer" for row in rows):
            print(f"FlashInfer finds its kernels with FLASHINFER_WORKSPACE_BASE={os.path.abspath(args.cache)}")
    if not rows:
        print("gdn-plugin compile: nothing to compile for these arguments", file=sys.stderr)
    return 1 if failed or not rows else 0


def _rows(args: argparse.Namespace) -> Iterator[Row]:
    if args.backend in (None, "triton"):
        wanted = [
            problem
            for problem in compilation.triton_problems(args.heads[0], args.heads[1])
            if (not args.op or problem.op in args.op)
            and args.dims in (None, (problem.head_k_dim, problem.head_v_dim))
            and args.dtype in (None, problem.dtype)
            and args.state_dtype in (None, problem.state_dtype)
        ]
        yield from compilation.compile_triton(args.sm, wanted, args.cache, args.workers)
    if args.backend in (None, "flashinfer"):
        # FlashInfer has no GDN kernels below sm_90; without --backend that is no failure.
        if args.backend is None and args.sm < 90:
            return
        try:
            wanted = [
                problem
                for problem in compilation.flashinfer_problems(args.heads[0], args.heads[1], dtype=args.dtype)
                if (not args.op or problem.op in args.op)
                and args.dims in (None, (problem.head_k_dim, problem.head_v_dim))
                and args.state_dtype in (None, problem.state_dtype)
            ]
            if wanted:
                yield from compilation.compile_flashinfer(args.sm, wanted, args.cache, args.sm_count)
        except (ImportError, ValueError) as exc:
            yield Row("flashinfer", "(none)", 0.0, error=str(exc))


def _line(row: Row) -> str:
    numbers = [("-" if n is None else str(n)) for n in (row.registers, row.spills, row.shared)]
    text = f"{row.seconds:7.1f} {numbers[0]:>5} {numbers[1]:>6} {numbers[2]:>7}  {row.backend}: {row.name}"
    return text + (f"\n        FAILED: {row.error}" if row.error else "")
