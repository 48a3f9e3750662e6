"""Ask a vLLM engine for greedy answers and log-probabilities; `python -m gdn_plugin.tools.vllm_engine JOB RESULT`.

An engine keeps its process's memory, threads and environment, so whoever compares engines starts one process each.

The job (JSON): `llm`, the arguments of vllm.LLM; `rounds`, lists of token-id prompts, sent one list after the other;
`max_tokens`; `logprobs`, how many alternatives to return a token. The result: `rounds`, for each prompt `tokens`,
`logprobs` (for each token {token id: log-probability}) and `cached_tokens`; `layers`, the classes of the GDN layers
that served; `seconds`, a number a round; `drafts` and `accepted`, speculative tokens counted by the engine.

With `bench` in the job, the engine is timed instead: it is the job of `gdn_plugin.tools.bench.rounds.run`, and the
result holds what that returns, `layers`, `rings` (slots of each layer's ring, 0 without replay) and `startup_s`.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from gdn_plugin.hosts.vllm import engine as vllm
from gdn_plugin.tools.bench import rounds

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core in this process: one start less, and layers can be seen
}
# In place of that: the core in a process of its own, to which functions are sent by name.
OWN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Start the engine, send the rounds, return what it said."""
    began = time.perf_counter()
    engine = vllm.start(**job["llm"])
    if "bench" in job:
        startup_s, layers = time.perf_counter() - began, _layers(engine)
        measured = rounds.run(engine, vllm.sampling, len(layers), job["bench"])
        rings = engine.apply_model(_ring_slots)[0]
        return measured | {"startup_s": startup_s, "layers": layers, "rings": rings}
    sampling = vllm.sampling(
        temperature=0.0,
        max_tokens=job["max_tokens"],
        logprobs=job["logprobs"],
        ignore_eos=True,
        detokenize=False,
    )
    said, seconds = [], []
    for prompts in job["rounds"]:
        began = time.perf_counter()
        outputs = engine.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
        seconds.append(time.perf_counter() - began)
        said.append([_answer(output) for output in outputs])
    counters = {metric.name: metric.value for metric in engine.get_metrics() if hasattr(metric, "value")}
    return {
        "rounds": said,
        "seconds": seconds,
        "layers": _layers(engine),
        "drafts": counters.get("vllm:spec_decode_num_draft_tokens", 0),
        "accepted": counters.get("vllm:spec_decode_num_accepted_tokens", 0),
    }


def _answer(output: Any) -> dict[str, Any]:
    said = output.outputs[0]
    return {
        "tokens": list(said.token_ids),
        "logprobs": [{token: entry.logprob for token, entry in position.items()} for position in said.logprobs],
        "cached_tokens": output.num_cached_tokens or 0,
    }


def _layers(engine: Any) -> list[str]:
    return engine.apply_model(_gdn_classes)[0]


def _gdn_classes(model: Any) -> list[str]:
    return [f"{type(layer).__module__}.{type(layer).__qualname__}" for layer in _gdn(model)]


def _ring_slots(model: Any) -> list[int]:
    return [getattr(layer, "gdn_replay_slots", 0) for layer in _gdn(model)]


def _gdn(model: Any) -> list[Any]:
    return [layer for layer in model.modules() if hasattr(layer, "A_log") and hasattr(layer, "conv1d")]


def main() -> None:
    job_file, result_file = sys.argv[1:]
    result = run_job(json.loads(Path(job_file).read_text(encoding="utf-8")))
    Path(result_file).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    # As a module with a name: of __main__, which is another one in the engine's process, nothing could be sent there.
    importlib.import_module("gdn_plugin.tools.vllm_engine").main()
