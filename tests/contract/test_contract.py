"""The ops' contract (docstring of gdn_plugin.ops), every backend over the same cases, through the public functions.

What `checks.check` asks of each: the right numbers; not a bit changed in a row, a page tail or a guard row that no live
sequence names; inputs as they were; padding tokens zero, or in buffers that were handed over zero or untouched, and
zero where that was asked for. A
backend whose checks refuse a case must say why, and auto must serve the case all the same.
"""

from __future__ import annotations

from typing import Any

import torch

from gdn_plugin.ops import cases
from gdn_plugin.ops.cases import Heads
from gdn_plugin.registry import NoBackendError
from tests.contract.site import CPU, Site, no_self_check, pytest_generate_tests, site  # noqa: F401
from tests.support.checks import check
from tests.support.public import precision, public

SITE = CPU
NOBODY_REFUSES = False
HALF, BF16, FP32, INT64 = torch.float16, torch.bfloat16, torch.float32, torch.int64
MAKERS = {
    "conv_prologue": cases.conv_prologue_case,
    "prefill": cases.prefill_case,
    "decode": cases.decode_case,
    "fused_decode": cases.fused_decode_case,
    "verify": cases.verify_case,
    "fused_verify": cases.fused_verify_case,
    "gated_norm": cases.gated_norm_case,
    "replay_decode": cases.replay_decode_case,
    "replay_verify": cases.replay_verify_case,
    "replay_fold": cases.replay_fold_case,
}

REPLAY_STEPS = ("replay_decode", "replay_verify")
REPLAY = (*REPLAY_STEPS, "replay_fold")
STATE_OPS = ("prefill", "decode", "fused_decode", "verify", "fused_verify", "conv_prologue", *REPLAY)
CONV_OPS = ("conv_prologue", "fused_decode", "fused_verify", *REPLAY_STEPS)
PACKED = ("prefill", "verify", "fused_verify", "conv_prologue", "replay_verify")
TOKEN_OPS = tuple(op for op in MAKERS if op != "replay_fold")
PROJECTED = (*CONV_OPS, "decode", "verify", "gated_norm")
# The keyword features that mean the same for several ops: name -> (ops, keywords).
SHARED: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "plain": (tuple(MAKERS), {}),
    "strided": (TOKEN_OPS, {"gap": 64}),
    "strided, unaligned": (TOKEN_OPS, {"gap": 3}),
    "row numbers apart": (STATE_OPS, {"index_stride": 3}),
    "dense pools": (STATE_OPS, {"page_tail": 0}),
    "unaligned pools": (STATE_OPS, {"page_tail": 3}),
    "wide pages": (STATE_OPS, {"page_tail": 4096}),
    "fp32 gates": ((*CONV_OPS, "decode", "verify"), {"io_dtype": BF16, "gate_dtype": FP32}),
    **{
        f"{str(io)[6:]}, state {str(state)[6:]}": (STATE_OPS, {"io_dtype": io, "state_dtype": state})
        for io in (FP32, BF16, HALF)
        for state in (FP32, BF16, HALF)
    },
    **{f"value heads {r} a key head": (STATE_OPS, {"ratio": r}) for r in (1, 3, 8)},
    **{f"interleaved, {r} a key head": (PROJECTED, {"ratio": r, "interleaved": True}) for r in (1, 2, 3)},
    "interleaved": (PROJECTED, {"interleaved": True, "heads": (1, 2), "io_dtype": BF16, "gate_dtype": FP32}),
    "interleaved, strided": (PROJECTED, {"interleaved": True, "heads": (3, 6), "gap": 3, "io_dtype": BF16}),
    "interleaved, padding": (
        (*CONV_OPS, "decode", "verify"),
        {"interleaved": True, "padding": (0, 2), "gap": 64, "index_stride": 3},
    ),
    # The sequences that a feature names are those of the lens below.
    "padding that has tokens": (STATE_OPS, {"padding": (0, 2)}),
    "padding that has tokens, null row 0": (STATE_OPS, {"padding": (1,), "null_index": 0}),
    "only padding": (STATE_OPS, {"padding": (0, 1, 2, 3)}),
    "only padding, no rows": (STATE_OPS, {"padding": (0, 1, 2, 3), "pool_rows": 0}),
    "scratch row": (("prefill", "decode", "verify"), {"padding": (1, 3), "promise": "scratch"}),
    "scratch row, bf16": (
        ("prefill", "decode", "verify"),
        {"padding": (1, 3), "promise": "scratch", "io_dtype": BF16, "state_dtype": BF16},
    ),
    "no padding": (("prefill", "decode", "verify"), {"promise": "none"}),
    "tokens past the end": (PACKED, {"pad_tokens": 70}),
    "int64 offsets": (PACKED, {"offsets_dtype": INT64}),
    "no sequences": (PACKED, {"lens": (), "pad_tokens": 3}),
    "no tokens": (PACKED, {"lens": (0, 0)}),
    "nothing": (PACKED, {"lens": ()}),
    "no batch": (("decode", "fused_decode", "replay_decode", "replay_fold"), {"batch": 0}),
    "one": (("decode", "fused_decode", "replay_decode", "replay_fold"), {"batch": 1}),
    "DS layout": (CONV_OPS, {"layout": "DS", "extra_columns": 2}),
    "SD layout": (CONV_OPS, {"layout": "SD", "extra_columns": 2}),
    "shared pages": (CONV_OPS, {"layout": "SD", "shared": True, "gap": 64, "io_dtype": BF16}),
    "fp32 conv_state": (CONV_OPS, {"io_dtype": BF16, "conv_dtype": FP32}),
    "fp16 conv_state": (CONV_OPS, {"io_dtype": BF16, "conv_dtype": HALF}),
    "no bias": (CONV_OPS, {"bias": False}),
    "width 2": (CONV_OPS, {"width": 2}),
    "width 3": (CONV_OPS, {"width": 3, "layout": "SD"}),
    **{
        f"bfloat16, state {str(state)[6:]}, u {str(u)[6:]}": (
            REPLAY,
            {"io_dtype": BF16, "state_dtype": state, "u_dtype": u},
        )
        for state in (FP32, BF16, HALF)
        for u in (FP32, BF16, HALF)
        if state != u
    },
    "odd ring": (REPLAY, {"ring": 13}),
    "wide ring": (REPLAY, {"ring": 40}),
    "smallest ring": (("replay_verify",), {"ring": 8}),
    "empty rings": (REPLAY_STEPS, {"held": (0, 0, 0, 0), "accepted": (1, 1, 1, 1)}),
    "shared dense pages": (REPLAY_STEPS, {"shared": True, "page_tail": 0, "io_dtype": BF16}),
}
FRESH = {"fresh": (1, 2), "index_stride": 2}
OWN: dict[str, dict[str, dict[str, Any]]] = {
    "prefill": {
        "one-token prompts": {"lens": (1, 1, 1, 1), "fresh": (0, 2)},
        "odd lengths": {"lens": (63, 129, 31)},
        "whole chunks": {"lens": (64, 128)},
        "empty between": {"lens": (0, 65, 0, 0, 3, 0)},
        "longest is known": {"lens": (65, 2), "hint_seqlen": True},
        "fresh rows hold NaN": FRESH,
        "all fresh": {"fresh": (0, 1, 2, 3)},
        "has_initial_state None": {"fresh": None},
        "fresh rows of zeros": {"fresh": (1, 2), "zeroed_fresh": True},
        "checkpoints": {"lens": (64, 0, 200, 63), "checkpoint_every": 64, "fresh": (2,)},
        "checkpoints of 128": {"lens": (300, 127), "checkpoint_every": 128},
        "checkpoints and padding": {"lens": (64, 130), "checkpoint_every": 64, "padding": (0,), "pad_tokens": 3},
        "fp32 checkpoints of a bf16 pool": {
            "lens": (130,), "checkpoint_every": 64, "state_dtype": BF16, "checkpoint_dtype": FP32, "io_dtype": BF16,
        },
        "bf16 checkpoints of an fp32 pool": {"lens": (130,), "checkpoint_every": 64, "checkpoint_dtype": BF16},
        "exp gate": {"exp_gate": True},
        "decays down to exp(-20)": {"gate": "strong", "lens": (130, 5)},
        "decays of 0": {"gate": "wipe", "lens": (130, 5)},
        "decays of 0, exp gate": {"gate": "wipe", "lens": (130, 5), "exp_gate": True},
        "correlated keys": {"keys": "correlated", "gate": "none", "lens": (130,)},
        "norm inside": {"use_qk_l2norm": True, "io_dtype": BF16},
        "scale": {"scale": 0.5},
        "scale 0": {"scale": 0.0},
    },
    "decode": {"no norm": {"use_qk_l2norm": False}},
    "fused_decode": {
        "sigmoid": {"gate": "sigmoid", "io_dtype": BF16},
        "no norm": {"norm": False},
        "no norm, interleaved": {"norm": False, "interleaved": True},
    },
    "verify": {
        "one slot": {"lens": (1, 1), "slots": 1},
        "all accepted": {"accepted": (4, 4, 4, 4)},
        "even": {"lens": (4, 4, 4)},
        "even, no padding": {"lens": (4, 4, 4), "promise": "none", "io_dtype": BF16, "state_dtype": BF16},
        "empty between": {"lens": (0, 3, 0, 2)},
        "states that are not wanted": {"null_slots": ((0, 1), (2, 0)), "accepted": (1, 1, 2, 1)},
        "start rows": {"start_rows": True, "padding": (2,)},
        "no norm": {"use_qk_l2norm": False},
    },
    "fused_verify": {
        **{
            f"{drafts} drafts": {"lens": (drafts + 1, 1, drafts + 1, drafts), "slots": drafts + 1, "fresh": (2,)}
            for drafts in range(1, 7)
        },
        "one slot": {"lens": (1, 1), "slots": 1},
        **{f"{n} of 4 accepted": {"lens": (4, 2, 1), "accepted": (n, n, n)} for n in range(1, 5)},
        "empty between": {"lens": (0, 3, 0, 2)},
        "fresh rows hold NaN": FRESH,
        "all fresh": {"fresh": (0, 1, 2, 3)},
        "has_initial_state None": {"fresh": None},
        "states that are not wanted": {"null_slots": ((0, 1), (2, 1)), "accepted": (1, 1, 1, 1)},
        "start rows": {"start_rows": True, "padding": (2,), "fresh": (1,)},
        "columns to spare": {"extra_columns": 3, "layout": "SD"},
        "wide convolution": {"width": 8},
        "sigmoid": {"gate": "sigmoid", "io_dtype": BF16},
        "no norm": {"norm": False},
    },
    "replay_decode": {
        "every fill": {"batch": 8, "held": tuple(range(8)), "ring": 8},
        "sigmoid": {"gate": "sigmoid", "io_dtype": BF16},
        "no norm": {"norm": False},
        "no norm, interleaved": {"norm": False, "interleaved": True},
        "ring of 2": {"ring": 2, "held": (0, 1, 1, 0)},
        "columns of 4 tokens": {"ring": 8, "extra_columns": 3, "layout": "SD"},
    },
    "replay_verify": {
        **{
            f"{drafts} drafts": {
                "lens": (drafts + 1, 1, drafts + 1, drafts), "slots": drafts + 1, "ring": 2 * drafts + 5, "fresh": (2,),
            }
            for drafts in range(1, 7)
        },
        "one slot": {"lens": (1, 1), "slots": 1},
        **{f"{n} of 4 accepted": {"lens": (4, 2, 1), "accepted": (n, n, n)} for n in range(1, 5)},
        "every fill": {"lens": (4,) * 9, "ring": 12, "accepted": (1,) * 9, "held": tuple(range(9))},
        "empty between": {"lens": (0, 3, 0, 2)},
        "fresh rows hold NaN": FRESH,
        "all fresh": {"fresh": (0, 1, 2, 3)},
        "has_initial_state None": {"fresh": None},
        "wide convolution": {"width": 8},
        "sigmoid": {"gate": "sigmoid", "io_dtype": BF16},
        "no norm": {"norm": False},
    },
    "replay_fold": {
        "fresh rows": FRESH,
        "all fresh": {"fresh": (0, 1, 2, 3)},
        "has_initial_state None": {"fresh": None},
        "drafts accepted": {"accepted": (1, 4, 2, 3), "fresh": (1,)},
        "every fill": {"batch": 9, "held": tuple(range(9))},
        "ring of 1": {"ring": 1, "held": (0, 1, 1, 0)},
    },
    "conv_prologue": {
        "shorter than the window": {"lens": (1, 2, 3, 4), "fresh": (1,)},
        "long": {"lens": (70, 0, 130), "fresh": (2,)},
        "fresh rows hold NaN": FRESH,
        "has_initial_state None": {"fresh": None},
        "exp gate": {"exp_gate": True, "pad_tokens": 3, "padding": (1,)},
        "no state": {"state_dtype": None},
        "speculative": {"lens": (0, 1, 2, 4, 3), "accepted": (1, 2, 3, 4, 1), "padding": (3,)},
        "speculative, has_initial_state None": {"lens": (3, 3), "accepted": (1, 3), "fresh": None},
        "speculative, a fresh one": {"lens": (1, 3, 2), "accepted": (1, 3, 2), "fresh": (0, 2)},
        "speculative, SD": {"lens": (3, 3), "accepted": (1, 3), "layout": "SD", "extra_columns": 5, "pad_tokens": 2},
        "speculative, interleaved": {"lens": (0, 4, 3), "accepted": (1, 3, 1), "interleaved": True, "fresh": (2,)},
        "speculative, width 2": {"lens": (2, 3), "accepted": (2, 1), "width": 2, "state_dtype": None},
    },
    "gated_norm": {
        **{f"{gate}, {str(io)[6:]}": {"gate": gate, "io_dtype": io}
           for gate in ("silu", "sigmoid") for io in (FP32, BF16, HALF)},
        "fp32 weight": {"weight_dtype": FP32, "io_dtype": BF16},
        "in place": {"in_place": True},
        "in place, strided": {"in_place": True, "gap": 64, "io_dtype": BF16},
        "in place, interleaved": {"in_place": True, "interleaved": True, "io_dtype": BF16},
        "eps": {"eps": 0.3},
        "one token": {"tokens": 1},
        "many tokens": {"tokens": 300},
        "no tokens": {"tokens": 0},
    },
}  # fmt: skip
LENS = {"prefill": (66, 3, 1, 2), "conv_prologue": (5, 1, 9, 2)} | dict.fromkeys(
    ("verify", "fused_verify", "replay_verify"), (3, 1, 4, 2)
)
TABLE = [(op, name) for name, (of, _) in SHARED.items() for op in of] + [(op, name) for op in OWN for name in OWN[op]]


def build(site: Site, op: str, name: str) -> cases.Case:  # noqa: F811
    keywords: dict[str, Any] = {"io_dtype": site.io, "heads": site.heads, "device": site.device}
    keywords |= {"lens": LENS[op]} if op in LENS else {} if op == "gated_norm" else {"batch": 4}
    keywords |= SHARED[name][1] if op in SHARED.get(name, ((),))[0] else OWN[op][name]
    if op == "replay_decode":
        keywords.pop("accepted", None)
    if op == "replay_verify" and (more := keywords.pop("extra_columns", 0)):
        keywords |= {"slots": 4 + more, "ring": 2 * (4 + more) + 3}
    if ratio := keywords.pop("ratio", 0):
        _, _, K, V = site.heads
        key_heads = 1 if site.slow else 2
        keywords["heads"] = Heads(key_heads, key_heads * ratio, K, V)
    elif len(keywords["heads"]) == 2:
        keywords["heads"] = Heads(*keywords["heads"], *site.heads[2:])
    if op == "gated_norm":
        keywords.pop("gate_dtype", None)
    return MAKERS[op](**keywords)


def test_contract(site, op, name, backend, form):  # noqa: F811
    case = build(site, op, name)

    def serve(who: str | None) -> None:
        column = precision(op, who, case.io_dtype, site.device)
        check(public(op, who, out=form != "returning"), case, precision=column, zero_padding=form != "out")

    try:
        serve(backend)
    except NoBackendError as refusal:
        assert backend not in site.runs, f"{backend} must run this: {refusal}"
        assert f"{backend}:" in str(refusal) and "needs" in str(refusal), refusal
        serve(None)
