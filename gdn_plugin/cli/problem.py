"""Arguments that several subcommands share: the layer that is asked about."""

from __future__ import annotations

import argparse

from gdn_plugin.registry import DTYPES, OPS, Problem


def pair(text: str) -> tuple[int, int]:
    """argparse type: "16,32" -> (16, 32)."""
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not two positive numbers such as 16,32")
    return int(parts[0]), int(parts[1])


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
    parser.add_argument(
        "--state-dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of the state (float32)"
    )


def problems(args: argparse.Namespace, *, spec_tokens: int = 4, ragged: bool = False) -> dict[str, Problem]:
    """The five ops of the layer that the arguments describe, with a page-padded pool as vLLM has it.

    Args:
        ragged: its speculative batches too are as vLLM has them.
    """
    return {
        op: Problem(
            op=op,
            dtype=args.dtype,
            state_dtype=args.state_dtype,
            num_k_heads=args.heads[0],
            num_v_heads=args.heads[1],
            head_k_dim=args.dims[0],
            head_v_dim=args.dims[1],
            padded_pool=True,
            max_spec_tokens=spec_tokens if op == "verify" else 0,
            ragged=ragged and op == "verify",
        )
        for op in OPS
    }
