"""The ops of one layer, resolved together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from gdn_plugin.registry.backend import Choice, split_request
from gdn_plugin.registry.choice import choose, judge
from gdn_plugin.registry.platform import Platform
from gdn_plugin.registry.problem import Problem
from gdn_plugin.registry.table import rows
from gdn_plugin.settings import PHASES


@dataclass(frozen=True)
class Selection:
    """A backend for each op of a layer.

    Args:
        platform: what it was resolved for.
        choices: by op.
        requests: what the user asked for, by phase.
    """

    platform: Platform
    choices: Mapping[str, Choice]
    requests: Mapping[str, str]

    def __post_init__(self) -> None:
        # A frozen selection must not change through the dicts it was made from.
        object.__setattr__(self, "choices", MappingProxyType(dict(self.choices)))
        object.__setattr__(self, "requests", MappingProxyType(dict(self.requests)))

    def __reduce__(self) -> tuple[type[Selection], tuple[object, ...]]:
        return type(self), (self.platform, dict(self.choices), dict(self.requests))

    def __getitem__(self, op: str) -> Choice:
        return self.choices[op]

    def __contains__(self, op: object) -> bool:
        return op in self.choices

    def fuses(self, phase: str) -> bool:
        """Whether a step of a phase ("decode", "verify") should go through its fused op.

        True where the backend that serves the phase was chosen for the fused op too: the fused step must not take the
        work away from a backend that was asked for by name, or is the best, and has no fused kernel.
        """
        fused = self.choices.get(f"fused_{phase}")
        return fused is not None and (phase not in self.choices or fused.name == self.choices[phase].name)

    def reached(self) -> list[Choice]:
        """The choices that a layer's steps come to: of a phase either its op or its fused one."""
        plain = {f"fused_{phase}": phase for phase in ("decode", "verify")}
        return [
            choice
            for op, choice in self.choices.items()
            if (self.fuses(plain[op]) if op in plain else not self.fuses(op))
        ]

    def backends(self) -> dict[str, str]:
        """The chosen backend's name by op."""
        return {op: choice.name for op, choice in self.choices.items()}

    def describe(self) -> list[str]:
        """One line a choice: the backend, and why each better-ranked one lost."""
        return [choice.describe() for choice in self.choices.values()]


def select(
    platform: Platform,
    problems: Mapping[str, Problem],
    requests: Mapping[str, str] | None = None,
    *,
    excluded: Mapping[str, Mapping[str, str]] | None = None,
) -> Selection:
    """Resolve every op of a layer.

    conv_prologue and gated_norm follow the request for prefill, fused_decode that for decode and fused_verify that for
    verify, where a backend that was asked for offers the op and can run it; otherwise they are chosen by auto, since
    the user named a backend for the phase and not for these. replay_decode and replay_verify take the phase's place: of
    the backends that were asked for and offer the op one must be able to run it.

    Args:
        problems: by op; an op that is left out is not resolved.
        requests: by phase, "auto" where left out.
        excluded: by op, backends to leave out, with the reason of each (failed self-checks).
    Raises:
        NoBackendError: a named request that cannot run.
        ValueError: a request for a phase that does not exist.
    """
    wanted = dict.fromkeys(PHASES, "auto") | dict(requests or {})
    for phase in wanted:
        if phase not in PHASES:
            raise ValueError(f"phase {phase!r} is not valid; choose one of: {', '.join(PHASES)}")
    choices = {}
    for op, problem in problems.items():
        if problem.op != op:
            raise ValueError(f"problems[{op!r}] is for {problem.op!r}")
        out = (excluded or {}).get(op, {})
        request = wanted[problem.phase]
        if op not in PHASES:
            request = _followed(platform, problem, request, out)
        choices[op] = choose(platform, problem, request, excluded=out)
    return Selection(platform, choices, wanted)


def _followed(platform: Platform, problem: Problem, request: str, out: Mapping[str, str]) -> str:
    """The request that an op without a setting of its own takes from its phase."""
    table = {row.name: row for row in rows(problem.op)}
    offering = [name for name in split_request(request) if name in table]
    able = [name for name in offering if judge(table[name], platform, problem, out.get(name)).supported]
    if not able and problem.op in ("replay_decode", "replay_verify"):
        able = offering
    return ",".join(able) if able else "auto"
