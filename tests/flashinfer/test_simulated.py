"""The pretended device leaves nothing behind, and warm-up meets every kernel that calls can ask for."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from gdn_plugin.ops._flashinfer.api import flashinfer_api
from gdn_plugin.ops._flashinfer.decode import decode
from gdn_plugin.ops._flashinfer.prefill import prefill
from gdn_plugin.ops._flashinfer.simulated import simulated_device
from gdn_plugin.ops._flashinfer.variants import cases
from gdn_plugin.ops._flashinfer.verify import verify
from gdn_plugin.ops._flashinfer.warm_up import compile_count, warm_up
from gdn_plugin.registry.platform import SM_COUNTS
from gdn_plugin.registry.problem import Problem
from tests.flashinfer.calls import HK, HV, D, checkpoint_args, decode_args, empty, prefill_args, verify_args


def problem(op, state_dtype, **fields):
    return Problem(op, "bfloat16", str(state_dtype).removeprefix("torch."), HK, HV, D, D, **fields)


def test_everything_is_put_back():
    import cutlass.cute as cute
    import flashinfer.gdn_kernels.gdn_decode_bf16_state as bf16_kernels
    import flashinfer.gdn_prefill as flashinfer_prefill

    def seen():
        return (
            torch.cuda.is_available, torch.cuda.current_stream, torch.version.cuda, cute.compile,
            cute.runtime.from_dlpack, bf16_kernels.from_dlpack, bf16_kernels.build_and_load_cute_dsl_kernel,
        )  # fmt: skip

    before = seen()
    with simulated_device("sm_100a") as device:
        prefill(**prefill_args(torch.float32))
        decode(**decode_args(torch.bfloat16))
        assert device.launches and compile_count() == device.specialisations == 2
        assert seen() != before
    assert seen() == before
    assert compile_count() == 0, "kernels that launch nothing must not be found by a real call"
    assert flashinfer_prefill.get_compute_capability.cache_info().currsize == 0


def test_architectures_follow_each_other_in_one_process():
    names = []
    for arch in ("sm_90a", "sm_100a", "sm_120a"):
        with simulated_device(arch) as device:
            prefill(**prefill_args(torch.float32))
            names += device.launches
    assert names == ["_FullyFusedDeltaRuleSm90", "GatedDeltaNetChunkedKernel", "_FullyFusedDeltaRuleSm120"]


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match="sm_100a"), simulated_device("sm_80"):
        pass


def test_compiling_needs_a_process_of_its_own(monkeypatch):
    monkeypatch.delenv("CUTE_DSL_ARCH", raising=False)
    with pytest.raises(RuntimeError, match="CUTE_DSL_ARCH=sm_90a"), simulated_device("sm_90a", compile_kernels=True):
        pass


@pytest.mark.parametrize("padding", [0, 8192], ids=["dense", "padded"])
def test_nothing_compiles_after_warm_up(device, state_dtype, padding):
    """Every batch size is called once warm-up is through, at the sizes where FlashInfer changes kernels and between."""
    prefill_problem = problem("prefill", state_dtype, checkpoints=True, padded_pool=padding > 0)
    assert warm_up(prefill_problem) > 0
    decode_pool = decode_args(state_dtype)["state"] if padding else None
    warm_up(problem("decode", state_dtype, padded_pool=padding > 0), decode_pool)
    if state_dtype == torch.bfloat16 or not padding:
        warm_up(problem("verify", state_dtype, max_spec_tokens=4), verify_args(state_dtype)["state"])
    compiled = compile_count()
    assert compiled == device.specialisations

    for batch in (1, 2, 3, 4, 5, 11):
        for checkpoints in ({}, checkpoint_args(state_dtype, batch)):
            prefill(**prefill_args(state_dtype, batch=batch, tokens=997 * batch) | checkpoints)
    for batch in (*range(1, 20), 31, 33, 47, 63, 65, 1000):
        changes = {} if padding else {"state": empty(70, HV, D, D, dtype=state_dtype)}
        decode(**decode_args(state_dtype, batch=batch) | changes)
        if state_dtype == torch.bfloat16 or not padding:
            verify(**verify_args(state_dtype, batch=batch))
    assert compile_count() == compiled


@pytest.mark.parametrize("heads", [(2, 8), (1, 12), (16, 64)], ids=str)
def test_warm_up_of_other_head_counts(h100, heads):
    """The sizes that warm-up ran, their neighbours, and the middle between each and the next."""
    for op in ("decode", "verify"):
        wanted = Problem(op, "bfloat16", "bfloat16", *heads, D, D, max_spec_tokens=3)
        warm_up(wanted)
        compiled = compile_count()
        ran = list(cases(wanted, SM_COUNTS[90]))
        sizes = {case.num_sequences for case in ran}
        for batch in sorted({n for size in sizes for n in (size - 1, size + 1, size + size // 4)} - sizes - {0}):
            dataclasses.replace(ran[0], num_sequences=batch).run()
        assert compile_count() == compiled


def test_cases_reach_both_routes_of_prefill():
    wanted = problem("prefill", torch.float32)
    batches = [case.num_sequences for case in cases(wanted, SM_COUNTS[100])]
    assert batches[0] == 1 and batches[-1] * HV >= SM_COUNTS[100]


def test_the_api_is_found_by_signature():
    api = flashinfer_api()
    assert api.prefill_in_place
    assert api.verify_bf16 is not None and api.verify_bf16.accepts("ssm_state_indices")
    assert api.prefill.only(max_seqlen=3, no_such_parameter=4) == {"max_seqlen": 3}
