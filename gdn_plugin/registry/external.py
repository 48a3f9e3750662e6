"""Rows of third parties, from the entry-point group `gdn_plugin.backends`.

An entry point names a mapping from op to `Backend` (or to a sequence of them), or a function without arguments
that returns one:

    [project.entry-points."gdn_plugin.backends"]
    mine = "my_package.gdn:BACKENDS"

    BACKENDS = {"prefill": Backend("mine", "my_package.gdn:prefill", checks=(needs_sm_at_least(90),))}

Third-party rows rank above the plugin's own, so that auto takes one wherever its checks pass and its `preferred`
says None. A package that is broken costs its own rows and nothing else.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from gdn_plugin.registry.backend import Backend, Wants
from gdn_plugin.registry.problem import OPS

GROUP = "gdn_plugin.backends"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class External:
    """Third-party rows by op, and why an entry point gave none, by its name."""

    rows: Mapping[str, tuple[Backend, ...]] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)


@functools.cache
def external() -> External:
    """The rows of every installed third party. Entry points are read once a process."""
    rows: dict[str, list[Backend]] = {}
    failures: dict[str, str] = {}
    for point in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda p: p.name):
        try:
            offered = _offered(point.load())
        except (Exception, SystemExit) as exc:  # a third party's code may do anything; the server must live on
            failures[point.name] = f"entry point {point.name} = {point.value} failed: {type(exc).__name__}: {exc}"
            _log.warning("gdn_plugin: %s", failures[point.name])
            continue
        for op, backends in offered.items():
            rows.setdefault(op, []).extend(backends)
    return External(MappingProxyType({op: tuple(backends) for op, backends in rows.items()}), failures)


def _offered(loaded: object) -> dict[str, tuple[Backend, ...]]:
    offer = loaded() if callable(loaded) else loaded
    if not isinstance(offer, Mapping):
        raise TypeError(f"expected a mapping from op to Backend, got {type(offer).__name__}")
    checked: dict[str, tuple[Backend, ...]] = {}
    for op, value in offer.items():
        if op not in OPS:
            raise ValueError(f"op {op!r} is not valid; choose one of: {', '.join(OPS)}")
        backends = tuple(value) if isinstance(value, Sequence) else (value,)
        for backend in backends:
            if not isinstance(backend, Backend):
                raise TypeError(f"{op}: expected Backend, got {type(backend).__name__}")
            if not backend.name.replace("_", "").replace("-", "").isalnum() or backend.name == "auto":
                raise ValueError(f"{op}: {backend.name!r} cannot be a backend's name")
            for name, given in (("checks", backend.checks), ("notes", backend.notes)):
                if not isinstance(given, tuple) or not all(map(callable, given)):
                    raise TypeError(f"{op}: {backend.name}: {name} must be a tuple of functions; got {given!r}")
            if not isinstance(backend.wants, Wants):
                raise TypeError(f"{op}: {backend.name}: wants must be Wants(...); got {backend.wants!r}")
        checked[op] = backends
    return checked
