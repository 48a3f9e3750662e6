"""Inputs for every backend's tests: random cases of each op, with everything that must not be read full of NaN.

Each `<op>_case(...)` returns a Case; tests/support/checks.py runs one through a backend function. Values are drawn on
the CPU from a seed and moved, so that a case is the same on every device. Nothing here knows a backend or a host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

WIDTH = 4  # of the convolution, as in every published GDN model


class Pool(NamedTuple):
    """A page pool: `view` is a strided window on `base`, and `base` is NaN wherever a test did not put a value."""

    base: Tensor
    view: Tensor

    @classmethod
    def poisoned(
        cls, shape: tuple[int, ...], dtype: torch.dtype, *, page_tail: int = 0, lead: int = 0, layout: str = "DS",
        device: str = "cpu",
    ) -> Pool:  # fmt: skip
        """`page_tail` elements between rows, `lead` before the first; layout "SD" swaps the two dims of a 3-D pool."""
        inner = math.prod(shape[1:])
        page = inner + page_tail
        base = torch.full((lead + shape[0] * page,), float("nan"), dtype=dtype, device=device)
        if layout == "SD":
            strides: tuple[int, ...] = (page, 1, shape[1])
        else:
            strides = (page, *(math.prod(shape[d + 1 :]) for d in range(1, len(shape))))
        return cls(base, torch.as_strided(base, shape, strides, lead))

    def clone(self) -> Pool:
        base = self.base.clone()
        return Pool(base, torch.as_strided(base, self.view.shape, self.view.stride(), self.view.storage_offset()))


@dataclass
class Case:
    """One call of one op.

    args: the op's inputs by the name of the backend function's argument; pools are absent.
    pools: the tensors the op mutates, by name.
    written: which elements of each pool the op may write; every other bit of its storage must survive.
    outputs: name -> (shape, dtype) of the preallocated outputs.
    live: [T] bool, tokens that are not padding. Their outputs are compared; see `checks` for the others.
    """

    op: str
    io_dtype: torch.dtype
    args: dict[str, Any]
    pools: dict[str, Pool]
    written: dict[str, Tensor]
    outputs: dict[str, tuple[tuple[int, ...], torch.dtype]]
    live: Tensor
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def has_zero_padding(self) -> bool:
        return self.op != "conv_prologue"


class Heads(NamedTuple):
    """Head counts and dims: Hk, Hv, K, V."""

    k_heads: int = 2
    v_heads: int = 4
    k_dim: int = 16
    v_dim: int = 8

    @property
    def conv_dim(self) -> int:
        return 2 * self.k_heads * self.k_dim + self.v_heads * self.v_dim


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _normal(gen: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=gen)


def _offsets(lens: Sequence[int], device: str, dtype: torch.dtype) -> Tensor:
    return torch.tensor([0, *torch.tensor(lens, dtype=torch.long).cumsum(0).tolist()], dtype=dtype, device=device)


def _columns(gen: torch.Generator, rows: int, widths: Sequence[int], dtype: torch.dtype, device: str, gap: int):
    """Normal tensors [rows, w] per width: slices of one projection when gap > 0, NaN in the gaps between them."""
    parts = [_normal(gen, rows, w).to(dtype) for w in widths]
    if gap == 0:
        return [p.to(device) for p in parts]
    whole = torch.full((rows, sum(widths) + gap * (len(widths) + 1)), float("nan"), dtype=dtype, device=device)
    views, at = [], gap
    for part in parts:
        view = whole[:, at : at + part.shape[1]]
        view.copy_(part)
        views.append(view)
        at += part.shape[1] + gap
    return views


def _rows(gen: torch.Generator, count: int, pool_rows: int, null_index: int) -> list[int]:
    """`count` different pool rows, none of them a null row."""
    usable = torch.randperm(pool_rows - (null_index + 1), generator=gen) + null_index + 1
    return usable[:count].tolist()


def _index_tensor(values: Sequence[int], device: str, stride: int) -> Tensor:
    wide = torch.full((len(values), stride), -(2**31), dtype=torch.int32)
    wide[:, 0] = torch.tensor(list(values), dtype=torch.int32)
    return wide.to(device)[:, 0]


def _live_tokens(lens: Sequence[int], total: int, padding: Sequence[int]) -> Tensor:
    live = torch.zeros(total, dtype=torch.bool)
    at = 0
    for i, n in enumerate(lens):
        live[at : at + n] = i not in padding
        at += n
    return live


def _qkv(
    gen: torch.Generator, tokens: int, heads: Heads, io: torch.dtype, device: str, gap: int, keys: str, norm: bool
):
    """q, k [T, Hk, K] and v [T, Hv, V]; `keys` "random" or "correlated"; unit-norm q and k unless `norm` is raw."""
    hk, hv, K, V = heads
    q, k, v = _columns(gen, tokens, (hk * K, hk * K, hv * V), io, device, gap)
    q, k, v = q.view(tokens, hk, K), k.view(tokens, hk, K), v.view(tokens, hv, V)
    if keys == "correlated":
        common = _normal(gen, 1, hk, K).to(device)
        k.copy_((common + 0.02 * k.float()).to(io))
    if not norm:
        for x in (q, k):
            x.copy_(torch.nn.functional.normalize(x.float(), dim=-1).to(io))
    return q, k, v


def _fill_state(gen: torch.Generator, pool: Pool, rows: Sequence[int]) -> None:
    for row in rows:
        pool.view[row] = _normal(gen, *pool.view.shape[1:]).to(pool.view)


def _row_mask(pool: Pool, rows: Sequence[int]) -> Tensor:
    mask = torch.zeros(pool.view.shape, dtype=torch.bool, device=pool.view.device)
    for row in rows:
        mask[row] = True
    return mask


def _gate_inputs(gen: torch.Generator, tokens: int, hv: int, dtype: torch.dtype, device: str, gap: int):
    a, b = _columns(gen, tokens, (hv, hv), dtype, device, gap)
    A_log = torch.log(torch.rand(hv, generator=gen) * 8 + 0.05).to(device)
    return a, b, A_log


def prefill_case(
    lens: Sequence[int] = (65, 1, 130),
    heads: Heads = Heads(),  # noqa: B008 - an immutable tuple
    io_dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype = torch.float32,
    *,
    keys: str = "random",
    gate: str = "mild",
    fresh: Sequence[int] | None = (),
    padding: Sequence[int] = (),
    pad_tokens: int = 0,
    page_tail: int = 24,
    gap: int = 0,
    index_stride: int = 1,
    use_qk_l2norm: bool = False,
    exp_gate: bool = False,
    checkpoint_every: int = 0,
    scale: float | None = None,
    null_index: int = -1,
    offsets_dtype: torch.dtype = torch.int32,
    hint_seqlen: bool = False,
    device: str = "cpu",
    seed: int = 0,
) -> Case:
    """Packed sequences.

    gate: "mild" (what models do), "none" (g = 0), "strong" (down to -20), "harsh" (down to -120: exp is 0 in fp32),
        "wipe" (-inf now and then).
    fresh: sequences with has_initial_state False (their pool row stays NaN); None passes has_initial_state=None.
    padding: sequences whose state index is null_index. pad_tokens: tokens behind the last sequence, NaN throughout.
    gap: q, k, v are slices of one [T, ...] projection with NaN gaps of that many columns.
    """
    gen = _generator(seed)
    batch, used = len(lens), sum(lens)
    tokens = used + pad_tokens
    hv = heads.v_heads
    q, k, v = _qkv(gen, tokens, heads, io_dtype, device, gap, keys, use_qk_l2norm)
    span = {"mild": 0.5, "none": 0.0, "strong": 20.0, "harsh": 120.0, "wipe": math.inf}[gate]
    g = -span * torch.rand(tokens, hv, generator=gen)
    if gate in ("strong", "harsh", "wipe"):  # most tokens remember; the odd one wipes the slate
        mild = g * 0.005 if gate != "wipe" else torch.full_like(g, -0.1)
        g = torch.where(torch.rand(tokens, hv, generator=gen) < 0.15, g, mild)
    beta = torch.sigmoid(_normal(gen, tokens, hv) + (3.0 if keys == "correlated" else 0.0))
    g, beta = (torch.exp(g) if exp_gate else g).to(device), beta.to(device)
    for x in (q, k, v, g, beta):
        x[used:] = float("nan")

    state = Pool.poisoned((batch + 3, hv, heads.v_dim, heads.k_dim), state_dtype, page_tail=page_tail, device=device)
    rows = _rows(gen, batch, batch + 3, null_index)
    started = [r for i, r in enumerate(rows) if i not in padding and i not in (fresh or ())]
    _fill_state(gen, state, started)
    indices = [null_index if i in padding else r for i, r in enumerate(rows)]
    initial = None if fresh is None else torch.tensor([i not in fresh for i in range(batch)], device=device)
    ends = [r for i, r in enumerate(rows) if i not in padding and lens[i] > 0]
    pools = {"state": state}
    written = {"state": _row_mask(state, ends)}
    starts = None
    if checkpoint_every:
        counts = [n // checkpoint_every for n in lens]
        starts = _offsets(counts, device, torch.int32)
        points = Pool.poisoned((sum(counts) + 2, hv, heads.v_dim, heads.k_dim), state_dtype, device=device)
        at = starts.tolist()
        kept = [c for i in range(batch) if i not in padding for c in range(at[i], at[i + 1])]
        pools["checkpoints"], written["checkpoints"] = points, _row_mask(points, kept)
    args = {
        "q": q, "k": k, "v": v, "g": g, "beta": beta,
        "state_indices": _index_tensor(indices, device, index_stride),
        "cu_seqlens": _offsets(lens, device, offsets_dtype), "has_initial_state": initial,
        "scale": heads.k_dim**-0.5 if scale is None else scale, "use_qk_l2norm": use_qk_l2norm, "exp_gate": exp_gate,
        "max_seqlen": max(lens, default=0) if hint_seqlen else 0, "null_index": null_index,
        "checkpoint_cu_starts": starts, "checkpoint_every": checkpoint_every,
    }  # fmt: skip
    if not checkpoint_every:
        args["checkpoints"] = None
    outputs = {"out": ((tokens, hv, heads.v_dim), io_dtype)}
    return Case("prefill", io_dtype, args, pools, written, outputs, _live_tokens(lens, tokens, padding))


def decode_case(
    batch: int = 5,
    heads: Heads = Heads(),  # noqa: B008 - an immutable tuple
    io_dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype = torch.float32,
    *,
    padding: Sequence[int] = (),
    page_tail: int = 24,
    gap: int = 0,
    index_stride: int = 1,
    use_qk_l2norm: bool = True,
    gate_dtype: torch.dtype | None = None,
    null_index: int = -1,
    device: str = "cpu",
    seed: int = 0,
) -> Case:
    """One token a sequence; gate_dtype is a's, b's and dt_bias's (default: the io dtype)."""
    gen = _generator(seed)
    gate_dtype = gate_dtype or io_dtype
    hv = heads.v_heads
    q, k, v = _qkv(gen, batch, heads, io_dtype, device, gap, "random", use_qk_l2norm)
    a, b, A_log = _gate_inputs(gen, batch, hv, gate_dtype, device, gap)
    state = Pool.poisoned((batch + 3, hv, heads.v_dim, heads.k_dim), state_dtype, page_tail=page_tail, device=device)
    rows = _rows(gen, batch, batch + 3, null_index)
    live_rows = [r for i, r in enumerate(rows) if i not in padding]
    _fill_state(gen, state, live_rows)
    indices = [null_index if i in padding else r for i, r in enumerate(rows)]
    args = {
        "q": q, "k": k, "v": v, "a": a, "b": b, "A_log": A_log, "dt_bias": _normal(gen, hv).to(device, gate_dtype),
        "state_indices": _index_tensor(indices, device, index_stride), "scale": heads.k_dim**-0.5,
        "use_qk_l2norm": use_qk_l2norm, "null_index": null_index,
    }  # fmt: skip
    outputs = {"out": ((batch, hv, heads.v_dim), io_dtype)}
    live = _live_tokens([1] * batch, batch, padding)
    return Case("decode", io_dtype, args, {"state": state}, {"state": _row_mask(state, live_rows)}, outputs, live)


def _conv_inputs(
    gen: torch.Generator, tokens: int, heads: Heads, io: torch.dtype, device: str, gap: int, width: int, bias: bool,
    weight_dtype: torch.dtype,
) -> dict[str, Any]:  # fmt: skip
    (mixed,) = _columns(gen, tokens, (heads.conv_dim,), io, device, gap)
    weight = (_normal(gen, heads.conv_dim, width) * 0.5).to(device, weight_dtype)
    return {
        "mixed_qkv": mixed,
        "conv_weight": weight,
        "conv_bias": (_normal(gen, heads.conv_dim) * 0.1).to(device, weight_dtype) if bias else None,
    }


def _conv_pool(
    gen: torch.Generator, shape: tuple[int, int, int], dtype: torch.dtype, layout: str, page_tail: int, device: str,
    spans: dict[int, tuple[int, int]],
) -> Pool:  # fmt: skip
    """A conv_state pool of which row r holds values in columns spans[r] only."""
    pool = Pool.poisoned(shape, dtype, page_tail=page_tail, layout=layout, device=device)
    for row, (first, last) in spans.items():
        pool.view[row, :, first:last] = _normal(gen, shape[1], last - first).to(pool.view)
    return pool


def conv_prologue_case(
    lens: Sequence[int] = (5, 1, 9),
    heads: Heads = Heads(),  # noqa: B008 - an immutable tuple
    io_dtype: torch.dtype = torch.float32,
    *,
    conv_dtype: torch.dtype | None = None,
    state_dtype: torch.dtype | None = torch.float32,
    width: int = WIDTH,
    layout: str = "DS",
    bias: bool = True,
    fresh: Sequence[int] | None = (),
    padding: Sequence[int] = (),
    accepted: Sequence[int] | None = None,
    extra_columns: int = 0,
    pad_tokens: int = 0,
    page_tail: int = 24,
    gap: int = 0,
    index_stride: int = 1,
    exp_gate: bool = False,
    gate_dtype: torch.dtype | None = None,
    null_index: int = -1,
    offsets_dtype: torch.dtype = torch.int32,
    device: str = "cpu",
    seed: int = 0,
) -> Case:
    """The prologue of a prefill, or, with `accepted` (num_accepted_tokens), of speculative rows.

    layout: "DS" or "SD", the physical order of conv_state. state_dtype None passes state=None. extra_columns widens
    conv_state past W-1; under `accepted` it is at least what the longest sequence needs.
    """
    gen = _generator(seed)
    gate_dtype, conv_dtype = gate_dtype or io_dtype, conv_dtype or io_dtype
    batch, used = len(lens), sum(lens)
    tokens, hv = used + pad_tokens, heads.v_heads
    args = _conv_inputs(gen, tokens, heads, io_dtype, device, gap, width, bias, gate_dtype)
    a, b, A_log = _gate_inputs(gen, tokens, hv, gate_dtype, device, gap)
    live = _live_tokens(lens, tokens, padding)
    for x in (args["mixed_qkv"], a, b):
        x[~live.to(device)] = float("nan")

    rows = _rows(gen, batch, batch + 3, null_index)
    active = [i for i in range(batch) if i not in padding and lens[i] > 0]
    started = [i for i in active if i not in (fresh or ())]
    first = [0] * batch if accepted is None else [n - 1 for n in accepted]
    if accepted is not None:
        extra_columns = max(extra_columns, max(first), max(lens) - 1)
    shape = (batch + 3, heads.conv_dim, width - 1 + extra_columns)
    conv_state = _conv_pool(
        gen, shape, conv_dtype, layout, page_tail, device,
        {rows[i]: (first[i], first[i] + width - 1) for i in started},
    )  # fmt: skip
    conv_written = torch.zeros(shape, dtype=torch.bool, device=device)
    for i in active:
        conv_written[rows[i], :, : width - 1 if accepted is None else width - 2 + lens[i]] = True
    pools, written = {"conv_state": conv_state}, {"conv_state": conv_written}
    if state_dtype is not None:
        shape4 = (batch + 3, hv, heads.v_dim, heads.k_dim)
        pools["state"] = Pool.poisoned(shape4, state_dtype, page_tail=page_tail, device=device)
        _fill_state(gen, pools["state"], [rows[i] for i in started])
        written["state"] = _row_mask(pools["state"], [rows[i] for i in active if i not in started])
    indices = [null_index if i in padding else r for i, r in enumerate(rows)]
    args |= {
        "state_indices": _index_tensor(indices, device, index_stride),
        "cu_seqlens": _offsets(lens, device, offsets_dtype),
        "has_initial_state": None
        if fresh is None
        else torch.tensor([i not in fresh for i in range(batch)], device=device),
        "num_accepted_tokens": None
        if accepted is None
        else torch.tensor(list(accepted), dtype=torch.int32, device=device),
        "a": a, "b": b, "A_log": A_log, "dt_bias": _normal(gen, hv).to(device, gate_dtype),
        "num_k_heads": heads.k_heads, "head_k_dim": heads.k_dim, "head_v_dim": heads.v_dim,
        "exp_gate": exp_gate, "null_index": null_index,
    }  # fmt: skip
    if state_dtype is None:
        args["state"] = None
    outputs = {
        "q": ((tokens, heads.k_heads, heads.k_dim), io_dtype),
        "k": ((tokens, heads.k_heads, heads.k_dim), io_dtype),
        "v": ((tokens, hv, heads.v_dim), io_dtype),
        "g": ((tokens, hv), torch.float32),
        "beta": ((tokens, hv), torch.float32),
    }
    return Case("conv_prologue", io_dtype, args, pools, written, outputs, live)


def fused_decode_case(
    batch: int = 5,
    heads: Heads = Heads(),  # noqa: B008 - an immutable tuple
    io_dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype = torch.float32,
    *,
    conv_dtype: torch.dtype | None = None,
    width: int = WIDTH,
    layout: str = "DS",
    bias: bool = True,
    norm: bool = True,
    gate: str = "silu",
    padding: Sequence[int] = (),
    extra_columns: int = 0,
    page_tail: int = 24,
    gap: int = 0,
    index_stride: int = 1,
    gate_dtype: torch.dtype | None = None,
    null_index: int = -1,
    device: str = "cpu",
    seed: int = 0,
) -> Case:
    """The whole decode step; norm=False passes z and norm_weight as None."""
    gen = _generator(seed)
    gate_dtype, conv_dtype = gate_dtype or io_dtype, conv_dtype or io_dtype
    hv = heads.v_heads
    args = _conv_inputs(gen, batch, heads, io_dtype, device, gap, width, bias, gate_dtype)
    a, b, A_log = _gate_inputs(gen, batch, hv, gate_dtype, device, gap)
    (z,) = _columns(gen, batch, (hv * heads.v_dim,), io_dtype, device, gap)
    rows = _rows(gen, batch, batch + 3, null_index)
    live_rows = [r for i, r in enumerate(rows) if i not in padding]
    shape = (batch + 3, heads.conv_dim, width - 1 + extra_columns)
    conv_state = _conv_pool(
        gen, shape, conv_dtype, layout, page_tail, device, dict.fromkeys(live_rows, (0, width - 1))
    )  # fmt: skip
    state = Pool.poisoned((batch + 3, hv, heads.v_dim, heads.k_dim), state_dtype, page_tail=page_tail, device=device)
    _fill_state(gen, state, live_rows)
    conv_written = torch.zeros(shape, dtype=torch.bool, device=device)
    for row in live_rows:
        conv_written[row, :, : width - 1] = True
    indices = [null_index if i in padding else r for i, r in enumerate(rows)]
    args |= {
        "a": a, "b": b, "A_log": A_log, "dt_bias": _normal(gen, hv).to(device, gate_dtype),
        "state_indices": _index_tensor(indices, device, index_stride),
        "num_k_heads": heads.k_heads, "head_k_dim": heads.k_dim, "head_v_dim": heads.v_dim,
        "scale": heads.k_dim**-0.5,
        "z": z.view(batch, hv, heads.v_dim) if norm else None,
        "norm_weight": (1 + 0.1 * _normal(gen, heads.v_dim)).to(device, io_dtype) if norm else None,
        "norm_eps": 1e-6, "gate": gate, "null_index": null_index,
    }  # fmt: skip
    pools = {"conv_state": conv_state, "state": state}
    written = {"conv_state": conv_written, "state": _row_mask(state, live_rows)}
    outputs = {"out": ((batch, hv, heads.v_dim), io_dtype)}
    live = _live_tokens([1] * batch, batch, padding)
    return Case("fused_decode", io_dtype, args, pools, written, outputs, live)


def verify_case(
    lens: Sequence[int] = (3, 1, 4, 0),
    heads: Heads = Heads(),  # noqa: B008 - an immutable tuple
    io_dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype = torch.float32,
    *,
    slots: int = 4,
    accepted: Sequence[int] | None = None,
    start_rows: bool = False,
    padding: Sequence[int] = (),
    pad_tokens: int = 0,
    page_tail: int = 24,
    gap: int = 0,
    index_stride: int = 1,
    use_qk_l2norm: bool = True,
    gate_dtype: torch.dtype | None = None,
    null_index: int = -1,
    offsets_dtype: torch.dtype = torch.int32,
    device: str = "cpu",
    seed: int = 0,
) -> Case:
    """Speculative tokens, S = slots rows a sequence; `accepted` defaults to 1, 2, ... in turn.

    start_rows: hand over the rows to start from, beside a num_accepted_tokens that must not be read.
    """
    gen = _generator(seed)
    gate_dtype = gate_dtype or io_dtype
    batch, used, hv = len(lens), sum(lens), heads.v_heads
    tokens = used + pad_tokens
    accepted = [1 + i % slots for i in range(batch)] if accepted is None else list(accepted)
    q, k, v = _qkv(gen, tokens, heads, io_dtype, device, gap, "random", use_qk_l2norm)
    a, b, A_log = _gate_inputs(gen, tokens, hv, gate_dtype, device, gap)
    for x in (q, k, v, a, b):
        x[used:] = float("nan")
    pool_rows = batch * slots + 3
    state = Pool.poisoned((pool_rows, hv, heads.v_dim, heads.k_dim), state_dtype, page_tail=page_tail, device=device)
    rows = torch.tensor(_rows(gen, batch * slots, pool_rows, null_index)).view(batch, slots)
    live = [i for i in range(batch) if i not in padding and lens[i] > 0]
    _fill_state(gen, state, [int(rows[i, accepted[i] - 1]) for i in live])
    written = _row_mask(state, [int(rows[i, t]) for i in live for t in range(lens[i])])
    rows[list(padding)] = null_index
    starts = None
    if start_rows:
        starts = rows.gather(1, torch.tensor(accepted).view(-1, 1) - 1)[:, 0].to(device, torch.int32)
        accepted = [99] * batch
    wide = torch.full((batch, slots + index_stride - 1), -(2**31), dtype=torch.int32)
    wide[:, :slots] = rows.to(torch.int32)
    args = {
        "q": q, "k": k, "v": v, "a": a, "b": b, "A_log": A_log, "dt_bias": _normal(gen, hv).to(device, gate_dtype),
        "state_indices": wide.to(device)[:, :slots],
        "num_accepted_tokens": torch.tensor(accepted, dtype=torch.int32, device=device),
        "cu_seqlens": _offsets(lens, device, offsets_dtype), "start_rows": starts, "scale": heads.k_dim**-0.5,
        "use_qk_l2norm": use_qk_l2norm, "null_index": null_index,
    }  # fmt: skip
    outputs = {"out": ((tokens, hv, heads.v_dim), io_dtype)}
    return Case(
        "verify", io_dtype, args, {"state": state}, {"state": written}, outputs, _live_tokens(lens, tokens, padding)
    )
