"""The one module that reads the machine."""

from __future__ import annotations

import importlib.metadata
import sys

import pytest
import torch

from gdn_plugin.registry import Platform, probe
from gdn_plugin.registry.platform import FLASHINFER_FEATURES
from gdn_plugin.registry.probe import _FLASHINFER_SIGNATURES, cpu_features, features, flashinfer_features


def test_probe_tells_this_machine():
    platform = probe()
    assert isinstance(platform, Platform)
    assert platform is probe()
    assert platform.version("torch") == importlib.metadata.version("torch")
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        assert (platform.device, platform.sm, platform.cuda) == ("cuda", 10 * major + minor, torch.version.cuda)
        assert platform.sm_count == torch.cuda.get_device_properties(0).multi_processor_count
    else:
        assert (platform.device, platform.sm, platform.cuda) == ("cpu", None, None)
    assert probe("cpu").device == "cpu"


def test_a_simulated_machine_knows_the_same_features():
    assert set(FLASHINFER_FEATURES) == set(_FLASHINFER_SIGNATURES)


def test_flashinfers_signatures_are_read(tmp_path, monkeypatch):
    package = tmp_path / "flashinfer"
    package.mkdir()
    # Importing it would fail: it must only be read.
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "gdn_prefill.py").write_text("def chunk_gated_delta_rule(q, *, output=None): ...")
    (package / "gdn_decode.py").write_text("def gated_delta_rule_mtp(q, ssm_state_indices, /): ...")
    monkeypatch.syspath_prepend(tmp_path)
    # Where another test has imported the real one, its spec would be found first.
    monkeypatch.delitem(sys.modules, "flashinfer", raising=False)
    assert flashinfer_features() == {
        "flashinfer.prefill": "yes",
        "flashinfer.prefill.output": "yes",
        "flashinfer.mtp": "yes",
        "flashinfer.mtp.ssm_state_indices": "yes",
    }
    (package / "gdn_decode.py").write_text("def broken(:")
    (package / "gdn_prefill.py").unlink()
    assert flashinfer_features() == {}


def test_the_installed_flashinfer_has_what_the_wrappers_use():
    try:
        version = importlib.metadata.version("flashinfer-python")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("flashinfer-python is not installed")
    if tuple(int(part) for part in version.split(".")[:2]) < (0, 7):
        pytest.skip(f"flashinfer-python {version} is older than 0.7")
    assert set(flashinfer_features()) == set(FLASHINFER_FEATURES)


def test_the_compiler_is_cxx_or_one_on_the_path(tmp_path, monkeypatch):
    for name in ("c++", "my-c++"):
        program = tmp_path / name
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert cpu_features()["cpu.cxx_compiler"] == str(tmp_path / "c++")
    monkeypatch.setenv("CXX", "my-c++ -m64")
    assert cpu_features()["cpu.cxx_compiler"] == str(tmp_path / "my-c++")
    monkeypatch.setenv("CXX", "ccache my-c++")
    assert cpu_features()["cpu.cxx_compiler"] == str(tmp_path / "my-c++")
    monkeypatch.setenv("CXX", "absent-c++")
    assert "cpu.cxx_compiler" not in cpu_features()


def test_without_a_compiler_a_library_in_the_cache_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("GDN_PLUGIN_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "absent-c++")
    assert "cpu.library" not in cpu_features()
    (tmp_path / "cpu").mkdir(mode=0o700)
    (tmp_path / "cpu" / "gdn_plain_0123.so").touch()
    assert cpu_features()["cpu.library"] == "yes"
    monkeypatch.setenv("GDN_PLUGIN_CACHE", str(tmp_path / "cpu" / "gdn_plain_0123.so"))  # not a folder
    assert "cpu.library" not in cpu_features()


def test_the_interpreter_is_a_feature(monkeypatch):
    for word in ("1", "true", "On"):
        monkeypatch.setenv("TRITON_INTERPRET", word)
        assert "triton.interpreter" in features()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "triton.interpreter" not in features()
