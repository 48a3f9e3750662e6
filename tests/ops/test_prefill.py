"""prefill against the float64 reference: odd lengths, head ratios, K != V, pools with poisoned gaps, harsh gates."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gdn_plugin.ops import chunked, delta_chunk
from tests.support.cases import Heads, prefill_case
from tests.support.checks import check
from tests.support.memory import peak_bytes
from tests.support.public import precision, public

LENGTHS = [(0,), (1,), (63,), (64,), (65,), (129,), (64, 1, 129), (0, 65, 0), (1, 1, 1, 1)]


def on_device(*, max_seqlen, **args):
    """Backend `torch`, as it runs where lengths must not be read: the same arithmetic, on CPU tensors."""
    chunked._prefill_device(**args)


@pytest.mark.parametrize("lens", LENGTHS, ids=lambda x: "+".join(map(str, x)))
def test_lengths(backend, lens):
    check(public("prefill", backend), prefill_case(lens, heads=Heads(1, 2, 16, 24)))


@pytest.mark.parametrize("lens", [x for x in LENGTHS if sum(x)], ids=lambda x: "+".join(map(str, x)))
def test_lengths_without_reading_them(lens):
    check(on_device, prefill_case(lens, heads=Heads(1, 2, 16, 24)))


@pytest.mark.parametrize("ratio", [1, 2, 3, 8])
def test_head_ratios(backend, ratio):
    check(public("prefill", backend), prefill_case((70, 3), heads=Heads(2, 2 * ratio, 16, 8), gap=3))


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("io_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(backend, io_dtype, state_dtype):
    case = prefill_case((65, 20), io_dtype=io_dtype, state_dtype=state_dtype, gap=5)
    check(public("prefill", backend), case, precision=precision("prefill", backend, io_dtype))


CASES = {
    "correlated keys": {"lens": (200,), "keys": "correlated", "gate": "none", "heads": Heads(1, 2, 32, 16)},
    "correlated keys, bf16": {"lens": (130, 40), "keys": "correlated", "io_dtype": torch.bfloat16},
    "g down to -20": {"lens": (200, 5), "gate": "strong"},
    "g down to -120, exp gate": {"lens": (150, 65), "gate": "harsh", "exp_gate": True},
    "decays of 0": {"lens": (150, 65, 1), "gate": "wipe"},
    "decays of 0, exp gate": {"lens": (150, 65, 1), "gate": "wipe", "exp_gate": True},
    "exp gate": {"lens": (66,), "exp_gate": True},
    "fresh rows hold NaN": {"lens": (3, 64, 65), "fresh": (0, 2)},
    "all fresh": {"lens": (3, 64), "fresh": (0, 1)},
    "has_initial_state None": {"lens": (3, 64), "fresh": None},
    "padding sequences": {"lens": (5, 70, 3), "padding": (0, 2), "index_stride": 3},
    "null block 0": {"lens": (5, 70, 3), "padding": (1,), "null_index": 0},
    "only padding": {"lens": (5, 70), "padding": (0, 1)},
    "padding tokens": {"lens": (65, 2), "pad_tokens": 70, "hint_seqlen": True},
    "int64 offsets": {"lens": (65, 2), "offsets_dtype": torch.int64},
    "checkpoints of 64": {"lens": (64, 0, 200, 63, 128), "checkpoint_every": 64, "fresh": (2,)},
    "checkpoints of 128": {"lens": (300, 127), "checkpoint_every": 128, "state_dtype": torch.bfloat16},
    "checkpoints and padding": {"lens": (64, 130), "checkpoint_every": 64, "padding": (0,), "pad_tokens": 3},
    "l2 norm inside": {"lens": (70,), "use_qk_l2norm": True, "io_dtype": torch.bfloat16},
    "scale 0.5": {"lens": (70,), "scale": 0.5},
    "scale 0": {"lens": (70,), "scale": 0.0},
    "more than one window": {"lens": (64 * 9, 70), "heads": Heads(3, 9, 8, 8)},
}


@pytest.mark.parametrize("zero_padding", [True, False], ids=["returning", "out"])
@pytest.mark.parametrize("name", CASES)
def test_cases(backend, name, zero_padding):
    case = prefill_case(**CASES[name])
    column = precision("prefill", backend, case.io_dtype)
    check(public("prefill", backend), case, precision=column, zero_padding=zero_padding)


@pytest.mark.parametrize("zero_padding", [True, False], ids=["returning", "out"])
@pytest.mark.parametrize("name", CASES)
def test_cases_without_reading_lengths(name, zero_padding):
    check(on_device, prefill_case(**CASES[name]), zero_padding=zero_padding)


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
