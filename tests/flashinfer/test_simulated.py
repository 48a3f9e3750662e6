"""The pretended device leaves nothing behind, and counts what real compilers would be asked for."""

from __future__ import annotations

import pytest
import torch

from gdn_plugin.backends.flashinfer.api import compile_count, flashinfer_api
from gdn_plugin.backends.flashinfer.decode import DECODE
from gdn_plugin.backends.flashinfer.prefill import PREFILL
from gdn_plugin.backends.flashinfer.tensors import plain
from gdn_plugin.tools.simulated import simulated_device
from tests.flashinfer.calls import decode_args, prefill_args


def test_everything_is_put_back():
    import cutlass.cute as cute
    import flashinfer.gdn_kernels.gdn_decode_bf16_state as bf16_kernels
    import flashinfer.gdn_prefill as flashinfer_prefill

    from gdn_plugin.backends.flashinfer import rows

    def seen():
        return (
            torch.cuda.is_available, torch.cuda.current_stream, torch.cuda.device, torch.version.cuda, cute.compile,
            cute.runtime.from_dlpack, bf16_kernels.from_dlpack, bf16_kernels.build_and_load_cute_dsl_kernel,
            rows._launch, rows.compile_count,
        )  # fmt: skip

    before = seen()
    with simulated_device("sm_100a") as device:
        PREFILL.run(**prefill_args(torch.float32))
        DECODE.run(**decode_args(torch.bfloat16))
        assert device.launches and compile_count() == device.specialisations == 2
        assert seen() != before
    assert seen() == before
    assert compile_count() == 0, "kernels that launch nothing must not be found by a real call"
    assert flashinfer_prefill.get_compute_capability.cache_info().currsize == 0


@pytest.mark.parametrize("op", [PREFILL, DECODE], ids=["prefill", "decode"])
def test_the_counter_moves_with_flashinfers_kernels_and_with_ours(h100, op):
    """One count for the ops of the backend, whichever of them was loaded."""
    assert op.compile_count is compile_count and compile_count() == 0
    DECODE.run(**decode_args(torch.bfloat16))
    assert compile_count() == 1
    DECODE.run(**decode_args(torch.bfloat16, padding="scratch"))
    assert (compile_count(), h100.own_launches) == (2, ["zero_padding_kernel"])
    DECODE.run(**decode_args(torch.bfloat16, padding="scratch", batch=6))
    assert compile_count() == 2
    PREFILL.run(**prefill_args(torch.float32, padding="scratch", use_qk_l2norm=True))
    assert compile_count() == 5, "prefill, its norm, and zeros behind packed sequences"
    assert compile_count() == h100.specialisations


def test_architectures_follow_each_other_in_one_process():
    names = []
    for arch in ("sm_90a", "sm_100a", "sm_120a"):
        with simulated_device(arch) as device:
            PREFILL.run(**prefill_args(torch.float32))
            names += device.launches
    assert names == ["_FullyFusedDeltaRuleSm90", "GatedDeltaNetChunkedKernel", "_FullyFusedDeltaRuleSm120"]


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match="sm_100a"), simulated_device("sm_80"):
        pass


def test_compiling_needs_a_process_of_its_own(monkeypatch):
    monkeypatch.delenv("CUTE_DSL_ARCH", raising=False)
    with pytest.raises(RuntimeError, match="CUTE_DSL_ARCH=sm_90a"), simulated_device("sm_90a", compile_kernels=True):
        pass


def test_the_api_is_found_by_signature():
    api = flashinfer_api()
    assert api.prefill_in_place
    assert api.decode.accepts("output_state_indices")
    assert api.verify_bf16 is not None and api.verify_bf16.accepts("ssm_state_indices")
    assert api.prefill.only(max_seqlen=3, no_such_parameter=4) == {"max_seqlen": 3}


@pytest.mark.parametrize("rows", [torch.zeros(1, 4).int()[:, 0], torch.zeros(3, 4, dtype=torch.int32)[:1, :2]])
def test_one_sequences_rows_have_strides_that_cute_compiles_for(rows):
    """A dim of size one keeps the stride of the table it was cut from, and is contiguous all the same."""
    from cutlass.cute.runtime import from_dlpack

    def mark(x):
        order = tuple(sorted(range(x.dim()), key=lambda dim: -x.stride(dim)))
        from_dlpack(x).mark_compact_shape_dynamic(mode=0, stride_order=order, divisibility=1)

    assert rows.is_contiguous()
    with pytest.raises(RuntimeError, match="stride_order"):
        mark(rows)
    mark(plain(rows))
    assert plain(rows).data_ptr() == rows.data_ptr()
