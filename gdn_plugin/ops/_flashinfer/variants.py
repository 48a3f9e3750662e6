"""Every call that makes FlashInfer compile another kernel for one problem: warm-up and the compile command run these.

FlashInfer compiles by dtypes, heads, scale, strides and, in places, by how much work a call brings. Sizes grow here by
a half or less (1, 2, 3, 4, 6, 8, 12, ...), and the narrowest of its classes spans 296 to 511 sequences times heads, so
none is missed (a test runs every size). Sizes that share a kernel cost a launch and no compile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gdn_plugin.ops._flashinfer.decode import decode
from gdn_plugin.ops._flashinfer.prefill import prefill
from gdn_plugin.ops._flashinfer.verify import verify
from gdn_plugin.registry.problem import Problem

_CHUNK = 64  # tokens FlashInfer's prefill works on at a time, and the smallest checkpoint interval
# Decode and verify choose tiles by sequences times value heads, and choose the same ones from here on.
_MOST_WORK = 2048
_ROW_PADDING = 32  # elements between the rows of a padded pool; how many does not reach a kernel, where any may


@dataclass(frozen=True, slots=True)
class Case:
    """One call. `run` allocates its tensors and makes it; of the caller's it touches the pool's scratch row alone.

    Args:
        pool, device, scale, use_qk_l2norm, bias_dtype: as in `cases`.
    """

    problem: Problem
    num_sequences: int
    checkpoints: bool
    pool: Tensor | None
    device: str
    scale: float
    use_qk_l2norm: bool
    bias_dtype: str

    @property
    def op(self) -> str:
        return self.problem.op

    @property
    def name(self) -> str:
        problem = self.problem
        text = f"{self.op} {problem.dtype} state={problem.state_dtype} B={self.num_sequences}"
        if self.op == "verify":
            text += f" S={problem.max_spec_tokens}"
        return text + (" checkpoints" if self.checkpoints else "")

    def run(self) -> None:
        {"prefill": self._prefill, "decode": self._decode, "verify": self._verify}[self.op]()

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(*shape, dtype=dtype or getattr(torch, self.problem.dtype), device=self.device)

    def _pool(self, rows: int) -> Tensor:
        problem, dtype = self.problem, getattr(torch, self.problem.state_dtype)
        shape = (rows, problem.num_v_heads, problem.head_v_dim, problem.head_k_dim)
        row = shape[1] * shape[2] * shape[3]
        inner = (shape[2] * shape[3], shape[3], 1)
        return torch.empty_strided(
            shape, (row + _ROW_PADDING * problem.padded_pool, *inner), dtype=dtype, device=self.device
        ).zero_()

    def _qkv(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        p = self.problem
        q, k = (self._empty(tokens, p.num_k_heads, p.head_k_dim).zero_() for _ in range(2))
        return q, k, self._empty(tokens, p.num_v_heads, p.head_v_dim).zero_()

    def _gates(self, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        heads = self.problem.num_v_heads
        a, b = (self._empty(tokens, heads).zero_() for _ in range(2))
        bias = self._empty(heads, dtype=getattr(torch, self.bias_dtype))
        return a, b, self._empty(heads, dtype=torch.float32).zero_(), bias.zero_()

    def _prefill(self) -> None:
        batch, heads = self.num_sequences, self.problem.num_v_heads
        tokens = batch * _CHUNK
        g, beta = (self._empty(tokens, heads, dtype=torch.float32).zero_() for _ in range(2))
        q, k, v = self._qkv(tokens)
        pool, out = self._pool(batch), torch.empty_like(v)
        offsets = torch.arange(batch + 1, dtype=torch.int32, device=self.device)
        saved = torch.empty(pool.shape, dtype=pool.dtype, device=self.device) if self.checkpoints else None
        starts = offsets if self.checkpoints else None
        prefill(
            q, k, v, g, beta, pool, torch.arange(batch, dtype=torch.int32, device=self.device), offsets * _CHUNK, None,
            self.scale, False, True, _CHUNK, -1, out, saved, starts, _CHUNK if self.checkpoints else 0, False,
        )  # fmt: skip

    def _decode(self) -> None:
        batch = self.num_sequences
        q, k, v = self._qkv(batch)
        a, b, A_log, dt_bias = self._gates(batch)
        pool = self._pool(2) if self.pool is None else self.pool
        # All padding: an fp32 pool is not touched, a bf16 pool on its scratch row alone.
        rows = torch.zeros(batch, dtype=torch.int32, device=self.device)
        decode(
            q, k, v, a, b, A_log, dt_bias, pool, rows, self.scale, self.use_qk_l2norm, 0, torch.empty_like(v), True
        )  # fmt: skip

    def _verify(self) -> None:
        batch, width = self.num_sequences, self.problem.max_spec_tokens
        q, k, v = self._qkv(batch * width)
        a, b, A_log, dt_bias = self._gates(batch * width)
        pool = self._pool(2) if self.pool is None else self.pool
        rows = torch.zeros(batch, width, dtype=torch.int32, device=self.device)
        accepted = torch.ones(batch, dtype=torch.int32, device=self.device)
        offsets = torch.zeros(batch + 1, dtype=torch.int32, device=self.device)
        verify(
            q, k, v, a, b, A_log, dt_bias, pool, rows, accepted, offsets, None, self.scale, self.use_qk_l2norm, 0,
            torch.empty_like(v), True,
        )  # fmt: skip


def cases(
    problem: Problem,
    sm_count: int,
    *,
    device: str = "cuda",
    pool: Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
    bias_dtype: str | None = None,
) -> Iterator[Case]:
    """The calls that between them compile everything a layer of this problem can ask for.

    Args:
        sm_count: multiprocessors of the device; the context-parallel route of prefill is taken below about that many
            sequences times heads.
        pool: the layer's own pool, for decode and verify. Kernels for a padded bf16 pool are compiled for its exact
            size and strides, so without it those are not compiled here.
        scale: as the layer passes it; by default K^-0.5. Decode and verify compile it in, and what follows too.
        use_qk_l2norm: as the layer passes it; hosts call behind conv_prologue, which norms.
        bias_dtype: of dt_bias; by default the io dtype.
    """
    scale = problem.head_k_dim**-0.5 if scale is None else scale

    def case(batch: int, checkpoints: bool = False) -> Case:
        return Case(
            problem, batch, checkpoints, pool, device, scale, use_qk_l2norm, bias_dtype or problem.dtype
        )  # fmt: skip

    if problem.op == "prefill":
        fills_device = -(-sm_count // problem.num_v_heads)
        for batch in (*_sizes(fills_device - 1), fills_device):
            for checkpoints in (False, True) if problem.checkpoints else (False,):
                yield case(batch, checkpoints)
    elif problem.op == "decode" or (problem.op == "verify" and problem.max_spec_tokens):
        # An fp32 pool's decode kernel is the same for every batch.
        most = 1 if problem.op == "decode" and problem.state_dtype == "float32" else _MOST_WORK // problem.num_v_heads
        for batch in _sizes(max(most, 1)):
            yield case(batch)


def _sizes(most: int) -> Iterator[int]:
    """1, 2, 3, 4, 6, 8, 12, ..., up to `most`."""
    size, step = 1, 1
    while size <= most:
        yield size
        if size >= 4 and size & (size - 1) == 0:
            step = size // 2
        size += step
