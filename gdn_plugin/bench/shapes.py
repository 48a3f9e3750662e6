"""Named layer shapes and batch mixes, and what each op must at least move and compute for them."""

from __future__ import annotations

from dataclasses import dataclass

CHUNK = 64


@dataclass(frozen=True, slots=True)
class Shape:
    """Heads of one GDN layer on one rank: key heads, value heads, key dim, value dim, conv width."""

    name: str
    num_k_heads: int
    num_v_heads: int
    head_k_dim: int = 128
    head_v_dim: int = 128
    conv_width: int = 4

    @property
    def conv_dim(self) -> int:
        return 2 * self.num_k_heads * self.head_k_dim + self.num_v_heads * self.head_v_dim


# Key and value heads of the models' published config.json files; -tpN is one rank of N.
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen3-next", 16, 32),
        Shape("qwen3-next-tp4", 4, 8),
        Shape("qwen3-next-tp8", 2, 4),
        Shape("qwen3.5-0.8b", 16, 16),
        Shape("qwen3.5-4b", 16, 32),
        Shape("qwen3.5-27b", 16, 48),
        Shape("qwen3.5-397b", 16, 64),
        Shape("qwen3.5-397b-tp8", 2, 8),
        Shape("tiny", 2, 4),
    )
}


def parse_shape(text: str) -> Shape:
    """A name of `SHAPES`, or "Hk,Hv,K,V" ("4,8,64,128")."""
    if text in SHAPES:
        return SHAPES[text]
    parts = text.split(",")
    if len(parts) == 4 and all(part.strip().isdigit() for part in parts):
        return Shape(text, *(int(part) for part in parts))
    raise ValueError(f"shape {text!r} is not known; choose one of {', '.join(SHAPES)} or give Hk,Hv,K,V")


def parse_mix(text: str) -> tuple[int, ...]:
    """Lengths of one batch: "8x1024" (8 sequences of 1024 tokens), "1+64+513", or "ragged" (15 odd lengths)."""
    if text == "ragged":
        return (1, 17, 63, 64, 65, 129, 200, 333, 511, 512, 777, 1024, 1500, 2049, 947)
    lengths: list[int] = []
    for part in text.split("+"):
        count, _, length = part.rpartition("x")
        if not length.isdigit() or (count and not count.isdigit()):
            raise ValueError(f"batch {text!r} is not a mix such as 8x1024, 1+64+513 or ragged")
        lengths += [int(length)] * int(count or 1)
    return tuple(lengths)


@dataclass(frozen=True, slots=True)
class Cost:
    """Fewest bytes through device memory and fewest floating-point operations of one call."""

    bytes: int
    flops: int

    def floor_us(self, bytes_per_s: float, flops_per_s: float) -> float:
        return max(self.bytes / bytes_per_s, self.flops / flops_per_s) * 1e6


def prefill_cost(s: Shape, lens: tuple[int, ...], io: int = 2, state: int = 4) -> Cost:
    """q, k, v, g, beta read and out written once, each state row read and written once; the chunked form's products.

    Per token and value head: three products with the state (2 K V each: what the state predicts for the keys, what the
    queries read, what the keys write) and, at half price because they are triangular, q k^T and k k^T (shared by the
    value heads of one key head), T k, T v and the attention product (chunk * V each).
    """
    tokens = sum(lens)
    moved = tokens * (2 * s.num_k_heads * s.head_k_dim * io + 2 * s.num_v_heads * s.head_v_dim * io + 8 * s.num_v_heads)
    moved += 2 * len(lens) * s.num_v_heads * s.head_v_dim * s.head_k_dim * state
    per_value_head = 6 * s.head_k_dim * s.head_v_dim + CHUNK * (s.head_k_dim + 2 * s.head_v_dim)
    per_key_head = 2 * CHUNK * s.head_k_dim
    return Cost(moved, tokens * (s.num_v_heads * per_value_head + s.num_k_heads * per_key_head))


def prologue_cost(s: Shape, lens: tuple[int, ...], io: int = 2) -> Cost:
    """The projection slice and the raw gates in; q, k, v, g, beta out; conv_state rows in and out."""
    tokens = sum(lens)
    moved = tokens * (2 * s.conv_dim * io + s.num_v_heads * (2 * io + 8))
    moved += 2 * len(lens) * s.conv_dim * (s.conv_width - 1) * io
    return Cost(moved, tokens * (2 * s.conv_width + 8) * s.conv_dim)


def decode_cost(s: Shape, batch: int, tokens: int = 1, io: int = 2, state: int = 4) -> Cost:
    """One state row in, and one out a token; q, k, v in and out written. With tokens > 1: verify's per-token rows."""
    row = s.num_v_heads * s.head_v_dim * s.head_k_dim
    moved = batch * row * state * (1 + tokens)
    moved += batch * tokens * (s.conv_dim + s.num_v_heads * s.head_v_dim) * io
    return Cost(moved, batch * tokens * row * 7)


def fused_decode_cost(s: Shape, batch: int, io: int = 2, state: int = 4) -> Cost:
    """decode, with conv_state in and out, the projection slice in, z in."""
    base = decode_cost(s, batch, io=io, state=state)
    extra = batch * (2 * s.conv_dim * (s.conv_width - 1) + s.num_v_heads * s.head_v_dim) * io
    return Cost(base.bytes + extra, base.flops + batch * 2 * s.conv_width * s.conv_dim)
