"""The cache folder: which one, and that nobody else can write to it."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from gdn_plugin import cache

SOMEBODY_ELSE = 54321
as_root = pytest.mark.skipif(os.getuid() != 0, reason="needs root, to give a folder to another user")


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cache"
    monkeypatch.setenv("GDN_PLUGIN_CACHE", str(path))
    return path


def test_the_named_folder_is_made_for_its_user_alone(base: Path) -> None:
    before = os.umask(0)
    try:
        made = cache.folder("cpu")
    finally:
        os.umask(before)
    assert made == base / "cpu"
    assert [part.stat().st_mode & 0o777 for part in (base, made)] == [0o700, 0o700]
    assert cache.folder("cpu") == made


@pytest.mark.parametrize(
    ("mode", "who"), [(0o777, "cache"), (0o1777, "cpu"), (0o707, "cache")], ids=["777", "1777 itself", "707"]
)
def test_a_folder_that_others_can_write_to_is_refused(base: Path, mode: int, who: str) -> None:
    (base / "cpu").mkdir(parents=True)
    part = base if who == "cache" else base / "cpu"
    part.chmod(mode)
    with pytest.raises(
        cache.CacheError, match=rf"^the cache folder .*cpu is not used: others can write to {part}; set "
    ):
        cache.folder("cpu")


def test_a_sticky_folder_may_stand_above_ones_own(base: Path) -> None:
    base.mkdir()
    base.chmod(0o1777)
    assert cache.folder("cpu") == base / "cpu"


@as_root
def test_a_folder_of_somebody_else_is_refused(base: Path) -> None:
    (base / "cpu").mkdir(parents=True)
    os.chown(base, SOMEBODY_ELSE, -1)
    with pytest.raises(cache.CacheError, match=rf"{base} belongs to another user"):
        cache.folder("cpu")


@as_root
def test_a_link_of_somebody_else_is_refused_even_to_a_safe_folder(base: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir(mode=0o700)
    base.symlink_to(own)
    assert cache.folder("cpu") == own / "cpu"  # one's own link is followed, and what comes back holds none
    os.chown(base, SOMEBODY_ELSE, -1, follow_symlinks=False)
    with pytest.raises(cache.CacheError, match=rf"{base} belongs to another user"):
        cache.folder("cpu")


def test_a_link_into_an_unsafe_folder_is_refused(base: Path, tmp_path: Path) -> None:
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    (open_to_all / "deeper").mkdir()
    base.symlink_to(open_to_all / "deeper")
    with pytest.raises(cache.CacheError, match=f"others can write to {open_to_all}"):
        cache.folder("cpu")


def test_a_group_of_ones_own_may_write_and_another_may_not(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base.mkdir()
    base.chmod(0o775)
    user = pwd.getpwuid(os.getuid()).pw_name

    class Group:
        gr_name, gr_mem = user, [user]

    monkeypatch.setattr(cache.grp, "getgrgid", lambda gid: Group)
    assert cache.folder("cpu")
    for Group.gr_name, Group.gr_mem in (("staff", [user]), (user, [user, "other"])):
        with pytest.raises(cache.CacheError, match="others can write to"):
            cache.folder("cpu")


def test_a_file_in_its_place(base: Path) -> None:
    base.touch()
    with pytest.raises(cache.CacheError, match=rf"^the cache folder .*cpu is not used: {base} is not a folder; set "):
        cache.folder("cpu")


def test_a_folder_that_cannot_be_written_to(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (base / "cpu").mkdir(parents=True)
    monkeypatch.setattr(cache.os, "access", lambda path, mode: False)  # root may write wherever bits forbid it
    with pytest.raises(cache.CacheError, match=r"cpu is not used: it cannot be written to"):
        cache.folder("cpu")
    assert cache.folders("cpu") == [base / "cpu"]  # what lies there can be used


@pytest.mark.parametrize("case", ["home", "no such home", "no HOME", "unwritable"])
def test_without_a_name_it_is_the_users_own_or_in_the_temporary_folder(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    temporary.mkdir()
    for name in ("GDN_PLUGIN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(temporary))
    monkeypatch.setenv("HOME", str(home))
    if case == "no HOME":  # and a uid without an entry, for which expanduser changes nothing
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    elif case != "no such home":
        home.mkdir()
    if case == "unwritable":
        mkdir = Path.mkdir

        def refuse(path: Path, *args: object, **kwargs: object) -> None:
            if path.is_relative_to(home):
                raise PermissionError(13, "Permission denied")
            mkdir(path, *args, **kwargs)  # type: ignore[arg-type]

        monkeypatch.setattr(Path, "mkdir", refuse)
    in_tmp = temporary / f"gdn-plugin-{os.getuid()}" / "cpu"
    if case == "home":
        made = cache.folder("cpu")
        assert made.is_relative_to(home)
        assert cache.folders("cpu") == [made, in_tmp]
    else:
        assert cache.folder("cpu") == in_tmp
        assert not (Path.cwd() / "~").exists()
        assert home.exists() == (case == "unwritable")


@as_root
def test_somebody_elses_folder_in_the_temporary_one_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GDN_PLUGIN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").touch()
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(tmp_path))
    trap = tmp_path / f"gdn-plugin-{os.getuid()}"
    trap.mkdir()
    os.chown(trap, SOMEBODY_ELSE, -1)
    with pytest.raises(cache.CacheError) as caught:
        cache.folder("cpu")
    message = str(caught.value)
    assert f"{tmp_path / 'file'} is not a folder" in message
    assert f"{trap} belongs to another user" in message
    assert "\n" not in message


def test_nothing_is_made_by_importing(tmp_path: Path) -> None:
    environment = os.environ | {"HOME": str(tmp_path), "XDG_CACHE_HOME": "", "GDN_PLUGIN_CACHE": ""}
    subprocess.run([sys.executable, "-c", "import gdn_plugin.cache"], check=True, env=environment)
    assert list(tmp_path.iterdir()) == []
