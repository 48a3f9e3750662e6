"""Where auto takes a backend that can run: measured, as data with its source.

A row says on which architectures and for how much parallel work a backend wins. Replace numbers by measured ones;
the code that reads them stays. The first row that matches a problem decides; where none does, auto passes the
backend over. Work is counted in waves, num_sequences * num_v_heads / sm_count: how often one block for each sequence
and head fills the device. A problem whose size is unknown (0) matches only rows that ask nothing of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from gdn_plugin.registry.backend import Check
from gdn_plugin.registry.checks import bound
from gdn_plugin.registry.platform import Platform
from gdn_plugin.registry.problem import Problem


@dataclass(frozen=True, slots=True)
class Preference:
    """One measured judgement.

    Args:
        backend, op: what it is about.
        sms: architectures it was measured on or stands for.
        wins: whether auto takes the backend here.
        reason: where it does not win, the sentence that auto gives.
        source: the numbers.
        max_waves: only for less work than this; None = any, unknown included.
        min_tokens_per_sequence: only for sequences at least this long on average.
        min_value_heads: only for layers with at least this many value heads on a rank.
        feature: only where this was found.
    """

    backend: str
    op: str
    sms: tuple[int, ...]
    wins: bool
    source: str
    reason: str = ""
    max_waves: float | None = None
    min_tokens_per_sequence: int | None = None
    min_value_heads: int | None = None
    feature: str | None = None

    def matches(self, platform: Platform, problem: Problem) -> bool:
        if platform.sm not in self.sms or (self.feature is not None and not platform.has(self.feature)):
            return False
        if self.min_value_heads is not None and problem.num_v_heads < self.min_value_heads:
            return False
        if self.max_waves is not None:
            if not (problem.num_sequences and platform.sm_count):
                return False
            waves = problem.num_sequences * problem.num_v_heads / platform.sm_count
            if waves >= self.max_waves:
                return False
        if self.min_tokens_per_sequence is not None:
            if not (problem.num_sequences and problem.num_tokens):
                return False
            return problem.num_tokens / problem.num_sequences >= self.min_tokens_per_sequence
        return True


# FlashInfer 0.7.2 takes its context-parallel route by itself below 1/4 wave on SM 100, 1/2 on SM 90 and 1/3 on the
# GDDR cards of SM 120 (gdn_kernels/delta_rule_dsl/varlen_helper.py, should_use_cp_host).
PREFERENCES: tuple[Preference, ...] = (
    # That route splits long sequences over the device, so few of them do not starve it.
    Preference(
        "flashinfer",
        "prefill",
        sms=(100, 103),
        wins=True,
        max_waves=0.25,
        min_tokens_per_sequence=2048,
        feature="flashinfer.prefill.use_cp",
        source="B300, Hk=2, Hv=8: 1x16384 148 us against 531 (FLA-Triton), 1x65536 343 against 2065 (flashinfer#4078); "
        "from 2048 on by analogy with H100",
    ),
    Preference(
        "flashinfer",
        "prefill",
        sms=(100, 103),
        wins=False,
        max_waves=0.25,
        reason="one block a sequence and head starves this device below 1/4 wave of sequences x heads",
        source="B200, Hk=2, Hv=8: 1x8192 (0.05 waves) 330 us against 338 (FLA-Triton), a tie; 8x1024 (0.43 waves) "
        "63 us against 214: the limit lies between, and FlashInfer's own is 1/4",
    ),
    Preference(
        "flashinfer",
        "prefill",
        sms=(100, 103),
        wins=True,
        source="B200, Hk=2, Hv=8: 8x1024 63 us against 214 (FLA-Triton)",
    ),
    Preference(
        "flashinfer",
        "prefill",
        sms=(90,),
        wins=True,
        min_value_heads=16,
        source="this plugin on one H100 (flashinfer 0.7.2, triton 3.6, 2026-11-23), CUDA graphs, Hk=16, Hv=32: 8x1024 "
        "129 us against 265 (triton), 1x8192 247 against 403, 1x32768 771 against 1542, 32x256 201 against 303, "
        "15 ragged sequences 177 against 315, 1x2048 113 against 113. One H200 (2026-11-28), Hk=8, Hv=16: 62 against "
        "131, 1x8192 152 against 363, 32x256 98 against 153, 1x2048 80 against 94",
    ),
    Preference(
        "flashinfer",
        "prefill",
        sms=(90,),
        wins=True,
        max_waves=0.5,
        min_tokens_per_sequence=8192,
        feature="flashinfer.prefill.use_cp",
        source="this plugin, one H100 (2026-11-23), CUDA graphs: Hv=8 1x8192 124 us against 204 (triton), 1x32768 257 "
        "against 765; Hv=4 98 against 113, 193 against 403. flashinfer#3866, Hk=2, Hv=8: 1x65536 399 us against 1954 "
        "(FLA-Triton), 1x2048 61 against 86; at 1x2048 triton is ahead, see the next row",
    ),
    Preference(
        "flashinfer",
        "prefill",
        sms=(90,),
        wins=False,
        reason="on SM 90 with few value heads a few sequences of 1000 or 2000 tokens starve its kernel",
        source="this plugin, one H100 (flashinfer 0.7.2, triton 3.6, 2026-11-23), CUDA graphs: Hv=8 8x1024 132 us "
        "against 91 (triton), 1x2048 65 against 54; Hv=4 106 against 57, 61 against 46. It wins 32x256 (Hv=8 59 to "
        "87, Hv=4 28 against 46), but the batch is not known when a layer chooses",
    ),
    Preference(
        "flashinfer",
        "prefill",
        sms=(120,),
        wins=True,
        max_waves=1 / 3,
        min_tokens_per_sequence=32768,
        feature="flashinfer.prefill.use_cp",
        source="RTX PRO 6000, Hk=2, Hv=8: 1x32768 403 us against 1123 (FLA-Triton), 1x65536 677 against 2338 "
        "(flashinfer#3659)",
    ),
    Preference(
        "flashinfer",
        "prefill",
        sms=(120,),
        wins=False,
        reason="on SM 120 measured faster only for few very long sequences",
        source="flashinfer#3479: without the context-parallel route 1x65536 takes 5922 us",
    ),
)

_UNMEASURED = {
    "decode": "auto takes triton, whose fused decode is one launch for the whole step",
    "verify": "not measured to be faster than triton",
}


def measured(backend: str) -> Check:
    """For `preferred`: what the rows above say about a backend."""

    return bound(_measured, backend)


def _measured(backend: str, platform: Platform, problem: Problem) -> str | None:
    for row in PREFERENCES:
        if row.backend == backend and row.op == problem.op and row.matches(platform, problem):
            return None if row.wins else row.reason
    return _UNMEASURED.get(problem.op, f"no measurement says that {backend} wins here")
