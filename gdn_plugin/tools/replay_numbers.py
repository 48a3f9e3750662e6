"""How far replay's outputs are from the float64 recurrence, beside those of a state that is written at every token.

    python -m gdn_plugin.tools.replay_numbers [--steps 4096]

prints the table of docs/replay-numbers.md. Every way gets the same fp32 tokens, so that the error is that of what is
kept: the state's dtype, and the dtype of ring_u. Backend `torch`, on the CPU.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gdn_plugin import ops
from gdn_plugin.ops.cases import WIDTH, Heads
from gdn_plugin.ops.dispatch import backend_op
from gdn_plugin.registry import USUAL_SLOTS

HEADS = Heads(2, 4, 64, 64)
LAST = 512  # tokens that the error is taken over
GATES = ("mild", "strong", "correlated", "no decay")


class Way(NamedTuple):
    """What is kept: the state's dtype and, of replay, that of ring_u."""

    name: str
    state: torch.dtype
    u: torch.dtype | None = None


_FP32, _BF16 = torch.float32, torch.bfloat16
WAYS = (
    Way("written, fp32", _FP32),
    Way("written, bf16", _BF16),
    Way("replay, fp32, u fp32", _FP32, _FP32),
    Way("replay, fp32, u bf16", _FP32, _BF16),
    Way("replay, bf16, u bf16", _BF16, _BF16),
    Way("replay, bf16, u fp32", _BF16, _FP32),
)


class Stream:
    """Tokens of one sequence and the layer's parameters.

    Args:
        gates: "mild" g > -0.03; "strong" g from 0 to -3; "correlated" mild, keys near one direction; "no decay" g = 0.
    """

    def __init__(self, gates: str, steps: int, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=_FP32)

        hv, dim = HEADS.v_heads, HEADS.conv_dim
        self.mixed = normal(steps, dim)
        if gates == "correlated":
            keys = slice(HEADS.k_heads * HEADS.k_dim, 2 * HEADS.k_heads * HEADS.k_dim)
            self.mixed[:, keys] = 0.3 * self.mixed[:, keys] + normal(dim)[keys]
        self.a, self.b = normal(steps, hv), normal(steps, hv)
        low = {"strong": 0.0, "no decay": -200.0}.get(gates, -5.0)
        self.parameters: dict[str, Any] = {
            "conv_weight": 0.5 * normal(dim, WIDTH), "conv_bias": None, "A_log": torch.full((hv,), low, dtype=_FP32),
            "dt_bias": torch.zeros(hv, dtype=_FP32),
        }  # fmt: skip

    def step(self, t: int) -> dict[str, Any]:
        own = slice(t, t + 1)
        return {"mixed_qkv": self.mixed[own], "a": self.a[own], "b": self.b[own], **self.parameters, **_SIZES}


_SIZES = {"num_k_heads": HEADS.k_heads, "head_k_dim": HEADS.k_dim, "head_v_dim": HEADS.v_dim}


def _pools(state: torch.dtype, conv: torch.dtype) -> dict[str, Tensor]:
    return {
        "conv_state": torch.zeros(1, HEADS.conv_dim, WIDTH - 1, dtype=conv),
        "state": torch.zeros(1, *HEADS.state, dtype=state),
        "state_indices": torch.zeros(1, dtype=torch.int32),
    }


def _truth(stream: Stream, steps: int) -> Tensor:
    """[steps, Hv, V] float64: the plain recurrence."""
    run = backend_op("fused_decode", "reference").run
    pools = _pools(torch.float64, torch.float64)
    out = torch.empty(steps, HEADS.v_heads, HEADS.v_dim, dtype=torch.float64)
    for t in range(steps):
        run(
            **stream.step(t), **pools, scale=HEADS.k_dim**-0.5, z=None, norm_weight=None, norm_eps=1e-6, gate="silu",
            null_index=-1, out=out[t : t + 1], zero_padding=False, compute_dtype=torch.float64,
        )  # fmt: skip
    return out


def _kept(way: Way, stream: Stream, steps: int) -> Tensor:
    pools, ring = _pools(way.state, _FP32), {}
    if way.u is not None:
        ring = {
            "ring_k": torch.zeros(1, USUAL_SLOTS, HEADS.k_heads, HEADS.k_dim, dtype=_FP32),
            "ring_u": torch.zeros(1, USUAL_SLOTS, HEADS.v_heads, HEADS.v_dim, dtype=way.u),
            "ring_g": torch.zeros(1, USUAL_SLOTS, HEADS.v_heads, dtype=_FP32),
            "ring_span": torch.zeros(1, HEADS.k_heads, 2, dtype=torch.int32),
        }
    call = ops.replay_decode if ring else ops.fused_decode
    return torch.cat([call(**stream.step(t), **pools, **ring, backend="torch") for t in range(steps)])


def errors(gates: str, steps: int, ways: tuple[Way, ...] = WAYS) -> dict[str, float]:
    """By way, |out - truth| / |truth| of the last 512 tokens of `steps`."""
    stream = Stream(gates, steps)
    want = _truth(stream, steps)[-LAST:]
    return {w.name: float((_kept(w, stream, steps)[-LAST:].double() - want).norm() / want.norm()) for w in ways}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="replay_numbers", description="replay against float64, as a Markdown table")
    parser.add_argument("--steps", type=int, default=4096, help="tokens of the sequence (4096)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    print("| gates | " + " | ".join(way.name for way in WAYS) + " |")
    print("|" + " --- |" * (len(WAYS) + 1))
    for gates in GATES:
        found = errors(gates, args.steps)
        print(f"| {gates} | " + " | ".join(f"{x:.1e}" for x in found.values()) + " |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
