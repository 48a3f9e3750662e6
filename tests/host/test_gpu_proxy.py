"""The GPU's path on a machine without one: fake tensors, a simulated platform, launches counted.

Whatever would wait for the device (item, tolist, nonzero, cpu, ...) raises, by `NoWaiting` where it is called and by
the fake tensors, which have no values, where it is not; a copy to another device or dtype is an op that the lists below
do not have. A torch without CUDA computes on no CUDA tensors, so they stand on the CPU and deny it; the backends are
chosen for the simulated platform.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from gdn_plugin.hosts.core import Core, GatedNorm, Parameters, Shape
from gdn_plugin.hosts.vllm.metadata import batch_of
from gdn_plugin.ops import dispatch
from gdn_plugin.registry import Platform, select
from tests.host.steps import Request, Row, Step, build_metadata
from tests.support.memory import Launches

HK, HV, K, V, W, SPEC, ROWS = 4, 8, 128, 128, 4, 3, 64
DIM = 2 * HK * K + HV * V
PACKAGES = {
    "triton": "3.6.0",
    "flashinfer-python": "0.7.2.post1",
    "nvidia-cutlass-dsl": "4.8.0",
    "nvidia-cutlass-dsl-libs-cu13": "4.8.0",
}


class NoWaiting(TorchFunctionMode):
    """Raises where Python asks a tensor for its values, or a device to finish."""

    WAITS = frozenset(
        [
            *("item", "tolist", "numpy", "cpu", "nonzero", "argwhere", "masked_select", "unique", "equal", "allclose"),
            *("is_nonzero", "__bool__", "__int__", "__float__", "__index__", "__array__", "synchronize"),
        ]
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in self.WAITS:
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=["sm_90", "sm_100", "sm_120"])
def platform(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Platform]:
    found = Platform.simulated(request.param, cuda="13.0", packages=PACKAGES)
    monkeypatch.setattr(dispatch, "probe", lambda device=None: found)
    monkeypatch.setattr(FakeTensor, "is_cpu", False)
    dispatch.forget()
    yield found
    dispatch.forget()


def request(row: int, done: int) -> Request:
    nothing = torch.empty(0, 1)
    return Request([row + i for i in range(SPEC)], nothing, nothing, nothing, done=done)


DECODE = Step([Row(request(1, 9), 1), Row(request(4, 2), 1)])
PREFILL = Step([Row(request(1, 0), 70), Row(request(4, 64), 17)])
MIXED = Step([Row(request(1, 9), 1), Row(request(4, 2), 1), Row(request(7, 0), 100)])
SPECULATIVE = Step([Row(request(1, 9), 2, 1), Row(request(4, 2), 1, 0)])


def flat_views(qkvz: Tensor, ba: Tensor) -> tuple[Tensor, ...]:
    return qkvz[:, :DIM], qkvz[:, DIM:].unflatten(1, (HV, V)), ba[:, :HV], ba[:, HV:]


def interleaved_views(qkvz: Tensor, ba: Tensor) -> tuple[Tensor, ...]:
    qkv, z = qkvz.unflatten(1, (HK, -1)).split((DIM // HK, HV // HK * V), dim=2)
    b, a = ba.unflatten(1, (HK, -1)).chunk(2, dim=2)
    return qkv, z.unflatten(2, (HV // HK, V)), b, a


def launches(
    platform: Platform,
    step: Step,
    requests: dict[str, str] | None = None,
    norm: bool = False,
    state_dtype: str = "float32",
    runs: tuple[int, ...] = (0,),
    column: bool = False,
    interleaved: bool = False,
) -> list[str]:
    """What layers launch for a step whose metadata another layer has translated.

    Args:
        runs: which layer runs when; by default one layer once.
        column: the row numbers are a column of a wider block table.
        interleaved: the projections are Qwen3-Next's.
    """
    shape = Shape(
        "bfloat16", state_dtype, HK, HV, K, V, W, spec_tokens=SPEC, checkpoints=True, null_index=0, padding="scratch"
    )
    cores = [Core(shape, select(platform, shape.problems(), requests)) for _ in range(max(runs) + 1)]
    metadata = build_metadata(step, SPEC)
    if metadata.nums_dict is not None:  # stays on the CPU in the host too
        metadata.nums_dict = {8: {"nums": metadata.nums_dict[8]["nums"].numpy()}}
    if column:
        for name in ("non_spec_state_indices_tensor", "prefill_state_indices"):
            rows = getattr(metadata, name)
            setattr(metadata, name, None if rows is None else torch.stack((rows, rows), 1)[:, 0])
    tokens = metadata.num_actual_tokens
    with FakeTensorMode(allow_non_fake_inputs=False) as fake:

        def put(x: Any) -> Any:
            return fake.from_tensor(x) if isinstance(x, Tensor) else x

        for holder in (metadata, metadata.checkpoint):
            for name, value in list(vars(holder).items()) if holder is not None else ():
                setattr(holder, name, put(value))
        width = W - 1 + SPEC - 1
        pages = torch.empty(ROWS, DIM * width + 2 * HV * V * K + 512, dtype=torch.bfloat16)
        state = pages[:, DIM * width : DIM * width + 2 * HV * V * K].view(getattr(torch, state_dtype))
        state = state[:, : HV * V * K].unflatten(1, (HV, V, K))
        parameters = Parameters(
            conv_weight=torch.empty(DIM, W, dtype=torch.bfloat16),
            conv_bias=None,
            A_log=torch.empty(HV),
            dt_bias=torch.empty(HV, dtype=torch.bfloat16),
            conv_state=pages[:, : DIM * width].unflatten(1, (width, DIM)).transpose(1, 2),
            state=state,
        )
        qkvz = torch.empty(tokens, DIM + HV * V, dtype=torch.bfloat16)
        ba = torch.empty(tokens, 2 * HV, dtype=torch.bfloat16)
        out = torch.empty(tokens, HV, V, dtype=torch.bfloat16)
        weight = torch.empty(V, dtype=torch.bfloat16)
        qkv, z, b, a = (interleaved_views if interleaved else flat_views)(qkvz, ba)
        gated = GatedNorm(z, weight, 1e-6, "silu") if norm else None
        with NoWaiting():
            batch = batch_of(metadata, W - 1)
        with NoWaiting(), Launches() as counted:
            for layer in runs:
                cores[layer].run(batch, qkv, a, b, parameters, out, gated)
    return counted.names


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: bool(x.any()),
        lambda x: int(x[0]),
        lambda x: [0, 1, 2][x[0]],
        lambda x: torch.equal(x, x),
    ],
    ids=["item", "tolist", "nonzero", "cpu", "numpy", "bool", "int", "index", "equal"],
)
def test_the_guard_against_waiting_bites(waits: Any) -> None:
    with NoWaiting(), pytest.raises(AssertionError, match="waits for the device"):
        waits(torch.tensor([1, 2, 0]))


# Decodes and speculative rows alone may be captured, and replayed padded: the ops clear those rows in their one launch.
@pytest.mark.parametrize("interleaved", [False, True], ids=["flat", "interleaved"])
@pytest.mark.parametrize("norm", [False, True], ids=["core", "norm"])
@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (DECODE, ["fused_decode"]),
        (PREFILL, ["conv_prologue", "prefill", "gated_norm"]),
        (MIXED, ["fused_decode", "conv_prologue", "prefill", "gated_norm"]),
        (SPECULATIVE, ["fused_verify"]),
    ],
    ids=["decode", "prefill", "mixed", "speculative"],
)
def test_launches_of_a_layer(
    platform: Platform, step: Step, expected: list[str], norm: bool, interleaved: bool
) -> None:  # fmt: skip
    """Nothing of aten among them: no copy of z, nothing sorted, no buffer zeroed."""
    found = launches(platform, step, norm=norm, interleaved=interleaved)
    assert found == [name for name in expected if norm or name != "gated_norm"]


@pytest.mark.parametrize("prefill", ["triton", "flashinfer"])
def test_a_named_prefill_is_as_many_launches(platform: Platform, prefill: str) -> None:
    assert launches(platform, PREFILL, {"prefill": prefill}, norm=True) == ["conv_prologue", "prefill", "gated_norm"]


FLASHINFER = {"prefill": "flashinfer", "decode": "flashinfer"}


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("norm", [False, True], ids=["core", "norm"])
def test_launches_of_a_layer_on_flashinfers_decode(platform: Platform, norm: bool, state_dtype: str) -> None:
    decoded = ["conv_prologue", "decode", *(["gated_norm"] if norm else [])]
    assert launches(platform, DECODE, FLASHINFER, norm, state_dtype) == decoded


def test_a_column_of_a_block_table_is_copied_once_a_step(platform: Platform) -> None:
    step = Step([*MIXED.rows, Row(request(10, 0), 3)])
    names = launches(platform, step, FLASHINFER, False, "bfloat16", runs=(0, 1), column=True)
    layer = ["conv_prologue", "decode", "conv_prologue", "prefill"]
    assert [name for name in names if name != "aten::clone"] == layer * 2
    assert names.count("aten::clone") == 2  # decode's rows and prefill's
    triton = dict.fromkeys(FLASHINFER, "triton")
    assert "aten::clone" not in launches(platform, step, triton, runs=(0, 1), column=True)


def test_another_run_over_the_same_metadata_makes_its_own_rows(platform: Platform) -> None:
    """As a CUDA graph's capture does, on the metadata of the run before it."""
    names = launches(platform, DECODE, FLASHINFER, runs=(0, 1, 0, 1), column=True)
    assert [name for name in names if name in ("aten::clone", "decode")] == ["aten::clone", "decode", "decode"] * 2


def test_speculative_rows_beside_prefills_only_add_gathers(platform: Platform) -> None:
    step = Step([Row(request(1, 9), 2, 1), Row(request(4, 0), 70), Row(request(7, 3), 1, 0)])
    names = launches(platform, step)
    assert [name for name in names if ":" not in name] == ["fused_verify", "conv_prologue", "prefill"]
    others = {name for name in names if ":" in name}
    assert others <= {"aten::index_select", "aten::index_copy_"}, others


def test_checkpoints_cost_no_second_pass(platform: Platform) -> None:
    step = Step([Row(request(1, 0), 200, checkpoint=(128, 20)), Row(request(4, 0), 9)])
    for interleaved in (False, True):
        names = launches(platform, step, interleaved=interleaved)
        assert [name for name in names if ":" not in name] == ["conv_prologue", "prefill"]
