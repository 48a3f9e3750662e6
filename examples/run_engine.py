"""Run one vLLM engine over a list of prompts in this process and write what it said as JSON.

A vLLM engine takes a process's memory, threads and environment, so the demo and the tests start one process an
engine: `python examples/run_engine.py job.json result.json`. The job holds the arguments of `vllm.LLM` and rounds of
token-id prompts; the result holds, for each prompt, the tokens generated and the log-probabilities of the prompt.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from gdn_plugin import child

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; a tiny model needs less
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "passive",  # spinning threads starve one another on a few cores
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # engine core in this process: half the imports, a model to look into
}


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Start the engine, send the rounds one after the other (prompts of a round together), return texts and numbers.

    Args:
        job: `llm` (arguments of vllm.LLM), `rounds` (lists of token-id prompts), `max_tokens` (one number, or one a
            prompt of each round), `prompt_logprobs` and `logprobs` (bool: of the prompts, of what was said),
            `repeat_timed` (bool: run the last round once more, timed), `adapters` (a LoRA adapter's folder, or None, a
            round).
    """
    from vllm import LLM, SamplingParams

    started = time.perf_counter()
    engine = LLM(**job["llm"])
    startup_s = time.perf_counter() - started
    rounds = []
    for number, prompts in enumerate(job["rounds"]):
        adapter = job["adapters"][number] if job.get("adapters") else None
        rounds.append(_ask(engine, prompts, _lengths(job, number, len(prompts)), job, SamplingParams, adapter))
    result: dict[str, Any] = {"startup_s": startup_s, "rounds": rounds, "layers": _layers(engine)}
    if job["llm"].get("speculative_config"):
        result["speculation"] = _speculation(engine)
    if job.get("repeat_timed"):
        last = len(job["rounds"]) - 1
        prompts = job["rounds"][last]
        lengths = _lengths(job, last, len(prompts))
        began = time.perf_counter()
        answers = _ask(engine, prompts, lengths, job | {"prompt_logprobs": False}, SamplingParams)
        seconds = time.perf_counter() - began
        generated = sum(len(answer["tokens"]) for answer in answers)
        result["timed"] = {
            "seconds": seconds,
            "generated": generated,
            "prompt_tokens": sum(map(len, prompts)),
            "cached_tokens": sum(answer["cached_tokens"] for answer in answers),
            "tokens_per_second": (generated + sum(map(len, prompts))) / seconds,
        }
    return result


def _lengths(job: dict[str, Any], number: int, count: int) -> list[int]:
    wanted = job.get("max_tokens", 16)
    return [wanted] * count if isinstance(wanted, int) else list(wanted[number])


def _ask(
    engine: Any,
    prompts: list[list[int]],
    lengths: list[int],
    job: dict[str, Any],
    sampling: Any,
    adapter: str | None = None,
) -> list[dict]:
    parameters = [
        sampling(
            temperature=0.0,
            max_tokens=length,
            ignore_eos=True,
            prompt_logprobs=0 if job.get("prompt_logprobs") else None,
            logprobs=0 if job.get("logprobs") else None,
            detokenize=False,
        )
        for length in lengths
    ]
    lora = None
    if adapter is not None:
        from vllm.lora.request import LoRARequest

        lora = LoRARequest(Path(adapter).name, 1, adapter)
    asked = [{"prompt_token_ids": p} for p in prompts]
    outputs = engine.generate(asked, parameters, use_tqdm=False, lora_request=lora)
    answers = []
    for prompt, output in zip(prompts, outputs, strict=True):
        answer: dict[str, Any] = {
            "tokens": list(output.outputs[0].token_ids),
            "cached_tokens": output.num_cached_tokens or 0,
        }
        if job.get("prompt_logprobs") and output.prompt_logprobs:
            pairs = zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
            answer["prompt_logprobs"] = [entry[token].logprob for token, entry in pairs]
        if job.get("logprobs"):
            answer["logprobs"] = [next(iter(entry.values())).logprob for entry in output.outputs[0].logprobs]
        answers.append(answer)
    return answers


def _speculation(engine: Any) -> dict[str, int]:
    """Tokens drafted and accepted so far; needs disable_log_stats=False."""
    counters = {metric.name: getattr(metric, "value", 0) for metric in engine.get_metrics()}
    return {
        "drafted": int(counters.get("vllm:spec_decode_num_draft_tokens", 0)),
        "accepted": int(counters.get("vllm:spec_decode_num_accepted_tokens", 0)),
    }


def _layers(engine: Any) -> list[str]:
    """Class names of the GDN layers in the workers: proof of which code served."""
    try:
        return engine.apply_model(_gdn_class_names)[0]
    except Exception as problem:  # a diagnostic only: some executors cannot ship a function to the workers
        return [f"unknown: {problem}"]


def _gdn_class_names(model: Any) -> list[str]:
    return [
        f"{type(m).__module__}.{type(m).__qualname__}"
        for m in model.modules()
        if any(c.__name__ == "QwenGatedDeltaNetAttention" for c in type(m).__mro__)
    ]


def run_in_subprocess(
    job: dict[str, Any],
    folder: str | Path,
    name: str,
    *,
    environment: dict[str, str] | None = None,
    timeout: float = 600,
    script: Path | None = None,
) -> tuple[dict[str, Any] | None, str]:
    """Run `job` in a new process, which ends with this one.

    Args:
        script: run instead of this file, with the same two arguments.
    Returns:
        The result (None where the engine failed) and everything the process logged.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    job_file, result_file, log_file = (folder / f"{name}.{kind}" for kind in ("job.json", "result.json", "log"))
    result_file.unlink(missing_ok=True)
    job_file.write_text(json.dumps(job))
    command = [sys.executable, str(script or __file__), str(job_file), str(result_file)]
    with log_file.open("w") as log:
        child.run(command, log=log, environment=os.environ | ENVIRONMENT | (environment or {}), timeout=timeout)
    text = log_file.read_text(errors="replace")
    if not result_file.exists():
        return None, text
    return json.loads(result_file.read_text()), text


def main() -> None:
    job_file, result_file = sys.argv[1:]
    result = run_job(json.loads(Path(job_file).read_text()))
    Path(result_file).write_text(json.dumps(result))


if __name__ == "__main__":
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    main()
