"""FlashInfer's functions as plain loops on CPU tensors: what they mean by a row number, and nothing of ours.

Prefill takes rows as they are: a negative one would wrap around and name a live sequence's. Decode skips a negative row
of an fp32 pool and zeroes its output; of a bf16 pool it takes row 0 instead. `Seen` keeps the row numbers that came.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from gdn_plugin.backends.flashinfer import api


def step(
    S: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """One token: S [Hv, V, K], q and k [Hk, K], v [Hv, V], decay and beta [Hv]."""
    ratio = v.shape[0] // k.shape[0]
    q, k = (x.float().repeat_interleave(ratio, 0).unsqueeze(-1) for x in (q, k))
    S = decay[:, None, None] * S
    S = S + (beta[:, None] * (v.float() - (S @ k).squeeze(-1))).unsqueeze(-1) * k.transpose(-1, -2)
    return S, scale * (S @ q).squeeze(-1)


def gates(a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    softplus = torch.nn.functional.softplus(a.float() + dt_bias.float())
    return torch.exp(-torch.exp(A_log) * softplus), torch.sigmoid(b.float())


@dataclass
class Seen:
    """Row numbers that FlashInfer was given, a list a call."""

    rows: list[list[int]] = field(default_factory=list)

    def prefill(
        self, q, k, v, g=None, beta=None, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None,
        use_qk_l2norm_in_kernel=False, output=None, output_state=None, state_checkpoints=None,
        checkpoint_cu_starts=None, checkpoint_every_n_tokens=0, state_indices=None, backend="auto", max_seqlen=None,
    ):  # fmt: skip
        assert backend == "flashinfer" and output_state is initial_state and cu_seqlens.dtype == torch.int32
        if use_qk_l2norm_in_kernel:
            q, k = (torch.nn.functional.normalize(x.float(), dim=-1).to(x.dtype) for x in (q, k))
        self.rows.append(state_indices.tolist())
        self.packed(
            q, k, v, g, beta, scale, initial_state, cu_seqlens, output, state_checkpoints, checkpoint_cu_starts,
            checkpoint_every_n_tokens, state_indices.tolist(),
        )  # fmt: skip

    @staticmethod
    def packed(q, k, v, g, beta, scale, state, cu_seqlens, output, saved, starts, every, rows) -> None:
        offsets = cu_seqlens.tolist()
        for i, row in enumerate(rows):
            S = state[row].float()
            for t in range(offsets[i], offsets[i + 1]):
                S, o = step(S, q[t], k[t], v[t], g[t], beta[t], scale)
                output[t] = o.to(output.dtype)
                done = t - offsets[i] + 1
                if saved is not None and done % every == 0:
                    saved[int(starts[i]) + done // every - 1] = S.to(saved.dtype)
            state[row] = S.to(state.dtype)

    def decode(
        self, q, k, v, state, A_log, a, dt_bias, b, scale=None, output=None, use_qk_l2norm=True, initial_state=None,
        initial_state_indices=None, output_state_indices=None, backend="auto",
    ):  # fmt: skip
        rows = initial_state_indices.tolist()
        self.rows.append(rows)
        decay, beta = gates(a, b, A_log, dt_bias)
        ends = rows if output_state_indices is None else output_state_indices.tolist()
        for i, (start, end) in enumerate(zip(rows, ends, strict=True)):
            if start < 0 and initial_state.dtype == torch.float32:
                output[i] = 0
                continue
            S, o = step(initial_state[max(start, 0)].float(), q[i, 0], k[i, 0], v[i, 0], decay[i, 0], beta[i, 0], scale)
            output[i, 0], initial_state[max(end, 0)] = o.to(output.dtype), S.to(initial_state.dtype)

    def verify(
        self, q, k, v, A_log, a, dt_bias, b, scale=None, output=None, initial_state_indices=None,
        ssm_state_indices=None, disable_state_update=None, initial_state=None, use_qk_l2norm=True,
    ):  # fmt: skip
        self.rows.append([*initial_state_indices.tolist(), *ssm_state_indices.flatten().tolist()])
        decay, beta = gates(a, b, A_log, dt_bias)
        origins = [initial_state[row].float() for row in initial_state_indices.tolist()]
        for i, S in enumerate(origins):
            for t, row in enumerate(ssm_state_indices[i].tolist()):
                S, o = step(S, q[i, t], k[i, t], v[i, t], decay[i, t], beta[i, t], scale)
                output[i, t], initial_state[row] = o.to(output.dtype), S.to(initial_state.dtype)

    def api(self) -> api.Api:
        def bf16(initial_state_source, use_qk_l2norm_in_kernel, **arguments):
            self.verify(initial_state=initial_state_source, use_qk_l2norm=use_qk_l2norm_in_kernel, **arguments)

        functions = (self.prefill, self.decode, self.verify, bf16)
        return api.Api(*(api._entry(function) for function in functions))
