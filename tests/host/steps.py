"""A scheduler in miniature: requests go through steps, and each step becomes the metadata that vLLM would build.

Used where the host's own engine would be too slow or too hard to steer: ragged acceptance, padding, recycled rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import Tensor


@dataclass
class Request:
    """A stream of tokens and how far it has come.

    Args:
        rows: state rows; one, or one for each token of a speculative step.
        x, a, b: [L, dim], [L, Hv] inputs of the whole stream.
    """

    rows: list[int]
    x: Tensor
    a: Tensor
    b: Tensor
    done: int = 0
    accepted: int = 1


@dataclass
class Row:
    """A request's share of a step.

    Args:
        count: tokens of the stream that it brings; they are right, all of them, unless `drafts`.
        drafts: None: not a speculative row. Else how many of its tokens are wrong drafts behind the right ones.
        checkpoint: offset into its tokens whose state is to be kept, and the row that takes it.
    """

    request: Request
    count: int
    drafts: int | None = None
    checkpoint: tuple[int, int] | None = None


@dataclass
class Step:
    """Rows in the host's order, and tokens and requests of padding behind them."""

    rows: list[Row]
    pad_requests: int = 0
    pad_tokens: int = 0
    inputs: tuple[Tensor, Tensor, Tensor] = field(default=None, repr=False)  # type: ignore[assignment]


def build_inputs(step: Step, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, list[tuple[Row, slice]]]:
    """mixed_qkv, a and b of the step, noise for wrong drafts, NaN for padding; and where right tokens are."""
    pieces: list[list[Tensor]] = [[], [], []]
    places = []
    position = 0
    for row in step.rows:
        request, wrong = row.request, row.drafts or 0
        for piece, stream in zip(pieces, (request.x, request.a, request.b), strict=True):
            piece.append(stream[request.done : request.done + row.count])
            piece.append(torch.randn(wrong, stream.shape[1], generator=generator, dtype=stream.dtype))
        places.append((row, slice(position, position + row.count)))
        position += row.count + wrong
    for piece in pieces:
        piece.append(torch.full((step.pad_tokens, piece[0].shape[1]), float("nan"), dtype=piece[0].dtype))
    x, a, b = (torch.cat(piece) for piece in pieces)
    return x, a, b, places


def build_metadata(step: Step, spec_tokens: int = 0) -> SimpleNamespace:
    """What `GDNAttentionMetadataBuilder.build` makes of the step (from the source of vLLM 0.32 and 0.33)."""
    lengths = [row.count + (row.drafts or 0) for row in step.rows] + [0] * step.pad_requests
    spec = [row.drafts is not None for row in step.rows] + [False] * step.pad_requests
    rows = [row.request.rows for row in step.rows] + [[0] * max(spec_tokens, 1)] * step.pad_requests
    context = [row.request.done for row in step.rows] + [0] * step.pad_requests
    meta = SimpleNamespace(
        num_prefills=0,
        num_prefill_tokens=0,
        num_decodes=0,
        num_decode_tokens=0,
        num_spec_decodes=sum(spec),
        num_spec_decode_tokens=0,
        num_actual_tokens=sum(lengths),
        checkpoint=None,
        spec_query_start_loc=None,
        non_spec_query_start_loc=None,
        spec_state_indices_tensor=None,
        non_spec_state_indices_tensor=None,
        spec_sequence_masks=torch.tensor(spec) if any(spec) else None,
        spec_token_indx=None,
        non_spec_token_indx=None,
        num_accepted_tokens=None,
        prefill_query_start_loc=None,
        prefill_state_indices=None,
        prefill_has_initial_state=None,
        nums_dict=None,
        _gdn_plugin_spec_has_initial_state=None,
    )
    others = [i for i, is_spec in enumerate(spec) if not is_spec]
    if any(spec):
        _speculative(meta, step, lengths, spec, rows, spec_tokens)
        prefills = others if any(lengths[i] for i in others) else []
        decodes = 0
    else:
        meta.non_spec_query_start_loc = _starts(lengths)
        meta.non_spec_state_indices_tensor = _int32([r[0] for r in rows])
        real = [i for i, length in enumerate(lengths) if length]
        decodes = next((i for i in real if lengths[i] > 1 or context[i] == 0), len(lengths))
        if decodes == len(lengths):  # decodes only: padded to the size of a graph
            meta.num_decodes, meta.num_decode_tokens = decodes, sum(lengths)
            meta.num_actual_tokens = sum(lengths) + step.pad_tokens
            if step.pad_tokens:
                meta.non_spec_query_start_loc = _starts([1] * sum(lengths) + [0] * step.pad_tokens)
            return meta
        meta.num_decodes = meta.num_decode_tokens = decodes
        prefills = [i for i in others if i >= decodes]
    if prefills:
        lens = [lengths[i] for i in prefills]
        meta.num_prefills = sum(1 for length in lens if length)
        meta.num_prefill_tokens = sum(lens)
        meta.prefill_query_start_loc = _starts(lens)
        meta.prefill_state_indices = _int32([rows[i][0] for i in prefills])
        meta.prefill_has_initial_state = torch.tensor([context[i] > 0 for i in prefills])
        meta.nums_dict = {8: {"nums": torch.tensor([-(-length // 8) for length in lens])}}
        kept = [step.rows[i].checkpoint if i < len(step.rows) else None for i in others]
        if any(kept):
            meta.checkpoint = SimpleNamespace(
                offsets=[k[0] if k else 0 for k in kept],
                state_indices=_int32([k[1] if k else 0 for k in kept]),
                checkpoint_offsets=_int32([k[0] if k else 0 for k in kept]),
            )
    return meta


def _speculative(
    meta: SimpleNamespace, step: Step, lengths: list[int], spec: list[bool], rows: list[list[int]], spec_tokens: int
) -> None:
    chosen = [i for i, is_spec in enumerate(spec) if is_spec]
    meta.spec_state_indices_tensor = _int32([rows[i][:spec_tokens] for i in chosen])
    meta.spec_query_start_loc = _starts([lengths[i] for i in chosen])
    meta.num_accepted_tokens = _int32([step.rows[i].request.accepted for i in chosen])
    meta.num_spec_decode_tokens = sum(lengths[i] for i in chosen)
    started = [step.rows[i].request.done > 0 for i in chosen]
    token_is_spec = torch.repeat_interleave(torch.tensor(spec), torch.tensor(lengths))
    index = torch.argsort(token_is_spec, stable=True)
    others = int((~token_is_spec).sum())
    meta.non_spec_token_indx, meta.spec_token_indx = index[:others], index[others:]
    meta._gdn_plugin_spec_has_initial_state = torch.tensor(started)  # patches/fresh_speculative_rows.py
    if others:
        return
    meta.spec_token_indx = torch.arange(len(token_is_spec), dtype=torch.int32)
    if step.pad_requests:  # padded to the size of a graph
        meta.spec_state_indices_tensor = _int32([rows[i][:spec_tokens] for i in range(len(rows))])
        meta.spec_query_start_loc = _starts(lengths)
        meta.num_accepted_tokens = _int32([r.request.accepted for r in step.rows] + [1] * step.pad_requests)
        meta.num_spec_decodes = len(rows)
        meta._gdn_plugin_spec_has_initial_state = torch.tensor(started + [True] * step.pad_requests)
    meta.num_actual_tokens += step.pad_tokens


def _starts(lengths: list[int]) -> Tensor:
    return torch.cumsum(torch.tensor([0, *lengths]), 0).to(torch.int32)


def _int32(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)
