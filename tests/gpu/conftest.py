"""Everything here needs a CUDA device; `make gpu` runs it. Each skip names what is missing."""

from __future__ import annotations

import importlib

import pytest
import torch


def pytest_collection_modifyitems(items):
    for item in items:
        if "/gpu/" in item.path.as_posix():
            item.add_marker("gpu")
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


@pytest.fixture
def backend_function():
    """(backend, op) -> what runs the op; skips where the backend's package or the op is missing here."""
    from gdn_plugin.registry import BackendLoadError, load, rows

    def find(backend: str, op: str):
        row = next((row for row in rows(op) if row.name == backend), None)
        if row is None:
            pytest.skip(f"{backend} has no {op}")
        try:
            if backend in ("triton", "flashinfer"):
                importlib.import_module(backend)
            return load(row).run
        except (ImportError, BackendLoadError) as exc:
            pytest.skip(f"{backend} cannot be loaded: {exc}")

    return find
