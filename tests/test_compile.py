"""`gdn-plugin compile`: kernels compiled for GPUs that are not there, and what the command does with failures."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gdn_plugin.ops import ahead
from gdn_plugin.registry import OPS, Platform, Problem, replay
from gdn_plugin.tools import compile as compilation
from gdn_plugin.tools.cli import main
from gdn_plugin.tools.cli.compile import _tell, caches
from gdn_plugin.tools.compile import Row

ROOT = Path(__file__).parents[1]
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
        for variant in compilation.triton_variants(problem, Platform.simulated("sm_90"))
    ]
    assert len(names) == len(set(names))
    of_equal_dims = ("gated_norm", *(op for op in OPS if op.startswith("replay_")))
    kernels = ("prefill_solve", "prefill_state", *(op for op in OPS if op != "prefill"))
    for kernel in kernels:
        for K, V in itertools.product((64, 128, 256), repeat=2):
            if K == V or kernel not in of_equal_dims:
                assert any(name.startswith(f"{kernel} K{K} V{V} ") for name in names), (kernel, K, V)


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
    platform = Platform.simulated("sm_90")
    row = compilation.compile_variant(
        platform, "triton", problem, compilation.triton_variants(problem, platform)[0].name
    )
    assert row.error == "RuntimeError: no code for sm_90" and row.registers is None


def test_nothing_to_compile_exits_1(capsys):
    assert main(["compile", "--sm", "90", "--backend", "triton", "--op", "decode", "--dims", "32,32"]) == 1
    assert "nothing to compile" in capsys.readouterr().err


def test_a_wrong_setting_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("GDN_PLUGIN_SELF_CHECK", "yes")
    assert main(["compile", "--backend", "cpu"]) == 2
    said = capsys.readouterr().err
    assert said == "gdn-plugin compile: GDN_PLUGIN_SELF_CHECK='yes' is not valid; choose one of: 0, 1\n"


# A process of its own: this one has looked for compilers and imported Triton.
WITHOUT = (
    "import sys; sys.modules['triton'] = None; from gdn_plugin.tools.cli import main; sys.exit(main(sys.argv[1:]))"
)


@pytest.mark.parametrize(
    ("arguments", "environment", "why"),
    [
        (["--sm", "90"], {}, "backend 'triton' could not be loaded: "),
        (["--backend", "cpu"], {"CXX": "/absent/c++"}, "no backend can run gdn::decode as requested ('cpu') "),
        (["--backend", "cpu"], {"CXX": "false", "GDN_PLUGIN_SELF_CHECK": "0"}, "compiling the cpu backend failed\n"),
    ],
    ids=["no Triton", "no C++ compiler", "a C++ compiler that fails"],
)
def test_what_a_machine_has_no_compiler_for_exits_1_and_says_why(tmp_path, arguments, environment, why):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "GDN_PLUGIN_CACHE": str(tmp_path), **environment}
    command = [sys.executable, "-c", WITHOUT, "compile", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith(f"gdn-plugin compile: {why}") and "Traceback" not in done.stderr


@needs_triton
@pytest.mark.slow
def test_an_interrupted_compile_leaves_its_queue():
    """SIGINT to the command alone, which its compiling processes do not see."""
    command = [sys.executable, "-m", "gdn_plugin", "compile", "--sm", "90", "--backend", "triton", "--workers", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as compiling:
        try:
            assert "regs" in compiling.stdout.readline() and "triton: " in compiling.stdout.readline()
            compiling.send_signal(signal.SIGINT)
            _, said = compiling.communicate(timeout=20)
        finally:
            compiling.kill()
    assert compiling.returncode == 130 and said.endswith("gdn-plugin compile: interrupted\n")


def test_unknown_architectures_are_refused(capsys):
    with pytest.raises(SystemExit) as left:
        main(["compile", "--sm", "75"])
    assert left.value.code == 2 and "choose from 80, 90, 100, 103, 120" in capsys.readouterr().err


# What an engine's start-up does with a cache: every variant as `warm_up` compiles it, on a device that is a stand-in.
START = """
import json, sys
import torch
from triton import knobs
from gdn_plugin.ops.dispatch import backend_op, warm
from gdn_plugin.registry import Platform
from gdn_plugin.backends.triton.launch import compile_count
from gdn_plugin.tools.cli.compile import layer_of_model
from gdn_plugin.hosts.core import Shape
from tests.support.triton_device import stand_in

built = []
knobs.compilation.listener = lambda *, src, cache_hit, **_: cache_hit or built.append(src.name)
layer, ops, facts = layer_of_model(sys.argv[1]), sys.argv[2].split(), json.loads(sys.argv[3])
problems = Shape(**layer, bias_dtype="bfloat16", null_index=0, padding="scratch", **facts).problems()
page = torch.empty_strided((9, 4, 64, 64), (40960, 4096, 64, 1), dtype=torch.bfloat16, device="meta")
with stand_in(90) as loads:
    for op in ops:
        for pool in (None, page):  # first of no pool, then of the host's pages, whose states are further apart
            warm(backend_op(op, "triton"), Platform.simulated("sm_90"), problems[op], pool)
print(json.dumps({"built": built, "held": compile_count(), "loaded": len(loads)}))
"""
SIZES = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
         "linear_conv_kernel_dim": 4, "dtype": "bfloat16"}  # fmt: skip


def start(folder, cache, ops, facts):
    # All else as the compiling processes had it: a variable that names another ptxas is part of Triton's key.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= caches(cache) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", START, str(folder), " ".join(ops), json.dumps(facts)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    ("ring", "facts", "ops", "compiled", "held"),
    [
        ("0", {}, ("gated_norm", "fused_decode"), 14, 8),
        ("8", {"replay": 16, "spec_tokens": 4}, ("replay_fold", "replay_verify"), 16, 8),
    ],
    ids=["plain", "replay"],
)
def test_an_image_with_a_filled_cache_compiles_nothing(tmp_path, monkeypatch, capsys, ring, facts, ops, compiled, held):
    for name in caches(tmp_path):
        monkeypatch.setenv(name, "")  # put back afterwards: the command sets them
    monkeypatch.setenv("GDN_PLUGIN_REPLAY", ring)
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    cache = tmp_path / "cache"
    asked = ["--backend", "triton", *itertools.chain.from_iterable(("--op", op) for op in ops)]
    asked += ["--speculative", "3"] if facts else []
    assert main(["compile", "--sm", "90", "--model", str(tmp_path), "--cache", str(cache), *asked]) == 0
    shown = capsys.readouterr().out
    assert f"TRITON_CACHE_DIR={cache / 'triton'}" in shown and f"{compiled} of {compiled} compiled" in shown
    assert start(tmp_path, cache, ops, facts) == {"built": [], "held": held, "loaded": held}
    assert start(tmp_path, tmp_path / "other", ops[:1], facts)["built"], "or the line above sees nothing"


def listed(folder, monkeypatch, *arguments):
    """(op, slots of its ring) of the steps that engines have compiled, of heads that every backend takes."""
    for name in caches(folder):
        monkeypatch.setenv(name, "")
    sizes = SIZES | {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
    (folder / "config.json").write_text(json.dumps(sizes))
    choices = []
    monkeypatch.setattr(ahead, "jobs_of", lambda reached, platform: choices.extend(reached) or [])
    monkeypatch.setattr(compilation, "compile_jobs", lambda *_: iter(()))
    main(["compile", "--sm", "90", "--model", str(folder), "--cache", str(folder), *arguments])
    return {(one.problem.op, one.problem.ring) for one in choices if one.problem.phase != "prefill"}


STEPS = {("fused_decode", 0), ("fused_verify", 0)}
RINGS = {("replay_decode", 8), ("replay_decode", 16), ("replay_verify", 16)}  # 16: four steps of three drafts


def test_an_image_has_replay_where_its_engines_will(tmp_path, monkeypatch):
    drafts = ["--backend", "triton", "--speculative", "3"]
    measured = {("replay_decode", 16), ("replay_verify", 16)}
    assert listed(tmp_path, monkeypatch, *drafts, "--state-dtype", "bfloat16") == measured
    rows = replay.PREFERENCES[-1:]
    monkeypatch.setattr(replay, "PREFERENCES", rows)
    assert listed(tmp_path, monkeypatch, *drafts) == STEPS
    monkeypatch.setattr(replay, "PREFERENCES", (replay.Preference(8, "measured", "x", sms=(90,)), *rows))
    assert listed(tmp_path, monkeypatch, *drafts) == RINGS
    assert listed(tmp_path, monkeypatch, "--backend", "triton") == {("replay_decode", 8)}
    monkeypatch.setattr(replay, "PREFERENCES", rows)
    monkeypatch.setenv("GDN_PLUGIN_REPLAY", "8")
    assert listed(tmp_path, monkeypatch, *drafts) == RINGS
    assert not listed(tmp_path, monkeypatch, "--backend", "flashinfer") & RINGS
    monkeypatch.setenv("GDN_PLUGIN_REPLAY", "65")
    assert not listed(tmp_path, monkeypatch)


def test_an_image_has_the_backends_that_its_engines_ask_for(tmp_path, monkeypatch, capsys):
    state = ["--state-dtype", "bfloat16"]
    monkeypatch.setenv("GDN_PLUGIN_REPLAY", "0")
    assert listed(tmp_path, monkeypatch, *state) == {("fused_decode", 0)}
    asked = listed(tmp_path, monkeypatch, *state, "--backend", "flashinfer")
    assert asked == {("decode", 0)}
    monkeypatch.setenv("GDN_PLUGIN_DECODE_BACKEND", "flashinfer")
    assert listed(tmp_path, monkeypatch, *state) == asked
    assert listed(tmp_path, monkeypatch, *state, "--backend", "triton") == {("fused_decode", 0)}
    monkeypatch.delenv("GDN_PLUGIN_DECODE_BACKEND")
    monkeypatch.setenv("GDN_PLUGIN_BACKEND", "cpu")
    capsys.readouterr()
    assert main(["compile", "--sm", "90", "--model", str(tmp_path), "--cache", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("gdn-plugin compile: no backend can run gdn::") and "needs a cpu device" in said


def test_variables_of_a_cache_can_be_pasted(capsys):
    _tell(Path("/the caches"))
    assert "\n  TRITON_CACHE_DIR='/the caches/triton'\n" in capsys.readouterr().out


def test_a_backend_that_cannot_serve_the_model_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    for name in caches(tmp_path):
        monkeypatch.setenv(name, "")
    (tmp_path / "config.json").write_text(json.dumps(SIZES | {"linear_key_head_dim": 64, "linear_value_head_dim": 64}))
    asked = ["compile", "--sm", "90", "--model", str(tmp_path), "--cache", str(tmp_path), "--backend", "flashinfer"]
    assert main(asked) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1
    assert "--backend flashinfer: no backend can run gdn::prefill" in said.err and "needs K=128, V=128" in said.err


@pytest.mark.parametrize(
    "config, why",
    [
        ("", "no config.json"),
        ("[", "no config.json"),
        ("{}", "no linear_num_key_heads"),
        ('{"text_config": {}}', "no GDN"),
    ],
)
def test_a_model_without_such_layers_is_refused(tmp_path, capsys, config, why):
    if config:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(SystemExit) as left:
        main(["compile", "--sm", "90", "--cache", str(tmp_path), "--model", str(tmp_path)])
    assert left.value.code == 2 and why in capsys.readouterr().err


def odd(**changed):
    return json.dumps(SIZES | changed)


@pytest.mark.parametrize("command", [["compile", "--sm", "90"], ["accuracy"]], ids=["compile", "accuracy"])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "is not that of a model"),
        ("5", "is not that of a model"),
        ("{", "no config.json that can be read there: Expecting property name"),
        ("[" * 100_000, "no config.json that can be read there: "),
        ("{}", "has no linear_num_key_heads, so no GDN layers"),
        ('{"text_config": null}', "has no linear_num_key_heads, so no GDN layers"),
        ('{"text_config": 5}', "is not that of a model"),
        (odd(linear_num_key_heads="x"), "linear_num_key_heads in its config.json is 'x', not a whole number above 0"),
        (odd(linear_num_key_heads=2.5), "linear_num_key_heads in its config.json is 2.5, not a whole"),
        (odd(linear_num_key_heads=float("inf")), "linear_num_key_heads in its config.json is inf, not a whole"),
        (odd(linear_value_head_dim=None), "linear_value_head_dim in its config.json is None, not a whole"),
        (odd(linear_num_key_heads=0), "linear_num_key_heads in its config.json is 0, not a whole"),
        (odd(linear_num_key_heads=3), "linear_num_value_heads in its config.json is no multiple of"),
        (odd(dtype=["bfloat16"]), "a dtype in its config.json is ['bfloat16'], not one of bfloat16, float16"),
        (odd(mamba_ssm_dtype="int4"), "a dtype in its config.json is 'int4', not one of bfloat16, float16"),
    ],
    ids=lambda value: value[:40],
)
def test_a_folder_that_is_no_gdn_models(tmp_path, capsys, command, text, words):
    (tmp_path / "config.json").write_text(text)
    try:
        code = main([*command, "--model", str(tmp_path)])
    except SystemExit as ended:
        code = ended.code
    said = capsys.readouterr()
    assert (code, said.out) == (2, "") and said.err.count("\n") == 1
    assert str(tmp_path) in said.err and words in said.err


def test_an_image_has_what_the_hosts_room_launches(tmp_path, monkeypatch):
    """Moves of states between blocks, for either model runner; the second time they are found."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    jobs = compilation.host_jobs(Problem("decode", "bfloat16", "bfloat16", 16, 32, 128, 128))
    for cached in (False, True):
        rows = [row for _, row in compilation.compile_jobs(Platform.simulated("sm_90"), jobs, 1)]
        assert len(rows) == 4 and not any(row.error or row.spills for row in rows), rows
        assert all(row.cached == cached and row.artifact.startswith(str(tmp_path)) for row in rows)
