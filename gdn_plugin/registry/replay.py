"""Whether decode and speculation keep their updates in a ring (replay), and how long it is: as data, and why.

A row says where auto takes replay; the first that matches decides. Replace it by measured ones, as in `preferences`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

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
        state_dtypes: of the pool, by name; None = any.
    """

    slots: int
    reason: str
    source: str
    sms: tuple[int, ...] | None = None
    state_dtypes: tuple[str, ...] | None = None

    def matches(self, platform: Platform, state_dtype: str) -> bool:
        here = self.sms is None or platform.sm in self.sms
        return here and (self.state_dtypes is None or state_dtype in self.state_dtypes)


PREFERENCES: tuple[Preference, ...] = (
    Preference(
        0,
        reason="auto leaves replay off: on SM 90 its kernels are 1.4 to 1.6 times as fast with a float32 state from "
        "64 sequences on, but no GPU engine has served so yet; GDN_PLUGIN_REPLAY=16 asks for it",
        source="this plugin on one H100 (triton 3.6, 2026-11-27), CUDA graphs, Hk=16, Hv=32, bf16 tokens, float32 "
        "state, ring of 16: decode of 8, 64, 256 sequences 11.7, 73, 249 us against 8.6, 102, 389 (fused_decode); "
        "8x4 and 64x4 speculative tokens 31 and 168 against 35 and 265 (fused_verify)",
        sms=(90,),
        state_dtypes=("float32",),
    ),
    Preference(
        0,
        reason="auto leaves replay off: on SM 90 with a state of 16 bits an engine's decode of 256 sequences took 1.2 "
        "times as long with it, though its kernel alone is faster",
        source="vLLM 0.33 on one H200 (2026-11-27), bf16 state, ring of 16, a layer's step: decode of 256 sequences "
        "191 us against 158, of 8 10.4 and 10.4; 64x4 speculative tokens 135 against 145 (stock: 153, 12.6, 116). The "
        "kernels alone on an H100: decode of 8, 64, 256 sequences 10.5, 46, 144 us against 6.7, 56, 211; 8x4 and 64x4 "
        "speculative tokens 28 and 144 against 20 and 139",
        sms=(90,),
        state_dtypes=("bfloat16", "float16"),
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
    state_dtype: str,
    spec_tokens: int = 0,
    *,
    backends: Mapping[str, str] | None = None,
    obstacle: Callable[[], str | None] | None = None,
) -> Replay:
    """Replay or not, for a layer.

    Args:
        request: for replay, see `requests.replay_request`.
        spec_tokens: most tokens that a speculative row brings; 0 without speculation. A ring has room for four steps.
        backends: the request for each phase: one by name must have the op that replay puts in the phase's place.
        obstacle: says why this host, or this mode of it, cannot have replay, or None; asked where replay is wanted.
    """
    if request.value == "0":
        return Replay(0, f"asked for, {request.source}")
    if request.value == "auto":
        row = next(row for row in PREFERENCES if row.matches(platform, state_dtype))
        slots, why = row.slots, row.reason
    else:
        slots, why = int(request.value), f"asked for, {request.source}"
    if not slots:
        return Replay(0, why)
    refused = (obstacle() if obstacle else None) or _unable(backends or {}, spec_tokens)
    if refused:
        return Replay(0, refused, refused=request.value != "auto")
    # The ops need two steps' tokens and fold where less room than that is left: with no more, at nearly every step.
    return Replay(-(-max(slots, 4 * spec_tokens) // 4) * 4, why)


def _unable(backends: Mapping[str, str], spec_tokens: int) -> str | None:
    """The sentence where a backend asked for by name has no op of replay."""
    for phase in ("decode", "verify") if spec_tokens else ("decode",):
        asked = backends.get(phase, "auto")
        offered = {row.name for row in rows(f"replay_{phase}")}
        if asked != "auto" and not offered.intersection(asked.split(",")):
            have = ", ".join(name for name in BUILTIN_NAMES if name in offered)
            return f"{asked}, asked for {phase}, has no replay_{phase}; these have it: {have}"
    return None
