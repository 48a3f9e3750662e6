"""The compiler is tried once for each set of versions, and a broken one is named with the command that mends it."""

from __future__ import annotations

import json

import pytest

from gdn_plugin.ops._flashinfer import probe
from gdn_plugin.ops._flashinfer.compile import CompileRow


@pytest.fixture
def asked(monkeypatch):
    """Stands for the compile: what it was asked, and what it answers."""
    calls = []

    def compile_all(sm, **arguments):
        calls.append(sm)
        yield CompileRow("kernel", "case", 1.0, error="no kernel image" if sm == 100 else "")

    monkeypatch.setattr(probe, "compile_all", compile_all)
    return calls


def test_a_working_compiler_is_asked_once(asked, tmp_path):
    assert [probe.compiler_trouble(90, tmp_path) for _ in range(3)] == [None] * 3
    assert asked == [90]


def test_a_broken_compiler_is_named_with_the_pip_command(asked, tmp_path):
    for _ in range(2):
        trouble = probe.compiler_trouble(100, tmp_path)
        assert "sm_100a: no kernel image; pip install" in trouble and "nvidia-cutlass-dsl[cu13]" in trouble
    assert asked == [100]


def test_other_versions_ask_again(asked, tmp_path, monkeypatch):
    probe.compiler_trouble(90, tmp_path)
    monkeypatch.setattr(probe, "installed_packages", lambda: {"nvidia-cutlass-dsl": "9.9"})
    probe.compiler_trouble(90, tmp_path)
    assert asked == [90, 90]
    assert sorted(json.loads(file.read_text())["sm"] for file in tmp_path.iterdir()) == [90, 90]


def test_an_unwritable_folder_is_no_failure(asked, tmp_path):
    (tmp_path / "file").write_text("")
    for _ in range(2):
        assert probe.compiler_trouble(90, tmp_path / "file" / "below") is None
    assert asked == [90, 90]


@pytest.mark.slow
def test_the_installed_compiler_compiles(tmp_path):
    assert probe.compiler_trouble(90, tmp_path) is None
