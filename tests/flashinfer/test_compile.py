"""FlashInfer's kernels, as our wrappers call them, really compile for GPUs that are not here."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from gdn_plugin.ops._flashinfer.compile import compile_all, problems

# A few of each architecture; `gdn-plugin compile --backend flashinfer` compiles all of them.
FEW = {
    90: [("prefill", "float32"), ("decode", "bfloat16")],
    100: [("prefill", "bfloat16"), ("decode", "float32")],
    103: [("prefill", "float32")],
    120: [("prefill", "bfloat16")],
}


@pytest.mark.slow
@pytest.mark.timeout(170)
@pytest.mark.parametrize("sm", FEW)
def test_kernels_compile(sm, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    wanted = [problem for op, state in FEW[sm] for problem in problems(ops=(op,), state_dtypes=(state,))]
    # FlashInfer's fp32 verify takes dense pools alone: our wrapper refuses, the command says so and goes on.
    refused = dataclasses.replace(problems(ops=("verify",), state_dtypes=("float32",))[0], padded_pool=True)
    error, *rows = compile_all(sm, tmp_path, wanted=[refused, *wanted], few=True)
    assert error.error.startswith("ValueError: state: ") and error.kernel == ""
    assert [row.error for row in rows] == [""] * len(wanted)
    assert all(row.kernel and row.seconds > 0 for row in rows)
    assert list(here.iterdir()) == [], "what the compiler dumps on its way must not stay in the current folder"
    assert all(row.registers is None or 16 <= row.registers <= 255 for row in rows)

    kept = [Path(row.artifact) for row in rows if row.artifact]
    assert all(path.is_relative_to(tmp_path) and path.stat().st_size > 1000 for path in kept)
    # SM 100 keeps its prefill kernel, the others compile theirs in every process.
    assert len(kept) == sum(op != "prefill" or sm in (100, 103) for op, _ in FEW[sm])
    for path in kept:
        assert json.loads((path.parent / "meta.json").read_text())["arch"] == f"sm{sm}a"


def test_an_architecture_without_kernels_is_refused():
    with pytest.raises(ValueError, match="choose one of: 90, 100, 103, 120"):
        list(compile_all(80))


def test_a_process_that_dies_is_a_row(monkeypatch):
    monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", "/proc/nowhere")
    monkeypatch.setattr("gdn_plugin.ops._flashinfer.compile.sys.executable", "/bin/false")
    (row,) = compile_all(90)
    assert "ended early" in row.error
