"""Arguments that several subcommands share: the layer that is asked about."""

from __future__ import annotations

import argparse

from gdn_plugin.registry import DTYPES, OPS, PHASE_OF_OP, USUAL_SLOTS, Problem
from gdn_plugin.tools.cli.values import count

STATE_DTYPES = ("float32", "bfloat16", "float16")


def pair(text: str) -> tuple[int, int]:
    """argparse type: "16,32" -> (16, 32)."""
    parts = text.split(",")
    try:
        first, second = (count(part) for part in parts)
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"{text!r} is not two positive numbers such as 16,32") from None
    return first, second


def heads(text: str) -> tuple[int, int]:
    """argparse type: Hk,Hv with Hv a multiple of Hk."""
    k, v = pair(text)
    if v % k:
        raise argparse.ArgumentTypeError(f"{text!r}: value heads must be a multiple of key heads")
    return k, v


def add_problem_arguments(parser: argparse.ArgumentParser, default_heads: tuple[int, int] = (16, 32)) -> None:
    """--heads, --dims, --dtype, --state-dtype."""
    shown = ",".join(map(str, default_heads))
    parser.add_argument(
        "--heads", type=heads, default=default_heads, metavar="HK,HV", help=f"key and value heads of a rank ({shown})"
    )
    parser.add_argument("--dims", type=pair, default=(128, 128), metavar="K,V", help="head dims (128,128)")
    parser.add_argument("--dtype", choices=DTYPES[:3], default="bfloat16", help="io dtype (bfloat16)")
    parser.add_argument("--state-dtype", choices=STATE_DTYPES, default="float32", help="dtype of the state (float32)")


def problems(args: argparse.Namespace, *, ragged: bool = True) -> dict[str, Problem]:
    """The ops of the layer that the arguments describe, as a host has them: see `host_problem`.

    Args:
        ragged: its speculative batches too are as a host has them.
    """
    return {op: host_problem(op, args.dtype, args.state_dtype, args.heads, args.dims, ragged=ragged) for op in OPS}


def host_problem(
    op: str,
    dtype: str,
    state_dtype: str,
    heads: tuple[int, int],
    dims: tuple[int, int],
    *,
    checkpoints: bool = False,
    ragged: bool = False,
) -> Problem:
    """An op as a serving engine calls it.

    Rows of its pools are padded (both states of a sequence lie in one page), its padding names a row that is nobody's,
    and a sequence brings up to four tokens to verify. gated_norm knows no state and no keys.

    Args:
        heads: Hk, Hv. dims: K, V.
        checkpoints: of prefill, for a prefix cache.
        ragged: of verify and fused_verify; an engine's always are, since drafts end early.
    """
    if op == "gated_norm":
        return Problem(op, dtype, "float32", heads[1], heads[1], dims[1], dims[1])
    return Problem(
        op,
        dtype,
        state_dtype,
        *heads,
        *dims,
        padded_pool=True,
        checkpoints=checkpoints,
        max_spec_tokens=4 if PHASE_OF_OP[op] == "verify" else 0,
        ragged=ragged and PHASE_OF_OP[op] == "verify",
        ring=USUAL_SLOTS if op.startswith("replay_") else 0,
        padding="scratch" if op in ("prefill", "decode", "verify") else "any",
    )
