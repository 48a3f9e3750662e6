"""The bench: what a call must cost, that wrong numbers are never timed, and what the command writes; no times."""

from __future__ import annotations

import argparse
import json
from types import SimpleNamespace

import pytest
import torch

from gdn_plugin import ops
from gdn_plugin.ops.cases import Heads
from gdn_plugin.registry import OPS, Wants, backend_names
from gdn_plugin.tools.bench import contenders, report, run, shapes
from gdn_plugin.tools.cli import bench, main

LIMITS = {"copy_bytes_per_s": 1e10, "matmul_flops_per_s": 1e11}
TINY = "1,2,64,64"


def test_mixes():
    assert shapes.parse_mix("3x5+7") == (5, 5, 5, 7)
    assert len(shapes.parse_mix("ragged")) == 15
    for text in ("", "x", "3x", "axb", "3*5", "x5", "0", "0x5", "5+0", "²"):
        with pytest.raises(ValueError, match="not a mix"):
            shapes.parse_mix(text)


def test_the_batch_of_a_decode_is_a_number_of_sequences():
    assert shapes.parse_batch("decode", "3") == shapes.parse_batch("fused_decode", "3x1") == (1, 1, 1)
    assert shapes.parse_batch("prefill", "3") == (3,)
    with pytest.raises(ValueError, match="one token a sequence"):
        shapes.parse_batch("decode", "1x3")


def test_shapes():
    assert shapes.parse_shape("qwen3-next").conv_dim == 2 * 16 * 128 + 32 * 128
    assert shapes.parse_shape("4,8,64,128").v_dim == 128
    with pytest.raises(ValueError, match="qwen3-next-tp8"):
        shapes.parse_shape("qwen9")


def test_the_cost_of_a_decode_step_is_its_state_twice():
    cost = shapes.cost("decode", shapes.SHAPES["qwen3-next"], (1,) * 32)
    assert cost.bytes == pytest.approx(2 * 32 * 32 * 128 * 128 * 4, rel=0.02)


def test_the_cost_of_a_prefill_is_about_that_of_the_facts():
    # 9.6 GFLOP at T = 2048 with every triangular product counted whole; those are half here.
    cost = shapes.cost("prefill", shapes.SHAPES["qwen3-next"], (2048,))
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
    def liar(case):
        out = case.arguments()["out"].zero_()
        return lambda: (out,)

    monkeypatch.setitem(contenders.OTHERS, "liar", {"decode": liar})
    liar, ours = run.compare("decode", ["liar", "torch"], TINY, "3", device="cpu", limits=LIMITS, seconds=0.1)
    assert liar.us is None and "wrong numbers" in liar.note
    assert ours.ratio == 1.0


def test_a_configuration_by_hand():
    """Numbers go to the first dataclass that the kernel takes and that has so many fields."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from gdn_plugin.backends.triton.configs import Tile
    from gdn_plugin.backends.triton.staged import Staging

    seen = []

    def spy(*, out, config=None, **given):
        seen.append(config)
        ops.decode(**given, out=out, backend="torch")

    spy.__annotations__ = {"config": Tile | Staging | None}

    case = run.inputs("decode", Heads(1, 2, 64, 64), (1, 1), "bfloat16", "float32", "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contenders, "load", lambda row: SimpleNamespace(run=spy))
        for numbers in ("64/2", "64/2/4", "64/2/4/8/128"):
            assert run.error(case, contenders.maker("decode", f"triton:{numbers}")) < run.LARGEST_ERROR
    assert seen == [Tile(64, 2), Staging(64, 2, 4), Staging(64, 2, 4, 8, 128)]
    for name, said in [
        ("flashinfer:64/2", "Unavailable: flashinfer has no fused_verify"),
        ("triton:64/2/4/8/128/1", "not 64/2/4/8/128/1"),
        ("triton:64", "takes Tile elements/num_warps or Staging rows/buffers/num_warps/tokens/registers, not 64"),
        ("torch:64/2", "torch's fused_verify takes no configuration"),
    ]:
        (row,) = run.compare("fused_verify", [name], TINY, "2x2", device="cpu", limits=LIMITS, seconds=0.1)
        assert row.us is None and said in row.note, row.note
        assert said.split()[-1] in report.table([row])


@pytest.mark.parametrize("text", ["vllm,triton:64/2/4,triton", "torch:1"])
def test_a_configuration_is_spelled(text):
    assert bench._against(text) == tuple(text.split(","))


@pytest.mark.parametrize("text", ["nope:64/2", "triton:", "triton:64/", "vllm:1", "triton:a"])
def test_a_configuration_is_spelled_wrongly(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not known"):
        bench._against(text)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("wants", [Wants(), Wants(True, True, True, True, True)], ids=["plain", "wants"])
def test_every_op_has_a_call(op, wants):
    """In the form that a backend wants as well; the public op takes both."""
    lens = (1, 1, 1) if "decode" in op else (2, 2)
    case = run.inputs(op, Heads(1, 2, 64, 64), lens, "bfloat16", "float32", "cpu", wants)
    assert run.error(case, contenders.ours("torch")) < run.LARGEST_ERROR
    assert op in bench.MIXES


@pytest.mark.parametrize(("tokens", "slots"), [(1, 16), (4, 16), (5, 20), (8, 32)])
def test_a_ring_is_a_hosts(tokens, slots):
    assert run.problem("replay_verify", Heads(1, 2, 64, 64), "bfloat16", "bfloat16", (1, tokens)).ring == slots


def test_rows_for_vllm_are_one_later():
    """Its row 0 is nobody's: the one in front of the pool, which holds nothing."""
    pool = run.inputs("fused_verify", Heads(1, 2, 64, 64), (2, 2), "bfloat16", "float32", "cpu").pools["state"].view
    later = contenders._one_row_later(pool)
    assert later[1:].data_ptr() == pool.data_ptr() and later.stride() == pool.stride() and later[0].isnan().all()


def test_what_bench_is_told_of_is_there():
    assert tuple(contenders.OTHERS) == bench.OTHERS


def test_what_a_gpu_is_asked_first_can_be_asked(monkeypatch):
    """On a GPU every minute counts: no step of `make gpu` may name what is not there."""
    from gdn_plugin.tools.bench import gpu

    asked = []

    def look(op, names, shape, mix, *, graph=False, state_dtype="float32"):
        heads, lens = shapes.parse_shape(shape), shapes.parse_batch(op, mix)
        for name in names:
            assert name in backend_names() or op in contenders.OTHERS[name]
        assert shapes.cost(op, heads, lens).bytes > 0 and hasattr(torch, state_dtype)
        asked.append(op)

    def look_at_one(op, name, shape, mix, *, device):
        look(op, [name], shape, mix)

    monkeypatch.setattr(run, "make_call", look_at_one)
    monkeypatch.setattr(gpu.profile, "launches", lambda call: [])
    monkeypatch.setattr(gpu.profile, "table", lambda title, rows: title)
    job = SimpleNamespace(compare=look, extra={}, save=lambda: None)
    for step in gpu.STEPS.values():
        step(job)
    assert set(asked) == set(OPS) and len(job.extra["profiles"]) == 8


@pytest.mark.parametrize(("heads", "few"), [((2, 4), (1, 2)), ((16, 16), (2, 2)), ((1, 1), (1, 1))])
def test_the_host_time_is_of_a_problem_that_the_backend_can_run(monkeypatch, heads, few):
    """A backend for K = V = 128 alone was given 64, and the command ended with an error behind its last measurement."""
    asked = []
    monkeypatch.setattr(contenders, "ours", lambda name: lambda case: asked.append(case) or (lambda: None))
    run.host_overhead_us("prefill", "flashinfer", Heads(*heads, 128, 128), "float16", "bfloat16", "cpu")
    (case,) = asked
    assert case.args["q"].shape[1:] == (few[0], 128) and case.args["v"].shape[1:] == (few[1], 128)
    assert case.args["q"].dtype == torch.float16 and case.pools["state"].view.dtype == torch.bfloat16


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA, this one has it")
def test_a_graph_needs_a_gpu(capsys):
    assert main(["bench", "--graph"]) == 2
    assert capsys.readouterr().err == "gdn-plugin bench: --graph needs a CUDA device, and there is none\n"


def test_every_bar_has_its_value_and_no_two_labels_overlap(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="matplotlib is not installed (the plot extra)")
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    groups = [(f"1x{2**n}", {"stock": 2.5 * 4**n, "plugin": 2.0 * 4**n, "other": 4.0}) for n in range(6)]
    report.bars([("prefill", groups), ("decode", groups[:2])], tmp_path / "bars.png", "a title", "us")
    (figure,) = figures
    figure.canvas.draw()
    texts = [text for panel in figure.axes for text in panel.texts]
    assert len(texts) == 3 * 8 and all(" us" in text.get_text() for text in texts)
    assert [text.get_text() for text in texts[:2]] == [" 2.50 us", " 2.00 us   1.25x"]
    ticks = [tick for panel in figure.axes for tick in panel.get_yticklabels()]
    boxes = [text.get_window_extent() for text in (*texts, *ticks)]
    for number, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[number + 1 :])
    assert not any(panel.lines for panel in figure.axes)
