"""FlashInfer's kernels, as our wrappers call them, really compile for GPUs that are not here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gdn_plugin.registry import Platform, load, rows
from gdn_plugin.tools import compile_flashinfer
from gdn_plugin.tools.compile import compile_jobs
from gdn_plugin.tools.compile_flashinfer import CompileRow, arch_list, compile_all, compiler_trouble, problems

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
    rows = list(compile_all(sm, tmp_path, wanted=wanted, few=True))
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
    monkeypatch.setattr("gdn_plugin.tools.compile_flashinfer.sys.executable", "/bin/false")
    (row,) = compile_all(90)
    assert "ended early" in row.error


@pytest.fixture
def asked(monkeypatch):
    """Stands for the compile: what it was asked, and what it answers."""
    calls = []

    def compile_all(sm, **arguments):
        calls.append(sm)
        yield CompileRow("kernel", "case", 1.0, error="no kernel image" if sm == 100 else "")

    monkeypatch.setattr(compile_flashinfer, "compile_all", compile_all)
    return calls


def test_a_working_compiler_is_asked_once(asked, tmp_path):
    assert [compiler_trouble(90, tmp_path) for _ in range(3)] == [None] * 3
    assert asked == [90]


def test_the_answer_is_kept_in_the_plugins_cache(asked, tmp_path, monkeypatch):
    monkeypatch.setenv("GDN_PLUGIN_CACHE", str(tmp_path))
    assert [compiler_trouble(90) for _ in range(2)] == [None] * 2
    assert asked == [90] and len(list(tmp_path.rglob("compiler-*.json"))) == 1


def test_a_broken_compiler_is_named_with_the_pip_command(asked, tmp_path):
    for _ in range(2):
        trouble = compiler_trouble(100, tmp_path)
        assert "sm_100a: no kernel image; pip install" in trouble and "nvidia-cutlass-dsl[cu13]" in trouble
    assert asked == [100]


def test_other_versions_ask_again(asked, tmp_path, monkeypatch):
    compiler_trouble(90, tmp_path)
    monkeypatch.setattr(compile_flashinfer, "installed_packages", lambda: {"nvidia-cutlass-dsl": "9.9"})
    compiler_trouble(90, tmp_path)
    assert asked == [90, 90]
    assert sorted(json.loads(file.read_text())["sm"] for file in tmp_path.iterdir()) == [90, 90]


def test_an_unwritable_folder_is_no_failure(asked, tmp_path):
    (tmp_path / "file").write_text("")
    for _ in range(2):
        assert compiler_trouble(90, tmp_path / "file" / "below") is None
    assert asked == [90, 90]


@pytest.mark.slow
def test_the_installed_compiler_compiles(tmp_path):
    assert compiler_trouble(90, tmp_path) is None


@pytest.mark.parametrize("sm", [90, 100, 103, 120])
def test_the_folder_is_that_of_a_machine_with_such_a_gpu(sm, monkeypatch):
    """FlashInfer names its folder after the GPUs it finds, and where an image is built there is none."""
    from flashinfer.compilation_context import CompilationContext

    monkeypatch.delenv("FLASHINFER_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: divmod(sm, 10))
    there = CompilationContext().TARGET_CUDA_ARCHS
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setenv("FLASHINFER_CUDA_ARCH_LIST", arch_list(sm))
    assert CompilationContext().TARGET_CUDA_ARCHS == there != set()


@pytest.mark.slow
def test_a_second_process_finds_what_the_first_has_compiled(tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    platform = Platform.simulated("sm_100")
    (problem,) = problems(ops=("prefill",), state_dtypes=("bfloat16",))
    row = next(row for row in rows("prefill") if row.name == "flashinfer")
    kept = [variant.name for variant in load(row).variants(platform, problem) if variant.kept]
    jobs = [("flashinfer", problem, name) for name in kept[:1]]
    environment = {"FLASHINFER_WORKSPACE_BASE": str(tmp_path)}
    found = [[row for _, row in compile_jobs(platform, jobs, 1, environment)] for _ in range(2)]
    assert [[(row.error, row.cached) for row in ran] for ran in found] == [[("", False)], [("", True)]]
    assert Path(found[0][0].artifact).is_relative_to(tmp_path)
    assert list(here.iterdir()) == [], "the DSL leaves GPU code where it is called"
