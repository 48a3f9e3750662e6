"""Runs each file of tests/triton in a process whose Triton interprets kernels (see tests/triton/conftest.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.triton import COMPILED

HERE = Path(__file__).parent
FILES = sorted(path for path in (HERE / "triton").glob("test_*.py") if path.name not in COMPILED)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # kernels are compiled beside it in CI
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_interpreted(file: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(file)]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=env, cwd=HERE.parent, capture_output=True, text=True, timeout=1180)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
