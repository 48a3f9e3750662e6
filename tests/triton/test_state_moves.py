"""The kernel that moves states between cache blocks, under Triton's interpreter, against the functions for CPUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gdn_plugin.hosts.vllm import state_moves
from tests.support.moves import moved, world

KINDS = ["before", "after", "after, V1"]


@pytest.fixture(autouse=True)
def several_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small pools have more sequences, units and shares than are handled at once."""
    for name, value in {"_SEQUENCES": 4, "_UNIT": 32, "_SHARES": 3}.items():
        monkeypatch.setattr(state_moves, name, value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ring", [False, True], ids=["plain", "ring"])
@pytest.mark.parametrize("dim_first", [False, True], ids=["SD", "DS"])
@pytest.mark.parametrize(
    ("dtype", "state_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=["bf16", "fp32"]
)
def test_as_on_a_cpu(kind: str, ring: bool, dim_first: bool, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    facts: dict[str, Any] = {"ring": ring, "dim_first": dim_first, "dtype": dtype, "state_dtype": state_dtype}
    before = world(sequences=6, seed=3, **facts).pools
    here, there = (moved(kind, 6, 3, on, **facts) for on in ("gpu", "cpu"))
    assert any(not torch.equal(a, b) for a, b in zip(before, there, strict=False)), "nothing was moved"
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_one_sequence(kind: str) -> None:
    facts: dict[str, Any] = {"ring": True, "dim_first": False, "dtype": torch.float16, "state_dtype": torch.float16}
    some = False
    for seed in range(6):
        here, there = (moved(kind, 1, seed, on, **facts) for on in ("gpu", "cpu"))
        assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
        before = world(sequences=1, seed=seed, **facts).pools
        some |= any(not torch.equal(a, b) for a, b in zip(before, there, strict=False))
    assert some, "nothing was moved"
