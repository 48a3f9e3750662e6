"""Backend `torch`, gated_norm: the RMSNorm and gate behind the delta rule, in plain PyTorch on any device."""

from __future__ import annotations

from torch import Tensor

from gdn_plugin.backends.torch.formulas import norm_and_gate
from gdn_plugin.registry import BackendOp


def gated_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float, gate: str, out: Tensor) -> None:
    """See gdn_plugin.ops.gated_norm. `out` may be x."""
    out.copy_(norm_and_gate(x, z, weight, eps, gate))


GATED_NORM = BackendOp(gated_norm)
