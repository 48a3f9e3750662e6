"""Processes that end with the one that started them, however that one ends.

A command is started by a keeper, this file run as a script, which holds one end of a pipe. When the starter
lets go of the other end (it is done, was interrupted, was killed: the system closes it in any case), the keeper kills
the command and everything that the command started, and ends too. What a command leaves behind at its own end is killed
as well.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import IO

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_POLL_S = 0.1
CANNOT_START = 127  # what shells return
TimeoutExpired = subprocess.TimeoutExpired


def run(
    command: Sequence[str], *, log: IO[str], environment: Mapping[str, str] | None = None, timeout: float | None = None
) -> int:
    """Run a command to its end; its exit status, negative for a signal. Nothing of it is left afterwards.

    Args:
        log: an open file, for what it prints on either stream.
        environment: by default this process's.
        timeout: seconds.
    Raises:
        subprocess.TimeoutExpired: it took longer.
    """
    with started(command, log=log, environment=environment) as wait_for:
        return wait_for(timeout)


@contextlib.contextmanager
def started(
    command: Sequence[str], *, log: IO[str], environment: Mapping[str, str] | None = None, new_session: bool = True
) -> Iterator[Callable[[float | None], int]]:
    """A command that runs beside the block, and of which nothing is left behind it. Yields wait(timeout) -> status.

    A command that cannot be started says why in the log and has status 127, as in a shell.

    Args:
        log, environment: see `run`.
        new_session: out of the reach of the terminal's Ctrl-C, which then ends the block alone. False where a thread
            waits that no Ctrl-C reaches; the system must be Linux for it, elsewhere it is the same as True.
    """
    theirs, ours = os.pipe()
    try:
        keeper = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(theirs), *command],  # the standard library is all it needs
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=(theirs,),
            start_new_session=new_session or sys.platform != "linux",
        )
    except BaseException:  # Ctrl-C too: the pipe must not stay open
        os.close(ours)
        raise
    finally:
        os.close(theirs)

    def wait_for(timeout: float | None = None) -> int:
        status = keeper.wait(timeout)
        return 128 - status if status > 128 else status

    try:
        yield wait_for
    finally:
        os.close(ours)
        keeper.wait()


def end_with_parent() -> None:
    """In a process of `multiprocessing`: from now on, end when the process that started it does."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: wait([parent.sentinel]) and os._exit(1), daemon=True).start()


def _keep(pipe: int, command: Sequence[str]) -> int:
    """Start the command, watch it and the pipe; 128 + the number of the signal that ended it, as shells have it."""
    if sys.platform == "linux":
        # Processes that lose their parent become the keeper's children, also those that have left its session.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # A keeper ends when it is let go. With a handler, and not ignored, since that the command would inherit.
    signal.signal(signal.SIGINT, lambda *_: None)
    try:
        process = subprocess.Popen(command)
    except OSError as exc:
        print(f"{command[0]}: {exc.strerror}", file=sys.stderr, flush=True)
        return CANNOT_START
    while process.poll() is None:
        if select.select([pipe], [], [], _POLL_S)[0]:
            break  # nobody ever writes to it: readable means closed
    if sys.platform == "linux":
        _kill_descendants()
    elif process.poll() is None:
        os.killpg(0, signal.SIGKILL)  # the keeper is one of them
    status = process.wait()
    return 128 - status if status < 0 else status


def _kill_descendants() -> None:
    """Until none is left, since each may start others while it is being killed."""
    while found := descendants(os.getpid()):
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def descendants(root: int) -> list[int]:
    """Live processes below `root`, from /proc."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # "pid (name) state ppid ...": a name may hold blanks and brackets
            state, parent = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:2]
            if state not in "ZX":
                children.setdefault(int(parent), []).append(int(stat.parent.name))
    found = []
    waiting = [root]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


if __name__ == "__main__":
    # sys.exit would wait for nothing here, but a keeper has no business with what atexit holds either.
    os._exit(_keep(int(sys.argv[1]), sys.argv[2:]))
