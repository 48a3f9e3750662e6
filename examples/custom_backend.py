"""A backend from outside: rows in a mapping, found through an entry point, chosen by name or, where preferred, by auto.

    python examples/custom_backend.py

A real package declares the entry point in its pyproject.toml:

    [project.entry-points."gdn_plugin.backends"]
    counting = "my_package.gdn:BACKENDS"

Here this file is the package, and its metadata is written to a temporary folder.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from gdn_plugin import ops
from gdn_plugin.registry import Backend, BackendOp, Platform, Problem, Wants, choose, rows

calls = 0


def decode(
    *, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, state: Tensor,
    state_indices: Tensor, scale: float, use_qk_l2norm: bool, null_index: int, padding: str, out: Tensor,
    zero_padding: bool,
) -> None:  # fmt: skip
    """One token a sequence, a sequence at a time. Called with every argument of the op's record, by name.

    `padding` is not looked at: it is a promise for kernels without a mask, and this one has an `if`.
    """
    global calls
    calls += 1
    group = v.shape[1] // q.shape[1]
    g = -torch.exp(A_log) * torch.nn.functional.softplus(a.float() + dt_bias.float())
    beta = torch.sigmoid(b.float())
    for i, row in enumerate(state_indices.tolist()):
        if row <= null_index:
            if zero_padding:
                out[i].zero_()
            continue
        key, query = (x[i].float().repeat_interleave(group, dim=0) for x in (k, q))  # [Hv, K]
        if use_qk_l2norm:
            key, query = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (key, query))
        S = state[row].float() * torch.exp(g[i])[:, None, None]  # [Hv, V, K]
        u = beta[i][:, None] * (v[i].float() - torch.einsum("hvk,hk->hv", S, key))
        S = S + u[:, :, None] * key[:, None, :]
        state[row] = S.to(state.dtype)
        out[i] = (scale * torch.einsum("hvk,hk->hv", S, query)).to(out.dtype)


DECODE = BackendOp(run=decode)  # it compiles nothing, so it has no variants


def small_keys(platform: Platform, problem: Problem) -> str | None:
    """A check: None where the backend runs, else one sentence with what it needs and what it found."""
    return None if problem.head_k_dim <= 128 else f"needs K <= 128, got K={problem.head_k_dim}"


BACKENDS = {
    "decode": Backend(
        "counting",
        "custom_backend:DECODE",
        checks=(small_keys,),
        # Row numbers side by side: whoever calls it for many layers makes them once; the self-check brings them so.
        wants=Wants(dense_rows=True),
    )
}


def pretend_to_be_installed() -> None:
    """What `pip install` would do: put the entry point where importlib.metadata finds it."""
    site = Path(tempfile.mkdtemp())
    info = site / "custom_backend-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: custom-backend\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[gdn_plugin.backends]\ncounting = custom_backend:BACKENDS\n")
    sys.path[:0] = [str(site), str(Path(__file__).parent)]


def main() -> None:
    B, Hk, Hv, K, V = 3, 2, 4, 64, 64
    q, k, v = torch.randn(B, Hk, K), torch.randn(B, Hk, K), torch.randn(B, Hv, V)
    gates = torch.randn(B, Hv), torch.randn(B, Hv), torch.zeros(Hv), torch.zeros(Hv)
    state, places = torch.zeros(8, Hv, V, K), torch.tensor([1, 4, 6], dtype=torch.int32)

    want = ops.decode(q, k, v, *gates, state.clone(), places, backend="reference")
    import custom_backend  # the module that the entry point loads, which is not this __main__

    got = ops.decode(q, k, v, *gates, state.clone(), places, backend="counting")
    checked = custom_backend.calls  # the first call of a new backend is preceded by its self-check
    again = ops.decode(q, k, v, *gates, state, places, backend="counting")
    print(f"decode went through 'counting' {custom_backend.calls - checked} time(s)")
    print(f"max |difference| from the reference: {(got - want).abs().max():.1e}")
    row = next(row for row in rows("decode") if row.name == "counting")
    print(f"it wants: {row.wants}")
    choice = choose(Platform.simulated("cpu"), Problem("decode", "float32", "float32", Hk, Hv, 256, V))
    for verdict in choice.verdicts:
        print(f"  K=256: {verdict.backend}: {'; '.join(verdict.reasons) or 'can run'}")
    assert custom_backend.calls == checked + 1
    assert torch.allclose(got, want, atol=1e-5) and torch.equal(got, again)


if __name__ == "__main__":
    pretend_to_be_installed()
    main()
