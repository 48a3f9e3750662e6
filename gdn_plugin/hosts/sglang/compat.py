"""What the plugin needs of SGLang, as data, and whether an SGLang has it. Imports nothing of SGLang; see `contract`."""

from __future__ import annotations

from pathlib import Path

from gdn_plugin.hosts import contract as sources
from gdn_plugin.hosts.contract import Contract, Need

SUPPORTED = ((0, 5, 22), (0, 5, 23))
BACKEND_MODULE = "sglang.srt.layers.attention.linear.gdn_backend"
BACKEND_CLASS = "GDNAttnBackend"
REGISTRY_MODULE = "sglang.srt.plugins.hook_registry"

_HYBRID = "sglang.srt.layers.attention.hybrid_linear_attn_backend"
_POOL = "sglang.srt.mem_cache.memory_pool"
_BATCH = "sglang.srt.model_executor.forward_batch_info"

NEEDS: tuple[Need, ...] = (
    Need("sglang.srt.plugins", "GENERAL_PLUGINS_GROUP", "loads the entry point", value="sglang.srt.plugins"),
    Need(
        REGISTRY_MODULE,
        "HookRegistry",
        "to replace the backend",
        "register",
        parameters=("cls", "target", "hook", "hook_type"),
    ),
    Need(REGISTRY_MODULE, "HookRegistry", "to see whether another plugin has replaced it", fields=("_hooks",)),
    Need(REGISTRY_MODULE, "HookType", "to replace the backend"),
    Need("sglang.srt.layers.attention.attention_registry", "attn_backend_wrapper", "builds the backend"),
    Need(
        BACKEND_MODULE,
        BACKEND_CLASS,
        "extended: settings, choice and warm-up",
        "__init__",
        parameters=("self", "model_runner"),
    ),
    *(
        Need(
            BACKEND_MODULE,
            BACKEND_CLASS,
            "overridden",
            method,
            parameters=("self", "layer", "forward_batch", "mixed_qkv", "a", "b"),
        )
        for method in ("forward_decode", "forward_extend")
    ),
    Need(BACKEND_MODULE, BACKEND_CLASS, "multi-item scoring is left to the host", fields=("mis_metadata",)),
    Need(
        _HYBRID,
        "MambaAttnBackendBase",
        "read by the backend",
        fields=("forward_metadata", "req_to_token_pool"),
    ),
    Need(_HYBRID, "MambaAttnBackendBase", "where an extend's states are kept", "mamba_chunk_size"),
    Need(_HYBRID, "MambaAttnBackendBase", "pinned: no extend is captured", "supports_prefill_graph_extend"),
    Need(
        _HYBRID,
        "MambaAttnBackendBase",
        "called: a decode's states for the prefix cache",
        "_track_mamba_state_decode",
        parameters=("self", "forward_batch", "conv_states", "ssm_states", "cache_indices", "layer_id"),
    ),
    Need(
        "sglang.srt.layers.attention.mamba.mamba2_metadata",
        "ForwardMetadata",
        "what is in a step",
        fields=(
            *("query_start_loc", "mamba_cache_indices", "logical_num_tokens", "mamba_track_indices"),
            *("has_mamba_track_mask", "replayssm_write_pos"),
        ),
    ),
    Need(
        _BATCH,
        "ForwardBatch",
        "what is in a step",
        fields=(
            *("forward_mode", "extend_prefix_lens", "extend_prefix_lens_cpu", "extend_seq_lens_cpu"),
            *("mamba_track_mask", "mamba_track_seqlens", "mamba_prefill_track_mask_cpu", "mamba_track_seqlens_cpu"),
        ),
    ),
    Need(_BATCH, "ForwardMode", "target_verify is left to the host", "is_extend_without_speculative"),
    Need(
        "sglang.srt.layers.radix_linear_attention",
        "RadixLinearAttention",
        "a layer's weights and sizes",
        fields=(
            *("layer_id", "num_q_heads", "num_k_heads", "num_v_heads", "head_q_dim", "head_k_dim", "head_v_dim"),
            *("conv_weights", "bias", "activation", "A_log", "dt_bias", "lower_bound"),
        ),
    ),
    Need(
        _POOL,
        "HybridReqToTokenPool",
        "a layer's pools",
        "mamba2_layer_cache",
        parameters=("self", "layer_id"),
    ),
    Need(_POOL, "HybridReqToTokenPool", "the pools", fields=("mamba_pool", "enable_mamba_extra_buffer")),
    Need(_POOL, "MambaPool", "the conv and state pools", fields=("mamba_cache", "conv", "temporal")),
    Need("sglang.srt.mem_cache.allocator.mamba", "MambaSlotAllocator", "slot 0 is padding's", "clear"),
    Need("sglang.srt.runtime_context", "get_exec", "whether results must be deterministic"),
    Need("sglang.srt.utils.common", "cpu_has_amx_support", "weights repacked for AMX are left to the host"),
)

CONTRACT = Contract("SGLang", "sglang", SUPPORTED, NEEDS)


def installed_root() -> Path | None:
    """Where SGLang is installed; None where it is not. Nothing is imported."""
    return sources.installed_root("sglang")


def would_attach() -> tuple[bool, str]:
    """Whether the plugin would replace the installed SGLang's GDN backend, and why or why not, in one sentence."""
    return CONTRACT.would_attach(installed_root())
