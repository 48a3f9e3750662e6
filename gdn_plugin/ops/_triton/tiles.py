"""Launch configurations of conv_prologue, decode, fused_decode and verify: fixed tables by (sm, K, V, dtype).

An autotuner would stall the first request and run out of memory once the KV cache is allocated. Two limits bound the
tables: a program's tile of the fp32 state has to stay in registers (at most 64 values a thread), and at small batches
there have to be at least as many programs as a large GPU has multiprocessors (132 on H100, 148 on B200). Keys are those
of configs.lookup; dtype is the state's for the three that move states, and the io dtype for conv_prologue.

Source: a sweep on one H100 80GB (torch 2.11, triton 3.6, 2026-11-23) at Hk 16, Hv 32, K = V = 128, bf16 io; times are
beside the rows. Other dims and other GPUs take the same rows and have not been timed.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from gdn_plugin.ops._triton.configs import Key, lookup

# Fewer (sequence, value head) pairs than this are "few": heads are then split finer, so that all multiprocessors work.
FEW_HEADS = 256


@dataclass(frozen=True, slots=True)
class TileConfig:
    """block_v: rows of a head's [V, K] state a program owns; num_warps and num_stages as Triton means them."""

    block_v: int
    num_warps: int
    num_stages: int = 1


@dataclass(frozen=True, slots=True)
class Tile:
    """elements: state values a program owns; block_v follows from them and the dims."""

    elements: int
    num_warps: int

    def config(self, K: int, V: int) -> TileConfig:
        return TileConfig(max(4, min(V, self.elements // K)), self.num_warps)


@dataclass(frozen=True, slots=True)
class PrologueConfig:
    """A program takes runs * run_length tokens of one head: `runs` rows of a tile, each walking `run_length` tokens."""

    runs: int
    run_length: int
    num_warps: int

    @property
    def block_t(self) -> int:
        return self.runs * self.run_length


Tiles = Mapping[Key, tuple[Tile, Tile]]

# (for few heads, for many).
# One warp a program: no reduction then crosses warps, so that there is no barrier at all, and 32 programs of 4 KiB
# (fp32 state, K = 128) on a multiprocessor keep 128 KiB in flight. H100, fp32 state, 1024 elements (block_v 8): 97 us
# at B = 64, 376 at B = 256; every other tile is within 1 % there, and 512 give 3.7 us in place of 4.0 at B = 1.
DECODE: Tiles = {(0, 0, 0, ""): (Tile(1024, 1), Tile(1024, 1))}
VERIFY: Tiles = {(0, 0, 0, ""): (Tile(1024, 1), Tile(1024, 1))}
# Every program repeats the conv of q and k, so tiles are larger. H100, norm inside, elements/warps, us at Hk 16, Hv 32:
#     fp32 state  B = 1   B = 8  B = 64  B = 256      bf16 state  B = 1  B = 64
#     2048/2        6.1    18.3     111      427                    4.8      74
#     2048/4        5.1    18.5     123      482                    4.8      94
#     4096/2        6.7    17.0     105      398                    4.8      63
#     8192/4        6.3    19.1     108      416                    4.6      68
# (decode, which has neither conv nor norm: 4.0, 14.2, 97, 376; 3.1, 53). Programs that do both value heads of a key
# head, so that their q and k are convolved once, took 124 at B = 64 where one head each took 120.
FUSED_DECODE: Tiles = {(0, 0, 0, ""): (Tile(2048, 4), Tile(4096, 2))}
# (for short sequences, for long ones). H100, Hk 16, Hv 32: (4, 8, 4) 130 us at 1x8192, 131 at 8x1024, 37 at 1x2048,
# where (8, 8, 4) took 158 at 8x1024; (4, 4, 2) 22 us at 64x4.
PROLOGUE: Mapping[Key, tuple[PrologueConfig, PrologueConfig]] = {
    (0, 0, 0, ""): (
        PrologueConfig(runs=4, run_length=4, num_warps=2),
        PrologueConfig(runs=4, run_length=8, num_warps=4),
    )
}


@functools.cache
def _tiles(table: str, sm: int, dtype: torch.dtype, K: int, V: int) -> tuple[TileConfig, TileConfig]:
    tables = {"decode": DECODE, "verify": VERIFY, "fused_decode": FUSED_DECODE}
    few, many = lookup(tables[table], sm, K, V, str(dtype).removeprefix("torch."))
    return few.config(K, V), many.config(K, V)


def decode_configs(sm: int, state_dtype: torch.dtype, K: int, V: int) -> tuple[TileConfig, TileConfig]:
    """(for few heads, for many heads); every configuration that `decode_config` can return."""
    return _tiles("decode", sm, state_dtype, K, V)


def decode_config(sm: int, state_dtype: torch.dtype, num_heads: int, K: int, V: int) -> TileConfig:
    """num_heads: sequences * value heads of the call."""
    return decode_configs(sm, state_dtype, K, V)[num_heads >= FEW_HEADS]


def verify_configs(sm: int, state_dtype: torch.dtype, K: int, V: int) -> tuple[TileConfig, TileConfig]:
    """As decode_configs, for verify."""
    return _tiles("verify", sm, state_dtype, K, V)


def verify_config(sm: int, state_dtype: torch.dtype, num_heads: int, K: int, V: int) -> TileConfig:
    """num_heads: sequences * value heads of the call."""
    return verify_configs(sm, state_dtype, K, V)[num_heads >= FEW_HEADS]


def fused_decode_configs(
    sm: int, state_dtype: torch.dtype, K: int, V: int
) -> tuple[TileConfig, TileConfig]:  # fmt: skip
    """As decode_configs, for fused_decode."""
    return _tiles("fused_decode", sm, state_dtype, K, V)


def fused_decode_config(
    sm: int, state_dtype: torch.dtype, num_heads: int, K: int, V: int
) -> TileConfig:  # fmt: skip
    """num_heads: sequences * value heads of the call."""
    return fused_decode_configs(sm, state_dtype, K, V)[num_heads >= FEW_HEADS]


@functools.cache
def prologue_configs(sm: int, dtype: torch.dtype, K: int, V: int) -> tuple[PrologueConfig, PrologueConfig]:
    """(for short sequences, for long ones); every configuration that `prologue_config` can return."""
    return lookup(PROLOGUE, sm, K, V, str(dtype).removeprefix("torch."))


def prologue_config(
    sm: int, dtype: torch.dtype, K: int, V: int, num_tokens: int, num_sequences: int
) -> PrologueConfig:  # fmt: skip
    """By the mean length, since lengths are on the device: short blocks where a long one would be mostly empty."""
    short, long = prologue_configs(sm, dtype, K, V)
    return short if num_tokens < long.block_t * max(num_sequences, 1) // 2 else long
