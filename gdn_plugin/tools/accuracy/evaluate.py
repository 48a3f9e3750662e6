"""Rows of the accuracy table: ask an engine, compare with the reference, judge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gdn_plugin.tools.accuracy.reference import Reference
from gdn_plugin.tools.accuracy.report import REFERENCE, Row
from gdn_plugin.tools.accuracy.run import MODES, STOCK, EngineError, Run, ask
from gdn_plugin.tools.accuracy.score import pool, score
from gdn_plugin.tools.accuracy.task import Prompt

Prompts = Mapping[int, Sequence[Prompt]]


def reference_row(reference: Reference, prompts: Prompts, progress: Callable[[int], None] | None = None) -> Row:
    """What the fp32 model itself answers."""
    cells = []
    for length, asked in prompts.items():
        cells.append(score(length, asked, reference.answers(asked, progress), {}))
    return Row(REFERENCE, "-", tuple(cells), note="transformers, whole sequences")


def engine_row(run: Run, model: Path, reference: Reference, *, interpret: bool = False, eager: bool = True) -> Row:
    """What an engine answers; a row with `failure` where it does not come up."""
    try:
        answers = ask(run, model, interpret=interpret, eager=eager)
    except EngineError as problem:
        return Row(run.backend, run.mode, failure=str(problem), log=problem.log)
    cells = []
    for length, prompts in run.prompts.items():
        said = answers.by_length[length]
        truth = reference.log_probabilities(p.tokens + tuple(a["tokens"]) for p, a in zip(prompts, said, strict=True))
        cells.append(score(length, prompts, said, truth))
    notes = ["interpreted"] if interpret else []
    cached = sum(cell.cached_tokens for cell in cells)
    if MODES[run.mode].cached:
        asked = sum(len(prompt.tokens) for prompts in run.prompts.values() for prompt in prompts)
        notes.append(f"{100 * cached / asked:.0f} % cached")
    if MODES[run.mode].speculation:
        notes.append(f"{answers.accepted} of {answers.drafts} drafts accepted")
    return Row(
        run.backend,
        run.mode,
        tuple(cells),
        seconds=answers.seconds,
        drafts=answers.drafts,
        accepted=answers.accepted,
        note="; ".join(notes),
    )


def trouble(rows: Sequence[Row]) -> list[str]:
    """What speaks against the plugin: an engine that failed, or a score that the reference's does not explain.

    Stock vLLM's failures and scores are shown, not judged.
    """
    truth = [cell for row in rows if row.backend == REFERENCE for cell in row.cells]
    found = []
    for row in rows:
        if row.backend in (REFERENCE, STOCK):
            continue
        if row.failure:
            found.append(f"{row.backend}, {row.mode}: {row.failure}")
            continue
        total = pool(row.cells)
        expected = pool([cell for cell in truth if cell.length in {c.length for c in row.cells}])
        _, high = total.interval
        if high < expected.whole / expected.prompts:
            found.append(
                f"{row.backend}, {row.mode}: {total.whole} of {total.prompts} answers are right, at most "
                f"{100 * high:.1f} % with 95 % confidence; the fp32 reference has "
                f"{100 * expected.whole / expected.prompts:.1f} %"
            )
    return found
