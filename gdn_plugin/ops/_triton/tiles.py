"""Launch configurations of conv_prologue, decode, fused_decode and verify: small fixed tables, no autotuner.

An autotuner would stall the first request and run out of memory once the KV cache is allocated. Two limits bound the
tables: a program's tile of the fp32 state has to stay in registers (at most 64 values a thread), and at small batches
there have to be at least as many programs as a large GPU has multiprocessors (132 on H100, 148 on B200).

Source: a sweep on one H100 80GB (torch 2.11, triton 3.6, 2026-11-23) at Hk 16, Hv 32, K = V = 128, bf16 io; times are
in the functions' docstrings. Other dims and other GPUs take the same tables and have not been timed.
"""

from __future__ import annotations

from dataclasses import dataclass

# Fewer (sequence, value head) pairs than this are "few": heads are then split finer, so that all multiprocessors work.
FEW_HEADS = 256


@dataclass(frozen=True, slots=True)
class TileConfig:
    """block_v: rows of a head's [V, K] state a program owns; num_warps and num_stages as Triton means them."""

    block_v: int
    num_warps: int
    num_stages: int = 1


@dataclass(frozen=True, slots=True)
class PrologueConfig:
    """A program takes runs * run_length tokens of one head: `runs` rows of a tile, each walking `run_length` tokens."""

    runs: int
    run_length: int
    num_warps: int

    @property
    def block_t(self) -> int:
        return self.runs * self.run_length


def _tile(K: int, V: int, elements: int, num_warps: int) -> TileConfig:
    return TileConfig(block_v=max(4, min(V, elements // K)), num_warps=num_warps)


def decode_configs(K: int, V: int) -> tuple[TileConfig, TileConfig]:
    """(for few heads, for many heads); every configuration that `decode_config` can return.

    One warp a program: no reduction then crosses warps, so that there is no barrier at all, and 32 programs of 4 KiB
    (fp32 state, K = 128) on a multiprocessor keep 128 KiB in flight. H100, fp32 state, block_v 8: 97 us at B = 64, 376
    at B = 256; every other tile is within 1 % there, and block_v 4 gives 3.7 us in place of 4.0 at B = 1.
    """
    return _tile(K, V, 1024, 1), _tile(K, V, 1024, 1)


def decode_config(num_heads: int, K: int, V: int) -> TileConfig:
    """num_heads: sequences * value heads of the call."""
    few, many = decode_configs(K, V)
    return few if num_heads < FEW_HEADS else many


def verify_configs(K: int, V: int) -> tuple[TileConfig, TileConfig]:
    """As decode_configs, for verify."""
    return _tile(K, V, 1024, 1), _tile(K, V, 1024, 1)


def verify_config(num_heads: int, K: int, V: int) -> TileConfig:
    """num_heads: sequences * value heads of the call."""
    few, many = verify_configs(K, V)
    return few if num_heads < FEW_HEADS else many


def fused_decode_configs(K: int, V: int) -> tuple[TileConfig, TileConfig]:
    """As decode_configs, for fused_decode, whose every program repeats the conv of q and k.

    H100, fp32 state, norm inside: (block_v 16, 2 warps) 5.8 us at B = 1, 120 at B = 64, 464 at B = 256; (64, 8) 218 at
    B = 64. With a bf16 state (64, 4) is 8 % faster than (16, 2) at B = 64 and 256, and slower at B = 1.
    """
    return _tile(K, V, 2048, 2), _tile(K, V, 2048, 2)


def fused_decode_config(num_heads: int, K: int, V: int) -> TileConfig:
    """num_heads: sequences * value heads of the call."""
    few, many = fused_decode_configs(K, V)
    return few if num_heads < FEW_HEADS else many


def prologue_configs() -> tuple[PrologueConfig, PrologueConfig]:
    """(for short sequences, for long ones); every configuration that `prologue_config` can return.

    H100, Hk 16, Hv 32: (4, 8, 4) 130 us at 1x8192, 131 at 8x1024, 37 at 1x2048, where (8, 8, 4) took 158 at 8x1024;
    (4, 4, 2) 22 us at 64x4.
    """
    return PrologueConfig(runs=4, run_length=4, num_warps=2), PrologueConfig(runs=4, run_length=8, num_warps=4)


def prologue_config(num_tokens: int, num_sequences: int) -> PrologueConfig:
    """By the mean length, since lengths are on the device: short blocks where a long one would be mostly empty."""
    short, long = prologue_configs()
    return short if num_tokens < long.block_t * max(num_sequences, 1) // 2 else long
