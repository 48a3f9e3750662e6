"""NaN and infinity come out where the recurrence puts them, on every backend: nowhere else, and nowhere less.

A value that is not finite must show from its token on, and must not reach earlier tokens of its sequence, other
sequences or other heads. Which of NaN and the infinities it has become is left open.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from gdn_plugin.ops import cases
from tests.contract.site import CPU, no_self_check, pytest_generate_tests, site  # noqa: F401
from tests.support.checks import assert_close, run_reference
from tests.support.public import precision, public
from tests.tolerances import tolerance

SITE = CPU
NOBODY_REFUSES = True
NAN, INF = float("nan"), float("inf")
QKV = {"q": (NAN, INF), "k": (NAN, -INF), "v": (NAN, INF)}
# By op: the tokens to spoil, and the arguments with the values that each may hold. g and beta of prefill are what gates
# make of a and b: g is -inf where exp(g) is 0, never inf.
SPOILT: dict[str, tuple[tuple[int, ...], dict[str, tuple[float, ...]]]] = {
    "prefill": (
        (0, 5, 63, 64, 69, 70),
        QKV | {"g": (NAN, -INF), "beta": (NAN,), "state": (NAN, INF)},
    ),
    "decode": (
        (1, 3),
        {
            "q": (NAN, INF),
            "k": (NAN, INF),
            "v": (NAN, -INF),
            "a": (NAN, INF, -INF),
            "b": (NAN, INF),
            "state": (NAN, INF),
        },
    ),
    "verify": (
        (0, 2, 4, 5),
        {
            "q": (NAN, INF),
            "k": (NAN, INF),
            "v": (NAN, -INF),
            "a": (NAN, INF, -INF),
            "b": (NAN, INF),
            "state": (NAN, INF),
        },
    ),
    "fused_decode": (
        (1, 3),
        {
            "mixed_qkv": (NAN, INF),
            "a": (NAN, INF, -INF),
            "b": (NAN,),
            "z": (NAN, INF),
            "conv_state": (NAN,),
            "state": (NAN,),
        },
    ),
    "fused_verify": (
        (0, 2, 4, 5),
        {
            "mixed_qkv": (NAN, INF),
            "a": (NAN, INF, -INF),
            "b": (NAN,),
            "z": (NAN, INF),
            "conv_state": (NAN,),
            "state": (NAN,),
        },
    ),
    "replay_decode": (
        (0, 3),
        {
            "mixed_qkv": (NAN, INF),
            "a": (NAN, INF, -INF),
            "b": (NAN,),
            "z": (NAN, INF),
            "conv_state": (NAN,),
            "state": (NAN,),
            "ring_k": (NAN,),
            "ring_u": (NAN, INF),
            "ring_g": (NAN, -INF),
        },
    ),
    "replay_verify": (
        (0, 2, 4, 5),
        {
            "mixed_qkv": (NAN, INF),
            "a": (NAN, INF, -INF),
            "b": (NAN,),
            "z": (NAN, INF),
            "conv_state": (NAN,),
            "state": (NAN,),
            "ring_k": (NAN,),
            "ring_u": (NAN, INF),
            "ring_g": (NAN, -INF),
        },
    ),
    "replay_fold": (
        (0,),
        {"state": (NAN, INF), "ring_k": (NAN, INF), "ring_u": (NAN, INF), "ring_g": (NAN, -INF)},
    ),
    "conv_prologue": (
        (0, 2, 5, 6),
        {"mixed_qkv": (NAN, INF), "a": (NAN, INF, -INF), "b": (NAN, INF), "conv_state": (NAN, INF)},
    ),
    "gated_norm": ((0, 4), {"x": (NAN, INF), "z": (NAN, INF), "weight": (NAN,)}),
}
FOLDS = (0, 1)  # sequences of replay: one whose ring goes on, one whose ring is folded
POOLS = ("state", "conv_state", "ring_k", "ring_u", "ring_g")
TABLE = [(op, name) for op, (_, arguments) in SPOILT.items() for name in arguments]


def build(site, op: str) -> cases.Case:  # noqa: F811
    keywords = {"heads": site.heads, "io_dtype": site.io, "device": site.device}
    if op == "prefill":
        return cases.prefill_case((70, 2, 1), fresh=(1,), checkpoint_every=64, **keywords)
    if op == "verify":
        return cases.verify_case((4, 1, 2), **keywords)
    if op == "fused_verify":
        return cases.fused_verify_case((4, 1, 2), fresh=(2,), **keywords)
    if op == "conv_prologue":
        return cases.conv_prologue_case((6, 1, 2), fresh=(1,), **keywords)
    if op == "gated_norm":
        return cases.gated_norm_case(**keywords)
    if op == "replay_verify":
        return cases.replay_verify_case((4, 1, 2), accepted=(1, 2, 1), held=(3, 7, 0), fresh=(2,), **keywords)
    if op == "replay_decode":
        return cases.replay_decode_case(5, held=(3, 7, 0, 6, 1), **keywords)
    if op == "replay_fold":
        return cases.replay_fold_case(5, held=(3, 8, 0, 1, 2), **keywords)
    return {"decode": cases.decode_case, "fused_decode": cases.fused_decode_case}[op](5, **keywords)


def spoil(case: cases.Case, name: str, token: int, value: float) -> None:
    """One element of a token; of a pool, of the row that the first sequence starts from, with a ring the token's."""
    if name not in case.pools:
        x = case.args[name]
        x[(token, *(1 % n for n in x.shape[1:])) if name != "weight" else 1] = value
        return
    view, indices = case.pools[name].view, case.args["state_indices"]
    if case.op.startswith("replay_"):
        row = int(indices[token])
    else:
        row = int(indices[0] if indices.dim() == 1 else indices[0, int(case.args["num_accepted_tokens"][0]) - 1])
    at = [1 % n for n in view.shape[1:]]
    if name.startswith("ring_"):
        at[0] = 2 + 3 * token  # of slots 1 to 3, which the first sequence's updates are in, or from 4 on
    view[(row, *at)] = value


def spoilt(site, op: str, name: str) -> list[tuple[int, float]]:  # noqa: F811
    """The pairs of token and value that an argument is tried with.

    All of them; where a call takes seconds, every token and every value, and of one op's arguments the next begins with
    another value, so that a place in the sequence meets NaN as well as an infinity.
    """
    tokens, arguments = SPOILT[op]
    if name in (*POOLS, "weight"):
        tokens = FOLDS if op.startswith("replay_") else tokens[:1]
    values = arguments[name]
    if not site.slow:
        return list(itertools.product(tokens, values))
    first = list(arguments).index(name)
    return [(tokens[i % len(tokens)], values[(first + i) % len(values)]) for i in range(max(len(tokens), len(values)))]


def test_spoilt(site, op, name, backend):  # noqa: F811
    for token, value in spoilt(site, op, name):
        case = build(site, op)
        spoil(case, name, token, value)
        got = case.arguments(zero_padding=True)
        public(op, backend)(**got)
        assert case.trespass(got) is None
        truth = run_reference(case)
        want = case.results(truth.outputs | truth.pools)
        for result, x in case.results(got).items():
            if result == "ring_span":
                assert torch.equal(x.cpu(), want[result])
                continue
            x, y, where = x.cpu(), want[result], f"{name}[{token}] = {value}: {result}"
            fine = torch.isfinite(y)
            wrong = torch.isfinite(x) != fine
            assert not wrong.any(), f"{where}: {int(wrong.sum())} elements of {x.numel()} are not as they must be"
            column = precision(op, backend, site.io, site.device)
            assert_close(where, x[fine], y[fine], tolerance(op, site.io, x.dtype, column))


@pytest.mark.parametrize("value", [NAN, INF])
def test_the_recurrence_spreads_it_forwards_only(value):
    """That the truth above is what the words say: from the token on, in its element of v; in all of them for k."""
    for name in ("v", "k"):
        case = cases.prefill_case((5, 3), cases.Heads(1, 1, 8, 4))
        case.args[name][2, 0, 1] = value
        out = torch.isfinite(run_reference(case).outputs["out"])[:, 0]
        want = torch.ones(8, 4, dtype=torch.bool)
        want[2:5, 1 if name == "v" else slice(None)] = False
        assert torch.equal(out, want)
