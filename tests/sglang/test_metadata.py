"""SGLang's metadata in, op arguments out: which tokens and rows go where, and which states are kept."""

from __future__ import annotations

import pytest
import torch

from gdn_plugin.hosts.sglang.metadata import decode_batch, extend_batch
from tests.sglang.fakes import CHUNK, Row, Step, W, decode, extend


def prefill(step: Step):
    batch = extend_batch(step.metadata, step.batch, W - 1, CHUNK)
    assert batch.decode is None and batch.spec is None
    return batch.prefill


def test_an_extend_is_a_prefill() -> None:
    step = extend([Row(3, 0, 9), Row(5, 64, 17), Row(7, 80, 1)])
    part = prefill(step)
    assert (part.first, part.count, part.tokens, part.checkpoints) == (0, 27, None, None)
    assert part.state_indices.tolist() == [3, 5, 7] and part.cu_seqlens.tolist() == [0, 9, 26, 27]
    assert part.has_initial_state.tolist() == [False, True, True]
    assert part.max_seqlen == 17


def test_layers_share_a_translation_and_steps_do_not() -> None:
    step, other = extend([Row(3, 0, 9)]), extend([Row(3, 9, 9)])
    assert extend_batch(step.metadata, step.batch, W - 1, CHUNK) is extend_batch(
        step.metadata, step.batch, W - 1, CHUNK
    )
    assert prefill(other).has_initial_state.tolist() == [True]


def test_without_the_schedulers_lists() -> None:
    part = prefill(extend([Row(3, 0, 9), Row(5, 64, 17)], on_cpu=False))
    assert part.max_seqlen == 0 and part.count == 26


@pytest.mark.parametrize("on_cpu", [True, False], ids=["lists", "tensors"])
def test_states_to_keep(on_cpu: bool) -> None:
    """At the last whole chunk of the extend, counted from where the extend begins, wherever that is."""
    rows = [Row(2, 0, 130, (130, 8)), Row(3, 70, 64, (134, 9)), Row(4, 0, 63), Row(5, 10, 200, (10 + 64 + 1, 7))]
    kept = prefill(extend(rows, on_cpu=on_cpu)).checkpoints
    assert kept.every == 64 and kept.count == (130 + 64 + 63 + 200) // 64
    assert kept.cu_starts.tolist() == [0, 2, 3, 3, 6] and kept.cu_starts.dtype == torch.int32
    assert kept.rows.tolist() == [8, 9, 7]
    assert kept.emitted.tolist() == [1, 2, 3]
    assert kept.conv_tokens.tolist() == [[125, 126, 127], [191, 192, 193], [318, 319, 320]]


def test_one_state_is_emitted_where_one_will_do() -> None:
    kept = prefill(extend([Row(2, 0, 512 + 7, (519, 8))])).checkpoints
    assert (kept.every, kept.count, kept.emitted.tolist()) == (512, 1, [0])


def test_nothing_is_kept_before_the_first_whole_chunk() -> None:
    step = extend([Row(2, 0, 63, (63, 8))])
    assert step.metadata.has_mamba_track_mask and prefill(step).checkpoints is None


def test_tracking_without_lengths_keeps_nothing() -> None:
    step = extend([Row(2, 0, 64, (64, 8))])
    step.batch.mamba_track_seqlens = None
    assert prefill(step).checkpoints is None


def test_a_decode() -> None:
    step = decode([3, 5], padding=2)
    batch = decode_batch(step.metadata, 4, "layer", masked=True)
    assert batch.num_tokens == 4 and batch.prefill is None and batch.decode.padded
    assert batch.decode.state_indices.tolist() == [3, 5, -1, -1]
    assert batch.decode.cu_seqlens.tolist() == [0, 1, 2, 2, 2]


def test_tokens_without_a_row_are_padding() -> None:
    assert decode_batch(decode([3, 5]).metadata, 6, "layer", masked=True).num_tokens == 2


def test_kernels_without_a_mask_are_given_the_scratch_row() -> None:
    """Made by the first layer of a step, and anew where that layer comes again: the run that a graph is captured in."""
    step = decode([3, 5], padding=1)
    rows = step.metadata.mamba_cache_indices
    first = decode_batch(step.metadata, 3, "first", masked=False).decode.state_indices
    second = decode_batch(step.metadata, 3, "second", masked=False).decode.state_indices
    assert first.tolist() == [3, 5, 0] and second is first and rows.tolist() == [3, 5, -1]
    rows.copy_(torch.tensor([4, -1, -1]))
    assert decode_batch(step.metadata, 3, "first", masked=False).decode.state_indices.tolist() == [4, 0, 0]
