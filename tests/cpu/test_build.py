"""Compiling, caching and loading of backend `cpu`, and how its ops behave around the numbers."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from gdn_plugin.ops.cpu import build
from gdn_plugin.ops.cpu.conv_prologue import conv_prologue
from gdn_plugin.ops.cpu.decode import decode
from gdn_plugin.ops.cpu.fused_decode import fused_decode
from gdn_plugin.ops.cpu.prefill import prefill
from gdn_plugin.ops.cpu.verify import verify
from gdn_plugin.registry import Problem
from tests.support.cases import Heads, conv_prologue_case, decode_case, fused_decode_case, prefill_case, verify_case
from tests.support.checks import bits, run

ROOT = Path(__file__).parents[2]
PROBLEM = Problem("prefill", "bfloat16", "float32", 1, 1, 64, 64)
WARM_UP = f"from gdn_plugin.ops.cpu import build; from gdn_plugin.registry import Problem; build.warm_up({PROBLEM!r}); "


def worker(code: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WARM_UP + code], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | environment,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out.strip()


@pytest.mark.slow
def test_concurrent_workers_compile_once_and_later_ones_not_at_all(tmp_path: Path) -> None:
    environment = {"XDG_CACHE_HOME": str(tmp_path), "TORCH_EXTENSIONS_DIR": ""}
    workers = [worker("print(build.compile_count())", **environment) for _ in range(3)]
    assert sorted(finish(w) for w in workers) == ["0", "0", "1"]
    (built,) = (tmp_path / "gdn_plugin" / "cpu").glob("*.so")
    before = built.stat().st_mtime_ns
    assert finish(worker("print(build.compile_count())", **environment)) == "0"
    assert built.stat().st_mtime_ns == before
    leftovers = [p.name for p in built.parent.iterdir() if p.suffix not in (".so", ".lock")]
    assert leftovers == []


def test_cache_key_follows_flags_compiler_and_level(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {build._key(level) for level in build.levels()}
    assert len(keys) == len(build.levels())
    monkeypatch.setenv("CXXFLAGS", "-DSOMETHING_ELSE")
    assert build._key(build.levels()[0]) not in keys


def test_cache_directory_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "torch"))
    assert build.cache_directory() == tmp_path / "torch" / "gdn_plugin" / "cpu"
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    assert build.cache_directory() == tmp_path / "xdg" / "gdn_plugin" / "cpu"


def test_compiler_errors_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXXFLAGS", "-include does_not_exist.h")
    with pytest.raises(build.BuildError, match=r"does_not_exist\.h"):
        build._compile(build.level(), tmp_path / "x.so")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("CXXFLAGS", "-include does_not_exist.h")
    tried = []
    compile_ = build._compile
    monkeypatch.setattr(build, "_compile", lambda *what: (tried.append(what), compile_(*what)))
    for _ in range(3):
        with pytest.raises(build.BuildError, match="compiling the cpu backend failed"):
            build._open(build.level())
    assert len(tried) == 1


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler"):
        build.compiler()


def test_levels_need_their_cpu_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(build, "_cpu_flags", lambda: build._AVX2)
    assert [level.name for level in build.levels()] == ["avx2", "plain"]
    with pytest.raises(ValueError, match="'avx512' does not run on this machine; choose one of: avx2, plain"):
        build.forced_level("avx512").__enter__()
    monkeypatch.setattr(build.platform, "machine", lambda: "arm64")
    assert [level.name for level in build.levels()] == ["plain"]
    monkeypatch.setattr(build.platform, "machine", lambda: "riscv64")
    with pytest.raises(build.BuildError, match="riscv64"):
        build.level()


def test_compile_count_does_not_move_after_warm_up() -> None:
    build.warm_up(PROBLEM)
    count = build.compile_count()
    for function, case in (
        (prefill, prefill_case()), (decode, decode_case()), (verify, verify_case()),
        (conv_prologue, conv_prologue_case()), (fused_decode, fused_decode_case()),
    ):  # fmt: skip
        run(function, case)
    assert build.compile_count() == count


@pytest.mark.parametrize("op", ["prefill", "decode", "verify", "conv_prologue", "fused_decode"])
def test_any_number_of_threads_gives_the_same_bits(op: str) -> None:
    heads = Heads(1, 2, 64, 192)  # fewer heads than threads: split by value heads, then by value channels
    function, case = {
        "prefill": (prefill, prefill_case((70,), heads, torch.bfloat16)),
        "decode": (decode, decode_case(1, heads, torch.bfloat16)),
        "verify": (verify, verify_case((3,), heads, torch.bfloat16)),
        "conv_prologue": (conv_prologue, conv_prologue_case((70,), heads, torch.bfloat16, fresh=(0,))),
        "fused_decode": (fused_decode, fused_decode_case(3, heads, torch.bfloat16)),
    }[op]
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3, 8):
            torch.set_num_threads(count)
            results.append(run(function, case))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, out in results[0].outputs.items():
            assert torch.equal(bits(other.outputs[name]), bits(out)), name
        for name, pool in results[0].pools.items():
            assert torch.equal(bits(other.pools[name].base), bits(pool.base)), name


def test_callers_on_several_threads_do_not_disturb_one_another() -> None:
    cases = [prefill_case((65, 30 + i), Heads(1, 2, 64, 32), torch.bfloat16, seed=i) for i in range(6)]
    want = [run(prefill, case).outputs["out"] for case in cases]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(4):
            got = list(pool.map(lambda case: run(prefill, case).outputs["out"], cases))
            for a, b in zip(got, want, strict=True):
                assert torch.equal(bits(a), bits(b))


def test_the_gil_is_released() -> None:
    case = prefill_case((4096,), Heads(8, 8, 128, 128), torch.float32)
    done = threading.Event()

    def long_call() -> None:
        run(prefill, case)
        done.set()

    inside = threading.Thread(target=long_call)
    inside.start()
    turns = 0
    while not done.wait(0.0005):
        turns += 1
    inside.join()
    assert turns > 10, f"another thread got to run {turns} times during a long call"


@pytest.mark.parametrize(
    ("op", "argument", "value", "message"),
    [
        ("prefill", "cu_seqlens", [0, 5, 3, 9], "cu_seqlens"),
        ("prefill", "cu_seqlens", [0, 1, 2, 99], "cu_seqlens"),
        ("prefill", "state_indices", [0, 1, 99], "state_indices"),
        ("decode", "state_indices", [0, 99, 1], "state_indices"),
        ("fused_decode", "state_indices", [0, 99, 1], "state_indices"),
        ("conv_prologue", "state_indices", [0, 99, 1], "state_indices"),
        ("conv_prologue", "cu_seqlens", [0, -1, 2, 3], "cu_seqlens"),
        ("conv_prologue", "num_accepted_tokens", [1, 99, 1], "num_accepted_tokens"),
        ("verify", "cu_seqlens", [0, 9, 9, 9], "cu_seqlens"),
        ("verify", "num_accepted_tokens", [1, 9, 1], "num_accepted_tokens"),
        ("verify", "state_indices", [[1, 2], [3, 4], [5, 99]], "state_indices"),
        ("verify", "start_rows", [1, 3, 99], "start_rows"),
    ],
)  # fmt: skip
def test_index_values_out_of_range_raise_before_anything_is_written(
    op: str, argument: str, value: list[int], message: str
) -> None:
    function, case = {
        "prefill": (prefill, prefill_case((3, 3, 3))),
        "decode": (decode, decode_case(3)),
        "verify": (verify, verify_case((2, 2, 2), slots=2, accepted=(1, 1, 1), pad_tokens=3)),
        "conv_prologue": (conv_prologue, conv_prologue_case((2, 2, 2), accepted=(1, 1, 1))),
        "fused_decode": (fused_decode, fused_decode_case(3)),
    }[op]
    args = case.args | {argument: torch.tensor(value, dtype=torch.int32)}
    args |= {name: pool.view for name, pool in case.pools.items()}
    outputs = {name: torch.full(shape, -7.0, dtype=dtype) for name, (shape, dtype) in case.outputs.items()}
    before = {name: pool.base.clone() for name, pool in case.pools.items()}
    extra = {"zero_padding": True} if case.has_zero_padding else {}
    with pytest.raises(ValueError, match=message):
        function(**args, **outputs, **extra)
    assert all(bool((x == -7).all()) for x in outputs.values())
    assert all(torch.equal(bits(pool.base), bits(before[name])) for name, pool in case.pools.items())


def test_layouts_that_would_need_a_copy_raise() -> None:
    case = decode_case(2, Heads(1, 1, 16, 16))
    state = case.pools["state"].view
    out = torch.empty(2, 1, 16)
    with pytest.raises(ValueError, match="state: expected rows that are dense inside"):
        decode(**case.args, state=state.transpose(2, 3), out=out, zero_padding=True)
    wrong = case.args | {"q": case.args["q"].transpose(1, 2).contiguous().transpose(1, 2).expand(2, 1, 16)[:, :, ::2]}
    with pytest.raises(ValueError, match="q: expected a last dim of stride 1"):
        decode(**wrong, state=state, out=out, zero_padding=True)
    with pytest.raises(ValueError, match="v: expected float32, bfloat16 or float16"):
        decode(**(case.args | {"v": case.args["v"].double()}), state=state, out=out, zero_padding=True)
