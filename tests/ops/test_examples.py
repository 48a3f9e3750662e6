"""The examples that need no host, run as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(name, *args):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / name, *args], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_custom_backend():
    assert "went through 'counting' 1 time" in run("custom_backend.py")


@pytest.mark.slow
def test_compiled_block():
    assert "compiled decode" in run("compiled_block.py", "--backend", "torch")
