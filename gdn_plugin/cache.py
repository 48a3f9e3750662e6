"""Where the plugin keeps files between processes: compiled CPU kernels and self-check verdicts.

What is loaded from here is run. So a folder counts only where every part of its path belongs to this user or to root
and nobody else can write to it; a temporary folder that everybody can write to, with the sticky bit, may stand above
one's own.
"""

from __future__ import annotations

import contextlib
import grp
import logging
import os
import pwd
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import platformdirs

from gdn_plugin import settings

_log = logging.getLogger(__name__)


class CacheError(OSError):
    """No folder that may be used; one sentence says which was tried and why not."""


def folder(*parts: str) -> Path:
    """A sub-folder of the cache that can be written to, made if need be.

    Raises:
        CacheError: there is none.
    """
    tried = []
    for path in folders(*parts):
        try:
            return make(path)
        except CacheError as exc:
            tried.append(str(exc))
    raise CacheError("; ".join(tried))


def folders(*parts: str) -> list[Path]:
    """Where files of a sub-folder of the cache may lie, whether there yet or not, best first.

    GDN_PLUGIN_CACHE names the one folder; else they are the user's own cache folder, where there is a home, and one of
    this user's in the temporary folder.

    Raises:
        CacheError: none of them is safe.
    """
    found, refused = [], []
    for base in _bases():
        path = base.joinpath(*parts)
        reason = unsafe(path)
        if reason is None:
            found.append(Path(os.path.realpath(path)))
        else:
            refused.append(f"the cache folder {path} is not used: {reason}")
    if not found:
        raise CacheError(f"{'; '.join(refused)}; set GDN_PLUGIN_CACHE to a folder of your own")
    for sentence in refused:
        _log.info("gdn_plugin: %s", sentence)
    return found


def make(path: Path) -> Path:
    """The folder itself, made if need be, with whatever is missing above it, for this user alone.

    Raises:
        CacheError: it cannot be made or written to, or somebody else made it first.
    """
    missing = [part for part in (path, *path.parents) if not os.path.lexists(part)]
    try:
        for part in reversed(missing):
            part.mkdir(mode=0o700, exist_ok=True)
    except OSError as exc:
        raise CacheError(f"the cache folder {path} cannot be made: {exc.strerror}") from exc
    reason = unsafe(path)
    if reason is None and not os.access(path, os.W_OK | os.X_OK):
        reason = "it cannot be written to"
    if reason is not None:
        raise CacheError(f"the cache folder {path} is not used: {reason}")
    return path


def unsafe(path: Path) -> str | None:
    """Why what lies, or would be made, at a path may be somebody else's doing; None where it cannot be."""
    lexical = Path(os.path.abspath(path))
    # Links are followed, and are parts of the path as well: who owns one decides where it leads.
    links = [part for part in (lexical, *lexical.parents) if part.is_symlink()]
    real = Path(os.path.realpath(lexical))
    for part in (*links, real, *real.parents):
        try:
            found = part.lstat()
        except (FileNotFoundError, NotADirectoryError):  # a part above says which
            continue
        except OSError as exc:
            return f"{part}: {exc.strerror}"
        if found.st_uid not in (os.getuid(), 0):
            return f"{part} belongs to another user"
        if stat.S_ISLNK(found.st_mode):
            continue
        if part != real and not stat.S_ISDIR(found.st_mode):
            return f"{part} is not a folder"
        sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX and part != real
        others = found.st_mode & stat.S_IWOTH or (found.st_mode & stat.S_IWGRP and not _own_group(found.st_gid))
        if others and not sticky:
            return f"others can write to {part}"
    return None


def _own_group(gid: int) -> bool:
    """Whether a group is this user's alone, as most distributions give one to each (and a umask of 002 with it)."""
    try:
        user, group = pwd.getpwuid(os.getuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    return group.gr_name == user.pw_name and {*group.gr_mem} <= {user.pw_name}


def _bases() -> Iterator[Path]:
    named = settings.cache()
    if named is not None:
        yield Path(named)
        return
    with contextlib.suppress(RuntimeError):  # neither HOME nor an entry in passwd; older platformdirs return "~/.cache"
        home, own = Path(os.path.expanduser("~")), platformdirs.user_cache_path("gdn-plugin")
        if own.is_absolute() and (home.is_dir() or not own.is_relative_to(home)):  # a home is not made
            yield own
    try:
        yield Path(tempfile.gettempdir()) / f"gdn-plugin-{os.getuid()}"
    except FileNotFoundError as exc:  # no temporary folder either
        _log.info("gdn_plugin: %s", exc)
