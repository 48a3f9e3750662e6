"""Changes to the host's own code: each is declared; the one that keeps users apart does so in every batch."""

from __future__ import annotations

import ast
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from gdn_plugin.hosts.vllm import compat, patches
from gdn_plugin.hosts.vllm.metadata import translate
from gdn_plugin.hosts.vllm.patches import align_copies, fresh_speculative_rows, replay_pages, unused_kernels
from gdn_plugin.hosts.vllm.patches.fresh_speculative_rows import has_initial_state, mark_fresh_rows, tell_fresh_rows

FILES = sorted(path for path in Path(patches.__file__).parent.glob("*.py") if path.stem != "__init__")
needs_vllm = pytest.mark.skipif(compat.installed_root() is None, reason="vLLM is not installed")


def test_every_patch_is_in_the_table() -> None:
    assert sorted(patches.PATCHES) == [path.stem for path in FILES]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_patch_says_what_it_changes_why_where_and_until_when(path: Path) -> None:
    said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    order = re.findall(r"^(Changes|Why|Versions|Retires):", said, re.MULTILINE)
    assert order == ["Changes", "Why", "Versions", "Retires"], said
    assert all(re.search(rf"^{word}: +\S.{{3,}}", said, re.MULTILINE) for word in order)


SPEC = 4


class FakeBuilder:
    """The host's class as the patch sees it; `stage` as under full CUDA graphs: metadata in buffers of the builder."""

    def __init__(self, stage: bool) -> None:
        self.vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=8))
        self.decode_cudagraph_max_bs = 6
        self.stage = stage
        self.accepted = torch.full((8,), 99, dtype=torch.int32)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, accepted: Tensor, drafts: Tensor) -> Any:
        mask = drafts >= 0
        count = int(mask.sum())
        lengths = common_attn_metadata.query_start_loc_cpu.diff()
        alone = int(lengths[~mask].sum()) == 0
        kept = accepted[:count] if alone else accepted[mask]
        if alone and self.stage:
            self.accepted[:count] = kept
            self.accepted[count : len(mask)] = 1
            kept = self.accepted[: len(mask)]
        return SimpleNamespace(
            num_spec_decodes=count, spec_sequence_masks_cpu=mask if count else None, num_accepted_tokens=kept
        )

    def update_block_table(self, metadata: Any, blk_table: Any, slot_mapping: Any) -> Any:
        fields = ("num_spec_decodes", "spec_sequence_masks_cpu", "num_accepted_tokens")
        return SimpleNamespace(**{name: getattr(metadata, name) for name in fields})


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeBuilder]]:
    class Builder(FakeBuilder):
        build = FakeBuilder.build
        update_block_table = FakeBuilder.update_block_table

    module = SimpleNamespace(GDNAttentionMetadataBuilder=Builder)
    monkeypatch.setitem(sys.modules, fresh_speculative_rows._MODULE, module)
    assert tell_fresh_rows() and not tell_fresh_rows()
    yield Builder


def step(builder: Any, rows: list[tuple[int, int, int, int]]) -> Any:
    """rows: (computed, tokens, accepted, drafts or -1)."""
    computed, tokens, accepted, drafts = (torch.tensor(column, dtype=torch.int32) for column in zip(*rows, strict=True))
    starts = torch.cat((torch.zeros(1, dtype=torch.int32), tokens.cumsum(0).int()))
    common = SimpleNamespace(query_start_loc_cpu=starts, seq_lens_cpu_upper_bound=computed + tokens)
    return builder.build(0, common, accepted, drafts)


@pytest.mark.parametrize("stage", [False, True], ids=["eager", "graphs"])
def test_fresh_rows_are_told_from_step_to_step(builder: type[FakeBuilder], stage: bool) -> None:
    made = builder(stage)
    first = step(made, [(9, 4, 2, 3), (20, 4, 4, 3)])
    assert has_initial_state(first).tolist() == [True, True]
    at = has_initial_state(first).data_ptr()
    # a prompt of one token with placeholder drafts, in a row whose number of accepted tokens is another request's
    second = step(made, [(11, 4, 3, 3), (0, 4, 3, 3), (24, 1, 2, 0)])
    assert has_initial_state(second).tolist() == [True, False, True]
    assert second.num_accepted_tokens.tolist() == [3, 1, 2]
    assert has_initial_state(second).data_ptr() == at  # where a captured graph reads
    third = step(made, [(12, 4, 1, 3), (1, 4, 1, 3), (25, 2, 2, 1)])
    assert has_initial_state(third).tolist() == [True, True, True]
    # rows of padding behind the real ones, as a graph of four is replayed
    fourth = step(made, [(12, 4, 1, 3), (0, 4, 2, 3), (0, 0, 1, -1), (0, 0, 1, -1)])
    assert has_initial_state(fourth).tolist() == [True, False] + [True, True] * stage
    assert fourth.num_accepted_tokens.tolist() == [1, 1] + [1, 1] * stage


def test_fresh_rows_between_prefills(builder: type[FakeBuilder]) -> None:
    metadata = step(builder(True), [(0, 30, 1, -1), (0, 4, 4, 3), (7, 2, 2, 1), (64, 9, 3, -1), (0, 1, 3, 0)])
    assert has_initial_state(metadata).tolist() == [False, True, False]
    assert metadata.num_accepted_tokens.tolist() == [1, 2, 1]


def test_other_groups_of_the_same_batch_share_the_fact(builder: type[FakeBuilder]) -> None:
    made = builder(True)
    metadata = step(made, [(9, 4, 2, 3), (0, 4, 2, 3)])
    other = builder(True).update_block_table(metadata, None, None)
    assert has_initial_state(other) is has_initial_state(metadata)


def test_batches_without_speculative_rows_are_left_alone(builder: type[FakeBuilder]) -> None:
    metadata = step(builder(True), [(0, 30, 1, -1), (64, 9, 3, -1)])
    assert has_initial_state(metadata) is None


def test_a_batch_that_does_not_say_is_refused() -> None:
    """Rather than served: it may hold another user's state."""
    from tests.host.steps import Request, Row, Step, build_metadata

    empty = torch.empty(0, 1)
    metadata = build_metadata(Step([Row(Request([1, 2, 3], empty, empty, empty, done=4), 1, 2)]), 3)
    assert translate(metadata, 3).spec.has_initial_state.tolist() == [True]
    setattr(metadata, fresh_speculative_rows._FACT, None)
    with pytest.raises(ValueError, match="which of them are fresh"):
        translate(metadata, 3)


@needs_vllm
def test_the_hosts_own_builder_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's builder as it is installed, on a batch of V1's making: two running requests and a prompt of one token."""
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.attention.backends import gdn_attn

    host = gdn_attn.GDNAttentionMetadataBuilder
    for name in ("build", "update_block_table"):
        original = getattr(host, name)
        monkeypatch.setattr(host, name, getattr(original, "__wrapped__", original))
    tell_fresh_rows()
    made = host.__new__(host)
    made.vllm_config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=4), cache_config=SimpleNamespace(mamba_cache_mode="none")
    )
    made.kv_cache_spec = SimpleNamespace(block_size=64, num_speculative_blocks=SPEC - 1)
    made.use_spec_decode, made.num_spec, made.use_full_cuda_graph, made.decode_cudagraph_max_bs = (
        True,
        SPEC - 1,
        True,
        16,
    )
    for name, shape in (
        ("spec_state_indices_tensor", (16, SPEC)), ("spec_token_indx", (64,)), ("non_spec_token_indx", (64,)),
        ("spec_query_start_loc", (17,)), ("num_accepted_tokens", (16,)),
    ):  # fmt: skip
        setattr(made, name, torch.zeros(shape, dtype=torch.int32))
    made.spec_sequence_masks = torch.zeros(16, dtype=torch.bool)
    starts = torch.tensor([0, 4, 8, 12, 12], dtype=torch.int32)
    lengths = torch.tensor([20, 4, 31, 0], dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=lengths, seq_lens_cpu_upper_bound=lengths,
        num_reqs=4, num_actual_tokens=16, max_query_len=4, max_seq_len=31,
        block_table_tensor=torch.arange(1, 4 * SPEC + 1, dtype=torch.int32).view(4, SPEC),
        slot_mapping=torch.zeros(16, dtype=torch.int64),
    )  # fmt: skip
    accepted = torch.tensor([2, 3, 4, 1], dtype=torch.int32)
    metadata = made.build(0, common, accepted, torch.tensor([3, 3, 3, -1], dtype=torch.int32))
    assert has_initial_state(metadata).tolist() == [True, False, True, True]
    assert metadata.num_accepted_tokens.tolist() == [2, 1, 4, 1]
    part = translate(metadata, 3).spec
    assert part.has_initial_state.tolist() == [True, False, True] and part.state_indices.shape == (3, SPEC)
    shared = made.update_block_table(metadata, common.block_table_tensor + 100, common.slot_mapping)
    assert has_initial_state(shared) is has_initial_state(metadata)


class BatchReqState(NamedTuple):
    """What Model Runner V2 says of a step's rows, as far as the patch reads it."""

    num_scheduled_tokens: Any
    num_draft_tokens_np: Any
    num_computed_prefill_tokens_np: Any
    is_prefilling_np: Any
    prefill_runs_as_decode_np: Any


class FakeRunner:
    """The host's class as the patch sees it: only a prompt's tail of one token runs as a decode."""

    def gather_batch_req_state(self, rows: list[tuple[int, int, int, int]], dummy_run: bool) -> Any:
        if dummy_run:
            return None, 4
        computed, prompt, scheduled, drafts = map(np.array, zip(*rows, strict=True))
        prefilling = computed < prompt
        tails = prefilling & (scheduled - drafts == 1) & (computed > 0) if prefilling.any() else None
        drafted = drafts if drafts.any() else None
        return BatchReqState(scheduled, drafted, np.minimum(computed, prompt), prefilling, tails), None


class Recurrent:
    """A layer with a state, which is the plugin's or not."""

    mamba_type = "gdn"

    def __init__(self, core: Any = True) -> None:
        self._gdn_core = core


# (computed, prompt, scheduled, drafts); the last column: whether it is to run as a decode.
ROWS = {
    "running": ((9, 3, 4, 3), False),
    "a prompt of one, padded": ((0, 1, 4, 3), True),
    "a tail of one, padded": ((6, 7, 4, 3), True),
    "a prompt of one, alone": ((0, 1, 1, 0), False),
    "a tail of one": ((6, 7, 1, 0), True),
    "a prompt of four": ((0, 4, 4, 0), False),
}
ALL_ROWS = [row for row, _ in ROWS.values()]
BY_THE_HOST = [False, False, True, False, True, False]


def runner_of(kind: type[Any], *layers: Any, **facts: Any) -> Any:
    context = {f"layers.{i}": layer for i, layer in enumerate(layers)}
    runner = kind.__new__(kind)
    runner.vllm_config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=context))
    vars(runner).update({"adaptive_verification": None} | facts)
    return runner


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> type[FakeRunner]:
    class Runner(FakeRunner):
        pass

    module = SimpleNamespace(GPUModelRunner=Runner, BatchReqState=BatchReqState)
    monkeypatch.setitem(sys.modules, fresh_speculative_rows._RUNNER_MODULE, module)
    fresh_speculative_rows.log_once.cache_clear()
    assert mark_fresh_rows() and not mark_fresh_rows()
    return Runner


def marks(runner: Any, rows: list[tuple[int, int, int, int]] = ALL_ROWS) -> Any:
    marked = runner.gather_batch_req_state(rows, False)[0].prefill_runs_as_decode_np
    return None if marked is None else marked.tolist()


def test_padded_prompts_of_one_token_run_as_decodes(runner: type[FakeRunner]) -> None:
    made = runner_of(runner, SimpleNamespace(), Recurrent(), Recurrent())
    assert marks(made) == [wanted for _, wanted in ROWS.values()]
    assert marks(made, [(0, 1, 1, 0), (0, 9, 9, 0), (6, 7, 1, 0)]) == [False, False, True]  # no drafts
    assert marks(made, [(9, 3, 4, 3), (5, 1, 4, 3)]) is None  # no prompts
    assert made.gather_batch_req_state(ALL_ROWS, dummy_run=True) == (None, 4)


@pytest.mark.parametrize(
    ("layers", "facts", "said"),
    [
        ([Recurrent(), Recurrent(None)], {}, "layers.1 has a state and is not the plugin's"),
        ([Recurrent()], {"adaptive_verification": "on"}, "with adaptive verification"),
        ([Recurrent(None)], {}, None),
        ([SimpleNamespace()], {}, None),
    ],
    ids=["a-layer-left-to-the-host", "adaptive", "stock", "no-states"],
)
def test_padded_prompts_are_left_alone_where_a_layer_may_not_start_from_zero(
    runner: type[FakeRunner], caplog: pytest.LogCaptureFixture, layers: Any, facts: Any, said: str | None
) -> None:
    made = runner_of(runner, *layers, **facts)
    with caplog.at_level(logging.WARNING, "vllm.gdn_plugin"):
        assert marks(made) == BY_THE_HOST and marks(made) == BY_THE_HOST
    assert len(caplog.messages) == (said is not None) and all(str(said) in line for line in caplog.messages)


def test_a_runner_that_is_not_there_or_not_known(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delitem(sys.modules, fresh_speculative_rows._RUNNER_MODULE, raising=False)
    fresh_speculative_rows.log_once.cache_clear()
    with caplog.at_level(logging.WARNING, "vllm.gdn_plugin"):
        assert not mark_fresh_rows() and not caplog.messages  # V1
        other = SimpleNamespace(
            GPUModelRunner=FakeRunner, BatchReqState=NamedTuple("Other", [("is_prefilling_np", Any)])
        )
        for module in (other, SimpleNamespace(BatchReqState=BatchReqState)):
            monkeypatch.setitem(sys.modules, fresh_speculative_rows._RUNNER_MODULE, module)
            assert not mark_fresh_rows()
    assert [line.rpartition(" has no ")[2] for line in caplog.messages] == [
        "num_scheduled_tokens, num_draft_tokens_np, num_computed_prefill_tokens_np, prefill_runs_as_decode_np",
        "gather_batch_req_state",
    ]
    assert not hasattr(FakeRunner.gather_batch_req_state, "_gdn_plugin")


@needs_vllm
def test_the_hosts_own_runner_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's Model Runner V2 as it is installed, on the rows of `ROWS`; unmarked by itself, or the patch may retire."""
    from vllm.v1.worker.gpu import model_runner

    host = model_runner.GPUModelRunner
    original = getattr(host.gather_batch_req_state, "__wrapped__", host.gather_batch_req_state)
    monkeypatch.setattr(host, "gather_batch_req_state", original)
    computed, prompt = (np.array(column) for column in list(zip(*ALL_ROWS, strict=True))[:2])
    states = SimpleNamespace(
        req_id_to_index={name: i for i, name in enumerate(ROWS)},
        prefill_len=SimpleNamespace(np=prompt),
        num_computed_prefill_tokens=np.minimum(computed, prompt),
    )
    made = runner_of(host, Recurrent(), req_states=states, decode_query_len=4, use_pp=False, pcp_manager=None)
    step = SimpleNamespace(
        num_scheduled_tokens={name: row[2] for name, (row, _) in ROWS.items()},
        total_num_scheduled_tokens=sum(row[2] for row in ALL_ROWS),
        scheduled_spec_decode_tokens={name: [-1] * row[3] for name, (row, _) in ROWS.items() if row[3]},
    )

    def marked() -> dict[str, bool]:
        batch, _ = made.gather_batch_req_state(step, False)
        return dict(zip(batch.req_ids, batch.prefill_runs_as_decode_np.tolist(), strict=True))

    assert marked() == dict(zip(ROWS, BY_THE_HOST, strict=True))
    assert mark_fresh_rows()
    assert marked() == {name: wanted for name, (_, wanted) in ROWS.items()}


class FakeModel(torch.nn.Module):
    """A model's class as vLLM asks it for pages: [3 + drafts, dim] of conv, [Hv, V, K] of state; Hk=2, Hv=4."""

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: Any) -> Any:
        return (3, 2 * 2 * 16 + 4 * 8), (4, 8, 16)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: Any) -> Any:
        return torch.bfloat16, torch.float32

    @classmethod
    def get_mamba_state_copy_funcs(cls, mamba_types: set[str]) -> Any:
        return dict.fromkeys(mamba_types, ("conv", "state"))


# Words of eight keys (bf16), of as many updates and gates (fp32), and of the spans.
RING_SHAPES, RING_DTYPES = ((8 * 2 * 16 // 2 + 8 * 4 * 8 + 8 * 4 + 2 * 2,),), (torch.int32,)


def config_of(**changed: Any) -> SimpleNamespace:
    facts = {
        "cache_config": SimpleNamespace(mamba_cache_mode="none", prefix_match_unit=None),
        "speculative_config": None,
        "kv_transfer_config": None,
        "parallel_config": SimpleNamespace(pipeline_parallel_size=1),
        "additional_config": {},
        "model_config": SimpleNamespace(architecture="Fake", dtype=torch.bfloat16),
    }
    return SimpleNamespace(**facts | changed)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> type[FakeModel]:
    class Model(FakeModel):
        pass

    registry = SimpleNamespace(resolve_model_cls=lambda architecture, model_config: (Model, architecture))
    monkeypatch.setitem(sys.modules, "vllm.model_executor.models", SimpleNamespace(ModelRegistry=registry))
    copying = SimpleNamespace(is_conv_state_dim_first=lambda: False, get_temporal_copy_spec="plain")
    monkeypatch.setitem(sys.modules, replay_pages._MAMBA_UTILS, copying)
    monkeypatch.setitem(sys.modules, replay_pages._MAMBA, SimpleNamespace())
    return Model


def layer_with(slots: int) -> torch.nn.Module:
    layer = torch.nn.Module()
    layer.gdn_replay_slots, layer.mamba_type = slots, "gdn"  # type: ignore[assignment]
    return layer


def test_pages_have_room_for_a_ring(model: type[FakeModel]) -> None:
    config = config_of()
    assert replay_pages.make_room(config, 8) and not replay_pages.make_room(config, 8)
    assert model.get_mamba_state_shape_from_config(config)[2:] == RING_SHAPES
    assert model.get_mamba_state_dtype_from_config(config)[2:] == RING_DTYPES
    served = model()
    served.layer = layer_with(8)
    copied = {"gdn": ("conv", "state", "plain"), "other": ("conv", "state")}
    assert served.get_mamba_state_copy_funcs({"gdn", "other"}) == copied


@pytest.mark.parametrize("io", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("of_state", [torch.float16, torch.float32])
@pytest.mark.parametrize(("key_heads", "value_heads"), [(1, 1), (1, 2), (3, 6)])
def test_the_parts_of_a_ring_fill_its_state(
    monkeypatch: pytest.MonkeyPatch, io: torch.dtype, of_state: torch.dtype, key_heads: int, value_heads: int
) -> None:
    monkeypatch.setitem(sys.modules, replay_pages._MAMBA_UTILS, SimpleNamespace(is_conv_state_dim_first=lambda: False))
    shapes = (3, 2 * key_heads * 16 + value_heads * 8), (value_heads, 8, 16)
    parts = replay_pages.ring_parts(shapes, (io, of_state), io, 4)
    (words,), dtype = replay_pages.ring_state(parts)
    assert words % 4 == 0
    pages = torch.zeros(3, 8 + words + 12, dtype=dtype)  # a state somewhere in a page
    ring = replay_pages.ring_of(pages[:, 8 : 8 + words], parts)
    assert [(part.shape[1:], part.dtype) for part in ring] == list(parts)
    used = 0
    for part in ring:
        assert not part.any(), "two parts overlap"
        part.view(torch.uint8).fill_(255)
        used += part[0].numel() * part.itemsize
    assert pages[:, 8:].view(torch.uint8).count_nonzero() == 3 * used and not pages[:, :8].any()
    assert used <= 4 * words < used + 16 and not pages[:, 8 + words :].any()


def test_an_engine_without_replay_keeps_its_pages(model: type[FakeModel]) -> None:
    """In one process, and with the very additional_config that an engine with replay had."""
    with_ring, without = config_of(), config_of()
    replay_pages.make_room(with_ring, 8)
    without.additional_config = dict(with_ring.additional_config)
    replay_pages.make_room(without, 0)
    assert len(model.get_mamba_state_shape_from_config(with_ring)) == 3
    assert len(model.get_mamba_state_shape_from_config(without)) == 2
    assert len(model.get_mamba_state_dtype_from_config(without)) == 2
    plain = model()
    plain.layer = layer_with(0)
    assert plain.get_mamba_state_copy_funcs({"gdn"}) == {"gdn": ("conv", "state")}
    assert "get_mamba_state_shape_from_config" in vars(FakeModel)  # and its base is what it was
    assert len(FakeModel.get_mamba_state_shape_from_config(with_ring)) == 2


def test_a_class_derived_from_one_that_has_room(model: type[FakeModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """As Qwen3.5's mixture of experts is from the dense one, in a process that serves one behind the other."""
    replay_pages.make_room(config_of(), 8)

    class Derived(model):  # type: ignore[misc, valid-type]
        pass

    class Resized(model):  # type: ignore[misc, valid-type]
        @classmethod
        def get_mamba_state_shape_from_config(cls, vllm_config: Any) -> Any:
            return super().get_mamba_state_shape_from_config(vllm_config)

    for kind in (Derived, Resized):
        registry = SimpleNamespace(resolve_model_cls=lambda *_, kind=kind, **__: (kind, "Fake"))
        monkeypatch.setitem(sys.modules, "vllm.model_executor.models", SimpleNamespace(ModelRegistry=registry))
        config = config_of()
        replay_pages.make_room(config, 8)
        assert kind.get_mamba_state_shape_from_config(config)[2:] == RING_SHAPES
        assert kind.get_mamba_state_dtype_from_config(config)[2:] == RING_DTYPES
        served = kind()
        served.layer = layer_with(8)
        assert served.get_mamba_state_copy_funcs({"gdn"}) == {"gdn": ("conv", "state", "plain")}


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"cache_config": SimpleNamespace(mamba_cache_mode="all")}, "mamba_cache_mode is 'all'"),
        ({"cache_config": SimpleNamespace(mamba_cache_mode="align", prefix_match_unit=48)}, "prefix_match_unit is 48"),
        ({"kv_transfer_config": "nixl"}, "a KV connector"),
        ({"parallel_config": SimpleNamespace(pipeline_parallel_size=2)}, "a pipeline stage"),
        ({"additional_config": "text"}, "additional_config is no dict"),
        ({"model_config": SimpleNamespace(is_submodel_config=True)}, "the model is part of another one"),
    ],
)
def test_pages_that_cannot_hold_a_ring(model: type[FakeModel], changed: dict[str, Any], why: str) -> None:
    assert str(replay_pages.obstacle(config_of(**changed), "cuda")).startswith(why)


@pytest.mark.parametrize(("host", "divides"), [({}, 16), ({"get_mamba_prefill_checkpoint_alignment": None}, 64)])
def test_units_that_divide_every_block(
    model: type[FakeModel], monkeypatch: pytest.MonkeyPatch, host: dict[str, Any], divides: int
) -> None:
    monkeypatch.setitem(sys.modules, replay_pages._MAMBA, SimpleNamespace(**host))
    for unit in (1, 16, 32, 64, 128):
        aligned = SimpleNamespace(mamba_cache_mode="align", prefix_match_unit=unit)
        refused = replay_pages.obstacle(config_of(cache_config=aligned), "cuda") is not None
        assert refused == (unit > divides)


def test_pages_that_can_hold_a_ring(model: type[FakeModel], monkeypatch: pytest.MonkeyPatch) -> None:
    assert replay_pages.obstacle(config_of(), "cuda") is None
    align = SimpleNamespace(mamba_cache_mode="align", prefix_match_unit=None)
    drafting = config_of(cache_config=align, speculative_config="mtp")
    for changed in (False, True):
        monkeypatch.setattr(align_copies, "can_take_over", lambda device_type, changed=changed: changed)
        assert replay_pages.obstacle(config_of(cache_config=align), "cuda") is None
        why = replay_pages.obstacle(drafting, "cuda")
        assert why is None if changed else str(why).startswith("this vLLM moves states at a block's end in a way")
    model.get_mamba_specs_from_config = None  # type: ignore[attr-defined]
    assert replay_pages.obstacle(config_of(), "cuda") == "Model has pages of several kinds"


SERVED = SimpleNamespace(A_log=0, _gdn_core=object(), _gdn_packed=True)
HOSTS_NORM = SimpleNamespace(A_log=0, _gdn_core=object(), _gdn_packed=False)
LEFT_TO_HOST = SimpleNamespace(A_log=0, _gdn_core=None, _gdn_packed=False)
STOCK = SimpleNamespace(A_log=0)
ATTENTION = SimpleNamespace()


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [
        ([SERVED, ATTENTION], False),
        ([SERVED, HOSTS_NORM], True),
        ([SERVED, LEFT_TO_HOST], True),
        ([SERVED, STOCK], True),
        ([ATTENTION], False),
    ],
)
def test_the_hosts_kernels_are_warmed_up_where_they_are_used(
    monkeypatch: pytest.MonkeyPatch, layers: list[Any], wanted: bool
) -> None:
    called: list[tuple[Any, Any]] = []
    host = SimpleNamespace(qwen_triton_warmup=lambda runner, model_config: called.append((runner, model_config)))
    monkeypatch.setattr(unused_kernels.importlib, "import_module", lambda name: host)
    assert unused_kernels.leave_out() and not unused_kernels.leave_out()
    context = {str(i): layer for i, layer in enumerate(layers)}
    runner = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=context))
    host.qwen_triton_warmup(runner, "model")
    assert called == ([(runner, "model")] if wanted else [])


def test_a_host_without_that_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unused_kernels.importlib, "import_module", lambda name: SimpleNamespace())
    assert not unused_kernels.leave_out()


@needs_vllm
def test_the_hosts_warm_up_is_called_by_that_name() -> None:
    """Read, not imported: the module is a GPU worker's."""
    root = compat.installed_root()
    assert root is not None
    source = (root / "model_executor" / "warmup" / "kernel_warmup.py").read_text(encoding="utf-8")
    assert unused_kernels.MODULE == "vllm.model_executor.warmup.kernel_warmup"
    assert re.search(r"^    qwen_triton_warmup\(worker\.model_runner, ", source, re.MULTILINE)
