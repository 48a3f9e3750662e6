"""The mathematics of one chunk of the gated delta rule, batched over chunks and heads.

Over a chunk of C = 64 tokens with carried state S, cumulative log decay G_t, keys k_t and values v_t, the recurrence
telescopes into a unit lower triangular system (Yang et al., arXiv:2412.06464, section 3.3):

    L_ij = beta_i * exp(G_i - G_j) * (k_i . k_j)  for j < i
    u    = (I + L)^-1 diag(beta) (v - diag(exp G) k S^T)
    o    = scale * (diag(exp G) q S^T + tril(exp(G_i - G_j) (q_i . k_j)) u)
    S    <- exp(G_C) S + (diag(exp(G_C - G)) u)^T k

Nothing is divided by a decay, so g of any size is safe; differences of G are taken in fp64, since G reaches thousands
while the differences that matter are small. Everything else is fp32. Padding tokens have k = v = beta = g = 0.

A masked product is still a product, and 0 * NaN is NaN: a token that is not finite would reach the tokens before it. So
such tokens count as zeros, and NaN is put where the recurrence has something that is not finite: from a token's k, g or
beta on in all of its head and state, from an element of v on in that element and row of the state, from q in its own
output.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 64
_BASE = 8  # side of the diagonal blocks inverted token by token; 8 was the fastest of 4, 8, 16, 32 on x86


def unit_lower_inverse(L: Tensor, out: Tensor) -> Tensor:
    """(I + strictly lower part of L)^-1 for L [N, C, C]; the rest of L is not read. `out` is zeros, and returned.

    Forward substitution, first inside blocks of 8, then between blocks. Strongly correlated keys make L's entries all
    close to one: the inverse stays small, but the powers of L that a Neumann series sums do not.
    """
    n, size, _ = L.shape
    blocks = size // _BASE
    diagonal = (size * size, _BASE * (size + 1), size, 1)
    # Batch last: one row of all blocks is one contiguous vector operation.
    given = torch.as_strided(L, (n, blocks, _BASE, _BASE), diagonal, L.storage_offset())
    given = given.permute(2, 3, 0, 1).reshape(_BASE, _BASE, n * blocks)
    inverse = torch.zeros_like(given)
    inverse.diagonal().fill_(1.0)
    for i in range(1, _BASE):
        inverse[i, :i] -= (given[i, :i, None] * inverse[:i, :i]).sum(0)
    target = torch.as_strided(out, (n, blocks, _BASE, _BASE), diagonal, out.storage_offset())
    target.copy_(inverse.view(_BASE, _BASE, n, blocks).permute(2, 3, 0, 1))
    side = _BASE
    while side < size:  # [[A, 0], [B, D]]^-1 = [[A^-1, 0], [-D^-1 B A^-1, D^-1]]
        shape, strides = (n, size // (2 * side), side, side), (size * size, 2 * side * (size + 1), size, 1)
        below = torch.as_strided(L, shape, strides, L.storage_offset() + side * size)
        first = torch.as_strided(out, shape, strides, out.storage_offset())
        second = torch.as_strided(out, shape, strides, out.storage_offset() + side * (size + 1))
        product = torch.matmul(second, torch.matmul(below, first))
        torch.as_strided(out, shape, strides, out.storage_offset() + side * size).copy_(product.neg_())
        side *= 2
    return out


def log_gate(g: Tensor, exp_gate: bool) -> Tensor:
    """Natural log of the decay, in fp64 and finite: differences of -inf would be NaN.

    A decay that underflowed to 0 in fp32 counts as the smallest that did not; exp(-1e4) is 0 in fp64 too.
    """
    if not exp_gate:
        return g.double().clamp(min=-1e4)
    return g.double().clamp(min=1e-38).log()


class Window:
    """Some consecutive chunks of some heads, with all that does not depend on the carried state.

    Args:
        kq: [n, h, 2C, K] fp32: rows 0..C-1 the keys, C..2C-1 the queries of chunk n and key head h.
        v: [n, h, r, C, V] fp32, r value heads a key head. Holds the chunk's output once `step` has run.
        log_decay: [n, h, r, C] fp64, natural logs, 0 for padding tokens.
        beta: [n, h, r, C] fp32, 0 for padding tokens.
        finite: all of these are known to be finite. All are the window's own, to change.
    """

    def __init__(self, kq: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, finite: bool) -> None:
        n, h, r, C, V = v.shape
        self.n, self.h, self.r, self.V = n, h, r, V
        self.kq, self.v = kq, v
        self.spoilt: tuple[Tensor, Tensor] | None = None
        if not finite:
            fine = torch.isfinite(kq).all(-1)  # [n, h, 2C]
            head = torch.isfinite(log_decay) & torch.isfinite(beta) & fine[:, :, None, :C]
            bad = ~(torch.isfinite(v) & head.unsqueeze(-1))
            since = bad.cumsum(-2, dtype=torch.int8) > 0  # [n, h, r, C, V]; C fits int8
            self.spoilt = since, ~fine[:, :, None, C:, None] | since
            for x in (kq, v, log_decay, beta):
                x.nan_to_num_(0.0, 0.0, 0.0)
        # A running sum, which cumsum on CUDA refuses under deterministic algorithms.
        total = torch.matmul(log_decay, torch.ones(C, C, dtype=torch.float64, device=v.device).triu_())
        self.decay = torch.exp(total).float().unsqueeze(-1)  # [n, h, r, C, 1] since the chunk's start
        self.decay_left = torch.exp(total[..., -1:] - total).float().unsqueeze(-1)  # ... to the chunk's end
        self.chunk_decay = self.decay[..., -1:, :]  # [n, h, r, 1, 1]

        keys = kq[:, :, :C]
        products = torch.matmul(kq, keys.transpose(-1, -2)).unsqueeze(2)  # [n, h, 1, 2C, C]
        pairwise = torch.empty(n, h, r, C, C, dtype=torch.float32, device=v.device)
        torch.sub(total.unsqueeze(-1), total.unsqueeze(-2), out=pairwise)
        future = torch.full((C, C), float("-inf"), dtype=torch.float32, device=v.device).triu_(1)
        pairwise.add_(future).exp_()  # masked before exp: above the diagonal it would overflow
        solve = torch.zeros_like(pairwise)
        lower = (products[..., :C, :] * pairwise).mul_(beta.unsqueeze(-1))
        unit_lower_inverse(lower.view(-1, C, C), solve.view(-1, C, C))
        del lower
        self.solve = solve.mul_(beta.unsqueeze(-2))  # (I + L)^-1 diag(beta)
        self.attend = pairwise.mul_(products[..., C:, :])

    def step(self, i: int, S: Tensor, scale: float) -> Tensor:
        """Chunk i: S [h, r, V, K] fp32 contiguous becomes the state behind it. Returns o [h, r, C, V]."""
        h, r, V, C = self.h, self.r, self.V, self.v.shape[-2]
        S_rows = S.view(h, r * V, -1)
        seen = torch.bmm(self.kq[i], S_rows.transpose(1, 2)).view(h, 2, C, r, V).permute(1, 0, 3, 2, 4)
        v, decay = self.v[i], self.decay[i]
        v.addcmul_(seen[0], decay, value=-1.0)
        u = torch.bmm(self.solve[i].flatten(0, 1), v.flatten(0, 1)).view(h, r, C, V)
        o = torch.mul(seen[1], decay, out=v)
        o.flatten(0, 1).baddbmm_(self.attend[i].flatten(0, 1), u.flatten(0, 1), beta=scale, alpha=scale)
        # [h, C, r, V], so that the value heads of one key head are one matrix
        left = torch.empty(h, C, r, V, dtype=torch.float32, device=v.device)
        torch.mul(u, self.decay_left[i], out=left.permute(0, 2, 1, 3))
        S.mul_(self.chunk_decay[i])
        S_rows.baddbmm_(left.view(h, C, r * V).transpose(1, 2), self.kq[i][:, :C])
        if self.spoilt is not None:
            since, outputs = self.spoilt
            o.masked_fill_(outputs[i], float("nan"))
            S.masked_fill_(since[i][..., -1, :, None], float("nan"))
        return o
