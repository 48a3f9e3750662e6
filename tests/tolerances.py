"""The one table of tolerances. Nothing else in the tests holds a number of this kind, and CI uses the same ones.

A result passes where |got - want| <= rtol * |want| + atol * rms(want) everywhere, want being the float64 reference.
`precision` says what a backend multiplies matrices in: "fp32", or "io" for tensor cores fed with bf16/fp16 (TF32 where
io is fp32). A kernel that keeps fp32 throughout must be tested as such: the bounds are an order of magnitude apart.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

Precision = str  # "fp32" | "io"


class Tolerance(NamedTuple):
    rtol: float
    atol: float  # in units of the root mean square of the wanted tensor


# Half an ulp is 2^-9 (bf16), 2^-12 (fp16): the rounding of the result itself, plus the odd flipped rounding of an input
# that was itself a rounded result (v behind SiLU, q and k behind the norm), hence whole ulps here.
ROUNDING = {torch.float32: 2.0**-22, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}

# What the computation adds before that rounding, in units of the result's rms: (fp32 operands, io operands).
COMPUTE: dict[str, dict[torch.dtype, tuple[float, float]]] = {
    # conv over 4 taps, SiLU, norm, gates: no matrix product
    "conv_prologue": {torch.float32: (2e-6, 2e-6), torch.float16: (1e-3, 1e-3), torch.bfloat16: (8e-3, 8e-3)},
    # one sum over a head, in fp32 from exact inputs
    "gated_norm": dict.fromkeys(ROUNDING, (2e-6, 2e-6)),
    # sums over thousands of tokens; strongly correlated keys amplify operand rounding in the io column: rounding to
    # bf16 alone, emulated in float64, moves one state element of such a case by 0.071 of the rms; an H100 gave 0.108
    "prefill": {torch.float32: (1e-4, 1e-2), torch.float16: (1e-3, 2e-2), torch.bfloat16: (5e-3, 1.2e-1)},
    "decode": {torch.float32: (1e-5, 1e-5), torch.float16: (1e-3, 5e-3), torch.bfloat16: (5e-3, 2e-2)},
    "fused_decode": {torch.float32: (2e-5, 2e-5), torch.float16: (3e-3, 6e-3), torch.bfloat16: (2e-2, 3e-2)},
    "verify": {torch.float32: (2e-5, 2e-5), torch.float16: (2e-3, 5e-3), torch.bfloat16: (1e-2, 2e-2)},
    "fused_verify": {torch.float32: (2e-5, 2e-5), torch.float16: (3e-3, 6e-3), torch.bfloat16: (2e-2, 3e-2)},
    # as the fused ops, with the rounding of ring_u to its dtype beside that of k
    "replay_decode": {torch.float32: (2e-5, 2e-5), torch.float16: (3e-3, 6e-3), torch.bfloat16: (2e-2, 3e-2)},
    "replay_verify": {torch.float32: (2e-5, 2e-5), torch.float16: (3e-3, 6e-3), torch.bfloat16: (2e-2, 3e-2)},
    "replay_fold": {torch.float32: (1e-5, 1e-5), torch.float16: (1e-3, 5e-3), torch.bfloat16: (5e-3, 2e-2)},
}

# These make q, k and v themselves.
ROUNDED_INSIDE = ("fused_decode", "fused_verify", "replay_decode", "replay_verify")

# Compiled against eager runs the same ops on the same values: only fusion of the surrounding arithmetic may differ.
COMPILED = {
    torch.float32: Tolerance(1e-5, 1e-5),
    torch.float16: Tolerance(1e-2, 1e-2),
    torch.bfloat16: Tolerance(2e-2, 5e-2),
}


def tolerance(op: str, io_dtype: torch.dtype, result_dtype: torch.dtype, precision: Precision = "fp32") -> Tolerance:
    """The bound for a result of `op` that is stored as `result_dtype` (out, a pool, checkpoints or gates)."""
    compute = COMPUTE[op][io_dtype][0 if precision == "fp32" else 1]
    # With io operands each term of a product carries its operands' rounding, and an element that one term makes (a
    # state that has forgotten all but the newest token, say) has that relative error however large it is.
    # So it has where q, k and v are rounded inside the op: beside a tie the odd one falls the other way.
    exact = precision == "fp32" and op not in ROUNDED_INSIDE
    rounding = ROUNDING[result_dtype] if exact else max(ROUNDING[result_dtype], ROUNDING[io_dtype])
    return Tolerance(rtol=max(rounding, 1e-5), atol=compute + ROUNDING[result_dtype] / 4)
