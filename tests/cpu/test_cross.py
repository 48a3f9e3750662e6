"""The kernels without Python and torch (consistency.cpp): natively, and as arm64 code under an emulator."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from gdn_plugin.backends.cpu import build

pytestmark = pytest.mark.slow  # compiles without a cache
HERE = Path(__file__).parent
ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"


def compile_and_run(compiler: list[str], flags: list[str], emulator: list[str], directory: Path) -> str:
    program = str(directory / "consistency")
    sources = [str(build.SOURCES / "kernels.cpp"), str(HERE / "consistency.cpp")]
    command = [*compiler, *build.FLAGS, "-Wall", "-Wextra", "-Werror", "-Wno-maybe-uninitialized", *flags]
    compiled = subprocess.run(
        [*command, "-I", str(build.SOURCES), *sources, "-o", program], capture_output=True, text=True, check=False
    )
    assert compiled.returncode == 0, compiled.stderr[-4000:]
    ran = subprocess.run([*emulator, program], capture_output=True, text=True, check=False, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_native(tmp_path: Path) -> None:
    output = compile_and_run(build.compiler(), list(build.levels()[0].flags), [], tmp_path)
    assert output.endswith("OK\n")
    assert "TOO LARGE" not in output


def test_arm64(tmp_path: Path) -> None:
    missing = [name for name in (ARM_COMPILER, ARM_EMULATOR) if shutil.which(name) is None]
    if missing:
        pytest.skip(f"not on PATH: {', '.join(missing)} (Debian: apt install g++-aarch64-linux-gnu qemu-user-static)")
    output = compile_and_run([ARM_COMPILER], ["-static"], [ARM_EMULATOR], tmp_path)
    assert output.endswith("OK\n")
