"""Compile before serving, and count what is compiled."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from gdn_plugin.registry.problem import Problem

# Where FlashInfer keeps kernels that it has compiled or loaded: dictionaries, and functions whose cache has an entry a
# kernel. What a version does not have counts nothing.
_DICTIONARIES = (
    ("flashinfer.gdn_kernels.delta_rule_dsl.custom_compile_cache", "_in_mem_compile_cache"),
    ("flashinfer.gdn_kernels.gdn_decode_bf16_state", "_compiled_kernels_mtp"),
    ("flashinfer.gdn_kernels.gdn_decode_bf16_state", "_compiled_kernels_wide_vec"),
)
_CACHED_FUNCTIONS = (
    ("flashinfer.gdn_kernels.blackwell.gdn_prefill", "_get_compiled_cache"),
    ("flashinfer.gdn_kernels.gdn_decode_pretranspose", "_get_compiled_decode_kernel"),
    ("flashinfer.gdn_kernels.gdn_decode_mtp", "_get_compiled_mtp_kernel"),
    ("flashinfer.gdn_kernels.gdn_decode_mtp", "_get_compiled_mtp_kernel_inline"),
)


def compile_count() -> int:
    """GDN kernels FlashInfer has compiled or loaded from its disk cache in this process, and ours around them."""
    rows = sys.modules.get("gdn_plugin.ops._flashinfer.rows")
    count = 0 if rows is None else rows.compile_count()
    for module, name in _DICTIONARIES:
        count += len(getattr(sys.modules.get(module), name, ()))
    for module, name in _CACHED_FUNCTIONS:
        function = getattr(sys.modules.get(module), name, None)
        if function is not None:
            count += function.cache_info().currsize
    return count


def warm_up(
    problem: Problem,
    pool: Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
    bias_dtype: str | None = None,
) -> int:
    """Compile every kernel that a layer of this problem can ask of FlashInfer on the current device.

    Prefill: the regular and the context-parallel route, with and without checkpoints. Decode and verify: every batch
    size class, but for a padded bf16 pool, which kernels are compiled for by its size and strides: nothing then, until
    `pool` is given. Hosts have `warm_up_pool` for that.

    Args:
        pool: the layer's pool; row 0 may be written where it is bf16.
        scale: as the layer passes it; by default K^-0.5.
        use_qk_l2norm: as decode and verify are called; False behind conv_prologue.
        bias_dtype: of dt_bias, "float32" or "bfloat16"; by default the io dtype.
    Returns:
        How many kernels this compiled or loaded.
    """
    from gdn_plugin.ops._flashinfer.variants import cases

    if problem.op not in ("prefill", "decode", "verify") or (pool is None and _compiled_for_the_pool(problem)):
        return 0
    before = compile_count()
    sm_count = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    wanted = cases(
        problem, sm_count, pool=pool, scale=scale, use_qk_l2norm=use_qk_l2norm, bias_dtype=bias_dtype
    )  # fmt: skip
    for case in wanted:
        case.run()
    return compile_count() - before


def warm_up_pool(problem: Problem, pool: Tensor) -> int:
    """`warm_up` for what is compiled for a pool's own size and strides, once the pool is there and before capture.

    Args:
        pool: the layer's; row 0 may be written.
    Returns:
        How many kernels this compiled or loaded: none where one kernel serves pools of every size.
    """
    if not _compiled_for_the_pool(problem) or pool.is_contiguous():
        return 0
    return warm_up(problem, pool)


def _compiled_for_the_pool(problem: Problem) -> bool:
    return problem.op in ("decode", "verify") and problem.state_dtype == "bfloat16" and problem.padded_pool
