"""Every compilation that conv_prologue, decode, fused_decode and verify can ask for, as data: `variants(problem)`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gdn_plugin.ops._triton import tiles
from gdn_plugin.ops._triton.decode import decode_kernel
from gdn_plugin.ops._triton.fused_decode import fused_decode_kernel
from gdn_plugin.ops._triton.prologue import conv_prologue_kernel
from gdn_plugin.ops._triton.variants import Variant, make_variant
from gdn_plugin.ops._triton.verify import verify_kernel
from gdn_plugin.registry import Problem

CONV_WIDTH = 4
_TYPES = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}


def variants(problem: Problem, sm: int) -> Iterator[Variant]:
    """What the host's `_out` calls of `problem` compile on `sm`, both flags of whatever a layer fixes once (z or no z).

    Alignments are those of vLLM's tensors: strides of pools and projections are multiples of 16 elements.
    """
    K, V = problem.head_k_dim, problem.head_v_dim
    io, state = _TYPES[problem.dtype], _TYPES[problem.state_dtype]
    state_dtype = getattr(torch, problem.state_dtype)
    label = f"K{K} V{V} {problem.dtype} state={problem.state_dtype}"
    gates = {"p_a": io, "p_b": io, "p_A_log": "*fp32", "p_dt_bias": io}
    pools = {"p_state": state, "p_indices": "*i32"}
    qkv = {"p_q": io, "p_k": io, "p_v": io, "p_out": io, "scale": "fp32"}
    if problem.op == "decode":
        for config in distinct(tiles.decode_configs(sm, state_dtype, K, V)):
            constexprs = {"K": K, "V": V, "BV": config.block_v, "L2NORM": True, "ZERO_PADDING": False}
            yield _tile_variant(f"decode {label}", decode_kernel, qkv | gates | pools, constexprs, config)
    elif problem.op == "verify":
        offsets = {"p_accepted": "*i32", "p_start": "*i32", "p_cu_seqlens": "*i32"}
        for config in distinct(tiles.verify_configs(sm, state_dtype, K, V)):
            constexprs = {"K": K, "V": V, "BV": config.block_v, "L2NORM": True, "ZERO_PADDING": False}
            yield _tile_variant(f"verify {label}", verify_kernel, qkv | gates | pools | offsets, constexprs, config)
    elif problem.op == "fused_decode":
        conv = {"p_x": io, "p_weight": io, "p_conv_state": io, "p_out": io, "scale": "fp32", "eps": "fp32"}
        ratio = problem.num_v_heads // problem.num_k_heads
        for config in distinct(tiles.fused_decode_configs(sm, state_dtype, K, V)):
            for norm in (True, False):
                types = conv | gates | pools
                constexprs = {
                    "p_bias": None, "K": K, "V": V, "W": CONV_WIDTH, "RATIO": ratio, "BR": power_of_two(ratio),
                    "BV": config.block_v, "SIGMOID": False, "ZERO_PADDING": False,
                }  # fmt: skip
                if ratio * V > config.block_v:
                    types = types | {"p_counters": "*i32"}
                else:
                    constexprs["p_counters"] = None
                if norm:
                    types = types | {"p_z": io, "p_norm_weight": io}
                else:
                    constexprs |= {"p_z": None, "p_norm_weight": None}
                name = f"fused_decode {label} Hv/Hk={ratio} norm={'in' if norm else 'no'}"
                yield _tile_variant(name, fused_decode_kernel, types, constexprs, config)
    elif problem.op == "conv_prologue":
        types = gates | pools | {
            "p_x": io, "p_weight": io, "p_conv_state": io, "p_cu_seqlens": "*i32", "p_has_initial": "*i1",
            "p_q": io, "p_k": io, "p_v": io, "p_g": "*fp32", "p_beta": "*fp32",
        }  # fmt: skip
        for config in distinct(tiles.prologue_configs(sm, getattr(torch, problem.dtype), K, V)):
            for speculative in (False, True):
                constexprs = {
                    "p_bias": None, "K": K, "V": V, "W": CONV_WIDTH, "R": config.runs, "RUN": config.run_length,
                    "BH": power_of_two(problem.num_v_heads), "EXP_GATE": False,
                }  # fmt: skip
                if speculative:  # rows under speculation always have a state
                    constexprs |= {"p_has_initial": None, "p_state": None}
                    kinds = types | {"p_accepted": "*i32"}
                else:
                    constexprs["p_accepted"] = None
                    kinds = types
                yield make_variant(
                    f"conv_prologue {label} {config.runs}x{config.run_length}{' speculative' if speculative else ''}",
                    conv_prologue_kernel, kinds, constexprs, unaligned(conv_prologue_kernel), config.num_warps, 1,
                )  # fmt: skip


def distinct(configs: tuple) -> list:
    """`configs` without repetitions, in order."""
    return list(dict.fromkeys(configs))


def power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def unaligned(kernel) -> tuple[str, ...]:
    """The arguments that the kernel's decorator keeps from being specialised."""
    return tuple(p.name for p in kernel.params if p.do_not_specialize or p.do_not_specialize_on_alignment)


def _tile_variant(name: str, kernel, types: dict, constexprs: dict, config: tiles.TileConfig) -> Variant:
    return make_variant(
        f"{name} BV={config.block_v} warps={config.num_warps}",
        kernel,
        types,
        constexprs,
        unaligned(kernel),
        config.num_warps,
        config.num_stages,
    )
