"""Projections whose heads are interleaved, and how to sort them.

Flat projections hold q of all key heads, then k of all, then v of all value heads (and z, b, a by value head).
Interleaved ones, Qwen3-Next's, hold a key head's share together: its q, its k, the v of its value heads, their z; and
in the projection of the gates their b, their a. They come to the ops as views with the key heads as a dim of their own,

    mixed_qkv [T, Hk, dim/Hk]    z [T, Hk, Hv/Hk, V]    a, b [T, Hk, Hv/Hk]

which is how the ops tell them. The channels of conv_weight and conv_state are in the flat order in either case. What
reads strides takes the views as they are (`BackendOp.interleaved`); for everybody else they are sorted here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gdn_plugin.ops.record import Op


def flat(record: Op, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """Those of a call's tensors that have interleaved heads, in flat order: new tensors, each element copied once."""
    found = {}
    for argument in record.projections:
        name, x = argument.name, arguments[argument.name]
        if x is not None and x.dim() > len(argument.shape):
            found[name] = flat_qkv(x, arguments["head_k_dim"]) if name == "mixed_qkv" else x.flatten(1, 2)
    return found


def flat_qkv(mixed_qkv: Tensor, head_k_dim: int) -> Tensor:
    """mixed_qkv [T, Hk, dim/Hk] in the order of the convolution's channels: [T, dim], new."""
    tokens, key_heads, share = mixed_qkv.shape
    sorted_qkv = mixed_qkv.new_empty(tokens, key_heads * share)
    sizes = (head_k_dim, head_k_dim, share - 2 * head_k_dim)
    parts = sorted_qkv.split([key_heads * size for size in sizes], dim=1)
    for part, size, source in zip(parts, sizes, mixed_qkv.split(sizes, dim=2), strict=True):
        part.unflatten(1, (key_heads, size)).copy_(source)
    return sorted_qkv
