"""What `bench --engine` measures inside an engine's process: answers to compare, seconds, and time by kernel.

Imports no engine: it is handed one.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

# (sequences, tokens of each prompt, tokens to generate for each)
Mix = Sequence[tuple[int, int, int]]

CHECK_LENGTHS = (1, 5, 64, 65, 200, 511)  # around the chunks of 64 tokens, and long enough for a state that matters
CHECK_NEW = 16
# Mean |difference| of log-probabilities at which two engines are the same model: as in the demo.
LIMIT = 0.03
# Where two engines choose another next token, stock's own log-probabilities of the two are this near.
TIE = 0.25
_ALTERNATIVES = 20  # as many as vLLM gives by default: of random weights many tokens are near ties
_VOCABULARY = 30000


@dataclass(frozen=True, slots=True)
class Agreement:
    """How two engines' greedy answers compare; `same` of `tokens` came before the first that differs.

    Args:
        difference: mean |difference| of log-probabilities, of prompts and of the answers' common beginnings.
        limit: what it may be: LIMIT, or twice the distance of stock from itself in another batch.
        worst_tie: largest distance, by stock's log-probabilities, of two tokens where answers part.
    """

    difference: float
    limit: float
    same: int
    tokens: int
    worst_tie: float

    @property
    def ok(self) -> bool:
        return self.difference <= self.limit and self.worst_tie <= max(TIE, 4 * self.limit)  # NaN fails


def compare(stock: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]], noise: float = 0.0) -> Agreement:
    """Compare answers as `answers` gives them.

    Args:
        noise: how far stock is from itself.
    """
    gaps: list[float] = []
    same = tokens = 0
    worst = 0.0
    for a, b in zip(stock, other, strict=True):
        gaps += [abs(x - y) for x, y in zip(a["prompt"], b["prompt"], strict=True)]
        tokens += len(a["tokens"])
        for at, (mine, theirs) in enumerate(zip(a["tokens"], b["tokens"], strict=True)):
            said = {int(token): value for token, value in a["logprobs"][at].items()}
            if mine != theirs:
                worst = max(worst, said[mine] - said.get(theirs, -math.inf))
                break
            same += 1
            gaps.append(abs(said[mine] - {int(k): v for k, v in b["logprobs"][at].items()}[mine]))
    difference = sum(gaps) / len(gaps) if gaps else math.nan
    return Agreement(difference, max(LIMIT, 2 * noise), same, tokens, worst)


def run(engine: Any, sampling: Callable[..., Any], layers: int, job: Mapping[str, Any]) -> dict[str, Any]:
    """Check, then time, then profile.

    Args:
        sampling: the engine's SamplingParams.
        layers: GDN layers of the model.
        job: `rounds` {name: Mix}, `repeats`, `randomise` (whether weights are to be made up), and for the engine
            that is to agree with another, `expected` and `noise` of that one.
    Returns:
        `check` (an Agreement, with `ok`) or `said` and `noise`; and, unless they disagree, `seconds` {round: [..]},
        `compiled` (kernels held before and after the rounds, of all ranks; None for stock), and of the first GPU
        `kernels` {round: {name: [calls, us]}} of one layer's step and `device_s` {round: seconds of all kernels}.
    """
    if job.get("randomise"):
        engine.apply_model(randomise)
    vocabulary = min(engine.llm_engine.model_config.get_vocab_size(), _VOCABULARY)
    said = answers(engine, sampling, vocabulary, together=True)
    result: dict[str, Any] = {}
    if job.get("expected"):
        agreement = compare(job["expected"], said, job["noise"])
        result["check"] = asdict(agreement) | {"ok": agreement.ok}
        if not agreement.ok:
            return result
    else:
        result |= {"said": said}
        result["noise"] = compare(said, answers(engine, sampling, vocabulary, together=False)).difference

    def ask(mix: Mix, salt: int) -> float:
        rng = random.Random(salt)
        shapes = [(length, new) for count, length, new in mix for _ in range(count)]
        prompts = [{"prompt_token_ids": [rng.randrange(1, vocabulary) for _ in range(n)]} for n, _ in shapes]
        wanted = [sampling(temperature=0.0, max_tokens=m, ignore_eos=True, detokenize=False) for _, m in shapes]
        began = time.perf_counter()
        engine.generate(prompts, wanted, use_tqdm=False)
        return time.perf_counter() - began

    rounds: Mapping[str, Mix] = job["rounds"]
    # Prompts of their own each time: those of one salt begin alike, which a prefix cache would find.
    for number, mix in enumerate(rounds.values()):
        ask(mix, number)
    before = _held(engine)
    seconds: dict[str, list[float]] = {name: [] for name in rounds}
    for repeat in range(1, job["repeats"] + 1):
        for number, (name, mix) in enumerate(rounds.items()):
            seconds[name].append(ask(mix, 100 * repeat + number))
    result |= {"seconds": seconds, "compiled": [before, _held(engine)]}
    if torch.cuda.is_available():
        found = {
            name: _profile(engine, partial(ask, mix, len(rounds) + number), layers)
            for number, (name, mix) in enumerate(rounds.items())
        }
        result["kernels"] = {name: kernels for name, (kernels, _) in found.items()}
        result["device_s"] = {name: device_s for name, (_, device_s) in found.items()}
    return result


def answers(engine: Any, sampling: Callable[..., Any], vocabulary: int, *, together: bool) -> list[dict[str, Any]]:
    """Greedy answers to random prompts of `CHECK_LENGTHS`: `tokens`, their `logprobs` and those of the `prompt`.

    They are not looked for in a prefix cache, and seldom pass the end of one of its blocks: tests do.
    """
    rng = random.Random(0)
    prompts = [{"prompt_token_ids": [rng.randrange(1, vocabulary) for _ in range(n)]} for n in CHECK_LENGTHS]
    wanted = sampling(
        temperature=0.0, max_tokens=CHECK_NEW, ignore_eos=True, detokenize=False, logprobs=_ALTERNATIVES,
        prompt_logprobs=0,
    )  # fmt: skip
    said = []
    for batch in [prompts] if together else [[prompt] for prompt in prompts]:
        for prompt, output in zip(batch, engine.generate(batch, wanted, use_tqdm=False), strict=True):
            first = output.outputs[0]
            pairs = zip(prompt["prompt_token_ids"][1:], (output.prompt_logprobs or [])[1:], strict=False)
            said.append(
                {
                    "tokens": list(first.token_ids),
                    "logprobs": [{token: e.logprob for token, e in position.items()} for position in first.logprobs],
                    "prompt": [position[token].logprob for token, position in pairs],
                }
            )
    return said


def randomise(model: torch.nn.Module) -> None:
    """Give a model whose weights an engine has made up, all near zero, some that let every layer matter.

    Of tensor parallel ranks each gets the same slices, except of the vocabulary, whose tokens would come in pairs.
    """
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    with torch.no_grad():
        for seed, (name, weight) in enumerate(sorted(model.named_parameters())):
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                seed += 10**6 * rank
            generator = torch.Generator(weight.device).manual_seed(seed)
            if name.endswith("A_log"):
                weight.copy_(torch.linspace(-6.0, 1.0, weight.numel()).view_as(weight))
            elif name.endswith("dt_bias"):
                weight.normal_(0.0, 0.5, generator=generator)
            elif weight.dim() < 2:  # norms, about 1 or, where the model adds 1, about 0
                weight.normal_(1.0 if name.endswith("linear_attn.norm.weight") else 0.0, 0.05, generator=generator)
            else:
                deviation = 0.6 if "conv1d" in name else weight.shape[-1] ** -0.5
                weight.normal_(0.0, deviation, generator=generator)


def _held(engine: Any) -> int | None:
    """Kernels that the plugin has compiled in the engine's processes; None where it does not serve."""
    counts = engine.apply_model(_compile_count)
    return None if None in counts else sum(counts)


# What follows is sent to the engine's processes by name, so it takes the model, which it has no use for.
_profilers: list[torch.profiler.profile] = []


def _compile_count(_: torch.nn.Module) -> int | None:
    ops = sys.modules.get("gdn_plugin.ops")
    return None if ops is None else ops.compile_count()


def _start_profile(_: torch.nn.Module) -> None:
    _profilers.append(torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]))
    _profilers[-1].start()


def _stop_profile(_: torch.nn.Module) -> list[tuple[str, int, float]]:
    """(kernel, calls, microseconds)."""
    torch.cuda.synchronize()
    profiler = _profilers.pop()
    profiler.stop()
    return [(event.key, event.count, event.self_device_time_total) for event in profiler.key_averages()]


def _profile(engine: Any, call: Callable[[], object], layers: int) -> tuple[dict[str, list[float]], float]:
    """{kernel: [calls, microseconds]} of one step's share of a GDN layer, longest first; seconds of them all.

    Of the first rank.
    """
    steps = 0
    step = engine.llm_engine.step

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        return step(*args, **kwargs)

    engine.llm_engine.step = counted
    engine.apply_model(_start_profile)
    try:
        call()
    finally:
        events = engine.apply_model(_stop_profile)[0]
        engine.llm_engine.step = step
    calls: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for name, count, us in events:
        if us:
            calls[name] += count
            total[name] += us
    each = max(1, steps * layers)
    return {name: [calls[name] / each, us / each] for name, us in total.most_common()}, total.total() / 1e6


def own_kernels(
    engines: Mapping[str, Mapping[str, Sequence[float]]],
) -> tuple[dict[str, dict[str, Sequence[float]]], float]:
    """What each of the engines launches unlike the others, and the microseconds of what all launch alike (the host's).

    Alike is what all call as often, give or take a twentieth, for about as long.

    Args:
        engines: {kernel: [calls, microseconds]} of each.
    """
    first = next(iter(engines.values()), {})

    def alike(name: str) -> bool:
        rows = [rows.get(name) for rows in engines.values()]
        return all(
            row is not None and all(math.isclose(x, y, rel_tol=0.05) for x, y in zip(first[name], row, strict=True))
            for row in rows
        )

    shared = {name for name in first if alike(name)}
    own = {who: {name: row for name, row in rows.items() if name not in shared} for who, rows in engines.items()}
    return own, sum(first[name][1] for name in shared)
