"""Kernels compiled before they are needed, side by side, in processes of their own that use no device.

They compile for the platform that they are told of, into the caches on disk where this process then finds the kernels.
Whatever goes wrong there is a kernel that this process compiles itself when it comes to it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from gdn_plugin import cache, child
from gdn_plugin.ops.selfcheck import fingerprint
from gdn_plugin.registry import Choice, Platform, Problem, load

# A command that reads (platform, number of processes, jobs) from the pickle it is given and prints a JSON object a
# kernel: `name`, `seconds`, `cached` (it was there already), `artifact` (where it lies), `error`.
COMPILER = "gdn_plugin.tools.compile"
BYTES_A_PROCESS = 1 << 30  # torch with CUDA, and a compiler
# The processes are awaited at start-up, so one that hangs must not keep an engine from starting.
LONGEST_S = 600.0

_log = logging.getLogger(__name__)

_FOLDER = "compiled"  # of the plugin's cache

# (backend's name, problem, variant's name)
Job = tuple[str, Problem, str]


@dataclass(slots=True)
class Totals:
    """What this process has had compiled ahead: kernels made, and found in a cache; seconds that it waited for them."""

    made: int = 0
    found: int = 0
    seconds: float = 0.0


totals = Totals()
_asked: set[Job] = set()


def in_turn(choices: Iterable[Choice], platform: Platform, processes: int | None = None) -> Generator[Choice]:
    """The choices, each once all that it can launch has been compiled into the caches on disk. Raises nothing.

    Those come first for whom others can compile nothing: what they compile in this process, they compile meanwhile. A
    kernel is compiled once a process; of processes that want the same at once (the ranks of a layer), one has it done.

    Args:
        platform: a CUDA one; on any other nothing is compiled.
        processes: by default one a usable core, as far as memory goes, and no more than MAX_JOBS says. With one,
            nothing is compiled: this process can then do so as well itself.
    """
    choices = list(choices)
    listed = _listed(choices, platform)
    new = [job for job in dict.fromkeys(job for jobs in listed for job in jobs) if job not in _asked]
    steps = _compile_ahead(new, platform, processes)
    with contextlib.closing(steps):  # nobody compiles for a caller that is gone
        for by_others in (False, True):
            began = time.perf_counter()
            try:
                next(steps, None)
            except Exception as exc:  # a full disk, no memory: compiled in this process, one after the other
                _say_why(exc)
            totals.seconds += time.perf_counter() - began
            if by_others:
                _asked.update(new)
            yield from (choice for choice, jobs in zip(choices, listed, strict=True) if bool(jobs) == by_others)


def _listed(choices: Sequence[Choice], platform: Platform) -> list[list[Job]]:
    """Of each choice what other processes can compile."""
    if platform.device == "cuda":
        try:
            # In a thread of its own: the caller's default device and grad mode are the caller's thread's.
            with ThreadPoolExecutor(1) as thread:
                return list(thread.map(lambda choice: jobs_of([choice], platform), choices))
        except Exception as exc:  # no more threads
            _say_why(exc)
    return [[] for _ in choices]


def _say_why(exc: Exception) -> None:
    _log.warning("gdn_plugin: kernels are compiled in this process: %s: %s", type(exc).__name__, exc)


def _compile_ahead(jobs: list[Job], platform: Platform, processes: int | None) -> Generator[None]:
    """Stops once, where there is something to wait for."""
    count = min(processes or usable_processes(), len(jobs))
    if count < 2:
        return
    # As they are now: what is imported while others compile may add to the environment.
    name, environment = _name(jobs, platform), _environment()
    stopped = False
    with contextlib.ExitStack() as stack:
        try:
            kept = stack.enter_context(_alone(name, timeout=0.0))
        except Timeout:  # somebody compiles the same
            yield
            stopped = True
            kept = stack.enter_context(_alone(name))
        found = _found(name)
        if found is not None:
            totals.found += found
            return
        rows_of = stack.enter_context(_compiling(platform, count, jobs, environment))
        if not stopped:
            yield
        rows = rows_of()
        good = [row for row in rows if not row["error"]]
        # What failed is not tried again: this process compiles it into the same cache.
        if kept is not None and len(rows) == len(jobs):
            remember(kept, [row["artifact"] for row in good])
    made = sum(not row["cached"] for row in good)
    totals.made += made
    totals.found += len(good) - made
    _log.info("gdn_plugin: %d kernels compiled by %d processes, %d found in the cache", made, count, len(good) - made)
    for row in rows:
        if row["error"]:
            _log.warning("gdn_plugin: %s was not compiled ahead: %s", row["name"], row["error"])
    if len(rows) < len(jobs):
        _log.warning("gdn_plugin: %d kernels were not compiled ahead and are in this process", len(jobs) - len(rows))


def jobs_of(choices: Iterable[Choice], platform: Platform) -> list[Job]:
    """What other processes can compile for this one; a backend that cannot even be asked is its own check's to tell."""
    jobs: list[Job] = []
    for choice in choices:
        with contextlib.suppress(Exception):
            variants = load(choice.backend).variants(platform, choice.problem)
            jobs += [(choice.name, choice.problem, variant.name) for variant in variants if variant.kept]
    return jobs


def _environment() -> dict[str, str]:
    # The GPUs are hidden, so that no process can as much as make a context there.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    # The package may be on sys.path by the current folder alone.
    return environment | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


@contextlib.contextmanager
def _compiling(
    platform: Platform, count: int, jobs: list[Job], environment: Mapping[str, str]
) -> Iterator[Callable[[], list[dict]]]:
    """Processes that compile beside the block. Yields what waits for their rows, fewer where something ended early."""
    with (
        tempfile.TemporaryDirectory(prefix="gdn-plugin-") as folder,
        open(Path(folder, "log"), "w+", encoding="utf-8", errors="replace") as log,
    ):
        order = Path(folder, "order")
        order.write_bytes(pickle.dumps((platform, count, jobs)))

        def rows() -> list[dict]:
            with contextlib.suppress(TimeoutError, child.TimeoutExpired):
                wait_for(LONGEST_S)
            log.seek(0)
            return _rows(log.read().splitlines())

        command = [sys.executable, "-m", COMPILER, str(order)]
        with child.started(command, log=log, environment=environment) as wait_for:
            yield rows


def _rows(lines: list[str]) -> list[dict]:
    rows: list[dict] = []
    for line in lines:
        with contextlib.suppress(ValueError):  # a compiler may say anything in between
            row = json.loads(line)
            if isinstance(row, dict) and row.keys() >= {"name", "seconds", "cached", "artifact", "error"}:
                rows.append(row)
    if not rows:
        raise RuntimeError(f"the compiling processes ended early: {(lines or ['they said nothing'])[-1]}")
    return rows


def one_at_a_time(jobs: list[Job], platform: Platform) -> contextlib.AbstractContextManager[Path | None]:
    """Alone among the processes of this machine that want the same.

    Yields the file for `remember`; None where no folder can be written to, and where nobody else is kept out.
    """
    return _alone(_name(jobs, platform))


@contextlib.contextmanager
def _alone(name: str, timeout: float | None = None) -> Iterator[Path | None]:
    """Raises Timeout where somebody else is not done after so many seconds."""
    try:
        folder = cache.folder(_FOLDER)
    except cache.CacheError:
        yield None
        return
    lock = FileLock(folder / f"{name}.lock")
    try:
        lock.acquire(timeout=LONGEST_S if timeout is None else timeout)
    except Timeout:
        if timeout is not None:
            raise
        # Whoever has it hangs: two may compile the same, and nobody waits for ever.
    try:
        yield folder / f"{name}.json"
    finally:
        lock.release()


def remember(kept: Path, artifacts: Iterable[str]) -> None:
    """That all of it was compiled, and lies here."""
    with contextlib.suppress(OSError):  # a full disk: asked again next time
        kept.write_text(json.dumps(list(artifacts)), encoding="utf-8")


def _found(name: str) -> int | None:
    """How many kernels lie there since this was done; None where it was not, or somebody has emptied the cache."""
    with contextlib.suppress(cache.CacheError):
        for folder in cache.folders(_FOLDER):  # an image's may be one that can only be read
            with contextlib.suppress(OSError, ValueError, TypeError):  # damaged: done anew
                artifacts = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
                if all(map(os.path.exists, artifacts)):
                    return len(artifacts)
    return None


def _name(jobs: list[Job], platform: Platform) -> str:
    # Where a compiler keeps its kernels, and much of what it makes of them, is said by variables of its name.
    own = tuple({f"{name.upper()}_" for name, _, _ in jobs})
    said = sorted((name, value) for name, value in os.environ.items() if name.startswith(own))
    facts = (platform.sm, platform.cuda, platform.sm_count, sorted(platform.packages.items()), fingerprint(), said,
             [(name, str(problem), variant) for name, problem, variant in jobs])  # fmt: skip
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def usable_processes() -> int:
    """How many compiling processes this machine bears: cores that may be used, memory that is free, MAX_JOBS."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = [cores]
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
        with contextlib.suppress(OSError, ValueError):  # a container's own limit; "max" is none
            group = Path("/sys/fs/cgroup")
            free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
        limits.append(free // (2 * BYTES_A_PROCESS))  # half of it is the engine's, which is loading weights
    with contextlib.suppress(ValueError):
        limits.append(int(os.environ.get("MAX_JOBS", "")))
    return max(1, min(limits))
