"""The rows: every backend of every op, best first. Data and checks only; a target is imported by `load`."""

from __future__ import annotations

from collections.abc import Mapping

from gdn_plugin.registry.backend import Backend, Check
from gdn_plugin.registry.checks import (
    at_least,
    needs_cuda_on,
    needs_device,
    needs_dtype,
    needs_feature,
    needs_head_dims,
    needs_machine,
    needs_package,
    needs_sm,
    needs_sm_at_least,
    needs_state_dtype,
    never,
)
from gdn_plugin.registry.external import external
from gdn_plugin.registry.platform import Platform
from gdn_plugin.registry.preferences import measured
from gdn_plugin.registry.problem import OPS, Problem

# Minimum versions, with the reason of each.
FLASHINFER_MINIMUM = "0.6.14"  # first with every hang of the known-bad table fixed
CUTLASS_DSL_MINIMUM = "4.4.2"  # first whose kernels of this kind compile for sm_100a with CUDA 13
CUDA_MINIMUM_SM100 = "13.0"  # ptxas of CUDA 12 does not take the SM 100 kernels

FLASHINFER_INSTALL = "pip install 'flashinfer-python>=0.6.14'"
CUTLASS_DSL_INSTALL = "pip install 'nvidia-cutlass-dsl[cu13]>=4.4.2'"
GDN_FLASHINFER_INSTALL = "pip install 'gdn-plugin[flashinfer]'"


def _triton_device(platform: Platform, problem: Problem) -> str | None:
    """A GPU, or a CPU under Triton's interpreter."""
    if platform.device != "cpu":
        return needs_sm_at_least(80)(platform, problem)
    if platform.has("triton.interpreter"):
        return None
    return "needs SM 80 or newer, this device is cpu (TRITON_INTERPRET=1 would interpret the kernels)"


def _interpreted_only_on_request(platform: Platform, problem: Problem) -> str | None:
    return None if platform.device == "cuda" else "the Triton interpreter is for tests, not for serving"


_TRITON_CHECKS: tuple[Check, ...] = (
    needs_package("triton"),
    _triton_device,
    needs_head_dims((64, 128, 256), (64, 128, 256)),
    needs_dtype("bfloat16", "float16", "float32"),
    needs_state_dtype("float32", "bfloat16"),
)


def _triton(op: str, module: str) -> Backend:
    return Backend(
        "triton",
        f"gdn_plugin.ops._triton.{module}:{op}",
        checks=_TRITON_CHECKS,
        preferred=_interpreted_only_on_request,
        install="pip install 'gdn-plugin[triton]'",
    )


def _cutlass_dsl(platform: Platform, problem: Problem) -> str | None:
    """The compiler of FlashInfer's kernels, and with CUDA 13 its libraries for that, which are an extra."""
    missing = needs_package("nvidia-cutlass-dsl", CUTLASS_DSL_MINIMUM, CUTLASS_DSL_INSTALL)(platform, problem)
    if missing is not None or platform.cuda is None or not at_least(platform.cuda, "13.0"):
        return missing
    return needs_package("nvidia-cutlass-dsl-libs-cu13", CUTLASS_DSL_MINIMUM, CUTLASS_DSL_INSTALL)(platform, problem)


def _dense_fp32_pool(platform: Platform, problem: Problem) -> str | None:
    """FlashInfer's scatter of fp32 states knows no row padding; its bf16 kernel does."""
    if problem.state_dtype == "float32" and problem.padded_pool:
        return "needs a dense state pool where state is float32; this pool's rows are padded"
    return None


def _even_batches(platform: Platform, problem: Problem) -> str | None:
    """FlashInfer's kernels of several tokens take [B, S, ...] tensors."""
    if problem.ragged:
        return "needs as many tokens of every sequence; drafts of this host end early, so its batches are ragged"
    return None


def _checkpointing(platform: Platform, problem: Problem) -> str | None:
    if problem.checkpoints and not platform.has("flashinfer.prefill.checkpoints"):
        return "needs chunk_gated_delta_rule(state_checkpoints=...) for checkpoints, which was not found"
    copies = not platform.has("flashinfer.prefill.state_indices")
    if problem.checkpoints and copies and (state := problem.state_dtype) != "float32":
        return f"needs flashinfer-python >= 0.7 for checkpoints of {state} states; before, they are float32"
    return None


def _copying(platform: Platform, problem: Problem) -> str | None:
    """A note: an older FlashInfer is served through gather and scatter of the states."""
    if platform.has("flashinfer.prefill.state_indices"):
        return None
    return "copying: needs flashinfer-python >= 0.7 for in-place state"


def _flashinfer(op: str, *checks: Check, notes: tuple[Check, ...] = ()) -> Backend:
    return Backend(
        "flashinfer",
        f"gdn_plugin.ops._flashinfer.{op}:{op}",
        checks=(
            *checks,
            needs_cuda_on((100, 103), CUDA_MINIMUM_SM100),
            needs_head_dims((128,), (128,)),
            needs_state_dtype("float32", "bfloat16"),
            needs_package("flashinfer-python", FLASHINFER_MINIMUM, FLASHINFER_INSTALL),
            _cutlass_dsl,
        ),
        preferred=measured("flashinfer"),
        notes=notes,
        install=GDN_FLASHINFER_INSTALL,
    )


def _cpu(op: str) -> Backend:
    return Backend(
        "cpu",
        f"gdn_plugin.ops.cpu.{op}:{op}",
        checks=(
            needs_device("cpu"),
            needs_machine("x86_64", "arm64"),
            needs_feature("cpu.cxx_compiler", "a C++ compiler (CXX, or c++, g++ or clang++ on PATH)"),
            needs_dtype("bfloat16", "float16", "float32"),
            needs_state_dtype("float32", "bfloat16"),
        ),
        install="install a C++ compiler (Debian: apt install g++)",
    )


def _torch(op: str) -> Backend:
    return Backend("torch", f"gdn_plugin.ops.{'chunked' if op == 'prefill' else 'eager'}:{op}")


def _reference(op: str) -> Backend:
    why = "a plain loop over tokens: the truth that tests compare with, chosen only by name"
    return Backend("reference", f"gdn_plugin.ops.reference:{op}", preferred=never(why))


# Order is rank.
TABLE: Mapping[str, tuple[Backend, ...]] = {
    "conv_prologue": (
        _triton("conv_prologue", "prologue"),
        _cpu("conv_prologue"),
        _torch("conv_prologue"),
        _reference("conv_prologue"),
    ),
    "prefill": (
        _flashinfer(
            "prefill",
            needs_sm(90, 100, 103, 120),
            needs_dtype("bfloat16", "float16"),
            needs_feature("flashinfer.prefill", "flashinfer.gdn_prefill.chunk_gated_delta_rule"),
            _checkpointing,
            notes=(_copying,),
        ),
        _triton("prefill", "prefill"),
        _cpu("prefill"),
        _torch("prefill"),
        _reference("prefill"),
    ),
    "decode": (
        _flashinfer(
            "decode",
            needs_sm_at_least(90),
            needs_dtype("bfloat16"),
            needs_feature(
                "flashinfer.decode.initial_state_indices",
                "gated_delta_rule_decode_pretranspose(initial_state_indices=...) of flashinfer-python >= 0.7",
            ),
        ),
        _triton("decode", "decode"),
        _cpu("decode"),
        _torch("decode"),
        _reference("decode"),
    ),
    "fused_decode": (
        _triton("fused_decode", "fused_decode"),
        _cpu("fused_decode"),
        _torch("fused_decode"),
        _reference("fused_decode"),
    ),
    "verify": (
        _flashinfer(
            "verify",
            needs_sm_at_least(90),
            needs_dtype("bfloat16"),
            _even_batches,
            _dense_fp32_pool,
            needs_feature(
                "flashinfer.mtp.ssm_state_indices",
                "gated_delta_rule_mtp(ssm_state_indices=...) of flashinfer-python >= 0.7",
            ),
        ),
        _triton("verify", "verify"),
        _cpu("verify"),
        _torch("verify"),
        _reference("verify"),
    ),
}

BUILTIN_NAMES = ("flashinfer", "triton", "cpu", "torch", "reference")


def rows(op: str) -> tuple[Backend, ...]:
    """The rows of an op, best-ranked first: third parties', then the plugin's own.

    A third-party row with the name of another row of the op is left out, and `load_failures` says so.
    """
    if op not in OPS:
        raise ValueError(f"op={op!r} is not valid; choose one of: {', '.join(OPS)}")
    own = TABLE[op]
    taken = {row.name for row in own}
    others = []
    for row in external().rows.get(op, ()):
        if row.name not in taken:
            taken.add(row.name)
            others.append(row)
    return (*others, *own)


def load_failures() -> dict[str, str]:
    """Why third-party rows are missing, by the name of the entry point or backend."""
    failures = dict(external().failures)
    for op, offered in external().rows.items():
        kept = {id(row) for row in rows(op)}
        for row in offered:
            if id(row) not in kept:
                failures[f"{row.name} ({op})"] = f"{row.target} was left out: the name {row.name!r} is taken"
    return failures


def backend_names() -> tuple[str, ...]:
    """Every name a request may carry besides "auto": the plugin's own, then third parties'."""
    names = dict.fromkeys(BUILTIN_NAMES)
    for offered in external().rows.values():
        names |= dict.fromkeys(row.name for row in offered)
    return tuple(names)
