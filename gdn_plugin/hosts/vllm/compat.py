"""What the plugin needs of vLLM, as data, and whether a vLLM has it. Imports nothing of vLLM; see `hosts.contract`."""

from __future__ import annotations

from pathlib import Path

from gdn_plugin.hosts import contract as sources
from gdn_plugin.hosts.contract import Contract, Need

SUPPORTED = ((0, 32), (0, 33))
LAYER_MODULE = "vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn"
LAYER_CLASS = "QwenGatedDeltaNetAttention"
REGISTRY_MODULE = "vllm.model_executor.custom_op"

_METADATA_MODULE = "vllm.v1.attention.backends.gdn_attn"
_MAMBA_UTILS = "vllm.model_executor.layers.mamba.mamba_utils"
_INTERFACES = "vllm.model_executor.models.interfaces"

NEEDS: tuple[Need, ...] = (
    Need(REGISTRY_MODULE, "op_registry_oot", "to see whether another plugin has replaced the layer"),
    Need(REGISTRY_MODULE, "PluggableLayer", "to register the layer", "register_oot", parameters=("name",)),
    Need(
        LAYER_MODULE,
        LAYER_CLASS,
        "the layer keeps the host's weights and projections",
        "__init__",
        parameters=("self", "config", "vllm_config", "prefix"),
    ),
    Need(
        LAYER_MODULE,
        LAYER_CLASS,
        "read by the layer",
        fields=(
            *("_forward_method", "gqa_interleaved_layout", "conv1d", "in_proj_qkvz", "in_proj_ba", "dt_bias"),
            *("A_log", "norm", "out_proj", "num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim"),
            *("key_dim", "value_dim", "conv_kernel_size"),
        ),
    ),
    Need(LAYER_MODULE, LAYER_CLASS, "overridden", "forward", parameters=("self", "hidden_states")),
    Need(
        LAYER_MODULE,
        LAYER_CLASS,
        "overridden: the core of both layouts",
        "_forward_core",
        parameters=("self", "mixed_qkv", "b", "a", "core_attn_out"),
    ),
    Need(
        LAYER_MODULE,
        LAYER_CLASS,
        "overridden: the core and the gated norm of the flat layout",
        "_forward_core_fused_norm_packed",
        parameters=("self", "mixed_qkvz", "ba", "core_attn_out"),
    ),
    Need(
        LAYER_MODULE,
        LAYER_CLASS,
        "overridden: called by the profile run",
        "_warmup_prefill_kernels",
        parameters=("self", "qkv_or_qkvz", "v_dim"),
    ),
    Need(LAYER_MODULE, LAYER_CLASS, "called", "split_ba", parameters=("self", "ba")),
    Need(
        LAYER_MODULE,
        LAYER_CLASS,
        "called",
        "fix_query_key_value_ordering",
        parameters=("self", "mixed_qkvz", "mixed_ba"),
    ),
    Need(LAYER_MODULE, LAYER_CLASS, "called", "_output_projection", parameters=("self", "core_attn_out", "z")),
    Need(
        LAYER_MODULE,
        "qwen_gdn_attention_core",
        "the opaque op that calls the core",
        parameters=("qkv_or_qkvz", "b_or_ba", "a_or_z_out", "core_attn_out", "layer_name"),
    ),
    Need(
        LAYER_MODULE,
        "qwen_gdn_attention_core_fused_norm_packed",
        "the opaque op that calls the core with the norm",
        parameters=("mixed_qkvz", "ba", "core_attn_out", "layer_name"),
    ),
    Need(
        "vllm.model_executor.layers.mamba.gdn.base",
        "GatedDeltaNetAttention",
        "read by the layer",
        fields=("prefix", "tp_size", "activation", "layer_norm_epsilon", "num_spec"),
    ),
    Need("vllm.model_executor.layers.mamba.gdn.base", "GatedDeltaNetAttention", "called", "get_state_dtype"),
    Need(
        "vllm.model_executor.layers.mamba.abstract",
        "MambaBase",
        "extended by prefill checkpoints",
        "get_kv_cache_spec",
        parameters=("self", "vllm_config"),
    ),
    Need("vllm.model_executor.layers.mamba.abstract", "MambaBase", "the conv and state pools", fields=("kv_cache",)),
    Need(
        "vllm.model_executor.layers.mamba.abstract",
        "MambaBase",
        "overridden: hands the layer its pools",
        "bind_kv_cache",
        parameters=("self", "kv_cache"),
    ),
    Need(
        "vllm.v1.kv_cache_interface",
        "MambaSpec",
        "prefill checkpoints",
        fields=("num_prefill_checkpoint_blocks", "prefill_checkpoint_alignment", "mamba_cache_mode"),
    ),
    Need(
        "vllm.v1.kv_cache_interface",
        "MambaSpec",
        "replay: one row a sequence, a ring in its page",
        fields=("num_speculative_blocks", "shapes", "dtypes"),
    ),
    Need(_MAMBA_UTILS, "get_temporal_copy_spec", "replay: how the ring of a page is copied"),
    Need(_INTERFACES, "IsHybrid", "patched with replay: a page's size", "get_mamba_state_shape_from_config"),
    Need(
        _INTERFACES,
        "IsHybrid",
        "patched with replay: copies of a page",
        "get_mamba_state_copy_funcs",
        parameters=("cls", "mamba_types"),
    ),
    Need(
        "vllm.model_executor.layers.mamba.checkpoint",
        "MambaPrefillCheckpointMetadata",
        "prefill checkpoints",
        fields=("checkpoint_offsets", "state_indices", "offsets"),
    ),
    Need(_MAMBA_UTILS, "is_conv_state_dim_first", "order of the conv pool"),
    Need(
        _METADATA_MODULE,
        "GDNAttentionMetadata",
        "what is in a batch",
        fields=(
            *("num_prefills", "num_prefill_tokens", "num_decodes", "num_decode_tokens", "num_spec_decodes"),
            *("num_actual_tokens", "checkpoint", "spec_query_start_loc", "non_spec_query_start_loc"),
            *("spec_state_indices_tensor", "non_spec_state_indices_tensor", "spec_sequence_masks"),
            *("spec_token_indx", "non_spec_token_indx", "num_accepted_tokens", "prefill_query_start_loc"),
            *("prefill_state_indices", "prefill_has_initial_state", "nums_dict", "num_spec_decode_tokens"),
            "spec_sequence_masks_cpu",
        ),
    ),
    Need(
        _METADATA_MODULE,
        "GDNAttentionMetadataBuilder",
        "patched: fresh speculative rows",
        "build",
        parameters=("self", "common_prefix_len", "common_attn_metadata"),
    ),
    Need(
        _METADATA_MODULE,
        "GDNAttentionMetadataBuilder",
        "patched: fresh speculative rows",
        "update_block_table",
        parameters=("self", "metadata"),
    ),
    Need(
        _METADATA_MODULE,
        "GDNAttentionMetadataBuilder",
        "fresh speculative rows: the most rows of a graph",
        fields=("decode_cudagraph_max_bs",),
    ),
    Need(
        "vllm.v1.attention.backend",
        "CommonAttentionMetadata",
        "fresh speculative rows: what has been computed",
        fields=("query_start_loc_cpu", "seq_lens_cpu_upper_bound"),
    ),
    Need(
        "vllm.model_executor.warmup.qwen_triton_warmup",
        "qwen_triton_warmup",
        "patched: the warm-up of kernels that the layer replaces",
        parameters=("runner", "model_config"),
    ),
    Need("vllm.v1.attention.backends.utils", "NULL_BLOCK_ID", "padding rows name this block", value=0),
    Need("vllm.forward_context", "get_forward_context", "where a layer finds its metadata"),
    Need("vllm.forward_context", "ForwardContext", "where a layer finds its metadata", fields=("attn_metadata",)),
    Need("vllm.utils.torch_utils", "_encode_layer_name", "called", parameters=("layer_name",)),
)


CONTRACT = Contract("vLLM", "vllm", SUPPORTED, NEEDS)


def version_problem(version: str | None) -> str | None:
    return CONTRACT.version_problem(version)


def contract(root: str | Path) -> list[str]:
    """Everything of `NEEDS` that an unpacked vLLM does not have, one sentence each; empty where all is there.

    Args:
        root: the folder `vllm` itself, or the one that holds it. Nothing is imported.
    """
    return CONTRACT.missing(root)


def package_root(directory: str | Path) -> Path:
    """The folder of the package `vllm`, given itself or its parent."""
    return sources.package_root("vllm", directory)


def installed_root() -> Path | None:
    """Where vLLM is installed; None where it is not. Nothing is imported."""
    return sources.installed_root("vllm")


def would_attach() -> tuple[bool, str]:
    """Whether the plugin would replace the installed vLLM's GDN layer, and why or why not, in one sentence."""
    return CONTRACT.would_attach(installed_root())
