"""Older FlashInfer, and FlashInfer that is not there: numbers on CPU with plain loops in FlashInfer's place."""

from __future__ import annotations

import sys

import pytest
import torch

from gdn_plugin.backends.flashinfer import api, prefill
from gdn_plugin.registry import BackendLoadError
from tests.flashinfer.stand_in import Seen

HK, HV, D = 2, 4, 8


def flashinfer_0_6(
    q, k, v, g=None, beta=None, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None,
    use_qk_l2norm_in_kernel=False, output=None, output_state=None, state_checkpoints=None, checkpoint_cu_starts=None,
    checkpoint_every_n_tokens=0, use_cp="auto",
):  # fmt: skip
    """The signature of FlashInfer 0.6.14: states packed in sequence order, and no rows of a pool."""
    assert initial_state.dtype == output_state.dtype == torch.float32 and output_final_state
    assert not use_qk_l2norm_in_kernel, "0.6.14 takes the flag and does not honour it everywhere"
    assert checkpoint_cu_starts is None or checkpoint_cu_starts.dtype == torch.int64
    output_state.copy_(initial_state)
    Seen.packed(
        q, k, v, g, beta, scale, output_state, cu_seqlens, output, state_checkpoints, checkpoint_cu_starts,
        checkpoint_every_n_tokens, range(len(output_state)),
    )  # fmt: skip


def call(lens, state_dtype, **changes):
    generator = torch.Generator().manual_seed(0)
    tokens, batch = sum(lens), len(lens)

    def normal(*shape, dtype=torch.bfloat16):
        return torch.randn(*shape, generator=generator).to(dtype)

    q, k = (torch.nn.functional.normalize(normal(tokens, HK, D).float(), dim=-1).bfloat16() for _ in range(2))
    return {
        "q": q,
        "k": k,
        "v": normal(tokens, HV, D),
        "g": -torch.rand(tokens, HV, generator=generator),
        "beta": torch.rand(tokens, HV, generator=generator),
        "state": normal(batch + 2, HV, D, D, dtype=state_dtype),
        "state_indices": torch.arange(batch, 0, -1, dtype=torch.int32),
        "cu_seqlens": torch.tensor([0, *torch.tensor(lens).cumsum(0).tolist()], dtype=torch.int32),
        "has_initial_state": None,
        "scale": D**-0.5,
        "use_qk_l2norm": False,
        "exp_gate": False,
        "max_seqlen": 0,
        "null_index": -1,
        "padding": "none",
        "checkpoints": None,
        "checkpoint_cu_starts": None,
        "checkpoint_every": 0,
        "out": torch.full((tokens, HV, D), float("nan"), dtype=torch.bfloat16),
        "zero_padding": False,
    } | changes


def both(monkeypatch, lens, state_dtype, **changes):
    """The outputs and pools (and checkpoints) of FlashInfer 0.7 and of 0.6."""
    results = []
    old = api.Api(api._entry(flashinfer_0_6), *[api._entry(Seen().decode)] * 3)
    for found in (Seen().api(), old):
        monkeypatch.setattr(prefill, "flashinfer_api", lambda found=found: found)
        arguments = call(lens, state_dtype, **changes)
        if changes.get("checkpoint_every"):
            arguments["checkpoints"] = torch.zeros(3, HV, D, D, dtype=state_dtype)
        prefill.PREFILL.run(**arguments)
        results.append([arguments[name] for name in ("out", "state", "checkpoints") if arguments[name] is not None])
    assert [found.prefill_in_place for found in (Seen().api(), old)] == [True, False]
    return results


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("use_qk_l2norm", [False, True], ids=["normed", "to-norm"])
@pytest.mark.parametrize("exp_gate", [False, True], ids=["log", "exp"])
def test_states_are_copied_out_and_back(monkeypatch, state, use_qk_l2norm, exp_gate):
    new, old = both(monkeypatch, (5, 0, 64, 3), state, use_qk_l2norm=use_qk_l2norm, exp_gate=exp_gate)
    for name, x, y in zip(("out", "state"), new, old, strict=True):
        # The norms differ by their epsilon, and so by one rounding of q and k here and there.
        torch.testing.assert_close(x, y, rtol=0.02 if use_qk_l2norm else 0, atol=0.02 if use_qk_l2norm else 0, msg=name)
        assert not x.isnan().any()


def test_fp32_checkpoints_are_copied_too(monkeypatch):
    starts = torch.tensor([0, 2, 3], dtype=torch.int32)
    new, old = both(monkeypatch, (130, 64), torch.float32, checkpoint_every=64, checkpoint_cu_starts=starts)
    assert all(torch.equal(x, y) for x, y in zip(new, old, strict=True))
    assert len(new) == 3 and (new[2] != 0).any(-1).any(-1).all()


def test_a_missing_compiler_comes_with_the_pip_command(monkeypatch):
    api.flashinfer_api.cache_clear()
    monkeypatch.setitem(sys.modules, "cutlass.cute", None)
    with pytest.raises(BackendLoadError, match=r"pip install .*nvidia-cutlass-dsl\[cu13\]"):
        api.flashinfer_api()
