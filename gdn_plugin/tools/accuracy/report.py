"""The accuracy table: one row an engine, one column a length."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gdn_plugin.tools.accuracy.score import Cell, pool

REFERENCE = "fp32 reference"
WIDTH = 80


@dataclass(frozen=True, slots=True)
class Row:
    """One engine's cells, or why there are none."""

    backend: str
    mode: str
    cells: tuple[Cell, ...] = ()
    failure: str = ""
    log: str = ""
    seconds: float = 0.0
    drafts: int = 0
    accepted: int = 0
    note: str = ""


def header(lengths: Sequence[int]) -> str:
    """The line above the rows on a terminal: whole answers in percent by length, then all with their interval."""
    return f"{'backend':<15}{'mode':<11}" + "".join(f"{n:>6}" for n in lengths) + "   all [95 % interval] |dlogp|"


def line(row: Row) -> list[str]:
    """A row for a terminal: one line of 80 columns where there are four lengths, more where the engine failed."""
    head = f"{row.backend:<15}{row.mode:<11}"
    if row.failure:
        return [f"{head}FAILED", *_wrapped(row.failure), *([f"  log: {row.log}"] if row.log else [])]
    total = pool(row.cells)
    low, high = total.interval
    shares = "".join(f"{100 * cell.whole / cell.prompts:>6.1f}" for cell in row.cells)
    error = "" if math.isnan(total.log_probability_error) else f"{total.log_probability_error:8.4f}"
    return [f"{head}{shares:<24}{100 * total.whole / total.prompts:6.1f} [{100 * low:5.1f},{100 * high:6.1f}]{error}"]


def _wrapped(sentence: str, indent: str = "  ") -> list[str]:
    return textwrap.wrap(sentence, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def markdown(rows: Sequence[Row], versions: Mapping[str, str], command: str) -> str:
    """A Markdown table: whole answers in percent, by length and all together with their interval."""
    lengths = sorted({cell.length for row in rows for cell in row.cells})
    counts = {length: max(c.prompts for row in rows for c in row.cells if c.length == length) for length in lengths}
    titles = ["GDN served by", "mode", *(f"{length} tokens" for length in lengths)]
    titles += ["all (95 % interval)", "first token", "mean abs. Δ log p", "note"]
    lines = ["| " + " | ".join(titles) + " |", "| " + " | ".join("---" for _ in titles) + " |"]
    failed: list[str] = []
    for row in rows:
        if row.failure:
            empty = " | ".join("-" for _ in titles[2:-1])
            lines.append(f"| {row.backend} | {row.mode} | {empty} | failed |")
            failed += ["", *_wrapped(f"{row.backend}, {row.mode}: {row.failure}", "")]
            continue
        cells = {cell.length: cell for cell in row.cells}
        shown = [f"{100 * cells[n].whole / cells[n].prompts:.1f}" if n in cells else "-" for n in lengths]
        total = pool(row.cells)
        low, high = total.interval
        shown.append(f"{100 * total.whole / total.prompts:.1f} ({100 * low:.1f} to {100 * high:.1f})")
        shown.append(f"{100 * total.first / total.prompts:.1f}")
        shown.append("-" if math.isnan(total.log_probability_error) else f"{total.log_probability_error:.4f}")
        notes = [row.note] if row.note else []
        if any(cell.prompts < counts[cell.length] for cell in row.cells):
            notes.append(f"{total.prompts} prompts")
        lines.append(f"| {row.backend} | {row.mode} | {' | '.join(shown)} | {'; '.join(notes)} |")
    asked = ", ".join(f"{counts[length]} of {length} tokens" for length in lengths)
    made = f"Made by `{command}` with " + ", ".join(f"{n} {v}" for n, v in versions.items()) + "."
    lines += [*failed, "", *_wrapped(f"Prompts: {asked}. {made}", "")]
    return "\n".join(lines) + "\n"


def as_json(rows: Sequence[Row], versions: Mapping[str, str]) -> str:
    """Rows as JSON, intervals included."""
    listed: list[dict[str, Any]] = []
    for row in rows:
        entry = asdict(row)
        del entry["log"]
        entry["cells"] = [_cell(cell) for cell in row.cells]
        entry["all"] = _cell(pool(row.cells)) if row.cells else None
        listed.append(entry)
    return json.dumps({"versions": dict(versions), "rows": listed}, indent=2)


def _cell(cell: Cell) -> dict[str, Any]:
    entry = asdict(cell) | {"interval": list(cell.interval)}
    if math.isnan(cell.log_probability_error):
        entry["log_probability_error"] = None  # JSON has no nan
    return entry
