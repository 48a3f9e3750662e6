"""`gdn-plugin compile`: kernels compiled for GPUs that are not there, and what the command does with failures."""

from __future__ import annotations

import importlib.util
import json

import pytest

from gdn_plugin.tools import compile as compilation
from gdn_plugin.tools.cli import main
from gdn_plugin.tools.compile import Row

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
ONE_KERNEL = ["--backend", "triton", "--op", "decode", "--dims", "128,128", "--state-dtype", "bfloat16"]


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("sm", [80, 90, 100, 120])
def test_rows_hold_what_the_compiler_said(capsys, tmp_path, sm):
    assert main(["compile", "--sm", str(sm), "--json", "--cache", str(tmp_path), *ONE_KERNEL]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["sm"] == sm and report["rows"]
    for row in report["rows"]:
        assert row["backend"] == "triton" and row["name"].startswith("decode K128 V128 bfloat16 state=bfloat16")
        assert row["error"] == "" and row["spills"] == 0 and 0 < row["registers"] <= 255 and row["seconds"] > 0
    assert any(tmp_path.rglob("*.cubin"))


@needs_triton
def test_every_op_and_pair_of_dims_is_listed():
    names = [
        variant.name
        for problem in compilation.triton_problems()
        for variant in compilation.triton_variants(problem, 90)
    ]
    assert len(names) == len(set(names))
    kernels = ("conv_prologue", "prefill_solve", "prefill_state", "decode", "fused_decode", "verify", "fused_verify")
    for kernel in kernels:
        for dims in (f"K{K} V{V}" for K in (64, 128, 256) for V in (64, 128, 256)):
            assert any(name.startswith(f"{kernel} {dims} ") for name in names), (kernel, dims)
    for dims in ("K64 V64", "K128 V128", "K256 V256"):
        assert any(name.startswith(f"gated_norm {dims} ") for name in names), dims


def test_a_failed_kernel_is_shown_and_exits_1(capsys, monkeypatch):
    rows = [Row("triton", "good", 1.0, 64, 0, 16), Row("triton", "bad", 2.0, error="CompilationError: no")]
    monkeypatch.setattr(compilation, "compile_triton", lambda *args: iter(rows))
    assert main(["compile", "--sm", "90", *ONE_KERNEL]) == 1
    printed = capsys.readouterr().out
    assert "FAILED: CompilationError: no" in printed and "1 of 2 compiled, 0 with spills" in printed


@needs_triton
def test_a_variant_that_does_not_compile_is_a_row(monkeypatch):
    def refuse(self, sm):
        raise RuntimeError(f"no code for sm_{sm}")

    monkeypatch.setattr("gdn_plugin.backends.triton.variants.KernelVariant.compile_for", refuse)
    (problem,) = [p for p in compilation.triton_problems() if p.op == "decode" and p.dtype == "float16"]
    row = compilation.compile_variant(90, problem, 0)
    assert row.error == "RuntimeError: no code for sm_90" and row.registers is None


def test_nothing_to_compile_exits_1(capsys):
    assert main(["compile", "--sm", "90", "--backend", "triton", "--op", "decode", "--dims", "32,32"]) == 1
    assert "nothing to compile" in capsys.readouterr().err


def test_unknown_architectures_are_refused(capsys):
    with pytest.raises(SystemExit) as left:
        main(["compile", "--sm", "75"])
    assert left.value.code == 2 and "choose from 80, 90, 100, 103, 120" in capsys.readouterr().err
