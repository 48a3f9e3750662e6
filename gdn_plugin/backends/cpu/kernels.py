"""The six ops of backend `cpu`: C++ behind PyTorch's dispatcher, taking the arguments of the ops' records by name.

csrc/bindings.cpp turns tensors into what the kernels take; recurrent.h has decode and verify, prefill.h the chunked
prefill, conv.h the convolution, conv_prologue and fused_decode, norm.h the gated norm. Everything is fp32 in between.
Prefill alone rounds matrix operands to bf16 where q is bf16 and the CPU has bf16 dot products; its sums stay fp32.

Index values that would lead outside of a tensor raise ValueError before anything is written.
"""

from __future__ import annotations

from inspect import Parameter, Signature
from operator import itemgetter
from typing import Any

from gdn_plugin.backends.cpu import build
from gdn_plugin.ops.record import OPS
from gdn_plugin.registry import BackendOp


def _op(name: str) -> BackendOp:
    record = OPS[name].without_hints()
    names = [argument.name for argument in record.arguments]
    in_order = itemgetter(*names)  # by position, the dispatcher takes them in half the time

    def run(**arguments: Any) -> None:
        build.operator(name)(*in_order(arguments))

    run.__name__ = name
    run.__signature__ = Signature([Parameter(n, Parameter.KEYWORD_ONLY) for n in names])  # type: ignore[attr-defined]
    return BackendOp(run, build.variants, build.compile_count)


CONV_PROLOGUE = _op("conv_prologue")
PREFILL = _op("prefill")
DECODE = _op("decode")
FUSED_DECODE = _op("fused_decode")
VERIFY = _op("verify")
GATED_NORM = _op("gated_norm")
