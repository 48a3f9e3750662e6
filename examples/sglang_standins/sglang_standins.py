"""A plugin of SGLang that stands in for Triton kernels of its models and its prefix cache, which have no CPU form."""

import importlib
import os

import torch
import torch.nn.functional as F
from torch import Tensor

ELEMENTWISE = "sglang.kernels.ops.elementwise.elementwise"
TRACK = "sglang.kernels.ops.mamba.mamba_state_scatter_triton"


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target, function in {
        f"{ELEMENTWISE}.fused_gate_sigmoid_mul": gate_sigmoid_mul,
        f"{ELEMENTWISE}.fused_gate_sigmoid_mul_add": gate_sigmoid_mul_add,
        f"{ELEMENTWISE}.fused_sigmoid_mul": sigmoid_mul,
        "sglang.kernels.ops.attention.fla.fused_norm_gate.FusedRMSNormGated.forward": gated_norm,
        "sglang.kernels.ops.attention.fla.layernorm_gated.RMSNorm.forward": gated_norm,
        f"{TRACK}.track_mamba_states_all_layers": track_all_layers,
        f"{TRACK}.track_mamba_states_if_needed": track,
        "sglang.srt.arg_groups.mamba_hook._platform_supports_mamba_cache_extra_buffer": supports_extra_buffer,
    }.items():
        HookRegistry.register(target, function, HookType.REPLACE)
    # MODULE:FUNCTION of a test that wants a say in each of SGLang's processes.
    module, _, function = os.environ.get("SGLANG_STANDINS_ALSO", "").partition(":")
    if module:
        getattr(importlib.import_module(module), function)()
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self  # asked for without a look at the device


def gate_sigmoid_mul(hidden: Tensor, weight: Tensor, shared: Tensor) -> Tensor:
    return torch.sigmoid((hidden.float() * weight.float()).sum(-1, keepdim=True)).to(shared.dtype) * shared


def gate_sigmoid_mul_add(hidden: Tensor, weight: Tensor, shared: Tensor, out: Tensor) -> None:
    out += gate_sigmoid_mul(hidden, weight, shared)


def sigmoid_mul(x: Tensor, gate: Tensor, *args: object, **kwargs: object) -> Tensor:
    return x * torch.sigmoid(gate)


def gated_norm(self: torch.nn.Module, x: Tensor, gate: Tensor, *args: object, **kwargs: object) -> Tensor:
    y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps) * self.weight.float()
    activation = torch.sigmoid if self.activation == "sigmoid" else F.silu
    return (y * activation(gate.float())).to(x.dtype)


def track_all_layers(
    conv: Tensor, ssm: Tensor, rows: Tensor, mask: Tensor, kept: Tensor, count: int, check_freed_slots: bool = False
) -> None:
    """Copy the states of the masked sequences to their kept slots, in pools of all layers [L, N, ...]."""
    chosen = mask[:count].bool()
    source, target = rows[:count][chosen].long(), kept[:count][chosen].long()
    for pool in (conv, ssm):
        pool[:, target] = pool[:, source]


def track(
    conv: Tensor, ssm: Tensor, rows: Tensor, mask: Tensor, kept: Tensor, count: int, check_freed_slots: bool = False
) -> None:
    track_all_layers(conv[None], ssm[None], rows, mask, kept, count)


def supports_extra_buffer(*args: object, **kwargs: object) -> bool:
    return True
