"""SGLang in miniature: the modules that the backend imports, pools, and the metadata of a step as SGLang builds it.

What is here was read in the sources of 0.5.22 and 0.5.23 (`hybrid_linear_attn_backend.py`, `memory_pool.py`,
`schedule_batch.py`); `test_compat.py` checks the names in both.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

HK, HV, K, V, W = 2, 4, 64, 64, 4
DIM = 2 * HK * K + HV * V
SLOTS = 10
CHUNK = 64


class HostBackend:
    """Stands in for the host's own backend: says what was left to it and what it was asked to keep."""

    mis_metadata = None
    mamba_chunk_size = CHUNK

    def __init__(self, model_runner: Any) -> None:
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.forward_metadata: Any = None
        self.left: list[str] = []
        self.kept: list[int] = []

    def supports_prefill_graph_extend(self) -> bool:
        return True

    def forward_decode(
        self, layer: Any, forward_batch: Any, mixed_qkv: Any, a: Tensor, b: Tensor, **kwargs: Any
    ) -> str:
        self.left.append("decode")
        return "the host's"

    def forward_extend(
        self, layer: Any, forward_batch: Any, mixed_qkv: Any, a: Tensor, b: Tensor, **kwargs: Any
    ) -> str:
        self.left.append("extend")
        return "the host's"

    def _track_mamba_state_decode(
        self, forward_batch: Any, conv_states: Tensor, ssm_states: Tensor, cache_indices: Tensor, layer_id: int
    ) -> None:
        assert conv_states.shape[1:] == (DIM, W - 1) and ssm_states.shape[1:] == (HV, V, K)
        self.kept.append(layer_id)


def install(monkeypatch: pytest.MonkeyPatch, *, amx: bool = False, deterministic: bool = False) -> None:
    """Put the fake modules in the place of SGLang's, for one test."""
    executing = SimpleNamespace(deterministic=SimpleNamespace(enable_deterministic_inference=deterministic))
    contents = {
        "sglang.srt.layers.attention.linear.gdn_backend": {"GDNAttnBackend": HostBackend},
        "sglang.srt.runtime_context": {"get_exec": lambda: executing},
        "sglang.srt.utils.common": {"cpu_has_amx_support": lambda: amx},
    }
    for name in contents:
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            package = ModuleType(".".join(parts[:i]))
            package.__path__ = []
            monkeypatch.setitem(sys.modules, package.__name__, package)
    for name, members in contents.items():
        for member, value in members.items():
            setattr(sys.modules[name], member, value)
    monkeypatch.delitem(sys.modules, "gdn_plugin.hosts.sglang.backend", raising=False)


class Pool:
    """SGLang's mamba pool of a few layers: slot 0 is padding's, the others belong to requests or to kept states."""

    def __init__(self, layers: int, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
        self.conv = torch.full((layers, SLOTS, DIM, W - 1), float("nan"), dtype=dtype)
        self.temporal = torch.full((layers, SLOTS, HV, V, K), float("nan"), dtype=state_dtype)
        self.mamba_pool = SimpleNamespace(mamba_cache=SimpleNamespace(conv=[self.conv], temporal=self.temporal))
        self.enable_mamba_extra_buffer = True

    def mamba2_layer_cache(self, layer_id: int) -> SimpleNamespace:
        return SimpleNamespace(conv=[self.conv[layer_id]], temporal=self.temporal[layer_id])


def runner(layers: int = 1, dtype: torch.dtype = torch.float32, state_dtype: torch.dtype = torch.float32) -> Any:
    return SimpleNamespace(req_to_token_pool=Pool(layers, dtype, state_dtype), dtype=dtype)


def layer(layer_id: int = 0, **changed: Any) -> Any:
    """A RadixLinearAttention."""
    generator = torch.Generator().manual_seed(layer_id)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    facts = {
        "layer_id": layer_id,
        "num_q_heads": HK,
        "num_k_heads": HK,
        "num_v_heads": HV,
        "head_q_dim": K,
        "head_k_dim": K,
        "head_v_dim": V,
        "conv_weights": randn(DIM, W) * 0.5,
        "bias": None,
        "activation": "silu",
        "A_log": randn(HV) * 0.5,
        "dt_bias": randn(HV),
        "lower_bound": None,
    }
    return SimpleNamespace(**facts | changed)


@dataclass
class Row:
    """A request's share of an extend.

    Args:
        slot: its state's; 0 of a padding row.
        prefix: tokens computed before.
        count: tokens of this step.
        keep: (track length, slot): the state at the last whole chunk before that length is to be kept there.
    """

    slot: int
    prefix: int
    count: int
    keep: tuple[int, int] | None = None


@dataclass
class Mode:
    """A ForwardMode."""

    speculative: bool = False

    def is_extend_without_speculative(self) -> bool:
        return not self.speculative


@dataclass
class Step:
    """`forward_metadata` and `forward_batch`."""

    metadata: SimpleNamespace = field(default_factory=SimpleNamespace)
    batch: SimpleNamespace = field(default_factory=SimpleNamespace)


def extend(rows: Sequence[Row], *, on_cpu: bool = True, speculative: bool = False) -> Step:
    """As `_forward_metadata` makes it for an extend. on_cpu: with the scheduler's own lists, as an engine has them."""
    counts, prefixes = [row.count for row in rows], [row.prefix for row in rows]
    starts = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    tracked = [row.keep is not None for row in rows]
    lengths = [row.keep[0] if row.keep else -1 for row in rows]
    tensor = torch.tensor
    return Step(
        SimpleNamespace(
            query_start_loc=starts,
            mamba_cache_indices=_int32([row.slot for row in rows]),
            logical_num_tokens=sum(counts),
            mamba_track_indices=tensor([row.keep[1] if row.keep else -1 for row in rows]),
            has_mamba_track_mask=any(tracked),
            replayssm_write_pos=None,
        ),
        SimpleNamespace(
            forward_mode=Mode(speculative),
            extend_prefix_lens=_int32(prefixes),
            extend_prefix_lens_cpu=prefixes if on_cpu else None,
            extend_seq_lens_cpu=counts if on_cpu else None,
            mamba_track_mask=tensor(tracked),
            mamba_track_seqlens=tensor(lengths),
            mamba_prefill_track_mask_cpu=tracked if on_cpu else None,
            mamba_track_seqlens_cpu=lengths if on_cpu else None,
        ),
    )


def decode(slots: Sequence[int], padding: int = 0, null: int = -1) -> Step:
    """As `_replay_metadata` makes it: rows of padding name -1 in a replayed graph; an eager one's name slot 0."""
    real = len(slots)
    return Step(
        SimpleNamespace(
            query_start_loc=_int32([*range(real + 1), *[real] * padding]),
            mamba_cache_indices=_int32([*slots, *[null] * padding]),
            has_mamba_track_mask=False,
            replayssm_write_pos=None,
        ),
        SimpleNamespace(forward_mode=Mode()),
    )


def _int32(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)
