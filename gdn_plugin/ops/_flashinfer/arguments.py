"""What FlashInfer's kernels ask of tensors, checked before anything is written: a refusal and never a silent copy."""

from __future__ import annotations

import torch
from torch import Tensor


def need_contiguous(**tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and not x.is_contiguous():
            raise ValueError(
                f"{name}: backend flashinfer needs it contiguous, got shape {tuple(x.shape)} with strides {x.stride()}"
            )


def need_unit_inner_stride(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(f"{name}: the last dim must have stride 1, got strides {x.stride()}")


def need_dtype(wanted: tuple[torch.dtype, ...], **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and x.dtype not in wanted:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in wanted)
            raise ValueError(f"{name}: backend flashinfer needs {names}, got {str(x.dtype).removeprefix('torch.')}")


def need_alignment(multiple: int, **tensors: Tensor | None) -> None:
    """The kernels are compiled for tensors that start on such a boundary.

    Asked of the storage offset: the allocator's blocks start on 512 bytes, and a fake tensor has no address.
    """
    for name, x in tensors.items():
        if x is not None and not is_aligned(x, multiple):
            raise ValueError(
                f"{name}: backend flashinfer needs it to start on a multiple of {multiple} bytes, "
                f"got an offset of {x.storage_offset() * x.element_size()} bytes"
            )


def is_aligned(x: Tensor, multiple: int) -> bool:
    return x.storage_offset() * x.element_size() % multiple == 0


def is_dense(x: Tensor) -> bool:
    """Whether a vector's elements lie side by side."""
    return x.shape[0] <= 1 or x.stride(0) == 1


def as_its_shape_says(x: Tensor) -> Tensor:
    """The same contiguous tensor with the strides that its shape implies. A view.

    A dim of size one may have any stride (`rows[:, 0]` of one sequence has the table's), and CuTe refuses to compile
    for another than 1.
    """
    strides = [1]
    for size in reversed(x.shape[1:]):
        strides.insert(0, strides[0] * size)
    return x.as_strided(x.shape, strides)
