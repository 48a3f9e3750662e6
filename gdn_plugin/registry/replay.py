"""Whether decode and speculation keep their updates in a ring (replay), and how long it is: as data, and why.

A row says where auto takes replay; the first that matches decides. Replace it by measured ones, as in `preferences`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from packaging.version import Version

from gdn_plugin.registry.platform import Platform
from gdn_plugin.registry.requests import Request
from gdn_plugin.registry.table import BUILTIN_NAMES, rows

USUAL_SLOTS = 16  # of a ring, for tools that are told of none: a fold every 15 tokens, 15 to 18 % of a page


@dataclass(frozen=True, slots=True)
class Preference:
    """One judgement.

    Args:
        slots: of the ring that auto takes here; 0 = none.
        reason: the sentence that auto gives.
        source: the measurement.
        sms: architectures it stands for; None = all, and CPUs.
        dtypes: of tokens and of the pool, by name; None = any.
        ratios, dims: value heads a key head, and (K, V), that its kernels are for; None = any.
        triton: the version that they want at least.
    """

    slots: int
    reason: str
    source: str
    sms: tuple[int, ...] | None = None
    dtypes: tuple[str, str] | None = None
    ratios: tuple[int, ...] | None = None
    dims: tuple[int, int] | None = None
    triton: str | None = None

    def matches(self, platform: Platform, dtypes: tuple[str, str], heads: tuple[int, int, int, int]) -> bool:
        num_k_heads, num_v_heads, *dims = heads
        installed = platform.packages.get("triton", "0")
        return (
            (self.sms is None or platform.sm in self.sms)
            and (self.dtypes is None or self.dtypes == dtypes)
            and (self.ratios is None or num_v_heads / num_k_heads in self.ratios)
            and (self.dims is None or self.dims == tuple(dims))
            and (self.triton is None or Version(installed) >= Version(self.triton))
        )


PREFERENCES: tuple[Preference, ...] = (
    Preference(
        16,
        reason="auto: on SM 90 an engine's decode of 256 sequences took 0.76 times as long with it, 64 x 4 drafts 0.80",
        source="vLLM 0.33 on one H100 (2026-11-27), qwen3.5-4b, Hk=16, Hv=32, bf16 tokens and state, ring of 16, "
        "seconds of stock, plugin and replay: decode of 256 sequences 3.64, 3.48, 2.78; of 8 0.587, 0.561, 0.557; 64 "
        "sequences with 3 drafts 1.40, 1.42, 1.13; prefill 1.77, 1.69, 1.68. A layer's step: 203, 195, 122 us; 13.5, "
        "8.3, 7.3; 138, 135, 49. Beside the prefix cache, one H100 (2026-11-28), stock and "
        "replay: drafts 1.40, 1.08; past blocks' ends 2.82, 2.38; decode of 256 3.54, 3.61, which the host bounds "
        "there; a layer's step with its share of moves between blocks 155, 50; 151, 51; 217, 123",
        sms=(90,),
        dtypes=("bfloat16", "bfloat16"),
        ratios=(1, 2, 4),
        dims=(128, 128),
        triton="3.6",
    ),
    Preference(
        16,
        reason="auto: on SM 90 an engine's decode of 256 sequences took 0.74 times as long with it, 64 x 4 drafts 0.81",
        source="vLLM 0.33 on one H200 (2026-11-27), qwen3.5-4b, Hk=16, Hv=32, bf16 tokens, float32 state, ring of 16, "
        "seconds of stock and replay: decode of 256 sequences 4.25, 3.15; of 8 0.509, 0.517 (level, within the noise); "
        "64 sequences with 3 drafts 1.41, 1.14; prefill 1.69, 1.66. A layer's step: 286, 173 us; 16.8, 9.7; 199, 96. "
        "Without replay decode is level with stock (one H100: 4.77 s of 4.66), fused_decode 388 us, with it 227",
        sms=(90,),
        dtypes=("bfloat16", "float32"),
        ratios=(1, 2, 4),
        dims=(128, 128),
        triton="3.6",
    ),
    Preference(
        0,
        reason="auto leaves replay off: not measured on this machine",
        source="none; of the bytes it moves docs/replay.md has the sums",
    ),
)


@dataclass(frozen=True, slots=True)
class Replay:
    """The decision.

    Args:
        slots: of a row's ring; 0 where replay is off.
        why: the sentence.
        refused: a ring was asked for and cannot be had.
    """

    slots: int
    why: str
    refused: bool = False

    def describe(self) -> str:
        return f"replay: {f'on, a ring of {self.slots} slots' if self.slots else 'off'} ({self.why})"


def decide(
    platform: Platform,
    request: Request,
    dtypes: tuple[str, str],
    heads: tuple[int, int, int, int],
    spec_tokens: int = 0,
    *,
    backends: Mapping[str, str] | None = None,
    obstacle: Callable[[], str | None] | None = None,
) -> Replay:
    """Replay or not, for a layer.

    Args:
        request: for replay, see `requests.replay_request`.
        dtypes: of a layer's tokens and of its states, by name.
        heads: of a layer: (Hk, Hv, K, V).
        spec_tokens: most tokens that a speculative row brings; 0 without speculation. A ring has room for four steps.
        backends: the request for each phase: one by name must have the op that replay puts in the phase's place.
        obstacle: says why this host, or this mode of it, cannot have replay, or None; asked where replay is wanted.
    """
    if request.value == "0":
        return Replay(0, f"asked for, {request.source}")
    if request.value == "auto":
        row = next(row for row in PREFERENCES if row.matches(platform, dtypes, heads))
        slots, why = row.slots, row.reason
    else:
        slots, why = int(request.value), f"asked for, {request.source}"
    if not slots:
        return Replay(0, why)
    refused = (obstacle() if obstacle else None) or _unable(backends or {}, spec_tokens)
    if refused:
        return Replay(0, refused, refused=request.value != "auto")
    return Replay(ring_slots(spec_tokens, slots), why)


def ring_slots(spec_tokens: int, slots: int = USUAL_SLOTS) -> int:
    """Of a ring of at least `slots`, for steps of up to `spec_tokens` tokens: a multiple of 4.

    The ops need two steps' tokens and fold where less room than that is left: with no more, at nearly every step.
    """
    return -(-max(slots, 4 * spec_tokens) // 4) * 4


def _unable(backends: Mapping[str, str], spec_tokens: int) -> str | None:
    """The sentence where a backend asked for by name has no op of replay."""
    for phase in ("decode", "verify") if spec_tokens else ("decode",):
        asked = backends.get(phase, "auto")
        offered = {row.name for row in rows(f"replay_{phase}")}
        if asked != "auto" and not offered.intersection(asked.split(",")):
            have = ", ".join(name for name in BUILTIN_NAMES if name in offered)
            return f"{asked}, asked for {phase}, has no replay_{phase}; these have it: {have}"
    return None
