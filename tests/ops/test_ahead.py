"""Kernels compiled ahead by other processes: what is asked of them, and that nothing of theirs stops this one."""

from __future__ import annotations

import contextlib
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest

from gdn_plugin.ops import ahead
from gdn_plugin.registry import BackendOp, Platform, Problem, Variant

H100 = Platform.simulated("sm_90")
PROBLEM = Problem("decode", "bfloat16", "float32", 2, 4, 64, 64)
VARIANTS = [
    Variant("one", lambda: None, kept=True),
    Variant("two", lambda: None, kept=True),
    Variant("here", lambda: None),
]


@pytest.fixture
def choices(monkeypatch, tmp_path):
    """One choice, of a backend with two kernels that others can compile and one that they cannot."""
    monkeypatch.setenv("GDN_PLUGIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ahead, "_asked", set())
    monkeypatch.setattr(ahead, "totals", ahead.Totals())
    monkeypatch.setattr(ahead, "load", lambda row: BackendOp(lambda **_: None, variants=lambda *_: VARIANTS))
    return [SimpleNamespace(name="mine", backend="row", problem=PROBLEM)]


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """Stands for the compiling processes; `orders` are what they were asked, `rows` what they say."""
    told = SimpleNamespace(orders=[], environments=[], rows=[], awaited=0, ended=0)
    for name in ("one", "two"):
        artifact = tmp_path / name
        artifact.touch()
        told.rows.append({"name": name, "seconds": 1.0, "cached": False, "artifact": str(artifact), "error": ""})

    @contextlib.contextmanager
    def started(command, *, log, environment):
        told.orders.append(pickle.loads(Path(command[-1]).read_bytes()))
        told.environments.append(environment)

        def wait_for(timeout):
            told.awaited += 1
            log.write("a warning of somebody's\n" + "".join(json.dumps(row) + "\n" for row in told.rows))
            return 0

        try:
            yield wait_for
        finally:
            told.ended += 1

    monkeypatch.setattr(ahead.child, "started", started)
    return told


def in_turn(choices, platform, processes):
    """All of them, as whoever asks for them gets them."""
    got = list(ahead.in_turn(choices, platform, processes))
    assert len(got) == len(choices) and all(choice in got for choice in choices)
    return got


def test_what_is_kept_is_compiled_by_others_once(choices, compiler):
    for _ in range(3):  # layers of one shape
        in_turn(choices, H100, 2)
    ((platform, count, jobs),) = compiler.orders
    assert (platform, count) == (H100, 2)
    assert jobs == [("mine", PROBLEM, "one"), ("mine", PROBLEM, "two")]
    assert (ahead.totals.made, ahead.totals.found) == (2, 0)
    assert compiler.environments[0]["CUDA_VISIBLE_DEVICES"] == "", "no context on anybody's device"


def test_another_process_is_not_told_to_compile_it_again_unless_it_is_gone(choices, compiler, tmp_path):
    for more in (0, 0, 1):
        ahead._asked.clear()  # as in a fresh process
        in_turn(choices, H100, 2)
        assert len(compiler.orders) == 1 + more
        if len(compiler.orders) == 1 and ahead.totals.found:
            (tmp_path / "two").unlink()
    assert (ahead.totals.made, ahead.totals.found) == (4, 2)


@pytest.mark.parametrize("text", ["5", "[null]", "[", '{"a": 1}'])
def test_a_damaged_record_is_written_anew(choices, compiler, monkeypatch, text):
    kept = []
    remember = ahead.remember
    monkeypatch.setattr(ahead, "remember", lambda path, artifacts: kept.append(path) or remember(path, artifacts))
    in_turn(choices, H100, 2)
    ahead._asked.clear()
    kept[0].write_text(text)
    in_turn(choices, H100, 2)
    assert len(compiler.orders) == 2
    ahead._asked.clear()
    in_turn(choices, H100, 2)
    assert len(compiler.orders) == 2


def test_a_kernel_that_failed_is_told_and_left_to_this_process(choices, compiler, caplog):
    compiler.rows[1]["error"] = "CompilationError: no"
    for _ in range(2):
        ahead._asked.clear()
        in_turn(choices, H100, 2)
    assert caplog.text.count("two was not compiled ahead: CompilationError: no") == 1 and len(compiler.orders) == 1


def test_an_images_folder_may_be_one_that_can_only_be_read(choices, compiler, monkeypatch):
    in_turn(choices, H100, 2)
    ahead._asked.clear()

    def read_only(*parts):
        raise ahead.cache.CacheError("it cannot be written to")

    monkeypatch.setattr(ahead.cache, "folder", read_only)
    in_turn(choices, H100, 2)
    assert len(compiler.orders) == 1 and ahead.totals.found == 2


def test_processes_that_did_not_get_to_the_end_are_asked_again(choices, compiler):
    del compiler.rows[1]
    for _ in range(2):
        ahead._asked.clear()
        in_turn(choices, H100, 2)
    assert len(compiler.orders) == 2


@pytest.mark.parametrize("platform, processes", [(Platform.simulated("cpu"), 4), (H100, 1)], ids=["cpu", "one core"])
def test_where_it_would_not_pay_nothing_is_started(choices, compiler, platform, processes):
    in_turn(choices, platform, processes)
    assert compiler.orders == []


@pytest.mark.parametrize("module", ["gdn_plugin.absent", "gdn_plugin.settings"], ids=["failing", "silent"])
def test_processes_that_end_early_are_no_trouble(choices, monkeypatch, caplog, module):
    monkeypatch.setattr(ahead, "COMPILER", module)
    in_turn(choices, H100, 2)
    assert "kernels are compiled in this process: RuntimeError: the compiling processes ended early" in caplog.text


def test_neither_is_a_machine_that_cannot_start_any(choices, monkeypatch, caplog):
    def no_memory(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(ahead.child, "started", no_memory)
    in_turn(choices, H100, 2)
    assert "compiled in this process" in caplog.text and "Cannot allocate memory" in caplog.text


def test_a_backend_that_cannot_be_asked_is_left_out(choices, compiler, monkeypatch):
    def broken(row):
        raise ImportError("no such thing")

    monkeypatch.setattr(ahead, "load", broken)
    in_turn(choices, H100, 2)
    assert compiler.orders == []


@pytest.fixture
def two(choices, monkeypatch):
    """The choice of `choices`, and one for whom others can compile nothing, which comes later in the layer."""
    own = SimpleNamespace(name="own", backend="other row", problem=PROBLEM)
    listed = {"row": VARIANTS, "other row": VARIANTS[2:]}
    monkeypatch.setattr(ahead, "load", lambda row: BackendOp(lambda **_: None, variants=lambda *_: listed[row]))
    return [*choices, own]


def test_who_compiles_here_does_so_while_others_compile(two, compiler, monkeypatch):
    """And what it imports into the environment meanwhile changes nothing that is remembered."""
    for found in (0, 2):
        ahead._asked.clear()
        turns = ahead.in_turn(two, H100, 2)
        assert next(turns) is two[1] and len(compiler.orders) == 1 and compiler.awaited == (1 if found else 0)
        monkeypatch.setenv("MINE_COMPILER", "/another")
        assert [*turns] == two[:1] and compiler.awaited == compiler.ended == 1
        monkeypatch.delenv("MINE_COMPILER")
        assert ahead.totals.found == found


def test_nobody_compiles_for_a_caller_that_is_gone(two, compiler):
    with contextlib.closing(ahead.in_turn(two, H100, 2)) as turns:
        next(turns)
        assert compiler.ended == 0
    assert (compiler.awaited, compiler.ended) == (0, 1)
    in_turn(two, H100, 2)
    assert (compiler.awaited, compiler.ended) == (1, 2), "what was cut off is asked for again"


def test_of_two_that_want_the_same_the_second_waits_when_it_has_to(two, compiler):
    first, second = (ahead.in_turn(two, H100, 2) for _ in range(2))
    assert next(first) is two[1]
    ahead._asked.clear()  # the second is another process
    assert next(second) is two[1] and len(compiler.orders) == 1
    assert next(first) is two[0] and next(second) is two[0]
    assert [*first] == [*second] == [] and len(compiler.orders) == 1
    assert (ahead.totals.made, ahead.totals.found) == (2, 2)


def test_how_many_processes(monkeypatch):
    monkeypatch.setattr(ahead.os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setenv("MAX_JOBS", "1")
    assert ahead.usable_processes() == 1
    monkeypatch.delenv("MAX_JOBS")
    monkeypatch.setattr(ahead, "BYTES_A_PROCESS", 1 << 60)
    assert ahead.usable_processes() == 1, "memory is a limit"
    monkeypatch.setattr(ahead, "BYTES_A_PROCESS", 1)
    assert ahead.usable_processes() == 64
