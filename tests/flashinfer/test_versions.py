"""Older FlashInfer, and FlashInfer that is not there: numbers on CPU with the reference in FlashInfer's place."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch

from gdn_plugin.ops import reference
from gdn_plugin.ops._flashinfer import api, prefill
from gdn_plugin.registry import BackendLoadError
from tests.support import cases
from tests.support.cases import Heads
from tests.support.checks import check

HEADS = Heads(2, 4, 128, 128)


def flashinfer_0_6(
    q, k, v, g=None, beta=None, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None,
    use_qk_l2norm_in_kernel=False, output=None, output_state=None, state_checkpoints=None, checkpoint_cu_starts=None,
    checkpoint_every_n_tokens=0, use_cp="auto",
):  # fmt: skip
    """The signature of FlashInfer 0.6.14: states packed in sequence order, and no rows of a pool."""
    assert initial_state.dtype == output_state.dtype == torch.float32 and output_final_state
    assert not use_qk_l2norm_in_kernel, "0.6.14 takes the flag and does not honour it everywhere"
    assert checkpoint_cu_starts is None or checkpoint_cu_starts.dtype == torch.int64
    packed = initial_state.clone()
    everyone = torch.arange(len(packed), dtype=torch.int32)
    reference.prefill(
        q, k, v, g, beta, packed, everyone, cu_seqlens, None, scale, False, True, 0, -1, output, state_checkpoints,
        checkpoint_cu_starts, checkpoint_every_n_tokens, False,
    )  # fmt: skip
    output_state.copy_(packed)
    return output, output_state


def flashinfer_0_7(*args, state_indices=None, backend="auto", max_seqlen=None, **kwargs):
    raise NotImplementedError


@pytest.fixture
def old_api(monkeypatch):
    old = api.Api(api._entry(flashinfer_0_6), *[api._entry(flashinfer_0_7)] * 3)
    monkeypatch.setattr(prefill, "flashinfer_api", lambda: old)
    return old


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("use_qk_l2norm", [False, True], ids=["normed", "to-norm"])
@pytest.mark.parametrize("exp_gate", [False, True], ids=["log", "exp"])
def test_states_are_copied_out_and_back(old_api, state, use_qk_l2norm, exp_gate):
    assert not old_api.prefill_in_place
    case = cases.prefill_case(
        (5, 0, 64, 3), HEADS, torch.bfloat16, state, exp_gate=exp_gate, use_qk_l2norm=use_qk_l2norm, fresh=None
    )
    check(prefill.prefill, case, precision="io")


def test_fp32_checkpoints_are_copied_too(old_api):
    case = cases.prefill_case((130, 64), HEADS, torch.bfloat16, exp_gate=True, fresh=None, checkpoint_every=64)
    check(prefill.prefill, case, precision="io")


def test_in_place_is_found_by_signature(old_api):
    assert dataclasses.replace(old_api, prefill=api._entry(flashinfer_0_7)).prefill_in_place


def test_a_missing_compiler_comes_with_the_pip_command(monkeypatch):
    api.flashinfer_api.cache_clear()
    monkeypatch.setitem(sys.modules, "cutlass.cute", None)
    with pytest.raises(BackendLoadError, match=r"pip install .*nvidia-cutlass-dsl\[cu13\]"):
        api.flashinfer_api()
