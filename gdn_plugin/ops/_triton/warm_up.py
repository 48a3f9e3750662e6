"""Compiles what conv_prologue, decode, fused_decode and verify can reach, by calling them on one sequence.

A variant is fixed by dtypes, which pointers are None, alignments, and the configuration; so every configuration of the
tables is called on tensors laid out as the host's are: slices of a projection, page-padded pools.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from gdn_plugin.ops._triton import decode, fused_decode, prologue, tiles, verify
from gdn_plugin.ops._triton.launch import device_sm
from gdn_plugin.ops._triton.variant_list import CONV_WIDTH, distinct
from gdn_plugin.registry import Problem


def warm_up(problem: Problem) -> None:
    """Compile on the current CUDA device; launches real kernels on a few rows of scratch memory."""
    device = torch.device("cuda", torch.cuda.current_device())
    hk, hv, K, V = problem.num_k_heads, problem.num_v_heads, problem.head_k_dim, problem.head_v_dim
    io, state_dtype = getattr(torch, problem.dtype), getattr(torch, problem.state_dtype)
    sm = device_sm(device)
    steps = max(problem.max_spec_tokens, 1)
    key_dim, value_dim = hk * K, hv * V
    dim = 2 * key_dim + value_dim

    def zeros(*shape: int, dtype: torch.dtype = io) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    row = value_dim * K
    page = row + 16 * (dim if problem.padded_pool else 0)
    state = zeros((steps + 1) * page, dtype=state_dtype).as_strided((steps + 1, hv, V, K), (page, V * K, K, 1))
    projection = zeros(steps, dim + value_dim)
    mixed = projection[:, :dim]
    z = projection[:, dim:].view(steps, hv, V)
    q, k = (mixed[:, i * key_dim : (i + 1) * key_dim].view(steps, hk, K) for i in range(2))
    v = mixed[:, 2 * key_dim :].view(steps, hv, V)
    a, b, A_log = zeros(steps, hv), zeros(steps, hv), zeros(hv, dtype=torch.float32)
    conv_state = zeros(2, dim, CONV_WIDTH - 1 + steps)
    weight = zeros(dim, CONV_WIDTH)
    one = torch.ones(1, dtype=torch.int32, device=device)
    out = zeros(steps, hv, V)
    scale = K**-0.5

    # Models keep dt_bias in the io dtype or in fp32. Padding is zeroed for ops that return, left by `_out` ops.
    biases = (zeros(hv), zeros(hv, dtype=torch.float32))
    for dt_bias, zero_padding in itertools.product(biases, (False, True)):
        gates = (a, b, A_log, dt_bias)
        first = (a[:1], b[:1], A_log, dt_bias)
        if problem.op == "decode":
            for config, norm in itertools.product(distinct(tiles.decode_configs(sm, state_dtype, K, V)), (True, False)):
                decode.decode_with_config(q[:1], k[:1], v[:1], *first, state, one, scale, norm, 0, out[:1],
                                          zero_padding, config=config)  # fmt: skip
        elif problem.op == "verify":
            rows = torch.arange(1, steps + 1, dtype=torch.int32, device=device)[None]
            offsets = torch.tensor([0, steps], dtype=torch.int32, device=device)
            for config, norm in itertools.product(distinct(tiles.verify_configs(sm, state_dtype, K, V)), (True, False)):
                verify.verify_with_config(q, k, v, *gates, state, rows, one, offsets, None, scale, norm, 0, out,
                                          zero_padding, config=config)  # fmt: skip
        elif problem.op == "fused_decode":
            norms = ((None, None, "silu"), (z[:1], zeros(V), "silu"), (z[:1], zeros(V), "sigmoid"))
            for config, (gate_input, norm_weight, gate) in itertools.product(
                distinct(tiles.fused_decode_configs(sm, state_dtype, K, V)), norms
            ):
                fused_decode.fused_decode_with_config(
                    mixed[:1], weight, None, conv_state, *first, state, one, hk, K, V, scale, gate_input, norm_weight,
                    1e-6, gate, 0, out[:1], zero_padding, config=config,
                )  # fmt: skip
        elif problem.op == "conv_prologue" and not zero_padding:
            outputs = (zeros(steps, hk, K), zeros(steps, hk, K), zeros(steps, hv, V),
                       zeros(steps, hv, dtype=torch.float32), zeros(steps, hv, dtype=torch.float32))  # fmt: skip
            offsets = torch.tensor([0, steps], dtype=torch.int32, device=device)
            fresh = torch.zeros(1, dtype=torch.bool, device=device)
            calls = ((fresh, None, state), (fresh, None, None), (None, one, None))
            for config, (initial, accepted, pool), exp_gate in itertools.product(
                distinct(tiles.prologue_configs(sm, io, K, V)), calls, (False, True)
            ):
                prologue.conv_prologue_with_config(
                    mixed, weight, None, conv_state, one, offsets, initial, accepted, *gates, pool, hk, K, V, exp_gate,
                    0, *outputs, config=config,
                )  # fmt: skip
