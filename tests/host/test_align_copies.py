"""States moved between cache blocks: they go on as they would have, and the host's kernels are replaced once."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gdn_plugin import ops
from gdn_plugin.hosts.vllm import compat
from gdn_plugin.hosts.vllm.patches import align_copies, replay_pages
from tests.support import moves
from tests.support.moves import BLOCK_SIZE, DIM, KEY_HEADS, VALUE_HEADS, World, ring_parts, world

FP32 = torch.float32
CHANNELS = (2 * KEY_HEADS + VALUE_HEADS) * DIM
DRAFTS = 3
needs_vllm = pytest.mark.skipif(compat.installed_root() is None, reason="vLLM is not installed")


def begun() -> World:
    """One sequence whose state is in column 1, its ring not empty; every number is finite."""
    made = world(ring=True, dim_first=True, dtype=FP32, state_dtype=FP32, sequences=1, seed=5)
    for layer in made.layers:
        conv, state, ring = layer.kv_cache
        generator = torch.Generator().manual_seed(6)
        conv.copy_(torch.randn(conv.shape, generator=generator))
        state.copy_(torch.randn(state.shape, generator=generator))
        ring.zero_()
        for accepted in (1, 2):
            verify(made, column=1, accepted=accepted, seed=accepted)
    return made


def verify(there: World, *, column: int, accepted: int, seed: int) -> Tensor:
    """A step of the first layer with three drafts, in the row of a column."""
    conv, state, words = there.layers[0].kv_cache
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    ring = replay_pages.ring_of(words, ring_parts(FP32, FP32))
    weight, A_log, dt_bias = (torch.full(shape, 0.3) for shape in ((CHANNELS, 4), (VALUE_HEADS,), (VALUE_HEADS,)))
    count = DRAFTS + 1
    return ops.replay_verify(
        normal(count, CHANNELS), weight, None, conv, normal(count, VALUE_HEADS), normal(count, VALUE_HEADS), A_log,
        dt_bias, state, *ring, there.tables[0][:, column].contiguous(), torch.tensor([accepted], dtype=torch.int32),
        torch.tensor([0, count], dtype=torch.int32), num_k_heads=KEY_HEADS, head_k_dim=DIM, head_v_dim=DIM,
        backend="reference",
    )  # fmt: skip


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def enter_the_next_block(there: World, bias: int) -> dict[str, Any]:
    step = {"mamba_state_idx_ptr": ints(2), "src_col_ptr": ints(1), "token_bias_ptr": ints(bias)}
    return there.call | step | {"idx_mapping_ptr": ints(0), "num_reqs": 1}


def reach_the_end(there: World, bias: int, *, behind: int) -> dict[str, Any]:
    """A step that ran in column 1, of which bias + 1 tokens reach its end, and `behind` more were accepted."""
    accepted = bias + 1 + behind
    return there.call | {
        "mamba_state_idx_ptr": ints(1), "num_accepted_tokens_ptr": ints(accepted),
        "num_accepted_tokens_out_ptr": ints(accepted), "num_computed_tokens_ptr": ints(2 * BLOCK_SIZE + behind),
        "num_scheduled_tokens_ptr": None, "num_draft_tokens_ptr": None, "block_size": BLOCK_SIZE,
        "idx_mapping_ptr": ints(0), "num_reqs": 1,
    }  # fmt: skip


@pytest.mark.parametrize("bias", range(DRAFTS + 1))
def test_a_page_goes_on_in_the_next_block(bias: int) -> None:
    stayed, went = begun(), begun()
    align_copies._before_on_cpu(enter_the_next_block(went, bias))
    expected = verify(stayed, column=1, accepted=bias + 1, seed=9)
    assert torch.equal(verify(went, column=2, accepted=1, seed=9), expected)
    assert not torch.equal(verify(begun(), column=1, accepted=(bias + 1) % 4 + 1, seed=9), expected)


@pytest.mark.parametrize("bias", range(DRAFTS + 1))
def test_a_page_stands_for_the_end_of_its_block(bias: int) -> None:
    stayed, there = begun(), begun()
    call = reach_the_end(there, bias, behind=0)
    align_copies._after_on_cpu(call)
    assert call["num_accepted_tokens_out_ptr"].tolist() == [1]
    expected = verify(stayed, column=1, accepted=bias + 1, seed=9)
    assert torch.equal(verify(there, column=1, accepted=1, seed=9), expected)


def test_a_step_that_ran_in_the_next_block_leaves_the_state_at_the_end_behind() -> None:
    """As where drafts reach into it: the row in column 1 goes on, that in column 0 is what the cache keeps."""
    there, stayed = begun(), begun()
    call = reach_the_end(there, 1, behind=1)
    call["num_computed_tokens_ptr"] = ints(BLOCK_SIZE + 1)  # the end of column 0, and one token more
    align_copies._after_on_cpu(call)
    assert call["num_accepted_tokens_out_ptr"].tolist() == [3]
    assert torch.equal(verify(there, column=0, accepted=1, seed=9), verify(stayed, column=1, accepted=2, seed=9))
    assert torch.equal(verify(there, column=1, accepted=3, seed=9), verify(begun(), column=1, accepted=3, seed=9))


def test_before_the_end_of_a_block_nothing_is_moved() -> None:
    there = begun()
    before = [pool.clone() for pool in there.pools]
    call = reach_the_end(there, 1, behind=0) | {"num_computed_tokens_ptr": ints(2 * BLOCK_SIZE - 1)}
    align_copies._after_on_cpu(call)
    align_copies._before_on_cpu(enter_the_next_block(there, 1) | {"src_col_ptr": ints(-1)})
    align_copies._before_on_cpu(enter_the_next_block(there, 1) | {"idx_mapping_ptr": ints(-1)})
    assert all(torch.equal(a, b) for a, b in zip(before, there.pools, strict=True))
    assert call["num_accepted_tokens_out_ptr"].tolist() == [2]


class Override:
    def __init__(self, kernel: Any, run: Any) -> None:
        self.kernel, self.run, self.arg_names = kernel, run, kernel.arg_names


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The host's module as the patch sees it."""

    class Context:
        is_initialized = False

        def initialize_from_forward_context(self, kv_cache_config: Any, forward_context: Any) -> None:
            self.is_initialized = True

    kernels = {name: SimpleNamespace(arg_names=[*names, "A"]) for name, names in align_copies._KERNELS.items()}
    made = SimpleNamespace(**kernels, MambaSpecDecodeGPUContext=Context)
    monkeypatch.setattr(align_copies, "_hosts_own", {})
    monkeypatch.setitem(sys.modules, align_copies._MODULE, made)
    monkeypatch.setitem(sys.modules, "vllm.triton_utils", SimpleNamespace(HAS_TRITON=False))
    monkeypatch.setitem(sys.modules, "vllm.triton_utils.dispatcher", SimpleNamespace(KernelOverride=Override))
    return made


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_the_hosts_kernels_are_replaced_once(host: SimpleNamespace, device_type: str) -> None:
    originals = [getattr(host, name) for name in align_copies._KERNELS]
    assert (
        align_copies.can_take_over(device_type)
        and align_copies.take_over(device_type)
        and not align_copies.take_over(device_type)
    )
    assert [getattr(host, name).kernel for name in align_copies._KERNELS] == originals
    initialize = host.MambaSpecDecodeGPUContext.initialize_from_forward_context
    align_copies.give_back()
    assert [getattr(host, name) for name in align_copies._KERNELS] == originals
    assert align_copies.take_over(device_type)
    assert host.MambaSpecDecodeGPUContext.initialize_from_forward_context is initialize


def test_a_cpu_with_triton_keeps_the_hosts_kernels(host: SimpleNamespace) -> None:
    sys.modules["vllm.triton_utils"].HAS_TRITON = True  # type: ignore[attr-defined]
    assert not align_copies.can_take_over("cpu") and not align_copies.take_over("cpu")
    assert align_copies.can_take_over("cuda")


def test_kernels_that_somebody_else_has_replaced_stay(host: SimpleNamespace) -> None:
    """Then nobody moves a page with a ring behind drafts, and replay must not be had there."""
    name = list(align_copies._KERNELS)[1]
    setattr(host, name, Override(getattr(host, name), None))
    before = dict(vars(host))
    assert not align_copies.can_take_over("cuda") and not align_copies.take_over("cuda")
    assert vars(host) == before


def test_kernels_given_back_are_compiled_when_they_are_taken_again(
    host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gdn_plugin.hosts.vllm import state_moves

    compiled: list[str] = []
    monkeypatch.setattr(align_copies, "_warm", set())
    monkeypatch.setattr(state_moves, "compile_variant", lambda name, ring: compiled.append(name))
    align_copies.warm_up("V2")
    assert not compiled  # the host's kernels are in their places
    align_copies.take_over("cuda")
    for _ in range(2):
        align_copies.warm_up("V2")
    assert compiled == list(state_moves.VARIANTS["V2"])


@pytest.mark.parametrize("change", ["gone", "other arguments", "no context"])
def test_a_host_with_other_kernels_is_left_alone(host: SimpleNamespace, change: str) -> None:
    name = next(iter(align_copies._KERNELS))
    if change == "gone":
        delattr(host, name)
    elif change == "other arguments":
        getattr(host, name).arg_names.insert(1, "another_ptr")
    else:
        del host.MambaSpecDecodeGPUContext
    before = dict(vars(host))
    for device_type in ("cpu", "cuda"):
        assert not align_copies.can_take_over(device_type) and not align_copies.take_over(device_type)
    assert vars(host) == before


def test_states_of_pages_with_a_ring_are_marked_when_the_host_knows_them(host: SimpleNamespace) -> None:
    """Once; and those of a layer without a ring stay as they are."""
    align_copies.take_over("cpu")
    layers = [world(ring=ring, dim_first=False, dtype=FP32, state_dtype=FP32, sequences=1, seed=1).layers[0]
              for ring in (True, False)]  # fmt: skip
    states = [view for layer in layers for view in layer.kv_cache]
    context = host.MambaSpecDecodeGPUContext()
    context.state_base_addrs = torch.tensor([view.data_ptr() for view in states])
    context.state_conv_widths = ints(6, 0, 0, 6, 0)
    context.state_dim_row_count, context.state_dim_row_stride = ints(0, 0, 0, 0, 0), torch.zeros(5, dtype=torch.int64)
    forward_context = {str(i): layer for i, layer in enumerate([*layers, SimpleNamespace()])}
    context.initialize_from_forward_context(None, forward_context)
    assert context.state_conv_widths.tolist() == [6, align_copies.WHOLE, align_copies.RING, 6, 0]
    first, words = layers[0].gdn_ring_span
    assert context.state_dim_row_stride.tolist() == [0, 0, first, 0, 0] and words == 2 * KEY_HEADS
    assert context.state_dim_row_count.tolist() == [0, 0, words, 0, 0]
    context.state_conv_widths.zero_()
    context.initialize_from_forward_context(None, forward_context)
    assert not context.state_conv_widths.any()


class Recorder:
    """In the kernel's place: the types of a launch's arguments, by name."""

    def __init__(self) -> None:
        self.seen: list[dict[str, object]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda **arguments: self.warmup(grid=grid, **arguments)

    def warmup(self, *, grid: tuple[int, ...], **arguments: Any) -> None:
        self.seen.append({name: x.dtype if isinstance(x, Tensor) else type(x) for name, x in arguments.items()})


@pytest.mark.parametrize("kind", ["before", "after", "after, V1"])
def test_what_is_compiled_is_what_is_launched(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A dtype is all that a variant depends on."""
    from gdn_plugin.hosts.vllm import state_moves

    recorder = Recorder()
    monkeypatch.setattr(state_moves, "move_states_kernel", recorder)
    moves.moved(kind, 2, 1, "gpu", ring=True, dim_first=False, dtype=FP32, state_dtype=FP32)
    when, _, runner = kind.partition(", ")
    state_moves.compile_variant(f"{when} a step, {runner or 'V2'}", align_copies.RING)
    launched, compiled = recorder.seen
    assert launched == compiled


@needs_vllm
def test_the_host_that_is_installed_has_them() -> None:
    assert align_copies.can_take_over("cuda")


def test_what_the_tests_move_is_guarded() -> None:
    """The pools' outermost blocks belong to nobody."""
    there = world(ring=True, dim_first=False, dtype=FP32, state_dtype=FP32, sequences=2, seed=1)
    for pool, table in zip(there.pools, there.tables, strict=True):
        assert int(table[:, : moves.COLUMNS].min()) > 0 and int(table.max()) < len(pool) - 2


@needs_vllm
@pytest.mark.parametrize(("slots", "drafts", "stays"), [(0, 0, True), (0, 3, True), (16, 0, True), (16, 3, False)])
def test_a_kernel_that_cannot_be_compiled(
    monkeypatch: pytest.MonkeyPatch, slots: int, drafts: int, stays: bool
) -> None:
    """The host's move every page right but those with a ring behind drafts."""
    from gdn_plugin.hosts.vllm.layer import GdnPluginAttention

    def broken(runner: str) -> None:
        raise RuntimeError(f"no compiler for {slots} {drafts}")

    given_back = []
    monkeypatch.setattr(align_copies, "warm_up", broken)
    monkeypatch.setattr(align_copies, "give_back", lambda: given_back.append(True))
    layer: Any = SimpleNamespace(gdn_replay_slots=slots, num_spec=drafts, _gdn_runner="V2")
    if stays:
        GdnPluginAttention._warm_up_moves(layer)
    else:
        with pytest.raises(RuntimeError, match="no compiler"):
            GdnPluginAttention._warm_up_moves(layer)
    assert given_back == [True] * stays
