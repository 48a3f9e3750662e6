"""The native gated RMSNorm behind a prefill, at every level that this machine can run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gdn_plugin.ops.cpu import build
from gdn_plugin.ops.cpu.gated_norm import gated_norm

EPS = 1e-5


@pytest.fixture(params=[level.name for level in build.levels()])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    with build.forced_level(request.param):
        yield request.param


def formula(x: Tensor, z: Tensor, weight: Tensor, gate: str) -> Tensor:
    x, z = x.double(), z.double()
    act = torch.sigmoid if gate == "sigmoid" else torch.nn.functional.silu
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight.double() * act(z)


@pytest.mark.parametrize("gate", ["silu", "sigmoid"])
@pytest.mark.parametrize("io", [torch.float32, torch.bfloat16, torch.float16], ids=lambda x: str(x)[6:])
@pytest.mark.parametrize(
    "size", [(33, 3, 37), (17, 4, 128), (1, 1, 1), (0, 2, 16)], ids=lambda x: "x".join(map(str, x))
)
def test_it_is_the_formula(level: str, size: tuple[int, int, int], io: torch.dtype, gate: str) -> None:
    torch.manual_seed(0)
    tokens, heads, dim = size
    weight = torch.randn(dim, dtype=io)
    x = torch.randn(tokens, heads, dim, dtype=io)
    z = torch.randn(tokens, 2 * heads * dim + 5, dtype=io)[:, 3 : 3 + heads * dim].unflatten(1, (heads, dim))
    buffer = torch.full((tokens, heads + 2, dim), 7.0, dtype=io)
    own = buffer[:, 1:-1]
    own.copy_(x)
    before = z.clone()
    gated_norm(own, z, weight, EPS, gate)
    want = formula(x, z, weight, gate)
    # Rounded once: half a unit in the last place of the io dtype, and a little for fp32 in between.
    bound = want.abs() * (torch.finfo(io).eps / 2 + 4e-6) + torch.finfo(io).smallest_normal
    assert bool(((own.double() - want).abs() <= bound).all())
    assert bool((buffer[:, [0, -1]] == 7).all())
    assert torch.equal(z, before)


def test_what_does_not_fit_raises() -> None:
    x, weight = torch.zeros(2, 3, 8), torch.zeros(8)
    with pytest.raises(ValueError, match="gated_norm: expected z like x"):
        gated_norm(x, torch.zeros(2, 3, 9), weight, EPS, "silu")
    with pytest.raises(ValueError, match="a contiguous weight"):
        gated_norm(x, x, torch.zeros(16)[::2], EPS, "silu")
