"""Compiles csrc/ into one shared library per instruction-set level, on first use, and loads it.

The kernels are plain C++ behind a C interface; only parallel.cpp sees a header of torch (its thread pool). So a level
takes some seconds to compile, and calls go through ctypes, which releases the GIL.

A library is named after the hash of everything that goes into it (sources, flags, compiler, torch, C++ ABI) and lies
under $TORCH_EXTENSIONS_DIR, else $XDG_CACHE_HOME, else ~/.cache. A file lock lets one of several workers compile while
the others wait for it; the finished file appears under its name in one step.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from gdn_plugin.registry import Problem

SOURCES = Path(__file__).parent / "csrc"
# -ffp-contract=fast (GCC's default, not Clang's) lets a * b + c be one instruction. No -ffast-math: NaN, infinities and
# the order of sums are part of the kernels.
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")


@dataclass(frozen=True, slots=True)
class Level:
    """An instruction-set level: the compiler's flags, and the CPU flags (of /proc/cpuinfo) a machine must show."""

    name: str
    flags: tuple[str, ...]
    needs: frozenset[str]


_AVX2 = frozenset({"avx2", "fma", "f16c", "bmi1", "bmi2", "movbe"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_WIDE = ("-mprefer-vector-width=512",)

# Best first. `plain` has no flags: SSE2 on x86-64, NEON on arm64.
LEVELS = {
    "x86_64": (
        Level("avx512_bf16", ("-march=x86-64-v4", "-mavx512bf16", *_WIDE), _AVX512 | {"avx512_bf16"}),
        Level("avx512", ("-march=x86-64-v4", *_WIDE), _AVX512),
        Level("avx2", ("-march=x86-64-v3",), _AVX2),
        Level("plain", (), frozenset()),
    ),
    "aarch64": (Level("plain", (), frozenset()),),
}

_lock = threading.Lock()
_libraries: dict[str, ctypes.CDLL] = {}
_functions: dict[str, Callable[[bytes], int]] = {}  # of the level in use, by name
_failed: dict[Path, str] = {}  # what the compiler said, by what it was to make: asked again, it would say it again
_compiled = 0
_forced: str | None = None


class BuildError(RuntimeError):
    """The kernels could not be compiled or loaded; the message ends with what the compiler or the loader said."""


@cache
def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def levels() -> tuple[Level, ...]:
    """The levels this machine can run, best first."""
    machine = {"arm64": "aarch64", "amd64": "x86_64"}.get(platform.machine().lower(), platform.machine().lower())
    return tuple(level for level in LEVELS.get(machine, ()) if level.needs <= _cpu_flags())


def level() -> Level:
    """The level in use: the best one, or the one forced by a test."""
    possible = levels()
    if not possible:
        raise BuildError(f"the cpu backend runs on x86_64 and aarch64, this machine is {platform.machine()}")
    if _forced is None:
        return possible[0]
    return next(candidate for candidate in possible if candidate.name == _forced)


@contextlib.contextmanager
def forced_level(name: str) -> Iterator[None]:
    """For tests: every call inside the block, on any thread, runs the named level."""
    global _forced
    names = [candidate.name for candidate in levels()]
    if name not in names:
        raise ValueError(f"level {name!r} does not run on this machine; choose one of: {', '.join(names)}")
    before, _forced = _forced, name
    _functions.clear()
    try:
        yield
    finally:
        _forced = before
        _functions.clear()


def compiler() -> list[str]:
    """The C++ compiler's command: $CXX, else the first of c++, g++, clang++ on PATH."""
    named = os.environ.get("CXX", "").split()
    if named:
        return named
    for name in ("c++", "g++", "clang++"):
        found = shutil.which(name)
        if found is not None:
            return [found]
    raise BuildError("no C++ compiler: none of c++, g++, clang++ is on PATH, and CXX is not set")


def cache_directory() -> Path:
    """Where libraries are kept; made if need be."""
    if os.environ.get("TORCH_EXTENSIONS_DIR"):
        base = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    elif os.environ.get("XDG_CACHE_HOME"):
        base = Path(os.environ["XDG_CACHE_HOME"])
    else:
        base = Path.home() / ".cache"
    directory = base / "gdn_plugin" / "cpu"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if os.access(directory, os.W_OK):
            return directory
    except OSError:  # a read-only home directory
        pass
    directory = Path(tempfile.gettempdir()) / f"gdn_plugin-{os.getuid()}" / "cpu"
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    if directory.stat().st_uid != os.getuid():
        raise BuildError(f"{directory} belongs to another user; set XDG_CACHE_HOME to a directory of your own")
    return directory


def _commands(chosen: Level, target: Path, work: Path) -> list[list[str]]:
    cxx = [*compiler(), *FLAGS, *os.environ.get("CXXFLAGS", "").split()]
    torch_root = Path(torch.__file__).parent
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    includes = ["-isystem", str(torch_root / "include")]
    kernels, parallel = str(work / "kernels.o"), str(work / "parallel.o")
    return [
        [*cxx, *chosen.flags, "-c", str(SOURCES / "kernels.cpp"), "-o", kernels],
        [*cxx, "-fopenmp", abi, *includes, "-c", str(SOURCES / "parallel.cpp"), "-o", parallel],
        # Without -fopenmp here: the OpenMP runtime must be the one that torch has loaded, and the loader finds it.
        [*cxx, "-shared", kernels, parallel, "-o", str(target), f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-lc10"],
    ]


def _key(chosen: Level) -> str:
    digest = hashlib.sha256()
    for source in sorted((*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp"))):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    program = shutil.which(compiler()[0])
    stamp = (program, os.stat(program).st_mtime_ns) if program else compiler()
    commands = _commands(chosen, Path("target"), Path("work"))
    digest.update(repr((commands, stamp, torch.__version__, platform.machine())).encode())
    return digest.hexdigest()[:20]


def _compile(chosen: Level, target: Path) -> None:
    global _compiled
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{target.stem}.") as directory:
        work = Path(directory)
        finished = work / target.name
        for command in _commands(chosen, finished, work):
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode != 0:
                raise BuildError(f"compiling the cpu backend failed\n{' '.join(command)}\n{result.stderr[-4000:]}")
        os.replace(finished, target)
    _compiled += 1


def _open(chosen: Level) -> ctypes.CDLL:
    target = cache_directory() / f"gdn_{chosen.name}_{_key(chosen)}.so"
    if not target.exists():
        with open(target.with_suffix(".lock"), "w") as guard:
            fcntl.flock(guard, fcntl.LOCK_EX)
            if target in _failed:
                raise BuildError(_failed[target])
            if not target.exists():  # another worker may have been faster
                try:
                    _compile(chosen, target)
                except BuildError as exc:
                    _failed[target] = f"{str(exc).splitlines()[0]} (its output was shown when it was tried)"
                    raise
    try:
        return ctypes.CDLL(str(target))
    except OSError as exc:
        raise BuildError(f"the cpu backend was compiled but does not load: {exc}") from exc


def library() -> ctypes.CDLL:
    """The library of the level in use, compiled if it is not in the cache.

    Raises:
        BuildError: no compiler, or it failed.
    """
    chosen = level()
    found = _libraries.get(chosen.name)
    if found is None:
        with _lock:
            found = _libraries.get(chosen.name)
            if found is None:
                found = _libraries[chosen.name] = _open(chosen)
    return found


def function(name: str) -> Callable[[bytes], int]:
    """An entry point of the library in use; it takes the packed arguments and releases the GIL."""
    try:
        return _functions[name]
    except KeyError:
        found = _functions[name] = getattr(library(), name)
        return found


def warm_up(problem: Problem) -> None:
    """Compile and load: one library holds every op, shape and dtype, so `problem` does not matter."""
    library()


def compile_count() -> int:
    """Libraries compiled by this process; those found in the cache do not count."""
    return _compiled
