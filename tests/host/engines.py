"""What the tests of a real engine share: prompts, the engine's arguments, how two engines' answers are compared."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import random
import sys
import tempfile
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

import pytest

from gdn_plugin import child
from gdn_plugin.hosts.vllm import compat

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import run_engine  # noqa: E402 (examples are no package)
from tiny_model import TinyConfig, write_tiny_qwen3_next  # noqa: E402

__all__ = ["EXAMPLES", "TinyConfig", "run_in_subprocess", "write_tiny_qwen3_next"]

needs_vllm = pytest.mark.skipif(compat.installed_root() is None, reason="vLLM is not installed")

PLUGIN = "gdn_plugin.hosts.vllm.layer.GdnPluginAttention"
STOCK = {"GDN_PLUGIN_DISABLE": "1"}
# Mean |difference| of prompt log-probabilities: two bf16 engines differ by 0.01, fp32 ones by rounding.
BF16_LIMIT, FP32_LIMIT = 0.03, 1e-3
# The workers of one engine are processes of their own, a core each.
TWO_WORKERS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
# For Qwen3.5, see tests/host/no_torchvision.
QWEN3_5 = {
    "PYTHONPATH": os.pathsep.join(
        filter(None, (str(Path(__file__).with_name("no_torchvision")), os.environ.get("PYTHONPATH")))
    )
}
LLM: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 2048,
    "max_num_batched_tokens": 1024,
    "max_num_seqs": 8,
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "disable_log_stats": True,
}

# By environment: processes that fork an engine, see forked_engines.py. They end with this one.
_forking: dict[frozenset[tuple[str, str]], Connection] = {}
_until_the_end = contextlib.ExitStack()
atexit.register(_until_the_end.close)


def run_in_subprocess(
    job: dict[str, Any],
    folder: Path,
    name: str,
    *,
    environment: dict[str, str] | None = None,
    script: Path | None = None,
) -> tuple[dict[str, Any] | None, str]:
    """As examples/run_engine.py has it; in a fork of a process with vLLM imported where that can make no difference.

    It can where a variable is not the plugin's: vLLM may read it as it is imported. PYTHONPATH alone is the importing
    process's too.
    """
    given = environment or {}
    if sys.platform != "linux" or any(not key.startswith("GDN_PLUGIN_") and key != "PYTHONPATH" for key in given):
        return run_engine.run_in_subprocess(job, folder, name, environment=environment, script=script)
    job_file, result_file, log_file = (folder / f"{name}.{kind}" for kind in ("job.json", "result.json", "log"))
    folder.mkdir(parents=True, exist_ok=True)
    result_file.unlink(missing_ok=True)
    job_file.write_text(json.dumps(job))
    everything = {**os.environ, **run_engine.ENVIRONMENT, **given}
    order = str(script or run_engine.__file__), [str(job_file), str(result_file)], everything, str(log_file)
    key = _process_with_vllm(everything)
    try:
        _forking[key].send(order)
        _forking[key].recv()
    except BaseException:  # its answer is not awaited any more, so the next engine is another process's
        del _forking[key]
        raise
    log = log_file.read_text(errors="replace")
    return (json.loads(result_file.read_text()) if result_file.exists() else None), log


def _process_with_vllm(environment: dict[str, str]) -> frozenset[tuple[str, str]]:
    """Under this key of `_forking`."""
    kept = {k: v for k, v in environment.items() if not k.startswith(("GDN_PLUGIN_", "PYTEST_"))}
    key = frozenset(kept.items())
    if key not in _forking:
        folder = Path(_until_the_end.enter_context(tempfile.TemporaryDirectory()))
        log = _until_the_end.enter_context((folder / "log").open("w"))
        command = [sys.executable, str(Path(__file__).with_name("forked_engines.py")), str(folder / "socket")]
        # With more, importing torch starts OpenMP's threads. Engines set their own number.
        alone = kept | {"OMP_NUM_THREADS": "1"}
        wait = _until_the_end.enter_context(child.started(command, log=log, environment=alone))
        while key not in _forking:
            try:
                _forking[key] = Client(str(folder / "socket"))
            except (FileNotFoundError, ConnectionRefusedError):  # it is importing
                with contextlib.suppress(child.TimeoutExpired):
                    status = wait(0.1)
                    raise RuntimeError(f"it ended with status {status}: {(folder / 'log').read_text()}") from None
    return key


def tokens(count: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(count)]


def repeated(count: int, period: int, seed: int) -> list[int]:
    return (tokens(period, seed) * (count // period + 1))[:count]


MIXED = [[tokens(1, 0), tokens(5, 1), tokens(64, 2), tokens(129, 3), tokens(600, 4)]]
# Ends past a block of the prefix cache (256 tokens in fp32) and generation crosses into the next.
SPECULATIVE = [[repeated(5, 5, 5), repeated(40, 8, 6), repeated(250, 30, 7), tokens(70, 8), repeated(33, 4, 9)]]
SPECULATIVE_LENGTHS = [[24, 17, 40, 9, 30]]


def answers(result: dict[str, Any]) -> list[list[int]]:
    return [answer["tokens"] for prompts in result["rounds"] for answer in prompts]


def log_probability_gap(one: dict[str, Any], other: dict[str, Any]) -> float:
    gaps = [
        abs(x - y)
        for a_round, b_round in zip(one["rounds"], other["rounds"], strict=True)
        for a, b in zip(a_round, b_round, strict=True)
        for x, y in zip(a.get("prompt_logprobs", []), b.get("prompt_logprobs", []), strict=True)
    ]
    assert len(gaps) > 500
    return sum(gaps) / len(gaps)
