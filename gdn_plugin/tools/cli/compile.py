"""`gdn-plugin compile`: every kernel variant compiled for a GPU that need not be present."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gdn_plugin.registry import (
    DTYPES,
    OPS,
    PHASES,
    NoBackendError,
    Platform,
    Selection,
    decide,
    replay_request,
    requests,
    select,
)
from gdn_plugin.tools import compile as compilation
from gdn_plugin.tools.cli.problem import heads, pair
from gdn_plugin.tools.cli.values import BadArguments, as_json, count, folder
from gdn_plugin.tools.compile import BACKENDS, SMS, Row
from gdn_plugin.tools.models import gdn_layer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sm", type=int, choices=SMS, help="compute capability, such as 90 for H100")
    parser.add_argument("--backend", choices=BACKENDS, help="only this one; cpu: for this machine, without --sm")
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
    image = parser.add_argument_group("what an engine compiles when it starts, to fill an image's caches with --cache")
    image.add_argument("--model", type=layer_of_model, metavar="DIR", help="the model's folder (its config.json)")
    image.add_argument("--tp", type=count, default=1, metavar="N", help="ranks that share its heads (1)")
    image.add_argument("--speculative", type=count, metavar="N", help="drafts a step; also without any")


def run(args: argparse.Namespace) -> int:
    # Under it Triton makes interpreted functions, which cannot be compiled; it is read when Triton is imported.
    os.environ.pop("TRITON_INTERPRET", None)
    if args.backend != "cpu" and args.sm is None:
        raise BadArguments("--sm says for which GPU; only --backend cpu goes without")
    if args.model is not None and args.cache is None:
        raise BadArguments("--model fills caches, and --cache says where")
    shapes = _shapes(args)
    if args.cache is not None:
        os.environ |= caches(args.cache)
    rows: list[Row] = []
    if args.backend == "cpu":
        return _cpu(args, shapes)
    engine_rows = _engine_rows(*_selected(args, shapes), args) if shapes else None
    if not args.json:
        print(f"{'seconds':>7} {'regs':>5} {'spills':>6} {'shared':>7}  kernel, for sm_{args.sm}", flush=True)
    for row in engine_rows or _rows(args):
        rows.append(row)
        if not args.json:
            print(_line(row), flush=True)
    failed = [row for row in rows if row.error]
    if args.json:
        print(as_json({"sm": args.sm, "rows": [asdict(row) for row in rows]}))
    else:
        spilling = sum(1 for row in rows if row.spills)
        print(f"{len(rows) - len(failed)} of {len(rows)} compiled, {spilling} with spills")
        if args.cache:
            _tell(args.cache)
    if not rows:
        print("gdn-plugin compile: nothing to compile for these arguments", file=sys.stderr)
    if shapes and not failed:
        _check_here(args.sm, shapes)
    return 1 if failed or not rows else 0


def layer_of_model(text: str) -> dict[str, Any]:
    """argparse type: what a model's config.json says of its GDN layers, as `Shape` names it."""
    try:
        return gdn_layer(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc


def caches(folder: Path) -> dict[str, str]:
    """The variables by which compilers find the caches in a folder."""
    top = Path(os.path.abspath(folder))
    return {
        "TRITON_CACHE_DIR": str(compilation.triton_cache(top)),
        "FLASHINFER_WORKSPACE_BASE": str(top),
        "GDN_PLUGIN_CACHE": str(top / "gdn-plugin"),
    }


def _tell(folder: Path) -> None:
    print("whatever runs with these variables finds them:")
    for name, value in caches(folder).items():
        print(f"  {name}={shlex.quote(value)}")


def _shapes(args: argparse.Namespace) -> list[Any]:
    """The layer as an engine has it: with prefix cache or drafts and without, dt_bias in either dtype.

    With replay where GDN_PLUGIN_REPLAY, or auto, has it on for engines on such a GPU.
    """
    if args.model is None:
        return []
    from gdn_plugin.hosts.core import Shape

    layer = args.model | ({"dtype": args.dtype} if args.dtype else {})
    if args.state_dtype:
        layer["state_dtype"] = args.state_dtype
    for name in ("num_k_heads", "num_v_heads"):
        if layer[name] % args.tp:
            raise BadArguments(f"--tp {args.tp}: {layer[name]} heads do not divide by it")
        layer[name] //= args.tp
    drafts = (0, args.speculative + 1) if args.speculative else (0,)
    return [
        Shape(
            **layer, spec_tokens=tokens, checkpoints=checkpoints, bias_dtype=bias, null_index=0, padding="scratch",
            replay=_ring(args, layer, tokens),
        )
        for bias in dict.fromkeys((layer["dtype"], "float32"))  # of dt_bias: models keep it in either
        for tokens in drafts
        for checkpoints in (False, True)
    ]  # fmt: skip


def _ring(args: argparse.Namespace, layer: dict[str, Any], spec_tokens: int) -> int:
    """Slots of a row's ring in an engine, 0 without replay. On a CPU replay is torch's, which compiles nothing."""
    if args.backend == "cpu":
        return 0
    heads = tuple(layer[name] for name in ("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim"))
    platform = Platform.simulated(f"sm_{args.sm}")
    dtypes = layer["dtype"], layer["state_dtype"]
    return decide(platform, replay_request(), dtypes, heads, spec_tokens, backends=_asked(args)).slots


def _asked(args: argparse.Namespace) -> dict[str, str]:
    """The request for each phase: --backend, else as engines with this environment have it."""
    if args.backend:
        return dict.fromkeys(PHASES, args.backend)
    return {phase: request.value for phase, request in requests().items()}


def _selected(args: argparse.Namespace, shapes: Sequence[Any]) -> tuple[Platform, list[Selection]]:
    """The GPU that is compiled for, and the backends that engines with these shapes come to on it."""
    import torch

    from gdn_plugin.registry.probe import installed_packages

    usual = Platform.simulated(f"sm_{args.sm}", sm_count=args.sm_count)
    platform = replace(usual, packages=installed_packages(), cuda=torch.version.cuda or usual.cuda)
    try:
        return platform, [select(platform, shape.problems(), _asked(args)) for shape in shapes]
    except NoBackendError as exc:
        if not args.backend:
            raise
        said = "; ".join(line.strip(" -:") for line in str(exc).splitlines())
        raise BadArguments(f"--backend {args.backend}: {said}") from exc


def _engine_rows(platform: Platform, selections: Sequence[Selection], args: argparse.Namespace) -> Iterator[Row]:
    """What engines with these selections have compiled ahead; that it was done is remembered for them."""
    from gdn_plugin.ops import ahead

    wanted = [ahead.jobs_of(selection.reached(), platform) for selection in selections]
    artifacts: dict[ahead.Job, str] = {}
    every = dict.fromkeys(job for jobs in wanted for job in jobs if not args.op or job[1].op in args.op)
    if not args.op and every:
        every |= dict.fromkeys(compilation.host_jobs(next(iter(every))[1]))
    for job, row in compilation.compile_jobs(platform, list(every), args.workers or ahead.usable_processes()):
        if not row.error:
            artifacts[job] = row.artifact
        yield row
    for jobs in wanted:
        with ahead.one_at_a_time(jobs, platform) as kept:
            if kept is not None and artifacts.keys() >= set(jobs):
                ahead.remember(kept, [artifacts[job] for job in jobs])


def _check_here(sm: int, shapes: Sequence[Any]) -> None:
    """Self-checks, whose verdicts are kept: they need the GPU."""
    from gdn_plugin import ops
    from gdn_plugin.registry import probe

    if probe().sm == sm:
        for shape in shapes:
            ops.resolve(shape.problems())
    else:
        print(f"no SM {sm} GPU is here: self-checks are left to the first start on one", file=sys.stderr)


def _cpu(args: argparse.Namespace, shapes: Sequence[Any]) -> int:
    """The library for this machine, and the verdicts of its self-checks."""
    from gdn_plugin import ops
    from gdn_plugin.ops.dispatch import backend_op
    from gdn_plugin.registry import Problem

    (Hk, Hv), (K, V) = args.heads, args.dims or (128, 128)
    usual = Problem("decode", args.dtype or "bfloat16", args.state_dtype or "float32", Hk, Hv, K, V)
    for problems in [shape.problems() for shape in shapes] or [{"decode": usual}]:
        ops.resolve(problems, dict.fromkeys(PHASES, "cpu"), device="cpu")
    made = backend_op("decode", "cpu").compile_count()
    if args.json:
        print(as_json({"cpu_libraries_compiled": made}))
        return 0
    print("the cpu library was compiled" if made else "the cpu library was there already")
    if args.cache:
        _tell(args.cache)
    return 0


def _rows(args: argparse.Namespace) -> Iterator[Row]:
    """Everything that the arguments leave, for no engine in particular."""
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
