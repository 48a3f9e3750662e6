"""Backend `torch`, prefill: the chunked delta rule in PyTorch's own batched matrix products, on any device.

Two drivers around `delta_chunk.Window`. On the CPU the lengths are read, sequences are cut into exactly the chunks they
have, and head slices keep a window's buffers in the cache. Elsewhere nothing is read from the device: T tokens of B
sequences have at most T // 64 + B chunks, all index arithmetic is done on the device, chunks that do not exist carry no
tokens, and so the whole call can be captured in a CUDA graph.

Cost, with C = 64, per token and value head: about 2 * (3*K*V + 2*C*V + 2*C*K*Hk/Hv) floating-point operations. Extra
memory: one window of at most 8 chunks of 8 value heads (CPU) or of all (other devices), about C * (2*K*Hk/Hv + V +
5*C) fp32 elements a chunk and value head, whatever T is; elsewhere than on the CPU also one [T, Hv, V] buffer of the io
dtype. Against transformers' torch_chunk_gated_delta_rule (T = 2048, Hk = 16, Hv = 32, K = V = 128, bf16, an EPYC core)
it takes 0.31 of the CPU time (one thread, median of 5, interleaved).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gdn_plugin.backends.torch.delta_chunk import CHUNK, Window, log_gate
from gdn_plugin.backends.torch.formulas import full_fp32, l2_norm
from gdn_plugin.registry import BackendOp

_CPU_CHUNKS = 8  # chunks a window
_CPU_VALUE_HEADS = 8  # value heads a slice, at least one key head
_DEVICE_CHUNKS = 8  # chunks a window, all heads: few enough that a window stays below the other buffers


def prefill(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, state_indices: Tensor,
    cu_seqlens: Tensor, has_initial_state: Tensor | None, scale: float, use_qk_l2norm: bool, exp_gate: bool,
    max_seqlen: int, null_index: int, padding: str, out: Tensor, checkpoints: Tensor | None,
    checkpoint_cu_starts: Tensor | None, checkpoint_every: int, zero_padding: bool,
) -> None:  # fmt: skip
    """See gdn_plugin.ops.prefill, and this module for what it costs."""
    driver = _prefill_host if q.device.type == "cpu" else _prefill_device
    with full_fp32():
        driver(
            q, k, v, g, beta, state, state_indices, cu_seqlens, has_initial_state, scale, use_qk_l2norm, exp_gate,
            null_index, out, checkpoints, checkpoint_cu_starts, checkpoint_every, zero_padding,
        )  # fmt: skip


def _qk(x: Tensor, use_qk_l2norm: bool) -> Tensor:
    return l2_norm(x) if use_qk_l2norm else x


def _prefill_host(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, state_indices: Tensor,
    cu_seqlens: Tensor, has_initial_state: Tensor | None, scale: float, use_qk_l2norm: bool, exp_gate: bool,
    null_index: int, out: Tensor, checkpoints: Tensor | None, checkpoint_cu_starts: Tensor | None,
    checkpoint_every: int, zero_padding: bool,
) -> None:  # fmt: skip
    offsets, rows = cu_seqlens.tolist(), state_indices.tolist()
    fresh = [False] * len(rows) if has_initial_state is None else (~has_initial_state).tolist()
    starts = None if checkpoint_cu_starts is None else checkpoint_cu_starts.tolist()
    live = [i for i, row in enumerate(rows) if row > null_index and offsets[i] < offsets[i + 1]]
    if zero_padding:
        at = 0
        for i in live:
            out[at : offsets[i]] = 0
            at = offsets[i + 1]
        out[at:] = 0
    # (sequence, first token, tokens, chunk within the sequence)
    chunks = [
        (i, t, min(CHUNK, offsets[i + 1] - t), n)
        for i in live
        for n, t in enumerate(range(offsets[i], offsets[i + 1], CHUNK))
    ]
    key_heads, ratio = k.shape[1], v.shape[1] // k.shape[1]
    heads = max(1, _CPU_VALUE_HEADS // ratio)
    for h0 in range(0, key_heads, heads):
        h1 = min(h0 + heads, key_heads)
        own = slice(h0 * ratio, h1 * ratio)
        S = torch.empty(h1 - h0, ratio, v.shape[2], k.shape[2], dtype=torch.float32, device=k.device)
        S_pool, out_own = S.view(-1, v.shape[2], k.shape[2]), out[:, own]
        for c0 in range(0, len(chunks), _CPU_CHUNKS):
            part = chunks[c0 : c0 + _CPU_CHUNKS]
            window = _host_window(
                q[:, h0:h1], k[:, h0:h1], v[:, own], g[:, own], beta[:, own], part, use_qk_l2norm, exp_gate
            )
            for c, (i, t, size, n) in enumerate(part):
                if n == 0:
                    if fresh[i]:
                        S.zero_()
                    else:
                        S_pool.copy_(state[rows[i], own])
                o = window.step(c, S, scale)
                out_own[t : t + size] = o.flatten(0, 1)[:, :size].transpose(0, 1)
                done = n * CHUNK + size
                if checkpoints is not None and starts is not None and size == CHUNK and done % checkpoint_every == 0:
                    checkpoints[starts[i] + done // checkpoint_every - 1, own] = S_pool
                if t + size == offsets[i + 1]:
                    state[rows[i], own] = S_pool
            del window, o  # before the next one is made: two at a time would double the peak


def _host_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    part: list[tuple[int, int, int, int]],
    use_qk_l2norm: bool,
    exp_gate: bool,
) -> Window:
    """The window of a list of chunks; chunks that follow one another in memory are copied in one go."""
    n, h, hv, K, V = len(part), k.shape[1], v.shape[1], k.shape[2], v.shape[2]
    r = hv // h
    ragged = any(size != CHUNK for _, _, size, _ in part)
    make = torch.zeros if ragged else torch.empty
    kq = make(n, h, 2 * CHUNK, K, dtype=torch.float32, device=k.device)
    values = make(n, h, r, CHUNK, V, dtype=torch.float32, device=k.device)
    gates = make(n, h, r, CHUNK, dtype=torch.float64, device=k.device)
    strength = make(n, h, r, CHUNK, dtype=torch.float32, device=k.device)
    c = 0
    while c < n:
        _, t, size, _ = part[c]
        run = 1
        while size == CHUNK and c + run < n and part[c + run][1:3] == (t + run * CHUNK, CHUNK):
            run += 1
        tokens, to = slice(t, t + run * size if size == CHUNK else t + size), slice(c, c + run)

        def cut(x: Tensor, tokens: slice = tokens, run: int = run, size: int = size) -> Tensor:
            return x[tokens].unflatten(0, (run, size))

        kq[to, :, :size] = cut(_qk(k[tokens], use_qk_l2norm), slice(None)).transpose(1, 2)
        kq[to, :, CHUNK : CHUNK + size] = cut(_qk(q[tokens], use_qk_l2norm), slice(None)).transpose(1, 2)
        values[to, :, :, :size] = cut(v).unflatten(2, (h, r)).permute(0, 2, 3, 1, 4)
        gates[to, ..., :size] = log_gate(cut(g), exp_gate).unflatten(2, (h, r)).permute(0, 2, 3, 1)
        strength[to, ..., :size] = cut(beta).unflatten(2, (h, r)).permute(0, 2, 3, 1)
        c += run
    finite = math.isfinite(kq.sum() + values.sum() + gates.sum() + strength.sum())
    return Window(kq, values, gates, strength, finite)


def _prefill_device(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, state_indices: Tensor,
    cu_seqlens: Tensor, has_initial_state: Tensor | None, scale: float, use_qk_l2norm: bool, exp_gate: bool,
    null_index: int, out: Tensor, checkpoints: Tensor | None, checkpoint_cu_starts: Tensor | None,
    checkpoint_every: int, zero_padding: bool,
) -> None:  # fmt: skip
    device, (tokens, key_heads, K), (_, value_heads, V) = q.device, k.shape, v.shape
    ratio, batch = value_heads // key_heads, state_indices.shape[0]
    if batch == 0 or state.shape[0] == 0:  # no sequence has a row
        if zero_padding:
            out.zero_()
        return
    most = tokens // CHUNK + batch
    offsets, rows = cu_seqlens.long(), state_indices.long()
    lens = offsets.diff()
    live = (rows > null_index) & (lens > 0)
    fresh = torch.zeros_like(live) if has_initial_state is None else ~has_initial_state
    chunks_before = torch.cat((offsets.new_zeros(1), torch.div(lens + CHUNK - 1, CHUNK, rounding_mode="floor"))).cumsum(
        0
    )

    # Of each chunk slot: its sequence, its number in it, and whether it exists.
    slots = torch.arange(most, device=device)
    seq = (torch.searchsorted(chunks_before, slots, right=True) - 1).clamp(0, batch - 1)
    number = slots - chunks_before[seq]
    exists = (slots < chunks_before[-1]) & live[seq]
    first = offsets[seq] + number * CHUNK
    token = first[:, None] + torch.arange(CHUNK, device=device)
    valid = exists[:, None] & (token < offsets[seq + 1][:, None])
    token = torch.where(valid, token, 0)
    row = torch.where(exists, rows[seq], 0)
    opens = exists & (number == 0)
    loads = (opens & ~fresh[seq]).view(-1, 1, 1, 1, 1)
    last = exists & (first + CHUNK >= offsets[seq + 1])
    opens = opens.view(-1, 1, 1, 1, 1)
    marks: Tensor | None = None
    mark_row: Tensor | None = None
    if checkpoints is not None and checkpoint_cu_starts is not None:
        done = (number + 1) * CHUNK
        marks = exists & (done <= lens[seq]) & (done % checkpoint_every == 0)
        mark_row = torch.where(marks, checkpoint_cu_starts[seq].long() + done // checkpoint_every - 1, 0)

    results = torch.empty(most * CHUNK, value_heads, V, dtype=out.dtype, device=device)
    S = torch.zeros(key_heads, ratio, V, K, dtype=torch.float32, device=device)
    S_pool = S.view(1, value_heads, V, K)
    for c0 in range(0, most, _DEVICE_CHUNKS):
        n = min(_DEVICE_CHUNKS, most - c0)
        window = _device_window(q, k, v, g, beta, token[c0 : c0 + n], valid[c0 : c0 + n], use_qk_l2norm, exp_gate)
        for i in range(n):
            c = c0 + i
            here = slice(c, c + 1)
            stored = state.index_select(0, row[here])
            S.copy_(torch.where(opens[c], torch.where(loads[c], stored.view_as(S).float(), 0), S))
            window.step(i, S, scale)
            # One row at a time, in order: a chunk that ends nothing rewrites the row with what it holds.
            state.index_copy_(0, row[here], torch.where(last[here].view(-1, 1, 1, 1), S_pool.to(state.dtype), stored))
            if checkpoints is not None and marks is not None and mark_row is not None and checkpoints.shape[0] > 0:
                kept = checkpoints.index_select(0, mark_row[here])
                mark = torch.where(marks[here].view(-1, 1, 1, 1), S_pool.to(checkpoints.dtype), kept)
                checkpoints.index_copy_(0, mark_row[here], mark)
        o = window.v.permute(0, 3, 1, 2, 4).reshape(n * CHUNK, value_heads, V)
        results[c0 * CHUNK : (c0 + n) * CHUNK] = o
        del window, o

    position = torch.arange(tokens, device=device)
    owner = torch.searchsorted(offsets, position, right=True) - 1
    inside = (owner < batch) & live[owner.clamp(max=batch - 1)]
    owner = owner.clamp(max=batch - 1)
    source = torch.where(inside, chunks_before[owner] * CHUNK + position - offsets[owner], 0)
    for t0 in range(0, tokens, _DEVICE_CHUNKS * CHUNK):
        part = slice(t0, min(t0 + _DEVICE_CHUNKS * CHUNK, tokens))
        padding = 0 if zero_padding else out[part]
        out[part] = torch.where(inside[part].view(-1, 1, 1), results.index_select(0, source[part]), padding)


def _device_window(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, token: Tensor, valid: Tensor, norm: bool, exp_gate: bool
) -> Window:
    """The window of chunks given as token numbers [n, C]; zeros where not valid."""
    n, (_, h, K), (_, hv, V) = token.shape[0], k.shape, v.shape
    r, flat = hv // h, token.flatten()
    real = valid.view(n, 1, CHUNK, 1)

    def key_rows(x: Tensor) -> Tensor:
        rows = _qk(x.index_select(0, flat), norm).float().view(n, CHUNK, h, K).transpose(1, 2)
        return torch.where(real, rows, 0.0)

    kq = torch.cat((key_rows(k), key_rows(q)), dim=2)
    values = v.index_select(0, flat).float().view(n, CHUNK, h, r, V).permute(0, 2, 3, 1, 4)
    gates = log_gate(g.index_select(0, flat), exp_gate).view(n, CHUNK, h, r).permute(0, 2, 3, 1)
    strength = beta.index_select(0, flat).view(n, CHUNK, h, r).permute(0, 2, 3, 1)
    mask = valid.view(n, 1, 1, CHUNK)
    return Window(
        kq,
        torch.where(mask.unsqueeze(-1), values, 0.0).contiguous(),
        torch.where(mask, gates, 0.0),
        torch.where(mask, strength, 0.0),
        finite=False,
    )


PREFILL = BackendOp(prefill)
