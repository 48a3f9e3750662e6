"""The layer as vLLM builds it, in both layouts, against transformers' module with the same weights. No engine."""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import math
import re
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gdn_plugin.hosts.vllm import compat
from gdn_plugin.ops.heads import flat_qkv
from tests.host.steps import Request, Row, Step, build_metadata
from tests.support.checks import assert_close
from tests.support.memory import Launches
from tests.tolerances import tolerance

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(compat.installed_root() is None, reason="vLLM is not installed"),
]

SIZES = {
    "hidden_size": 96,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "rms_norm_eps": 1e-6,
    "num_hidden_layers": 4,
}
PREFIX = "model.layers.{}.linear_attn"
CLOSE = tolerance("prefill", torch.float32, torch.float32)


@pytest.fixture(scope="module")
def vllm_config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    from tiny_model import write_tiny_qwen3_next

    checkpoint = write_tiny_qwen3_next(tmp_path_factory.mktemp("model") / "tiny")
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(
        model=str(checkpoint), dtype="float32", enforce_eager=True, max_model_len=512, enable_prefix_caching=False
    ).create_engine_config()
    rendezvous = f"file://{tmp_path_factory.mktemp('dist') / 'init'}"
    with set_current_vllm_config(config):
        parallel_state.init_distributed_environment(1, 0, rendezvous, 0, "gloo")
        parallel_state.ensure_model_parallel_initialized(1, 1)
        yield config
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()


def transformers_module(interleaved: bool) -> tuple[Any, torch.nn.Module]:
    torch.manual_seed(3)
    if interleaved:
        from transformers.models.qwen3_next import configuration_qwen3_next, modeling_qwen3_next

        config = configuration_qwen3_next.Qwen3NextConfig(**SIZES)
        module = modeling_qwen3_next.Qwen3NextGatedDeltaNet(config, 0)
    else:
        from transformers.models.qwen3_5 import configuration_qwen3_5, modeling_qwen3_5

        config = configuration_qwen3_5.Qwen3_5TextConfig(**SIZES)
        module = modeling_qwen3_5.Qwen3_5GatedDeltaNet(config, 0)
    with torch.no_grad():
        module.dt_bias.normal_()
        module.norm.weight.normal_(1.0, 0.1)
        module.A_log.uniform_(-4.0, 1.0)
    return config, module.eval()


@pytest.fixture(scope="module", params=[True, False], ids=["interleaved", "flat"])
def pair(request: pytest.FixtureRequest, vllm_config: Any) -> tuple[Any, torch.nn.Module]:
    """The plugin's layer and transformers' module, same weights."""
    from gdn_plugin.hosts.vllm.layer import GdnPluginAttention

    hf_config, module = transformers_module(request.param)
    layer = GdnPluginAttention(
        hf_config, vllm_config, PREFIX.format(int(request.param)), gqa_interleaved_layout=request.param
    )
    m = module
    if request.param:
        qkvz, ba = m.in_proj_qkvz.weight, m.in_proj_ba.weight
    else:
        qkvz = torch.cat([m.in_proj_qkv.weight, m.in_proj_z.weight])
        ba = torch.cat([m.in_proj_b.weight, m.in_proj_a.weight])
    pairs = [
        (layer.in_proj_qkvz.weight, qkvz),
        (layer.in_proj_ba.weight, ba),
        (layer.conv1d.weight, m.conv1d.weight),
        (layer.A_log, m.A_log),
        (layer.dt_bias, m.dt_bias),
        (layer.norm.weight, m.norm.weight),
        (layer.out_proj.weight, m.out_proj.weight),
    ]
    with torch.no_grad():
        for mine, theirs in pairs:
            mine.copy_(theirs)
        for linear in (layer.in_proj_qkvz, layer.in_proj_ba, layer.out_proj):
            linear.quant_method.process_weights_after_loading(linear)
    layer.kv_cache = spare_pools(layer, 6)
    return layer, module


def spare_pools(layer: Any, rows: int) -> tuple[torch.Tensor, ...]:
    """Pools as the host binds them: several states to a page."""
    pairs = list(zip(layer.get_state_shape(), layer.get_state_dtype(), strict=True))
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in pairs]
    pages = torch.zeros(rows, (sum(sizes) // 4096 + 2) * 4096, dtype=torch.int8)
    starts = [0, *itertools.accumulate(sizes)]
    return tuple(
        pages[:, start : start + size].view(dtype).view(-1, *shape)
        for (shape, dtype), size, start in zip(pairs, sizes, starts, strict=False)
    )


@contextlib.contextmanager
def context(vllm_config: Any, layer: Any, metadata: Any) -> Iterator[None]:
    from vllm.forward_context import set_forward_context

    with set_forward_context({layer.prefix: metadata}, vllm_config), torch.inference_mode():
        yield


def test_both_layouts_are_transformers(vllm_config: Any, pair: tuple[Any, Any]) -> None:
    layer, module = pair
    lengths = (150, 40)
    hidden = [torch.randn(length, SIZES["hidden_size"]) for length in lengths]
    with torch.inference_mode():
        want = [module(x[None]) for x in hidden]
    want = [x[0][0] if isinstance(x, tuple) else x[0] for x in want]
    nothing = torch.empty(0, 1)
    first, second = (Request([row], nothing, nothing, nothing) for row in (2, 4))
    for pool in layer.kv_cache:
        pool.fill_(float("nan"))  # recycled rows hold anything
    for share in ((70, 1), (1, 1), (1, 1), (64, 1), (1, 20), (1, 1)):
        rows = [Row(r, n) for r, n in zip((first, second), share, strict=True)]
        rows.sort(key=lambda row: row.count > 1)  # the host puts decodes in front
        inputs = [hidden[0 if r.request is first else 1][r.request.done :][: r.count] for r in rows]
        with context(vllm_config, layer, build_metadata(Step(rows))):
            got = layer(torch.cat(inputs)).split([row.count for row in rows])
        for row, piece in zip(rows, got, strict=True):
            stream = want[0 if row.request is first else 1]
            expected = stream[row.request.done : row.request.done + row.count]
            # elements near zero are held to the size of the stream, not of one token
            assert_close(
                "hidden", piece / stream.square().mean().sqrt(), expected / stream.square().mean().sqrt(), CLOSE
            )
            row.request.done += row.count


def test_both_layouts_take_the_packed_op(pair: tuple[Any, Any]) -> None:
    """A decode step is one call with its norm, and what the ops get are views of the projections."""
    layer, _ = pair
    assert layer._gdn_packed
    qkvz = torch.randn(5, 2 * layer.key_dim + 2 * layer.value_dim)
    ba = torch.randn(5, 2 * layer.num_v_heads)
    with Launches() as counted:
        mixed_qkv, z, b, a = layer._split_projections(qkvz, ba)
    assert not counted.names
    query, key, value, *rest = layer.fix_query_key_value_ordering(qkvz, ba) if layer.gqa_interleaved_layout else [
        *qkvz.split([layer.key_dim, layer.key_dim, layer.value_dim, layer.value_dim], dim=1), *layer.split_ba(ba)
    ]  # fmt: skip
    sorted_qkv = flat_qkv(mixed_qkv, layer.head_k_dim) if layer.gqa_interleaved_layout else mixed_qkv
    assert torch.equal(sorted_qkv, torch.cat([x.flatten(1) for x in (query, key, value)], 1))
    for mine, theirs in zip((z, b, a), rest, strict=True):
        assert torch.equal(mine.flatten(1), theirs.flatten(1))


def test_replicated_gates_are_cut_to_the_rank(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The host keeps in_proj_ba whole on every rank of a quantised Qwen3.5 on CUDA (`disable_tp_for_ba_proj`)."""
    layer, _ = pair
    if layer.gqa_interleaved_layout:
        assert not layer.disable_tp_for_ba_proj
        return
    heads = layer.num_v_heads
    monkeypatch.setattr(layer, "tp_size", 2)
    monkeypatch.setattr(layer, "tp_rank", 1)
    monkeypatch.setattr(layer, "disable_tp_for_ba_proj", True)
    qkvz = torch.randn(5, (2 * layer.key_dim + 2 * layer.value_dim) // 2)
    ba = torch.randn(5, 2 * heads)
    mixed_qkv, z, b, a = layer._split_projections(qkvz, ba)
    assert torch.equal(b, ba[:, heads // 2 : heads]) and torch.equal(a, ba[:, heads + heads // 2 :])
    assert mixed_qkv.shape[1] == (2 * layer.key_dim + layer.value_dim) // 2
    assert z.shape == (5, heads // 2, layer.head_v_dim)


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("GDN_PLUGIN_PREFILL_BACKEND", "tritno", "did you mean 'triton'"),
        ("GDN_PLUGIN_PREFIL_BACKEND", "triton", "GDN_PLUGIN_PREFIL_BACKEND is not a setting of gdn-plugin"),
        ("GDN_PLUGIN_DISABLE", "perhaps", "choose one of: 0, 1"),
        ("GDN_PLUGIN_DECODE_BACKEND", "flashinfer", "no backend can run gdn::decode as requested ('flashinfer')"),
    ],
    ids=["value", "name", "switch", "impossible"],
)
def test_a_bad_setting_stops_the_layer(
    vllm_config: Any, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, said: str
) -> None:
    from gdn_plugin.hosts.vllm.layer import GdnPluginAttention

    monkeypatch.setenv(variable, value)
    prefix = f"model.layers.9.{variable}_{value}"
    with pytest.raises((ValueError, RuntimeError), match=re.escape(said)):
        GdnPluginAttention(transformers_module(True)[0], vllm_config, prefix, gqa_interleaved_layout=True)


def test_a_layer_the_ops_cannot_serve_is_left_to_the_host(vllm_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from gdn_plugin.hosts.vllm.layer import GdnPluginAttention

    config = transformers_module(True)[0]
    config.hidden_act = "gelu"
    lines: list[str] = []
    monkeypatch.setattr(
        logging.getLogger("vllm.gdn_plugin"), "handle", lambda record: lines.append(record.getMessage())
    )
    layers = [GdnPluginAttention(config, vllm_config, f"model.layers.{i}.gelu") for i in (10, 11)]
    said = [line for line in lines if "left to vLLM" in line]
    assert len(said) == 1 and "'gelu'" in said[0]
    assert all(layer._forward_method == layer.forward_cpu for layer in layers)


def test_a_float16_state_is_served(vllm_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """--mamba-ssm-cache-dtype float16"""
    from gdn_plugin.hosts.vllm.layer import GdnPluginAttention

    monkeypatch.setattr(vllm_config.cache_config, "mamba_ssm_cache_dtype", "float16")
    layer = GdnPluginAttention(transformers_module(True)[0], vllm_config, "model.layers.12.float16")
    assert layer.get_state_dtype()[1] is torch.float16
    assert layer._gdn_core.shape.state_dtype == "float16"
    assert layer._forward_method == layer._forward_plugin


def test_the_host_leaves_conv1d_as_it_was_loaded(vllm_config: Any, pair: tuple[Any, Any]) -> None:
    """On CPUs with bf16 instructions it repacks such weights after loading, and a trainer would write to nobody's."""
    layer, _ = pair
    conv1d = layer.conv1d
    loaded = conv1d.weight.data
    try:
        conv1d.weight.data = torch.randn_like(loaded).bfloat16()
        before = conv1d.weight.clone()
        conv1d.quant_method.process_weights_after_loading(conv1d)
        assert torch.equal(conv1d.weight, before)
        with torch.no_grad():
            conv1d.weight.mul_(2)
        assert torch.equal(layer._gdn_parameters().conv_weight, 2 * before.squeeze(1))
    finally:
        conv1d.weight.data = loaded


def test_compiled_models_are_kept_apart_from_the_hosts(vllm_config: Any, pair: tuple[Any, Any]) -> None:
    """vLLM's key for its cache of compiled models must know whether the plugin is in them."""
    with_plugin = vllm_config.compute_hash()
    mark = vllm_config.additional_config.pop("gdn_plugin_attached")
    assert vllm_config.compute_hash() != with_plugin
    vllm_config.additional_config["gdn_plugin_attached"] = mark


def gdn_ops(run: Any) -> list[str]:
    """Ops of namespace gdn that run() calls, those inside the host's opaque op too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    events = sorted(profile.events(), key=lambda event: event.time_range.start)
    names = [event.name for event in events if event.name.startswith("gdn::")]
    return [name.removeprefix("gdn::").removesuffix("_out") for name in names]


@pytest.mark.parametrize(
    ("share", "ops"),
    [
        ((1, 1), ["fused_decode"]),
        ((9, 30), ["conv_prologue", "prefill", "gated_norm"]),
        ((1, 30), ["fused_decode", "conv_prologue", "prefill", "gated_norm"]),
    ],
    ids=["decode", "prefill", "mixed"],
)
def test_launches(vllm_config: Any, pair: tuple[Any, Any], share: tuple[int, int], ops: list[str]) -> None:
    layer, _ = pair
    nothing = torch.empty(0, 1)
    rows = [Row(Request([2 + i], nothing, nothing, nothing, done=50), n) for i, n in enumerate(share)]
    hidden = torch.randn(sum(share), SIZES["hidden_size"])
    for pool in layer.kv_cache:
        pool.zero_()

    def run() -> None:
        with context(vllm_config, layer, build_metadata(Step(rows))):
            layer(hidden)

    assert gdn_ops(run) == ops


def test_idle_steps_and_the_profile_run_only_warm_up(
    vllm_config: Any, pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.forward_context import set_forward_context

    from gdn_plugin import ops
    from gdn_plugin.hosts import warm_up

    layer, _ = pair
    asked: list[str] = []
    monkeypatch.setattr(warm_up, "_done", set())
    monkeypatch.setattr(ops, "warm_up", lambda problem, **given: asked.append(problem.op))
    before = [pool.clone() for pool in layer.kv_cache]
    with set_forward_context(None, vllm_config), torch.inference_mode():
        outs = [layer(torch.randn(7, SIZES["hidden_size"])) for _ in range(2)]
    assert sorted(asked) == sorted(set(layer._gdn_core.shape.problems()) - {"decode"})  # which is fused; each once
    assert not any(out.any() for out in outs)  # nothing that memory held
    for pool, was in zip(layer.kv_cache, before, strict=True):
        assert torch.equal(pool, was)


def test_binding_the_pools_compiles_for_them(
    vllm_config: Any, pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By vLLM's own way of handing pools over; on a CPU that compiles nothing and leaves the pools alone."""
    from vllm.forward_context import get_forward_context, set_forward_context
    from vllm.v1.worker.utils import bind_kv_cache_to_layers

    from gdn_plugin import ops
    from gdn_plugin.hosts.vllm import layer as layer_module

    layer, _ = pair
    before = layer.kv_cache
    row_bytes = sum(pool[0].numel() * pool.itemsize for pool in before)
    pages = torch.ones(5, 1, 1, row_bytes + 512, dtype=torch.int8)
    compiled, bound = ops.compile_count(), []
    real = layer_module.warm_up_pool
    monkeypatch.setattr(layer_module, "warm_up_pool", lambda *given: (bound.append(given), real(*given)))
    try:
        with set_forward_context(None, vllm_config):
            bind_kv_cache_to_layers({layer.prefix: pages}, get_forward_context().no_compile_layers)
        _, state = layer.kv_cache
        assert state.shape[1:] == layer.get_state_shape()[1] and state.stride(0) * state.itemsize == pages.stride(0)
        ((core, pool, _),) = bound
        assert core is layer._gdn_core and pool is state
        assert ops.compile_count() == compiled and bool((pages == 1).all())
    finally:
        layer.kv_cache = before


@pytest.mark.parametrize("drafts", [0, 3])
def test_a_layer_with_replay_has_its_ring_in_the_page(
    vllm_config: Any, monkeypatch: pytest.MonkeyPatch, drafts: int
) -> None:
    from gdn_plugin.hosts.vllm.layer import GdnPluginAttention

    monkeypatch.setenv("GDN_PLUGIN_REPLAY", "8")
    monkeypatch.setitem(vllm_config.additional_config, "gdn_plugin_replay", 0)  # and back to it
    if drafts:
        speculative = SimpleNamespace(num_speculative_tokens=drafts)
        monkeypatch.setattr(vllm_config, "speculative_config", speculative)
    layer = GdnPluginAttention(transformers_module(True)[0], vllm_config, f"model.layers.13.replay_{drafts}")
    slots = 16 if drafts else 8
    assert layer._gdn_core.shape.replay == slots and vllm_config.additional_config["gdn_plugin_replay"] == slots
    words = slots * 2 * 64 + slots * 6 * 32 + slots * 6 + 2 * 2
    assert layer.get_state_shape()[2:] == ((words,),) and layer.get_state_dtype()[2:] == (torch.int32,)
    layer.kv_cache = spare_pools(layer, 6)
    ring = layer._gdn_parameters().ring
    assert ring is not None and ring.span.shape == (6, 2, 2) and ring.k.shape == (6, slots, 2, 64)
    assert layer._gdn_parameters().ring is ring
    layer.kv_cache = spare_pools(layer, 7)
    assert layer._gdn_parameters().ring.span.shape == (7, 2, 2)
    # As vLLM drops the pool that it has profiled graphs on, to see what memory is left for the real one.
    gone = [weakref.ref(layer.kv_cache[2]), weakref.ref(layer._gdn_parameters().ring.k)]
    layer.kv_cache = []
    gc.collect()
    assert [pool() for pool in gone] == [None, None]
    spec = layer.get_kv_cache_spec(vllm_config)
    assert spec.num_speculative_blocks == 0 and len(spec.shapes) == len(spec.dtypes) == 3


@pytest.mark.parametrize(("host", "ours"), [(16, 64), (112, 448), (1088, 1088)])
def test_checkpoints_are_where_prefill_has_a_state(
    pair: Any, vllm_config: Any, monkeypatch: pytest.MonkeyPatch, host: int, ours: int
) -> None:
    """Without attention vLLM 0.33 makes blocks of 16 tokens, and checkpoints between the chunks of 64."""
    layer, _ = pair
    plain = replace(layer.get_kv_cache_spec(vllm_config), num_prefill_checkpoint_blocks=1)
    spec = replace(plain, prefill_checkpoint_alignment=host)
    monkeypatch.setattr(type(layer).__base__, "get_kv_cache_spec", lambda self, config: spec)
    monkeypatch.setattr(layer, "_gdn_checkpoint_grid", 64)
    assert layer.get_kv_cache_spec(vllm_config) == replace(plain, prefill_checkpoint_alignment=ours)
