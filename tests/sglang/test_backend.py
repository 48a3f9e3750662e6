"""The backend over many steps of a miniature SGLang, against one pass of the recurrence over each request's stream."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from gdn_plugin import ops
from gdn_plugin.hosts import core, warm_up
from gdn_plugin.registry import NoBackendError
from gdn_plugin.settings import SettingsError
from tests.sglang import fakes
from tests.sglang.fakes import DIM, HK, HV, SLOTS, K, Row, Step, V, W, decode, extend
from tests.support.checks import assert_close, bits
from tests.tolerances import tolerance

CLOSE = tolerance("prefill", torch.float32, torch.float32)
Start = Callable[..., Any]


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GDN_PLUGIN_BACKEND", "GDN_PLUGIN_DISABLE", "GDN_PLUGIN_DEBUG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Start:
    """start(backend, ...) -> the plugin's backend as SGLang builds it."""

    def start(name: str = "torch", runner: Any = None, **host: Any) -> Any:
        fakes.install(monkeypatch, **host)
        monkeypatch.setattr(warm_up, "Finalize", lambda *_, **__: None)  # which would tell of this process, at its end
        monkeypatch.setenv("GDN_PLUGIN_BACKEND", name)
        core.log_once.cache_clear()  # as in a fresh process
        core.resolve.cache_clear()
        module = importlib.import_module("gdn_plugin.hosts.sglang.backend")
        return module.GdnPluginBackend(runner or fakes.runner())

    return start


@dataclass
class Request:
    slot: int
    x: Tensor
    a: Tensor
    b: Tensor
    done: int = 0


@dataclass
class World:
    """A layer, its pools full of NaN, and what the recurrence says of each request."""

    backend: Any
    layer: Any
    owned: set[int] = field(default_factory=lambda: {0})
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(3))

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def request(self, slot: int, length: int) -> Request:
        self.owned.add(slot)
        return Request(slot, self.randn(length, DIM), self.randn(length, HV), self.randn(length, HV))

    def truth(self, request: Request, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """(out, state, last W-1 inputs) after so many tokens."""
        state, conv = torch.zeros(2, HV, V, K), torch.zeros(2, DIM, W - 1)
        index, starts = torch.tensor([1], dtype=torch.int32), torch.tensor([0, length], dtype=torch.int32)
        fresh = torch.tensor([False])
        q, k, v, g, beta = ops.conv_prologue(
            request.x[:length], self.layer.conv_weights, None, conv, index, starts, fresh, request.a[:length],
            request.b[:length], self.layer.A_log, self.layer.dt_bias, num_k_heads=HK, head_k_dim=K, head_v_dim=V,
            backend="reference",
        )  # fmt: skip
        out = ops.prefill(
            q, k, v, g, beta, state, index, starts, has_initial_state=fresh, use_qk_l2norm=False, backend="reference"
        )
        return out, state[1], conv[1]

    def inputs(self, requests: list[Request], counts: list[int], padding: int) -> tuple[Tensor, Tensor, Tensor]:
        """x, a, b of a step, behind them NaN for padding; x is a slice of a projection."""
        takes = [slice(r.done, r.done + n) for r, n in zip(requests, counts, strict=True)]
        pieces = []
        for name in ("x", "a", "b"):
            piece = [getattr(r, name)[take] for r, take in zip(requests, takes, strict=True)]
            pieces.append(torch.cat([*piece, torch.full((padding, piece[0].shape[1]), float("nan"))]))
        wide = torch.cat([pieces[0], self.randn(len(pieces[0]), HV * V)], 1)
        return wide[:, :DIM], pieces[1], pieces[2]

    def run(
        self, step: Step, what: str, requests: list[Request], counts: list[int], padding: int = 0, **kw: Any
    ) -> Any:
        """A step: what it gives for real tokens is right, padding's rows are zero, no other slot is touched."""
        x, a, b = self.inputs(requests, counts, padding)
        pools = self.backend.req_to_token_pool
        before = pools.conv.clone(), pools.temporal.clone()
        self.backend.forward_metadata = step.metadata
        got = getattr(self.backend, what)(self.layer, step.batch, x, a, b, **kw)
        out = got[0]
        assert got.shape == (1, len(x), HV, V)
        assert not out[len(x) - padding :].any(), "padding's rows must be zero, whatever they held"
        at = 0
        for request, count in zip(requests, counts, strict=True):
            request.done += count
            want, state, history = self.truth(request, request.done)
            assert_close("out", out[at : at + count], want[request.done - count :], CLOSE)
            at += count
            self.check(request.slot, state, history)
        untouched = [slot for slot in range(SLOTS) if slot not in self.owned]
        for pool, was in zip((pools.conv, pools.temporal), before, strict=True):
            assert torch.equal(bits(pool[:, untouched]), bits(was[:, untouched]))
        return got

    def check(self, slot: int, state: Tensor, history: Tensor) -> None:
        pools = self.backend.req_to_token_pool
        assert_close("state", pools.temporal[0, slot], state, CLOSE)
        assert torch.equal(pools.conv[0, slot], history)

    def extend(
        self, requests: list[Request], counts: list[int], keep: dict[int, tuple[int, int]] | None = None
    ) -> None:
        rows = [
            Row(r.slot, r.done, n, (keep or {}).get(i)) for i, (r, n) in enumerate(zip(requests, counts, strict=True))
        ]
        self.owned |= {slot for _, slot in (keep or {}).values()}
        self.run(extend(rows), "forward_extend", requests, counts)

    def decode(self, requests: list[Request], padding: int = 0, null: int = -1) -> None:
        step = decode([r.slot for r in requests], padding, null)
        self.run(step, "forward_decode", requests, [1] * len(requests), padding)


@pytest.fixture(params=["torch", "cpu", "reference"])
def world(request: pytest.FixtureRequest, start: Start) -> World:
    return World(start(request.param), fakes.layer())


def test_extend_then_decode(world: World) -> None:
    first, second = world.request(3, 90), world.request(SLOTS - 1, 40)
    world.extend([first, second], [65, 1])
    for _ in range(3):
        world.decode([first, second])
    assert world.backend.kept == [0, 0, 0] and not world.backend.left


def test_a_prompt_in_chunks_with_decodes_in_the_same_step(world: World) -> None:
    """SGLang's mixed chunk: a decode is a sequence of one token."""
    running, prompt = world.request(2, 90), world.request(4, 150)
    world.extend([running], [30])
    for count in (64, 37, 40):
        world.extend([prompt, running], [count, 1])
    world.decode([running, prompt])


def test_states_are_kept_for_the_prefix_cache_and_continued_from(world: World) -> None:
    prompt, other = world.request(2, 200), world.request(3, 130)
    world.extend([prompt, other], [150, 70], keep={0: (150, 7), 1: (70, 8)})
    for slot, request, length in ((7, prompt, 128), (8, other, 64)):
        _, state, history = world.truth(request, length)
        world.check(slot, state, history)
    # A hit: the kept state is copied to a slot of the new request's own, which computes the rest.
    pools = world.backend.req_to_token_pool
    again = Request(5, prompt.x, prompt.a, prompt.b, done=128)
    world.owned.add(5)
    for pool in (pools.conv, pools.temporal):
        pool[:, 5] = pool[:, 7]
    world.extend([again], [30])


def test_the_end_of_an_aligned_extend_is_kept_too(world: World) -> None:
    prompt = world.request(2, 300)
    world.extend([prompt], [70])
    world.extend([prompt], [128], keep={0: (70 + 128, 6)})
    _, state, history = world.truth(prompt, 70 + 128)
    world.check(6, state, history)


@pytest.mark.parametrize("null", [-1, 0], ids=["replayed", "eager"])
def test_padding(world: World, null: int) -> None:
    first, second = world.request(1, 20), world.request(6, 20)
    world.extend([first, second], [5, 3])
    world.decode([first, second], padding=3, null=null)
    world.decode([first], padding=1, null=null)


def test_a_slot_is_recycled(world: World) -> None:
    world.extend([world.request(3, 40)], [40])
    world.extend([world.request(3, 40)], [1])


def test_the_pair_of_qwen3_5(world: World) -> None:
    """(qkvz, ba), which lie side by side in one projection: out and z."""
    request = world.request(3, 10)
    world.extend([request], [4])
    x, a, b = world.inputs([request], [1], 0)
    z = world.randn(1, HV, V)
    fused = torch.cat([x, z.flatten(1), b, a], 1)
    step = decode([3])
    world.backend.forward_metadata = step.metadata
    pair = fused[:, : DIM + HV * V], fused[:, DIM + HV * V :]
    out, gate = world.backend.forward_decode(world.layer, step.batch, pair, pair[1], pair[1])
    assert torch.equal(gate, z)
    assert_close("out", out[0], world.truth(request, 5)[0][4:], CLOSE)


def test_the_hosts_output_is_written(world: World) -> None:
    request = world.request(3, 10)
    given = torch.full((1, 16, HV, V), float("nan"))
    got = world.run(extend([Row(3, 0, 6)]), "forward_extend", [request], [6], linear_attn_output=given[:, :6])
    assert got.data_ptr() == given.data_ptr() and given[:, 6:].isnan().all()


def test_tokens_behind_the_sequences_are_padding(world: World) -> None:
    request = world.request(3, 10)
    world.run(extend([Row(3, 0, 6)]), "forward_extend", [request], [6], padding=5)


def test_idle_batches(world: World) -> None:
    empty = torch.empty(0, DIM), torch.empty(0, HV), torch.empty(0, HV)
    step = extend([Row(0, 0, 0)])
    for what in ("forward_extend", "forward_decode"):
        world.backend.forward_metadata = step.metadata
        assert getattr(world.backend, what)(world.layer, step.batch, *empty).shape == (1, 0, HV, V)
    assert world.backend.req_to_token_pool.temporal.isnan().all()


def test_what_is_left_to_the_host(start: Start) -> None:
    world = World(start(), fakes.layer())
    x, a, b = world.inputs([world.request(3, 9)], [4], 0)
    step = extend([Row(3, 0, 4)], speculative=True)
    world.backend.forward_metadata = step.metadata
    assert world.backend.forward_extend(world.layer, step.batch, x, a, b) == "the host's"  # target_verify
    step = extend([Row(3, 0, 4)])
    world.backend.forward_metadata, world.backend.mis_metadata = step.metadata, object()
    assert world.backend.forward_extend(world.layer, step.batch, x, a, b) == "the host's"  # multi-item scoring
    step = decode([3])
    step.metadata.replayssm_write_pos = torch.zeros(1)
    world.backend.forward_metadata = step.metadata
    assert world.backend.forward_decode(world.layer, step.batch, x[:1], a[:1], b[:1]) == "the host's"
    assert world.backend.left == ["extend", "extend", "decode"]
    assert not world.backend.supports_prefill_graph_extend()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"activation": "gelu"}, "activation is 'gelu'"),
        ({"lower_bound": -5.0}, "bounded from below by -5.0"),
        ({"num_q_heads": 2 * HK}, "its heads are (4, 64), (2, 64) and (4, 64)"),
        ({"A_log": torch.zeros(HV, dtype=torch.bfloat16)}, "A_log is bfloat16"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_layer_that_the_ops_cannot_serve(
    start: Start, caplog: pytest.LogCaptureFixture, changed: dict[str, Any], said: str
) -> None:
    world = World(start(), fakes.layer(**changed))
    step = decode([3])
    world.backend.forward_metadata = step.metadata
    for _ in range(2):
        got = world.backend.forward_decode(world.layer, step.batch, torch.zeros(1, DIM), *[torch.zeros(1, HV)] * 2)
        assert got == "the host's"
    lines = [record.getMessage() for record in caplog.records if "left to SGLang" in record.getMessage()]
    assert len(lines) == 1 and said in lines[0]


def _strided() -> Any:
    made = fakes.runner()
    pool = made.req_to_token_pool
    pool.mamba_pool.mamba_cache.temporal = pool.temporal.transpose(-1, -2)
    return made


@pytest.mark.parametrize(
    ("runner", "host", "said"),
    [
        (fakes.runner, {"amx": True}, "AMX"),
        (fakes.runner, {"deterministic": True}, "--enable-deterministic-inference"),
        (lambda: fakes.runner(state_dtype=torch.float64), {}, "the state is float64"),
        (_strided, {}, "a form that the plugin does not know"),
    ],
    ids=["amx", "deterministic", "state", "pool"],
)
def test_a_model_that_the_ops_cannot_serve(
    start: Start, caplog: pytest.LogCaptureFixture, runner: Any, host: dict[str, bool], said: str
) -> None:
    backend = start(runner=runner(), **host)
    step = decode([3])
    backend.forward_metadata = step.metadata
    assert backend.forward_decode(fakes.layer(), step.batch, torch.zeros(1, DIM), None, None) == "the host's"
    lines = [record.getMessage() for record in caplog.records if "left to SGLang" in record.getMessage()]
    assert len(lines) == 1 and said in lines[0]


def test_a_stage_without_gdn_layers(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    assert start(runner=fakes.runner(layers=0))._gdn_core is None and not caplog.records


def test_the_shape_is_that_of_the_pools(start: Start) -> None:
    shape = start(runner=fakes.runner(3, torch.bfloat16, torch.bfloat16))._gdn_core.shape
    assert (shape.num_k_heads, shape.num_v_heads, shape.head_k_dim, shape.head_v_dim) == (HK, HV, K, V)
    assert (shape.conv_width, shape.dtype, shape.state_dtype) == (W, "bfloat16", "bfloat16")
    assert (shape.null_index, shape.padding, shape.padded_pool, shape.checkpoints) == (0, "scratch", False, True)
    assert "gated_norm" not in shape.problems() and "verify" not in shape.problems()


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("GDN_PLUGIN_BACKEND", "tritom", SettingsError),
        ("GDN_PLUGIN_DECODE_BAKEND", "torch", SettingsError),
        ("GDN_PLUGIN_DISABLE", "perhaps", SettingsError),
        ("GDN_PLUGIN_PREFILL_BACKEND", "flashinfer", NoBackendError),
    ],
)
def test_a_wrong_setting_stops_the_server(
    start: Start, monkeypatch: pytest.MonkeyPatch, name: str, value: str, error: type[Exception]
) -> None:
    """Even where the model is left to the host: but for what cannot run, which is then not asked for."""
    monkeypatch.setenv(name, value)
    with pytest.raises(error):
        start(value if name == "GDN_PLUGIN_BACKEND" else "torch")
    if error is SettingsError:
        with pytest.raises(error):
            start(value if name == "GDN_PLUGIN_BACKEND" else "torch", deterministic=True)


def test_everything_is_compiled_when_the_backend_is_built(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, bool]] = []

    def compiled(problem: Any, backend: str, device: str, pool: Tensor | None = None) -> None:
        asked.append((problem.op, pool is not None))

    monkeypatch.setattr(warm_up, "_done", set())
    monkeypatch.setattr(ops, "warm_up", compiled)
    backend = start()
    reached = set(backend._gdn_core.shape.problems()) - {"decode"}  # a step of decode is one launch of fused_decode
    assert sorted(asked) == sorted((op, of_pool) for op in reached for of_pool in (False, True))


def test_the_choice_is_logged_once(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sglang.gdn_plugin"):
        start("reference")
    lines = [record.getMessage() for record in caplog.records if record.name == "sglang.gdn_plugin"]
    assert [line for line in lines if line.startswith("gdn_plugin: prefill: reference")]
    assert len(lines) == len(set(lines))
