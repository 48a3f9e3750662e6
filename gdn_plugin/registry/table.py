"""The rows: every backend of every op, best first. Data and checks only; a target is imported by `load`."""

from __future__ import annotations

from collections.abc import Mapping

from gdn_plugin.registry.backend import Backend, Check, Wants
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
GDN_FLASHINFER_INSTALL = "pip install 'flashinfer-python>=0.7.2' 'nvidia-cutlass-dsl[cu13]>=4.6.2'"


def _triton_device(platform: Platform, problem: Problem) -> str | None:
    """A GPU, or a CPU under Triton's interpreter."""
    if platform.device != "cpu":
        return needs_sm_at_least(80)(platform, problem)
    if platform.has("triton.interpreter"):
        return None
    return "needs SM 80 or newer, this device is cpu (TRITON_INTERPRET=1 would interpret the kernels)"


def _interpreted_only_on_request(platform: Platform, problem: Problem) -> str | None:
    return None if platform.device == "cuda" else "the Triton interpreter is for tests, not for serving"


def _short_ring(platform: Platform, problem: Problem) -> str | None:
    """A step has its row's ring in registers: of 512 slots it compiles for most of a minute, of 2048 not at all."""
    if problem.op == "replay_fold" or problem.ring <= 256:
        return None
    return f"needs a ring of at most 256 slots; got {problem.ring}"


_TRITON_CHECKS: tuple[Check, ...] = (
    needs_package("triton"),
    _triton_device,
    needs_head_dims((64, 128, 256), (64, 128, 256)),
    needs_dtype("bfloat16", "float16", "float32"),
    needs_state_dtype("float32", "bfloat16", "float16"),
    _short_ring,
)


def _triton(op: str, module: str = "") -> Backend:
    return Backend(
        "triton",
        f"gdn_plugin.backends.triton.{module or op}:{op.upper()}",
        checks=_TRITON_CHECKS,
        preferred=_interpreted_only_on_request,
        install="pip install triton",
        by_size=True,
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
    """FlashInfer's kernels of several tokens take [B, S, ...] tensors, and have no mask."""
    if problem.ragged:
        return "needs as many tokens of every sequence; this batch is ragged, or may be (padding is not 'none')"
    return None


def _verify_kernels(platform: Platform, problem: Problem) -> str | None:
    """A kernel for each pool type, and for one token decode's, which then writes another row than it reads."""
    if problem.max_spec_tokens == 1:
        feature, what = "flashinfer.decode.output_state_indices", "decode_pretranspose(output_state_indices=...)"
    elif problem.state_dtype == "bfloat16":
        feature, what = "flashinfer.mtp_bf16.ssm_state_indices", "mtp(ssm_state_indices=...) for bfloat16 pools"
    else:
        feature, what = "flashinfer.mtp.ssm_state_indices", "mtp(ssm_state_indices=...)"
    return needs_feature(feature, f"gated_delta_rule_{what} of flashinfer-python >= 0.7")(platform, problem)


def _two_value_heads(platform: Platform, problem: Problem) -> str | None:
    """CuTe finds a gate's dense dim by its stride of 1, which a single head shares with tokens."""
    return None if problem.num_v_heads > 1 else "needs 2 value heads or more on a rank; got 1"


def _masked_padding(platform: Platform, problem: Problem) -> str | None:
    """FlashInfer's prefill, and its decode of a 16-bit pool, run padding like any other sequence."""
    if problem.padding == "any" and not (problem.op == "decode" and problem.state_dtype == "float32"):
        return "needs padding='scratch' or 'none': its kernel would write to the pool rows that padding names"
    return None


def _layout(platform: Platform, problem: Problem) -> str | None:
    if problem.strided and problem.op == "prefill":
        return "needs contiguous q, k, v, g and beta"
    if problem.unaligned:
        return "needs tensors that start on 32-byte boundaries, and pool rows on 16-byte ones"
    return None


def _gate_dtype(platform: Platform, problem: Problem) -> str | None:
    """Its decode of an fp32 pool reads fp32 gates too."""
    found = problem.gate_dtype or problem.dtype
    if found == problem.dtype or (problem.op == "decode" and problem.state_dtype == "float32"):
        return None
    return f"needs a and b in {problem.dtype}; got {found}"


def _checkpointing(platform: Platform, problem: Problem) -> str | None:
    if problem.checkpoints and problem.checkpoint_dtype not in ("", problem.state_dtype):
        return f"needs checkpoints in the pool's {problem.state_dtype}; got {problem.checkpoint_dtype}"
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


def _flashinfer(op: str, *checks: Check, wants: Wants = Wants(), notes: tuple[Check, ...] = ()) -> Backend:  # noqa: B008
    return Backend(
        "flashinfer",
        f"gdn_plugin.backends.flashinfer.{op}:{op.upper()}",
        checks=(
            *checks,
            _masked_padding,
            _layout,
            _gate_dtype,
            needs_cuda_on((100, 103), CUDA_MINIMUM_SM100),
            needs_head_dims((128,), (128,)),
            needs_state_dtype("float32", "bfloat16", *(("float16",) if op == "prefill" else ())),
            needs_package("flashinfer-python", FLASHINFER_MINIMUM, FLASHINFER_INSTALL),
            _cutlass_dsl,
        ),
        preferred=measured("flashinfer"),
        # Not by_size: some of its kernels are compiled for a pool's exact size, 1 to 40 s each.
        wants=wants,
        notes=notes,
        install=GDN_FLASHINFER_INSTALL,
    )


def _library_or_compiler(platform: Platform, problem: Problem) -> str | None:
    """Kernels that were compiled before serve where there is no compiler any more."""
    if platform.has("cpu.library"):
        return None
    return needs_feature("cpu.cxx_compiler", "a C++ compiler (CXX, or c++, g++ or clang++ on PATH)")(platform, problem)


def _cpu(op: str) -> Backend:
    return Backend(
        "cpu",
        f"gdn_plugin.backends.cpu.kernels:{op.upper()}",
        checks=(
            needs_device("cpu"),
            needs_machine("x86_64", "arm64"),
            _library_or_compiler,
            needs_dtype("bfloat16", "float16", "float32"),
            needs_state_dtype("float32", "bfloat16", "float16"),
        ),
        install="install a C++ compiler (Debian: apt install g++)",
    )


def _torch(op: str) -> Backend:
    module = op if op in ("prefill", "gated_norm") else "replay" if op.startswith("replay_") else "recurrent"
    return Backend("torch", f"gdn_plugin.backends.torch.{module}:{op.upper()}")


def _reference(op: str) -> Backend:
    why = "a plain loop over tokens: the truth that tests compare with, chosen only by name"
    module = "replay" if op.startswith("replay_") else "recurrence"
    return Backend("reference", f"gdn_plugin.backends.reference.{module}:{op.upper()}", preferred=never(why))


# Order is rank.
TABLE: Mapping[str, tuple[Backend, ...]] = {
    "conv_prologue": (
        _triton("conv_prologue"),
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
            wants=Wants(exp_gate=True, zeroed_fresh_rows=True, dense_rows=True, scratch_row=True, contiguous=True),
            notes=(_copying,),
        ),
        _triton("prefill"),
        _cpu("prefill"),
        _torch("prefill"),
        _reference("prefill"),
    ),
    "decode": (
        _flashinfer(
            "decode",
            needs_sm_at_least(90),
            needs_dtype("bfloat16"),
            _two_value_heads,
            needs_feature(
                "flashinfer.decode.initial_state_indices",
                "gated_delta_rule_decode_pretranspose(initial_state_indices=...) of flashinfer-python >= 0.7",
            ),
            wants=Wants(dense_rows=True, scratch_row=True),
        ),
        _triton("decode"),
        _cpu("decode"),
        _torch("decode"),
        _reference("decode"),
    ),
    "fused_decode": (
        _triton("fused_decode"),
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
            _two_value_heads,
            _verify_kernels,
            wants=Wants(dense_rows=True, scratch_row=True),
        ),
        _triton("verify"),
        _cpu("verify"),
        _torch("verify"),
        _reference("verify"),
    ),
    "fused_verify": (
        _triton("fused_verify"),
        _torch("fused_verify"),
        _reference("fused_verify"),
    ),
    **{
        op: (_triton(op, "replay"), _torch(op), _reference(op))
        for op in ("replay_decode", "replay_verify", "replay_fold")
    },
    "gated_norm": (
        _triton("gated_norm"),
        _cpu("gated_norm"),
        _torch("gated_norm"),
        _reference("gated_norm"),
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
