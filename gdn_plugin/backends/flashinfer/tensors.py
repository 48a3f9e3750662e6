"""Tensors as FlashInfer's kernels take them: how ours are brought to that, and the scratch ones that variants run on.

FlashInfer compiles a kernel for dense vectors that start on a boundary, and reads strides literally even where a dim
has size one. What a caller may bring and a kernel does not take is made good here, by a view or by one small copy. The
large tensors (q, k, v, states) are never copied: a row's checks refuse what the kernels cannot take of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gdn_plugin.registry.problem import Problem

_GAP = 32  # elements between rows of a padded scratch pool; how many does not reach a kernel that takes any pool


def is_aligned(x: Tensor, multiple: int) -> bool:
    """Whether it starts on such a boundary, in bytes.

    Asked of the storage offset: the allocator's blocks start on 512 bytes, and a fake tensor has no address.
    """
    return x.storage_offset() * x.element_size() % multiple == 0


def plain(x: Tensor) -> Tensor:
    """The same contiguous tensor with the strides that its shape implies. A view, and nothing in the usual case.

    A dim of size one may have any stride (`rows[:, 0]` of one sequence has the table's), and CuTe refuses to compile
    for another than the shape's.
    """
    if 1 not in x.shape:
        return x
    strides = [1]
    for size in reversed(x.shape[1:]):
        strides.insert(0, strides[0] * size)
    return x.as_strided(x.shape, strides)


def settled(x: Tensor, boundary: int) -> Tensor:
    """A vector or small table, dense and on a boundary of that many bytes: itself, or else a copy (one launch)."""
    if x.is_contiguous() and is_aligned(x, boundary):
        return plain(x)
    return x.clone(memory_format=torch.contiguous_format)


def sizes(most: int) -> Iterator[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, ..., up to `most`.

    FlashInfer changes kernels by sequences times heads. The narrowest of its classes spans 296 to 511, so steps of a
    half or less miss none.
    """
    size, step = 1, 1
    while size <= most:
        yield size
        if size >= 4 and size & (size - 1) == 0:
            step = size // 2
        size += step


def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(*shape, dtype=dtype, device="cuda")


def scratch_pool(problem: Problem, rows: int) -> Tensor:
    """A pool of the problem's layout, of zeros."""
    shape = (rows, problem.num_v_heads, problem.head_v_dim, problem.head_k_dim)
    row, inner = shape[1] * shape[2] * shape[3], (shape[2] * shape[3], shape[3], 1)
    held = zeros(rows * (row + _GAP), dtype=getattr(torch, problem.state_dtype))
    return held.as_strided(shape, (row + _GAP * problem.padded_pool, *inner))


def scratch_qkv(problem: Problem, tokens: int) -> dict[str, Tensor]:
    """q, k, v and out, of zeros."""
    dtype = getattr(torch, problem.dtype)
    keys = (tokens, problem.num_k_heads, problem.head_k_dim)
    values = (tokens, problem.num_v_heads, problem.head_v_dim)
    shapes = {"q": keys, "k": keys, "v": values, "out": values}
    return {name: zeros(*shape, dtype=dtype) for name, shape in shapes.items()}


def scratch_gates(problem: Problem, tokens: int, bias: str) -> dict[str, Tensor]:
    """a, b, A_log and dt_bias that, with zeros for k and v, leave a state as it is to the last bit."""
    heads, dtype = problem.num_v_heads, getattr(torch, problem.gate_dtype or problem.dtype)
    return {
        "a": zeros(tokens, heads, dtype=dtype),
        "b": zeros(tokens, heads, dtype=dtype),
        # exp(A_log) is 0 in fp32, so nothing decays.
        "A_log": torch.full((heads,), -200.0, dtype=torch.float32, device="cuda"),
        "dt_bias": zeros(heads, dtype=getattr(torch, bias)),
    }
