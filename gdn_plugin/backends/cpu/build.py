"""Compiles csrc/ into one shared library per instruction-set level, on first use, and loads it.

A library is named after the hash of what it is made from: sources, flags, torch. Which compiler made it does not
matter, so a finished one serves where there is none any more. It ends with a checksum: what was damaged, cut off or
half written is found before the loader maps it, and made again.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

import torch
from filelock import FileLock

from gdn_plugin import cache as cache_folder
from gdn_plugin import child
from gdn_plugin.ops.record import OPS, Op
from gdn_plugin.registry import BackendError, Platform, Problem, Variant

SOURCES = Path(__file__).parent / "csrc"
# -ffp-contract=fast (GCC's default, not Clang's) lets a * b + c be one instruction. No -ffast-math: NaN, infinities and
# the order of sums are part of the kernels.
FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno",
    "-fno-trapping-math", "-Wno-psabi",
)  # fmt: skip
# The files that see torch's headers, which newer versions write in C++20.
TORCH_FLAGS = ("-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-Wno-psabi")
TORCH_SOURCES = ("bindings", "parallel")
_SEAL = b"gdn-plugin:sha256:"  # at the end of a finished library, before the checksum of all that precedes it

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Level:
    """An instruction-set level: the compiler's flags, and the CPU flags (of /proc/cpuinfo) a machine must show."""

    name: str
    flags: tuple[str, ...]
    needs: frozenset[str]

    @property
    def namespace(self) -> str:
        """Where its ops are: torch.ops.<namespace>. Several levels may be loaded in one process."""
        return f"gdn_cpu_{self.name}"


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
_libraries: dict[str, torch.library.Library] = {}  # by level; as long as they are kept, their ops exist
_operators: dict[str, Any] = {}  # of the level in use, by op
_failed: dict[tuple[str, ...], str] = {}  # by library and compiler: asked again, it would say the same again
_compiled = 0
_forced: str | None = None


class BuildError(BackendError):
    """The kernels could not be compiled or loaded; one sentence, and what the compiler said, if it was asked."""


class _FolderError(RuntimeError):
    """A folder in which no library can be made or used. Another one may do."""


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
    _operators.clear()
    try:
        yield
    finally:
        _forced = before
        _operators.clear()


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


def operator(op: str) -> Any:
    """torch.ops.gdn_cpu_<level>.<op> of the level in use, compiled and loaded if need be.

    Raises:
        BuildError: no compiler, it failed, or there is no folder for the library.
    """
    try:
        return _operators[op]
    except KeyError:
        chosen = level()
        library(chosen)
        found = _operators[op] = getattr(getattr(torch.ops, chosen.namespace), op).default
        return found


def library(chosen: Level) -> None:
    """Load a level's ops, once a process; compile them if no folder has them finished."""
    with _lock:
        if chosen.name not in _libraries:
            _find_or_build(chosen)
            _libraries[chosen.name] = _define(chosen)


def variants(platform: Platform, problem: Problem, pool: torch.Tensor | None = None) -> tuple[Variant, ...]:
    """One library holds every op, shape and dtype."""
    if pool is not None:
        return ()
    chosen = level()
    return (Variant(f"library {chosen.name}", functools.partial(library, chosen)),)


def compile_count() -> int:
    """Libraries compiled by this process; those found in the cache do not count."""
    return _compiled


def file_name(chosen: Level) -> str:
    """What a level's library is called: the same for every compiler, on every machine that can run it."""
    digest = hashlib.sha256()
    for source in sorted((*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp"))):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    own = os.environ.get("CXXFLAGS", "").split()
    native = sorted(_cpu_flags()) if any("native" in flag for flag in own) else ()
    made_from = (FLAGS, TORCH_FLAGS, chosen.flags, own, native, torch.__version__, torch.version.git_version)
    digest.update(repr((made_from, torch.compiled_with_cxx11_abi(), platform.machine())).encode())
    return f"gdn_{chosen.name}_{digest.hexdigest()[:20]}.so"


def _define(chosen: Level) -> torch.library.Library:
    """Give the functions that a loaded library has registered the schemas of the ops' records."""
    namespace = torch.library.Library(chosen.namespace, "DEF")
    for record in OPS.values():
        namespace.define(record.name + _schema(record))
    return namespace


def _schema(record: Op) -> str:
    """The op's `_out` form, without its hints and without the backend's name."""
    return record.without_hints().schema(out=True).replace(", str backend)", ")")


def _find_or_build(chosen: Level) -> None:
    """Load a finished library from the first folder that has one, else make it in the first folder that takes it."""
    name = file_name(chosen)
    folders = cache_folder.folders("cpu")
    unfit = None  # the checksum of a whole library that does not load here
    reasons = []
    for folder in folders:
        try:
            seal = _seal_of(folder / name)
            if seal is not None:
                unfit = seal
                _load(folder / name)
                return
        except _FolderError as exc:
            reasons.append(str(exc))
    try:
        attempt = (name, *compiler())
    except BuildError as exc:
        raise BuildError("; ".join([str(exc), *reasons])) from None
    if attempt in _failed:
        raise BuildError(_failed[attempt])
    for folder in folders:
        try:
            _load(_build(chosen, folder, unfit))
            if reasons:
                _log.warning("gdn_plugin: %s; %s is used", "; ".join(dict.fromkeys(reasons)), folder)
            return
        except (_FolderError, cache_folder.CacheError) as exc:
            reasons.append(str(exc))
        except BuildError as exc:
            _failed[attempt] = f"{str(exc).splitlines()[0]} (its output was shown when it was tried)"
            raise
    raise BuildError("; ".join(dict.fromkeys(reasons)))


def _load(path: Path) -> None:
    reason = cache_folder.unsafe(path)
    if reason is not None:
        raise _FolderError(f"the library {path} is not loaded: {reason}")
    try:
        torch.ops.load_library(str(path))
    except OSError as exc:
        if os.statvfs(path).f_flag & os.ST_NOEXEC:
            raise _FolderError(f"the cache folder {path.parent} is on a file system mounted noexec") from exc
        raise _FolderError(f"the library {path} does not load here: {exc}") from exc


def _seal_of(path: Path) -> str | None:
    """The checksum of a library that is whole; None where there is none, or a damaged one, which is said."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as exc:
        _log.warning("gdn_plugin: the library %s cannot be read: %s", path, exc.strerror)
        return None
    body, mark, checksum = content.rpartition(_SEAL)
    if not mark or checksum != hashlib.sha256(body).hexdigest().encode():
        _log.warning("gdn_plugin: the library %s is damaged and will be made again", path)
        return None
    return checksum.decode()


def _build(chosen: Level, folder: Path, unfit: str | None) -> Path:
    """The finished library of a level in a folder. One process makes it, the others wait for it.

    Raises:
        CacheError: the folder cannot be made or written to, or is not safe.
        _FolderError: no code may run from there, or it is full.
        BuildError: the compiler failed.
    """
    global _compiled
    cache_folder.make(folder)
    if os.statvfs(folder).f_flag & os.ST_NOEXEC:
        raise _FolderError(f"the cache folder {folder} is on a file system mounted noexec")
    target = folder / file_name(chosen)
    try:
        with FileLock(folder / "build.lock"):
            if _seal_of(target) in (None, unfit):  # else another process was faster
                for killed in folder.glob("building-*"):  # nobody else builds while the lock is held
                    shutil.rmtree(killed, ignore_errors=True)
                with tempfile.TemporaryDirectory(dir=folder, prefix="building-") as work:
                    finished = Path(work) / target.name
                    _compile(chosen, finished)
                    with open(finished, "rb+") as file:
                        checksum = hashlib.sha256(file.read()).hexdigest()
                        file.write(_SEAL + checksum.encode())
                        os.fsync(file.fileno())  # a full disk shows here at the latest
                    os.replace(finished, target)
                _compiled += 1
    except OSError as exc:
        raise _FolderError(f"the cache folder {folder} cannot be used: {exc.strerror or exc}") from exc
    return target


def _compile(chosen: Level, target: Path) -> None:
    objects, link = _commands(chosen, target)
    for commands in (objects, [link]):
        for command, (status, said) in zip(commands, _run(commands, target.parent), strict=True):
            _require(command, status, said, target.parent)


def _commands(chosen: Level, target: Path) -> tuple[list[list[str]], list[str]]:
    """What makes the objects, side by side, and what links them."""
    own = os.environ.get("CXXFLAGS", "").split()
    root = Path(torch.__file__).parent
    for_torch = [
        *TORCH_FLAGS, *own, "-fopenmp", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f"-DGDN_NAMESPACE={chosen.namespace}", "-isystem", str(root / "include"),
    ]  # fmt: skip
    flags = {"kernels": [*FLAGS, *own, *chosen.flags]} | dict.fromkeys(TORCH_SOURCES, for_torch)
    outputs = {name: str(target.with_name(f"{name}.o")) for name in flags}
    objects = [[*compiler(), *flags[name], "-c", str(SOURCES / f"{name}.cpp"), "-o", outputs[name]] for name in flags]
    # Without -fopenmp here: the OpenMP runtime must be the one that torch has loaded, and the loader finds it.
    libraries = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
    return objects, [*compiler(), *own, "-shared", *outputs.values(), "-o", str(target), *libraries]


def _run(commands: list[list[str]], work: Path) -> list[tuple[int, str]]:
    """(status, what it printed) of commands that run side by side and end with this process, however that ends."""
    environment = os.environ | {"TMPDIR": str(work)}  # what a killed compiler leaves lies in the work folder too
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(_scratch_file()) for _ in commands]
        # A thread may wait here that Ctrl-C does not reach, so the compilers must be reached by it.
        waits = [
            stack.enter_context(child.started(command, log=log, environment=environment, new_session=False))
            for command, log in zip(commands, logs, strict=True)
        ]
        statuses = [wait(None) for wait in waits]
        for log in logs:
            log.seek(0)
        return [(status, log.read()) for status, log in zip(statuses, logs, strict=True)]


def _scratch_file() -> IO[str]:
    """In memory where the system has that: a compiler that finds the disk full must be able to say so."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("gdn-plugin"), "w+", errors="replace")
    return tempfile.TemporaryFile("w+", errors="replace")


def _require(command: list[str], status: int, said: str, work: Path) -> None:
    if status == 0:
        return
    if status == child.CANNOT_START:
        raise BuildError(f"the C++ compiler {command[0]} cannot be run: {said.strip().rpartition(': ')[2]}")
    room = os.statvfs(work)
    # A linker that maps its output is killed by the kernel and says nothing.
    if os.strerror(errno.ENOSPC) in said or room.f_bavail * room.f_frsize < 2**16:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    raise BuildError(f"compiling the cpu backend failed\n{shlex.join(command)}\n{said[-4000:]}")
