"""The layer's core over many steps, against one pass of the recurrence over each request's whole stream."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from gdn_plugin import ops
from gdn_plugin.hosts.batch import Batch
from gdn_plugin.hosts.core import Core, GatedNorm, Parameters, Ring, Shape
from gdn_plugin.hosts.vllm.metadata import batch_of
from gdn_plugin.registry import PHASES, probe, select
from tests.host.steps import Request, Row, Step, build_inputs, build_metadata
from tests.support.checks import assert_close, bits
from tests.tolerances import tolerance

HK, HV, K, V, W = 2, 4, 64, 64, 4
DIM = 2 * HK * K + HV * V
ROWS = 66
SPEC = 4  # tokens of a speculative row
CLOSE = tolerance("prefill", torch.float32, torch.float32)

SLOTS = 2 * SPEC  # of a ring: as short as it may be, so that folds are many
# By backend; what the core does itself is the same on all of them, in either layout of the projections.
WORLDS = ["reference", "torch", "cpu", "cpu, interleaved", "reference, replay", "torch, replay"]
# vLLM's own list for up to 64 sequences: 1, 2, 4, then every 8.
CAPTURED_SIZES = (1, 2, 4, *range(8, 65, 8))


@dataclass
class World:
    """Pools full of NaN (recycled rows hold anything), weights, requests and what the recurrence says of each.

    As spans of a ring, that NaN is a place far outside of it.
    """

    core: Core
    parameters: Parameters
    norm_weight: Tensor
    generator: torch.Generator
    pages: Tensor
    interleaved: bool

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def request(self, rows: list[int], length: int) -> Request:
        return Request(rows, self.randn(length, DIM), self.randn(length, HV), self.randn(length, HV))

    def truth(self, request: Request) -> tuple[Tensor, Tensor, Tensor]:
        """(out, state, last W-1 inputs) after `request.done` tokens, from the reference in one go."""
        return self.truth_of(request, request.done)

    def truth_of(self, request: Request, length: int) -> tuple[Tensor, Tensor, Tensor]:
        p = self.parameters
        state = torch.zeros(2, HV, V, K)
        conv = torch.zeros(2, DIM, W - 1)
        index, starts = torch.tensor([1], dtype=torch.int32), torch.tensor([0, length], dtype=torch.int32)
        fresh = torch.tensor([False])
        q, k, v, g, beta = ops.conv_prologue(
            request.x[:length], p.conv_weight, None, conv, index, starts, fresh, request.a[:length], request.b[:length],
            p.A_log, p.dt_bias, num_k_heads=HK, head_k_dim=K, head_v_dim=V, backend="reference",
        )  # fmt: skip
        out = ops.prefill(
            q, k, v, g, beta, state, index, starts, has_initial_state=fresh, use_qk_l2norm=False, backend="reference"
        )
        return out, state[1], conv[1]

    def step(self, step: Step, norm: bool = False) -> None:
        """Run a step, check what it gave for right tokens, and advance the requests."""
        x, a, b, places = build_inputs(step, self.generator)
        metadata = build_metadata(step, SPEC)
        padded = x.shape[0]
        z = self.randn(padded, HV, V)
        out = torch.full((padded, HV, V), float("nan"))
        self.run(batch_of(metadata, W - 1), x, z if norm else None, a, b, out)
        assert not out[padded - step.pad_tokens :].any(), "rows of padding tokens must be zero, whatever they held"
        for row, place in places:
            request, start = row.request, row.request.done
            want = self.truth_of(request, start + row.count)[0][start:]
            if norm:
                want = self.normalised(want, z[place])
            assert_close("out", out[place], want, CLOSE)
            request.done += row.count
            request.accepted = row.count if row.drafts is not None else 1
        for row, _ in places:
            self.check_state(row)

    def run(self, batch: Batch, x: Tensor, z: Tensor | None, a: Tensor, b: Tensor, out: Tensor) -> None:
        """The step on slices of a host's projections: q k v z and b a, of all heads or by key head."""
        heads, gate = HK if self.interleaved else 1, None
        beside = torch.full((len(x), HV * V), float("nan")) if z is None else z.flatten(1)
        parts = [*x.split((HK * K, HK * K, HV * V), 1), beside]
        wide, ba = (torch.cat([y.unflatten(1, (heads, -1)) for y in ys], 2) for ys in (parts, (b, a)))
        mixed, placed = wide.split((DIM // heads, HV * V // heads), 2)
        b, a = ba.chunk(2, 2)
        if not self.interleaved:
            mixed, placed, a, b = (y.squeeze(1) for y in (mixed, placed, a, b))
        if z is not None:
            gate = GatedNorm(placed.unflatten(-1, (-1, V)), self.norm_weight, 1e-6, "silu")
        self.core.run(batch, mixed, a, b, self.parameters, out, gate)

    def check_state(self, row: Row) -> None:
        """The state, and the conv history, where the request's next step will look for them."""
        request = row.request
        _, state, history = self.truth(request)
        last = request.accepted - 1
        got = self.parameters.state[request.rows[last]]
        if self.parameters.ring is not None:  # the first row is the only one, and has a ring to be counted in
            first = slice(request.rows[0], request.rows[0] + 1)
            held, got = [x[first].clone() for x in self.parameters.ring], self.parameters.state[first].clone()
            accepted = torch.tensor([request.accepted], dtype=torch.int32)
            rows = torch.tensor([0], dtype=torch.int32)
            ops.replay_fold(*held, got, rows, num_accepted_tokens=accepted, backend="reference")
            got = got[0]
        assert_close("state", got, state, CLOSE)
        window = self.parameters.conv_state[request.rows[0], :, last : last + W - 1]
        assert torch.equal(window, history)

    def normalised(self, x: Tensor, z: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.norm_weight
        return y * torch.nn.functional.silu(z)


@pytest.fixture(params=WORLDS)
def world(request: pytest.FixtureRequest) -> World:
    generator = torch.Generator().manual_seed(7)
    shape = Shape(
        "float32", "float32", HK, HV, K, V, W, spec_tokens=SPEC, checkpoints=True, null_index=0, padding="scratch"
    )
    backend, _, kind = request.param.partition(", ")
    replay = SLOTS if kind == "replay" else 0
    shape = replace(shape, replay=replay)
    selection = select(probe("cpu"), shape.problems(), dict.fromkeys(PHASES, backend))
    width = W - 1 + SPEC - 1
    sizes = [(width, DIM), (HV, V, K)]
    sizes += [(SLOTS, HK, K), (SLOTS, HV, V), (SLOTS, HV), (HK, 2)] if replay else []
    ends = [0, *itertools.accumulate(map(math.prod, sizes))]
    pages = torch.full((ROWS, ends[-1] + 96), float("nan"))
    conv_state, state, *ring = (
        pages[:, start:end].unflatten(1, size) for start, end, size in zip(ends, ends[1:], sizes, strict=False)
    )
    parameters = Parameters(
        conv_weight=torch.randn(DIM, W, generator=generator) * 0.5,
        conv_bias=None,
        A_log=torch.randn(HV, generator=generator) * 0.5,
        dt_bias=torch.randn(HV, generator=generator),
        conv_state=conv_state.transpose(1, 2),
        state=state,
        ring=Ring(*ring[:3], ring[3].view(torch.int32)) if replay else None,
    )
    norm_weight = 1 + 0.1 * torch.randn(V, generator=generator)
    return World(Core(shape, selection), parameters, norm_weight, generator, pages, kind == "interleaved")


def test_prefill_then_decode(world: World) -> None:
    first, second = world.request([3], 90), world.request([5], 40)
    world.step(Step([Row(first, 65), Row(second, 1)]))
    world.step(Step([Row(first, 1), Row(second, 1)]))
    world.step(Step([Row(first, 1), Row(second, 1)]))


def test_a_prompt_in_chunks_beside_decodes(world: World) -> None:
    old, new = world.request([2], 30), world.request([7], 200)
    world.step(Step([Row(old, 9)]))
    for count in (64, 3, 70, 1, 20):
        world.step(Step([Row(old, 1), Row(new, count)]))


def test_a_recycled_row_starts_from_nothing(world: World) -> None:
    world.step(Step([Row(world.request([4], 40), 33)]))
    world.step(Step([Row(world.request([4], 40), 2)]))  # the same row, a new request, shorter than the convolution


def test_the_norm_goes_with_every_part(world: World) -> None:
    one, two, three = (world.request([row], 120) for row in (1, 2, 3))
    world.step(Step([Row(one, 7), Row(two, 66)]), norm=True)
    world.step(Step([Row(one, 1), Row(two, 1), Row(three, 70)]), norm=True)
    world.step(Step([Row(one, 1), Row(two, 1), Row(three, 1)]), norm=True)


@pytest.mark.parametrize(
    ("length", "drafts"), [(length, drafts) for length in (1, 2, 3) for drafts in range(SPEC + 1 - length)]
)
def test_a_prompt_with_drafts_behind_it_starts_from_nothing(world: World, length: int, drafts: int) -> None:
    """The host makes a speculative row of a short prompt that joins a running batch; its rows hold anything."""
    old = world.request([1, 2, 3, 4], 60)
    world.step(Step([Row(old, 5)]))
    for rows in ([5, 6, 7, 8], [9, 10, 11, 12]):  # rows of nobody, and then rows that another request leaves behind
        for pools in (world.parameters.state, world.parameters.conv_state):
            pools[rows] = float("nan")
        if world.parameters.ring is not None:
            world.parameters.ring.span[rows] = torch.tensor([3, 4], dtype=torch.int32)  # what somebody might leave
        new = world.request(rows, 30)
        world.step(Step([Row(old, 2, 2), Row(new, length, drafts)]), norm=True)
        world.step(Step([Row(old, 1, 3), Row(new, 3, 1)]), norm=True)
        again = world.request(rows, 30)
        beside = world.request([13], 20)
        world.step(Step([Row(old, 2, 0), Row(again, length, drafts), Row(beside, 9)]), norm=True)
        world.step(Step([Row(old, 2, 0), Row(again, 2, 2)], pad_requests=1), norm=True)


def test_padding_rows_touch_nothing(world: World) -> None:
    one, two = world.request([6], 30), world.request([8], 30)
    world.step(Step([Row(one, 5), Row(two, 6)], pad_tokens=2))
    used = torch.zeros(ROWS, dtype=torch.bool)
    used[[6, 8]] = True
    before = world.pages[~used].clone()
    world.step(Step([Row(one, 1), Row(two, 1)], pad_requests=3, pad_tokens=3))
    assert torch.equal(bits(world.pages[~used]), bits(before))


@pytest.mark.parametrize("size", CAPTURED_SIZES)
def test_padded_decodes_leave_real_rows_as_they_are(world: World, size: int) -> None:
    """Every size that the host captures a graph of: whatever padding holds, real rows get the same bits.

    Also the bits of the unpadded batch, where a backend's own kernel takes each row by itself; PyTorch's matmuls round
    by the size of the batch.
    """
    count = max(1, size - 3)
    requests = [world.request([row + 1], 2) for row in range(count)]
    for request in requests:
        request.done = 1
    start = torch.randn(world.pages.shape, generator=world.generator)
    if world.parameters.ring is not None:
        world.pages.copy_(start)
        world.parameters.ring.span.copy_(torch.tensor([SLOTS - 1, 3], dtype=torch.int32).expand(ROWS, HK, 2))
        start = world.pages.clone()
    x, a, b, z = (world.randn(size, width) for width in (DIM, HV, HV, HV * V))

    def run(padding: int, filler: float) -> tuple[Tensor, Tensor]:
        world.pages.copy_(start)
        for tensor in (x, a, b, z):
            tensor[count:] = filler
        step = Step([Row(request, 1) for request in requests], pad_requests=padding, pad_tokens=padding)
        n = count + padding
        out = torch.zeros(n, HV, V)
        batch = batch_of(build_metadata(step, SPEC), W - 1)
        world.run(batch, x[:n], z[:n].unflatten(1, (HV, V)), a[:n], b[:n], out)
        return out[:count], world.pages.clone()

    alone, padded, poisoned = run(0, 0.0), run(size - count, 1.0), run(size - count, float("nan"))
    assert torch.isfinite(alone[0]).all() and not torch.equal(alone[1], start)
    native = world.core.selection.backends().get("fused_decode") == "cpu"
    for of_alone, of_padded, of_poisoned in zip(alone, padded, poisoned, strict=True):
        assert torch.equal(bits(of_padded), bits(of_poisoned))
        assert torch.equal(bits(of_alone), bits(of_padded)) or not native
        assert_close("padded", of_padded, of_alone, CLOSE)
    untouched = [0, *range(count + 1, ROWS)]  # the null block, which padding names, and rows of nobody
    assert torch.equal(bits(poisoned[1][untouched]), bits(start[untouched]))


@pytest.mark.parametrize("norm", [False, True], ids=["core", "norm"])
def test_ragged_acceptance_and_rollback(world: World, norm: bool) -> None:
    one, two = world.request([1, 2, 3, 4], 60), world.request([5, 6, 7, 8], 60)
    world.step(Step([Row(one, 10), Row(two, 3)]), norm)
    # right tokens and wrong drafts of each: all wrong, some right, all right, no drafts at all
    for first, second in (((1, 3), (2, 2)), ((4, 0), (1, 0)), ((2, 1), (3, 1)), ((1, 0), (4, 0)), ((1, 3), (1, 3))):
        world.step(Step([Row(one, *first), Row(two, *second)]), norm)


@pytest.mark.parametrize("norm", [False, True], ids=["core", "norm"])
def test_speculative_rows_beside_prefills(world: World, norm: bool) -> None:
    one, two = world.request([1, 2, 3, 4], 60), world.request([5, 6, 7, 8], 60)
    late, later = world.request([9, 10, 11, 12], 90), world.request([13, 14, 15, 16], 20)
    world.step(Step([Row(one, 5), Row(two, 8)]), norm)
    world.step(Step([Row(one, 2, 2), Row(late, 65), Row(two, 1, 3)]), norm)
    world.step(Step([Row(one, 1, 1), Row(late, 5), Row(two, 4, 0), Row(later, 1)]), norm)
    world.step(Step([Row(one, 1, 0), Row(late, 1, 3), Row(two, 1, 0), Row(later, 2, 1)]), norm)


def test_speculative_padding(world: World) -> None:
    one = world.request([1, 2, 3, 4], 60)
    world.step(Step([Row(one, 5)]))
    before = world.pages[5:].clone()
    world.step(Step([Row(one, 3, 1)], pad_requests=2, pad_tokens=4), norm=True)
    assert torch.equal(bits(world.pages[5:]), bits(before))
    assert torch.isnan(world.pages[0]).all()


@pytest.mark.parametrize("beside", ["alone", "decodes", "speculative"])
def test_checkpoints_are_what_a_shorter_prompt_leaves(world: World, beside: str) -> None:
    old = world.request([1, 2, 3, 4], 40)
    world.step(Step([Row(old, 6)]))
    plain, kept, deep = world.request([10], 40), world.request([11], 200), world.request([12], 300)
    rows = [Row(plain, 31), Row(kept, 150, checkpoint=(64, 20)), Row(deep, 260, checkpoint=(192, 21))]
    before = {"alone": [], "decodes": [Row(old, 1)], "speculative": [Row(old, 2, 1)]}[beside]
    world.step(Step(before + rows))
    for request, length, row in ((kept, 64, 20), (deep, 192, 21)):
        _, state, history = world.truth_of(request, length)
        assert_close("checkpoint", world.parameters.state[row], state, CLOSE)
        assert torch.equal(world.parameters.conv_state[row, :, : W - 1], history)
        if world.parameters.ring is not None:
            assert not world.parameters.ring.span[row].any()
    # and a request that finds the checkpoint goes on from it
    again = Request([20], kept.x, kept.a, kept.b, done=64)
    world.step(Step([Row(again, 50)]))


@pytest.mark.parametrize("world", ["torch, replay"], indirect=True)
def test_a_state_is_written_where_the_ring_is_full_and_nowhere_else(world: World) -> None:
    request = world.request([3], 60)
    world.step(Step([Row(request, 9)]))
    ring = world.parameters.ring
    assert ring is not None
    written = []
    for _ in range(2 * SLOTS):
        before = world.parameters.state[3].clone()
        world.step(Step([Row(request, 1)]))
        written.append(not torch.equal(before, world.parameters.state[3]))
    # Room is kept for a step with drafts, which may follow: n + 2 * SPEC > SLOTS with one update in it.
    assert written == [False] + [True] * (2 * SLOTS - 1)


@pytest.mark.parametrize("world", ["torch, replay"], indirect=True)
@pytest.mark.parametrize("lost", ["the fold", "its ring"])
def test_a_prefill_behind_decodes_needs_the_fold(world: World, lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: without it the next chunk starts from a state that is some tokens old."""
    request = world.request([3], 60)
    world.step(Step([Row(request, 9)]))
    world.step(Step([Row(request, 1)]))

    def skipped(ring_k: Tensor, ring_u: Tensor, ring_g: Tensor, span: Tensor, state: Tensor, rows: Tensor, **_: object):
        if lost == "its ring":
            span[rows.long()] = 0

    monkeypatch.setattr(ops, "replay_fold", skipped)
    with pytest.raises(AssertionError):
        world.step(Step([Row(request, 20)]))
        monkeypatch.undo()
        world.step(Step([Row(request, 1)]))
