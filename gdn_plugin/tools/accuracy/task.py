"""Multi-query associative recall (Arora et al., arXiv:2312.04927), as token ids and as text.

A prompt holds pairs "key value" in groups of four, noise between the groups, and ends with the first key of one of
the groups. The answer is that group replayed: value, next key, value, next key, value, next key, value. The first
token is recall proper; the six after it make the engine decode (and give n-gram drafts something to hit), because
each of them has to be looked up in the state as well. Nothing else in the model can hold the answer: the model has
no attention layer, and all keys and values are drawn anew for every prompt.

A quarter of all (key, value) combinations is reserved for evaluation: a held-out prompt uses only those, a training
sequence none of them. No torch here, so that prompts can be made and read anywhere.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

KEYS = 64
VALUES = 64
NOISE = 62
SPECIAL = ("<pad>", "<eos>")
GROUP = 4  # pairs in a group
RESERVED = 4  # one combination in so many is kept for evaluation

TRAINING_LENGTH = 128
TRAINING_PAIRS = 16
ANSWER_LENGTH = 2 * GROUP - 1

Pair = tuple[int, int]


def vocabulary() -> list[str]:
    """Names of all tokens; the position is the id."""
    return [
        *SPECIAL,
        *(f"k{i:02d}" for i in range(KEYS)),
        *(f"v{i:02d}" for i in range(VALUES)),
        *(f"n{i:02d}" for i in range(NOISE)),
    ]


def key_id(key: int) -> int:
    return len(SPECIAL) + key


def value_id(value: int) -> int:
    return len(SPECIAL) + KEYS + value


def noise_id(noise: int) -> int:
    return len(SPECIAL) + KEYS + VALUES + noise


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids to send, and the ids that a model that remembers answers with."""

    tokens: tuple[int, ...]
    answer: tuple[int, ...]


def is_reserved(key: int, value: int) -> bool:
    """True for the combinations that only held-out prompts use."""
    return (key + value) % RESERVED == 0


def draw_pairs(rng: random.Random, count: int, *, held_out: bool) -> list[Pair]:
    """`count` pairs with distinct keys and distinct values, all reserved (held out) or none of them.

    Raises:
        ValueError: `count` exceeds the vocabulary.
    """
    if not 0 < count <= min(KEYS, VALUES):
        raise ValueError(f"count: expected 1..{min(KEYS, VALUES)} pairs, got {count}")
    while True:
        free = rng.sample(range(VALUES), VALUES)
        pairs: list[Pair] = []
        for key in rng.sample(range(KEYS), count):
            value = next((v for v in free if is_reserved(key, v) == held_out), None)
            if value is None:
                break  # the last values left do not fit the last keys: draw again
            free.remove(value)
            pairs.append((key, value))
        if len(pairs) == count:
            return pairs


def groups_of(pairs: Sequence[Pair]) -> list[tuple[Pair, ...]]:
    return [tuple(pairs[i : i + GROUP]) for i in range(0, len(pairs), GROUP)]


def pair_tokens(pairs: Iterable[Pair]) -> list[int]:
    return [token for key, value in pairs for token in (key_id(key), value_id(value))]


def context_tokens(rng: random.Random, groups: Sequence[Sequence[Pair]], noise: int) -> list[int]:
    """The groups in order with `noise` noise tokens spread at random over the gaps before, between and after them."""
    gaps = [0] * (len(groups) + 1)
    for _ in range(noise):
        gaps[rng.randrange(len(gaps))] += 1
    tokens = [noise_id(rng.randrange(NOISE)) for _ in range(gaps[0])]
    for group, gap in zip(groups, gaps[1:], strict=True):
        tokens += pair_tokens(group)
        tokens += [noise_id(rng.randrange(NOISE)) for _ in range(gap)]
    return tokens


def held_out_prompts(count: int, length: int, *, pairs: int = TRAINING_PAIRS, seed: int = 0) -> list[Prompt]:
    """Prompts no training sequence resembles in its pairs; prompt and answer together are `length` tokens.

    Raises:
        ValueError: the pairs do not fit into `length`.
    """
    noise = length - 2 * pairs - 1 - ANSWER_LENGTH
    if noise < 0 or pairs % GROUP:
        raise ValueError(
            f"length: expected at least {2 * pairs + 1 + ANSWER_LENGTH} tokens and whole groups of {GROUP} pairs, "
            f"got length={length}, pairs={pairs}"
        )
    rng = random.Random(f"held-out {seed} {length} {pairs}")
    prompts = []
    for _ in range(count):
        groups = groups_of(draw_pairs(rng, pairs, held_out=True))
        context = context_tokens(rng, groups, noise)
        run = pair_tokens(rng.choice(groups))
        prompts.append(Prompt((*context, run[0]), tuple(run[1:])))
    return prompts


def training_sequence(
    rng: random.Random, length: int, pairs: int, *, held_out: bool = False
) -> tuple[list[int], list[int]]:
    """One sequence of `length` tokens and, for each position, the next token to predict or -100.

    After the context come queries: a run of one to four pairs that starts anywhere in a group. Every value of a run,
    and every key but its first, is predictable and counts in the loss. A random share of the noise that would fit
    is put into the context, so that the model meets every distance up to `length`.
    """
    groups = groups_of(draw_pairs(rng, pairs, held_out=held_out))
    room = length - 2 * pairs - 2 * GROUP
    tokens = context_tokens(rng, groups, rng.randint(0, max(room, 0)))
    targets = [-100] * len(tokens)
    while len(tokens) < length:
        group = rng.choice(groups)
        start = rng.randrange(len(group))
        stop = rng.randint(start + 1, len(group))
        run = pair_tokens(group[start:stop])
        tokens += run
        targets += [*run[1:], -100]
    return tokens[:length], targets[:length]


def text(tokens: Iterable[int]) -> str:
    """The tokens as a reader sees them."""
    names = vocabulary()
    return " ".join(names[token] for token in tokens)
