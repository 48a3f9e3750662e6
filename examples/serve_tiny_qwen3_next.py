"""A real vLLM engine serves a Qwen3-Next model, stock and with gdn-plugin, and the two are compared.

    python examples/serve_tiny_qwen3_next.py [--compiled] [--dtype bfloat16] [--backend auto] [--short] ...

Writes a tiny checkpoint if there is none, starts one engine with GDN_PLUGIN_DISABLE=1 and one that loads the plugin
by its entry point, each in a process of its own, on the same prompts: several lengths, some with a shared prefix, one
long enough to be prefilled in chunks. Needs no GPU. Exits with 1 when the mean difference of prompt log-probabilities
passes 0.03, with 2 when an engine fails or the plugin did not serve.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from run_engine import run_in_subprocess
from tiny_model import write_tiny_qwen3_next

LIMIT = 0.03
CHUNK = 512  # max_num_batched_tokens: longer prompts are prefilled in chunks
SHORT_CHUNK = 64
LABEL = "GdnPluginAttention"


def prompts(short: bool) -> list[list[list[int]]]:
    """Token ids in two rounds; the second shares prefixes with the first, so that the prefix cache is used."""
    rng = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(256) for _ in range(count)]

    if short:
        return [[tokens(1), tokens(65), tokens(100)], [tokens(7)]]
    shared = tokens(800)
    first = [tokens(1), tokens(5), tokens(64), tokens(129), shared + tokens(20), tokens(1500)]
    second = [shared + tokens(33), shared[:500] + tokens(7), tokens(40)]
    return [first, second]


def serve(name: str, job: dict[str, Any], environment: dict[str, str], folder: Path) -> tuple[dict[str, Any], str]:
    """One engine's answers and its log; ends the program where it fails."""
    print(f"{name}: starting the engine and asking it (20 s; with --compiled 70 s) ...", flush=True)
    began = time.perf_counter()
    result, log = run_in_subprocess(job, folder, name, environment=environment)
    if result is None:
        print("\n".join(log.splitlines()[-40:]))
        print(f"{name}: the engine failed; its whole log is {folder / (name + '.log')}")
        raise SystemExit(2)
    print(
        f"{name}: done in {time.perf_counter() - began:.0f} s, GDN layers: {', '.join(sorted(set(result['layers'])))}"
    )
    return result, log


def compare(stock: dict[str, Any], plugin: dict[str, Any], rounds: list[list[list[int]]]) -> float:
    """Print a row a prompt; return the mean |difference| of prompt log-probabilities over all of them."""
    print(f"\n{'prompt':>8} {'mean |d logprob|':>17} {'max':>8} {'greedy tokens agree':>20}")
    total = count = same = generated = 0
    for number, prompt_list in enumerate(rounds):
        for prompt, a, b in zip(prompt_list, stock["rounds"][number], plugin["rounds"][number], strict=True):
            pairs = zip(a.get("prompt_logprobs", []), b.get("prompt_logprobs", []), strict=True)
            gaps = [abs(x - y) for x, y in pairs]
            agree = sum(x == y for x, y in zip(a["tokens"], b["tokens"], strict=True))
            mean = f"{sum(gaps) / len(gaps):.4f}" if gaps else "-"
            worst = f"{max(gaps):.3f}" if gaps else "-"
            print(f"{len(prompt):>8} {mean:>17} {worst:>8} {agree:>17}/{len(a['tokens'])}")
            total, count = total + sum(gaps), count + len(gaps)
            same, generated = same + agree, generated + len(a["tokens"])
    print(f"\ngreedy tokens that agree: {same}/{generated}")
    return total / count


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=Path(tempfile.gettempdir()) / "gdn-plugin-tiny-qwen3-next")
    parser.add_argument("--dtype", default="bfloat16", help="stock vLLM on a CPU takes bfloat16 alone")
    requested = os.environ.get("GDN_PLUGIN_BACKEND", "auto")
    parser.add_argument("--backend", default=requested, help="GDN_PLUGIN_BACKEND of the plugin's engine")
    parser.add_argument("--compiled", action="store_true", help="let vLLM compile the model (default: eager)")
    parser.add_argument(
        "--short",
        action="store_true",
        default=os.environ.get("TRITON_INTERPRET") == "1",
        help="four short prompts, a few tokens: the default under TRITON_INTERPRET=1, where a kernel takes seconds",
    )
    options = parser.parse_args()

    checkpoint = write_tiny_qwen3_next(options.checkpoint)
    print(f"model: tiny Qwen3-Next (3 GDN layers, 1 attention layer) in {checkpoint}")
    rounds = prompts(options.short)
    job = {
        "llm": {
            "model": str(checkpoint),
            "dtype": options.dtype,
            "max_model_len": 2048,
            "max_num_batched_tokens": SHORT_CHUNK if options.short else CHUNK,
            "max_num_seqs": 8,
            "enforce_eager": not options.compiled,
            "enable_prefix_caching": True,
            "disable_log_stats": True,
        },
        "rounds": rounds,
        "max_tokens": 4 if options.short else 32,
        "prompt_logprobs": True,
        "repeat_timed": not options.short,
    }
    folder = Path(tempfile.mkdtemp(prefix="gdn-plugin-demo-"))
    # Log-probabilities of a prompt need every position, so vLLM looks nothing up in the prefix cache for them;
    # the timed round, sent once more without them, uses it.
    stock, _ = serve("stock", job, {"GDN_PLUGIN_DISABLE": "1"}, folder)
    environment = {"GDN_PLUGIN_DISABLE": "0", "GDN_PLUGIN_BACKEND": options.backend}
    plugin, log = serve("plugin", job, environment, folder)
    if not all(LABEL in layer for layer in plugin["layers"]) or not plugin["layers"]:
        print("the plugin did not serve: is it installed, so that vLLM finds its entry point? (pip install -e .)")
        return 2

    print("\nbackends the plugin chose:")
    for line in dict.fromkeys(line.partition("gdn_plugin: ")[2] for line in log.splitlines() if "gdn_plugin: " in line):
        print(f"  {line}")
    mean = compare(stock, plugin, rounds)
    print(f"mean |difference| of prompt log-probabilities: {mean:.4f} (limit {LIMIT})")
    for name, result in (("stock", stock), ("plugin", plugin)):
        timed = result.get("timed")
        if timed is None:
            continue
        print(
            f"{name:>6}: {timed['tokens_per_second']:8.0f} tokens/s "
            f"({timed['prompt_tokens']} prompt, {timed['cached_tokens']} of them from the prefix cache, "
            f"+ {timed['generated']} generated in {timed['seconds']:.2f} s)"
        )
    if not mean <= LIMIT:  # NaN fails too
        print("FAILED: the two engines do not compute the same model")
        return 1
    print("ok")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
