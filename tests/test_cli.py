"""The command line: doctor and check, as a user calls them."""

from __future__ import annotations

import importlib.metadata
import json
import os
from types import SimpleNamespace

import pytest

from gdn_plugin import cli, selfcheck
from gdn_plugin.cli import doctor, host
from gdn_plugin.registry import choice

REFUSALS = {
    "CUDA 12.8": (["--cuda", "12.8"], "needs CUDA >= 13.0 on SM 100, found 12.8"),
    "no cutlass-dsl": (["--package", "nvidia-cutlass-dsl=none"], "pip install 'nvidia-cutlass-dsl[cu13]>=4.4.2'"),
    "FlashInfer 0.6.13": (["--package", "flashinfer-python=0.6.13"], "needs flashinfer-python >= 0.6.14, found 0.6.13"),
    "K=64": (["--dims", "64,128"], "needs K=128, V=128; got K=64, V=128"),
}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("GDN_PLUGIN_", "VLLM_PLUGINS")):
            monkeypatch.delenv(name)


@pytest.fixture
def complete_build(monkeypatch):
    monkeypatch.setattr(choice, "in_build", lambda target: True)


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = cli.main(list(arguments))
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
        assert {"platform", "settings", "selection", "host"} <= set(report)
        assert report["platform"]["sm"] == 100
        assert report["platform"]["packages"]["flashinfer-python"] == "0.7.2.post1"
        assert report["settings"]["GDN_PLUGIN_BACKEND"] == "auto"
        assert {"prefill", "decode", "verify"} <= set(report["selection"])
        prefill = report["selection"]["prefill"]
        assert prefill["backend"] == "flashinfer"
        assert [v["backend"] for v in prefill["verdicts"]] == ["flashinfer", "triton", "cpu", "torch", "reference"]
        assert prefill["verdicts"][2]["reasons"] == ["needs a cpu device, this one is cuda"]
        assert report["selection"]["decode"]["backend"] == "triton"
        assert "vllm" in report["host"]

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
        for heading in ("Platform", "Settings", "Backends for Hk=16, Hv=32, K=128, V=128", "vLLM"):
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
            (["--simulate", "sm_100", "--package", "flashinfer=0.7"], "did you mean flashinfer-python?"),
            (["--simulate", "sm_100", "--package", "torch"], "'torch' is not NAME=VALUE"),
            (["--cuda", "13.0"], "give --simulate too"),
            (["--simulate", "sm_100", "--cuda", "banana"], "'banana' is not a version"),
        ],
    )
    def test_bad_arguments(self, run, arguments, message):
        shown = run("doctor", *arguments)
        assert shown.code == 2
        assert message in shown.err

    @pytest.mark.parametrize(
        "arguments",
        [["--heads", "16"], ["--heads", "2,3"], ["--dtype", "bf16"], ["--dims", "a,b"], ["--state-dtype", "float16"]],
    )
    def test_bad_shapes(self, run, arguments):
        with pytest.raises(SystemExit) as caught:
            run("doctor", *arguments)
        assert caught.value.code == 2

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


class TestHost:
    @pytest.fixture
    def installed(self, monkeypatch):
        """installed(names): entry points of vLLM's general plugins."""

        def install(*names, version="0.33.0"):
            def entry_points(*, group):
                return [SimpleNamespace(name=name) for name in names] if group == host.GROUP else []

            def find(distribution):
                if distribution == "vllm" and version is not None:
                    return version
                raise importlib.metadata.PackageNotFoundError(distribution)

            monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
            monkeypatch.setattr(importlib.metadata, "version", find)

        return install

    def test_no_vllm(self, installed):
        installed(version=None)
        report = host.report(disabled=False)
        assert (report.package, report.attach) == (None, False)

    def test_attaches(self, installed, monkeypatch):
        installed("gdn_plugin")
        monkeypatch.setattr("gdn_plugin.hosts.vllm.compat.would_attach", lambda: (True, "vLLM 0.33.0 is known"))
        report = host.report(disabled=False)
        assert (report.package, report.attach, report.reason) == ("vllm 0.33.0", True, "vLLM 0.33.0 is known")

    def test_disabled(self, installed):
        installed("gdn_plugin")
        assert "GDN_PLUGIN_DISABLE=1" in host.report(disabled=True).reason

    def test_not_installed_beside_vllm(self, installed):
        installed("another")
        report = host.report(disabled=False)
        assert report.attach is False
        assert "no entry point gdn_plugin" in report.trouble[0]

    @pytest.mark.parametrize(
        ("value", "told"),
        [
            ("gdn-plugin", "does not name gdn_plugin, so vLLM will not load it; 'gdn-plugin' looks mistyped"),
            ("another", "does not name gdn_plugin, so vLLM will not load it"),
            ("", "does not name gdn_plugin, so vLLM will not load it"),
            (
                "gdn_plugin,nobody",
                "VLLM_PLUGINS names 'nobody', which is not installed; there are: another, gdn_plugin",
            ),
        ],
    )
    def test_vllm_plugins(self, installed, monkeypatch, value, told):
        installed("gdn_plugin", "another")
        monkeypatch.setenv("VLLM_PLUGINS", value)
        assert told in host.loading_trouble()[0]

    def test_vllm_plugins_that_names_it(self, installed, monkeypatch):
        installed("gdn_plugin", "another")
        monkeypatch.setenv("VLLM_PLUGINS", "another,gdn_plugin")
        assert host.loading_trouble() == []

    def test_a_failing_look_is_reported(self, installed, monkeypatch):
        def broken():
            raise OSError("unreadable")

        installed("gdn_plugin")
        monkeypatch.setattr("gdn_plugin.hosts.vllm.compat.would_attach", broken)
        report = host.report(disabled=False)
        assert report.attach is None
        assert "OSError: unreadable" in report.reason

    def test_host_contract(self, run, tmp_path):
        shown = run("doctor", "--host-contract", str(tmp_path))
        assert shown.code == 2
        (tmp_path / "vllm").mkdir()
        (tmp_path / "vllm" / "__init__.py").touch()
        shown = run("doctor", "--host-contract", str(tmp_path), "--json")
        assert shown.code == 1
        assert json.loads(shown.out)["missing"]


class TestCheck:
    SMALL = ("--heads", "2,4", "--dims", "16,16")

    def test_backends_of_this_machine(self, run):
        shown = run("check", *self.SMALL, "--backend", "torch", "--op", "prefill", "--op", "decode")
        assert shown.code == 0, shown.out
        assert "2 of 2 passed" in shown.out
        assert max(map(len, shown.out.splitlines())) <= 80

    def test_json(self, run):
        shown = run("check", *self.SMALL, "--op", "decode", "--backend", "reference", "--json")
        report = json.loads(shown.out)
        assert shown.code == 0
        assert report["results"][0]["ok"] is True
        assert set(report["results"][0]["errors"]) == {"out", "state"}

    def test_a_failure_exits_with_1_and_says_why(self, run, monkeypatch):
        def failing(backend, problem, device):
            return selfcheck.CheckResult(backend.name, problem.op, {"out": 1.0}, {"out": 3.0}, 0.04, 0.1, "out is off")

        monkeypatch.setattr(selfcheck, "check", failing)
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


@pytest.mark.parametrize("arguments", [["--help"], ["doctor", "--help"], ["check", "--help"], ["--version"]])
def test_help(run, arguments):
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 0


def test_unknown_commands(run):
    for arguments in ([], ["docter"]):
        with pytest.raises(SystemExit) as caught:
            run(*arguments)
        assert caught.value.code == 2
