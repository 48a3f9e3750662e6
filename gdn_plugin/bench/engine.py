"""Throughput of a whole vLLM engine, stock and with the plugin in turn, on the same prompts."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from gdn_plugin.bench.timing import median

PROMPT_TOKENS, GENERATED, PROMPTS, ROUNDS = 512, 32, 8, 5


def _engine(model: Path, dtype: str, stock: bool) -> dict[str, float]:
    """Starts one engine in a process of its own; medians over rounds, the first round left out as warm-up."""
    rng = random.Random(0)
    # Every prompt is new, so that the prefix cache serves none of them.
    prompts = [
        [[rng.randrange(3, 60) for _ in range(PROMPT_TOKENS)] for _ in range(PROMPTS)] for _ in range(2 * ROUNDS + 1)
    ]
    llm = {
        "model": str(model),
        "dtype": dtype,
        "max_model_len": 1024,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
    }
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, generated in (("prefill", 1), ("both", GENERATED)):
            job, result = Path(folder, f"{name}.json"), Path(folder, f"{name}-result.json")
            job.write_text(json.dumps({"llm": llm, "rounds": prompts, "max_tokens": generated, "logprobs": 0}))
            environment = os.environ | {"GDN_PLUGIN_DISABLE": "1" if stock else "0", "VLLM_LOGGING_LEVEL": "ERROR"}
            command = [sys.executable, "-m", "gdn_plugin.hosts.vllm.ask", str(job), str(result)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"the {'stock' if stock else 'plugin'} engine ended:\n{done.stderr[-2000:]}")
            seconds[name] = median(json.loads(result.read_text())["seconds"][1:])
    return {
        "prefill tokens/s": PROMPTS * PROMPT_TOKENS / seconds["prefill"],
        "decode tokens/s": PROMPTS * (GENERATED - 1) / max(seconds["both"] - seconds["prefill"], 1e-9),
    }


def main(model: Path, dtype: str) -> int:
    """Prints tokens a second of both engines and their ratio; two turns each, so that a drift shows."""
    if not (model / "config.json").is_file():
        print(f"gdn-plugin bench: no config.json in {model}; --engine takes the folder of a model", file=sys.stderr)
        return 2
    print(f"{PROMPTS} prompts of {PROMPT_TOKENS} tokens, {GENERATED} generated, {dtype}, median of {2 * ROUNDS} rounds")
    print(f"{'':10}{'prefill tokens/s':>20}{'decode tokens/s':>20}")
    best: dict[str, dict[str, float]] = {}
    for name in ("stock", "plugin", "stock", "plugin"):
        try:
            rates = _engine(model, dtype, stock=name == "stock")
        except RuntimeError as error:
            print(f"gdn-plugin bench: {error}", file=sys.stderr)
            return 1
        print(f"{name:10}" + "".join(f"{rate:20.0f}" for rate in rates.values()), flush=True)
        best[name] = {key: max(rate, best.get(name, rates)[key]) for key, rate in rates.items()}
    ratios = (best["plugin"][key] / best["stock"][key] for key in best["stock"])
    print(f"{'ratio':10}" + "".join(f"{ratio:20.2f}" for ratio in ratios))
    return 0
