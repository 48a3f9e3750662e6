"""Run one SGLang engine over rounds of prompts in this process and write what it said as JSON.

    python examples/run_sglang.py job.json result.json

SGLang's CPU kernels are on no index, so the engine runs beside stand-ins for them (`examples/sglang_standins`).
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

STANDINS = Path(__file__).parent / "sglang_standins"
SERVED_BY_STANDIN = "sglang_standins: the stand-in's recurrence serves"
ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "SGLANG_CUDA_COREDUMP_BEFORE_CRASH_WAIT_SECS": "0",  # where the engine dies, at once
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "passive",  # spinning threads starve one another on a few cores
}
ENGINE = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "mem_fraction_static": 0.3,
    "max_total_tokens": 8192,
    "max_running_requests": 6,
    "context_length": 2048,
    "disable_overlap_schedule": True,
    "skip_tokenizer_init": True,
    "watchdog_timeout": 600,
    "log_level": "info",
}


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Start the engine, send the rounds one after the other (prompts of a round together).

    Args:
        job: `engine` (arguments of sglang.Engine, over ENGINE), `rounds` (lists of token-id prompts), `max_tokens`,
            `aborted` (token-id prompts that are sent before the first round and aborted while they are served).
    Returns:
        `startup_s`, and `rounds`: for each prompt `tokens`, their `logprobs`, and `cached_tokens`.
    """
    import sglang

    began = time.perf_counter()
    engine = sglang.Engine(**ENGINE | job["engine"])
    startup_s = time.perf_counter() - began
    if job.get("aborted"):
        engine.loop.run_until_complete(_abort(engine, job["aborted"]))
    sampling = {"temperature": 0, "max_new_tokens": job["max_tokens"], "ignore_eos": True}
    rounds = []
    for prompts in job["rounds"]:
        outputs = engine.generate(input_ids=prompts, sampling_params=sampling, return_logprob=True)
        rounds.append([_answer(output["meta_info"]) for output in outputs])
    engine.shutdown()
    return {"startup_s": startup_s, "rounds": rounds}


def _answer(meta: dict[str, Any]) -> dict[str, Any]:
    said = meta["output_token_logprobs"]
    return {
        "tokens": [token for _, token, *_ in said],
        "logprobs": [logprob for logprob, *_ in said],
        "cached_tokens": meta["cached_tokens"],
    }


async def _abort(engine: Any, prompts: list[list[int]]) -> None:
    """Send prompts that would be answered at length, and abort each behind its first tokens."""

    async def one(number: int, prompt: list[int]) -> None:
        sampling = {"temperature": 0, "max_new_tokens": 500, "ignore_eos": True}
        stream = await engine.async_generate(
            input_ids=prompt, sampling_params=sampling, stream=True, rid=f"aborted-{number}"
        )
        count = 0
        async for output in stream:
            count = output["meta_info"]["completion_tokens"]
            if count >= 3 + number:
                engine.tokenizer_manager.abort_request(rid=f"aborted-{number}")
        assert count < 500, "the request was not aborted"

    await asyncio.gather(*(one(number, prompt) for number, prompt in enumerate(prompts)))


def run_in_subprocess(
    job: dict[str, Any],
    folder: str | Path,
    name: str,
    *,
    environment: dict[str, str] | None = None,
    timeout: float = 600,
) -> tuple[dict[str, Any] | None, str]:
    """Run `job` in a new process, which ends with this one.

    Returns:
        The result (None where the engine failed) and everything its processes logged.
    """
    from gdn_plugin import child

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    job_file, result_file, log_file = (folder / f"{name}.{kind}" for kind in ("job.json", "result.json", "log"))
    result_file.unlink(missing_ok=True)
    job_file.write_text(json.dumps(job))
    wanted = os.environ | ENVIRONMENT | (environment or {})
    wanted["PYTHONPATH"] = os.pathsep.join([str(STANDINS), *filter(None, [wanted.get("PYTHONPATH")])])
    with log_file.open("w") as log:
        child.run(
            [sys.executable, __file__, str(job_file), str(result_file)],
            log=log,
            environment=wanted,
            timeout=timeout,
        )
    text = log_file.read_text(errors="replace")
    return (json.loads(result_file.read_text()) if result_file.exists() else None), text


def main() -> None:
    job_file, result_file = sys.argv[1:]
    result = run_job(json.loads(Path(job_file).read_text()))
    Path(result_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
