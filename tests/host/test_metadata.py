"""Metadata in, op arguments out: which tokens and rows go where."""

from __future__ import annotations

import pytest
import torch

from gdn_plugin.hosts.vllm.metadata import batch_of, translate
from tests.host.steps import Request, Row, Step, build_metadata

HISTORY = 3


def request(row: int, done: int, spec: int = 1, accepted: int = 1) -> Request:
    empty = torch.empty(0, 1)
    return Request([row + i for i in range(spec)], empty, empty, empty, done=done, accepted=accepted)


def test_decodes_only() -> None:
    batch = translate(build_metadata(Step([Row(request(3, 9), 1), Row(request(5, 2), 1)])), HISTORY)
    assert batch.prefill is None and batch.spec is None and batch.num_tokens == 2
    assert batch.decode.count == 2 and batch.decode.state_indices.tolist() == [3, 5]
    assert batch.decode.cu_seqlens.tolist() == [0, 1, 2]


def test_decodes_padded_to_a_graph() -> None:
    step = Step([Row(request(3, 9), 1), Row(request(5, 2), 1)], pad_requests=2, pad_tokens=2)
    batch = translate(build_metadata(step), HISTORY)
    assert batch.decode.count == 4 and batch.decode.state_indices.tolist() == [3, 5, 0, 0]
    assert batch.decode.cu_seqlens.tolist() == [0, 1, 2, 2, 2]


def test_prefills_only() -> None:
    batch = translate(build_metadata(Step([Row(request(3, 0), 9), Row(request(5, 64), 17)])), HISTORY)
    part = batch.prefill
    assert batch.decode is None and batch.spec is None
    assert (part.first, part.count, part.tokens) == (0, 26, None)
    assert part.cu_seqlens.tolist() == [0, 9, 26] and part.state_indices.tolist() == [3, 5]
    assert part.has_initial_state.tolist() == [False, True]
    assert 17 <= part.max_seqlen < 17 + 8 and part.checkpoints is None


def test_decodes_stand_in_front_of_prefills() -> None:
    step = Step([Row(request(3, 9), 1), Row(request(5, 2), 1), Row(request(7, 0), 10)])
    batch = translate(build_metadata(step), HISTORY)
    assert batch.decode.count == 2 and batch.decode.state_indices.tolist() == [3, 5]
    assert (batch.prefill.first, batch.prefill.count) == (2, 10)
    assert batch.prefill.cu_seqlens.tolist() == [0, 10] and batch.prefill.state_indices.tolist() == [7]


def test_a_first_chunk_of_one_token_is_a_prefill() -> None:
    batch = translate(build_metadata(Step([Row(request(3, 0), 1)])), HISTORY)
    assert batch.decode is None and batch.prefill.has_initial_state.tolist() == [False]


def test_speculative_rows_only() -> None:
    step = Step([Row(request(4, 9, spec=3, accepted=2), 1, 2), Row(request(8, 5, spec=3), 2, 0)])
    batch = translate(build_metadata(step, 3), HISTORY)
    part = batch.spec
    assert batch.decode is None and batch.prefill is None
    assert part.tokens is None and part.count == 5 and part.cu_seqlens.tolist() == [0, 3, 5]
    assert part.state_indices.tolist() == [[4, 5, 6], [8, 9, 10]] and part.num_accepted_tokens.tolist() == [2, 1]


def test_speculative_rows_between_prefills() -> None:
    step = Step(
        [Row(request(1, 0, spec=3), 4), Row(request(4, 9, spec=3, accepted=3), 1, 1), Row(request(8, 7, spec=3), 1)]
    )
    batch = translate(build_metadata(step, 3), HISTORY)
    assert batch.decode is None
    assert batch.spec.tokens.tolist() == [4, 5] and batch.spec.num_accepted_tokens.tolist() == [3]
    assert batch.prefill.tokens.tolist() == [0, 1, 2, 3, 6]
    assert batch.prefill.cu_seqlens.tolist() == [0, 4, 5] and batch.prefill.state_indices.tolist() == [1, 8]
    assert batch.prefill.has_initial_state.tolist() == [False, True]


def test_checkpoints_share_a_stride() -> None:
    rows = [
        Row(request(1, 3), 1),
        Row(request(2, 0), 400, checkpoint=(384, 20)),
        Row(request(3, 0), 50),
        Row(request(4, 256), 300, checkpoint=(256, 21)),
    ]
    kept = translate(build_metadata(Step(rows)), HISTORY).prefill.checkpoints
    assert kept.every == 128 and kept.count >= kept.cu_starts[-1] == 400 // 128 + 300 // 128
    assert kept.cu_starts.tolist() == [0, 3, 3, 5] and kept.cu_starts.dtype == torch.int32
    assert kept.emitted.tolist() == [2, 4] and kept.rows.tolist() == [20, 21]
    assert kept.conv_tokens.tolist() == [[381, 382, 383], [450 + 253, 450 + 254, 450 + 255]]


def test_no_checkpoint_wanted() -> None:
    metadata = build_metadata(Step([Row(request(2, 0), 400, checkpoint=(384, 20))]))
    metadata.checkpoint.offsets = [0]
    assert translate(metadata, HISTORY).prefill.checkpoints is None


def test_checkpoints_off_the_grid_are_refused() -> None:
    metadata = build_metadata(Step([Row(request(2, 0), 400, checkpoint=(100, 20))]))
    with pytest.raises(ValueError, match=r"multiples of 64, got \[100\]"):
        translate(metadata, HISTORY)


def test_missing_tensors_are_named() -> None:
    metadata = build_metadata(Step([Row(request(3, 0), 9)]))
    metadata.prefill_query_start_loc = None
    with pytest.raises(ValueError, match="prefill_query_start_loc is None in a batch of 0 decodes, 1 prefills"):
        translate(metadata, HISTORY)


def test_layers_share_the_translation() -> None:
    metadata = build_metadata(Step([Row(request(3, 0), 9)]))
    assert batch_of(metadata, HISTORY) is batch_of(metadata, HISTORY)


def test_nothing_to_do() -> None:
    batch = translate(build_metadata(Step([])), HISTORY)
    assert batch.prefill is None and batch.spec is None and (batch.decode is None or batch.decode.count == 0)
