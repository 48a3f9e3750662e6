"""Launch configurations of the Triton prefill: data, looked up by (sm, K, V, dtype), never tuned at run time.

An autotuner would stall serving, and it runs out of memory once the KV cache is allocated. In a key `sm` 0, K 0, V 0
and dtype "" stand for "any"; see `lookup` for which row wins.
Source of the numbers: registers, spills and shared memory read from `gdn-plugin compile` for sm_80 to sm_120, and
reasoning about occupancy; the state launches of sm_90 are timed (H100 80GB, torch 2.11, triton 3.6, 2026-11-23, bf16,
K = V = 128, us of the state launches, block_v/warps/stages):

    heads  sequences  whole 64/4/2  split 32/4/3  cut 32/4/3, 128 programs
    16x32  8x1024              134           211  (whole 128/8/2: 136)
    16x32  1x8192              332           283  331 (64/4/2, 264 programs: 264 with one launch more)
    16x32  1x2048               90            77  not cut (64/4/2, 264 programs: 90)
    2x4    8x1024               41            36  not cut
    2x4    1x8192              277           246  88 (32/4/2: 90)
    2x4    1x2048               64            55  36

The solve launch at 16x32, 8x1024: 125 us with 4 warps, 264 with 8, 149 with two heads a program.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

Key = tuple[int, int, int, str]
Row = TypeVar("Row")


@dataclass(frozen=True)
class PrefillConfig:
    """How one prefill is launched.

    Args:
        solve_warps: warps of a solve program.
        solve_block_k: columns of q and k that a solve program multiplies at a time (at most K).
        solve_heads: value heads of one key head that a solve program does (halved until it divides Hv / Hk).
        solve_stages: pipelining depth of the solve kernel.
        solve_registers: a bound on registers a thread, for ptxas; None leaves it to its own, which spills on sm_100.
        solve_precision: of the dots that build the inverse, for bf16 io ("tf32" or "tf32x3"; fp16 and fp32 io always
            take "tf32x3"). M is rounded to bf16 afterwards: TF32 raised the rms error of the new values by 0 % (random
            keys) to 10 % (keys equal but for 0.1 % noise, no decay; 23 % where operands are rounded, not truncated),
            measured on the CPU. On an H100 8x1024 at 16x32 heads takes 125 us with "tf32" and 185 with "tf32x3".
        block_v: rows of the state that a state program holds.
        state_block_k: columns of the state a dot takes at a time (at most K, and K where sequences are cut).
        state_warps: its warps.
        state_stages: its pipelining depth (chunks in flight).
        full_programs: with fewer state programs than this, sequences are cut into segments or, where they are not,
            V is split finer, both with the `small_` values; 0 never splits for that.
        segment_programs: where half as many programs of small_block_v are more than there are, sequences are cut
            into segments until there are about as many (one launch more); 0 never cuts. K = 256 is never cut: the
            transition does not fit in shared memory.
        segment_min_chunks: shortest segment worth its overhead.
        small_block_v, small_warps, small_stages: block_v, state_warps and state_stages of cut or finer split launches.
        cut_stages: pipelining depth where sequences are cut; the transition takes registers that depth 3 would spill.
    """

    solve_warps: int = 4
    solve_block_k: int = 256
    solve_heads: int = 1
    solve_stages: int = 1
    solve_registers: int | None = None
    solve_precision: str = "tf32"
    block_v: int = 64
    state_block_k: int = 256
    state_warps: int = 4
    state_stages: int = 2
    full_programs: int = 0
    segment_programs: int = 0
    segment_min_chunks: int = 4
    small_block_v: int = 64
    small_warps: int = 4
    small_stages: int = 2
    cut_stages: int = 2


# wgmma wants 64 rows a warpgroup; two of them a program (64/4/2 is as fast, and spills 8 bytes with a bf16 state). With
# fewer programs than half the multiprocessors, smaller ones and a chunk more in flight.
_WGMMA = PrefillConfig(
    block_v=128, state_warps=8, small_block_v=32, small_stages=3, full_programs=66, segment_programs=128
)
# Three TF32 products a dot: slow, and registers are what is short. For checking numbers, not for serving.
_FP32 = PrefillConfig(solve_warps=8, solve_block_k=16, block_v=16, state_block_k=32, state_warps=8, state_stages=1)

PREFILL: Mapping[Key, PrefillConfig] = {
    # mma.sync: more rows than 32 of 128 columns spill; so do q and k in whole rows beside their products.
    (0, 0, 0, ""): PrefillConfig(solve_block_k=64, block_v=32, small_block_v=32, segment_programs=256),
    (0, 64, 0, ""): PrefillConfig(solve_block_k=32, block_v=32, small_block_v=32, segment_programs=256),
    (0, 256, 0, ""): PrefillConfig(solve_block_k=64, block_v=16, state_warps=8),
    (90, 0, 0, ""): _WGMMA,
    # Cut sequences in smaller programs: in fp16 those of 32 rows spill 16 bytes where bf16's do not.
    (90, 128, 0, "float16"): replace(_WGMMA, small_block_v=16),
    (90, 256, 0, ""): PrefillConfig(solve_block_k=64, block_v=32, state_warps=8),
    # tcgen05: the same rows over 8 warps, which is what keeps 128 columns from spilling.
    (100, 0, 0, ""): PrefillConfig(solve_registers=255, state_warps=8, small_warps=8, segment_programs=296),
    (100, 256, 0, ""): PrefillConfig(solve_block_k=64, block_v=32, state_warps=8),
    (0, 0, 0, "float32"): _FP32,
    (90, 128, 0, "float32"): replace(_FP32, state_block_k=64),
}


def lookup(table: Mapping[Key, Row], sm: int, head_k_dim: int, head_v_dim: int, dtype: str) -> Row:
    """The row of `table` for a device and problem; dtype is "bfloat16", "float16" or "float32".

    A row that names the dtype beats one that does not, then one for this sm beats one for its family (sm_103: 100),
    which beats any sm, then one that names K and V beats one that names K, and that one that names neither.

    Raises:
        KeyError: no row fits (every table has an any-row, so this is a defect of the table).
    """
    for wanted_dtype in (dtype, ""):
        for wanted_sm in (sm, sm // 10 * 10, 0):
            for dims in ((head_k_dim, head_v_dim), (head_k_dim, 0), (0, head_v_dim), (0, 0)):
                row = table.get((wanted_sm, *dims, wanted_dtype))
                if row is not None:
                    return row
    raise KeyError(f"no configuration row for sm={sm}, K={head_k_dim}, V={head_v_dim}, dtype={dtype}")
