"""Tensors as the vLLM host hands them over, for the three functions of the backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

HK, HV, D, ROWS = 16, 32, 128, 70


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda")


def pool(dtype: torch.dtype, padding: int = 8192) -> Tensor:
    """Rows apart by more than they hold: vLLM keeps conv and ssm state in one page."""
    strides = (HV * D * D + padding, D * D, D, 1)
    return torch.empty_strided((ROWS, HV, D, D), strides, dtype=dtype, device="cuda")


def prefill_args(state_dtype: torch.dtype, *, batch: int = 8, tokens: int = 4099, **changes: Any) -> dict[str, Any]:
    given = {
        "q": empty(tokens, HK, D),
        "k": empty(tokens, HK, D),
        "v": empty(tokens, HV, D),
        "g": empty(tokens, HV, dtype=torch.float32),
        "beta": empty(tokens, HV, dtype=torch.float32),
        "state": pool(state_dtype),
        "state_indices": empty(batch, dtype=torch.int32),
        "cu_seqlens": empty(batch + 1, dtype=torch.int32),
        "has_initial_state": None,
        "scale": D**-0.5,
        "use_qk_l2norm": False,
        "exp_gate": True,
        "max_seqlen": tokens,
        "null_index": 0,
        "padding": "none",
        "out": empty(tokens, HV, D),
        "checkpoints": None,
        "checkpoint_cu_starts": None,
        "checkpoint_every": 0,
        "zero_padding": False,
    }
    return given | changes


def checkpoint_args(state_dtype: torch.dtype, batch: int, every: int = 64) -> dict[str, Any]:
    return {
        "checkpoints": empty(40, HV, D, D, dtype=state_dtype),
        "checkpoint_cu_starts": empty(batch + 1, dtype=torch.int32),
        "checkpoint_every": every,
    }


def _recurrent(tokens: int) -> dict[str, Any]:
    """q, k, v and the gates are slices of the projections, as the conv and the gate projection leave them."""
    qkv, ba = empty(tokens, 2 * HK * D + HV * D + 64), empty(tokens, 2 * HV)
    row = qkv.stride(0)
    return {
        "q": qkv.as_strided((tokens, HK, D), (row, D, 1), 0),
        "k": qkv.as_strided((tokens, HK, D), (row, D, 1), HK * D),
        "v": qkv.as_strided((tokens, HV, D), (row, D, 1), 2 * HK * D),
        "a": ba.as_strided((tokens, HV), (2 * HV, 1), HV),
        "b": ba.as_strided((tokens, HV), (2 * HV, 1), 0),
        "A_log": empty(HV, dtype=torch.float32),
        "dt_bias": empty(HV),
        "scale": D**-0.5,
        "use_qk_l2norm": False,
        "padding": "none",
        "out": empty(tokens, HV, D),
        "zero_padding": False,
    }


def decode_args(state_dtype: torch.dtype, *, batch: int = 5, **changes: Any) -> dict[str, Any]:
    given = {
        "state": pool(state_dtype),
        "state_indices": empty(batch, dtype=torch.int32),
        "null_index": 0,
    }
    return _recurrent(batch) | given | changes


def verify_args(state_dtype: torch.dtype, *, batch: int = 5, width: int = 4, **changes: Any) -> dict[str, Any]:
    given = {
        "state": pool(state_dtype, padding=0 if state_dtype == torch.float32 else 8192),
        "state_indices": empty(batch, width, dtype=torch.int32),
        "num_accepted_tokens": empty(batch, dtype=torch.int32),
        "cu_seqlens": empty(batch + 1, dtype=torch.int32),
        "start_rows": None,
        "null_index": 0,
    }
    return _recurrent(batch * width) | given | changes
