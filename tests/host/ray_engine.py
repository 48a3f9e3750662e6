"""`run_engine` on Ray's workers: what vLLM would do on a CPU if its CPU platform said by which resource Ray counts it.

vLLM refuses Ray on a CPU for want of that name alone ("does not support ray"). Here the name is given, in this process
and in the workers, and a worker's number is its rank. Everything else, the loading of plugins too, is vLLM's own.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import run_engine

RESOURCE = "cpu_worker"


def name_the_resource() -> None:
    import ray
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.executor.ray_executor_v2 import RayWorkerProc

    def node_and_number(self: Any) -> tuple[str, list[int]]:
        return ray.get_runtime_context().get_node_id(), [self._init_kwargs["rank"]]

    CpuPlatform.ray_device_key = RESOURCE
    RayWorkerProc.get_node_and_physical_gpu_ids = node_and_number  # type: ignore[method-assign]


def main() -> None:
    for key, value in run_engine.ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import ray

    name_the_resource()
    job_file, result_file = sys.argv[1:]
    job = json.loads(Path(job_file).read_text())
    ray.init(
        num_cpus=job["llm"]["tensor_parallel_size"],
        resources={RESOURCE: job["llm"]["tensor_parallel_size"]},
        include_dashboard=False,
        runtime_env={"worker_process_setup_hook": name_the_resource},
    )
    try:
        Path(result_file).write_text(json.dumps(run_engine.run_job(job)))
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
