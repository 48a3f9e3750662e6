"""The only place that reads the machine."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import importlib.util
import os
import platform as host
import shutil
from pathlib import Path

from gdn_plugin import cache
from gdn_plugin.registry.platform import PACKAGES, Platform

# feature -> (file of the package, function, parameter); without a parameter, that the function is there.
_FLASHINFER_SIGNATURES = {
    "flashinfer.prefill": ("gdn_prefill.py", "chunk_gated_delta_rule", None),
    "flashinfer.prefill.state_indices": ("gdn_prefill.py", "chunk_gated_delta_rule", "state_indices"),
    "flashinfer.prefill.output": ("gdn_prefill.py", "chunk_gated_delta_rule", "output"),
    "flashinfer.prefill.max_seqlen": ("gdn_prefill.py", "chunk_gated_delta_rule", "max_seqlen"),
    "flashinfer.prefill.use_cp": ("gdn_prefill.py", "chunk_gated_delta_rule", "use_cp"),
    "flashinfer.prefill.checkpoints": ("gdn_prefill.py", "chunk_gated_delta_rule", "state_checkpoints"),
    "flashinfer.decode": ("gdn_decode.py", "gated_delta_rule_decode_pretranspose", None),
    "flashinfer.decode.initial_state_indices": (
        "gdn_decode.py",
        "gated_delta_rule_decode_pretranspose",
        "initial_state_indices",
    ),
    "flashinfer.decode.output_state_indices": (
        "gdn_decode.py",
        "gated_delta_rule_decode_pretranspose",
        "output_state_indices",
    ),
    "flashinfer.decode.output": ("gdn_decode.py", "gated_delta_rule_decode_pretranspose", "output"),
    "flashinfer.mtp": ("gdn_decode.py", "gated_delta_rule_mtp", None),
    "flashinfer.mtp.ssm_state_indices": ("gdn_decode.py", "gated_delta_rule_mtp", "ssm_state_indices"),
    "flashinfer.mtp_bf16.ssm_state_indices": (
        "gdn_kernels/gdn_decode_bf16_state.py",
        "gated_delta_rule_mtp",
        "ssm_state_indices",
    ),
    "flashinfer.mtp.output": ("gdn_decode.py", "gated_delta_rule_mtp", "output"),
}


@functools.cache
def probe(device: str | None = None) -> Platform:
    """The machine this process runs on. Made once a process and device type.

    Asking for a GPU's properties initialises CUDA, so nothing may call this at import or at registration.

    Args:
        device: torch device type; by default "cuda" where torch sees a GPU, else "cpu".
    """
    import torch

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    sm = sm_count = cuda = None
    if device == "cuda" and torch.version.hip is not None:
        # ROCm answers to "cuda" in torch; none of the kernels' checks mean that.
        device = "rocm"
    elif device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        sm = 10 * properties.major + properties.minor
        sm_count = properties.multi_processor_count
        cuda = torch.version.cuda
    return Platform(
        device=device, sm=sm, cuda=cuda, sm_count=sm_count, packages=installed_packages(), features=features()
    )


def installed_packages() -> dict[str, str]:
    """Versions of the distributions that matter, read from their metadata; nothing is imported."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def features() -> dict[str, str]:
    """Facts found by looking: signatures of optional packages, compilers, CPU flags, interpreter mode."""
    found = flashinfer_features() | cpu_features()
    if triton_interprets():
        found["triton.interpreter"] = "TRITON_INTERPRET=1"
    return found


def triton_interprets() -> bool:
    """Whether TRITON_INTERPRET says so, in one of the words that Triton knows."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def flashinfer_features() -> dict[str, str]:
    """What FlashInfer's GDN functions accept, read from their source: no import, so nothing can break or build."""
    root = _package_folder("flashinfer")
    if root is None:
        return {}
    parameters: dict[tuple[str, str], set[str]] = {}
    for file in {file for file, _, _ in _FLASHINFER_SIGNATURES.values()}:
        try:
            tree = ast.parse((root / file).read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError):
            # Not there, or unreadable: its functions are then not found, which is what the checks report.
            continue
        for node in tree.body:
            if isinstance(node, ast.FunctionDef):
                arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
                parameters[file, node.name] = {argument.arg for argument in arguments}
    found = {}
    for feature, (file, function, parameter) in _FLASHINFER_SIGNATURES.items():
        accepted = parameters.get((file, function))
        if accepted is not None and (parameter is None or parameter in accepted):
            found[feature] = "yes"
    return found


def cpu_features() -> dict[str, str]:
    """The C++ compiler that would be used (CXX, else c++, g++, clang++), or what one has left, and CPU flags."""
    found = {"cpu.machine": _machine()}
    # CXX may carry a launcher and flags ("ccache g++ -m64"): the program is what must exist.
    named = os.environ.get("CXX", "").split()
    names = [named[-1] if named[0].endswith("ccache") and len(named) > 1 else named[0]] if named else []
    for name in names or ["c++", "g++", "clang++"]:
        compiler = shutil.which(name)
        if compiler is not None:
            found["cpu.cxx_compiler"] = compiler
            break
    if "cpu.cxx_compiler" not in found and _compiled_kernels():
        found["cpu.library"] = "yes"
    flags = _cpu_flags()
    for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16", "sve"):
        if flag in flags:
            found[f"cpu.{flag}"] = "yes"
    return found


def _compiled_kernels() -> bool:
    """Whether the cache holds a library of the cpu backend. Whether it fits this build is seen when it is loaded."""
    try:
        return any(any(folder.glob("gdn_*.so")) for folder in cache.folders("cpu"))
    except OSError:
        return False


def _machine() -> str:
    machine = host.machine().lower()
    return {"amd64": "x86_64", "aarch64": "arm64"}.get(machine, machine)


def _cpu_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()  # not Linux: no flag is known, and kernels are built for the base instruction set
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def _package_folder(name: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))
