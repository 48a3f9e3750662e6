"""`gdn-plugin doctor`: the machine, the settings, every verdict. It always prints, whatever is broken."""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import dataclass, field

from packaging.version import InvalidVersion, Version

from gdn_plugin import settings
from gdn_plugin.registry import (
    PHASES,
    BackendError,
    Choice,
    NoBackendError,
    Platform,
    Problem,
    Replay,
    Request,
    Verdict,
    decide,
    load,
    probe,
    replay_request,
    requests,
    select,
)
from gdn_plugin.registry.platform import FLASHINFER_FEATURES, PACKAGES
from gdn_plugin.registry.probe import features, installed_packages
from gdn_plugin.registry.requests import checked
from gdn_plugin.registry.table import load_failures
from gdn_plugin.tools.cli import host
from gdn_plugin.tools.cli.problem import add_problem_arguments, problems
from gdn_plugin.tools.cli.values import BadArguments, as_json, unknown

WIDTH = 80
# What a simulated machine may be given; a real one's are found by looking.
FEATURES = (*FLASHINFER_FEATURES, "cpu.cxx_compiler", "cpu.machine", "triton.interpreter")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--simulate", metavar="sm_NN|cpu", help="a machine that need not exist, up to date")
    parser.add_argument("--cuda", metavar="VERSION", help="its CUDA runtime (13.0)")
    parser.add_argument(
        "--package", action="append", default=[], metavar="NAME=VERSION", help="one of its packages; =none removes it"
    )
    parser.add_argument(
        "--feature", action="append", default=[], metavar="NAME=yes|none", help="one of its features, named as below"
    )
    parser.add_argument("--host", choices=tuple(host.HOSTS), help="report on this host alone; 1 where nothing attaches")
    parser.add_argument(
        "--host-contract", metavar="DIR", help="only list what the plugin would miss in the host unpacked in DIR"
    )
    add_problem_arguments(parser)
    parser.add_argument("--json", action="store_true", help="the same as JSON")


@dataclass
class Report:
    """What doctor found. `trouble` holds what makes it exit with 1."""

    platform: Platform
    simulated: bool
    problem: Problem
    requests: dict[str, Request]
    replay: Replay
    choices: dict[str, Choice] = field(default_factory=dict)
    refused: dict[str, NoBackendError] = field(default_factory=dict)
    hosts: list[host.HostReport] = field(default_factory=list)
    trouble: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def run(args: argparse.Namespace) -> int:
    if args.host_contract is not None:
        return _host_contract(args.host_contract, args.host, args.json)
    report = examine(args)
    print(as_json(as_data(report)) if args.json else as_text(report))
    alone = args.host is not None and not all(found.attach for found in report.hosts)
    return 1 if report.trouble or alone else 0


def _host_contract(directory: str, name: str | None, json: bool) -> int:
    found = host.of_tree(directory)
    if found is None or name not in (None, found.package):
        raise BadArguments(f"--host-contract: no unpacked {name or ' or '.join(host.HOSTS)} in {directory}")
    missing = found.compat().CONTRACT.missing(directory)
    if json:
        print(as_json({"host": found.package, "directory": directory, "missing": missing}))
    else:
        print("\n".join(missing) or f"the plugin finds everything it needs of {found.title} in {directory}")
    return 1 if missing else 0


def examine(args: argparse.Namespace) -> Report:
    """Every probe on its own: what one of them fails on is reported and the others go on."""
    trouble: list[str] = []
    platform = _platform(args, trouble)
    layer = problems(args)
    asked = {phase: Request("auto", "default") for phase in PHASES}
    wrong = _wrong_settings()
    trouble += wrong
    ring = Request("auto", "default")
    if not wrong:
        asked, ring = requests(), replay_request()
    disabled = not wrong and settings.disabled()
    backends = {phase: request.value for phase, request in asked.items()}
    problem = layer["prefill"]
    replay = decide(platform, ring, (problem.dtype, problem.state_dtype), problem.heads, backends=backends)
    report = Report(platform, args.simulate is not None, problem, asked, replay, trouble=trouble)
    _resolve(report, layer)
    report.hosts = [host.report(one, disabled) for name, one in host.HOSTS.items() if args.host in (None, name)]
    for found in report.hosts:
        report.warnings += found.trouble
    report.warnings += load_failures().values()
    if not report.simulated and platform.sm and "flashinfer" in {choice.name for choice in report.choices.values()}:
        report.warnings += _compiler_trouble(platform.sm)
    return report


def _wrong_settings() -> list[str]:
    """Everything that is wrong with the variables, where a start of the plugin would stop at the first thing."""

    def request(phase: str | None) -> None:
        if said := settings.backend_request(phase):
            checked(said[1], said[0])

    found: dict[str, None] = {}
    for check in (settings.check, settings.disabled, settings.self_check, settings.debug, settings.replay_request):
        try:
            check()
        except settings.SettingsError as exc:
            found[str(exc)] = None
    for phase in (None, *PHASES):
        try:
            request(phase)
        except settings.SettingsError as exc:
            found[str(exc)] = None
    return list(found)


def _compiler_trouble(sm: int) -> list[str]:
    """One small compile by FlashInfer's compiler, in a process of its own; the answer is kept on disk."""
    from gdn_plugin.tools.compile_flashinfer import compiler_trouble

    try:
        trouble = compiler_trouble(sm)
    except Exception as exc:  # doctor reports what breaks, and goes on
        trouble = f"FlashInfer's compiler could not be tried: {type(exc).__name__}: {exc}"
    return [trouble] if trouble else []


def _platform(args: argparse.Namespace, trouble: list[str]) -> Platform:
    if args.simulate is not None:
        packages = _pairs("--package", args.package, PACKAGES)
        for name, value in packages.items():
            _checked_version(name, value)
        try:
            return Platform.simulated(
                args.simulate, cuda=args.cuda, packages=packages, features=_pairs("--feature", args.feature, FEATURES)
            )
        except ValueError as exc:
            raise BadArguments(str(exc)) from exc
    if args.cuda is not None or args.package or args.feature:
        raise BadArguments("--cuda, --package and --feature describe a simulated machine: give --simulate too")
    try:
        return probe()
    except Exception as exc:  # a broken torch or driver can raise anything, and is just what doctor is asked about
        trouble.append(f"this machine could not be probed: {type(exc).__name__}: {exc}")
        return Platform("cpu", packages=installed_packages(), features=features())


def _pairs(flag: str, texts: list[str], valid: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise BadArguments(f"{flag}: {text!r} is not NAME=VALUE")
        if name not in valid:
            raise BadArguments(f"{flag} {unknown(name, valid)}")
        found[name] = value
    return found


def _checked_version(package: str, value: str) -> None:
    if value.lower() == "none":
        return
    try:
        Version(value)
    except InvalidVersion:
        raise BadArguments(f"--package {package}: {value!r} is neither a version nor none") from None


def _resolve(report: Report, layer: dict[str, Problem]) -> None:
    """Each op on its own, so that one that nothing can run does not hide the others."""
    wanted = {phase: request.value for phase, request in report.requests.items()}
    for op, problem in layer.items():
        try:
            choice = select(report.platform, {op: problem}, wanted)[op]
        except NoBackendError as exc:
            report.refused[op] = exc
            report.trouble.append(f"{op}: nothing can run as requested ({exc.request})")
            continue
        report.choices[op] = choice
        if report.simulated:
            continue
        try:
            load(choice.backend)
        except BackendError as exc:
            report.trouble.append(f"{op}: {exc}")


def as_data(report: Report) -> dict[str, object]:
    """What --json prints."""
    platform = report.platform
    selection: dict[str, object] = {}
    for op in (*report.choices, *report.refused):
        choice = report.choices.get(op)
        verdicts = choice.verdicts if choice is not None else report.refused[op].verdicts
        request = choice.request if choice is not None else report.refused[op].request
        selection[op] = {
            "backend": None if choice is None else choice.name,
            "request": request,
            "verdicts": [
                {
                    "backend": v.backend,
                    "supported": v.supported,
                    "preferred": v.preferred,
                    "reasons": list(v.reasons),
                    "notes": list(v.notes),
                }
                for v in verdicts
            ],
        }
    return {
        "platform": {
            "name": platform.name,
            "simulated": report.simulated,
            "device": platform.device,
            "sm": platform.sm,
            "cuda": platform.cuda,
            "sm_count": platform.sm_count,
            "packages": dict(platform.packages),
            "features": dict(platform.features),
        },
        "settings": {
            **settings.in_force(),
            "requests": {p: {"value": r.value, "source": r.source} for p, r in report.requests.items()},
        },
        "replay": {"slots": report.replay.slots, "why": report.replay.why},
        "selection": selection,
        "hosts": {found.host.package: found.as_dict() for found in report.hosts},
        "trouble": report.trouble,
        "warnings": report.warnings,
    }


def as_text(report: Report) -> str:
    """At most 80 columns, readable without colour."""
    lines = [*_platform_lines(report), "", *_settings_lines(report), ""]
    p = report.problem
    lines.append(
        f"Backends for Hk={p.num_k_heads}, Hv={p.num_v_heads}, K={p.head_k_dim}, V={p.head_v_dim}, "
        f"{p.dtype}, state {p.state_dtype}"
    )
    for op in (*report.choices, *report.refused):
        lines += _op_lines(op, report)
    words = {True: "the plugin would attach", False: "the plugin would not attach", None: "attaching: unknown"}
    for found in report.hosts:
        lines += ["", found.host.title]
        lines += _wrap(found.package or "not installed", "  ")
        lines += _wrap(f"{words[found.attach]}: {found.reason}", "  ")
    for title, sentences in (("Warnings", report.warnings), ("Trouble", report.trouble)):
        if sentences:
            lines += ["", title]
            for sentence in sentences:
                lines += _wrap(sentence, "  - ")
    return "\n".join(lines)


def _platform_lines(report: Report) -> list[str]:
    platform = report.platform
    text = platform.device
    if platform.device == "cuda":
        text += (
            f", SM {platform.sm}, {platform.sm_count or 'an unknown number of'} multiprocessors, CUDA {platform.cuda}"
        )
    lines = ["Platform" + (" (simulated)" if report.simulated else ""), f"  {'device':<30}{text}"]
    for package in PACKAGES:
        if package in platform.packages or not package.startswith("vllm"):
            lines.append(f"  {package:<30}{platform.packages.get(package, 'not installed')}")
    grouped: dict[str, list[str]] = {}
    for name, value in sorted(platform.features.items()):
        group, _, rest = name.rpartition(".")
        grouped.setdefault(group, []).append(rest if value == "yes" else f"{rest}={value}")
    for group, names in grouped.items():
        lines += _column(group, ", ".join(names))
    return lines


def _settings_lines(report: Report) -> list[str]:
    lines = ["Settings"]
    for name, value in settings.in_force().items():
        lines.append(f"  {name:<30}{value or 'unset'}")
    for phase, request in report.requests.items():
        if request.value != "auto":
            lines += _column(f"so {phase} asks for", f"{request.value} (from {request.source})")
    return lines + _wrap(report.replay.describe(), "  ")


def _op_lines(op: str, report: Report) -> list[str]:
    choice = report.choices.get(op)
    if choice is None:
        refused = report.refused[op]
        lines = [f"  {op}: NONE (asked for: {refused.request})"]
        verdicts: tuple[Verdict, ...] = refused.verdicts
    else:
        asked = "auto" if choice.request == "auto" else f"asked for: {choice.request}"
        lines = [f"  {op}: {choice.name} ({asked})"]
        for note in choice.verdict.notes:
            lines += _wrap(note, "    * ")
        verdicts = choice.verdicts
    for verdict in verdicts:
        if choice is not None and verdict.backend == choice.name:
            continue
        can = "can run" if verdict.supported else "cannot run"
        reasons = verdict.reasons or ("ranks lower",)
        if len(reasons) == 1:
            lines += _wrap(f"{verdict.backend} {can}: {reasons[0]}", "    ")
            continue
        lines.append(f"    {verdict.backend} {can}:")
        for reason in reasons:
            lines += _wrap(reason, "      - ")
    return lines


def _column(name: str, text: str) -> list[str]:
    first = f"  {name:<30}"
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=" " * len(first))


def _wrap(text: str, indent: str) -> list[str]:
    # A command to copy must not be cut at its hyphens.
    return textwrap.wrap(
        text, WIDTH, initial_indent=indent, subsequent_indent=" " * (len(indent) + 2), break_on_hyphens=False
    )
