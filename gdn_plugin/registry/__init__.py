"""Platform facts in, backend choice out. Imports no kernel, no host and, until `probe()`, no torch."""

from gdn_plugin.registry.backend import Backend, Check, Choice, Verdict, in_build, load
from gdn_plugin.registry.choice import choose, judge
from gdn_plugin.registry.errors import BackendError, BackendLoadError, NoBackendError, SelfCheckError
from gdn_plugin.registry.platform import Platform
from gdn_plugin.registry.probe import probe
from gdn_plugin.registry.problem import DTYPES, OPS, PHASES, Problem
from gdn_plugin.registry.selection import Selection, select
from gdn_plugin.registry.table import backend_names, rows

__all__ = [
    "DTYPES",
    "OPS",
    "PHASES",
    "Backend",
    "BackendError",
    "BackendLoadError",
    "Check",
    "Choice",
    "NoBackendError",
    "Platform",
    "Problem",
    "Selection",
    "SelfCheckError",
    "Verdict",
    "backend_names",
    "choose",
    "in_build",
    "judge",
    "load",
    "probe",
    "rows",
    "select",
]
