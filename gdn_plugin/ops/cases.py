"""The one maker of inputs: random calls of each op, with everything that must not be read full of NaN.

Each `<op>_case(...)` returns a `Case`; `case(problem, lens)` makes one from a registry `Problem`, laid out as a host
lays its tensors out. Tests, self-check, warm-up and bench all take their inputs from here.

Values are drawn on the CPU from a seed and moved, so that a case is the same on every device; nothing depends on, or
touches, the caller's random state and defaults. On device "meta" a case has shapes and strides and no values: it costs
nothing, whatever its size. Nothing here knows a backend or a host.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gdn_plugin.registry import Problem, Wants

WIDTH = 4  # of the convolution, as in every published GDN model
CHECKPOINT_EVERY = 64
NAN = float("nan")
_ALIGN = 64  # bytes
_OF_PROJECTIONS = (
    "conv_prologue",
    "fused_decode",
    "fused_verify",
    "replay_decode",
    "replay_verify",
)  # take slices of what a projection gives
_Parts = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # name -> (shape of a row, dtype)


class Heads(NamedTuple):
    """Head counts and dims: Hk, Hv, K, V."""

    k_heads: int = 2
    v_heads: int = 4
    k_dim: int = 16
    v_dim: int = 8

    @property
    def conv_dim(self) -> int:
        return 2 * self.k_heads * self.k_dim + self.v_heads * self.v_dim

    @property
    def state(self) -> tuple[int, int, int]:
        return self.v_heads, self.v_dim, self.k_dim


SMALL = Heads()


class Pool(NamedTuple):
    """`view` is a strided window on `base`, flat bytes that several pools may share.

    All bytes of a new base are 255: NaN in every float dtype. Before the first row and behind the last one there is at
    least one row more, which is nobody's.
    """

    base: Tensor
    view: Tensor

    def clone(self) -> Pool:
        return self.on(self.base.clone())

    def on(self, base: Tensor) -> Pool:
        """The same window on other bytes."""
        if base.device.type == "meta":
            return Pool(base, torch.empty_strided(
                self.view.shape, self.view.stride(), dtype=self.view.dtype, device="meta"))  # fmt: skip
        typed = base.view(self.view.dtype)
        return Pool(base, typed.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset()))


def pages(
    rows: int,
    parts: _Parts,
    *,
    page_tail: int = 0,
    layout: str = "DS",
    device: str | torch.device = "cpu",
) -> dict[str, Pool]:
    """Pools of `rows` rows that lie behind one another in each page, as hosts pack conv_state and state.

    Args:
        parts: name -> (shape of a row, dtype). One part alone is packed without gaps.
        page_tail: elements of the last part's dtype between rows.
        layout: "SD" swaps the two dims of conv_state's rows in memory.
    """
    starts, end, last = [], 0, 1
    for shape, dtype in parts.values():
        end = -(-end // _ALIGN) * _ALIGN
        starts.append(end)
        last = dtype.itemsize
        end += math.prod(shape) * last
    page = end + page_tail * last
    if len(parts) > 1:
        page = -(-page // _ALIGN) * _ALIGN
    lead = max(-(-page // _ALIGN), 1) * _ALIGN
    size = -(-(lead + (rows + 1) * page) // 8) * 8
    meta = torch.device(device).type == "meta"
    base = torch.empty(0 if meta else size, dtype=torch.uint8, device=device).fill_(255)
    pools = {}
    for start, (name, (shape, dtype)) in zip(starts, parts.items(), strict=True):
        if layout == "SD" and name == "conv_state":
            inner: tuple[int, ...] = (1, shape[0])
        else:
            inner = tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))
        full, strides = (rows, *shape), (page // dtype.itemsize, *inner)
        if meta:
            view = torch.empty_strided(full, strides, dtype=dtype, device=device)
        else:
            view = base.view(dtype).as_strided(full, strides, (lead + start) // dtype.itemsize)
        pools[name] = Pool(base, view)
    return pools


@dataclass
class Case:
    """One call of one op.

    Args:
        op: which.
        io_dtype: of its tokens.
        args: the inputs by the name of the record's argument; pools, outputs and zero_padding are absent.
        pools: what the op mutates, by name.
        written: by pool, row -> what the op must write there: so many of its last dim's elements, or these slots of a
            ring. Every other byte of the pool's base must survive, those of `free` rows excepted.
        outputs: by name, (shape, dtype) of the outputs.
        live: [T] bool on the CPU, tokens that are not padding.
        free: by pool, rows that a backend may write although nobody reads them (padding "scratch").
        aliases: outputs that are a mutated tensor, by name (in-place calls).
    """

    op: str
    io_dtype: torch.dtype
    args: dict[str, Any]
    pools: dict[str, Pool]
    written: Mapping[str, Mapping[int, int | tuple[int, ...]]]
    outputs: _Parts
    live: Tensor
    free: dict[str, Collection[int]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)

    @property
    def has_zero_padding(self) -> bool:
        return self.op not in ("conv_prologue", "gated_norm", "replay_fold")

    @property
    def device(self) -> torch.device:
        tensors = (x for x in self.args.values() if isinstance(x, Tensor))
        return next(tensors).device

    def arguments(self, zero_padding: bool = False, *, copy: bool = True) -> dict[str, Any]:
        """Every keyword of `BackendOp.run`: the inputs themselves, pools, and outputs that are new and full of NaN.

        Args:
            copy: bring copies of the pools, so that the case can be run again; else the pools themselves.
        """
        pools = self.pools
        if copy:
            bases = {id(pool.base): pool.base.clone() for pool in pools.values()}
            pools = {name: pool.on(bases[id(pool.base)]) for name, pool in pools.items()}
        given = self.args | {name: pool.view for name, pool in pools.items()}
        for name, (shape, dtype) in self.outputs.items():
            given[name] = pages(shape[0], {name: (shape[1:], dtype)}, device=self.device)[name].view
        given |= {name: given[source] for name, source in self.aliases.items()}
        return given | ({"zero_padding": zero_padding} if self.has_zero_padding else {})

    def precise_arguments(self, dtype: torch.dtype, device: str | torch.device = "cpu") -> dict[str, Any]:
        """The same for the truth: pools and outputs of `dtype` on `device`, so that nothing is rounded on its way."""
        given = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in self.args.items()}
        for name, pool in self.pools.items():
            own = dtype if pool.view.is_floating_point() else pool.view.dtype
            given[name] = pool.view.to(device, own, copy=True)
        given |= {n: torch.full(s, NAN, dtype=dtype, device=device) for n, (s, _) in self.outputs.items()}
        given |= {name: given[source] for name, source in self.aliases.items()}
        return given | ({"zero_padding": True} if self.has_zero_padding else {})

    def results(self, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
        """What a run must have got right: live tokens of each output and written elements of each pool."""
        live = self.live.to(arguments[next(iter(self.outputs), next(iter(self.pools), ""))].device)
        found = {name: arguments[name][live] for name in self.outputs}
        return found | {name: self.written_in(name, arguments[name]) for name in self.pools}

    def written_in(self, name: str, pool: Tensor) -> Tensor:
        """[n] the elements of a pool that the op must write. Copied row by row: a mask's indices take 32 bytes each."""
        rows = self.written[name].items()
        return torch.cat([pool.new_empty(0), *(x.reshape(-1) for row, part in rows for x in _pieces(pool[row], part))])

    def trespass(self, arguments: Mapping[str, Any]) -> str | None:
        """What a run on `arguments()` wrote that is not its to write, in pools or around outputs: one sentence."""
        for base in {id(pool.base): pool.base for pool in self.pools.values()}.values():
            names = [name for name, pool in self.pools.items() if pool.base is base]
            now = _whole(arguments[names[0]])
            changed = base != now
            for name in names:
                window = self.pools[name].view
                words = changed.view(torch.uint8).view(_BYTES[window.element_size()])
                allowed = words.as_strided(window.shape, window.stride(), window.storage_offset())
                for row, part in self.written[name].items():
                    for piece in _pieces(allowed[row], part):
                        piece.zero_()
                for row in self.free.get(name, ()):
                    allowed[row] = 0
            if bool(changed.any()):
                return f"{self.op} wrote {int(changed.sum())} bytes of {' and '.join(names)} that nothing names"
        for name in self.outputs:
            whole, out = _whole(arguments[name]).clone(), arguments[name]
            words = whole.view(_BYTES[out.element_size()])
            words.as_strided(out.shape, out.stride(), out.storage_offset()).fill_(-1)
            if bool((whole != 255).any()):
                return f"{self.op} wrote outside of its output {name}"
        return None


def _pieces(row: Tensor, part: int | tuple[int, ...]) -> list[Tensor]:
    """Views of what `Case.written` says of a row."""
    return [row[..., :part]] if isinstance(part, int) else [row[slot] for slot in part]


_BYTES = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


def _whole(view: Tensor) -> Tensor:
    """All bytes of a tensor's storage."""
    return torch.empty(0, dtype=torch.uint8, device=view.device).set_(view.untyped_storage())


class _Maker:
    """Draws and lays out; on "meta" it only lays out."""

    def __init__(self, device: str | torch.device, seed: int) -> None:
        self.device = torch.device(device)
        self.meta = self.device.type == "meta"
        self.source = torch.device("meta" if self.meta else "cpu")
        self.generator = torch.Generator(device="cpu").manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        x = torch.empty(shape, dtype=torch.float32, device=self.source)
        return x if self.meta else x.normal_(generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        x = torch.empty(shape, dtype=torch.float32, device=self.source)
        return x if self.meta else x.uniform_(generator=self.generator)

    def tensor(self, values: Sequence[Any], dtype: torch.dtype) -> Tensor:
        if self.meta:
            return torch.empty(len(values), dtype=dtype, device="meta")
        return torch.tensor(values, dtype=dtype, device="cpu").to(self.device)

    def offsets(self, lens: Sequence[int], dtype: torch.dtype) -> Tensor:
        ends = [0]
        for n in lens:
            ends.append(ends[-1] + n)
        return self.tensor(ends, dtype)

    def rows(self, count: int, pool_rows: int, null_index: int) -> list[int]:
        """`count` different pool rows, none of them a null row; in too small a pool the last ones get none."""
        first = null_index + 1
        if self.meta:
            return list(range(first, first + count))
        free = max(pool_rows - first, 0)
        order = torch.randperm(free, generator=self.generator, dtype=torch.int64, device="cpu")[:count] + first
        return order.tolist() + [null_index] * (count - free)

    def indices(self, rows: Sequence[int], stride: int) -> Tensor:
        wide = [x for row in rows for x in (row, *[-(2**31)] * (stride - 1))]
        return self.tensor(wide, torch.int32)[::stride]

    def table(self, rows: Sequence[Sequence[int]], stride: int, slots: int) -> Tensor:
        """[B, S] int32, its rows stride - 1 columns further apart than S."""
        wide = [x for own in rows for x in (*own, *[-(2**31)] * (stride - 1))]
        return self.tensor(wide, torch.int32).view(len(rows), slots + stride - 1)[:, :slots]

    def columns(self, rows: int, widths: Sequence[int], dtype: torch.dtype, gap: int) -> list[Tensor]:
        """Normal tensors [rows, w] per width: slices of one projection when gap > 0, NaN in the gaps between them."""
        drawn = {str(i): self.normal(rows, w).to(dtype) for i, w in enumerate(widths)}
        return list(self.place(drawn, gap).values())

    def place(self, values: Mapping[str, Tensor], gap: int) -> dict[str, Tensor]:
        """Tensors [rows, w] on the device, as `columns` places those that it draws."""
        if gap == 0:
            return {name: x.to(self.device) for name, x in values.items()}
        parts = list(values.values())
        widths, dtype = [x.shape[1] for x in parts], parts[0].dtype
        whole = torch.empty(len(parts[0]), sum(widths) + gap * (len(parts) + 1), dtype=dtype, device=self.device)
        whole.fill_(NAN)
        placed, at = {}, gap
        for (name, x), width in zip(values.items(), widths, strict=True):
            placed[name] = whole[:, at : at + width]
            placed[name].copy_(x)
            at += width + gap
        return placed

    def shares(self, key_heads: int, parts: Sequence[Tensor], gap: int) -> Tensor:
        """Flat parts [rows, Hk * w] as one interleaved projection [rows, Hk, sum of w], a slice of a wider one."""
        widths = [x.shape[1] // key_heads for x in parts]
        whole = parts[0].new_full((len(parts[0]), key_heads * sum(widths) + 2 * gap), NAN)
        placed = whole[:, gap : gap + key_heads * sum(widths)].unflatten(1, (key_heads, sum(widths)))
        for head in range(key_heads):
            at = 0
            for x, width in zip(parts, widths, strict=True):
                placed[:, head, at : at + width].copy_(x[:, head * width : (head + 1) * width])
                at += width
        return placed

    def interleaved_qkvz(self, heads: Heads, mixed: Tensor | None, z: Tensor | None, gap: int) -> tuple[Tensor, Tensor]:
        """mixed_qkv and z of one interleaved projection, NaN where one of them is left out."""
        hk, hv, K, V = heads
        given = mixed if mixed is not None else z
        assert given is not None
        parts = [
            given.new_full((len(given), width), NAN) if x is None else x
            for x, width in ((mixed, heads.conv_dim), (z, hv * V))
        ]
        placed = self.shares(hk, [*parts[0].split((hk * K, hk * K, hv * V), dim=1), parts[1]], gap)
        mixed, z = placed.split((heads.conv_dim // hk, hv // hk * V), dim=2)
        return mixed, z.unflatten(2, (hv // hk, V))

    def qkv(self, tokens: int, heads: Heads, io: torch.dtype, gap: int, keys: str, raw: bool) -> dict[str, Tensor]:
        """q, k [T, Hk, K] and v [T, Hv, V]; q and k have unit norm unless `raw`."""
        hk, hv, K, V = heads
        q, k, v = self.columns(tokens, (hk * K, hk * K, hv * V), io, gap)
        q, k, v = q.unflatten(1, (hk, K)), k.unflatten(1, (hk, K)), v.unflatten(1, (hv, V))
        if keys == "correlated":
            k.copy_(self.normal(1, hk, K).to(self.device) + 0.02 * k.float())
        for x in () if raw else (q, k):
            wide = x.float()
            x.copy_(wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-12))
        return {"q": q, "k": k, "v": v}

    def gates(
        self, tokens: int, heads: Heads, dtype: torch.dtype, gap: int, bias_dtype: torch.dtype | None, interleaved: bool
    ) -> dict[str, Tensor]:
        hv = heads.v_heads
        a, b = self.columns(tokens, (hv, hv), dtype, gap)
        if interleaved:
            b, a = self.shares(heads.k_heads, (b, a), gap).chunk(2, dim=2)
        A_log = torch.log(self.uniform(hv) * 8 + 0.05).to(self.device)
        return {"a": a, "b": b, "A_log": A_log, "dt_bias": self.normal(hv).to(self.device, bias_dtype or dtype)}

    def fill(self, pool: Pool, rows: Sequence[int], first: int = 0, count: int | None = None) -> None:
        """Numbers in some rows: in `count` of the last dim's elements from `first` on, or in all."""
        for row in () if self.meta else rows:
            part = pool.view[row] if count is None else pool.view[row][..., first : first + count]
            part.copy_(self.normal(*part.shape))

    def live(self, lens: Sequence[int], total: int, padding: Collection[int]) -> Tensor:
        live = torch.zeros(total, dtype=torch.bool, device=self.source)
        at = 0
        for i, n in enumerate(() if self.meta else lens):
            if i not in padding:
                live[at : at + n] = True
            at += n
        return live

    def poison(self, live: Tensor, tensors: Sequence[Tensor]) -> None:
        """NaN in the tokens that are not live."""
        dead = ~live.to(self.device)
        for x in tensors:
            x.masked_fill_(dead.view(-1, *[1] * (x.dim() - 1)), NAN)

    def initial(self, batch: int, fresh: Collection[int] | None) -> Tensor | None:
        return None if fresh is None else self.tensor([i not in fresh for i in range(batch)], torch.bool)

    def state(
        self, rows: int, heads: Heads, dtype: torch.dtype, page_tail: int, promise: str
    ) -> tuple[dict[str, Pool], dict[str, Collection[int]]]:
        """(the state pool, its free rows)."""
        pools = pages(rows, {"state": (heads.state, dtype)}, page_tail=page_tail, device=self.device)
        if promise != "scratch":
            return pools, {}
        pools["state"].view[:1].zero_()
        return pools, {"state": (0,)}


def _named(rows: Sequence[int], padding: Collection[int], null_index: int) -> list[int]:
    return [null_index if i in padding else row for i, row in enumerate(rows)]


def _promised(promise: str, null_index: int, padding: Collection[int], pad_tokens: int) -> int:
    """The null_index that goes with the op's `padding` argument."""
    if promise == "none" and (padding or pad_tokens):
        raise ValueError("promise='none' is for calls without padding sequences and padding tokens")
    return 0 if promise == "scratch" else null_index


def prefill_case(
    lens: Sequence[int] = (65, 1, 130), heads: Heads = SMALL, io_dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype = torch.float32, *, keys: str = "random", gate: str = "mild",
    fresh: Sequence[int] | None = (), zeroed_fresh: bool = False, padding: Sequence[int] = (), promise: str = "any",
    pad_tokens: int = 0, pool_rows: int | None = None, page_tail: int = 24, gap: int = 0, index_stride: int = 1,
    use_qk_l2norm: bool = False, exp_gate: bool = False, checkpoint_every: int = 0,
    checkpoint_dtype: torch.dtype | None = None, scale: float | None = None, null_index: int = -1,
    offsets_dtype: torch.dtype = torch.int32, hint_seqlen: bool = False, device: str | torch.device = "cpu",
    seed: int = 0,
) -> Case:  # fmt: skip
    """Packed sequences. The keywords that the other makers share mean the same there.

    Args:
        keys: "random" or "correlated".
        gate: "mild" (what models do), "none" (g = 0), "strong" (down to -20), "harsh" (down to -120: exp is 0 in fp32),
            "wipe" (-inf now and then).
        fresh: sequences with has_initial_state False (their pool row stays NaN); None passes has_initial_state=None.
        zeroed_fresh: fresh sequences have zeros in their row and has_initial_state is None.
        padding: sequences whose state index is null_index.
        promise: the op's argument `padding`. Padding tokens are NaN under "any", and numbers under the others;
            "scratch" sets null_index to 0 and has zeros in row 0, which the op may write.
        pad_tokens: tokens behind the last sequence.
        pool_rows: by default a few more than there are sequences.
        page_tail: elements of NaN between the rows of a pool.
        gap: q, k, v (a, b, ...) are slices of one [T, ...] projection with NaN gaps of that many columns.
        index_stride: of state_indices.
    """
    m = _Maker(device, seed)
    batch, hv = len(lens), heads.v_heads
    tokens = sum(lens) + pad_tokens
    null_index = _promised(promise, null_index, padding, pad_tokens)
    args: dict[str, Any] = m.qkv(tokens, heads, io_dtype, gap, keys, use_qk_l2norm)
    span = {"mild": 0.5, "none": 0.0, "strong": 20.0, "harsh": 120.0, "wipe": math.inf}[gate]
    g = -span * m.uniform(tokens, hv)
    if gate in ("strong", "harsh", "wipe"):  # most tokens remember; the odd one wipes the slate
        mild = g * 0.005 if gate != "wipe" else torch.full_like(g, -0.1)
        g = torch.where(m.uniform(tokens, hv) < 0.15, g, mild)
    beta = torch.sigmoid(m.normal(tokens, hv) + (3.0 if keys == "correlated" else 0.0))
    args |= m.place({"g": torch.exp(g) if exp_gate else g, "beta": beta}, gap)
    live = m.live(lens, tokens, padding)
    if promise == "any":
        m.poison(live, [args[name] for name in ("q", "k", "v", "g", "beta")])

    count = batch + 3 if pool_rows is None else pool_rows
    pools, free = m.state(count, heads, state_dtype, page_tail, promise)
    rows = m.rows(batch, count, null_index)
    active = [i for i in range(batch) if i not in padding]
    m.fill(pools["state"], [rows[i] for i in active if i not in (fresh or ())])
    if zeroed_fresh and not m.meta:
        for i in fresh or ():
            pools["state"].view[rows[i]].zero_()
    written = {"state": {rows[i]: heads.k_dim for i in active if lens[i] > 0}}
    starts = None
    if checkpoint_every:
        counts = [n // checkpoint_every for n in lens]
        ends = [sum(counts[:i]) for i in range(batch + 1)]
        starts = m.tensor(ends, torch.int32)
        dtype = checkpoint_dtype or state_dtype
        pools |= pages(ends[-1] + 2, {"checkpoints": (heads.state, dtype)}, device=m.device)
        kept = {c: i not in padding for i in range(batch) for c in range(ends[i], ends[i + 1])}
        written["checkpoints"] = {c: heads.k_dim for c, is_kept in kept.items() if is_kept}
        if promise == "scratch":
            free["checkpoints"] = [c for c, is_kept in kept.items() if not is_kept]
    args |= {
        "state_indices": m.indices(_named(rows, padding, null_index), index_stride),
        "cu_seqlens": m.offsets(lens, offsets_dtype),
        "has_initial_state": m.initial(batch, None if zeroed_fresh else fresh),
        "scale": heads.k_dim**-0.5 if scale is None else scale, "use_qk_l2norm": use_qk_l2norm, "exp_gate": exp_gate,
        "max_seqlen": max(lens, default=0) if hint_seqlen else 0, "null_index": null_index, "padding": promise,
        "checkpoint_cu_starts": starts, "checkpoint_every": checkpoint_every,
    }  # fmt: skip
    if not checkpoint_every:
        args["checkpoints"] = None
    outputs = {"out": ((tokens, hv, heads.v_dim), io_dtype)}
    return Case("prefill", io_dtype, args, pools, written, outputs, live, free)


def decode_case(
    batch: int = 5, heads: Heads = SMALL, io_dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype = torch.float32, *, padding: Sequence[int] = (), promise: str = "any",
    pool_rows: int | None = None, page_tail: int = 24, gap: int = 0, index_stride: int = 1,
    use_qk_l2norm: bool = True, gate_dtype: torch.dtype | None = None,
    bias_dtype: torch.dtype | None = None, null_index: int = -1,
    interleaved: bool = False, device: str | torch.device = "cpu", seed: int = 0,
) -> Case:  # fmt: skip
    """One token a sequence.

    Args:
        gate_dtype: of a and b (default: io_dtype).
        bias_dtype: of dt_bias (default: theirs).
        interleaved: a and b, and where an op has them mixed_qkv and z, come with interleaved heads; their values are
            those of the flat case.
    """
    m = _Maker(device, seed)
    hv = heads.v_heads
    null_index = _promised(promise, null_index, padding, 0)
    args: dict[str, Any] = m.qkv(batch, heads, io_dtype, gap, "random", use_qk_l2norm)
    args |= m.gates(batch, heads, gate_dtype or io_dtype, gap, bias_dtype, interleaved)
    live = m.live([1] * batch, batch, padding)
    if promise == "any":
        m.poison(live, [args[name] for name in ("q", "k", "v", "a", "b")])
    count = batch + 3 if pool_rows is None else pool_rows
    pools, free = m.state(count, heads, state_dtype, page_tail, promise)
    rows = m.rows(batch, count, null_index)
    live_rows = [row for i, row in enumerate(rows) if i not in padding]
    m.fill(pools["state"], live_rows)
    args |= {
        "state_indices": m.indices(_named(rows, padding, null_index), index_stride), "scale": heads.k_dim**-0.5,
        "use_qk_l2norm": use_qk_l2norm, "null_index": null_index, "padding": promise,
    }  # fmt: skip
    written = {"state": dict.fromkeys(live_rows, heads.k_dim)}
    outputs = {"out": ((batch, hv, heads.v_dim), io_dtype)}
    return Case("decode", io_dtype, args, pools, written, outputs, live, free)


def _conv_pools(
    m: _Maker, rows: int, heads: Heads, columns: int, conv_dtype: torch.dtype, state_dtype: torch.dtype | None,
    layout: str, page_tail: int, shared: bool, ring: _Parts | None = None,
) -> dict[str, Pool]:  # fmt: skip
    conv: _Parts = {"conv_state": ((heads.conv_dim, columns), conv_dtype)}
    if state_dtype is None:
        return pages(rows, conv, page_tail=page_tail, layout=layout, device=m.device)
    state: _Parts = {"state": (heads.state, state_dtype), **(ring or {})}
    if shared:
        return pages(rows, {**conv, **state}, page_tail=page_tail, layout=layout, device=m.device)
    return {
        **pages(rows, conv, page_tail=page_tail, layout=layout, device=m.device),
        **pages(rows, state, page_tail=page_tail, device=m.device),
    }


def _conv_weights(m: _Maker, dim: int, width: int, bias: bool, dtype: torch.dtype) -> dict[str, Any]:
    weight = (m.normal(dim, width) * 0.5).to(m.device, dtype)
    return {"conv_weight": weight, "conv_bias": (m.normal(dim) * 0.1).to(m.device, dtype) if bias else None}


def _projected(
    m: _Maker, live: Tensor, heads: Heads, io: torch.dtype, gate_dtype: torch.dtype, bias_dtype: torch.dtype | None,
    width: int, bias: bool, gap: int, interleaved: bool,
) -> tuple[dict[str, Any], Tensor]:  # fmt: skip
    """What a fused op takes of the projections and parameters, NaN in tokens that are not live; and z."""
    tokens = len(live)
    mixed, z = m.columns(tokens, (heads.conv_dim, heads.v_heads * heads.v_dim), io, gap)
    if interleaved:
        mixed, z = m.interleaved_qkvz(heads, mixed, z, gap)
    else:
        z = z.unflatten(1, (heads.v_heads, heads.v_dim))
    args: dict[str, Any] = {"mixed_qkv": mixed, **_conv_weights(m, heads.conv_dim, width, bias, gate_dtype)}
    args |= m.gates(tokens, heads, gate_dtype, gap, bias_dtype, interleaved)
    m.poison(live, (mixed, z, args["a"], args["b"]))
    return args, z


def _fused(m: _Maker, heads: Heads, io: torch.dtype, z: Tensor | None, gate: str) -> dict[str, Any]:
    """A fused op's sizes, and its norm where z is given."""
    weight = None if z is None else (1 + 0.1 * m.normal(heads.v_dim)).to(m.device, io)
    return {
        "num_k_heads": heads.k_heads, "head_k_dim": heads.k_dim, "head_v_dim": heads.v_dim,
        "scale": heads.k_dim**-0.5, "z": z, "norm_weight": weight, "norm_eps": 1e-6, "gate": gate,
    }  # fmt: skip


def _ring_parts(heads: Heads, ring: int, io: torch.dtype, u: torch.dtype) -> _Parts:
    hk, hv, K, V = heads
    return {
        "ring_k": ((ring, hk, K), io), "ring_u": ((ring, hv, V), u), "ring_g": ((ring, hv), torch.float32),
        "ring_span": ((hk, 2), torch.int32),
    }  # fmt: skip


def _hold(m: _Maker, pools: Mapping[str, Pool], row: int, first: int, held: int, counted: int) -> None:
    """`held` updates in a row's ring from slot `first` on, `counted` of which its spans tell of; NaN in other slots."""
    if m.meta:
        return
    slots = [(first + j) % pools["ring_k"].view.shape[1] for j in range(held)]
    for slot in slots:
        k = m.normal(*pools["ring_k"].view.shape[2:])
        pools["ring_k"].view[row, slot] = (k * torch.rsqrt(k.square().sum(-1, keepdim=True))).to(m.device)
        pools["ring_u"].view[row, slot] = 0.3 * m.normal(*pools["ring_u"].view.shape[2:]).to(m.device)
        pools["ring_g"].view[row, slot] = -0.5 * m.uniform(pools["ring_g"].view.shape[2]).to(m.device)
    pools["ring_span"].view[row] = m.tensor([first, counted], torch.int32)


def _behind(first: int, held: int, tokens: int, ring: int) -> tuple[int, ...]:
    """The slots that a step's tokens go to."""
    return tuple((first + held + t) % ring for t in range(tokens))


def conv_prologue_case(
    lens: Sequence[int] = (5, 1, 9), heads: Heads = SMALL, io_dtype: torch.dtype = torch.float32, *,
    conv_dtype: torch.dtype | None = None, state_dtype: torch.dtype | None = torch.float32, width: int = WIDTH,
    layout: str = "DS", shared: bool = False, bias: bool = True, fresh: Sequence[int] | None = (),
    padding: Sequence[int] = (), accepted: Sequence[int] | None = None, extra_columns: int = 0, pad_tokens: int = 0,
    pool_rows: int | None = None, page_tail: int = 24, gap: int = 0, index_stride: int = 1, exp_gate: bool = False,
    gate_dtype: torch.dtype | None = None,
    bias_dtype: torch.dtype | None = None, null_index: int = -1, offsets_dtype: torch.dtype = torch.int32,
    interleaved: bool = False, device: str | torch.device = "cpu", seed: int = 0,
) -> Case:  # fmt: skip
    """The prologue of a prefill, or, with `accepted` (num_accepted_tokens), of speculative rows.

    Args:
        layout: "DS" or "SD", the physical order of conv_state.
        shared: conv_state and state lie in one page.
        state_dtype: None passes state=None.
        extra_columns: widens conv_state past W-1; under `accepted` it is at least what the longest sequence needs.
    """
    m = _Maker(device, seed)
    gate_dtype, hv = gate_dtype or io_dtype, heads.v_heads
    batch, tokens = len(lens), sum(lens) + pad_tokens
    (mixed,) = m.columns(tokens, (heads.conv_dim,), io_dtype, gap)
    if interleaved:
        mixed, _ = m.interleaved_qkvz(heads, mixed, None, gap)
    args: dict[str, Any] = {"mixed_qkv": mixed, **_conv_weights(m, heads.conv_dim, width, bias, gate_dtype)}
    args |= m.gates(tokens, heads, gate_dtype, gap, bias_dtype, interleaved)
    live = m.live(lens, tokens, padding)
    m.poison(live, (mixed, args["a"], args["b"]))

    first = [0] * batch if accepted is None else [n - 1 for n in accepted]
    if accepted is not None:
        extra_columns = max(extra_columns, max(first, default=0), max(lens, default=1) - 1)
    count = batch + 3 if pool_rows is None else pool_rows
    pools = _conv_pools(
        m, count, heads, width - 1 + extra_columns, conv_dtype or io_dtype, state_dtype, layout, page_tail, shared
    )
    rows = m.rows(batch, count, null_index)
    active = [i for i in range(batch) if i not in padding and lens[i] > 0]
    started = [i for i in active if i not in (fresh or ())]
    for i in started:
        m.fill(pools["conv_state"], [rows[i]], first[i], width - 1)
    written = {
        "conv_state": {rows[i]: width - 1 if accepted is None else width - 2 + lens[i] for i in active},
    }
    if state_dtype is None:
        args["state"] = None
    else:
        m.fill(pools["state"], [rows[i] for i in started])
        written["state"] = {rows[i]: heads.k_dim for i in active if i not in started}
    args |= {
        "state_indices": m.indices(_named(rows, padding, null_index), index_stride),
        "cu_seqlens": m.offsets(lens, offsets_dtype), "has_initial_state": m.initial(batch, fresh),
        "num_accepted_tokens": None if accepted is None else m.tensor(list(accepted), torch.int32),
        "num_k_heads": heads.k_heads, "head_k_dim": heads.k_dim, "head_v_dim": heads.v_dim,
        "exp_gate": exp_gate, "null_index": null_index,
    }  # fmt: skip
    outputs = {
        "q": ((tokens, heads.k_heads, heads.k_dim), io_dtype),
        "k": ((tokens, heads.k_heads, heads.k_dim), io_dtype),
        "v": ((tokens, hv, heads.v_dim), io_dtype),
        "g": ((tokens, hv), torch.float32),
        "beta": ((tokens, hv), torch.float32),
    }
    return Case("conv_prologue", io_dtype, args, pools, written, outputs, live)


def fused_decode_case(
    batch: int = 5, heads: Heads = SMALL, io_dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype = torch.float32, *, conv_dtype: torch.dtype | None = None, width: int = WIDTH,
    layout: str = "DS", shared: bool = False, bias: bool = True, norm: bool = True, gate: str = "silu",
    padding: Sequence[int] = (), extra_columns: int = 0, pool_rows: int | None = None, page_tail: int = 24,
    gap: int = 0, index_stride: int = 1, gate_dtype: torch.dtype | None = None,
    bias_dtype: torch.dtype | None = None, null_index: int = -1,
    interleaved: bool = False, device: str | torch.device = "cpu", seed: int = 0,
) -> Case:  # fmt: skip
    """The whole decode step; norm=False passes z and norm_weight as None. mixed_qkv and z share one projection."""
    m = _Maker(device, seed)
    gate_dtype, hv = gate_dtype or io_dtype, heads.v_heads
    live = m.live([1] * batch, batch, padding)
    args, z = _projected(m, live, heads, io_dtype, gate_dtype, bias_dtype, width, bias, gap, interleaved)
    count = batch + 3 if pool_rows is None else pool_rows
    pools = _conv_pools(
        m, count, heads, width - 1 + extra_columns, conv_dtype or io_dtype, state_dtype, layout, page_tail, shared
    )
    rows = m.rows(batch, count, null_index)
    live_rows = [row for i, row in enumerate(rows) if i not in padding]
    m.fill(pools["conv_state"], live_rows, 0, width - 1)
    m.fill(pools["state"], live_rows)
    args |= {
        "state_indices": m.indices(_named(rows, padding, null_index), index_stride),
        "null_index": null_index, **_fused(m, heads, io_dtype, z if norm else None, gate),
    }  # fmt: skip
    written = {
        "conv_state": dict.fromkeys(live_rows, width - 1),
        "state": dict.fromkeys(live_rows, heads.k_dim),
    }
    outputs = {"out": ((batch, hv, heads.v_dim), io_dtype)}
    return Case("fused_decode", io_dtype, args, pools, written, outputs, live)


def verify_case(
    lens: Sequence[int] = (3, 1, 4, 0), heads: Heads = SMALL, io_dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype = torch.float32, *, slots: int = 4, accepted: Sequence[int] | None = None,
    null_slots: Sequence[tuple[int, int]] = (),
    start_rows: bool = False, padding: Sequence[int] = (), promise: str = "any", pad_tokens: int = 0,
    pool_rows: int | None = None, page_tail: int = 24, gap: int = 0, index_stride: int = 1,
    use_qk_l2norm: bool = True, gate_dtype: torch.dtype | None = None,
    bias_dtype: torch.dtype | None = None, null_index: int = -1,
    offsets_dtype: torch.dtype = torch.int32, interleaved: bool = False, device: str | torch.device = "cpu",
    seed: int = 0,
) -> Case:  # fmt: skip
    """Speculative tokens, S = slots rows a sequence.

    Args:
        accepted: by default 1, 2, ... in turn.
        null_slots: (sequence, token) whose state is not wanted: its row is null_index.
        start_rows: hand over the rows to start from, beside a num_accepted_tokens that must not be read.
        index_stride: columns that state_indices' rows are further apart than S, plus one.
    """
    m = _Maker(device, seed)
    batch, hv = len(lens), heads.v_heads
    tokens = sum(lens) + pad_tokens
    null_index = _promised(promise, null_index, padding, pad_tokens)
    accepted = [1 + i % slots for i in range(batch)] if accepted is None else list(accepted)
    args: dict[str, Any] = m.qkv(tokens, heads, io_dtype, gap, "random", use_qk_l2norm)
    args |= m.gates(tokens, heads, gate_dtype or io_dtype, gap, bias_dtype, interleaved)
    live_tokens = m.live(lens, tokens, padding)
    if promise == "any":
        m.poison(live_tokens, [args[name] for name in ("q", "k", "v", "a", "b")])
    count = batch * slots + 3 if pool_rows is None else pool_rows
    pools, free = m.state(count, heads, state_dtype, page_tail, promise)
    flat = m.rows(batch * slots, count, null_index)
    rows = [flat[i * slots : (i + 1) * slots] for i in range(batch)]
    active = [i for i in range(batch) if i not in padding and lens[i] > 0]
    m.fill(pools["state"], [rows[i][accepted[i] - 1] for i in active])
    written = {"state": {rows[i][t]: heads.k_dim for i in active for t in range(lens[i]) if (i, t) not in null_slots}}
    named = [
        [null_index if i in padding or (i, t) in null_slots else row for t, row in enumerate(own)]
        for i, own in enumerate(rows)
    ]
    origins = [own[n - 1] for own, n in zip(named, accepted, strict=True)]
    args |= {
        "state_indices": m.table(named, index_stride, slots),
        "num_accepted_tokens": m.tensor([99] * batch if start_rows else accepted, torch.int32),
        "cu_seqlens": m.offsets(lens, offsets_dtype),
        "start_rows": m.tensor(origins, torch.int32) if start_rows else None,
        "scale": heads.k_dim**-0.5, "use_qk_l2norm": use_qk_l2norm, "null_index": null_index, "padding": promise,
    }  # fmt: skip
    outputs = {"out": ((tokens, hv, heads.v_dim), io_dtype)}
    return Case("verify", io_dtype, args, pools, written, outputs, live_tokens, free)


def fused_verify_case(
    lens: Sequence[int] = (3, 1, 4, 0), heads: Heads = SMALL, io_dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype = torch.float32, *, slots: int = 4, accepted: Sequence[int] | None = None,
    null_slots: Sequence[tuple[int, int]] = (), start_rows: bool = False, fresh: Sequence[int] | None = (),
    padding: Sequence[int] = (), pad_tokens: int = 0, conv_dtype: torch.dtype | None = None, width: int = WIDTH,
    layout: str = "DS", shared: bool = False, bias: bool = True, norm: bool = True, gate: str = "silu",
    extra_columns: int = 0, pool_rows: int | None = None, page_tail: int = 24, gap: int = 0, index_stride: int = 1,
    gate_dtype: torch.dtype | None = None, bias_dtype: torch.dtype | None = None, null_index: int = -1,
    offsets_dtype: torch.dtype = torch.int32, interleaved: bool = False, device: str | torch.device = "cpu",
    seed: int = 0,
) -> Case:  # fmt: skip
    """The whole step of speculative tokens: keywords as of conv_prologue_case, verify_case and fused_decode_case.

    Args:
        accepted: by default 1, 2, ... in turn; far beyond S where it must not be read: fresh, empty, padding sequences.
        null_slots: (sequence, token); not its first row, nor the one that it starts from.
        start_rows: hand over the rows to start from; those of fresh sequences lead nowhere.
        extra_columns: of conv_state, past the W-2+S that the op needs.
    """
    m = _Maker(device, seed)
    batch, hv = len(lens), heads.v_heads
    tokens = sum(lens) + pad_tokens
    gate_dtype = gate_dtype or io_dtype
    accepted = [1 + i % slots for i in range(batch)] if accepted is None else list(accepted)
    live = m.live(lens, tokens, padding)
    args, z = _projected(m, live, heads, io_dtype, gate_dtype, bias_dtype, width, bias, gap, interleaved)
    count = batch * slots + 3 if pool_rows is None else pool_rows
    columns = width - 2 + slots + extra_columns
    pools = _conv_pools(m, count, heads, columns, conv_dtype or io_dtype, state_dtype, layout, page_tail, shared)
    flat = m.rows(batch * slots, count, null_index)
    rows = [flat[i * slots : (i + 1) * slots] for i in range(batch)]
    active = [i for i in range(batch) if i not in padding and lens[i] > 0]
    started = [i for i in active if i not in (fresh or ())]
    for i in started:
        m.fill(pools["conv_state"], [rows[i][0]], accepted[i] - 1, width - 1)
    m.fill(pools["state"], [rows[i][accepted[i] - 1] for i in started])
    wanted = {(i, t) for i in active for t in range(lens[i])} - set(null_slots)
    named = [
        [null_index if i in padding or (i, t) in null_slots else row for t, row in enumerate(own)]
        for i, own in enumerate(rows)
    ]
    told = [n if i in started else 2**30 for i, n in enumerate(accepted)]
    origins = [2**31 - 1 if i in (fresh or ()) else named[i][n - 1] for i, n in enumerate(accepted)]
    args |= {
        "state_indices": m.table(named, index_stride, slots),
        "num_accepted_tokens": m.tensor(told, torch.int32),
        "cu_seqlens": m.offsets(lens, offsets_dtype), "has_initial_state": m.initial(batch, fresh),
        "start_rows": m.tensor(origins, torch.int32) if start_rows else None,
        "null_index": null_index, **_fused(m, heads, io_dtype, z if norm else None, gate),
    }  # fmt: skip
    written = {
        "conv_state": {rows[i][0]: width - 2 + lens[i] for i in active},
        "state": {rows[i][t]: heads.k_dim for i, t in sorted(wanted)},
    }
    outputs = {"out": ((tokens, hv, heads.v_dim), io_dtype)}
    return Case("fused_verify", io_dtype, args, pools, written, outputs, live)


def replay_verify_case(
    lens: Sequence[int] = (3, 1, 4, 0), heads: Heads = SMALL, io_dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype = torch.float32, *, ring: int = 11, held: Sequence[int] | None = None, slots: int = 4,
    accepted: Sequence[int] | None = None, fresh: Sequence[int] | None = (), padding: Sequence[int] = (),
    pad_tokens: int = 0, conv_dtype: torch.dtype | None = None, u_dtype: torch.dtype | None = None, width: int = WIDTH,
    layout: str = "DS", shared: bool = False, bias: bool = True, norm: bool = True, gate: str = "silu",
    pool_rows: int | None = None, page_tail: int = 24, gap: int = 0, index_stride: int = 1,
    gate_dtype: torch.dtype | None = None, bias_dtype: torch.dtype | None = None, null_index: int = -1,
    offsets_dtype: torch.dtype = torch.int32, interleaved: bool = False, device: str | torch.device = "cpu",
    seed: int = 0,
) -> Case:  # fmt: skip
    """Speculative tokens of rows with a ring: keywords as of fused_verify_case.

    Args:
        ring: its slots R. held: updates that a sequence starts with, accepted ones of the step before among them; by
            default as few as can be, about half, and as many as can be, in turn. Those fold.
        slots: the most tokens of a step, S; conv_state has columns for them.
        u_dtype: of ring_u (default: state_dtype).
    """
    m = _Maker(device, seed)
    batch, tokens = len(lens), sum(lens) + pad_tokens
    gate_dtype = gate_dtype or io_dtype
    accepted = [1 + i % slots for i in range(batch)] if accepted is None else list(accepted)
    live = m.live(lens, tokens, padding)
    args, z = _projected(m, live, heads, io_dtype, gate_dtype, bias_dtype, width, bias, gap, interleaved)
    count = batch + 3 if pool_rows is None else pool_rows
    parts = _ring_parts(heads, ring, io_dtype, u_dtype or state_dtype)
    pools = _conv_pools(
        m, count, heads, width - 2 + slots, conv_dtype or io_dtype, state_dtype, layout, page_tail, shared, parts
    )
    rows = m.rows(batch, count, null_index)
    active = [i for i in range(batch) if i not in padding and lens[i] > 0]
    started = [i for i in active if i not in (fresh or ())]
    most = ring - slots
    starts = dict.fromkeys(active, (0, 0))  # (first slot, updates) before the step
    for i in started:
        n = (accepted[i] - 1, max(accepted[i] - 1, most // 2), most)[i % 3] if held is None else held[i]
        starts[i] = ((3 * i + 1) % ring, n)
        m.fill(pools["conv_state"], [rows[i]], accepted[i] - 1, width - 1)
        _hold(m, pools, rows[i], *starts[i], n - accepted[i] + 1)
    m.fill(pools["state"], [rows[i] for i in started])
    args |= {
        "state_indices": m.indices(_named(rows, padding, null_index), index_stride),
        "num_accepted_tokens": m.tensor([n if i in started else 2**30 for i, n in enumerate(accepted)], torch.int32),
        "cu_seqlens": m.offsets(lens, offsets_dtype), "has_initial_state": m.initial(batch, fresh),
        "null_index": null_index, **_fused(m, heads, io_dtype, z if norm else None, gate),
    }  # fmt: skip
    put = {rows[i]: _behind(*starts[i], lens[i], ring) for i in active}
    folding = [i for i in active if i not in started or starts[i][1] + 2 * slots > ring]
    written: dict[str, Mapping[int, int | tuple[int, ...]]] = {
        "conv_state": {rows[i]: width - 2 + lens[i] for i in active},
        "state": {rows[i]: heads.k_dim for i in folding},
        "ring_k": put, "ring_u": put, "ring_g": put, "ring_span": {rows[i]: 2 for i in active},
    }  # fmt: skip
    outputs = {"out": ((tokens, heads.v_heads, heads.v_dim), io_dtype)}
    return Case("replay_verify", io_dtype, args, pools, written, outputs, live)


def replay_decode_case(
    batch: int = 5, heads: Heads = SMALL, io_dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype = torch.float32, *, ring: int = 8, held: Sequence[int] | None = None,
    padding: Sequence[int] = (), extra_columns: int = 0, **features: Any,
) -> Case:  # fmt: skip
    """One token a sequence of rows with a ring: keywords as of fused_decode_case and replay_verify_case."""
    case = replay_verify_case(
        [1] * batch, heads, io_dtype, state_dtype, ring=ring, held=held, slots=1 + extra_columns,
        accepted=[1] * batch, fresh=None, padding=padding, **features,
    )  # fmt: skip
    for name in ("num_accepted_tokens", "cu_seqlens", "has_initial_state"):
        del case.args[name]
    case.op = "replay_decode"
    return case


def replay_fold_case(
    batch: int = 5, heads: Heads = SMALL, io_dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype = torch.float32, *, ring: int = 8, held: Sequence[int] | None = None,
    accepted: Sequence[int] | None = None, fresh: Sequence[int] | None = (), padding: Sequence[int] = (),
    u_dtype: torch.dtype | None = None, pool_rows: int | None = None, page_tail: int = 24, index_stride: int = 1,
    null_index: int = -1, device: str | torch.device = "cpu", seed: int = 0,
) -> Case:  # fmt: skip
    """Rows with a ring that become plain states. held: as in replay_verify_case, from nothing to a full ring."""
    m = _Maker(device, seed)
    count = batch + 3 if pool_rows is None else pool_rows
    state: _Parts = {"state": (heads.state, state_dtype)}
    parts = {**state, **_ring_parts(heads, ring, io_dtype, u_dtype or state_dtype)}
    pools = pages(count, parts, page_tail=page_tail, device=m.device)
    rows = m.rows(batch, count, null_index)
    active = [i for i in range(batch) if i not in padding]
    started = [i for i in active if i not in (fresh or ())]
    m.fill(pools["state"], [rows[i] for i in started])
    counts = [1] * batch if accepted is None else list(accepted)
    updates = {}
    for i in started:
        updates[i] = max(counts[i] - 1, (0, ring // 2, ring)[i % 3]) if held is None else held[i]
        _hold(m, pools, rows[i], (3 * i + 1) % ring, updates[i], updates[i] - counts[i] + 1)
    args = {
        "state_indices": m.indices(_named(rows, padding, null_index), index_stride),
        "has_initial_state": m.initial(batch, fresh), "null_index": null_index,
        "num_accepted_tokens": None if accepted is None else m.tensor(
            [n if i in started else 2**30 for i, n in enumerate(counts)], torch.int32),
    }  # fmt: skip
    written: dict[str, Mapping[int, int | tuple[int, ...]]] = {
        "state": {rows[i]: heads.k_dim for i in started if updates[i] > 0},
        "ring_span": {rows[i]: 2 for i in active},
        "ring_k": {}, "ring_u": {}, "ring_g": {},
    }  # fmt: skip
    return Case("replay_fold", io_dtype, args, pools, written, {}, torch.zeros(0, dtype=torch.bool, device=m.source))


def gated_norm_case(
    tokens: int = 5, heads: Heads = SMALL, io_dtype: torch.dtype = torch.float32, *, gate: str = "silu",
    eps: float = 1e-6, weight_dtype: torch.dtype | None = None, in_place: bool = False, gap: int = 0,
    interleaved: bool = False, device: str | torch.device = "cpu", seed: int = 0,
) -> Case:  # fmt: skip
    """RMSNorm of x times gate(z). gap: between the tokens of x and of z; in_place: out is x."""
    m = _Maker(device, seed)
    hv, V = heads.v_heads, heads.v_dim
    x = pages(tokens, {"x": ((hv, V), io_dtype)}, page_tail=gap, device=m.device)
    m.fill(x["x"], range(tokens))
    (z,) = m.columns(tokens, (hv * V,), io_dtype, gap)
    if interleaved:
        _, z = m.interleaved_qkvz(heads, None, z, gap)
    else:
        z = z.unflatten(1, (hv, V))
    weight = (1 + 0.1 * m.normal(V)).to(m.device, weight_dtype or io_dtype)
    args: dict[str, Any] = {"z": z, "weight": weight, "eps": eps, "gate": gate}
    live = torch.ones(tokens, dtype=torch.bool, device=m.source)
    if in_place:
        written = {"x": dict.fromkeys(range(tokens), V)}
        return Case("gated_norm", io_dtype, args, x, written, {}, live, aliases={"out": "x"})
    outputs = {"out": ((tokens, hv, V), io_dtype)}
    return Case("gated_norm", io_dtype, {"x": x["x"].view, **args}, {}, {}, outputs, live)


def case(
    problem: Problem,
    lens: Sequence[int],
    *,
    wants: Wants = Wants(),  # noqa: B008 - frozen
    device: str | torch.device = "cpu",
    seed: int = 0,
    **features: Any,
) -> Case:
    """A call of a problem, in the layout of a host and the form that a backend wants.

    mixed_qkv, z, a and b are slices of wider projections, conv_state and state share padded pages; the rest follows
    from the problem: dtypes, heads, padded_pool, checkpoints (one every 64 tokens), max_spec_tokens (rows a sequence;
    conv_prologue then gets num_accepted_tokens), padding, strided, unaligned, gate_dtype,
    bias_dtype, qk_l2norm.

    Args:
        lens: tokens of each sequence; decode, fused_decode and gated_norm take their sum as the number of tokens.
        features: keywords of the op's own maker. `padding` and `pad_tokens` are left out where the problem has no
            padding, `fresh` where the op knows none.
    """
    p = problem
    heads = Heads(p.num_k_heads, p.num_v_heads, p.head_k_dim, p.head_v_dim)
    io, state = getattr(torch, p.dtype), getattr(torch, p.state_dtype)
    promise = "scratch" if wants.scratch_row and p.padding == "any" else p.padding
    if promise == "none":
        features = {name: value for name, value in features.items() if name not in ("padding", "pad_tokens")}
    makers: dict[str, tuple[Callable[..., Case], tuple[Any, ...]]] = {
        "conv_prologue": (conv_prologue_case, (lens, heads, io)),
        "prefill": (prefill_case, (lens, heads, io, state)),
        "decode": (decode_case, (sum(lens), heads, io, state)),
        "fused_decode": (fused_decode_case, (sum(lens), heads, io, state)),
        "verify": (verify_case, (lens, heads, io, state)),
        "fused_verify": (fused_verify_case, (lens, heads, io, state)),
        "gated_norm": (gated_norm_case, (sum(lens), heads, io)),
        "replay_decode": (replay_decode_case, (sum(lens), heads, io, state)),
        "replay_verify": (replay_verify_case, (lens, heads, io, state)),
        "replay_fold": (replay_fold_case, (len(lens), heads, io, state)),
    }
    maker, first = makers[p.op]
    gap = 1 if p.unaligned else 64
    page_tail = (3 if p.unaligned else 256) * p.padded_pool  # 256 elements keep rows aligned, as those of a host's are
    facts: dict[str, Any] = {
        "device": device,
        "seed": seed,
        "gap": gap if p.op in _OF_PROJECTIONS or (p.strided and not wants.contiguous) else 0,
        "page_tail": page_tail,
        "promise": promise,
        "null_index": 0 if promise == "scratch" else -1,
        "gate_dtype": getattr(torch, p.gate_dtype) if p.gate_dtype else None,
        "bias_dtype": getattr(torch, p.bias_dtype) if p.bias_dtype else None,
        **({} if p.qk_l2norm is None else {"use_qk_l2norm": p.qk_l2norm}),
        **({"state_dtype": state} if p.op == "conv_prologue" else {}),
        "layout": "SD",
        "shared": p.padded_pool,
        "bias": False,
        "extra_columns": max(p.max_spec_tokens - 1, 0) if p.op != "fused_verify" else 0,  # its slots say it
        "accepted": [1 + i % p.max_spec_tokens for i in range(len(lens))] if p.max_spec_tokens else None,
        "slots": max(p.max_spec_tokens, *lens, 1),
        **({"ring": p.ring} if p.ring else {}),
        "exp_gate": p.op == "prefill" and wants.exp_gate,
        "zeroed_fresh": wants.zeroed_fresh_rows,
        "checkpoint_every": CHECKPOINT_EVERY * p.checkpoints,
        "checkpoint_dtype": getattr(torch, p.checkpoint_dtype) if p.checkpoint_dtype else None,
    }
    # Every maker takes what it knows of these; an unknown feature is an error all the same.
    known = set(inspect.signature(maker).parameters)
    if p.op == "replay_decode":
        known |= inspect.signature(replay_verify_case).parameters.keys() - {"slots", "accepted", "fresh", "pad_tokens"}
    given = {name: value for name, value in facts.items() if name in known}
    features = {n: value for n, value in features.items() if n in known or n not in ("fresh", "padding", "pad_tokens")}
    return maker(*first, **given | features)
