"""What only replay has: long runs against the plain recurrence in float64, every fill and fold, what is never read.

The truth here is fused_verify of backend `reference` in float64 on dense pools, never replay's own reference.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from gdn_plugin import ops
from gdn_plugin.ops import cases
from gdn_plugin.ops.cases import Heads, Pool
from tests.support.checks import assert_close, bits, check, reference
from tests.support.public import public, supported
from tests.tolerances import tolerance

HEADS = Heads(2, 4, 16, 8)
WIDTH = 4
NAN = float("nan")
GATES = ("mild", "strong", "far", "wipe", "none", "correlated")


@pytest.fixture(params=["reference", "torch", "cpu", "triton"])
def backend(request):
    for op in ("replay_decode", "replay_verify", "replay_fold"):
        if request.param not in supported(op):
            pytest.skip(f"no {op} of {request.param} here")
    return request.param


class Tokens:
    """A stream of a sequence's projections, which may be drawn again from any token on.

    Args:
        gates: how a, A_log and dt_bias make g: "mild" about -0.01, "strong" 0 to -20, "far" -120 now and then, "wipe"
            -inf now and then, "none" 0, "correlated" mild with nearly equal keys and beta near 1.
    """

    def __init__(self, gates: str, heads: Heads = HEADS, seed: int = 0) -> None:
        self.gates, self.heads = gates, heads
        self.draw = torch.Generator().manual_seed(seed)
        self.key = self.normal(heads.conv_dim)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.draw)

    def parameters(self) -> dict[str, Tensor | None]:
        hv = self.heads.v_heads
        low = {"none": -40.0, "mild": -4.0, "correlated": -4.0}.get(self.gates, 0.0)
        return {
            "conv_weight": self.normal(self.heads.conv_dim, WIDTH) * 0.5,
            "conv_bias": self.normal(self.heads.conv_dim) * 0.1,
            "A_log": torch.full((hv,), low),
            "dt_bias": torch.linspace(-0.5, 0.5, hv) if self.gates != "none" else torch.full((hv,), -60.0),
            "norm_weight": 1 + 0.1 * self.normal(self.heads.v_dim),
        }

    def next(self, n: int) -> dict[str, Tensor]:
        hv = self.heads.v_heads
        mixed = self.normal(n, self.heads.conv_dim)
        b = 2 * self.normal(n, hv)
        a = self.normal(n, hv)
        if self.gates == "correlated":
            mixed, b = self.key + 0.1 * mixed, b.abs() + 4
        elif self.gates == "none":
            a = a - 60
        elif self.gates != "mild":
            a = -8 + 28 * torch.rand(n, hv, generator=self.draw)  # g from about 0 to -20
            rare = torch.rand(n, hv, generator=self.draw) < 0.1
            if self.gates == "far":
                a = torch.where(rare, 120.0, a)
            elif self.gates == "wipe":
                a = torch.where(rare, float("inf"), a)
        return {"mixed_qkv": mixed, "a": a, "b": b, "z": self.normal(n, hv, self.heads.v_dim)}


class Truth:
    """One sequence by the recurrence alone: a state and a history in float64; drafts are run on a copy."""

    def __init__(self, parameters: dict[str, Tensor | None], heads: Heads) -> None:
        self.parameters, self.heads = parameters, heads
        self.state = torch.zeros(1, *heads.state, dtype=torch.float64)
        self.conv = torch.zeros(1, heads.conv_dim, WIDTH - 1, dtype=torch.float64)

    def step(self, tokens: dict[str, Tensor], keep: int) -> Tensor:
        """out [n, Hv, V] of all tokens; the first `keep` of them move the sequence on."""
        outs = []
        state, conv = self.state.clone(), self.conv.clone()
        n = tokens["a"].shape[0]
        for t in range(n):
            out = torch.full((1, self.heads.v_heads, self.heads.v_dim), NAN, dtype=torch.float64)
            reference("fused_decode")(
                **{"z": None} | {name: x[t : t + 1] for name, x in tokens.items()}, **self.parameters,
                conv_state=conv, state=state,
                state_indices=torch.zeros(1, dtype=torch.int32), num_k_heads=self.heads.k_heads,
                head_k_dim=self.heads.k_dim, head_v_dim=self.heads.v_dim, scale=self.heads.k_dim**-0.5, norm_eps=1e-6,
                gate="silu", null_index=-1, out=out, zero_padding=False, compute_dtype=torch.float64,
            )  # fmt: skip
            outs.append(out)
            if t == keep - 1:
                self.state, self.conv = state.clone(), conv.clone()
        return torch.cat(outs)


class Driver:
    """Sequences of a pool, each with its truth, through steps of any kind; every output is compared.

    Guard rows, page tails and slots that hold nothing are NaN (bytes of 255) from the start.
    """

    def __init__(
        self, backend: str, gates: str, ring: int, most: int, *, sequences: int = 3, heads: Heads = HEADS,
        shared: bool = False, layout: str = "DS", page_tail: int = 24, interleaved: bool = False,
        norm: bool = True, seed: int = 0,
    ) -> None:  # fmt: skip
        self.backend, self.ring, self.most, self.heads, self.interleaved = backend, ring, most, heads, interleaved
        self.rng = random.Random(seed)
        self.tokens = Tokens(gates, heads, seed)
        self.parameters = self.tokens.parameters()
        self.norm = norm
        if not norm:
            self.parameters["norm_weight"] = None
        case = cases.replay_verify_case(
            [1] * sequences, heads, ring=ring, slots=most, shared=shared, layout=layout, page_tail=page_tail,
            fresh=range(sequences), width=WIDTH, pool_rows=sequences + 4,
        )  # fmt: skip
        self.rows = self.rng.sample(range(sequences + 4), sequences)
        case.written = {n: dict.fromkeys(self.rows, pool.view.shape[-1]) for n, pool in case.pools.items()}
        case.outputs = {}
        self.case = case
        copies = {id(pool.base): pool.base.clone() for pool in case.pools.values()}
        self.pools: dict[str, Pool] = {n: pool.on(copies[id(pool.base)]) for n, pool in case.pools.items()}
        self.truth = [Truth(self.parameters, heads) for _ in range(sequences)]
        self.accepted = [1] * sequences
        self.updates = [0] * sequences  # what each ring holds, by the words of the docstring
        self.seen: Counter[Any] = Counter()
        self.step_number = 0
        for row in self.rows:
            self.view("state")[row] = 0
            self.view("conv_state")[row, :, : WIDTH - 1] = 0
            self.view("ring_span")[row] = 0

    def view(self, name: str) -> Tensor:
        return self.pools[name].view

    def drawn(self, n: int) -> dict[str, Tensor]:
        """The next tokens; their z only where there is a norm."""
        tokens = self.tokens.next(n)
        return tokens if self.norm else {name: x for name, x in tokens.items() if name != "z"}

    def expect(self, i: int) -> None:
        """What this step finds and does, counted."""
        n = self.updates[i] + self.accepted[i] - 1
        folds = n + 2 * self.most > self.ring
        self.seen["full" if folds else "keep", n] += 1
        self.updates[i] = (0 if folds else n) + 1

    def packed(self, lens: list[int], fresh: list[dict[str, Tensor]]) -> dict[str, Any]:
        given: dict[str, Any] = {name: torch.cat([t[name] for t in fresh]) for name in fresh[0]}
        if self.interleaved:
            hk, hv, K, V = self.heads
            ratio, n = hv // hk, sum(lens)
            q, k, v = given["mixed_qkv"].split((hk * K, hk * K, hv * V), 1)
            shares = (q.view(n, hk, K), k.view(n, hk, K), v.view(n, hk, ratio * V), given["z"].view(n, hk, ratio * V))
            qkvz = torch.cat(shares, 2)
            given["mixed_qkv"] = qkvz[..., : 2 * K + ratio * V]
            given["z"] = qkvz[..., 2 * K + ratio * V :].unflatten(2, (ratio, V))
            ba = torch.cat((given["b"].view(n, hk, ratio), given["a"].view(n, hk, ratio)), 2)
            given["b"], given["a"] = ba[..., :ratio], ba[..., ratio:]
        return given

    def run(self, kind: str) -> None:
        """One step of some of the sequences, in any order, a padding row between them."""
        self.step_number += 1
        some = self.rng.sample(range(len(self.rows)), self.rng.randint(1, len(self.rows)))
        if kind == "fold":
            return self.fold(some)
        if kind == "decode":  # takes no count: whoever brings drafts that were accepted verifies first
            some = [i for i in some if self.accepted[i] == 1]
            if not some:
                return self.fold([0])
        lens = [1 if kind == "decode" else self.rng.choice((self.most, self.rng.randint(1, self.most))) for _ in some]
        keeps = [1 if n == 1 else self.rng.choice((1, n, self.rng.randint(1, n))) for n in lens]
        drawn = [self.drawn(n) for n in lens]
        want = torch.cat([self.truth[i].step(t, keep) for i, t, keep in zip(some, drawn, keeps, strict=True)])
        rows = [self.rows[i] for i in some]
        accepted = [self.accepted[i] for i in some]
        for i in some:
            self.expect(i)
        at = self.rng.randint(0, len(some))  # a padding row, whose tokens are NaN
        lens.insert(at, 1)
        rows.insert(at, -1)
        accepted.insert(at, 2**30)
        drawn.insert(at, {name: torch.full_like(x[:1], NAN) for name, x in drawn[0].items()})
        given = self.packed(lens, drawn) | self.parameters | {name: pool.view for name, pool in self.pools.items()}
        given |= {
            "state_indices": torch.tensor(rows, dtype=torch.int32), "num_k_heads": self.heads.k_heads,
            "head_k_dim": self.heads.k_dim, "head_v_dim": self.heads.v_dim,
        }  # fmt: skip
        offsets = torch.tensor([0, *lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        if kind == "verify":
            counts = {"num_accepted_tokens": torch.tensor(accepted, dtype=torch.int32), "cu_seqlens": offsets}
            out = ops.replay_verify(**given, **counts, backend=self.backend)
        else:
            out = ops.replay_decode(**given, backend=self.backend)
        pad = slice(int(offsets[at]), int(offsets[at + 1]))
        assert bool((out[pad] == 0).all())
        live = torch.cat((out[: pad.start], out[pad.stop :]))
        # As of a prefill: what hundreds of tokens before it have rounded is in a token's output.
        assert_close(f"{kind} {self.step_number}", live, want, tolerance("prefill", torch.float32, torch.float32))
        for i, keep in zip(some, keeps, strict=True):
            self.accepted[i] = keep
        self.seen[kind] += 1
        return None

    def fold(self, some: list[int]) -> None:
        """Fold, compare the state and, now and then, continue the plain row with a prefill."""
        rows = torch.tensor([*(self.rows[i] for i in some), -1], dtype=torch.int32)
        counts = torch.tensor([*(self.accepted[i] for i in some), 2**30], dtype=torch.int32)
        pools = {name: self.view(name) for name in ("ring_k", "ring_u", "ring_g", "ring_span", "state")}
        ops.replay_fold(**pools, state_indices=rows, num_accepted_tokens=counts, backend=self.backend)
        tol = tolerance("prefill", torch.float32, torch.float32)
        for i in some:
            row = self.rows[i]
            self.seen["folded", self.updates[i] + self.accepted[i] - 1] += 1
            assert_close(f"state of {i} folded", self.view("state")[row], self.truth[i].state[0], tol)
            assert not bool(self.view("ring_span")[row].any())
            conv = self.view("conv_state")[row]  # a plain row's history is its first columns
            conv[:, : WIDTH - 1] = conv[:, self.accepted[i] - 1 : self.accepted[i] + WIDTH - 2].clone()
            self.updates[i], self.accepted[i] = 0, 1
            # What a ring held is nobody's any more.
            for name in ("ring_k", "ring_u", "ring_g"):
                self.view(name)[row] = NAN
        self.seen["fold"] += 1
        if self.rng.random() < 0.5:
            self.prefill(some[0])

    def prefill(self, i: int) -> None:
        """A folded row is a plain state: conv_prologue and prefill go on from it."""
        n = self.rng.randint(1, 9)
        tokens = self.drawn(n)
        want = self.truth[i].step(tokens, n)
        p, row = self.parameters, torch.tensor([self.rows[i]], dtype=torch.int32)
        offsets = torch.tensor([0, n], dtype=torch.int32)
        q, k, v, g, beta = ops.conv_prologue(
            tokens["mixed_qkv"], p["conv_weight"], p["conv_bias"], self.view("conv_state"), row, offsets,
            torch.ones(1, dtype=torch.bool), tokens["a"], tokens["b"], p["A_log"], p["dt_bias"],
            num_k_heads=self.heads.k_heads, head_k_dim=self.heads.k_dim, head_v_dim=self.heads.v_dim, backend="torch",
        )  # fmt: skip
        out = ops.prefill(q, k, v, g, beta, self.view("state"), row, offsets, backend="torch")
        if self.norm:
            out = ops.gated_norm(out, tokens["z"], p["norm_weight"], backend="torch")
        assert_close("prefill", out, want, tolerance("prefill", torch.float32, torch.float32))
        self.seen["prefill"] += 1

    def walk(self, steps: int) -> None:
        for _ in range(steps):
            self.run(self.rng.choices(("decode", "verify", "fold"), (4, 8, 1))[0])
        self.nothing_else_was_written()

    def nothing_else_was_written(self) -> None:
        """Rows that are no sequence's, page tails and guard rows have the bytes that they had."""
        found = self.case.trespass({name: pool.view for name, pool in self.pools.items()})
        assert found is None, found

    def reached(self) -> tuple[set[int], set[int]]:
        """Numbers of updates that a step began with: where it went on, where it folded."""
        return tuple({n for what, n in (k for k in self.seen if isinstance(k, tuple)) if what == way}
                     for way in ("keep", "full"))  # fmt: skip


@pytest.mark.parametrize(
    ("gates", "ring", "most"),
    [(gates, 12, 3) for gates in GATES] + [("mild", 2, 1), ("wipe", 7, 1), ("strong", 8, 4), ("mild", 21, 5)],
)
def test_long_runs(backend, gates, ring, most):
    """Hundreds of steps against the recurrence; every fill and every fold point is reached.

    Without the norm, which makes any error large where the output that it scales up is small.
    """
    driver = Driver(backend, gates, ring, most, norm=False)
    driver.walk(300 if ring < 20 else 900)
    kept, folded = driver.reached()
    assert kept == set(range(ring - 2 * most + 1))
    assert folded == set(range(ring - 2 * most + 1, ring - most + 1))
    assert min(driver.seen[kind] for kind in ("decode", "verify", "fold", "prefill")) > 3, driver.seen


@pytest.mark.parametrize(
    "how",
    [
        {"page_tail": 0},
        {"layout": "SD"},
        {"shared": True, "layout": "SD"},
        {"shared": True, "page_tail": 0},
        {"interleaved": True, "shared": True},
        {"interleaved": True, "heads": Heads(2, 6, 8, 16)},
        {"heads": Heads(3, 3, 16, 8), "page_tail": 5},
    ],
    ids=lambda how: ", ".join(how),
)
def test_layouts(backend, how):
    """Dense pools, one shared page, both layouts of the history, interleaved heads."""
    Driver(backend, "strong", 9, 3, **how).walk(60)


def test_gates_are_what_they_are_called():
    """g down to -20, to -120 and to -inf, none at all; beta near 1 and keys nearly equal."""
    least = {}
    for gates in GATES:
        tokens = Tokens(gates)
        p, t = tokens.parameters(), tokens.next(500)
        g = -torch.exp(p["A_log"]) * torch.nn.functional.softplus(t["a"] + p["dt_bias"])
        least[gates] = float(g.min())
    assert -0.2 < least["mild"] < 0 and -22 < least["strong"] < -18 and least["wipe"] == -float("inf")
    assert -122 < least["far"] < -118 and -1e-20 < least["none"] <= 0
    assert float(torch.sigmoid(Tokens("correlated").next(100)["b"]).min()) > 0.98


def test_a_driver_that_forgets_a_fold_fails(backend):
    """The control: a row whose ring is emptied in place of folded is another state."""
    driver = Driver(backend, "mild", 12, 3, sequences=1)
    while not driver.updates[0] or driver.accepted[0] > 1:
        driver.run("verify")
    driver.view("ring_span")[driver.rows[0]] = 0
    driver.updates[0] = 0
    with pytest.raises(AssertionError):
        driver.run("decode")


def verified(case, backend, **changes):
    given = case.arguments() | changes
    public("replay_verify", backend)(**given)
    return given


@pytest.mark.parametrize("held", [(1, 2), (3, 8)], ids=["room", "folding"])
def test_a_rejected_draft_leaves_nothing(backend, held):
    """Drafts of NaN, none of them accepted: the next step is that behind drafts of other values, to the bit."""
    first = cases.replay_verify_case((4, 4), HEADS, held=held, accepted=(2, 1), ring=12)
    results = []
    for poison in (NAN, 3.0):
        one = first.arguments()
        for name in ("mixed_qkv", "a", "b", "z"):
            one[name] = one[name].clone()
            one[name][1:4] = poison
            one[name][5:8] = poison
        public("replay_verify", backend)(**one)
        two = one | {"num_accepted_tokens": torch.ones(2, dtype=torch.int32)}
        fresh = cases.replay_verify_case((4, 4), HEADS, seed=5).args
        two |= {name: fresh[name] for name in ("mixed_qkv", "a", "b", "z")} | {"out": torch.empty_like(one["out"])}
        public("replay_verify", backend)(**two)
        fold = {n: two[n] for n in ("ring_k", "ring_u", "ring_g", "ring_span", "state", "state_indices")}
        ops.replay_fold(**fold, num_accepted_tokens=torch.tensor([4, 3], dtype=torch.int32), backend=backend)
        rows = two["state_indices"].long()
        results.append((two["out"].clone(), two["state"][rows], two["conv_state"][rows]))
    for x, y in zip(*results, strict=True):
        assert bool(torch.isfinite(x).all()) and torch.equal(bits(x), bits(y))


@pytest.mark.parametrize("op", ["replay_decode", "replay_verify", "replay_fold"])
@pytest.mark.parametrize("value", [float("inf"), 1e30, -1.0])
def test_slots_that_hold_nothing_are_not_read(backend, op, value):
    """They are NaN in every case; nor does any other value there show."""
    case = getattr(cases, f"{op}_case")(heads=HEADS)
    plain, other = case.arguments(), case.arguments()
    for name in ("ring_k", "ring_u", "ring_g"):
        other[name][other[name].isnan()] = value
    for given in (plain, other):
        public(op, backend)(**given)
    for name, x in case.results(plain).items():
        assert torch.equal(bits(x), bits(case.results(other)[name])), name


@pytest.mark.parametrize("op", ["replay_decode", "replay_verify"])
def test_a_row_of_zero_spans_is_a_plain_state(backend, op):
    """Beside the op that knows no ring, from the same pools."""
    replay = (
        cases.replay_decode_case(4, HEADS, held=(0,) * 4)
        if op == "replay_decode"
        else cases.replay_verify_case((3, 1, 4), HEADS, held=(0,) * 3, accepted=(1,) * 3)
    )
    rows = replay.args["state_indices"][: len(replay.args["state_indices"])].long()
    pools = {n: replay.pools[n].clone().view for n in replay.pools}
    pools["ring_span"][rows] = 0
    names = ("num_accepted_tokens", "cu_seqlens") if op == "replay_verify" else ()
    with_ring = getattr(ops, op)(**replay.args, **pools, backend=backend)
    truths = {n: replay.pools[n].clone().view for n in ("conv_state", "state")}
    args = {n: x for n, x in replay.args.items() if n not in ("has_initial_state", *names)}
    lens = [1] * 4 if op == "replay_decode" else [3, 1, 4]
    want, at = [], 0
    for row, n in zip(rows.tolist(), lens, strict=True):
        for t in range(at, at + n):
            own = {m: args[m][t : t + 1] for m in ("mixed_qkv", "a", "b", "z")}
            own["state_indices"] = torch.tensor([row], dtype=torch.int32)
            want.append(ops.fused_decode(**(args | own), **truths, backend="reference"))
        at += n
    assert_close(op, with_ring, torch.cat(want), tolerance(op, torch.float32, torch.float32))


@pytest.mark.parametrize("op", ["replay_verify", "replay_fold"])
def test_the_ring_is_round(backend, op):
    """Whatever slot the updates begin in, a call gives the same bits and writes the slots behind them."""
    ring, held = 11, (2, 5, 7)
    case = (
        cases.replay_verify_case((3, 1, 4), HEADS, ring=ring, held=held, accepted=(1, 1, 2))
        if op == "replay_verify"
        else cases.replay_fold_case(3, HEADS, ring=ring, held=held)
    )
    rings = ("ring_k", "ring_u", "ring_g")
    found = []
    for shift in range(ring):
        given = case.arguments()
        rows = given["state_indices"].long()
        for name in rings:
            given[name][rows] = given[name][rows].roll(shift, 1)
        given["ring_span"][rows, :, 0] = (given["ring_span"][rows, :, 0] + shift) % ring
        public(op, backend)(**given)
        if op == "replay_verify":
            given["ring_span"][rows, :, 0] = (given["ring_span"][rows, :, 0] - shift) % ring
        found.append([given["state"][rows], given["ring_span"][rows], *(given[n][rows].roll(-shift, 1) for n in rings)])
        found[-1] += [given["out"]] if op == "replay_verify" else []
    for other in found[1:]:
        for x, y in zip(found[0], other, strict=True):
            assert torch.equal(bits(x), bits(y))


def test_pools_of_no_rows(backend):
    """Every sequence is padding and there is no pool to speak of."""
    for op in ("replay_decode", "replay_verify", "replay_fold"):
        size = {"lens": (1, 2)} if op == "replay_verify" else {"batch": 2}
        check(public(op, backend), getattr(cases, f"{op}_case")(**size, heads=HEADS, padding=(0, 1), pool_rows=0))
