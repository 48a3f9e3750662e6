"""A real SGLang engine serves a Qwen3-Next model, on stand-ins and with gdn-plugin, and the two are compared.

    make demo-sglang
    python examples/serve_tiny_sglang.py [--backend auto] [--qwen3-5] [--extra-buffer] [--chunk 64]

SGLang's compiled CPU kernels are on no index, so the first engine computes its GDN layers by a plain recurrence that
stands in for them (`examples/sglang_standins`): the comparison shows that the plugin computes the same model inside
SGLang's scheduler, radix cache and pools, and says nothing of SGLang's own kernels. Each engine is a process of its
own; the second round continues the prompts of the first, so that the radix cache is used. Needs no GPU. Exits with 1
when the mean difference of log-probabilities passes 0.03, with 2 when an engine fails or the plugin did not serve.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from run_sglang import SERVED_BY_STANDIN, run_in_subprocess
from tiny_model import TinyConfig, write_tiny_qwen3_next

LIMIT = 0.03


def prompts() -> list[list[list[int]]]:
    """Token ids in two rounds; the second continues, and branches off from, prompts of the first."""
    rng = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(256) for _ in range(count)]

    first = [tokens(1), tokens(5), tokens(64), tokens(129), tokens(300)]
    return [first, [first[4] + tokens(3), first[3] + tokens(70), first[4][:200] + tokens(20)]]


def serve(name: str, job: dict[str, Any], environment: dict[str, str], folder: Path) -> tuple[dict[str, Any], str]:
    """One engine's answers and its log; ends the program where it fails."""
    print(f"{name}: starting the engine and asking it (a minute) ...", flush=True)
    began = time.perf_counter()
    result, log = run_in_subprocess(job, folder, name, environment=environment)
    if result is None:
        print("\n".join(log.splitlines()[-40:]))
        print(f"{name}: the engine failed; its whole log is {folder / (name + '.log')}")
        raise SystemExit(2)
    print(
        f"{name}: done in {time.perf_counter() - began:.0f} s, {result['startup_s']:.0f} s of them the engine's start"
    )
    return result, log


def compare(standins: dict[str, Any], plugin: dict[str, Any], rounds: list[list[list[int]]]) -> float:
    """Print a row a prompt; return the mean |difference| of log-probabilities up to the first token that differs."""
    print(f"\n{'prompt':>8} {'cached':>7} {'tokens equal':>13} {'mean |d log p|':>15} {'max':>7}")
    gaps, same, total = [], 0, 0
    for number, prompt_list in enumerate(rounds):
        for prompt, a, b in zip(prompt_list, standins["rounds"][number], plugin["rounds"][number], strict=True):
            equal = [x == y for x, y in zip(a["tokens"], b["tokens"], strict=True)]
            agree = equal.index(False) if False in equal else len(equal)
            own = [abs(x - y) for x, y in zip(a["logprobs"][:agree], b["logprobs"][:agree], strict=True)]
            mean, worst = (f"{sum(own) / len(own):.4f}", f"{max(own):.3f}") if own else ("-", "-")
            print(f"{len(prompt):>8} {b['cached_tokens']:>7} {sum(equal):>10}/{len(equal)} {mean:>15} {worst:>7}")
            gaps, same, total = gaps + own, same + sum(equal), total + len(equal)
    print(f"\ngreedy tokens that agree: {same}/{total}")
    return sum(gaps) / max(len(gaps), 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    requested = os.environ.get("GDN_PLUGIN_BACKEND", "auto")
    parser.add_argument("--backend", default=requested, help="GDN_PLUGIN_BACKEND of the plugin's engine")
    parser.add_argument("--qwen3-5", action="store_true", help="Qwen3.5's layout, dense, in place of Qwen3-Next's")
    parser.add_argument("--extra-buffer", action="store_true", help="the radix cache that keeps states of whole chunks")
    parser.add_argument("--chunk", type=int, default=128, help="prompts are prefilled in chunks of so many tokens")
    options = parser.parse_args()

    config = TinyConfig(flat=True, vision=True) if options.qwen3_5 else TinyConfig(moe_layers=(0, 1, 2, 3))
    name = "Qwen3.5" if options.qwen3_5 else "Qwen3-Next"
    checkpoint = write_tiny_qwen3_next(Path(tempfile.gettempdir()) / f"gdn-plugin-tiny-sglang-{name.lower()}", config)
    print(f"model: tiny {name} (3 GDN layers, 1 attention layer) in {checkpoint}")
    engine: dict[str, Any] = {"model_path": str(checkpoint), "chunked_prefill_size": options.chunk}
    if options.qwen3_5:
        engine["enable_multimodal"] = False
    rounds = prompts()
    job = {"engine": engine, "rounds": rounds, "max_tokens": 16}
    folder = Path(tempfile.mkdtemp(prefix="gdn-plugin-demo-sglang-"))
    standins, _ = serve("standins", job, {"GDN_PLUGIN_DISABLE": "1"}, folder)
    environment = {"GDN_PLUGIN_DISABLE": "0", "GDN_PLUGIN_BACKEND": options.backend}
    if options.extra_buffer:  # which the stand-ins cannot: they have no state of the middle of a prompt
        engine["mamba_radix_cache_strategy"] = "extra_buffer"
    plugin, log = serve("plugin", job, environment, folder)
    chosen = re.findall(r"gdn_plugin: (\w+: \S+ \([^)]*\))", log)
    if SERVED_BY_STANDIN in log or not chosen:
        print("the plugin did not serve: is it installed, so that SGLang finds its entry point? (pip install -e .)")
        return 2

    print("\nbackends the plugin chose:")
    for line in dict.fromkeys(chosen):
        print(f"  {line}")
    mean = compare(standins, plugin, rounds)
    print(f"mean |difference| of log-probabilities: {mean:.4f} (limit {LIMIT})")
    if not mean <= LIMIT:  # NaN fails too
        print("FAILED: the two engines do not compute the same model")
        return 1
    print("ok")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
