"""The ops of namespace `gdn`: schemas, implementations, fakes. One definition, one place.

Each phase has a returning op and an `_out` op that fills the caller's buffers; both mutate the pools they say they do.
The arguments are checked by the public functions of `gdn_plugin.ops`; calling torch.ops.gdn.* directly skips that.
`Library.define` + `impl` + `register_fake` rather than `custom_op`: about a third of the overhead a call. One
implementation serves every device (CompositeExplicitAutograd): the backend's name is what selects the code.

What is the same for every backend is done here, once: nothing at all for no tokens, zeros for no sequences, the device
of the tensors made current, and, under GDN_PLUGIN_DEBUG=1, the checks that synchronise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gdn_plugin.ops import debug
from gdn_plugin.ops.dispatch import function

NAMESPACE = "gdn"
_KEY = "CompositeExplicitAutograd"

_CONV = (
    "Tensor mixed_qkv, Tensor conv_weight, Tensor? conv_bias, Tensor(a!) conv_state, Tensor state_indices, "
    "Tensor cu_seqlens, Tensor? has_initial_state, Tensor a, Tensor b, Tensor A_log, Tensor dt_bias, int num_k_heads, "
    "int head_k_dim, int head_v_dim, Tensor(b!)? state, bool exp_gate, Tensor? num_accepted_tokens, int null_index"
)
_PREFILL = (
    "Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor(a!) state, Tensor state_indices, Tensor cu_seqlens, "
    "Tensor? has_initial_state, float scale, bool use_qk_l2norm, bool exp_gate, SymInt max_seqlen, int null_index, "
    "Tensor(b!)? checkpoints, Tensor? checkpoint_cu_starts, int checkpoint_every"
)
_DECODE = (
    "Tensor q, Tensor k, Tensor v, Tensor a, Tensor b, Tensor A_log, Tensor dt_bias, Tensor(a!) state, "
    "Tensor state_indices, float scale, bool use_qk_l2norm, int null_index"
)
_FUSED_DECODE = (
    "Tensor mixed_qkv, Tensor conv_weight, Tensor? conv_bias, Tensor(a!) conv_state, Tensor a, Tensor b, Tensor A_log, "
    "Tensor dt_bias, Tensor(b!) state, Tensor state_indices, int num_k_heads, int head_k_dim, int head_v_dim, "
    "float scale, Tensor? z, Tensor? norm_weight, float norm_eps, str gate, int null_index"
)
_VERIFY = (
    "Tensor q, Tensor k, Tensor v, Tensor a, Tensor b, Tensor A_log, Tensor dt_bias, Tensor(a!) state, "
    "Tensor state_indices, Tensor num_accepted_tokens, Tensor cu_seqlens, Tensor? start_rows, float scale, "
    "bool use_qk_l2norm, int null_index"
)
SCHEMAS = {
    "conv_prologue": f"({_CONV}, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "conv_prologue_out": f"({_CONV}, Tensor(c!) q, Tensor(d!) k, Tensor(e!) v, Tensor(f!) g, Tensor(h!) beta, "
    "str backend) -> ()",
    "prefill": f"({_PREFILL}, str backend) -> Tensor",
    "prefill_out": f"({_PREFILL}, Tensor(c!) out, str backend) -> ()",
    "decode": f"({_DECODE}, str backend) -> Tensor",
    "decode_out": f"({_DECODE}, Tensor(b!) out, str backend) -> ()",
    "fused_decode": f"({_FUSED_DECODE}, str backend) -> Tensor",
    "fused_decode_out": f"({_FUSED_DECODE}, Tensor(c!) out, str backend) -> ()",
    "verify": f"({_VERIFY}, str backend) -> Tensor",
    "verify_out": f"({_VERIFY}, Tensor(b!) out, str backend) -> ()",
}


_AS_IT_IS = contextlib.nullcontext()


def _on_device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes x's GPU current where it is not: kernels launch on the current device."""
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return _AS_IT_IS


def _unrecorded(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps the PyTorch calls inside a backend out of autograd.

    Recorded, an input that requires grad would put the pools on a graph that grows with every call, or make it fail.
    Backward through an output is autograd's own warning that the op has none.
    """

    def run(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return implementation(*args)
        with torch.no_grad():
            return implementation(*args)

    return run


def run_conv_prologue(
    mixed_qkv, conv_weight, conv_bias, conv_state, state_indices, cu_seqlens, has_initial_state, a, b, A_log, dt_bias,
    num_k_heads, head_k_dim, head_v_dim, state, exp_gate, num_accepted_tokens, null_index, q, k, v, g, beta, backend,
):  # fmt: skip
    run = function("conv_prologue", backend)
    if mixed_qkv.shape[0] == 0:
        return
    if state_indices.shape[0] == 0:
        for x in (q, k, v, beta):
            x.zero_()
        g.fill_(1.0 if exp_gate else 0.0)
        return
    if debug.enabled():
        debug.rows("conv_prologue", state_indices, conv_state.shape[0], null_index)
        if state is not None:
            debug.rows("conv_prologue", state_indices, state.shape[0], null_index)
        lens = debug.offsets("conv_prologue", cu_seqlens, mixed_qkv.shape[0])
        if num_accepted_tokens is not None:
            most = conv_state.shape[2] - conv_weight.shape[1] + 2
            debug.accepted("conv_prologue", num_accepted_tokens, most)
            debug.speculative_lens("conv_prologue", lens, most)
    with _on_device_of(mixed_qkv):
        run(
            mixed_qkv, conv_weight, conv_bias, conv_state, state_indices, cu_seqlens, has_initial_state,
            num_accepted_tokens, a, b, A_log, dt_bias, state, num_k_heads, head_k_dim, head_v_dim, exp_gate, null_index,
            q, k, v, g, beta,
        )  # fmt: skip


def _conv_prologue_outputs(mixed_qkv, a, num_k_heads, head_k_dim, head_v_dim):
    tokens, value_heads = mixed_qkv.shape[0], a.shape[1]
    return (
        mixed_qkv.new_empty((tokens, num_k_heads, head_k_dim)),
        mixed_qkv.new_empty((tokens, num_k_heads, head_k_dim)),
        mixed_qkv.new_empty((tokens, value_heads, head_v_dim)),
        mixed_qkv.new_empty((tokens, value_heads), dtype=torch.float32),
        mixed_qkv.new_empty((tokens, value_heads), dtype=torch.float32),
    )


def _conv_prologue(*args: Any) -> Any:
    inputs, backend = args[:-1], args[-1]
    outputs = _conv_prologue_outputs(inputs[0], inputs[7], *inputs[11:14])
    run_conv_prologue(*(*inputs, *outputs, backend))
    return outputs


def run_prefill(
    q, k, v, g, beta, state, state_indices, cu_seqlens, has_initial_state, scale, use_qk_l2norm, exp_gate, max_seqlen,
    null_index, checkpoints, checkpoint_cu_starts, checkpoint_every, out, backend, zero_padding=False,
):  # fmt: skip
    run = function("prefill", backend)
    if q.shape[0] == 0:
        return
    if state_indices.shape[0] == 0:
        if zero_padding:
            out.zero_()
        return
    if debug.enabled():
        debug.rows("prefill", state_indices, state.shape[0], null_index)
        lens = debug.offsets("prefill", cu_seqlens, q.shape[0])
        if checkpoints is not None:
            rows = checkpoints.shape[0]
            debug.checkpoint_starts("prefill", checkpoint_cu_starts, lens, checkpoint_every, rows)
    with _on_device_of(q):
        run(
            q, k, v, g, beta, state, state_indices, cu_seqlens, has_initial_state, scale, use_qk_l2norm, exp_gate,
            max_seqlen, null_index, out, checkpoints, checkpoint_cu_starts, checkpoint_every, zero_padding,
        )  # fmt: skip


def _prefill(*args: Any) -> Any:
    inputs, backend = args[:-1], args[-1]
    out = _like_v(inputs[2])
    run_prefill(*(*inputs, out, backend, True))
    return out


def run_decode(
    q, k, v, a, b, A_log, dt_bias, state, state_indices, scale, use_qk_l2norm, null_index, out, backend,
    zero_padding=False,
):  # fmt: skip
    run = function("decode", backend)
    if q.shape[0] == 0:
        return
    if debug.enabled():
        debug.rows("decode", state_indices, state.shape[0], null_index)
    with _on_device_of(q):
        run(
            q, k, v, a, b, A_log, dt_bias, state, state_indices, scale, use_qk_l2norm, null_index, out, zero_padding
        )  # fmt: skip


def _decode(*args: Any) -> Any:
    inputs, backend = args[:-1], args[-1]
    out = _like_v(inputs[2])
    run_decode(*(*inputs, out, backend, True))
    return out


def run_fused_decode(
    mixed_qkv, conv_weight, conv_bias, conv_state, a, b, A_log, dt_bias, state, state_indices, num_k_heads, head_k_dim,
    head_v_dim, scale, z, norm_weight, norm_eps, gate, null_index, out, backend, zero_padding=False,
):  # fmt: skip
    run = function("fused_decode", backend)
    if mixed_qkv.shape[0] == 0:
        return
    if debug.enabled():
        debug.rows("fused_decode", state_indices, min(state.shape[0], conv_state.shape[0]), null_index)
    with _on_device_of(mixed_qkv):
        run(
            mixed_qkv, conv_weight, conv_bias, conv_state, a, b, A_log, dt_bias, state, state_indices, num_k_heads,
            head_k_dim, head_v_dim, scale, z, norm_weight, norm_eps, gate, null_index, out, zero_padding,
        )  # fmt: skip


def _fused_decode(*args: Any) -> Any:
    inputs, backend = args[:-1], args[-1]
    out = inputs[0].new_empty((inputs[0].shape[0], inputs[4].shape[1], inputs[12]))
    run_fused_decode(*(*inputs, out, backend, True))
    return out


def run_verify(
    q, k, v, a, b, A_log, dt_bias, state, state_indices, num_accepted_tokens, cu_seqlens, start_rows, scale,
    use_qk_l2norm, null_index, out, backend, zero_padding=False,
):  # fmt: skip
    run = function("verify", backend)
    if q.shape[0] == 0:
        return
    if state_indices.shape[0] == 0:
        if zero_padding:
            out.zero_()
        return
    if debug.enabled():
        slots = state_indices.shape[1]
        debug.rows("verify", state_indices, state.shape[0], null_index)
        lens = debug.offsets("verify", cu_seqlens, q.shape[0])
        debug.speculative_lens("verify", lens, slots)
        if start_rows is None:
            debug.accepted("verify", num_accepted_tokens, slots)
        else:
            debug.start_rows("verify", start_rows, lens, state.shape[0])
    with _on_device_of(q):
        run(
            q, k, v, a, b, A_log, dt_bias, state, state_indices, num_accepted_tokens, cu_seqlens, start_rows, scale,
            use_qk_l2norm, null_index, out, zero_padding,
        )  # fmt: skip


def _verify(*args: Any) -> Any:
    inputs, backend = args[:-1], args[-1]
    out = _like_v(inputs[2])
    run_verify(*(*inputs, out, backend, True))
    return out


def _like_v(v: Tensor) -> Tensor:
    """[T, Hv, V], contiguous whatever v's strides are."""
    return v.new_empty(v.shape)


def _fake_conv_prologue(*args: Any) -> Any:
    return _conv_prologue_outputs(args[0], args[7], *args[11:14])


def _fake_like_v(*args: Any) -> Any:
    return _like_v(args[2])


def _fake_fused_decode(*args: Any) -> Any:
    return args[0].new_empty((args[0].shape[0], args[4].shape[1], args[12]))


def _fake_out(*args: Any) -> Any:
    return None


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "conv_prologue": (_conv_prologue, _fake_conv_prologue),
    "conv_prologue_out": (run_conv_prologue, _fake_out),
    "prefill": (_prefill, _fake_like_v),
    "prefill_out": (run_prefill, _fake_out),
    "decode": (_decode, _fake_like_v),
    "decode_out": (run_decode, _fake_out),
    "fused_decode": (_fused_decode, _fake_fused_decode),
    "fused_decode_out": (run_fused_decode, _fake_out),
    "verify": (_verify, _fake_like_v),
    "verify_out": (run_verify, _fake_out),
}

_library = torch.library.Library(NAMESPACE, "DEF")
for _name, (_implementation, _fake) in _IMPLEMENTATIONS.items():
    _library.define(_name + SCHEMAS[_name], tags=(torch.Tag.needs_fixed_stride_order,))
    _library.impl(_name, _unrecorded(_implementation), _KEY)
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=_library)
