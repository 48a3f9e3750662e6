"""Tensors as FlashInfer's kernels take them: how ours are brought to that, and the scratch ones that variants run on.

FlashInfer compiles a kernel for dense vectors that start on a boundary, and reads strides literally even where a dim
has size one. What a caller may bring and a kernel does not take is made good here, by a view or by one small copy. The
large tensors (q, k, v, states) are never copied: a row's checks refuse what the kernels cannot take of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gdn_plugin.ops.cases import case
from gdn_plugin.registry.problem import Problem


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


def scratch(problem: Problem, lens: Sequence[int], pool: Tensor | None = None, **features: Any) -> dict[str, Any]:
    """A call of the problem as `cases` lays it out, for variants to run on: of zeros, all in scratch memory.

    With zeros for k and v, and no decay (exp(A_log) is 0 in fp32), a state stays as it is to the last bit, so the row 0
    that all sequences name may be one of the host's. Row numbers start off a boundary, which takes launches of ours.

    Args:
        pool: a state pool to run on.
        features: of the op's maker.
    """
    laid_out: dict[str, Any] = {"promise": "scratch", "index_stride": 2, "pool_rows": 2}
    given = case(problem, lens, device="meta", **laid_out | features).arguments(zero_padding=True)
    given = {name: _zeros(x) if isinstance(x, Tensor) else x for name, x in given.items()}
    if "A_log" in given:
        given["A_log"].fill_(-200.0)
    return given if pool is None else given | {"state": pool}


def _zeros(x: Tensor) -> Tensor:
    offset = 1 if x.dtype == torch.int32 else 0
    extent = offset + 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return torch.zeros(extent, dtype=x.dtype, device="cuda").as_strided(x.shape, x.stride(), offset)
