"""`gdn-plugin check`: the self-check of every backend this machine can run, with its errors."""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import asdict, replace

from gdn_plugin.ops import selfcheck
from gdn_plugin.registry import OPS, backend_names, judge, probe, rows
from gdn_plugin.tools.cli.problem import add_problem_arguments, problems
from gdn_plugin.tools.cli.values import as_json, names

WIDTH = 80


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend", action="extend", type=names(backend_names), metavar="NAME", help="only these, joined by commas"
    )
    parser.add_argument("--op", action="append", choices=OPS, help="only this op; may be repeated")
    add_problem_arguments(parser)
    parser.add_argument("--json", action="store_true", help="the results as JSON")


def run(args: argparse.Namespace) -> int:
    asked = args.backend or []
    platform = probe()
    results = []
    skipped = []
    for op, problem in problems(args, ragged=False).items():
        if args.op and op not in args.op:
            continue
        for row in rows(op):
            # The recurrence is what the others are compared with.
            if (asked and row.name not in asked) or (not asked and row.name == selfcheck.TRUTH):
                continue
            verdict = judge(row, platform, problem)
            if not verdict.supported:
                skipped.append((op, row.name, verdict.reasons))
                continue
            if not args.json:
                print(f"{op:<14}{row.name:<12}", end="", flush=True)
            result = selfcheck.run(row, problem, platform.device)
            results.append(result)
            if not args.json:
                print(_line(result), flush=True)
    failed = [result for result in results if not result.ok]
    unable = [name for name in asked if not any(result.backend == name for result in results)]
    if args.json:
        report = {
            "device": platform.name,
            "results": [_as_data(result) for result in results],
            "skipped": [{"op": op, "backend": name, "reasons": list(why)} for op, name, why in skipped],
        }
        print(as_json(report))
        return 1 if failed or unable or not results else 0
    _print_skipped(skipped)
    print(f"{len(results) - len(failed)} of {len(results)} passed on {platform.name}")
    for result in failed:
        print(textwrap.fill(f"{result.op}, {result.backend}: {result.failure}", WIDTH, subsequent_indent="  "))
    return 1 if failed or unable or not results else 0


def _as_data(result: selfcheck.CheckResult) -> dict[str, object]:
    return {**asdict(replace(result, cause=None)), "cause": result.cause and repr(result.cause), "ok": result.ok}


def _print_skipped(skipped: list[tuple[str, str, tuple[str, ...]]]) -> None:
    """Backends that could not run, ops with the same reasons together."""
    grouped: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for op, name, why in skipped:
        grouped.setdefault((name, why), []).append(op)
    for (name, why), ops in grouped.items():
        print(f"{name} cannot run {', '.join(ops)}:")
        for reason in why:
            print(textwrap.fill(reason, WIDTH, initial_indent="  - ", subsequent_indent="    ", break_on_hyphens=False))


def _line(result: selfcheck.CheckResult) -> str:
    errors = ", ".join(
        f"{name} {error:.1e}" for name, error in result.errors.items() if name in ("out", "x", "state", "v")
    )
    word = "ok" if result.ok else "FAILED"
    left_out = "" if result.whole else ", no memory for the larger problems"
    return f"{word:<8}{errors:<36}{result.seconds:5.1f} s{left_out}"
