"""The gated RMSNorm at every level that this machine can run: strided x, z and out, in place or not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gdn_plugin.backends.cpu import build, kernels

EPS = 1e-5


@pytest.fixture(params=[level.name for level in build.levels()])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    with build.forced_level(request.param):
        yield request.param


def formula(x: Tensor, z: Tensor, weight: Tensor, gate: str) -> Tensor:
    x, z = x.double(), z.double()
    act = torch.sigmoid if gate == "sigmoid" else torch.nn.functional.silu
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight.double() * act(z)


def inside(x: Tensor) -> tuple[Tensor, Tensor]:
    """(buffer, view): a copy of x whose heads and tokens have other values before and behind them."""
    tokens, heads, dim = x.shape
    buffer = torch.full((tokens + 2, heads + 2, dim + 3), 7.0, dtype=x.dtype)
    view = buffer[1:-1, 1:-1, 2 : 2 + dim]
    view.copy_(x)
    return buffer, view


@pytest.mark.parametrize("place", ["in place", "out of place"])
@pytest.mark.parametrize("gate", ["silu", "sigmoid"])
@pytest.mark.parametrize("io", [torch.float32, torch.bfloat16, torch.float16], ids=lambda x: str(x)[6:])
@pytest.mark.parametrize(
    "size", [(33, 3, 37), (17, 4, 128), (1, 1, 1), (0, 2, 16)], ids=lambda x: "x".join(map(str, x))
)
@pytest.mark.parametrize("wide_weight", [False, True], ids=["io", "fp32"])
def test_it_is_the_formula(
    level: str, size: tuple[int, int, int], io: torch.dtype, gate: str, place: str, wide_weight: bool
) -> None:
    torch.manual_seed(0)
    tokens, heads, dim = size
    weight = torch.randn(dim, dtype=torch.float32 if wide_weight else io)
    start = torch.randn(tokens, heads, dim, dtype=io)
    z = torch.randn(tokens, 2 * heads * dim + 5, dtype=io)[:, 3 : 3 + heads * dim].unflatten(1, (heads, dim))
    x_buffer, x = inside(start)
    buffer, out = (x_buffer, x) if place == "in place" else inside(torch.full_like(start, float("nan")))
    kernels.GATED_NORM.run(x=x, z=z, weight=weight, eps=EPS, gate=gate, out=out)
    want = formula(start, z, weight, gate)
    # Rounded once: half a unit in the last place of the io dtype, and a little for fp32 in between.
    bound = want.abs() * (torch.finfo(io).eps / 2 + 4e-6) + torch.finfo(io).smallest_normal
    assert bool(((out.double() - want).abs() <= bound).all())
    assert place == "in place" or torch.equal(x, start)
    out.fill_(7)
    assert bool((buffer == 7).all()), "written outside of the output"


@pytest.mark.parametrize("gate", ["silu", "sigmoid"])
def test_nan_and_infinity_are_torchs(level: str, gate: str) -> None:
    strange = torch.tensor([float("nan"), float("inf"), -float("inf"), 300.0, -300.0, 0.0])
    x, z = torch.ones(6, 1, 21), torch.ones(6, 1, 21)
    z[:, 0, 3] = z[:, 0, 20] = strange
    x[0, 0, 5], x[1, 0, 5] = float("nan"), float("inf")
    out = torch.empty_like(x)
    kernels.GATED_NORM.run(x=x, z=z, weight=torch.ones(21), eps=EPS, gate=gate, out=out)
    torch.testing.assert_close(out.double(), formula(x, z, torch.ones(21), gate), equal_nan=True, rtol=1e-5, atol=1e-5)
