"""gated_norm: RMSNorm times a gate, of any strided [T, Hv, V] and a z whose heads may be interleaved, in one launch.

A program takes ROWS of the T * Hv rows, V elements each. It reads x and z once and writes out once, 3 * T * Hv * V
elements of the io dtype and nothing else of any size: 403 MB at T = 16384, Hv = 32, V = 128 in bf16. No program reads
what another writes, and each has read its rows before it writes them, so `out` may be x.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from gdn_plugin.backends.triton.configs import Table
from gdn_plugin.backends.triton.gates import rms_norm_gated
from gdn_plugin.backends.triton.heads import value_strides
from gdn_plugin.backends.triton.launch import compile_count, counted, device_sm, launch
from gdn_plugin.backends.triton.variants import KernelVariant, either, variants_of
from gdn_plugin.registry import BackendOp, Platform, Problem


@counted
@triton.jit(do_not_specialize=["num_rows", "ratio", "is_sigmoid"])
def gated_norm_kernel(
    p_x, p_z, p_weight, p_out,
    stride_x_t, stride_x_h, stride_z_t, stride_z_k, stride_z_h, stride_out_t, stride_out_h,
    eps, num_rows, ratio, is_sigmoid,
    H: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    o_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i_t = (o_r // H).to(tl.int64)[:, None]
    i_h = (o_r % H).to(tl.int64)[:, None]
    i_hk = (o_r % H // ratio).to(tl.int64)[:, None]
    o_v = tl.arange(0, V)[None, :]
    mask = (o_r < num_rows)[:, None]
    b_x = tl.load(p_x + i_t * stride_x_t + i_h * stride_x_h + o_v, mask=mask, other=0.0).to(tl.float32)
    p_gate = p_z + i_t * stride_z_t + i_hk * stride_z_k + (i_h - i_hk * ratio) * stride_z_h + o_v
    b_z = tl.load(p_gate, mask=mask, other=0.0).to(tl.float32)
    b_weight = tl.load(p_weight + tl.zeros([ROWS, 1], tl.int32) + o_v).to(tl.float32)  # as x lies: needs no barrier
    b_y = rms_norm_gated(b_x, b_z, b_weight, V, eps, is_sigmoid)
    tl.store(p_out + i_t * stride_out_t + i_h * stride_out_h + o_v, b_y.to(p_out.dtype.element_ty), mask=mask)


@dataclass(frozen=True, slots=True)
class NormConfig:
    """A program takes `elements // V` rows."""

    elements: int
    num_warps: int


# By the io dtype. H200, torch 2.11, triton 3.6, 2026-11-29, Hv 32, V 128, bf16, z a slice, in place, us at 16384
# tokens, elements/warps: 1024/4 98.2, 512/2 98.1, 2048/4 99.7, 4096/8 99.3, 8192/8 108; a copy of as many 96.6. It
# was 108 with 39 instructions an element; these runs had 27, with `ratio` a constexpr, where 30 are now (sm_90, triton
# 3.9): 94.1 on an H200 at whose copy bandwidth it is 94.0. A thread of 1024/4 loads 16 bytes of x and of z, and a row
# of 128 stays within a warp. Others untimed.
CONFIGS = Table({(0, 0, 0, ""): NormConfig(elements=1024, num_warps=4)})


def run(
    *, x: Tensor, z: Tensor, weight: Tensor, eps: float, gate: str, out: Tensor, config: NormConfig | None = None
) -> None:  # fmt: skip
    """out = x * rsqrt(mean(x^2) + eps) * weight * gate(z), in fp32 and rounded once; `out` may be x.

    Args:
        x, z, out: [T, Hv, V] of one io dtype, V a power of two, last stride 1, others any; z also [T, Hk, Hv/Hk, V].
        weight: [V], io dtype or fp32, contiguous.
        gate: "silu" or "sigmoid".
        config: for a tuning script; else the table's.
    """
    num_tokens, num_heads, V = x.shape
    num_k_heads = z.shape[1] if z.dim() == 4 else 1
    config = config or CONFIGS.lookup(device_sm(x.device), V, V, x.dtype)
    rows = max(config.elements // V, 1)
    launch(
        gated_norm_kernel, (triton.cdiv(num_tokens * num_heads, rows),),
        p_x=x, p_z=z, p_weight=weight, p_out=out,
        **value_strides("z", z, num_k_heads, num_heads),
        stride_x_t=x.stride(0), stride_x_h=x.stride(1), stride_out_t=out.stride(0), stride_out_h=out.stride(1),
        eps=eps, num_rows=num_tokens * num_heads, ratio=num_heads // num_k_heads,
        is_sigmoid=int(gate == "sigmoid"),
        H=num_heads, V=V, ROWS=rows, num_warps=config.num_warps, num_stages=1,
    )  # fmt: skip


def calls(arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The weight in the io dtype and in fp32."""
    for weight in either(arguments["weight"]):
        yield arguments | {"weight": weight}


def variants(platform: Platform, problem: Problem, pool: Tensor | None = None) -> list[KernelVariant]:
    """See BackendOp.variants and `variants_of`. No state pool comes to this op."""
    return variants_of(run, calls, platform, problem, pool)


GATED_NORM = BackendOp(run=run, variants=variants, compile_count=compile_count, interleaved=True)
