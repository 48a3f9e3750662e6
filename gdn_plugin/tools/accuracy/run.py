"""Which engines to start, and starting them: one process each, one after the other."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gdn_plugin import child
from gdn_plugin.registry import PHASES, Platform, Problem, backend_names, judge, rows
from gdn_plugin.tools.accuracy.task import ANSWER_LENGTH, Prompt
from gdn_plugin.tools.cli.problem import host_problem

STOCK = "stock vLLM"
PLUGIN_LAYER = "gdn_plugin.hosts.vllm.layer."
INTERPRETER = "triton.interpreter"  # the fact of a platform by which kernels for GPUs run on a CPU
ALTERNATIVES = 5
# What vLLM and torch put before a line: "(EngineCore pid=7) ERROR 11-23 14:20:01 [core.py:12] ", "[rank0]: ".
_PREFIX = re.compile(r"^(\(\w+ pid=\d+\) )?([A-Z]+ [\d-]+ [\d:]+ \[[^\]]*\] )?(\[rank\d+\]: ?)?")
# What a process says of an error in another one.
_ELSEWHERE = re.compile(r"EngineDeadError|See root cause above|See stack trace \(above\)")


@dataclass(frozen=True, slots=True)
class Mode:
    """What an engine has switched on: the prefix cache, and speculation (vLLM's `speculative_config`, or None)."""

    cached: bool = False
    speculation: Mapping[str, Any] | None = None


NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 2}
MTP = {"method": "mtp", "num_speculative_tokens": 3}
MODES = {
    "plain": Mode(),
    "cache": Mode(cached=True),
    "spec": Mode(speculation=NGRAM),
    "cache+spec": Mode(cached=True, speculation=NGRAM),
    "mtp": Mode(speculation=MTP),
    "cache+mtp": Mode(cached=True, speculation=MTP),
}


class EngineError(RuntimeError):
    """An engine did not come up, failed, or was not served by what was asked for. `log` is its log's path, or ""."""

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log


@dataclass(frozen=True, slots=True)
class Ability:
    """How a backend can serve here: in which modes, and whether only under Triton's interpreter."""

    modes: tuple[str, ...]
    interpreted: bool = False


@dataclass(frozen=True, slots=True)
class Run:
    """One engine.

    Args:
        backend: who serves GDN: `STOCK` or a backend's name.
        mode: of `MODES`; with the prefix cache every prompt is sent twice, and the second answer counts.
        prompts: by length.
    """

    backend: str
    mode: str
    prompts: Mapping[int, Sequence[Prompt]]


@dataclass(frozen=True, slots=True)
class Answers:
    """What an engine said by length; seconds for all of it; speculative tokens proposed and accepted."""

    by_length: Mapping[int, list[dict[str, Any]]]
    seconds: float
    drafts: int = 0
    accepted: int = 0
    layers: tuple[str, ...] = ()


def modes_of(model: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Modes that a checkpoint can be asked in: without an MTP head, those that draft with one are none of them.

    Args:
        config: the checkpoint's config.json.
    """
    return tuple(name for name, mode in MODES.items() if mode.speculation is not MTP or _has_head(model, config))


def _has_head(model: Path, config: Mapping[str, Any]) -> bool:
    from safetensors import safe_open

    if not config.get("num_nextn_predict_layers"):
        return False
    for file in model.glob("*.safetensors"):
        with safe_open(file, framework="np") as weights:
            if any(name.startswith("mtp.") for name in weights.keys()):  # noqa: SIM118 (it is no dict)
                return True
    return False


def able_backends(platform: Platform, config: Mapping[str, Any]) -> dict[str, Ability]:
    """Backends that can serve the model here in at least one mode.

    Args:
        config: the checkpoint's config.json.
    """
    found = {}
    for name in backend_names():
        modes = tuple(mode for mode in MODES if _able(name, mode, platform, config))
        if modes:
            found[name] = Ability(modes)
    if platform.device == "cpu":
        interpreting = replace(platform, features={**platform.features, INTERPRETER: "yes"})
        for name in backend_names():
            modes = tuple(mode for mode in MODES if _able(name, mode, interpreting, config))
            if modes and name not in found:
                found[name] = Ability(modes, interpreted=True)
    return found


def _able(name: str, mode: str, platform: Platform, config: Mapping[str, Any]) -> bool:
    needed = [op for op in PHASES if op != "verify" or MODES[mode].speculation]
    offered = {op: row for op in needed for row in rows(op) if row.name == name}
    return all(op in offered and judge(offered[op], platform, _problem(op, mode, config)).supported for op in needed)


def _problem(op: str, mode: str, config: Mapping[str, Any]) -> Problem:
    heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
    dims = config["linear_key_head_dim"], config["linear_value_head_dim"]
    checkpoints = op == "prefill" and MODES[mode].cached
    return host_problem(op, "bfloat16", "float32", heads, dims, checkpoints=checkpoints, ragged=True)


def ask(run: Run, model: Path, *, interpret: bool = False, eager: bool = True, timeout: float = 3600.0) -> Answers:
    """Start the engine of a run, send its prompts, collect the answers.

    Args:
        interpret: run Triton's kernels under its interpreter.
        eager: no compiled graph and no CUDA graphs.
        timeout: seconds for the whole run.

    Raises:
        EngineError: with the last error line of the engine's log.
    """
    mode, lengths = MODES[run.mode], list(run.prompts)
    rounds = []
    for length in lengths:
        tokens = [list(prompt.tokens) for prompt in run.prompts[length]]
        rounds += [tokens, tokens] if mode.cached else [tokens]
    llm: dict[str, Any] = {
        "model": str(model),
        "dtype": "bfloat16",
        "enforce_eager": eager,
        "skip_tokenizer_init": True,
        "max_model_len": max(lengths) + 64,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 2048,  # below a batch of long prompts, so that prefill is cut into pieces
        "enable_prefix_caching": mode.cached,
        # A tiny model: it need not have a machine, or a GPU, to itself.
        "kv_cache_memory_bytes": 1 << 30,
        "gpu_memory_utilization": 0.05,
    }
    if mode.speculation:
        llm["speculative_config"] = dict(mode.speculation)
    job = {"llm": llm, "rounds": rounds, "max_tokens": ANSWER_LENGTH, "logprobs": ALTERNATIVES}
    result = _in_process(job, _environment(run.backend, interpret), f"{run.backend}-{run.mode}", timeout)
    ours = all(layer.startswith(PLUGIN_LAYER) for layer in result["layers"])
    if ours == (run.backend == STOCK):
        served = ", ".join(dict.fromkeys(result["layers"])) or "no GDN layer"
        raise EngineError(f"asked for {run.backend}, but the layers that served are: {served}")
    step = 2 if mode.cached else 1
    return Answers(
        by_length=dict(zip(lengths, result["rounds"][step - 1 :: step], strict=True)),
        seconds=sum(result["seconds"]),
        drafts=int(result["drafts"]),
        accepted=int(result["accepted"]),
        layers=tuple(result["layers"]),
    )


def _environment(backend: str, interpret: bool) -> dict[str, str]:
    # The caller's own GDN_PLUGIN_* settings must not decide what a row of the table means.
    chosen = {name: value for name, value in os.environ.items() if not name.startswith("GDN_PLUGIN_")}
    if backend == STOCK:
        chosen["GDN_PLUGIN_DISABLE"] = "1"
    else:
        chosen["GDN_PLUGIN_BACKEND"] = backend
    if interpret:
        chosen["TRITON_INTERPRET"] = "1"
    return chosen


def _in_process(job: dict[str, Any], environment: dict[str, str], name: str, timeout: float) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="gdn-plugin-accuracy-"))
    job_file, result_file, log_file = (folder / file for file in ("job.json", "result.json", "engine.log"))
    job_file.write_text(json.dumps(job), encoding="utf-8")
    command = [sys.executable, "-m", "gdn_plugin.tools.vllm_engine", str(job_file), str(result_file)]
    with log_file.open("w") as log:
        try:
            status = child.run(command, log=log, environment=environment, timeout=timeout)
        except subprocess.TimeoutExpired as problem:
            raise EngineError(f"{name}: no answer within {timeout:.0f} s", str(log_file)) from problem
        except KeyboardInterrupt:  # nobody is told of the log
            shutil.rmtree(folder, ignore_errors=True)
            raise
    if status != 0 or not result_file.exists():
        raise EngineError(last_error(log_file.read_text(errors="replace")), str(log_file))
    result = json.loads(result_file.read_text(encoding="utf-8"))
    shutil.rmtree(folder, ignore_errors=True)
    return result


def last_error(log: str) -> str:
    """The last line of a log that names an error, of the process in which it happened where there are several."""
    elsewhere = ""
    for line in reversed(log.splitlines()):
        text = _PREFIX.sub("", line).strip()
        head = text.partition(":")[0]
        named = head.replace(".", "").isidentifier() and head.endswith(("Error", "Exception"))
        if named and text != head:
            if not _ELSEWHERE.search(text):
                return text
            elsewhere = elsewhere or text
    return elsewhere or "the engine ended without a result"
