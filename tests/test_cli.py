"""The command line as a user calls it: doctor, check, and what every command does with bad values and ends."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from gdn_plugin import child
from gdn_plugin.ops import selfcheck
from gdn_plugin.registry import choice
from gdn_plugin.tools import cli
from gdn_plugin.tools.cli import accuracy, doctor, host
from gdn_plugin.tools.cli.values import output, write

ROOT = Path(__file__).parents[1]
REFUSALS = {
    "CUDA 12.8": (["--cuda", "12.8"], "needs CUDA >= 13.0 on SM 100, found 12.8"),
    "no cutlass-dsl": (["--package", "nvidia-cutlass-dsl=none"], "pip install 'nvidia-cutlass-dsl[cu13]>=4.4.2'"),
    "FlashInfer 0.6.13": (["--package", "flashinfer-python=0.6.13"], "needs flashinfer-python >= 0.6.14, found 0.6.13"),
    "K=64": (["--dims", "64,128"], "needs K=128, V=128; got K=64, V=128"),
}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("GDN_PLUGIN_", "VLLM_PLUGINS", "SGLANG_PLUGINS")):
            monkeypatch.delenv(name)


@pytest.fixture
def complete_build(monkeypatch):
    monkeypatch.setattr(choice, "in_build", lambda target: True)


@pytest.fixture
def run(capsys):
    def call(*arguments):
        try:
            code = cli.main(list(arguments))
        except SystemExit as exc:  # argparse's way to end
            code = exc.code
        shown = capsys.readouterr()
        return SimpleNamespace(code=code, out=shown.out, err=shown.err, words=" ".join(shown.out.split()))

    return call


def simulate(run, *arguments):
    shown = run("doctor", "--simulate", "sm_100", "--json", *arguments)
    return json.loads(shown.out), shown.code


@pytest.mark.usefixtures("complete_build")
class TestDoctorSimulated:
    def test_json_has_the_designs_shape(self, run):
        report, code = simulate(run, "--cuda", "13.0")
        assert code == 0
        assert {"platform", "settings", "selection", "hosts"} <= set(report)
        assert report["platform"]["sm"] == 100
        assert report["platform"]["packages"]["flashinfer-python"] == "0.7.2.post1"
        assert report["settings"]["GDN_PLUGIN_BACKEND"] == "auto"
        assert {"prefill", "decode", "verify"} <= set(report["selection"])
        prefill = report["selection"]["prefill"]
        assert prefill["backend"] == "flashinfer"
        assert [v["backend"] for v in prefill["verdicts"]] == ["flashinfer", "triton", "cpu", "torch", "reference"]
        assert prefill["verdicts"][2]["reasons"] == ["needs a cpu device, this one is cuda"]
        assert report["selection"]["decode"]["backend"] == "triton"
        assert list(report["hosts"]) == ["vllm", "sglang"]

    @pytest.mark.parametrize(("arguments", "reason"), REFUSALS.values(), ids=REFUSALS)
    def test_every_refusal_is_told(self, run, arguments, reason):
        report, code = simulate(run, *arguments)
        assert code == 0
        prefill = report["selection"]["prefill"]
        assert prefill["backend"] == "triton"
        assert any(reason in told for told in prefill["verdicts"][0]["reasons"])
        text = run("doctor", "--simulate", "sm_100", *arguments)
        assert reason in text.words

    def test_older_gpus(self, run):
        shown = run("doctor", "--simulate", "sm_80")
        assert "prefill: triton (auto)" in shown.out
        assert "needs SM 90/100/103/120, this device is 80" in shown.words

    @pytest.mark.parametrize("arguments", [[], ["--simulate", "sm_100", "--cuda", "12.8"], ["--simulate", "cpu"]])
    def test_eighty_columns_and_no_colour(self, run, arguments):
        shown = run("doctor", *arguments)
        assert max(map(len, shown.out.splitlines())) <= 80
        assert "\x1b" not in shown.out
        for heading in ("Platform", "Settings", "Backends for Hk=16, Hv=32, K=128, V=128", "vLLM", "SGLang"):
            assert heading in shown.out

    def test_a_named_backend_that_cannot_run_is_trouble(self, run, monkeypatch):
        monkeypatch.setenv("GDN_PLUGIN_PREFILL_BACKEND", "cpu")
        report, code = simulate(run)
        assert code == 1
        assert report["selection"]["prefill"]["backend"] is None
        assert report["settings"]["requests"]["prefill"] == {"value": "cpu", "source": "GDN_PLUGIN_PREFILL_BACKEND"}
        assert report["trouble"] == ["prefill: nothing can run as requested (cpu)"]
        shown = run("doctor", "--simulate", "sm_100")
        assert "prefill: NONE (asked for: cpu)" in shown.out

    def test_bad_settings_are_printed_and_do_not_crash(self, run, monkeypatch):
        monkeypatch.setenv("GDN_PLUGIN_BACKEND", "tritom")
        monkeypatch.setenv("GDN_PLUGIN_DEGUB", "1")
        monkeypatch.setenv("GDN_PLUGIN_SELF_CHECK", "yes")
        shown = run("doctor", "--simulate", "sm_100")
        assert shown.code == 1
        assert "GDN_PLUGIN_DEGUB is not a setting of gdn-plugin; did you mean 'GDN_PLUGIN_DEBUG'?" in shown.words
        assert "GDN_PLUGIN_BACKEND='tritom' is not valid; did you mean 'triton'?" in shown.words
        assert "GDN_PLUGIN_SELF_CHECK='yes' is not valid; choose one of: 0, 1" in shown.words
        assert "prefill: flashinfer (auto)" in shown.out

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--simulate", "sm100"], "platform 'sm100' is not valid"),
            (["--simulate", "sm_100", "--package", "flashinfer=0.7"], "did you mean 'flashinfer-python'?"),
            (["--simulate", "sm_100", "--package", "torch"], "'torch' is not NAME=VALUE"),
            (["--cuda", "13.0"], "give --simulate too"),
            (["--simulate", "sm_100", "--cuda", "banana"], "'banana' is not a version"),
            (["--simulate", "sm_100", "--package", "triton=abc"], "'abc' is neither a version nor none"),
            (["--simulate", "sm_100", "--feature", "flashinfer.prefil=none"], "did you mean 'flashinfer.prefill'?"),
            (["--simulate", "sm_100", "--feature", "=yes"], "is not NAME=VALUE"),
            (["--host-contract", "nowhere"], "no unpacked vllm or sglang in nowhere"),
            (["--heads", "16"], "is not two positive numbers"),
            (["--heads", "2,3"], "must be a multiple"),
            (["--heads", "0,0"], "is not two positive numbers"),
            (["--heads", "²,²"], "is not two positive numbers"),
            (["--dims", "a,b"], "is not two positive numbers"),
            (["--dtype", "bf16"], "invalid choice"),
            (["--state-dtype", "int8"], "invalid choice"),
        ],
    )
    def test_bad_arguments(self, run, arguments, message):
        shown = run("doctor", *arguments)
        assert shown.code == 2
        assert message in shown.err and shown.err.count("\n") == 1 and not shown.out

    def test_hosts_promise_a_scratch_row(self, run):
        """FlashInfer has no mask for padding: without the promise no host would get it."""
        report, _ = simulate(run, "--state-dtype", "bfloat16")
        assert report["selection"]["prefill"]["backend"] == "flashinfer"
        assert report["selection"]["gated_norm"]["backend"] == "triton"

    def test_feature(self, run):
        report, _ = simulate(run, "--feature", "flashinfer.prefill=none")
        assert report["selection"]["prefill"]["backend"] == "triton"


class TestDoctorHere:
    def test_it_always_prints(self, run, monkeypatch):
        def broken(device=None):
            raise RuntimeError("driver too old")

        monkeypatch.setattr(doctor, "probe", broken)
        shown = run("doctor")
        assert shown.code == 1
        assert "this machine could not be probed: RuntimeError: driver too old" in shown.words
        assert "Settings" in shown.out

    def test_a_chosen_backend_that_does_not_load_is_trouble(self, run, monkeypatch):
        def broken(backend):
            raise doctor.BackendError(f"backend {backend.name!r} could not be loaded")

        monkeypatch.setattr(doctor, "load", broken)
        shown = run("doctor", "--json")
        assert shown.code == 1
        assert any("could not be loaded" in told for told in json.loads(shown.out)["trouble"])


@pytest.mark.parametrize("of", host.HOSTS.values(), ids=host.HOSTS)
class TestHost:
    @pytest.fixture
    def installed(self, of, monkeypatch):
        """installed(names): entry points of the host's plugins."""

        def install(*names, version="0.33.0"):
            def entry_points(*, group):
                return [SimpleNamespace(name=name) for name in names] if group == of.group else []

            def find(distribution):
                if distribution == of.package and version is not None:
                    return version
                raise importlib.metadata.PackageNotFoundError(distribution)

            monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
            monkeypatch.setattr(importlib.metadata, "version", find)

        return install

    def test_no_host(self, of, installed):
        installed(version=None)
        report = host.report(of, disabled=False)
        assert (report.package, report.attach) == (None, False)
        assert report.reason == f"{of.title} is not installed; the ops work without it"

    def test_attaches(self, of, installed, monkeypatch):
        installed("gdn_plugin")
        monkeypatch.setattr(of.compat(), "would_attach", lambda: (True, "0.33.0 is known"))
        report = host.report(of, disabled=False)
        assert (report.package, report.attach, report.reason) == (f"{of.package} 0.33.0", True, "0.33.0 is known")

    def test_disabled(self, of, installed):
        installed("gdn_plugin")
        assert f"GDN_PLUGIN_DISABLE=1: stock {of.title} serves" in host.report(of, disabled=True).reason

    def test_not_installed_beside_it(self, of, installed):
        installed("another")
        report = host.report(of, disabled=False)
        assert report.attach is False
        assert f"no entry point gdn_plugin in {of.group}" in report.trouble[0]

    @pytest.mark.parametrize(
        ("value", "told"),
        [
            ("gdn-plugin", "does not name gdn_plugin, so {title} will not load it; 'gdn-plugin' looks mistyped"),
            ("another", "does not name gdn_plugin, so {title} will not load it"),
            ("gdn_plugin,nobody", "{variable} names 'nobody', which is not installed; there are: another, gdn_plugin"),
        ],
    )
    def test_the_list_of_plugins(self, of, installed, monkeypatch, value, told):
        installed("gdn_plugin", "another")
        monkeypatch.setenv(of.variable, value)
        assert told.format(title=of.title, variable=of.variable) in host.loading_trouble(of)[0]

    def test_a_list_that_names_it(self, of, installed, monkeypatch):
        installed("gdn_plugin", "another")
        monkeypatch.setenv(of.variable, "another,gdn_plugin")
        assert host.loading_trouble(of) == []

    @pytest.mark.parametrize("value", ["", "another, gdn_plugin"])
    def test_a_list_as_its_host_reads_it(self, of, installed, monkeypatch, value):
        """vLLM takes an empty list for no plugin, and a space for a part of the name."""
        installed("gdn_plugin", "another")
        monkeypatch.setenv(of.variable, value)
        assert (host.loading_trouble(of) == []) == (of.package == "sglang")

    def test_a_failing_look_is_reported(self, of, installed, monkeypatch):
        def broken():
            raise OSError("unreadable")

        installed("gdn_plugin")
        monkeypatch.setattr(of.compat(), "would_attach", broken)
        report = host.report(of, disabled=False)
        assert report.attach is None
        assert "OSError: unreadable" in report.reason

    def test_one_host_alone(self, of, installed, monkeypatch, run):
        installed("gdn_plugin")
        monkeypatch.setattr(of.compat(), "would_attach", lambda: (True, "it is known"))
        shown = run("doctor", "--host", of.package, "--simulate", "sm_100", "--json")
        assert shown.code == 0 and list(json.loads(shown.out)["hosts"]) == [of.package]
        monkeypatch.setattr(of.compat(), "would_attach", lambda: (False, "it is not known"))
        assert run("doctor", "--host", of.package, "--simulate", "sm_100").code == 1
        assert run("doctor", "--simulate", "sm_100").code == 0

    def test_host_contract(self, of, run, tmp_path):
        shown = run("doctor", "--host-contract", str(tmp_path))
        assert shown.code == 2
        (tmp_path / of.package).mkdir()
        (tmp_path / of.package / "__init__.py").touch()
        for folder in (tmp_path, tmp_path / of.package):
            shown = run("doctor", "--host-contract", str(folder), "--json")
            assert shown.code == 1
            told = json.loads(shown.out)
            assert told["missing"] and told["host"] == of.package
        other = next(name for name in host.HOSTS if name != of.package)
        shown = run("doctor", "--host", other, "--host-contract", str(tmp_path))
        assert shown.code == 2 and f"no unpacked {other} in" in shown.err


class TestCheck:
    SMALL = ("--heads", "2,4", "--dims", "16,16")

    def test_backends_of_this_machine(self, run):
        shown = run("check", *self.SMALL, "--backend", "torch", "--op", "prefill", "--op", "decode")
        assert shown.code == 0, shown.out
        assert "2 of 2 passed" in shown.out
        assert max(map(len, shown.out.splitlines())) <= 80

    def test_the_norm_too(self, run):
        shown = run("check", *self.SMALL, "--backend", "torch")
        assert "gated_norm    torch       ok" in shown.out

    def test_json(self, run):
        shown = run("check", *self.SMALL, "--op", "decode", "--backend", "reference", "--json")
        report = json.loads(shown.out)
        assert shown.code == 0
        assert report["results"][0]["ok"] is True
        assert set(report["results"][0]["errors"]) == {"out", "state"}

    def test_a_failure_exits_with_1_and_says_why(self, run, monkeypatch):
        def failing(backend, problem, device):
            return selfcheck.CheckResult(backend.name, problem.op, {"out": 1.0}, {"out": 3.0}, 0.04, 0.1, "out is off")

        monkeypatch.setattr(selfcheck, "run", failing)
        shown = run("check", *self.SMALL, "--op", "decode", "--backend", "reference")
        assert shown.code == 1
        assert "FAILED" in shown.out
        assert "decode, reference: out is off" in shown.out

    def test_a_backend_that_cannot_run_here(self, run, monkeypatch):
        shown = run("check", "--backend", "flashinfer", "--dims", "64,64")
        assert shown.code == 1
        assert "flashinfer cannot run prefill" in shown.out
        assert "needs K=128, V=128; got K=64, V=64" in shown.out

    def test_unknown_backend(self, run):
        shown = run("check", "--backend", "tritom")
        assert shown.code == 2
        assert "choose one of: flashinfer, triton, cpu, torch, reference" in shown.err


BENCH = ("bench", "--op", "decode", "--backend", "torch", "--shape", "1,2,64,64")
ACCURACY = ("accuracy", "--model", str(ROOT / "examples/recall/model"), "--backend", "torch", "--mode", "plain")
WRONG = [
    *((*BENCH, "--mix", mix) for mix in ("0", "-1", "nan", "", ",", "0x5", "2x3", "99999999")),
    *((*BENCH, "--seconds", seconds) for seconds in ("nan", "inf", "0", "-1", "soon")),
    *((*BENCH, "--shape", shape) for shape in ("nope", "0,0,64,64", "2,3,64,64", "-1,2,64,64", "²,²,64,64")),
    *((*BENCH, flag, name) for flag in ("--backend", "--against") for name in ("", ",", "nosuch", "torch,nosuch")),
    *((*BENCH, "--json", file) for file in (".", "nowhere/rows.json", "/proc/rows.json")),
    (*BENCH, "--plot", "nowhere/rows.png"),
    *(("bench", "--engine", "--model", model) for model in ("nowhere", "./no/where", "tests", "")),
    *(("bench", "--engine", "--rounds", rounds) for rounds in ("", "quick", "prefill,", "decode,quick")),
    *(("bench", "--engine", "--speculative", number) for number in ("0", "-1", "x", "3")),
    *(("bench", "--engine", flag, "0") for flag in ("--turns", "--repeats", "--replay", "--tensor-parallel")),
    *(("bench", "--engine", "--replay", slots) for slots in ("3", "65", "auto", "+8")),
    *(("bench", "--engine", *more) for more in (("--op", "decode"), ("--graph",), ("--state-dtype", "fp8"))),
    ("bench", "--engine", "--json", "nowhere/rows.json"),
    *((*BENCH, *more) for more in (("--model", "tiny"), ("--rounds", "prefill"), ("--turns", "2"), ("--replay", "8"))),
    *((*ACCURACY, "--prompts", number) for number in ("0", "-3", "nan", "1.5")),
    *((*ACCURACY, "--lengths", lengths) for lengths in ("", ",", "0", "128,x", "12")),
    *((*ACCURACY, "--subset", number) for number in ("0", "nan")),
    *((*ACCURACY, "--pairs", number) for number in ("0", "3", "1000")),
    *((*ACCURACY, "--mode", mode) for mode in ("", "fast", "plain,")),
    *((*ACCURACY, "--backend", name) for name in ("", "nosuch")),
    *((*ACCURACY, flag, ".") for flag in ("--json", "--markdown")),
    (*ACCURACY, "--model", "nowhere"),
    *(("check", "--backend", name) for name in ("", "nosuch")),
    *(("compile", "--sm", "90", "--workers", number) for number in ("0", "-1", "many")),
    ("compile", "--sm", "90", "--sm-count", "0"),
    ("compile", "--sm", "90", "--cache", "/proc/nowhere"),
    ("compile", "--sm", "91"),
    ("compile",),
    ("compile", "--sm", "90", "--model", "nowhere"),
    ("compile", "--sm", "90", "--model", str(ROOT / "examples/recall/model")),
]


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_a_bad_value_is_one_line_before_any_work(run, arguments, monkeypatch, tmp_path):
    from gdn_plugin.tools.bench import timing

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timing, "ceilings", lambda device: pytest.fail("work was begun"))
    monkeypatch.setattr("gdn_plugin.child.run", lambda *_, **__: pytest.fail("an engine was started"))
    shown = run(*arguments)
    assert shown.code == 2
    assert shown.err.startswith(f"gdn-plugin {arguments[0]}: ") and shown.err.count("\n") == 1
    assert not shown.out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("held", ["{}", None], ids=["of a file", "of nothing yet"])
def test_a_link_stays_one(held, tmp_path):
    real, link = tmp_path / "real" / "rows.json", tmp_path / "rows.json"
    real.parent.mkdir()
    link.symlink_to(real)
    if held:
        real.write_text(held)
    output(str(link))
    assert link.is_symlink() and real.exists() == bool(held)
    write(link, "[]")
    assert link.readlink() == real and real.read_text() == "[]"
    assert [path.name for path in real.parent.iterdir()] == ["rows.json"]


@pytest.mark.parametrize("reason", [errno.EACCES, errno.EBUSY, errno.EROFS, errno.ENOSPC])
def test_where_no_file_can_be_made_the_old_one_is_written(reason, monkeypatch, tmp_path):
    def refuse(*_):
        raise OSError(reason, "no")

    file = tmp_path / "rows.json"
    file.write_text("{}")
    monkeypatch.setattr(Path, "replace", refuse)
    if reason == errno.ENOSPC:  # what is there stays
        with pytest.raises(OSError, match="no"):
            write(file, "[]")
    else:
        write(file, "[]")
    assert file.read_text() == ("{}" if reason == errno.ENOSPC else "[]") and list(tmp_path.iterdir()) == [file]


def test_a_command_that_made_a_table_can_be_pasted(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gdn-plugin", "accuracy", "--json", "x", "--model", "my models/a"])
    assert accuracy._command() == "gdn-plugin accuracy --model 'my models/a'"


def test_accuracy_of_a_folder_that_transformers_cannot_load(run, tmp_path):
    pytest.importorskip("vllm", reason="vllm is not installed")
    shutil.copy(ROOT / "examples/recall/model/config.json", tmp_path)
    shown = run("accuracy", "--model", str(tmp_path), "--lengths", "128", "--mode", "plain", "--backend", "torch")
    assert (shown.code, shown.out) == (2, "") and shown.err.count("\n") == 1
    assert shown.err.startswith(f"gdn-plugin accuracy: --model {tmp_path}: transformers cannot load it: OSError: ")


@pytest.mark.parametrize("head", [True, False], ids=["head", "no-head"])
def test_modes_that_draft_with_mtp_take_a_head(run, head, monkeypatch, tmp_path):
    """Asked for, they are refused without one, and left out where nothing was asked for."""
    pytest.importorskip("vllm", reason="vllm is not installed")
    from gdn_plugin.tools.accuracy import evaluate, reference, report
    from gdn_plugin.tools.accuracy.score import Cell

    asked = []

    def row(engine, *_, **__):
        asked.append(engine.mode)
        return report.Row(engine.backend, engine.mode, (Cell(128, 4, 4, 4, 0.0),))

    monkeypatch.setattr(reference, "Reference", lambda model: None)
    monkeypatch.setattr(
        evaluate, "reference_row", lambda *_: report.Row(report.REFERENCE, "-", (Cell(128, 4, 4, 4, 0.0),))
    )
    monkeypatch.setattr(evaluate, "engine_row", row)
    model = Path(shutil.copytree(ROOT / "examples/recall/model", tmp_path / "model"))
    if not head:
        (model / "model.safetensors").unlink()
    command = ("accuracy", "--model", str(model), "--backend", "torch", "--lengths", "128")
    assert run(*command).code == 0
    assert asked == ["plain", "cache", "spec", "cache+spec", *(["mtp", "cache+mtp"] if head else [])]
    asked.clear()
    shown = run(*command, "--mode", "plain,cache+mtp")
    if head:
        assert (shown.code, asked) == (0, ["plain", "cache+mtp"])
    else:
        assert (shown.code, shown.out, asked) == (2, "", [])
        assert shown.err.startswith("gdn-plugin accuracy: --mode cache+mtp: ") and shown.err.count("\n") == 1
        assert "has no MTP head" in shown.err


class TestEnds:
    """As processes, since it is about their streams and signals."""

    def command(self, *arguments, shell="", **options):
        line = f"{shell.format(command=shlex.join([sys.executable, '-m', 'gdn_plugin', *arguments]))}"
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            ["bash", "-c", line], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, **options
        )

    @pytest.mark.parametrize(
        "shell", ["{command} >&-", "{command} <&- >&- 2>&-", "set -o pipefail; {command} | true"], ids=str
    )
    def test_nobody_reads(self, shell):
        done = self.command("doctor", "--simulate", "sm_90", shell=shell)
        assert (done.returncode, done.stderr) == (0, "")

    def test_a_closed_stdout_is_not_a_files(self, tmp_path):
        """The first file that is opened must not get the number of standard output, and with it what is printed."""
        out = tmp_path / "rows.json"
        arguments = ("bench", "--op", "gated_norm", "--backend", "torch", "--shape", "1,2,64,64", "--mix", "2")
        done = self.command(*arguments, "--seconds", "0.1", "--json", str(out), shell="{command} >&-")
        assert (done.returncode, done.stderr) == (0, "")
        assert [row["contender"] for row in json.loads(out.read_text())["rows"]] == ["torch"]

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
    def test_a_full_disk(self):
        done = self.command("doctor", "--simulate", "sm_90", shell="{command} >/dev/full")
        assert done.returncode == 1
        assert done.stderr == "gdn-plugin doctor: standard output: No space left on device\n"

    def test_ctrl_c_ends_in_one_line_and_keeps_what_was_measured(self, tmp_path):
        out = tmp_path / "rows.json"
        arguments = [
            "--op",
            "decode",
            "--backend",
            "torch",
            "--shape",
            "1,2,64,64",
            "--mix",
            "1,2,3",
            "--seconds",
            "1000",
        ]
        code = (
            "import os, signal; from gdn_plugin.tools.bench import timing\n"
            "def interleaved(calls, **_):\n"
            "    if turns.pop(): os.kill(os.getpid(), signal.SIGINT)\n"
            "    return {name: [1.0] for name in calls}\n"
            "turns = [True, False]; timing.interleaved = interleaved\n"
            "timing.ceilings = lambda device: {'copy_bytes_per_s': 1e10, 'matmul_flops_per_s': 1e11}\n"
            "from gdn_plugin.tools.cli import main\n"
            f"raise SystemExit(main({['bench', *arguments, '--json', str(out)]!r}))"
        )
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
        )
        assert (done.returncode, done.stderr) == (130, "gdn-plugin bench: interrupted\n")
        assert [row["mix"] for row in json.loads(out.read_text())["rows"]] == ["1"]
        assert "decode  1,2,64,64  1 " in done.stdout

    def test_an_interrupted_accuracy_run_keeps_its_rows(self, run, tmp_path, monkeypatch):
        pytest.importorskip("vllm", reason="vllm is not installed")
        from gdn_plugin.tools.accuracy import evaluate, reference, report
        from gdn_plugin.tools.accuracy.score import Cell

        def interrupted(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(reference, "Reference", lambda model: None)
        row = report.Row(report.REFERENCE, "-", (Cell(128, 4, 4, 4, 0.0),))
        monkeypatch.setattr(evaluate, "reference_row", lambda *_: row)
        monkeypatch.setattr(evaluate, "engine_row", interrupted)
        data, table = tmp_path / "rows.json", tmp_path / "table.md"
        shown = run(*ACCURACY, "--lengths", "128", "--json", str(data), "--markdown", str(table))
        assert (shown.code, shown.err) == (130, "gdn-plugin accuracy: interrupted\n")
        assert [row["backend"] for row in json.loads(data.read_text())["rows"]] == [report.REFERENCE]
        assert "| fp32 reference |" in table.read_text()


# Starts children of its own, one of which leaves the session, and tells their ids.
TREE = """
import subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(300)"]
two = [subprocess.Popen(sleep, start_new_session=new) for new in (False, True)]
print(*(process.pid for process in two), flush=True)
if len(sys.argv) < 2: time.sleep(300)
"""


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def gone(pids: list[int], seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(alive, pids))


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
class TestChildren:
    def test_status_and_what_is_left_behind(self, tmp_path):
        log_file = tmp_path / "log"
        with log_file.open("w") as log:
            assert child.run([sys.executable, "-c", "raise SystemExit(3)"], log=log) == 3
            kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
            assert child.run([sys.executable, "-c", kill], log=log) == -signal.SIGKILL
            assert child.run([sys.executable, "-c", TREE, "leave"], log=log) == 0
        pids = [int(word) for word in log_file.read_text().split()]
        assert len(pids) == 2 and not any(map(alive, pids))

    def test_a_timeout_leaves_nothing(self, tmp_path):
        log_file = tmp_path / "log"
        with log_file.open("w") as log, pytest.raises(subprocess.TimeoutExpired):
            child.run([sys.executable, "-c", TREE], log=log, timeout=3)
        pids = [int(word) for word in log_file.read_text().split()]
        assert len(pids) == 2 and not any(map(alive, pids))

    @pytest.mark.parametrize(
        "end", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGHUP], ids=lambda s: s.name
    )
    def test_a_whole_tree_ends_with_whoever_started_it(self, tmp_path, end):
        log_file = tmp_path / "log"
        run = f"child.run([sys.executable, '-c', {TREE!r}], log=sys.stdout)"
        code = f"import sys; from gdn_plugin import child; {run}"
        with log_file.open("w") as log:
            starter = subprocess.Popen(
                [sys.executable, "-c", code], stdout=log, stderr=log, env=os.environ | {"PYTHONPATH": str(ROOT)}
            )
        while log_file.read_text().count(" ") < 1 or not log_file.read_text().endswith("\n"):
            assert starter.poll() is None, log_file.read_text()
            time.sleep(0.05)
        pids = [int(word) for word in log_file.read_text().split()]
        assert all(map(alive, pids))
        starter.send_signal(end)
        starter.wait(10)
        assert gone(pids)

    def test_a_worker_of_a_pool_ends_with_its_starter(self, tmp_path):
        script = tmp_path / "pool.py"
        script.write_text(
            "import os, time\nfrom multiprocessing import get_context\n"
            "from concurrent.futures import ProcessPoolExecutor\n"
            "from gdn_plugin.child import end_with_parent\n"
            "if __name__ == '__main__':\n"
            "    pool = ProcessPoolExecutor(1, get_context('spawn'), end_with_parent)\n"
            "    print(pool.submit(os.getpid).result(), flush=True); time.sleep(300)\n"
        )
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        starter = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment)
        worker = int(starter.stdout.readline())
        assert alive(worker)
        starter.kill()
        starter.wait()
        assert gone([worker])

    @pytest.mark.engine
    @pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
    def test_an_engine_ends_with_its_command(self, end):
        pytest.importorskip("vllm", reason="vllm is not installed")
        command = [sys.executable, "-m", "gdn_plugin", *ACCURACY, "--prompts", "500", "--lengths", "256"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        parent = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment, cwd=ROOT
        )
        while len(pids := child.descendants(parent.pid)) < 2:  # the keeper and the engine
            assert parent.poll() is None
            time.sleep(0.2)
        time.sleep(4)
        pids = child.descendants(parent.pid) or pids
        parent.send_signal(end)
        parent.wait(10)
        assert gone(pids)


@pytest.mark.parametrize("arguments", [["--help"], ["doctor", "--help"], ["check", "--help"], ["--version"]])
def test_help(run, arguments):
    assert run(*arguments).code == 0


def test_unknown_commands(run):
    for arguments in ([], ["docter"]):
        assert run(*arguments).code == 2
