"""One engine, in which every block that a request is given for its states holds NaN until the request has written it.

Run as `poison_engine.py job.json result.json`, the engine core in this process. The job: `llm` (arguments of
vllm.LLM), `prompts`, `company` (prompts that run before and beside each of them), `prime` (prompts asked first, for the
prefix cache). The result holds, for each prompt, what was said alone and what was said in company.

With VLLM_USE_V2_MODEL_RUNNER=1 and TRITON_INTERPRET=1 the other runner, its kernels interpreted.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import run_engine


def main() -> None:
    for key, value in run_engine.ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import torch

    second = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
    if second and not torch.cuda.is_available():
        # vLLM for CPUs uses Triton only where it has a backend of this name, and then asks nothing of it.
        from triton.backends import backends

        backends["cpu"] = SimpleNamespace(driver=None)  # type: ignore[assignment]
    from vllm import LLM, SamplingParams

    runners = importlib.import_module(f"vllm.v1.worker.{'gpu.model_runner' if second else 'gpu_model_runner'}")
    GPUModelRunner = runners.GPUModelRunner
    from gdn_plugin.hosts import core

    job_file, result_file = sys.argv[1:]
    job = json.loads(Path(job_file).read_text())
    seen = {"poisoned": 0, "fresh speculative rows": 0, "tails of one token": 0}
    execute, run = GPUModelRunner.execute_model, core.Core.run

    def poisoned(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        for new in scheduler_output.scheduled_new_reqs:
            poison(self, new.block_ids, new.num_computed_tokens)
            tokens = scheduler_output.num_scheduled_tokens[new.req_id]
            drafts = len(scheduler_output.scheduled_spec_decode_tokens.get(new.req_id, ()))
            seen["tails of one token"] += new.num_computed_tokens > 0 and tokens - drafts == 1
        for given in scheduler_output.scheduled_cached_reqs.new_block_ids:
            if given is not None:
                poison(self, given, 0)
        return execute(self, scheduler_output, *args, **kwargs)

    def poison(runner: Any, block_ids: Any, computed: int) -> None:
        for group, ids in zip(runner.kv_cache_config.kv_cache_groups, block_ids, strict=True):
            layers = [runner.vllm_config.compilation_config.static_forward_context[name] for name in group.layer_names]
            for layer in (layer for layer in layers if hasattr(layer, "_gdn_core")):
                fresh = [i for i in ids[computed // group.kv_cache_spec.block_size :] if i > 0]
                conv, state, *_ = layer.kv_cache
                for pool in (conv, state, *(layer._gdn_parameters().ring or ())):
                    # of a ring's spans, what a former user might leave
                    pool[fresh] = float("nan") if pool.dtype.is_floating_point else 3
                seen["poisoned"] += len(fresh)

    def watched(self: Any, batch: Any, *args: Any) -> None:
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if batch.spec is not None and not capturing:
            seen["fresh speculative rows"] += int((~batch.spec.has_initial_state).sum())
        run(self, batch, *args)

    GPUModelRunner.execute_model = poisoned  # type: ignore[method-assign]
    core.Core.run = watched  # type: ignore[method-assign]
    engine = LLM(**job["llm"])

    def ask(prompts: list[list[int]], lengths: list[int]) -> list[dict[str, Any]]:
        wanted = [
            SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, detokenize=False, logprobs=0)
            for n in lengths
        ]
        said = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], wanted, use_tqdm=False)
        return [
            {
                "tokens": list(one.outputs[0].token_ids),
                "logprobs": [next(iter(entry.values())).logprob for entry in one.outputs[0].logprobs],
                "cached": one.num_cached_tokens or 0,
            }
            for one in said
        ]

    result: dict[str, Any] = {"alone": [], "in company": []}
    for prompt in job["prime"]:
        ask([prompt], [1])
    for prompt in job["prompts"]:
        result["alone"].append(ask([prompt], [10])[0])
    for prompt in job["prompts"]:
        # Two run; the second ends soon, and the prompt joins the first in the blocks that it leaves.
        result["in company"].append(
            [ask([job["company"][0], other, prompt], [14, 3, 10])[2] for other in job["company"]]
        )
    result["seen"] = seen
    Path(result_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
