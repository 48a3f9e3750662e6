"""Platform facts in, backend choice out. Imports no kernel, no host and, until `probe()`, no torch."""

from gdn_plugin.registry.backend import Backend, BackendOp, Check, Choice, Variant, Wants, in_build, load
from gdn_plugin.registry.choice import choose, judge
from gdn_plugin.registry.errors import BackendError, BackendLoadError, NoBackendError, SelfCheckError, Verdict
from gdn_plugin.registry.platform import Platform
from gdn_plugin.registry.probe import probe
from gdn_plugin.registry.problem import DTYPES, OPS, PADDING, PHASE_OF_OP, Problem
from gdn_plugin.registry.replay import USUAL_SLOTS, Replay, decide, ring_slots
from gdn_plugin.registry.requests import Request, replay_request, requests
from gdn_plugin.registry.selection import Selection, select
from gdn_plugin.registry.table import backend_names, rows
from gdn_plugin.settings import PHASES, SettingsError

__all__ = [
    "DTYPES",
    "OPS",
    "PADDING",
    "PHASES",
    "PHASE_OF_OP",
    "USUAL_SLOTS",
    "Backend",
    "BackendError",
    "BackendLoadError",
    "BackendOp",
    "Check",
    "Choice",
    "NoBackendError",
    "Platform",
    "Problem",
    "Replay",
    "Request",
    "Selection",
    "SelfCheckError",
    "SettingsError",
    "Variant",
    "Verdict",
    "Wants",
    "backend_names",
    "choose",
    "decide",
    "in_build",
    "judge",
    "load",
    "probe",
    "replay_request",
    "requests",
    "ring_slots",
    "rows",
    "select",
]
