"""Runs each file of tests/triton in a process whose Triton interprets kernels (see tests/triton/conftest.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.triton import COMPILED

HERE = Path(__file__).parent
FILES = sorted(path for path in (HERE / "triton").glob("test_*.py") if path.name not in COMPILED)

Runs = dict[Path, Future[subprocess.CompletedProcess[str]]]


def run(file: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(file)]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    return subprocess.run(command, env=env, cwd=HERE.parent, capture_output=True, text=True, timeout=1180, check=False)


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[Runs]:
    """Of the files that were selected, in their order; each is one thread of Python, so two run at a time."""
    files = [item.callspec.params["file"] for item in request.session.items if item.path == request.path]
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        yield {file: pool.submit(run, file) for file in files}
        pool.shutdown(cancel_futures=True)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # kernels are compiled beside it in CI
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_interpreted(file: Path, runs: Runs) -> None:
    done = runs[file].result()
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
