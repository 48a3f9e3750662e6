"""From an engine's answers to a score, its interval, and its distance from the reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gdn_plugin.tools.accuracy.task import Prompt

Z_95 = 1.959963984540054


@dataclass(frozen=True, slots=True)
class Cell:
    """What one configuration did on the prompts of one length.

    Args:
        length: tokens of prompt and answer; 0 for several lengths together.
        prompts: how many were asked.
        first: prompts whose first answer token was right (recall alone, from prefill).
        whole: prompts whose whole answer was right (recall seven times, six of them decoded or verified).
        log_probability_error: mean |log-probability - reference's| over the alternatives that the engine named at
            each answer position; nan where there is none.
        cached_tokens: prompt tokens that the engine took from its prefix cache.
    """

    length: int
    prompts: int
    first: int
    whole: int
    log_probability_error: float
    cached_tokens: int = 0

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.whole, self.prompts)


def pool(cells: Sequence[Cell]) -> Cell:
    """Several lengths as one; errors weigh by prompts, and cells without one do not count in it."""
    known = [cell for cell in cells if not math.isnan(cell.log_probability_error)]
    weight = sum(cell.prompts for cell in known)
    error = sum(cell.log_probability_error * cell.prompts for cell in known) / weight if weight else math.nan
    return Cell(
        length=0,
        prompts=sum(cell.prompts for cell in cells),
        first=sum(cell.first for cell in cells),
        whole=sum(cell.whole for cell in cells),
        log_probability_error=error,
        cached_tokens=sum(cell.cached_tokens for cell in cells),
    )


def wilson(hits: int, trials: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval for a share, 95 % by default (E. B. Wilson, JASA 22, 1927)."""
    if trials < 1:
        raise ValueError(f"trials must be positive, got {trials}")
    share = hits / trials
    scale = 1 + z * z / trials
    middle = (share + z * z / (2 * trials)) / scale
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


def score(
    length: int,
    prompts: Sequence[Prompt],
    answers: Sequence[Mapping[str, Any]],
    reference: Mapping[tuple[int, ...], Sequence[Sequence[float]]],
) -> Cell:
    """Count the right answers and measure the distance from the reference.

    Args:
        answers: `tokens`, `logprobs` (a mapping {token: log-probability} a token) and `cached_tokens` a prompt.
        reference: log-probabilities [answer position][token] by prompt + tokens said; only where there are logprobs.
    Raises:
        ValueError: the engine returned a different number of answers.
    """
    if len(answers) != len(prompts):
        raise ValueError(f"answers: expected {len(prompts)}, got {len(answers)}")
    first = whole = cached = 0
    differences: list[float] = []
    for prompt, answer in zip(prompts, answers, strict=True):
        said = tuple(answer["tokens"])
        first += said[:1] == prompt.answer[:1]
        whole += said == prompt.answer
        cached += answer["cached_tokens"]
        for position, alternatives in enumerate(answer["logprobs"]):
            truth = reference[prompt.tokens + said][position]
            differences += [abs(found - truth[int(token)]) for token, found in alternatives.items()]
    error = sum(differences) / len(differences) if differences else math.nan
    return Cell(length, len(prompts), first, whole, error, cached)
