"""Where heads lie in the projections, as numbers that a kernel takes.

Flat and interleaved projections (see gdn_plugin.ops) differ in strides alone: from what belongs to one key head to what
belongs to the next, and, within a key head's share, from value head to value head. One compiled kernel serves both.
"""

from __future__ import annotations

from torch import Tensor


def qkv_strides(mixed_qkv: Tensor, num_k_heads: int, num_v_heads: int, K: int, V: int) -> dict[str, int]:
    """Of mixed_qkv [T, dim] or [T, Hk, dim/Hk], in elements, by the name of a kernel's argument.

    stride_x: from token to token. stride_x_k: from the q of a key head to that of the next, and the same for k.
    stride_x_v: from the first v of a key head to that of the next; value heads of one key head are V apart. first_k,
    first_v: where the first k and the first v start in a token.
    """
    if mixed_qkv.dim() == 2:
        by_key, by_value = K, num_v_heads // num_k_heads * V
        first_k, first_v = num_k_heads * K, 2 * num_k_heads * K
    else:
        by_key = by_value = mixed_qkv.stride(1)
        first_k, first_v = K, 2 * K
    return {
        "stride_x": mixed_qkv.stride(0), "stride_x_k": by_key, "stride_x_v": by_value, "first_k": first_k,
        "first_v": first_v,
    }  # fmt: skip


def value_strides(name: str, x: Tensor, num_k_heads: int, num_v_heads: int) -> dict[str, int]:
    """Of a, b [T, Hv] or [T, Hk, Hv/Hk] and z [T, Hv, V] or [T, Hk, Hv/Hk, V], in elements, by argument.

    stride_<name>_t: from token to token. stride_<name>_k: from the first value head of a key head to that of the next.
    stride_<name>_h: from value head to value head of one key head.
    """
    if x.dim() == (3 if name == "z" else 2):
        by_value = x.stride(1)
        by_key = num_v_heads // num_k_heads * by_value
    else:
        by_key, by_value = x.stride(1), x.stride(2)
    return {f"stride_{name}_t": x.stride(0), f"stride_{name}_k": by_key, f"stride_{name}_h": by_value}
