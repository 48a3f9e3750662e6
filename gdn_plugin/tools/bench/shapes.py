"""Named layer shapes and batch mixes, and what each op must at least move and compute for them."""

from __future__ import annotations

from dataclasses import dataclass

from gdn_plugin.ops.cases import WIDTH, Heads
from gdn_plugin.registry import ring_slots

CHUNK = 64


# Heads of one rank of the models' published config.json files; -tpN is one rank of N.
SHAPES = {
    name: Heads(k_heads, v_heads, 128, 128)
    for name, k_heads, v_heads in (
        ("qwen3-next", 16, 32),
        ("qwen3-next-tp2", 8, 16),
        ("qwen3-next-tp4", 4, 8),
        ("qwen3-next-tp8", 2, 4),
        ("qwen3.5-0.8b", 16, 16),
        ("qwen3.5-4b", 16, 32),
        ("qwen3.5-27b", 16, 48),
        ("qwen3.5-397b", 16, 64),
        ("qwen3.5-397b-tp8", 2, 8),
        ("tiny", 2, 4),
    )
}
MOST_SEQUENCES, MOST_TOKENS = 1 << 16, 1 << 24
DECODE_OPS = ("decode", "fused_decode", "replay_decode")


def parse_shape(text: str) -> Heads:
    """A name of `SHAPES`, or "Hk,Hv,K,V" ("4,8,64,128").

    Raises:
        ValueError: neither.
    """
    if text in SHAPES:
        return SHAPES[text]
    parts = text.split(",")
    if len(parts) != 4 or not all(part.strip().isdecimal() and 0 < int(part) < 1 << 16 for part in parts):
        raise ValueError(f"shape {text!r} is not known; choose one of {', '.join(SHAPES)} or give Hk,Hv,K,V")
    heads = Heads(*map(int, parts))
    if heads.v_heads % heads.k_heads:
        raise ValueError(f"shape {text!r}: value heads must be a multiple of key heads")
    return heads


def parse_mix(text: str) -> tuple[int, ...]:
    """Lengths of one batch: "8x1024" (8 sequences of 1024 tokens), "1+64+513", or "ragged" (15 odd lengths).

    Raises:
        ValueError: none of these, a number that is not positive, or a batch that no machine holds.
    """
    if text == "ragged":
        return (1, 17, 63, 64, 65, 129, 200, 333, 511, 512, 777, 1024, 1500, 2049, 947)
    lengths: list[int] = []
    total = 0
    for part in text.split("+"):
        several, cross, length = part.rpartition("x")
        numbers = [several, length] if cross else [length]
        if not all(number.isdecimal() and int(number) > 0 for number in numbers):
            raise ValueError(f"batch {text!r} is not a mix such as 8x1024, 1+64+513 or ragged")
        many = int(several or 1)
        total += many * int(length)
        if len(lengths) + many > MOST_SEQUENCES or total > MOST_TOKENS:
            raise ValueError(f"batch {text!r} has more than {MOST_SEQUENCES} sequences or {MOST_TOKENS} tokens")
        lengths += [int(length)] * many
    return tuple(lengths)


def parse_batch(op: str, text: str) -> tuple[int, ...]:
    """`parse_mix`, where "32" means 32 sequences of one token to an op that takes one token a sequence."""
    counted = op in DECODE_OPS and text.isdecimal() and int(text) > 0
    lens = parse_mix(f"{text}x1" if counted else text)
    if op in DECODE_OPS and max(lens) > 1:
        raise ValueError(f"batch {text!r}: {op} takes one token a sequence, so a number of sequences such as 32")
    return lens


@dataclass(frozen=True, slots=True)
class Cost:
    """Fewest bytes through device memory and fewest floating-point operations of one call."""

    bytes: int
    flops: int

    def floor_us(self, bytes_per_s: float, flops_per_s: float) -> float:
        return max(self.bytes / bytes_per_s, self.flops / flops_per_s) * 1e6


def cost(op: str, heads: Heads, lens: tuple[int, ...], io: int = 2, state: int = 4) -> Cost:
    """What one call must move and do.

    Args:
        io, state: bytes of an element of tokens and of the state pool.
    """
    tokens, batch = sum(lens), len(lens)
    hk, hv, K, V = heads
    row = hv * V * K
    conv_rows = 2 * batch * heads.conv_dim * (WIDTH - 1) * io
    if op == "prefill":
        # q, k, v, g, beta read and out written once, each state row read and written once; the chunked form's products.
        # Per token and value head: three products with the state (2 K V each: what the state predicts for the keys,
        # what the queries read, what the keys write) and, at half price because they are triangular, q k^T and k k^T
        # (shared by the value heads of one key head), T k, T v and the attention product (chunk * V each).
        moved = tokens * (2 * hk * K * io + 2 * hv * V * io + 8 * hv) + 2 * batch * row * state
        per_value_head, per_key_head = 6 * K * V + CHUNK * (K + 2 * V), 2 * CHUNK * K
        return Cost(moved, tokens * (hv * per_value_head + hk * per_key_head))
    if op == "conv_prologue":
        # The projection slice and the raw gates in; q, k, v, g, beta out; conv_state rows in and out.
        moved = tokens * (2 * heads.conv_dim * io + hv * (2 * io + 8)) + conv_rows
        return Cost(moved, tokens * (2 * WIDTH + 8) * heads.conv_dim)
    if op == "gated_norm":
        return Cost(3 * tokens * hv * V * io, 12 * tokens * hv * V)
    if op in ("replay_decode", "replay_verify"):
        # A state row in, and out once the ring is full; its updates in, half a ring of them, and this step's out.
        kept, update = max(lens), hk * K * io + hv * V * state + 4 * hv
        slots = ring_slots(kept)
        states = batch * row * state * (slots + kept) // slots
        rings = batch * (slots // 2 + kept) * update
        around = batch * kept * (heads.conv_dim + 2 * hv * V) * io + conv_rows
        done = 4 * row + slots // 2 * 4 * (hk * K + hv * V) + 2 * WIDTH * heads.conv_dim
        return Cost(states + rings + around, batch * kept * done)
    # One state row in, and one out a token; q, k, v in and out written. Verify keeps a row a token.
    kept = max(lens) if op in ("verify", "fused_verify") else 1
    moved = batch * row * state * (1 + kept) + batch * kept * (heads.conv_dim + hv * V) * io
    done = batch * kept * row * 7
    if op in ("fused_decode", "fused_verify"):  # with conv_state in and out and z in
        conv_rows += batch * heads.conv_dim * (kept - 1) * io  # as many columns out as W-2 and the tokens
        return Cost(moved + conv_rows + batch * kept * hv * V * io, done + batch * kept * 2 * WIDTH * heads.conv_dim)
    return Cost(moved, done)
