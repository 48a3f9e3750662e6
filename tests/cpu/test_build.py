"""Compiling, caching and loading of backend `cpu`, and how its ops behave around the numbers."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from gdn_plugin import cache
from gdn_plugin.backends.cpu import build, kernels
from gdn_plugin.ops.cases import Heads, conv_prologue_case, decode_case, fused_decode_case, prefill_case, verify_case
from gdn_plugin.registry import Platform, Problem
from tests.support.checks import bits, run

ROOT = Path(__file__).parents[2]
PROBLEM = Problem("prefill", "bfloat16", "float32", 1, 1, 64, 64)
LOAD = "from gdn_plugin.backends.cpu import build; build.operator('decode'); print(build.compile_count())"
conv_prologue, fused_decode = kernels.CONV_PROLOGUE.run, kernels.FUSED_DECODE.run
prefill, decode, verify = kernels.PREFILL.run, kernels.DECODE.run, kernels.VERIFY.run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of this test's libraries; the cache that GDN_PLUGIN_CACHE names is above it."""
    monkeypatch.setenv("GDN_PLUGIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cpu"


@pytest.fixture(scope="module")
def finished() -> Path:
    """The library of the level in use, from the cache of the test run; loaded too, before `Builds` replaces the loader.

    Another process finds or builds the file: this one may have loaded its library from an earlier test's own cache.
    """
    subprocess.run([sys.executable, "-c", LOAD], check=True, capture_output=True, cwd=ROOT)
    build.operator("decode")
    name = build.file_name(build.level())
    return next(path / name for path in cache.folders("cpu") if (path / name).exists())


class Builds:
    """In place of the compiler and the loader: what was compiled and loaded, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, library: Path) -> None:
        self.compiled: list[Path] = []
        self.loaded: list[Path] = []
        self.does_not_load: set[bytes] = set()
        self._body = library.read_bytes().rpartition(build._SEAL)[0]
        monkeypatch.setattr(build, "_compile", self._compile)
        monkeypatch.setattr(build.torch.ops, "load_library", self._load)

    def _compile(self, level: build.Level, target: Path) -> None:
        target.write_bytes(self._body)
        self.compiled.append(target)

    def _load(self, path: str) -> None:
        if Path(path).read_bytes() in self.does_not_load:
            raise OSError("version `GLIBCXX_9' not found")
        self.loaded.append(Path(path))


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch, finished: Path, folder: Path) -> Builds:
    return Builds(monkeypatch, finished)


@contextlib.contextmanager
def mounted(path: Path, options: str) -> Iterator[None]:
    """A file system of its own at a path."""
    path.mkdir(parents=True, mode=0o700)
    command = ["mount", "-t", "tmpfs", "-o", f"mode=0700,{options}", "tmpfs", str(path)]
    if os.getuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def worker(code: str = LOAD, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | environment,
    )  # fmt: skip


def bytes_of(x: torch.Tensor) -> bytes:
    return bytes(x.untyped_storage().tolist())


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out.strip()


@pytest.mark.slow
def test_concurrent_workers_compile_once_and_later_ones_not_at_all(folder: Path) -> None:
    assert sorted(finish(w) for w in [worker() for _ in range(3)]) == ["0", "0", "1"]
    (built,) = folder.glob("*.so")
    before = built.stat()
    assert finish(worker(CXX="/absent/c++")) == "0"
    assert (built.stat().st_mtime_ns, built.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    assert {p.name for p in folder.iterdir()} <= {built.name, "build.lock"}


def test_the_name_follows_sources_flags_and_level_and_no_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = {build.file_name(level) for level in build.levels()}
    assert len(names) == len(build.levels())
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "/absent/c++")
    assert {build.file_name(level) for level in build.levels()} == names
    monkeypatch.setenv("CXXFLAGS", "-DSOMETHING_ELSE")
    assert build.file_name(build.levels()[0]) not in names
    monkeypatch.setenv("CXXFLAGS", "-march=native")
    here = build.file_name(build.levels()[0])
    monkeypatch.setattr(build, "_cpu_flags", lambda: build._AVX512 | {"avx512_bf16", "amx_bf16"})
    assert build.file_name(build.levels()[0]) != here
    monkeypatch.delenv("CXXFLAGS")
    with_avx512 = build.file_name(build.levels()[0])
    sources = tmp_path / "csrc"
    shutil.copytree(build.SOURCES, sources)
    monkeypatch.setattr(build, "SOURCES", sources)
    assert build.file_name(build.levels()[0]) == with_avx512
    (sources / "vec.h").write_text((sources / "vec.h").read_text() + "// and a comment")
    assert build.file_name(build.levels()[0]) != with_avx512


@pytest.mark.parametrize("damage", ["empty", "half", "one bit", "no checksum", "a folder"])
def test_a_damaged_library_is_made_again_and_never_loaded(
    builds: Builds, folder: Path, finished: Path, damage: str
) -> None:
    content = bytearray(finished.read_bytes())
    content[len(content) // 3] ^= 1
    whole = finished.read_bytes()
    target = folder / finished.name
    folder.mkdir(parents=True, mode=0o700)
    if damage == "a folder":
        target.mkdir()
        with pytest.raises(build.BuildError, match="cannot be used: Is a directory"):
            build._find_or_build(build.level())
        assert builds.loaded == []
        return
    broken = {"empty": b"", "half": whole[: len(whole) // 2], "one bit": bytes(content), "no checksum": whole[:-100]}
    target.write_bytes(broken[damage])
    build._find_or_build(build.level())
    assert len(builds.compiled) == 1
    assert builds.loaded == [target]
    assert target.read_bytes() == whole
    build._find_or_build(build.level())
    assert len(builds.compiled) == 1


def test_a_whole_library_that_does_not_load_here_is_made_again(
    builds: Builds, folder: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.mkdir(parents=True, mode=0o700)
    other = b"of a newer compiler"
    sealed = other + build._SEAL + build.hashlib.sha256(other).hexdigest().encode()
    builds.does_not_load.add(sealed)
    (folder / finished.name).write_bytes(sealed)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(folder))
        patch.delenv("CXX", raising=False)
        with pytest.raises(
            build.BuildError, match=r"^no C\+\+ compiler: .*; the library .* does not load here: .*GLIBCXX"
        ):
            build._find_or_build(build.level())
    build._find_or_build(build.level())
    assert (len(builds.compiled), len(builds.loaded)) == (1, 1)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to give a file to another user")
def test_a_library_that_somebody_else_could_have_written_is_not_loaded(
    builds: Builds, folder: Path, finished: Path
) -> None:
    folder.mkdir(parents=True, mode=0o700)
    target = folder / finished.name
    for change in (lambda: os.chown(target, 54321, -1), lambda: target.chmod(0o666)):
        builds.loaded.clear()
        builds.compiled.clear()
        shutil.copy(finished, target)
        change()
        build._find_or_build(build.level())
        assert len(builds.compiled) == 1
        assert (target.stat().st_uid, target.stat().st_mode & 0o022) == (0, 0)


def test_a_finished_library_in_a_read_only_folder_without_a_compiler(
    finished: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mounted(folder.parent, "size=16m"):
        folder.mkdir(mode=0o700)
        shutil.copy(finished, folder)
        subprocess.run(["mount", "-o", "remount,ro", str(folder.parent)], check=True)
        assert finish(worker(CXX="/absent/c++")) == "0"
        (name,) = [path.name for path in folder.iterdir()]
        assert name == finished.name


def test_a_read_only_folder_without_a_library(folder: Path) -> None:
    with (
        mounted(folder.parent, "size=16m,ro"),
        pytest.raises(build.BuildError, match=rf"^the cache folder {folder} cannot be made: Read-only file system$"),
    ):
        build._find_or_build(build.level())


def test_a_folder_mounted_noexec_is_named_as_that(finished: Path, folder: Path) -> None:
    with mounted(folder.parent, "size=16m,noexec"):
        sentence = rf"^the cache folder {folder} is on a file system mounted noexec$"
        with pytest.raises(build.BuildError, match=sentence):
            build._find_or_build(build.level())
        shutil.copy(finished, folder)
        with pytest.raises(build.BuildError, match=sentence):
            build._find_or_build(build.level())


@pytest.mark.slow
@pytest.mark.parametrize("size", ["4k", "700k"])
def test_a_full_disk_is_named_as_that(folder: Path, size: str) -> None:
    with mounted(folder.parent, f"size={size}"):
        with pytest.raises(
            build.BuildError, match=rf"^the cache folder {folder} cannot be used: No space left on device$"
        ):
            build._find_or_build(build.level())
        assert {path.name for path in folder.iterdir()} <= {"build.lock"}


def test_where_the_users_own_folder_cannot_be_used_the_temporary_one_is(
    builds: Builds, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("GDN_PLUGIN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(tmp_path))
    with mounted(tmp_path / "own", "size=16m,noexec"):
        build._find_or_build(build.level())
    assert builds.loaded == [tmp_path / f"gdn-plugin-{os.getuid()}" / "cpu" / finished.name]
    assert "own/gdn-plugin/cpu is on a file system mounted noexec; " in caplog.text


def test_a_build_killed_midway_leaves_nothing_that_is_in_the_way(
    builds: Builds, folder: Path, finished: Path, tmp_path: Path
) -> None:
    hanging = tmp_path / "hanging-c++"
    hanging.write_text('#!/bin/sh\necho $$ >> "$0.pids"; echo half > "$TMPDIR/half.o"; exec sleep 600\n')
    hanging.chmod(0o755)
    process = worker(CXX=str(hanging))
    pids = Path(f"{hanging}.pids")
    while not pids.exists() or len(pids.read_text().split()) < 3:
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.communicate()
    until = time.monotonic() + 5  # no compiler outlives whom it works for
    while any(alive := [pid for pid in pids.read_text().split() if Path(f"/proc/{pid}").exists()]):
        assert time.monotonic() < until, alive
        time.sleep(0.05)
    assert list(folder.glob("building-*/half.o"))
    build._find_or_build(build.level())
    assert len(builds.compiled) == 1
    assert {path.name for path in folder.iterdir()} <= {finished.name, "build.lock"}


def test_compiler_errors_are_shown_and_remembered(
    folder: Path, monkeypatch: pytest.MonkeyPatch, finished: Path
) -> None:
    monkeypatch.setenv("CXXFLAGS", "-include does_not_exist.h")
    tried = []
    compile_ = build._compile
    monkeypatch.setattr(build, "_compile", lambda *what: (tried.append(what), compile_(*what)))
    with pytest.raises(build.BuildError, match=r"compiling the cpu backend failed\n(.|\n)*does_not_exist\.h"):
        build._find_or_build(build.level())
    with pytest.raises(build.BuildError, match=r"^compiling the cpu backend failed \(its output was shown"):
        build._find_or_build(build.level())
    assert len(tried) == 1
    assert {path.name for path in folder.iterdir()} <= {"build.lock"}


def test_a_command_that_failed_can_be_pasted(tmp_path: Path) -> None:
    with pytest.raises(build.BuildError, match=r"\nc\+\+ -o '/a b/kernels\.o'\n"):
        build._require(["c++", "-o", "/a b/kernels.o"], 1, "no", tmp_path)


@pytest.mark.parametrize("cxx", ["", "/absent/c++"])
def test_no_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cxx: str) -> None:
    monkeypatch.setenv("CXX", cxx)
    monkeypatch.setenv("PATH", str(tmp_path))
    sentence = (
        r"^the C\+\+ compiler /absent/c\+\+ cannot be run: No such file" if cxx else r"^no C\+\+ compiler: none of"
    )
    with pytest.raises(build.BuildError, match=sentence):
        build._find_or_build(build.level())


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to run as another user")
def test_a_user_without_home_and_without_an_entry(tmp_path: Path) -> None:
    """The library is built in the temporary folder, in one of that user's own."""
    python = shutil.which("python3", path="/usr/bin:/bin")
    version = "import sys; print(sys.version_info[:2])"
    same = python and subprocess.run([python, "-c", version], capture_output=True, text=True, check=False).stdout
    if python is None or not same or same.strip() != str(sys.version_info[:2]):
        pytest.skip(f"needs a python {sys.version_info[:2]} that every user may run")
    site = Path(torch.__file__).parents[1]
    for part in (site, *site.parents, ROOT, *ROOT.parents):
        if part.stat().st_mode & 0o005 != 0o005:
            pytest.skip(f"{part} is not open to other users")
    with tempfile.TemporaryDirectory() as temporary:
        os.chmod(temporary, 0o1777)
        environment = {"PYTHONPATH": f"{site}:{ROOT}", "TMPDIR": temporary, "PATH": os.environ["PATH"]}
        ran = subprocess.run(
            ["setpriv", "--reuid", "54323", "--regid", "54323", "--clear-groups", python, "-B", "-c", LOAD],
            env=environment, cwd="/", capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (ran.returncode, ran.stdout.strip()) == (0, "1"), ran.stderr
        assert list(Path(temporary, "gdn-plugin-54323", "cpu").glob("gdn_*.so"))


def test_levels_need_their_cpu_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(build, "_cpu_flags", lambda: build._AVX2)
    assert [level.name for level in build.levels()] == ["avx2", "plain"]
    with pytest.raises(ValueError, match="'avx512' does not run on this machine; choose one of: avx2, plain"):
        build.forced_level("avx512").__enter__()
    monkeypatch.setattr(build.platform, "machine", lambda: "arm64")
    assert [level.name for level in build.levels()] == ["plain"]
    monkeypatch.setattr(build.platform, "machine", lambda: "riscv64")
    with pytest.raises(build.BuildError, match="riscv64"):
        build.level()


def test_the_count_moves_and_not_after_warm_up(folder: Path, builds: Builds, monkeypatch: pytest.MonkeyPatch) -> None:
    before = build.compile_count()
    build._find_or_build(build.level())
    assert build.compile_count() == before + 1
    platform = Platform.simulated("cpu")
    assert kernels.DECODE.variants(platform, PROBLEM, torch.zeros(1)) == ()
    for variant in kernels.PREFILL.variants(platform, PROBLEM):
        variant.compile()
    count = kernels.PREFILL.compile_count()
    for function, case in (
        (prefill, prefill_case()), (decode, decode_case()), (verify, verify_case()),
        (conv_prologue, conv_prologue_case()), (fused_decode, fused_decode_case()),
    ):  # fmt: skip
        run(function, case)
    assert build.compile_count() == count


@pytest.mark.parametrize("op", ["prefill", "decode", "verify", "conv_prologue", "fused_decode"])
def test_any_number_of_threads_gives_the_same_bits(op: str) -> None:
    heads = Heads(1, 2, 64, 192)  # fewer heads than threads: split by value heads, then by value channels
    function, case = {
        "prefill": (prefill, prefill_case((70,), heads, torch.bfloat16)),
        "decode": (decode, decode_case(1, heads, torch.bfloat16)),
        "verify": (verify, verify_case((3,), heads, torch.bfloat16)),
        "conv_prologue": (conv_prologue, conv_prologue_case((70,), heads, torch.bfloat16, fresh=(0,))),
        "fused_decode": (fused_decode, fused_decode_case(3, heads, torch.bfloat16)),
    }[op]
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3, 8):
            torch.set_num_threads(count)
            results.append(run(function, case))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, out in results[0].outputs.items():
            assert torch.equal(bits(other.outputs[name]), bits(out)), name
        for name, pool in results[0].pools.items():
            assert torch.equal(bits(other.pools[name]), bits(pool)), name


def test_callers_on_several_threads_do_not_disturb_one_another() -> None:
    cases = [prefill_case((65, 30 + i), Heads(1, 2, 64, 32), torch.bfloat16, seed=i) for i in range(6)]
    want = [run(prefill, case).outputs["out"] for case in cases]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(4):
            got = list(pool.map(lambda case: run(prefill, case).outputs["out"], cases))
            for a, b in zip(got, want, strict=True):
                assert torch.equal(bits(a), bits(b))


def test_the_gil_is_released() -> None:
    case = prefill_case((4096,), Heads(8, 8, 128, 128), torch.float32)
    done = threading.Event()

    def long_call() -> None:
        run(prefill, case)
        done.set()

    inside = threading.Thread(target=long_call)
    inside.start()
    turns = 0
    while not done.wait(0.0005):
        turns += 1
    inside.join()
    assert turns > 10, f"another thread got to run {turns} times during a long call"


def test_rows_of_one_draft_as_a_column() -> None:
    """[B, 1] of any stride: what lies between them in memory is nobody's row."""
    case = verify_case((1, 1), slots=1)
    want = case.arguments(zero_padding=True)
    verify(**want)
    given = case.arguments(zero_padding=True)
    rows = given["state_indices"][:, 0]
    spread = torch.full((2, 2), 99, dtype=torch.int32)
    spread[0] = rows
    given["state_indices"] = spread.view(-1)[:2].view(1, 2).t()
    assert given["state_indices"].stride() == (1, 2)
    verify(**given)
    assert torch.equal(given["out"], want["out"]) and bytes_of(given["state"]) == bytes_of(want["state"])


def test_what_a_fresh_sequence_does_not_read_may_be_anything() -> None:
    case = conv_prologue_case((2, 2, 2), accepted=(1, 1, 1), fresh=(1,))
    args = case.arguments(zero_padding=True)
    args["num_accepted_tokens"] = torch.tensor([1, 2**30, 1], dtype=torch.int32)
    conv_prologue(**args)
    want = case.arguments(zero_padding=True)
    conv_prologue(**want)
    assert all(torch.equal(args[name], want[name]) for name in case.outputs)


@pytest.mark.parametrize(
    ("op", "argument", "value", "message"),
    [
        ("prefill", "cu_seqlens", [0, 5, 3, 9], "cu_seqlens"),
        ("prefill", "cu_seqlens", [0, 1, 2, 99], "cu_seqlens"),
        ("prefill", "state_indices", [0, 1, 99], "state_indices"),
        ("decode", "state_indices", [0, 99, 1], "state_indices"),
        ("fused_decode", "state_indices", [0, 99, 1], "state_indices"),
        ("conv_prologue", "state_indices", [0, 99, 1], "state_indices"),
        ("conv_prologue", "cu_seqlens", [0, -1, 2, 3], "cu_seqlens"),
        ("conv_prologue", "num_accepted_tokens", [1, 99, 1], "num_accepted_tokens"),
        ("verify", "cu_seqlens", [0, 9, 9, 9], "cu_seqlens"),
        ("verify", "num_accepted_tokens", [1, 9, 1], "num_accepted_tokens"),
        ("verify", "state_indices", [[1, 2], [3, 4], [5, 99]], "state_indices"),
        ("verify", "start_rows", [1, 3, 99], "start_rows"),
    ],
)  # fmt: skip
def test_index_values_out_of_range_raise_before_anything_is_written(
    op: str, argument: str, value: list[int], message: str
) -> None:
    function, case = {
        "prefill": (prefill, prefill_case((3, 3, 3))),
        "decode": (decode, decode_case(3)),
        "verify": (verify, verify_case((2, 2, 2), slots=2, accepted=(1, 1, 1), pad_tokens=3)),
        "conv_prologue": (conv_prologue, conv_prologue_case((2, 2, 2), accepted=(1, 1, 1))),
        "fused_decode": (fused_decode, fused_decode_case(3)),
    }[op]
    args = case.arguments(zero_padding=True) | {argument: torch.tensor(value, dtype=torch.int32)}
    before = {name: bytes_of(args[name]) for name in case.pools}
    with pytest.raises(ValueError, match=rf"^gdn\.{op}: .*{message}"):
        function(**args)
    assert all(bool(torch.isnan(args[name]).all()) for name in case.outputs)
    assert all(bytes_of(args[name]) == before[name] for name in case.pools)


def test_layouts_that_would_need_a_copy_raise() -> None:
    case = decode_case(2, Heads(1, 1, 16, 16))
    state = case.pools["state"].view
    out = torch.empty(2, 1, 16)
    with pytest.raises(ValueError, match="state: expected rows that are dense inside"):
        decode(**case.args, state=state.transpose(2, 3), out=out, zero_padding=True)
    wrong = case.args | {"q": case.args["q"].transpose(1, 2).contiguous().transpose(1, 2).expand(2, 1, 16)[:, :, ::2]}
    with pytest.raises(ValueError, match="q: expected a last dim of stride 1"):
        decode(**wrong, state=state, out=out, zero_padding=True)
    with pytest.raises(ValueError, match="v: expected float32, bfloat16 or float16"):
        decode(**(case.args | {"v": case.args["v"].double()}), state=state, out=out, zero_padding=True)
