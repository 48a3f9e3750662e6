"""What FlashInfer would refuse, copy or misread is refused here, by the argument's name, before anything is written."""

from __future__ import annotations

import pytest
import torch

from gdn_plugin.ops._flashinfer.arguments import as_its_shape_says
from gdn_plugin.ops._flashinfer.decode import decode
from gdn_plugin.ops._flashinfer.prefill import _bound, prefill
from gdn_plugin.ops._flashinfer.verify import verify
from tests.flashinfer.calls import HK, HV, D, checkpoint_args, decode_args, empty, pool, prefill_args, verify_args


def offset(shape, elements, dtype):
    """Contiguous, and starting off the boundary."""
    size = torch.Size(shape).numel()
    return empty(size + elements, dtype=dtype).as_strided(shape, torch.empty(shape, device="meta").stride(), elements)


PREFILL = {
    "q-not-contiguous": ("q", lambda: {"q": empty(4099, 2 * HK, D).as_strided((4099, HK, D), (2 * HK * D, D, 1))}),
    "g-of-io-dtype": ("g", lambda: {"g": empty(4099, HV)}),
    "k-of-another-dtype": ("k", lambda: {"k": empty(4099, HK, D, dtype=torch.float16)}),
    "fp32-io": ("q", lambda: {"q": empty(4099, HK, D, dtype=torch.float32)}),
    "offsets-off-8-bytes": ("cu_seqlens", lambda: {"cu_seqlens": offset((9,), 1, torch.int32)}),
    "beta-off-16-bytes": ("beta", lambda: {"beta": offset((4099, HV), 2, torch.float32)}),
    "fp16-pool": ("state", lambda: {"state": pool(torch.float16)}),
    "checkpoints-of-another-dtype": ("checkpoints", lambda: checkpoint_args(torch.bfloat16, 8)),
}
RECURRENT = {
    "fp16-io": ("q", lambda: {"q": empty(20, HK, D, dtype=torch.float16)}),
    "fp16-bias": ("dt_bias", lambda: {"dt_bias": empty(HV, dtype=torch.float16)}),
    "bf16-A_log": ("A_log", lambda: {"A_log": empty(HV)}),
    "transposed-gate": ("a", lambda: {"a": empty(HV, 20).as_strided((20, HV), (1, 20))}),
    "rows-apart-by-odd": ("state", lambda: {"state": pool(torch.float32, padding=2)}),
    "v-off-16-bytes": ("v", lambda: {"v": offset((20, HV, D), 4, torch.bfloat16)}),
}


def refuses(function, arguments, name, h100):
    with pytest.raises(ValueError, match=rf"^{name}: "):
        function(**arguments)
    assert h100.launches == h100.own_launches == []


@pytest.mark.parametrize("case", PREFILL)
def test_prefill_refuses(h100, case):
    name, changes = PREFILL[case]
    refuses(prefill, prefill_args(torch.float32) | changes(), name, h100)


@pytest.mark.parametrize("case", RECURRENT)
@pytest.mark.parametrize("function", [decode, verify], ids=["decode", "verify"])
def test_decode_and_verify_refuse(h100, function, case):
    name, changes = RECURRENT[case]
    arguments = (decode_args(torch.float32, batch=20) if function is decode else verify_args(torch.float32)) | changes()
    refuses(function, arguments, name, h100)


def test_a_bf16_pool_needs_a_scratch_row(h100):
    refuses(decode, decode_args(torch.bfloat16, null_index=-1), "null_index", h100)
    refuses(verify, verify_args(torch.bfloat16, null_index=-1), "null_index", h100)


def test_verify_refuses_ragged_batches(h100):
    refuses(verify, verify_args(torch.float32) | {"state_indices": empty(6, 4, dtype=torch.int32)}, "q", h100)


def test_verify_refuses_padded_fp32_pools(h100):
    """FlashInfer 0.7.2's kernel for them does not compile: its scatter of states takes flat pools alone."""
    refuses(verify, verify_args(torch.float32, state=pool(torch.float32)), "state", h100)


def test_fp32_gates_are_taken_where_the_kernel_reads_them(h100):
    gates = {name: empty(5, HV, dtype=torch.float32) for name in ("a", "b")}
    decode(**decode_args(torch.float32) | gates)
    assert len(h100.launches) == 1
    h100.reset()
    refuses(decode, decode_args(torch.bfloat16) | gates, "a", h100)


@pytest.mark.parametrize(
    ("hint", "tokens", "batch", "bound"),
    [(0, 100, 4, 100), (7, 100, 4, 25), (60, 100, 4, 60), (500, 100, 4, 100), (1, 1, 9, 1)],
    ids=["unknown", "below-the-mean", "known", "above-the-total", "more-sequences-than-tokens"],
)
def test_the_hint_on_the_longest_sequence_is_brought_into_flashinfers_range(hint, tokens, batch, bound):
    assert _bound(hint, tokens, batch) == bound


@pytest.mark.parametrize("rows", [torch.zeros(1, 4).int()[:, 0], torch.zeros(3, 4, dtype=torch.int32)[:1, :2]])
def test_one_sequences_rows_have_strides_that_cute_compiles_for(rows):
    """A dim of size one keeps the stride of the table it was cut from, and is contiguous all the same."""
    from_dlpack = pytest.importorskip("cutlass.cute.runtime", reason="nvidia-cutlass-dsl is not installed").from_dlpack

    def mark(x):
        order = tuple(sorted(range(x.dim()), key=lambda dim: -x.stride(dim)))
        from_dlpack(x).mark_compact_shape_dynamic(mode=0, stride_order=order, divisibility=1)

    assert rows.is_contiguous()
    with pytest.raises(RuntimeError, match="stride_order"):
        mark(rows)
    mark(as_its_shape_says(rows))
    assert as_its_shape_says(rows).data_ptr() == rows.data_ptr()


def test_one_token_from_start_rows_is_refused(h100):
    """FlashInfer's decode writes the row it reads; the contract writes state_indices[i, 0]."""
    arguments = verify_args(torch.float32)
    batch = len(arguments["state_indices"])
    arguments["state_indices"] = empty(batch, 1, dtype=torch.int32)
    arguments["start_rows"] = empty(batch, dtype=torch.int32)
    for name in ("q", "k", "v", "a", "b", "out"):
        arguments[name] = empty(batch, *arguments[name].shape[1:])
    with pytest.raises(ValueError, match="start_rows"):
        verify(**arguments)
