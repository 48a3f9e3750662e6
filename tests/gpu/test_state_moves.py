"""The kernel that moves states between cache blocks, on a GPU, against the functions for CPUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.moves import moved

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.mark.parametrize("kind", ["before", "after", "after, V1"])
@pytest.mark.parametrize("ring", [False, True], ids=["plain", "ring"])
@pytest.mark.parametrize("dim_first", [False, True], ids=["SD", "DS"])
@pytest.mark.parametrize(("dtype", "state_dtype"), [(BF16, FP32), (BF16, BF16), (FP16, FP16), (FP32, FP32)])
@pytest.mark.parametrize("sequences", [1, 7, 300, 1500])
def test_as_on_a_cpu(
    kind: str, ring: bool, dim_first: bool, dtype: torch.dtype, state_dtype: torch.dtype, sequences: int
) -> None:
    facts: dict[str, Any] = {"ring": ring, "dim_first": dim_first, "dtype": dtype, "state_dtype": state_dtype}
    here = moved(kind, sequences, 3, "gpu", device="cuda", **facts)
    there = moved(kind, sequences, 3, "cpu", **facts)
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
