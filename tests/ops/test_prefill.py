"""prefill of backend `torch`: its driver that reads no lengths, any shape, windows, memory. See tests/contract, too."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gdn_plugin.backends.torch import delta_chunk
from gdn_plugin.backends.torch import prefill as chunked
from gdn_plugin.ops.cases import Heads, prefill_case
from tests.contract import test_contract as contract
from tests.contract.site import CPU
from tests.support.checks import check
from tests.support.memory import peak_bytes
from tests.support.public import public

LENGTHS = [(0,), (1,), (63,), (64,), (65,), (129,), (64, 1, 129), (0, 65, 0), (1, 1, 1, 1)]


def on_device(*, max_seqlen, padding, **args):
    """Backend `torch`, as it runs where lengths must not be read: the same arithmetic, on CPU tensors."""
    chunked._prefill_device(**args)


@pytest.mark.parametrize("lens", [x for x in LENGTHS if sum(x)], ids=lambda x: "+".join(map(str, x)))
def test_lengths_without_reading_them(lens):
    check(on_device, prefill_case(lens, heads=Heads(1, 2, 16, 24)))


@pytest.mark.parametrize("zero_padding", [True, False], ids=["returning", "out"])
@pytest.mark.parametrize("name", [name for op, name in contract.TABLE if op == "prefill"])
def test_contract_without_reading_lengths(name, zero_padding):
    case = contract.build(CPU, "prefill", name)
    if case.live.shape[0]:
        check(on_device, case, zero_padding=zero_padding)


def test_windows_of_the_device_driver(monkeypatch):
    """The carried state survives the border between two windows, in the middle of a sequence and between two."""
    monkeypatch.setattr(chunked, "_DEVICE_CHUNKS", 2)
    check(on_device, prefill_case((64 * 5 + 3, 64, 1), checkpoint_every=64))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    lens=st.lists(st.integers(0, 140), min_size=1, max_size=4).filter(sum),
    heads=st.builds(
        lambda hk, r, K, V: Heads(hk, hk * r, K, V),
        st.integers(1, 3), st.sampled_from([1, 2, 3]), st.sampled_from([4, 16, 20]), st.sampled_from([4, 8, 20]),
    ),
    io_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    gate=st.sampled_from(["mild", "none", "strong"]),
    keys=st.sampled_from(["random", "correlated"]),
    pad_tokens=st.sampled_from([0, 1, 65]),
    seed=st.integers(0, 3),
    data=st.data(),
)  # fmt: skip
def test_any_shape(lens, heads, io_dtype, gate, keys, pad_tokens, seed, data):
    some = st.sets(st.integers(0, len(lens) - 1), max_size=len(lens))
    fresh, padding = tuple(data.draw(some)), tuple(data.draw(some))
    case = prefill_case(
        lens, heads, io_dtype, gate=gate, keys=keys, fresh=fresh, padding=padding, pad_tokens=pad_tokens, seed=seed
    )
    check(public("prefill", "torch"), case)
    check(on_device, case)


def test_inverse_of_an_ill_conditioned_looking_triangle():
    """All entries below the diagonal one: L's powers reach 1e18, its (I + L)^-1 has entries of one."""
    L = torch.ones(3, 64, 64)
    got = delta_chunk.unit_lower_inverse(L, torch.zeros_like(L))
    want = torch.linalg.inv((torch.eye(64) + L.tril(-1)).double())
    assert (got - want).abs().max() < 1e-5


@pytest.mark.parametrize("driver", [chunked.prefill, on_device], ids=["host", "device"])
def test_extra_memory_does_not_grow_with_length(driver):
    """Peak of what the call allocates: at most T * Hv * (K + V + 64) elements, and windows do not grow with T."""
    heads, peaks = Heads(2, 4, 64, 64), []
    for length in (4096, 8192):
        case = prefill_case((length,), heads)
        pools = {n: p.clone().view for n, p in case.pools.items()}
        out = torch.empty(case.outputs["out"][0])
        args = {**case.args, **pools, "out": out, "zero_padding": True}
        peaks.append(peak_bytes(lambda args=args: driver(**args)))
        assert peaks[-1] <= 4 * length * heads.v_heads * (heads.k_dim + heads.v_dim + 64)
    per_token = heads.v_heads * heads.v_dim * 4 if driver is on_device else 0  # its buffer of results
    indices = 64 * 4 if driver is on_device else 0  # a handful of int64 a token
    assert peaks[1] - peaks[0] <= 4096 * (per_token + indices)
