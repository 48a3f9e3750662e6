"""The bench: what a call must cost, that wrong numbers are never timed, and what the command writes; no times."""

from __future__ import annotations

import json

import pytest
import torch

from gdn_plugin.bench import contenders, report, run, shapes
from gdn_plugin.bench.workload import make_workload
from gdn_plugin.cli import main

LIMITS = {"copy_bytes_per_s": 1e10, "matmul_flops_per_s": 1e11}
TINY = shapes.Shape("t", 1, 2, 64, 64)


def test_mixes():
    assert shapes.parse_mix("3x5+7") == (5, 5, 5, 7)
    assert len(shapes.parse_mix("ragged")) == 15
    for text in ("", "x", "3x", "axb", "3*5"):
        with pytest.raises(ValueError, match="not a mix"):
            shapes.parse_mix(text)


def test_shapes():
    assert shapes.parse_shape("qwen3-next").conv_dim == 2 * 16 * 128 + 32 * 128
    assert shapes.parse_shape("4,8,64,128").head_v_dim == 128
    with pytest.raises(ValueError, match="qwen3-next-tp8"):
        shapes.parse_shape("qwen9")


def test_the_cost_of_a_decode_step_is_its_state_twice():
    cost = shapes.decode_cost(shapes.SHAPES["qwen3-next"], 32)
    assert cost.bytes == pytest.approx(2 * 32 * 32 * 128 * 128 * 4, rel=0.02)


def test_the_cost_of_a_prefill_is_about_that_of_the_facts():
    # 9.6 GFLOP at T = 2048 with every triangular product counted whole; those are half here.
    cost = shapes.prefill_cost(shapes.SHAPES["qwen3-next"], (2048,))
    assert 8e9 < cost.flops < 9.6e9


def test_a_row_for_each_contender():
    rows = run.compare(
        "prefill", ["torch", "transformers", "fla"], TINY, "3+65", device="cpu", limits=LIMITS, seconds=0.1
    )
    ours, theirs, fla = rows
    assert ours.ratio == 1.0 and ours.us and ours.error is not None and ours.error < 1e-2
    assert ours.tokens == 68 and ours.bandwidth_share and ours.matmul_share
    assert theirs.us, theirs.note
    assert fla.us is None and "fla" in fla.note
    text = report.table(rows)
    assert max(map(len, text.splitlines())) <= 80


def test_wrong_numbers_are_not_timed(monkeypatch):
    monkeypatch.setitem(contenders.OTHERS, "liar", {"decode": lambda w: lambda: torch.zeros_like(w.out)})
    liar, ours = run.compare("decode", ["liar", "torch"], TINY, "3", device="cpu", limits=LIMITS, seconds=0.1)
    assert liar.us is None and "wrong numbers" in liar.note
    assert ours.ratio == 1.0


@pytest.mark.parametrize("op", ["conv_prologue", "prefill", "decode", "fused_decode", "verify"])
def test_every_op_has_a_call(op):
    lens = (1, 1, 1) if "decode" in op else (2, 3)
    out = contenders.ours(op, "torch")(make_workload(TINY, lens, device="cpu", rows=20))()
    assert torch.isfinite(out).all() and out.abs().sum() > 0


def test_the_command_writes_json_and_a_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (the plot extra)")
    data, picture = tmp_path / "rows.json", tmp_path / "rows.png"
    arguments = ["--op", "decode", "--backend", "torch", "--shape", "1,2,64,64", "--mix", "2", "--seconds", "0.1"]
    assert main(["bench", *arguments, "--json", str(data), "--plot", str(picture)]) == 0
    rows = json.loads(data.read_text())["rows"]
    assert [row["contender"] for row in rows] == ["torch"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "copy" in shown and max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize(
    "arguments",
    [
        ["--shape", "nope"],
        ["--mix", "nope"],
        ["--graph"],
        ["--engine", "nowhere"],
        ["--backend", "nosuch"],
        ["--against", "vllm,nosuch"],
        ["--json", "nowhere/rows.json"],
    ],
    ids=" ".join,
)
def test_wrong_arguments(arguments, capsys):
    if arguments == ["--graph"] and torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA, this one has it")
    assert main(["bench", *arguments]) == 2
    assert "gdn-plugin bench:" in capsys.readouterr().err
