"""The Triton prefill under Triton's interpreter, against the float64 reference."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from gdn_plugin.backends.triton.launch import launch_count
from gdn_plugin.backends.triton.prefill import PrefillConfig, num_slots
from gdn_plugin.backends.triton.prefill import run as prefill
from gdn_plugin.ops.cases import Heads, prefill_case
from tests.support.checks import check, run, run_reference

SMALL = Heads(1, 2, 64, 64)
BF16 = torch.bfloat16


@pytest.mark.parametrize(
    "lens",
    [(63,), (64,), (0, 65, 0), (1, 130), (0, 0)],
    ids=lambda x: "+".join(map(str, x)),
)
def test_lengths(lens):
    check(prefill, prefill_case(lens, SMALL, pad_tokens=5))


@pytest.mark.parametrize(
    "heads",
    [(2, 4, 64, 64), (1, 3, 64, 128), (1, 2, 128, 64), (1, 1, 256, 256)],
    ids=lambda x: "x".join(map(str, x)),
)
def test_heads_and_dims(heads):
    check(prefill, prefill_case((65, 2), Heads(*heads)))


@pytest.mark.parametrize(
    ("io_dtype", "state_dtype"),
    [(torch.float32, BF16), (torch.float16, torch.float32), (BF16, BF16), (BF16, torch.float16)],
    ids=str,
)
def test_dtypes(io_dtype, state_dtype):
    precision = "fp32" if io_dtype == torch.float32 else "io"
    check(prefill, prefill_case((66,), Heads(1, 1, 64, 64), io_dtype, state_dtype), precision=precision)


@pytest.mark.parametrize("keys", ["random", "correlated"])
@pytest.mark.parametrize("gate", ["mild", "none", "strong", "harsh"])
def test_gates_and_keys(gate, keys):
    check(prefill, prefill_case((130, 20), Heads(1, 1, 64, 64), gate=gate, keys=keys))


def test_correlated_keys_bf16():
    check(prefill, prefill_case((130,), Heads(1, 1, 64, 64), BF16, gate="none", keys="correlated"), precision="io")


@pytest.mark.parametrize("gate", ["mild", "harsh"])
def test_exp_gate(gate):
    check(prefill, prefill_case((70, 3), Heads(1, 1, 64, 64), exp_gate=True, gate=gate))


@pytest.mark.parametrize("io_dtype", [torch.float32, BF16], ids=str)
def test_l2norm(io_dtype):
    precision = "fp32" if io_dtype == torch.float32 else "io"
    case = prefill_case((70, 1), Heads(2, 6, 64, 64), io_dtype, use_qk_l2norm=True, scale=0.3)
    check(prefill, case, precision=precision)


@pytest.mark.parametrize("fresh", [None, (0, 2)], ids=str)
def test_fresh_sequences_ignore_their_rows(fresh):
    check(prefill, prefill_case((65, 3, 64), Heads(1, 1, 64, 64), fresh=fresh))


@pytest.mark.parametrize("zero_padding", [True, False], ids=["returning", "out"])
@pytest.mark.parametrize("null_index", [-1, 0])
def test_padding(zero_padding, null_index):
    case = prefill_case((65, 40, 0, 3), SMALL, padding=(1, 2), pad_tokens=130, null_index=null_index, index_stride=3)
    check(prefill, case, zero_padding=zero_padding)


@pytest.mark.parametrize("offsets_dtype", [torch.int32, torch.int64], ids=str)
def test_strided_inputs(offsets_dtype):
    case = prefill_case((66, 1), SMALL, gap=16, page_tail=72, offsets_dtype=offsets_dtype, hint_seqlen=True)
    for name in ("g", "beta"):
        wide = torch.full((*case.args[name].shape, 3), float("nan"))
        wide[..., 1] = case.args[name]
        case.args[name] = wide[..., 1]
    check(prefill, case)


@pytest.mark.parametrize("every", [64, 128])
def test_checkpoints(every):
    check(prefill, prefill_case((129, 0, 64, 192), Heads(1, 1, 64, 64), checkpoint_every=every, padding=(2,)))


def test_many_sequences_are_found():
    # More than one block of the search over cu_seqlens, with runs of empty sequences.
    lens = [i % 4 if i % 11 == 0 else 0 for i in range(300)]
    check(prefill, prefill_case(lens, Heads(1, 1, 64, 64)))


SEGMENTS = PrefillConfig(segment_programs=1000, segment_min_chunks=1, block_v=32, small_block_v=32)


@pytest.mark.parametrize(
    "config",
    [
        PrefillConfig(solve_heads=2, block_v=16),
        PrefillConfig(solve_warps=8, block_v=32),
        PrefillConfig(block_v=128),
        PrefillConfig(block_v=128, small_block_v=16, full_programs=1000),
        SEGMENTS,
    ],
    ids=lambda c: f"heads{c.solve_heads}-v{c.block_v}-full{c.full_programs}-segments{c.segment_programs}",
)
def test_every_split_gives_the_same(config):
    case = prefill_case((65, 130), Heads(1, 2, 64, 128), use_qk_l2norm=True, checkpoint_every=64, fresh=(1,))
    check(partial(prefill, config=config), case)


@pytest.mark.parametrize(
    ("min_chunks", "dims"), [(1, (64, 64)), (3, (64, 64)), (2, (64, 128)), (2, (128, 64))], ids=str
)
def test_segments(min_chunks, dims):
    config = replace(SEGMENTS, segment_min_chunks=min_chunks)
    case = prefill_case((330, 0, 65, 30, 3), Heads(1, 1, *dims), fresh=(2,), padding=(3,), pad_tokens=70,
                        checkpoint_every=128, gate="strong")  # fmt: skip
    before = launch_count()
    check(partial(prefill, config=config), case)
    assert launch_count() - before == 3


@pytest.mark.parametrize("hint", [0, 64, 10_000])
def test_segments_survive_a_wrong_hint(hint):
    case = prefill_case((193, 1), Heads(1, 1, 64, 64))
    case.args["max_seqlen"] = hint
    check(partial(prefill, config=SEGMENTS), case)


def test_two_launches():
    case = prefill_case((65, 1, 130), SMALL)
    before = launch_count()
    run(prefill, case)
    assert launch_count() - before == 2


def test_no_tokens_no_launch():
    before = launch_count()
    run(prefill, prefill_case((0, 0), SMALL))
    assert launch_count() == before


@pytest.mark.parametrize("lens", [(1,) * 9, (64,) * 3, (63, 65, 1, 0, 128), (0, 0, 1)], ids=str)
@pytest.mark.parametrize("pad_tokens", [0, 1, 64, 200])
def test_slots_hold_any_packing(lens, pad_tokens):
    # The numbering of find_sequence, in Python: no two chunks share a slot, and padding rows fit behind the last.
    offsets = [sum(lens[:i]) for i in range(len(lens) + 1)]
    slots = [offsets[b] // 64 + b + c for b, n in enumerate(lens) for c in range(-(-n // 64))]
    tail_first, tail = offsets[-1] // 64 + len(lens), -(-pad_tokens // 64)
    slots += range(tail_first, tail_first + tail)
    assert slots == sorted(set(slots))
    assert slots[-1] < num_slots(offsets[-1] + pad_tokens, len(lens))


@pytest.mark.parametrize(("token", "name"), [(0, "k"), (70, "v"), (191, "g"), (192, "v"), (329, "beta")])
def test_segments_of_what_is_not_finite(token, name):
    case = prefill_case((330, 2), Heads(1, 1, 64, 64), fresh=(0,), checkpoint_every=64)
    case.args[name][(token, *(0 for _ in case.args[name].shape[1:]))] = float("nan")
    args = case.arguments(zero_padding=True)
    prefill(**args, config=replace(SEGMENTS, segment_min_chunks=2))
    want = run_reference(case)
    for result, truth in (want.outputs | want.pools).items():
        fine = torch.isfinite(truth)
        assert torch.equal(torch.isfinite(args[result])[fine], fine[fine]), result
        assert not torch.isfinite(args[result])[~fine].any(), result
