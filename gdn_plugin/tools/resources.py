"""Registers, spills and shared memory of a kernel, read from its GPU code by `cuobjdump`."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

_LINE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True, slots=True)
class Resources:
    """Of a kernel's functions the most each.

    Args:
        registers: a thread.
        spills: bytes of stack and local memory a thread.
        shared: bytes of shared memory a block that are fixed in the code; what a launch adds is not among them.
    """

    registers: int
    spills: int
    shared: int


def cuobjdump() -> str | None:
    """The tool on PATH, or the one that ships with Triton."""
    found = shutil.which("cuobjdump")
    spec = None if found else importlib.util.find_spec("triton")
    if spec is not None and spec.submodule_search_locations:
        shipped = Path(next(iter(spec.submodule_search_locations))) / "backends/nvidia/bin/cuobjdump"
        found = str(shipped) if shipped.exists() else None
    return found


def resources(cubin: bytes) -> Resources | None:
    """None where there is no code to read or no tool to read it with."""
    tool = cuobjdump()
    if tool is None or not cubin:
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=False)
    found = [tuple(map(int, groups)) for groups in _LINE.findall(done.stdout)]
    if not found:
        return None
    return Resources(max(r for r, *_ in found), max(s + m for _, s, _, m in found), max(h for _, _, h, _ in found))
