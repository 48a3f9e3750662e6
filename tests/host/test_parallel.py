"""A real engine on several workers: each loads the plugin, and together they say what one says."""

from __future__ import annotations

import asyncio
import importlib.util
import re
from pathlib import Path

import pytest

from tests.host.engines import (
    EXAMPLES,
    FP32_LIMIT,
    MIXED,
    PLUGIN,
    QWEN3_5,
    TWO_WORKERS,
    answers,
    log_probability_gap,
    needs_vllm,
)
from tests.host.server import ask as ask_server
from tests.host.server import serve

pytestmark = [pytest.mark.engine, pytest.mark.slow, needs_vllm]

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")


def test_tensor_parallel_is_one_rank(ask, plain) -> None:
    parallel, log = ask("tp2", MIXED, prompt_logprobs=True, tensor_parallel_size=2, environment=TWO_WORKERS)
    assert log.count("gdn_plugin: prefill: ") == 2  # one line a worker
    assert answers(parallel) == answers(plain())
    assert log_probability_gap(plain(), parallel) < FP32_LIMIT


def test_pipeline_parallel_is_one_stage(ask, two_stages: str) -> None:
    """Compiled, since the host does not run two eager stages on a CPU; see test_not_offered."""
    one, _ = ask("pp1", MIXED, prompt_logprobs=True, model=two_stages)
    two, log = ask(
        "pp2",
        MIXED,
        prompt_logprobs=True,
        model=two_stages,
        pipeline_parallel_size=2,
        enforce_eager=False,
        environment=TWO_WORKERS,
    )
    assert log.count("gdn_plugin: prefill: ") == 2  # one line a worker
    assert answers(two) == answers(one)
    assert log_probability_gap(one, two) < FP32_LIMIT


def test_data_parallel_is_one_engine(qwen3_5: Path, plain_qwen3_5, tmp_path: Path) -> None:
    """A dense model: experts need a collective that the host's CPU communicator lacks; see test_not_offered."""
    openai = pytest.importorskip("openai", reason="the openai client is not installed")
    arguments = [
        *("--data-parallel-size", "2", "--dtype", "float32", "--max-model-len", "2048", "--max-num-seqs", "8"),
        *("--enforce-eager", "--no-enable-prefix-caching"),
    ]
    with serve(qwen3_5, tmp_path, *arguments, environment=QWEN3_5 | TWO_WORKERS) as server:
        client = openai.AsyncOpenAI(base_url=server.url("/v1"), api_key="none", max_retries=0)

        async def everybody() -> list[list[int] | None]:
            return await asyncio.gather(*(ask_server(client, prompt, 16) for prompt in MIXED[0] * 2))

        said = asyncio.run(everybody())
        finished = {
            engine: count
            for name, count in server.metrics().items()
            for engine in re.findall(r'^vllm:request_success_total\{engine="(\d)",finished_reason="length"', name)
        }
        assert server.log().count("gdn_plugin: prefill: ") == 2  # one line an engine
    assert set(finished) == {"0", "1"} and all(finished.values()), finished
    assert said == answers(plain_qwen3_5())[: len(MIXED[0])] * 2


@needs_ray
def test_ray_workers_load_the_plugin(ask, plain) -> None:
    environment = TWO_WORKERS | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "PYTHONPATH": str(EXAMPLES)}
    parallel, log = ask(
        "ray",
        MIXED,
        prompt_logprobs=True,
        tensor_parallel_size=2,
        distributed_executor_backend="ray",
        environment=environment,
        script=Path(__file__).with_name("ray_engine.py"),
    )
    assert set(parallel["layers"]) == {PLUGIN}
    # each of the two said so itself; Ray folds lines of different workers that are alike, numbers are not
    workers = {line.split("RayWorkerProc pid=")[1].split(")")[0] for line in log.splitlines() if "prefill: cpu" in line}
    assert len(workers) == 2, workers
    assert answers(parallel) == answers(plain())
    assert log_probability_gap(plain(), parallel) < FP32_LIMIT
