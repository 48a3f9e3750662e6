"""Combinations known to hang, crash or give wrong numbers: data, with the upstream report of each.

A row refuses a backend where all that it names is met; what it leaves out is not asked. Take a row out when
the minimum versions in `table.py` have passed it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from gdn_plugin.registry.platform import Platform
from gdn_plugin.registry.problem import Problem


@dataclass(frozen=True, slots=True)
class KnownBad:
    """One report.

    Args:
        backend: whose rows it refuses.
        package: distribution at fault.
        versions: PEP 440 specifier of the bad versions.
        issue: upstream report or fix.
        sentence: what goes wrong.
        sms: architectures it was seen on; empty = all.
        ops: ops it concerns; empty = all.
        problem: fields of the Problem with the values that trigger it.
        install: the command that mends it, where no minimum version in `table.py` gives one already.
    """

    backend: str
    package: str
    versions: str
    issue: str
    sentence: str
    sms: tuple[int, ...] = ()
    ops: tuple[str, ...] = ()
    problem: MappingProxyType[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    install: str = ""

    def reason(self, platform: Platform, problem: Problem) -> str | None:
        found = platform.version(self.package)
        if found is None or (self.sms and platform.sm not in self.sms) or (self.ops and problem.op not in self.ops):
            return None
        if any(getattr(problem, name) != value for name, value in self.problem.items()):
            return None
        try:
            bad = SpecifierSet(self.versions).contains(Version(found), prereleases=True)
        except InvalidVersion:
            return None
        how = f"; {self.install}" if self.install else ""
        return f"{self.package} {found} {self.sentence} ({self.issue}){how}" if bad else None


# What FlashInfer 0.7.2 asks for, past every compiler below.
_NEWER_DSL = "pip install 'nvidia-cutlass-dsl[cu13]>=4.6.2'"

KNOWN_BAD: tuple[KnownBad, ...] = (
    KnownBad(
        backend="flashinfer",
        package="flashinfer-python",
        versions="<0.6.14",
        issue="flashinfer#3986, #3329, fixed by #3477",
        sentence="hangs in prefill at high concurrency",
        sms=(90,),
        ops=("prefill",),
    ),
    KnownBad(
        backend="flashinfer",
        package="flashinfer-python",
        versions="<=0.6.13",
        issue="flashinfer#3565, #3698, fixed by #3581",
        sentence="hangs on ragged batches with state",
        sms=(100, 103),
        ops=("prefill",),
    ),
    KnownBad(
        backend="flashinfer",
        package="flashinfer-python",
        versions="<0.6.14",
        issue="flashinfer#3536",
        sentence="deadlocks on an empty sequence",
        ops=("prefill",),
    ),
    KnownBad(
        backend="flashinfer",
        package="flashinfer-python",
        versions="<0.6.14",
        issue="flashinfer#3230",
        sentence="wraps 32-bit offsets past state row 4096 (Hv=32)",
        ops=("decode", "verify"),
    ),
    KnownBad(
        backend="flashinfer",
        package="nvidia-cutlass-dsl",
        versions="==4.5.1",
        issue="vllm#43230",
        sentence="breaks GDN kernels on GB200",
        sms=(100, 103),
        install=_NEWER_DSL,
    ),
    KnownBad(
        backend="flashinfer",
        package="nvidia-cutlass-dsl",
        versions="==4.5.0",
        issue="vllm#42991",
        sentence="crashes compiling prefill with checkpoints",
        sms=(100, 103),
        ops=("prefill",),
        problem=MappingProxyType({"checkpoints": True}),
        install=_NEWER_DSL,
    ),
)


def known_bad_reasons(backend: str, platform: Platform, problem: Problem) -> list[str]:
    """Every known trouble that this backend would meet, as sentences."""
    found = (row.reason(platform, problem) for row in KNOWN_BAD if row.backend == backend)
    return [reason for reason in found if reason is not None]
