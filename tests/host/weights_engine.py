"""One engine whose weights change while it serves: `weights_engine.py job.json result.json`, the core in this process.

The job: `llm` (arguments of vllm.LLM), `prompts`, `factor`, and `reload`, folders of checkpoints. The result holds what
was said with the weights of the model, after every conv1d weight was multiplied by `factor` in place, and after each of
the checkpoints was loaded by `reload_weights`. With `enable_sleep_mode` also, `awake`, what was said after a sleep that
kept the weights (the last checkpoint's) and after one that dropped them and loaded the last checkpoint again.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import run_engine


def main() -> None:
    for key, value in run_engine.ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import torch
    from vllm import LLM, SamplingParams

    job = json.loads(Path(sys.argv[1]).read_text())
    engine = LLM(**job["llm"])
    wanted = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False, logprobs=0)

    def ask() -> list[dict[str, Any]]:
        said = engine.generate([{"prompt_token_ids": prompt} for prompt in job["prompts"]], wanted, use_tqdm=False)
        return [
            {
                "tokens": list(one.outputs[0].token_ids),
                "logprobs": [next(iter(entry.values())).logprob for entry in one.outputs[0].logprobs],
            }
            for one in said
        ]

    def scale(model: Any) -> int:
        """As a trainer does: in place, under no_grad."""
        found = [m.conv1d.weight for m in model.modules() if hasattr(m, "A_log") and hasattr(m, "conv1d")]
        with torch.no_grad():
            for weight in found:
                weight.mul_(job["factor"])
        return len(found)

    result: dict[str, Any] = {"loaded": ask()}
    (result["layers"],) = engine.apply_model(scale)
    result["scaled"] = ask()
    result["reloaded"] = []
    for folder in job["reload"]:
        engine.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        result["reloaded"].append(ask())
    if job["llm"].get("enable_sleep_mode"):
        engine.sleep(level=1)
        engine.wake_up()
        result["awake"] = [ask()]
        engine.sleep(level=2)
        engine.wake_up(tags=["weights"])
        engine.collective_rpc("reload_weights", kwargs={"weights_path": job["reload"][-1]})
        engine.wake_up(tags=["kv_cache"])
        result["awake"].append(ask())
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
