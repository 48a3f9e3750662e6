"""What the registry's tests share: problems by keyword, a complete build, rows of third parties."""

from __future__ import annotations

import importlib.metadata
from types import SimpleNamespace

import pytest

from gdn_plugin.registry import Problem, choice
from gdn_plugin.registry.external import GROUP, external


@pytest.fixture
def problem():
    def make(op="prefill", **changed):
        fields = {
            "dtype": "bfloat16",
            "state_dtype": "float32",
            "num_k_heads": 16,
            "num_v_heads": 32,
            "head_k_dim": 128,
            "head_v_dim": 128,
            "padding": "scratch",  # as hosts call
        }
        return Problem(op=op, **(fields | changed))

    return make


@pytest.fixture
def complete_build(monkeypatch):
    """Every row's module counts as there, whatever this checkout holds: what decides is the platform."""
    monkeypatch.setattr(choice, "in_build", lambda target: True)


@pytest.fixture
def third_party(monkeypatch):
    """Install entry points: third_party(name=object, ...); an exception is raised on load."""

    def install(**offers):
        def load(offer):
            if isinstance(offer, BaseException):
                raise offer
            return offer

        points = [
            SimpleNamespace(name=name, value=f"{name}.module:OFFER", load=lambda offer=offer: load(offer))
            for name, offer in offers.items()
        ]
        real = importlib.metadata.entry_points

        def entry_points(*, group):
            return points if group == GROUP else real(group=group)

        monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
        external.cache_clear()

    yield install
    monkeypatch.undo()
    external.cache_clear()
