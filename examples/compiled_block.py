"""One Gated Delta Net block as an nn.Module on our ops: eager, torch.compile(fullgraph=True), on a GPU also captured.

    python examples/compiled_block.py [--tokens 200] [--backend torch]

The block has no backward: it is for inference. The pools are buffers, as a server's cache would be.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from gdn_plugin import ops


class GatedDeltaNet(nn.Module):
    """hidden -> in-projections -> conv_prologue -> prefill -> gated norm -> out-projection, and the decode step."""

    def __init__(self, hidden: int, k_heads: int, v_heads: int, k_dim: int, v_dim: int, rows: int, width: int = 4):
        super().__init__()
        self.sizes = {"num_k_heads": k_heads, "head_k_dim": k_dim, "head_v_dim": v_dim}
        self.v_heads, self.v_dim, self.dim = v_heads, v_dim, 2 * k_heads * k_dim + v_heads * v_dim
        self.in_qkvz = nn.Linear(hidden, self.dim + v_heads * v_dim, bias=False)
        self.in_ba = nn.Linear(hidden, 2 * v_heads, bias=False)
        self.conv_weight = nn.Parameter(torch.randn(self.dim, width) / width)
        self.A_log = nn.Parameter(torch.rand(v_heads).mul_(8).add_(0.1).log_())
        self.dt_bias = nn.Parameter(torch.zeros(v_heads))
        self.norm_weight = nn.Parameter(torch.ones(v_dim))
        self.out = nn.Linear(v_heads * v_dim, hidden, bias=False)
        self.register_buffer("conv_state", torch.zeros(rows, self.dim, width - 1))
        self.register_buffer("state", torch.zeros(rows, v_heads, v_dim, k_dim))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """mixed_qkv, z, b, a of x [T, hidden]: slices of the projections, never copied."""
        mixed, z = self.in_qkvz(x).split((self.dim, self.v_heads * self.v_dim), dim=-1)
        b, a = self.in_ba(x).chunk(2, dim=-1)
        return mixed, z.unflatten(-1, (self.v_heads, self.v_dim)), b, a

    def forward(self, x: Tensor, cu_seqlens: Tensor, rows: Tensor, has_initial_state: Tensor) -> Tensor:
        """Packed sequences x [T, hidden]; states land in pool rows `rows`."""
        mixed, z, b, a = self.project(x)
        q, k, v, g, beta = ops.conv_prologue(
            mixed, self.conv_weight, None, self.conv_state, rows, cu_seqlens, has_initial_state, a, b, self.A_log,
            self.dt_bias, **self.sizes,
        )  # fmt: skip
        o = ops.prefill(q, k, v, g, beta, self.state, rows, cu_seqlens, has_initial_state=has_initial_state)
        return self.out(ops.gated_norm(o, z, self.norm_weight).flatten(-2))

    def step(self, x: Tensor, rows: Tensor) -> Tensor:
        """One token a sequence, x [B, hidden]: the whole core in one op."""
        mixed, z, b, a = self.project(x)
        o = ops.fused_decode(
            mixed, self.conv_weight, None, self.conv_state, a, b, self.A_log, self.dt_bias, self.state, rows,
            **self.sizes, z=z, norm_weight=self.norm_weight,
        )  # fmt: skip
        return self.out(o.flatten(-2))


def error(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).abs().max() / want.float().abs().max())


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=200, help="tokens of the prompt batch")
    parser.add_argument("--backend", default=None, help="a backend for every phase; default: what the machine prefers")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    torch.manual_seed(0)
    block = GatedDeltaNet(hidden=256, k_heads=2, v_heads=4, k_dim=128, v_dim=128, rows=8).to(device, dtype)
    block.state = block.state.float()
    block.A_log.data = block.A_log.data.float()

    rows = torch.tensor([5, 2, 7], dtype=torch.int32, device=device)
    half = args.tokens // 2
    offsets = torch.tensor([0, 1, half, args.tokens], dtype=torch.int32, device=device)
    fresh = torch.zeros(3, dtype=torch.bool, device=device)
    prompt = torch.randn(args.tokens, 256, device=device, dtype=dtype)
    tokens = torch.randn(4, 3, 256, device=device, dtype=dtype)
    limit = 1e-4 if dtype is torch.float32 else 3e-2

    def run(forward, step) -> tuple[Tensor, list[Tensor]]:
        """The prompt, then four decode steps, from empty pools."""
        block.conv_state.zero_()
        block.state.zero_()
        return forward(prompt, offsets, rows, fresh), [step(x, rows).clone() for x in tokens]

    requests = {} if args.backend is None else dict.fromkeys(("prefill", "decode"), args.backend)
    with ops.use(requests):
        want, want_steps = run(block.forward, block.step)
        got, got_steps = run(
            torch.compile(block.forward, fullgraph=True, dynamic=True), torch.compile(block.step, fullgraph=True)
        )
        errors = {"compiled prefill": error(got, want)}
        errors["compiled decode"] = max(error(g, w) for g, w in zip(got_steps, want_steps, strict=True))
        if cuda:
            run(block.forward, block.step)  # everything is compiled by now
            x = torch.empty_like(tokens[0])
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = block.step(x, rows)

            def replay(new: Tensor, _: Tensor) -> Tensor:
                x.copy_(new)
                graph.replay()
                return y

            _, replayed = run(block.forward, replay)
            errors["captured decode"] = max(error(g, w) for g, w in zip(replayed, want_steps, strict=True))

    for name, value in errors.items():
        print(f"{name}: largest relative difference from eager {value:.1e}")
    if not cuda:
        print("captured decode: skipped, no CUDA device")
    if max(errors.values()) > limit:
        raise SystemExit(f"a difference passes {limit}")


if __name__ == "__main__":
    main()
