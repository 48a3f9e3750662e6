"""Facts in, decision out: which row runs a problem on a platform."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence

from gdn_plugin.registry.backend import Backend, Check, Choice, in_build, split_request
from gdn_plugin.registry.errors import NoBackendError, Verdict
from gdn_plugin.registry.known_bad import known_bad_reasons
from gdn_plugin.registry.platform import Platform
from gdn_plugin.registry.problem import Problem
from gdn_plugin.registry.table import load_failures, rows


def judge(backend: Backend, platform: Platform, problem: Problem, excluded: str | None = None) -> Verdict:
    """The verdict on one row, with every reason. Imports nothing of the backend.

    Args:
        excluded: a reason found elsewhere (a failed self-check) that takes the row out.
    """
    reasons: list[str] = []
    if not in_build(backend.target):
        reasons.append(f"not in this build ({backend.target.partition(':')[0]} is missing)")
    reasons.extend(_sentences(backend.checks, platform, problem))
    reasons.extend(known_bad_reasons(backend.name, platform, problem))
    if excluded is not None:
        reasons.append(excluded)
    if reasons:
        return Verdict(backend.name, supported=False, preferred=False, reasons=tuple(reasons))
    notes = tuple(_sentences(backend.notes, platform, problem))
    against = () if backend.preferred is None else tuple(_sentences((backend.preferred,), platform, problem))
    if against:
        return Verdict(backend.name, supported=True, preferred=False, reasons=against, notes=notes)
    return Verdict(backend.name, supported=True, preferred=True, notes=notes)


def choose(
    platform: Platform,
    problem: Problem,
    request: str = "auto",
    *,
    excluded: Mapping[str, str] | None = None,
    candidates: Sequence[Backend] | None = None,
) -> Choice:
    """The backend for a problem.

    Args:
        request: "auto" takes the first row that is supported and preferred; a name, or names joined by
            commas, are tried in order and never fall back to anything else.
        excluded: backends to leave out, with the reason of each.
        candidates: rows in rank order; by default those of the table and of third parties.
    Raises:
        NoBackendError: nothing that was asked for can run; the error carries the whole trace.
    """
    table = tuple(rows(problem.op) if candidates is None else candidates)
    out = excluded or {}
    verdicts = tuple(judge(row, platform, problem, out.get(row.name)) for row in table)
    pairs = dict(zip((row.name for row in table), zip(table, verdicts, strict=True), strict=True))
    names = split_request(request)
    if names == ("auto",):
        for row, verdict in pairs.values():
            if verdict.preferred:
                return Choice(row.name, row, verdicts, "auto", problem)
        raise NoBackendError(problem, request, verdicts)

    for name in names:
        if name in pairs and pairs[name][1].supported:
            return Choice(name, pairs[name][0], verdicts, request, problem)
    known = tuple(pairs[name][1] for name in names if name in pairs)
    unknown = tuple(_unknown(name, problem.op, list(pairs)) for name in names if name not in pairs)
    hint = f"backends of {problem.op}: {', '.join(pairs)}; auto chooses among them"
    raise NoBackendError(problem, request, known + unknown, hint)


def _sentences(checks: Sequence[Check], platform: Platform, problem: Problem) -> Iterator[str]:
    for check in checks:
        try:
            sentence = check(platform, problem)
        except Exception as exc:  # a third party's check: broken, it speaks against its row and hides nothing
            sentence = f"a check is broken: {type(exc).__name__}: {exc}"
        if sentence is not None:
            yield sentence if isinstance(sentence, str) else f"a check is broken: it says {sentence!r}, not a sentence"


def _unknown(name: str, op: str, valid: list[str]) -> Verdict:
    failure = load_failures().get(name)
    if failure is not None:
        return Verdict(name, supported=False, preferred=False, reasons=(failure,))
    close = difflib.get_close_matches(name, valid, n=1)
    reason = f"no backend of this name offers {op}" + (f"; did you mean {close[0]!r}?" if close else "")
    return Verdict(name, supported=False, preferred=False, reasons=(reason,))
