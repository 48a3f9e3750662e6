"""Inputs for one timing: a layer's tensors at a named shape, batch mix and dtype, with a pool larger than the batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gdn_plugin.bench.shapes import Shape


@dataclass(slots=True)
class Workload:
    """One GDN layer's inputs; names and shapes are those of `gdn_plugin.ops`.

    `state` is the pristine pool: a call that must start from it restores it with `reset`.
    """

    shape: Shape
    lens: tuple[int, ...]
    device: str
    mixed_qkv: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    beta: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    z: torch.Tensor
    norm_weight: torch.Tensor
    A_log: torch.Tensor
    dt_bias: torch.Tensor
    conv_weight: torch.Tensor
    conv_state: torch.Tensor
    state: torch.Tensor
    state_indices: torch.Tensor
    cu_seqlens: torch.Tensor
    has_initial_state: torch.Tensor
    out: torch.Tensor

    @property
    def tokens(self) -> int:
        return sum(self.lens)

    @property
    def scale(self) -> float:
        return self.shape.head_k_dim**-0.5


def make_workload(
    shape: Shape,
    lens: tuple[int, ...],
    *,
    device: str,
    dtype: torch.dtype = torch.bfloat16,
    state_dtype: torch.dtype = torch.float32,
    rows: int | None = None,
    page_tail: int = 16384,
    seed: int = 0,
) -> Workload:
    """Random inputs; the pools are padded by `page_tail` elements a row, as vLLM's pages are."""
    rng = torch.Generator(device=device).manual_seed(seed)
    tokens, batch = sum(lens), len(lens)
    rows = rows or batch + 3
    heads_k, heads_v, dim_k, dim_v = shape.num_k_heads, shape.num_v_heads, shape.head_k_dim, shape.head_v_dim

    def normal(*size: int, dtype: torch.dtype = dtype, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*size, generator=rng, device=device) * scale).to(dtype)

    def unit(*size: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(*size, generator=rng, device=device), dim=-1).to(dtype)

    def pool(size: int, *dims: int, of: torch.dtype) -> torch.Tensor:
        inner = 1
        for dim in dims:
            inner *= dim
        flat = torch.zeros(size, inner + page_tail, dtype=of, device=device)
        return flat[:, :inner].unflatten(1, dims)

    state = pool(rows, heads_v, dim_v, dim_k, of=state_dtype)
    if rows <= 64:
        state.copy_(normal(*state.shape, dtype=state_dtype, scale=0.1))
    else:  # a large pool is filled in place: its random copy might not fit beside it
        state.fill_(0.02)
    conv_state = pool(rows, shape.conv_width - 1, shape.conv_dim, of=dtype).transpose(1, 2)
    value_width = heads_v * dim_v
    qkvz = normal(tokens, shape.conv_dim + value_width)
    offsets = torch.tensor([0, *lens], device=device).cumsum(0).to(torch.int32)
    A_log = torch.rand(heads_v, generator=rng, device=device) * 2.0 - 3.0
    dt_bias = torch.rand(heads_v, generator=rng, device=device).to(dtype)
    a, b = normal(tokens, heads_v), normal(tokens, heads_v)
    return Workload(
        shape=shape,
        lens=lens,
        device=device,
        mixed_qkv=qkvz[:, : shape.conv_dim],
        q=unit(tokens, heads_k, dim_k),
        k=unit(tokens, heads_k, dim_k),
        v=normal(tokens, heads_v, dim_v),
        g=-A_log.exp() * torch.nn.functional.softplus(a.float() + dt_bias.float()),
        beta=b.float().sigmoid(),
        a=a,
        b=b,
        z=qkvz[:, shape.conv_dim :].unflatten(1, (heads_v, dim_v)),
        norm_weight=torch.ones(dim_v, dtype=dtype, device=device),
        A_log=A_log,
        dt_bias=dt_bias,
        conv_weight=normal(shape.conv_dim, shape.conv_width, scale=0.5),
        conv_state=conv_state,
        state=state,
        state_indices=torch.randperm(rows - 1, generator=rng, device=device)[:batch].to(torch.int32) + 1,
        cu_seqlens=offsets,
        has_initial_state=torch.ones(batch, dtype=torch.bool, device=device),
        out=torch.zeros(tokens, heads_v, dim_v, dtype=dtype, device=device),
    )
