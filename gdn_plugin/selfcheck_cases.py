"""The self-check's small problems: arguments of each op as backends take them, and the right answers.

Every tensor is made with an explicit dtype, device and generator, since a host builds its layers under defaults of
its own; the global random state is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gdn_plugin.ops import reference
from gdn_plugin.registry import Problem

CONV_WIDTH = 4
CHUNK = 64
# As in vLLM: row 0 belongs to no sequence, and padding points to it. Backends may use it as scratch.
NULL_ROW = 0


@dataclass
class Case:
    """One call.

    Args:
        op: which.
        arguments: by name, in the order that backends take them.
        outputs: names of the arguments that the op fills or updates, and that are compared.
        pools: pool name -> (whole storage, rows that may be written). The others, page tails included, must not
            change; only the null row is free.
    """

    op: str
    arguments: dict[str, Any]
    outputs: tuple[str, ...]
    pools: dict[str, tuple[Tensor, list[int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._start = {name: self.arguments[name].clone() for name in self.outputs}
        self._pages = {name: page.clone() for name, (page, _) in self.pools.items()}

    def run(self, function: Callable[..., Any]) -> dict[str, Tensor]:
        """Call a backend. Its results are the arguments themselves, waited for."""
        with torch.no_grad():
            function(*self.arguments.values())
            if self.arguments[self.outputs[0]].is_cuda:
                torch.cuda.synchronize()
        results = {name: self._used(name, self.arguments[name]) for name in self.outputs}
        return {name: result.float() for name, result in results.items()}

    def truth(self) -> dict[str, Tensor]:
        """The same from the recurrence in fp32, kept in fp32."""
        arguments = dict(self.arguments)
        for name, start in self._start.items():
            arguments[name] = start.float()
        with torch.no_grad():
            getattr(reference, self.op)(*arguments.values())
        return {name: self._used(name, arguments[name]) for name in self.outputs}

    def trespass(self) -> str | None:
        """Whether the backend wrote where it must not: other rows of a pool, or behind a row's end."""
        for name, (page, rows) in self.pools.items():
            before, after = self._pages[name].clone(), page.clone()
            size = self.arguments[name][0].numel()
            for pages in (before, after):
                pages[[NULL_ROW, *rows], :size] = 0
            if not torch.equal(_bits(before), _bits(after)):
                return f"{self.op} wrote to rows of {name} that nothing names"
        return None

    def _used(self, name: str, tensor: Tensor) -> Tensor:
        return tensor[self.pools[name][1]] if name in self.pools else tensor


def compare(got: Tensor, want: Tensor) -> tuple[float, float, float]:
    """(error relative to the size of `want`, largest absolute error, root mean square of `want`); NaN stays NaN."""
    difference = (got.double() - want.double()).flatten()
    size = want.double().square().mean().sqrt().clamp_min(1e-30)
    error = difference.square().mean().sqrt() / size
    # max() of a tensor with NaN is NaN, which no limit allows
    return float(error), float(difference.abs().max()), float(size)


def build(problem: Problem, device: str, prepared: bool = False) -> Case:
    """The small problem of an op, with the heads, dims, dtypes and pool layout of `problem`.

    Args:
        prepared: in the form that a host prepares for FlashInfer's kernels: prefill gets exp(g), verify as many
            tokens of every sequence. Otherwise prefill gets g, and verify a ragged batch.
    """
    maker = _Maker(problem, device)
    if problem.op == "prefill":
        return maker.prefill(exp_gate=prepared)
    if problem.op == "verify":
        return maker.verify(ragged=not prepared)
    return {"conv_prologue": maker.conv_prologue, "decode": maker.decode, "fused_decode": maker.fused_decode}[
        problem.op
    ]()


class _Maker:
    def __init__(self, problem: Problem, device: str) -> None:
        self.p = problem
        self.device = torch.device(device)
        self.dtype: torch.dtype = getattr(torch, problem.dtype)
        self.state_dtype: torch.dtype = getattr(torch, problem.state_dtype)
        self.generator = torch.Generator(device="cpu").manual_seed(20241209)
        self.hk, self.hv = problem.num_k_heads, problem.num_v_heads
        self.dk, self.dv = problem.head_k_dim, problem.head_v_dim
        self.dim = 2 * self.hk * self.dk + self.hv * self.dv
        self.scale = self.dk**-0.5

    def normal(self, *shape: int, dtype: torch.dtype | None = None, factor: float = 1.0) -> Tensor:
        # Drawn on the CPU, so that every device checks the same numbers.
        value = torch.randn(shape, generator=self.generator, dtype=torch.float32, device="cpu") * factor
        return value.to(self.device, self.dtype if dtype is None else dtype)

    def ints(self, values: list[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def bools(self, values: list[bool]) -> Tensor:
        return torch.tensor(values, dtype=torch.bool, device=self.device)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        # Poisoned: what a kernel forgets to write shows.
        value = torch.float32 if dtype is None else dtype
        return torch.full(shape, float("nan"), dtype=value, device=self.device)

    def pool(
        self, count: int, shape: tuple[int, ...], dtype: torch.dtype, set_rows: list[int], factor: float
    ) -> tuple[Tensor, Tensor]:
        """(pool of `count` rows, its pages): zeros in the null row, numbers in `set_rows`, everything else NaN."""
        size = math.prod(shape)
        # 256 elements more keep rows aligned to 16 bytes, as a host's pages are.
        page = self.empty(count, size + (256 if self.p.padded_pool else 0), dtype=dtype)
        pool = page[:, :size].unflatten(1, shape)
        pool[NULL_ROW] = 0
        pool[set_rows] = self.normal(len(set_rows), *shape, dtype=dtype, factor=factor)
        return pool, page

    def state_pool(self, count: int, set_rows: list[int]) -> tuple[Tensor, Tensor]:
        return self.pool(count, (self.hv, self.dv, self.dk), self.state_dtype, set_rows, 0.5)

    def gates(self, tokens: int) -> dict[str, Tensor]:
        return {
            "a": self.normal(tokens, self.hv),
            "b": self.normal(tokens, self.hv),
            "A_log": self.normal(self.hv, dtype=torch.float32, factor=0.5),
            "dt_bias": self.normal(self.hv),
        }

    def heads(self, tokens: int) -> dict[str, Tensor]:
        return {
            "q": self.normal(tokens, self.hk, self.dk),
            "k": self.normal(tokens, self.hk, self.dk),
            "v": self.normal(tokens, self.hv, self.dv),
        }

    def prefill(self, exp_gate: bool) -> Case:
        lengths = [CHUNK + 3, 0, 5, 0]
        tokens = sum(lengths) + 2  # the last two belong to no sequence
        heads = self.heads(tokens)
        for name in ("q", "k"):
            heads[name] = reference.l2_norm(heads[name], torch.float32)
        g = -self.normal(tokens, self.hv, dtype=torch.float32).abs() * 0.3
        pool, page = self.state_pool(7, [3, 5])
        checkpoints = self.empty(1, self.hv, self.dv, self.dk, dtype=self.state_dtype) if self.p.checkpoints else None
        arguments: dict[str, Any] = {
            **heads,
            "g": g.exp() if exp_gate else g,
            "beta": self.normal(tokens, self.hv, dtype=torch.float32).sigmoid(),
            "state": pool,
            "state_indices": self.ints([1, 3, 5, NULL_ROW]),  # fresh in a poisoned row, empty, carried, padding
            "cu_seqlens": self.ints([0, CHUNK + 3, CHUNK + 3, CHUNK + 8, CHUNK + 8]),
            "has_initial_state": self.bools([False, True, True, True]),
            "scale": self.scale,
            "use_qk_l2norm": False,
            "exp_gate": exp_gate,
            "max_seqlen": max(lengths),
            "null_index": NULL_ROW,
            "out": self.empty(tokens, self.hv, self.dv, dtype=self.dtype),
            "checkpoints": checkpoints,
            "checkpoint_cu_starts": self.ints([0, 1, 1, 1, 1]) if self.p.checkpoints else None,
            "checkpoint_every": CHUNK if self.p.checkpoints else 0,
            "zero_padding": True,
        }
        outputs = ("out", "state", "checkpoints") if self.p.checkpoints else ("out", "state")
        return Case("prefill", arguments, outputs, {"state": (page, [1, 5])})

    def decode(self) -> Case:
        pool, page = self.state_pool(6, [1, 4])
        arguments: dict[str, Any] = {
            **self.heads(3),
            **self.gates(3),
            "state": pool,
            "state_indices": self.ints([4, NULL_ROW, 1]),
            "scale": self.scale,
            "use_qk_l2norm": True,
            "null_index": NULL_ROW,
            "out": self.empty(3, self.hv, self.dv, dtype=self.dtype),
            "zero_padding": True,
        }
        return Case("decode", arguments, ("out", "state"), {"state": (page, [1, 4])})

    def conv_pool(self, count: int, set_rows: list[int]) -> tuple[Tensor, Tensor]:
        return self.pool(count, (self.dim, CONV_WIDTH - 1), self.dtype, set_rows, 1.0)

    def fused_decode(self) -> Case:
        pool, page = self.state_pool(6, [1, 4])
        conv, conv_page = self.conv_pool(6, [1, 4])
        arguments: dict[str, Any] = {
            "mixed_qkv": self.normal(3, self.dim),
            "conv_weight": self.normal(self.dim, CONV_WIDTH, factor=0.5),
            "conv_bias": None,
            "conv_state": conv,
            **self.gates(3),
            "state": pool,
            "state_indices": self.ints([4, NULL_ROW, 1]),
            "num_k_heads": self.hk,
            "head_k_dim": self.dk,
            "head_v_dim": self.dv,
            "scale": self.scale,
            "z": self.normal(3, self.hv, self.dv),
            "norm_weight": self.normal(self.dv),
            "norm_eps": 1e-6,
            "gate": "silu",
            "null_index": NULL_ROW,
            "out": self.empty(3, self.hv, self.dv, dtype=self.dtype),
            "zero_padding": True,
        }
        pools = {"state": (page, [1, 4]), "conv_state": (conv_page, [1, 4])}
        return Case("fused_decode", arguments, ("out", "state", "conv_state"), pools)

    def verify(self, ragged: bool) -> Case:
        width = max(self.p.max_spec_tokens, 2)
        rows = [list(range(1, width + 1)), list(range(width + 1, 2 * width + 1)), [NULL_ROW] * width]
        first, second = width, 1 if ragged else width
        tokens = first + second if ragged else 3 * width  # a full batch is padded to its width with padding tokens
        pool, page = self.state_pool(2 * width + 2, [rows[0][1], rows[1][0]])
        arguments: dict[str, Any] = {
            **self.heads(tokens),
            **self.gates(tokens),
            "state": pool,
            "state_indices": self.ints(rows),
            "num_accepted_tokens": self.ints([2, 1, 1]),
            "cu_seqlens": self.ints([0, first, first + second, first + second]),
            "start_rows": None,
            "scale": self.scale,
            "use_qk_l2norm": True,
            "null_index": NULL_ROW,
            "out": self.empty(tokens, self.hv, self.dv, dtype=self.dtype),
            "zero_padding": True,
        }
        return Case("verify", arguments, ("out", "state"), {"state": (page, [*rows[0], *rows[1][:second]])})

    def conv_prologue(self) -> Case:
        lengths = [5, 0, 2]
        tokens = sum(lengths)
        conv, conv_page = self.conv_pool(7, [3, 5])
        pool, page = self.state_pool(7, [3, 5])
        wide = self.normal(tokens, self.dim + 32)  # a slice of a wider projection
        arguments: dict[str, Any] = {
            "mixed_qkv": wide[:, : self.dim],
            "conv_weight": self.normal(self.dim, CONV_WIDTH, factor=0.5),
            "conv_bias": None,
            "conv_state": conv,
            "state_indices": self.ints([1, 3, 5]),
            "cu_seqlens": self.ints([0, 5, 5, 7]),
            "has_initial_state": self.bools([False, True, True]),
            "num_accepted_tokens": None,
            **self.gates(tokens),
            "state": pool,
            "num_k_heads": self.hk,
            "head_k_dim": self.dk,
            "head_v_dim": self.dv,
            "exp_gate": False,
            "null_index": NULL_ROW,
            "q": self.empty(tokens, self.hk, self.dk, dtype=self.dtype),
            "k": self.empty(tokens, self.hk, self.dk, dtype=self.dtype),
            "v": self.empty(tokens, self.hv, self.dv, dtype=self.dtype),
            "g": self.empty(tokens, self.hv),
            "beta": self.empty(tokens, self.hv),
        }
        outputs = ("q", "k", "v", "g", "beta", "conv_state", "state")
        return Case("conv_prologue", arguments, outputs, {"conv_state": (conv_page, [1, 5]), "state": (page, [1, 5])})


def _bits(tensor: Tensor) -> Tensor:
    """The tensor's bytes, by which NaN equals NaN."""
    return tensor.contiguous().view(torch.uint8)
