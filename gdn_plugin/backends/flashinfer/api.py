"""The functions of FlashInfer that the wrappers call, found once, with what their signatures accept.

What a FlashInfer can do is asked of its signatures and never of its version number: nightlies and forks carry
numbers that say nothing.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gdn_plugin.registry.errors import BackendLoadError

INSTALL = "pip install 'flashinfer-python>=0.7.2' 'nvidia-cutlass-dsl[cu13]>=4.6.2'"


# Where FlashInfer keeps kernels that it has compiled or loaded: dictionaries, and functions whose cache has an entry a
# kernel. What a version does not have counts nothing.
_DICTIONARIES = (
    ("flashinfer.gdn_kernels.delta_rule_dsl.custom_compile_cache", "_in_mem_compile_cache"),
    ("flashinfer.gdn_kernels.gdn_decode_bf16_state", "_compiled_kernels_mtp"),
    ("flashinfer.gdn_kernels.gdn_decode_bf16_state", "_compiled_kernels_wide_vec"),
)
_CACHED_FUNCTIONS = (
    ("flashinfer.gdn_kernels.blackwell.gdn_prefill", "_get_compiled_cache"),
    ("flashinfer.gdn_kernels.gdn_decode_pretranspose", "_get_compiled_decode_kernel"),
    ("flashinfer.gdn_kernels.gdn_decode_mtp", "_get_compiled_mtp_kernel"),
    ("flashinfer.gdn_kernels.gdn_decode_mtp", "_get_compiled_mtp_kernel_inline"),
    ("flashinfer.gdn_kernels.qk_l2norm", "_compiled"),
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One public function of FlashInfer and the names of its parameters."""

    call: Callable[..., Any]
    parameters: frozenset[str]

    def accepts(self, *names: str) -> bool:
        return self.parameters.issuperset(names)

    def only(self, **arguments: Any) -> dict[str, Any]:
        """The arguments that this version knows. For hints alone: what changes a result must be asked for."""
        return {name: value for name, value in arguments.items() if name in self.parameters}


@dataclass(frozen=True, slots=True)
class Api:
    """Args:
    prefill: `flashinfer.gdn_prefill.chunk_gated_delta_rule`.
    decode: `flashinfer.gdn_decode.gated_delta_rule_decode_pretranspose`.
    verify_fp32: `flashinfer.gdn_decode.gated_delta_rule_mtp`, which takes fp32 pools alone.
    verify_bf16: `flashinfer.gdn_kernels.gated_delta_rule_mtp`, the same for bf16 pools; None where it is missing.
        The public decode function reaches this kernel too, but cannot hand on the rows of each token's state.
    """

    prefill: Entry
    decode: Entry
    verify_fp32: Entry
    verify_bf16: Entry | None

    @property
    def prefill_in_place(self) -> bool:
        """Whether prefill takes the pool and its row numbers (FlashInfer 0.7); else states are copied out and back."""
        return self.prefill.accepts("state_indices")


def _entry(function: Callable[..., Any]) -> Entry:
    return Entry(function, frozenset(inspect.signature(function).parameters))


def _import(name: str) -> types.ModuleType:
    """Import a module of FlashInfer; what is missing comes with the command that installs it."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as exc:
        missing = exc.name or name
        raise BackendLoadError("flashinfer", hint=f"{missing} could not be imported; {INSTALL}") from exc


@functools.cache
def flashinfer_api() -> Api:
    """FlashInfer's GDN functions.

    Raises:
        BackendLoadError: FlashInfer or the CuTe DSL cannot be imported; the hint holds the pip command.
    """
    _import("cutlass.cute")  # FlashInfer swallows this failure and then reports that its kernels "are unavailable"
    prefill = _import("flashinfer.gdn_prefill")
    decode = _import("flashinfer.gdn_decode")
    kernels = _import("flashinfer.gdn_kernels")
    verify_bf16 = getattr(kernels, "gated_delta_rule_mtp", None)
    return Api(
        prefill=_entry(prefill.chunk_gated_delta_rule),
        decode=_entry(decode.gated_delta_rule_decode_pretranspose),
        verify_fp32=_entry(decode.gated_delta_rule_mtp),
        verify_bf16=None if verify_bf16 is None else _entry(verify_bf16),
    )


def compile_count() -> int:
    """GDN kernels FlashInfer has compiled or loaded from its disk cache in this process, and ours around them."""
    rows = sys.modules.get("gdn_plugin.backends.flashinfer.rows")
    count = 0 if rows is None else rows.compile_count()
    for module, name in _DICTIONARIES:
        count += len(getattr(sys.modules.get(module), name, ()))
    for module, name in _CACHED_FUNCTIONS:
        function = getattr(sys.modules.get(module), name, None)
        if function is not None:
            count += function.cache_info().currsize
    return count
