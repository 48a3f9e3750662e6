"""vLLM's pages of GDN states, with room behind conv and state for the ring that replay keeps.

Changes:  get_mamba_state_shape_from_config, get_mamba_state_dtype_from_config and get_mamba_state_copy_funcs of the
          class of the model that is being built: one state more, and a plain copy of it.
Why:      The host asks the layer what its page holds, but the model's class how large a page is to be (it makes
          attention's blocks as large) and how a page's states are copied to another block (prefix cache, "align"). A
          ring that is not told of there has no room, or stays behind. The sizes follow the configuration and the copies
          the model's own layers, so that another engine in the process keeps its pages as they are. One state, though
          the ring has four parts: with the prefix cache each step asks of every sequence, layer and state whether
          there is something to copy, on an H200 2.4 us a layer and state at 256 sequences, twice.
Versions: 0.32, 0.33, with both model runners. Applied with replay on, and only then.
Retires:  with the first vLLM that asks the layers themselves for both; none yet.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gdn_plugin.hosts.batch import CHECKPOINT_ALIGNMENT
from gdn_plugin.hosts.core import Ring
from gdn_plugin.hosts.vllm.patches import align_copies

_MAMBA_UTILS = "vllm.model_executor.layers.mamba.mamba_utils"
_MAMBA = "vllm.model_executor.layers.mamba.abstract"
_SLOTS = "gdn_plugin_replay"  # in additional_config: slots of a ring in this engine's pages
_MARK = "_gdn_plugin_replay_pages"
_OWN = 2  # states of the host's: conv and state; a class derived from one with room for a ring is asked for more
_ALIGNMENT = 16  # bytes

State = tuple[tuple[int, ...], torch.dtype]


def ring_parts(
    shapes: tuple[tuple[int, ...], ...], dtypes: tuple[torch.dtype, ...], io: torch.dtype, slots: int
) -> tuple[State, ...]:
    """Shape and dtype of a page's ring_k, ring_u, ring_g and ring_span, see `gdn_plugin.ops.replay_decode`.

    Args:
        shapes, dtypes: of conv and state, as the host has them.
        io: dtype of q, k and v.
    """
    conv, (value_heads, V, K) = shapes[:2]
    dim = conv[0] if importlib.import_module(_MAMBA_UTILS).is_conv_state_dim_first() else conv[1]
    key_heads = (dim - value_heads * V) // (2 * K)
    return (
        ((slots, key_heads, K), io),
        ((slots, value_heads, V), dtypes[1]),
        ((slots, value_heads), torch.float32),
        ((key_heads, 2), torch.int32),
    )


def ring_state(parts: Sequence[State]) -> State:
    """The state that holds the parts, one behind the other, as int32."""
    size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in parts)
    return (-(-size // _ALIGNMENT) * _ALIGNMENT // torch.int32.itemsize,), torch.int32


def ring_of(state: Tensor, parts: Sequence[State]) -> Ring:
    """The parts of [N] rings, as views of the state of `ring_state`, [N, words]."""
    views, first = [], 0
    for shape, dtype in parts:
        last = first + math.prod(shape) * dtype.itemsize // torch.int32.itemsize
        views.append(state[:, first:last].view(dtype).unflatten(1, shape))
        first = last
    return Ring(*views)


def span_of(parts: Sequence[State]) -> tuple[int, int]:
    """Where the ring's span is in its state: (first word, words)."""
    *before, (shape, _) = parts
    first = sum(math.prod(shape) * dtype.itemsize for shape, dtype in before) // torch.int32.itemsize
    return first, math.prod(shape)


def obstacle(vllm_config: Any, device_type: str) -> str | None:
    """Why this engine's pages cannot hold a ring; None where they can."""
    cache = vllm_config.cache_config
    if cache.mamba_cache_mode not in ("none", "align"):
        return f"mamba_cache_mode is {cache.mamba_cache_mode!r}, replay knows 'none' and 'align'"
    drafts = vllm_config.speculative_config is not None
    if cache.mamba_cache_mode == "align" and drafts and not align_copies.can_take_over(device_type):
        return "this vLLM moves states at a block's end in a way that the plugin does not know"
    unit = cache.prefix_match_unit
    if unit is not None and _block_multiple() % unit:
        return f"prefix_match_unit is {unit}, which need not divide the larger blocks that go with a ring"
    if vllm_config.kv_transfer_config is not None:
        return "a KV connector reads pages as conv and state"
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        return "a pipeline stage without GDN layers would size its pages without a ring"
    if not isinstance(vllm_config.additional_config, dict):
        return "additional_config is no dict"
    if getattr(vllm_config.model_config, "is_submodel_config", False):
        # VllmConfig.with_hf_config copies: neither class nor configuration is the one that the host asks.
        return "the model is part of another one, which sizes its pages without a ring"
    try:
        model = _model_class(vllm_config)
    except Exception as problem:  # the host's registry raises what it likes
        return f"the model's class is not known: {problem}"
    if hasattr(model, "get_mamba_specs_from_config"):
        return f"{model.__name__} has pages of several kinds"
    asked = ("get_mamba_state_shape_from_config", "get_mamba_state_dtype_from_config", "get_mamba_state_copy_funcs")
    missing = [name for name in asked if not hasattr(model, name)]
    return f"{model.__name__} has no {', '.join(missing)}" if missing else None


def _block_multiple() -> int:
    """Tokens of which every block is a multiple, whatever a page holds."""
    asks_layers = hasattr(importlib.import_module(_MAMBA), "get_mamba_prefill_checkpoint_alignment")  # 0.33
    return CHECKPOINT_ALIGNMENT if asks_layers else 16


def make_room(vllm_config: Any, slots: int) -> bool:
    """Pages of this engine get a ring of `slots`; 0: none. Idempotent.

    Returns:
        Whether the model's class was changed by this call.
    """
    if isinstance(vllm_config.additional_config, dict):
        vllm_config.additional_config.pop(_SLOTS, None)  # a dict that an earlier engine had too
    if not slots:
        return False
    vllm_config.additional_config[_SLOTS] = slots
    model = _model_class(vllm_config)
    if _MARK in vars(model):
        return False
    shape, dtype = model.get_mamba_state_shape_from_config, model.get_mamba_state_dtype_from_config
    plain_copy = importlib.import_module(_MAMBA_UTILS).get_temporal_copy_spec
    copy_funcs = inspect.getattr_static(model, "get_mamba_state_copy_funcs")  # the host's is a classmethod

    def ring(vllm_config: Any) -> tuple[State, ...]:
        additional = vllm_config.additional_config
        slots = additional.get(_SLOTS, 0) if isinstance(additional, dict) else 0
        if not slots:
            return ()
        return (ring_state(ring_parts(shape(vllm_config), dtype(vllm_config), vllm_config.model_config.dtype, slots)),)

    def shapes_with_ring(cls: type, vllm_config: Any) -> tuple[tuple[int, ...], ...]:
        return (*shape(vllm_config)[:_OWN], *(size for size, _ in ring(vllm_config)))

    def dtypes_with_ring(cls: type, vllm_config: Any) -> tuple[torch.dtype, ...]:
        return (*dtype(vllm_config)[:_OWN], *(of for _, of in ring(vllm_config)))

    def copies_with_ring(self: Any, mamba_types: set[Any]) -> dict[Any, Any]:
        # Runners ask the model itself, not its class, whose configuration nobody tells.
        held = {layer.mamba_type for layer in self.modules() if getattr(layer, "gdn_replay_slots", 0)}
        return {
            kind: (*funcs[:_OWN], plain_copy) if kind in held else funcs
            for kind, funcs in copy_funcs.__get__(self, type(self))(mamba_types).items()
        }

    model.get_mamba_state_shape_from_config = classmethod(shapes_with_ring)
    model.get_mamba_state_dtype_from_config = classmethod(dtypes_with_ring)
    model.get_mamba_state_copy_funcs = copies_with_ring
    setattr(model, _MARK, True)
    return True


def _model_class(vllm_config: Any) -> Any:
    """The class that the host asks for the size of a page."""
    registry = importlib.import_module("vllm.model_executor.models").ModelRegistry
    config = vllm_config.model_config
    return registry.resolve_model_cls(config.architecture, model_config=config)[0]
