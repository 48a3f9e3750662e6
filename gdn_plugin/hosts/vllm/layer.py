"""The layer that vLLM builds in place of its `QwenGatedDeltaNetAttention`.

It keeps the host's weights, loaders, projections, norm and cache specs, and replaces the core between the projections.
The host's opaque ops `vllm::qwen_gdn_attention_core` and `..._fused_norm_packed` stay where graphs are split; they look
the layer up by name and call `_forward_core` or `_forward_core_fused_norm_packed`, which are ours here.

Importing this module imports the host's layer, which on a GPU machine initialises CUDA; `gdn_plugin.plugin` does so
only once the host itself has.
"""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn import QwenGatedDeltaNetAttention
from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first
from vllm.platforms import current_platform
from vllm.utils.torch_utils import _encode_layer_name
from vllm.v1.kv_cache_interface import KVCacheSpec, MambaSpec

from gdn_plugin import __version__
from gdn_plugin.hosts.batch import CHECKPOINT_ALIGNMENT
from gdn_plugin.hosts.core import Core, GatedNorm, Parameters, Ring, Shape, log_once, resolve
from gdn_plugin.hosts.vllm.metadata import NULL_INDEX, PADDING, batch_of
from gdn_plugin.hosts.vllm.patches import (
    align_copies,
    fresh_speculative_rows,
    replay_pages,
    saved_models,
    unused_kernels,
)
from gdn_plugin.hosts.vllm.patches.freed_memory import keep_freed_memory
from gdn_plugin.hosts.warm_up import warm_up, warm_up_pool
from gdn_plugin.ops.record import dtype_name
from gdn_plugin.registry import decide, probe, replay_request, requests

# Below vLLM's own logger, so that its handlers and its level apply.
_log = logging.getLogger("vllm.gdn_plugin")

_RING = "_gdn_plugin_ring"  # on the pool of a page's last state: views of its parts


class GdnPluginAttention(QwenGatedDeltaNetAttention):
    """Gated Delta Net attention on gdn_plugin's ops.

    Backends are resolved once, here, for the layer's share of heads on this rank. A layer that the ops cannot serve
    (another activation, another platform) is left to the host's own code, with one line that says why.

    Raises:
        SettingsError: a GDN_PLUGIN_* variable or additional_config["gdn_plugin"] is wrong. This stops the engine.
        NoBackendError, SelfCheckError: a backend asked for by name cannot run here, or gave wrong numbers.
    """

    gdn_replay_slots = 0  # of the ring in a page; asked for by the host before __init__ is done

    def __init__(self, config: Any, vllm_config: VllmConfig, prefix: str = "", *args: Any, **kwargs: Any) -> None:
        super().__init__(config, vllm_config, prefix, *args, **kwargs)
        self._gdn_core: Core | None = None
        self._gdn_packed = False
        self._gdn_checkpoint_grid: int | None = None
        wanted = _requests(vllm_config)
        replay = replay_request(_additional(vllm_config))
        reason = self._left_to_host()
        if reason is not None:
            replay_pages.make_room(vllm_config, 0)
            log_once(_log, logging.WARNING, f"gdn_plugin: GDN layers are left to vLLM: {reason}")
            return
        align = vllm_config.cache_config.mamba_cache_mode == "align"
        dtype, state_dtype = map(dtype_name, (vllm_config.model_config.dtype, self.get_state_dtype()[1]))
        spec_tokens = self.num_spec + 1 if self.num_spec else 0
        decision = decide(
            probe(current_platform.device_type),
            replay,
            (dtype, state_dtype),
            (self.num_k_heads, self.num_v_heads, self.head_k_dim, self.head_v_dim),
            spec_tokens,
            backends=wanted,
            obstacle=functools.partial(replay_pages.obstacle, vllm_config, current_platform.device_type),
        )
        level = logging.WARNING if decision.refused else logging.INFO
        log_once(_log, level, f"gdn_plugin: {decision.describe()}")
        self.gdn_replay_slots = decision.slots
        replay_pages.make_room(vllm_config, decision.slots)
        shape = Shape(
            dtype=dtype,
            state_dtype=state_dtype,
            num_k_heads=self.num_k_heads // self.tp_size,
            num_v_heads=self.num_v_heads // self.tp_size,
            head_k_dim=self.head_k_dim,
            head_v_dim=self.head_v_dim,
            conv_width=self.conv_kernel_size,
            spec_tokens=spec_tokens,
            checkpoints=align,
            bias_dtype=dtype_name(self.dt_bias.dtype),
            null_index=NULL_INDEX,
            padding=PADDING,
            replay=decision.slots,
        )
        self._gdn_core = Core(shape, resolve(shape, tuple(wanted.items()), current_platform.device_type, _log))
        # One op then takes the projections as they are, and a decode step is one launch with its norm.
        self._gdn_packed = self._norm_is_ours()
        self._forward_method = self._forward_plugin
        # Else the host repacks conv1d.weight on some CPUs, for a kernel that this layer never calls: updates in place,
        # which trainers make, and weights loaded anew would not find the shape that they know.
        self.conv1d._cpu_skip_gemm_dispatch = True
        _mark_compiled_models(vllm_config)
        saved_models.let_artefacts_load()
        if not current_platform.is_cpu():
            unused_kernels.leave_out()
        if self.num_spec:
            fresh_speculative_rows.tell_fresh_rows()
            fresh_speculative_rows.mark_fresh_rows()
        if align:
            self._gdn_checkpoint_grid = CHECKPOINT_ALIGNMENT
            self._checkpoint_alignment = CHECKPOINT_ALIGNMENT  # what vLLM 0.33 asks the layer for
            if self.num_spec or not current_platform.is_cpu():
                align_copies.take_over(current_platform.device_type)
            self._gdn_runner = "V2" if getattr(vllm_config, "use_v2_model_runner", True) else "V1"

    def _left_to_host(self) -> str | None:
        """Why the ops cannot serve this layer; None where they can."""
        if current_platform.device_type not in ("cpu", "cuda") or current_platform.is_rocm():
            return f"the plugin serves cpu and cuda, this platform is {current_platform.device_name}"
        if self.activation not in ("silu", "swish"):
            return f"the convolution's activation is {self.activation!r}, the ops have silu"
        if (state := self.get_state_dtype()[1]) not in (torch.float32, torch.bfloat16, torch.float16):
            return f"the state is {dtype_name(state)}, the ops have float32, bfloat16 and float16"
        if not hasattr(self, "in_proj_qkvz") or not hasattr(self, "in_proj_ba"):
            return "its projections are split in a way the plugin does not know"
        return None

    def _norm_is_ours(self) -> bool:
        """Whether the ops' gated RMSNorm is this layer's."""
        norm = self.norm
        return (
            norm.activation in ("silu", "swish", "sigmoid")
            and norm.norm_before_gate
            and norm.group_size is None
            and norm.bias is None
        )

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        """The host's, of conv and state; with replay of the ring too."""
        return (*super().get_state_shape(), *(shape for shape, _ in self._ring_state()))

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return (*super().get_state_dtype(), *(dtype for _, dtype in self._ring_state()))

    def _ring_state(self) -> tuple[replay_pages.State, ...]:
        return (replay_pages.ring_state(self._ring_parts()),) if self.gdn_replay_slots else ()

    def _ring_parts(self) -> tuple[replay_pages.State, ...]:
        base = tuple(super().get_state_shape()), super().get_state_dtype()
        return replay_pages.ring_parts(*base, self.model_config.dtype, self.gdn_replay_slots)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        """The host's spec; in "align" mode it says that prefill writes the state to be cached in one pass.

        The scheduler then need not split a prompt at its last cacheable block. With replay a sequence has one row,
        however many drafts it brings.
        """
        spec = super().get_kv_cache_spec(vllm_config)
        if self.gdn_replay_slots and isinstance(spec, MambaSpec):
            spec = replace(spec, num_speculative_blocks=0)
        if self._gdn_checkpoint_grid is None or not isinstance(spec, MambaSpec):
            return spec
        if spec.num_prefill_checkpoint_blocks:  # vLLM 0.33 has done it; without attention its grid is 16 tokens
            grid = spec.prefill_checkpoint_alignment
        elif hasattr(super(), "get_prefill_checkpoint_alignment"):  # 0.33 has decided that some layer cannot
            return spec
        else:
            # All offsets on the grid of cacheable blocks: prefill emits one state a block, not one every 64 tokens.
            grid = vllm_config.cache_config.prefix_match_unit or spec.block_size
        return replace(
            spec,
            num_prefill_checkpoint_blocks=1,
            prefill_checkpoint_alignment=math.lcm(grid, self._gdn_checkpoint_grid),
        )

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """The host's; then the kernels that are compiled for this pool's size, before the host captures graphs."""
        super().bind_kv_cache(kv_cache)
        if self._gdn_core is None:
            return
        if self._gdn_checkpoint_grid is not None and kv_cache.is_cuda:
            self._warm_up_moves()
        warm_up_pool(self._gdn_core, self.kv_cache[1], _log)

    def _warm_up_moves(self) -> None:
        """The kernel that moves states between cache blocks; where it cannot be compiled the host's stay."""
        try:
            align_copies.warm_up(self._gdn_runner)
        except Exception as problem:  # a compiler may raise anything
            if self.gdn_replay_slots and self.num_spec:  # which the host's would move wrongly
                raise
            align_copies.give_back()
            log_once(_log, logging.WARNING, f"gdn_plugin: vLLM's own kernels move states between blocks: {problem}")

    def _forward_plugin(self, hidden_states: Tensor) -> Tensor:
        """Projections, the opaque core, output projection: the same path on CPU and GPU."""
        num_tokens = hidden_states.size(0)
        mixed_qkvz, _ = self.in_proj_qkvz(hidden_states)
        ba, _ = self.in_proj_ba(hidden_states)
        # The core writes every row of it.
        core_attn_out = torch.empty(
            (num_tokens, self.num_v_heads // self.tp_size, self.head_v_dim),
            dtype=hidden_states.dtype,
            device=hidden_states.device,
        )
        if self._gdn_packed:
            torch.ops.vllm.qwen_gdn_attention_core_fused_norm_packed(
                mixed_qkvz, ba, core_attn_out, layer_name=_encode_layer_name(self.prefix)
            )
            output, _ = self.out_proj(core_attn_out.flatten(-2))
            return output
        mixed_qkv, z, b, a = self._split_projections(mixed_qkvz, ba)
        torch.ops.vllm.qwen_gdn_attention_core(
            mixed_qkv, b.contiguous(), a.contiguous(), core_attn_out, layer_name=_encode_layer_name(self.prefix)
        )
        return self._output_projection(core_attn_out, z.reshape(core_attn_out.shape))

    def _split_projections(self, mixed_qkvz: Tensor, ba: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """mixed_qkv, z, b and a: views, in the shapes by which the ops tell the layouts apart."""
        if not self.gqa_interleaved_layout:
            qkv_size = (2 * self.key_dim + self.value_dim) // self.tp_size
            mixed_qkv, z = mixed_qkvz.split([qkv_size, self.value_dim // self.tp_size], dim=-1)
            b, a = self.split_ba(ba)
            return mixed_qkv, z.unflatten(-1, (-1, self.head_v_dim)), b, a
        # A key head's share stands together: q, k, the v of its value heads, their z; and in `ba` their b, their a.
        key_heads, ratio = self.num_k_heads // self.tp_size, self.num_v_heads // self.num_k_heads
        values = ratio * self.head_v_dim
        sizes = [2 * self.head_k_dim + values, values]
        mixed_qkv, z = mixed_qkvz.unflatten(-1, (key_heads, sum(sizes))).split(sizes, dim=-1)
        b, a = ba.unflatten(-1, (key_heads, 2 * ratio)).split(ratio, dim=-1)
        return mixed_qkv, z.unflatten(-1, (ratio, self.head_v_dim)), b, a

    def _forward_core(self, mixed_qkv: Tensor, b: Tensor, a: Tensor, core_attn_out: Tensor) -> None:
        """Called by the opaque op: conv, gates and recurrence of one step into `core_attn_out` [T, Hv, V]."""
        if self._gdn_core is None:
            return super()._forward_core(mixed_qkv, b, a, core_attn_out)
        self._run(mixed_qkv, a, b, core_attn_out)
        return None

    def _forward_core_fused_norm_packed(self, mixed_qkvz: Tensor, ba: Tensor, core_attn_out: Tensor) -> None:
        """Called by the opaque op that takes the projections as they are: `_forward_core` and the gated norm."""
        if self._gdn_core is None:
            return super()._forward_core_fused_norm_packed(mixed_qkvz, ba, core_attn_out)
        mixed_qkv, z, b, a = self._split_projections(mixed_qkvz, ba)
        self._run(mixed_qkv, a, b, core_attn_out, z)
        return None

    def _metadata(self) -> Any | None:
        """This step's metadata for the layer; None in the profile run and in idle steps."""
        of_layers = get_forward_context().attn_metadata
        return of_layers.get(self.prefix) if isinstance(of_layers, dict) else None

    def _run(self, mixed_qkv: Tensor, a: Tensor, b: Tensor, out: Tensor, z: Tensor | None = None) -> None:
        """One step into `out` [T, Hv, V], whose rows hold anything; with z, the gated norm behind it."""
        core = self._gdn_core
        assert core is not None
        metadata = self._metadata()
        if metadata is None:
            self._warmup_prefill_kernels(mixed_qkv, 0)
            out.zero_()
            return
        norm = None
        if z is not None:
            gate = "sigmoid" if self.norm.activation == "sigmoid" else "silu"
            norm = GatedNorm(z=z, weight=self.norm.weight, eps=self.norm.eps, gate=gate)
        core.run(batch_of(metadata, self.conv_kernel_size - 1), mixed_qkv, a, b, self._gdn_parameters(), out, norm)

    def _gdn_parameters(self) -> Parameters:
        conv_pool, state, *_ = self.kv_cache
        # With LoRA the host wraps every linear layer, this one too, and the wrapper shows only some of what it has.
        conv1d: Any = getattr(self.conv1d, "base_layer", self.conv1d)
        return Parameters(
            conv_weight=conv1d.weight.squeeze(1),
            conv_bias=conv1d.bias,
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            conv_state=conv_pool if is_conv_state_dim_first() else conv_pool.transpose(-1, -2),
            state=state,
            ring=self._ring(),
        )

    @property
    def gdn_ring_span(self) -> tuple[int, int] | None:
        """Where a page's ring has its span, for who moves pages; None without a ring."""
        return replay_pages.span_of(self._ring_parts()) if self.gdn_replay_slots else None

    def _ring(self) -> Ring | None:
        """Views that cost 20 us to make, kept by the pool, so that they go with it.

        vLLM drops the pool that it profiles graphs on, and then makes the real one of the memory that is free.
        """
        if not self.gdn_replay_slots:
            return None
        pool = self.kv_cache[2]
        ring: Ring | None = getattr(pool, _RING, None)
        if ring is None:
            ring = replay_pages.ring_of(pool, self._ring_parts())
            setattr(pool, _RING, ring)
        return ring

    def _warmup_prefill_kernels(self, qkv_or_qkvz: Tensor, v_dim: int) -> None:
        """Compile every kernel that serving can reach, in the profile run: before the caches and before capture."""
        if self._gdn_core is None:
            return super()._warmup_prefill_kernels(qkv_or_qkvz, v_dim)
        if qkv_or_qkvz.is_cpu:
            keep_freed_memory()
        warm_up(self._gdn_core, qkv_or_qkvz.device, _log)
        return None


def _requests(vllm_config: VllmConfig) -> dict[str, str]:
    """The request for each phase, every setting checked."""
    additional = _additional(vllm_config)
    asked = requests(additional, additional.get("gdn_prefill_backend"))
    return {phase: request.value for phase, request in asked.items()}


def _additional(vllm_config: VllmConfig) -> dict[str, Any]:
    additional = vllm_config.additional_config
    return additional if isinstance(additional, dict) else {}


def _mark_compiled_models(vllm_config: VllmConfig) -> None:
    """Keep compiled models of this layer apart from those of the host's own.

    vLLM keys its cache of compiled models by its configuration and its own classes; a replaced layer shows in neither,
    and a graph compiled without the plugin would be loaded with it, and go around it.
    """
    if isinstance(vllm_config.additional_config, dict):
        vllm_config.additional_config["gdn_plugin_attached"] = __version__
