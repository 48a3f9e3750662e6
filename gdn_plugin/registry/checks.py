"""Checks that rows are made of. Each returns None, or one sentence with what is needed and what was found."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from packaging.version import InvalidVersion, Version

from gdn_plugin.registry.backend import Check
from gdn_plugin.registry.platform import Platform
from gdn_plugin.registry.problem import Problem


@dataclass(frozen=True, slots=True)
class _Bound:
    """A check with what it asks for filled in. Unlike a closure it pickles, and equals one that asks the same."""

    function: Callable[..., str | None]
    asks: tuple[Any, ...]

    def __call__(self, platform: Platform, problem: Problem) -> str | None:
        return self.function(*self.asks, platform, problem)


def bound(function: Callable[..., str | None], *asks: Any) -> Check:
    """function(*asks, platform, problem) as a check of (platform, problem)."""
    return _Bound(function, asks)


def at_least(found: str, minimum: str) -> bool:
    """Whether a version reaches a minimum; one that cannot be parsed (a local build) does not."""
    try:
        # Pre-releases and local builds of the minimum itself count as it: 0.7.0rc1, 2.11.0+cu130.
        return Version(Version(found).base_version) >= Version(minimum)
    except InvalidVersion:
        return False


def never(reason: str) -> Check:
    """For `preferred`: a backend that runs only when it is asked for."""
    return bound(_never, reason)


def _never(reason: str, platform: Platform, problem: Problem) -> str | None:
    return reason


def needs_package(package: str, minimum: str | None = None, install: str = "") -> Check:
    return bound(_package, package, minimum, install)


def _package(package: str, minimum: str | None, install: str, platform: Platform, problem: Problem) -> str | None:
    found = platform.version(package)
    need = package if minimum is None else f"{package} >= {minimum}"
    how = f"; {install}" if install else ""
    if found is None:
        return f"needs {need}, which is not installed{how}"
    if minimum is not None and not at_least(found, minimum):
        return f"needs {need}, found {found}{how}"
    return None


def needs_device(*devices: str) -> Check:
    return bound(_device, devices)


def _device(devices: tuple[str, ...], platform: Platform, problem: Problem) -> str | None:
    if platform.device in devices:
        return None
    return f"needs a {' or '.join(devices)} device, this one is {platform.device}"


def needs_machine(*machines: str) -> Check:
    """The host's processor, as "x86_64" or "arm64"."""
    return bound(_machine, machines)


def _machine(machines: tuple[str, ...], platform: Platform, problem: Problem) -> str | None:
    found = platform.features.get("cpu.machine", "unknown")
    return None if found in machines else f"needs a CPU of type {'/'.join(machines)}, this one is {found}"


def needs_sm(*sms: int) -> Check:
    return bound(_sm, sms)


def _sm(sms: tuple[int, ...], platform: Platform, problem: Problem) -> str | None:
    if platform.device == "cuda" and platform.sm in sms:
        return None
    return f"needs SM {'/'.join(map(str, sms))}, {_this_device(platform)}"


def needs_sm_at_least(sm: int) -> Check:
    return bound(_sm_at_least, sm)


def _sm_at_least(sm: int, platform: Platform, problem: Problem) -> str | None:
    if platform.device == "cuda" and platform.sm is not None and platform.sm >= sm:
        return None
    return f"needs SM {sm} or newer, {_this_device(platform)}"


def needs_cuda_on(sms: Iterable[int], minimum: str) -> Check:
    """A CUDA runtime that only some architectures ask for."""
    return bound(_cuda_on, tuple(sms), minimum)


def _cuda_on(sms: tuple[int, ...], minimum: str, platform: Platform, problem: Problem) -> str | None:
    if platform.sm not in sms or (platform.cuda is not None and at_least(platform.cuda, minimum)):
        return None
    return f"needs CUDA >= {minimum} on SM {platform.sm}, found {platform.cuda or 'none'}"


def needs_head_dims(k: Iterable[int], v: Iterable[int]) -> Check:
    return bound(_head_dims, tuple(k), tuple(v))


def _head_dims(ks: tuple[int, ...], vs: tuple[int, ...], platform: Platform, problem: Problem) -> str | None:
    if problem.head_k_dim in ks and problem.head_v_dim in vs:
        return None
    need = f"K={'/'.join(map(str, ks))}, V={'/'.join(map(str, vs))}"
    return f"needs {need}; got K={problem.head_k_dim}, V={problem.head_v_dim}"


def needs_dtype(*dtypes: str) -> Check:
    return bound(_dtype, dtypes)


def _dtype(dtypes: tuple[str, ...], platform: Platform, problem: Problem) -> str | None:
    return None if problem.dtype in dtypes else f"needs dtype {'/'.join(dtypes)}; got {problem.dtype}"


def needs_state_dtype(*dtypes: str) -> Check:
    return bound(_state_dtype, dtypes)


def _state_dtype(dtypes: tuple[str, ...], platform: Platform, problem: Problem) -> str | None:
    if problem.state_dtype in dtypes:
        return None
    return f"needs state dtype {'/'.join(dtypes)}; got {problem.state_dtype}"


def needs_feature(feature: str, sentence: str) -> Check:
    """A fact found by looking. `sentence` says what is needed; "which was not found" is added."""
    return bound(_feature, feature, sentence)


def _feature(feature: str, sentence: str, platform: Platform, problem: Problem) -> str | None:
    return None if platform.has(feature) else f"needs {sentence}, which was not found"


def _this_device(platform: Platform) -> str:
    if platform.device != "cuda" or platform.sm is None:
        return f"this device is {platform.device}"
    return f"this device is {platform.sm}"
