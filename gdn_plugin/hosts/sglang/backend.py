"""The attention backend that SGLang builds in place of its `GDNAttnBackend`.

It runs conv, gates and recurrence of a step, for every GDN layer of the model: decode and extend. The projections and
the gated norm are the model's. What the ops have no form for stays the host's, by its own methods, on the same pools:
target_verify, multi-item scoring, its ReplaySSM decode.

Importing this module imports the host's backend.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from sglang.srt.layers.attention.linear.gdn_backend import GDNAttnBackend
from sglang.srt.runtime_context import get_exec
from sglang.srt.utils.common import cpu_has_amx_support
from torch import Tensor

from gdn_plugin.hosts.batch import CHECKPOINT_ALIGNMENT
from gdn_plugin.hosts.core import Core, Parameters, Shape, log_once, resolve
from gdn_plugin.hosts.sglang.metadata import NULL_INDEX, PADDING, decode_batch, extend_batch
from gdn_plugin.hosts.warm_up import warm_up, warm_up_pool
from gdn_plugin.ops.record import dtype_name
from gdn_plugin.registry import decide, probe, replay_request, requests

_log = logging.getLogger("sglang.gdn_plugin")


class GdnPluginBackend(GDNAttnBackend):
    """SGLang's GDN layers on gdn_plugin's ops.

    Backends are resolved, self-checked and compiled here, for this rank's share of heads: the pools are there, and no
    graph has been captured. A model or a layer that the ops cannot serve is left to the host's own code, with one line
    that says why.

    Raises:
        SettingsError: a GDN_PLUGIN_* variable is wrong. This stops the server.
        NoBackendError, SelfCheckError: a backend asked for by name cannot run here, or gave wrong numbers.
    """

    def __init__(self, model_runner: Any) -> None:
        super().__init__(model_runner)
        self._gdn_core: Core | None = None
        self._gdn_served: dict[int, bool] = {}
        wanted = {phase: request.value for phase, request in requests().items()}
        pool = self.req_to_token_pool
        cache = pool.mamba_pool.mamba_cache
        if not cache.temporal.shape[0]:
            return  # a pipeline stage without GDN layers
        reason = _left_to_host(cache, self.mamba_chunk_size)
        if reason is not None:
            log_once(_log, logging.WARNING, f"gdn_plugin: GDN layers are left to SGLang: {reason}")
            return
        state = cache.temporal[0]
        shape = _shape(cache.conv[0], cache.temporal, model_runner.dtype, pool.enable_mamba_extra_buffer)
        replay = decide(
            probe(state.device.type),
            replay_request(),
            (shape.dtype, shape.state_dtype),
            (shape.num_k_heads, shape.num_v_heads, shape.head_k_dim, shape.head_v_dim),
            obstacle=lambda: "SGLang's pools have no room for a ring",
        )
        if replay.refused:
            log_once(_log, logging.WARNING, f"gdn_plugin: {replay.describe()}")
        self._gdn_core = Core(shape, resolve(shape, tuple(wanted.items()), state.device.type, _log))
        warm_up(self._gdn_core, state.device, _log)
        warm_up_pool(self._gdn_core, state, _log)

    def supports_prefill_graph_extend(self) -> bool:
        """Extends run between the segments of a captured prefill: what they take from the batch is never baked in."""
        return False

    def forward_decode(
        self,
        layer: Any,
        forward_batch: Any,
        mixed_qkv: Tensor | tuple[Tensor, Tensor],
        a: Tensor,
        b: Tensor,
        **kwargs: Any,
    ) -> Any:
        """One token a sequence.

        Args:
            mixed_qkv: [T, dim]; or, of Qwen3.5 on CUDA, the projections (qkvz, ba) as they are, a and b of no meaning.
        Returns:
            [1, T, Hv, V]; for a pair also z [T, Hv, V], a view of it.
        """
        core = self._core_of(layer)
        metadata = self.forward_metadata
        if core is None or metadata.replayssm_write_pos is not None:
            return super().forward_decode(layer, forward_batch, mixed_qkv, a, b, **kwargs)
        z = None
        if isinstance(mixed_qkv, tuple):
            (mixed_qkv, z), (b, a) = _split(layer, *mixed_qkv)
        tokens = mixed_qkv.shape[0]
        out = mixed_qkv.new_empty(tokens, layer.num_v_heads, layer.head_v_dim)
        if tokens:
            parameters = self._gdn_parameters(layer)
            batch = decode_batch(metadata, tokens, layer, masked=core.selection.fuses("decode"))
            core.run(batch, mixed_qkv, a, b, parameters, out)
            self._track_mamba_state_decode(
                forward_batch,
                parameters.conv_state,
                parameters.state,
                metadata.mamba_cache_indices,
                layer.layer_id,
            )
        return out.unsqueeze(0) if z is None else (out.unsqueeze(0), z)

    def forward_extend(
        self, layer: Any, forward_batch: Any, mixed_qkv: Tensor, a: Tensor, b: Tensor, **kwargs: Any
    ) -> Tensor:
        """Sequences of any length, into `linear_attn_output` where the host gives one. Returns [1, T, Hv, V]."""
        core = self._core_of(layer)
        plain = forward_batch.forward_mode.is_extend_without_speculative() and self.mis_metadata is None
        if core is None or not plain:
            return super().forward_extend(layer, forward_batch, mixed_qkv, a, b, **kwargs)
        given = kwargs.get("linear_attn_output")
        shape = (1, mixed_qkv.shape[0], layer.num_v_heads, layer.head_v_dim)
        out = given if given is not None and given.is_contiguous() else mixed_qkv.new_empty(shape)
        if mixed_qkv.shape[0]:
            batch = extend_batch(self.forward_metadata, forward_batch, core.shape.conv_width - 1, self.mamba_chunk_size)
            core.run(batch, mixed_qkv, a, b, self._gdn_parameters(layer), out[0])
        return out

    def _core_of(self, layer: Any) -> Core | None:
        """None for a layer that is left to the host."""
        core = self._gdn_core
        if core is None:
            return None
        served = self._gdn_served.get(layer.layer_id)
        if served is None:
            reason = _layer_left_to_host(layer, core.shape)
            served = self._gdn_served[layer.layer_id] = reason is None
            if reason is not None:
                log_once(_log, logging.WARNING, f"gdn_plugin: layer {layer.layer_id} is left to SGLang: {reason}")
        return core if served else None

    def _gdn_parameters(self, layer: Any) -> Parameters:
        cache = self.req_to_token_pool.mamba2_layer_cache(layer.layer_id)
        return Parameters(
            conv_weight=layer.conv_weights,
            conv_bias=layer.bias,
            A_log=layer.A_log,
            dt_bias=layer.dt_bias,
            conv_state=cache.conv[0],
            state=cache.temporal,
        )


def _split(layer: Any, qkvz: Tensor, ba: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(mixed_qkv, z) and (b, a), views of Qwen3.5's projections."""
    z_dim, heads = layer.num_v_heads * layer.head_v_dim, layer.num_v_heads
    qkv_dim = qkvz.shape[1] - z_dim
    z = qkvz[:, qkv_dim:].unflatten(1, (heads, layer.head_v_dim))
    return (qkvz[:, :qkv_dim], z), (ba[:, :heads], ba[:, heads:])


def _shape(conv: Tensor, temporal: Tensor, dtype: torch.dtype, checkpoints: bool) -> Shape:
    """From the pools of all layers, conv [L, N, dim, W-1] and temporal [L, N, Hv, V, K], of this rank's sizes."""
    _, _, heads, v_dim, k_dim = temporal.shape
    return Shape(
        dtype=dtype_name(dtype),
        state_dtype=dtype_name(temporal.dtype),
        num_k_heads=(conv.shape[2] - heads * v_dim) // (2 * k_dim),
        num_v_heads=heads,
        head_k_dim=k_dim,
        head_v_dim=v_dim,
        conv_width=conv.shape[3] + 1,
        checkpoints=checkpoints,
        null_index=NULL_INDEX,
        padding=PADDING,
        padded_pool=temporal.stride(1) != heads * v_dim * k_dim,
        gated_norm=False,
    )


def _left_to_host(cache: Any, chunk: int) -> str | None:
    """Why the ops cannot serve this model here; None where they can."""
    conv, temporal = cache.conv[0], cache.temporal
    if temporal.device.type not in ("cpu", "cuda") or torch.version.hip is not None:
        return f"the plugin serves cpu and cuda, these pools are on {temporal.device}"
    if temporal.is_cpu and cpu_has_amx_support():
        return "with AMX the host repacks the convolution's weights for kernels of its own"
    if get_exec().deterministic.enable_deterministic_inference:
        return "--enable-deterministic-inference promises results that do not depend on the batch, the ops do not"
    if temporal.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the state is {dtype_name(temporal.dtype)}, the ops have float32, bfloat16 and float16"
    if conv.dim() != 4 or temporal.dim() != 5 or not temporal[0, 0].is_contiguous():
        return f"its pools are of a form that the plugin does not know, {tuple(conv.shape)} and {tuple(temporal.shape)}"
    if chunk % CHECKPOINT_ALIGNMENT:
        return f"states are kept every {chunk} tokens, the ops keep them every {CHECKPOINT_ALIGNMENT}"
    return None


def _layer_left_to_host(layer: Any, shape: Shape) -> str | None:
    """Why the ops cannot serve this layer; None where they can."""
    q, k, v = ((layer.num_q_heads, layer.head_q_dim), (layer.num_k_heads, layer.head_k_dim), _value_heads(layer))
    wanted = (shape.num_k_heads, shape.head_k_dim)
    if q != wanted or k != wanted or v != _value_heads(shape):
        return f"its heads are {q}, {k} and {v}, those of the pools {wanted} and {_value_heads(shape)}"
    if layer.activation not in ("silu", "swish"):
        return f"the convolution's activation is {layer.activation!r}, the ops have silu"
    if layer.lower_bound is not None:
        return f"its gate is bounded from below by {layer.lower_bound}, the ops' is not"
    if layer.A_log.dtype != torch.float32:
        return f"A_log is {dtype_name(layer.A_log.dtype)}, the ops take float32"
    return None


def _value_heads(of: Any) -> tuple[int, int]:
    return of.num_v_heads, of.head_v_dim
