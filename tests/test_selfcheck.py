"""Self-check: what it lets pass, what it catches, and what follows."""

from __future__ import annotations

import gc
import re
import sys
import weakref
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from gdn_plugin import ops
from gdn_plugin.ops import dispatch, selfcheck
from gdn_plugin.ops.record import OPS as RECORDS
from gdn_plugin.registry import OPS, Backend, BackendOp, NoBackendError, Platform, Problem, SelfCheckError, Wants
from gdn_plugin.registry.table import TABLE
from tests.support.checks import reference

CPU = Platform.simulated("cpu")
RESULT = dict.fromkeys(OPS, "out") | {"conv_prologue": "q", "replay_fold": "state"}
PLAIN = Wants()
WITH_STATE = [op for op in OPS if op != "gated_norm"]


def problem(op, **changed):
    fields = {
        "dtype": "bfloat16",
        "state_dtype": "float32",
        "num_k_heads": 2,
        "num_v_heads": 4,
        "head_k_dim": 16,
        "head_v_dim": 24,
        "padded_pool": True,
    }
    return Problem(op=op, **(fields | changed))


@pytest.fixture
def backend(monkeypatch):
    """backend(function, name): a row that runs the function."""
    selfcheck._checked.cache_clear()

    def make(function, name="mine", wants=PLAIN):
        module = ModuleType(f"gdn_selfcheck_{name}")
        module.RUN = BackendOp(function)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return Backend(name, f"{module.__name__}:RUN", wants=wants)

    yield make
    selfcheck._checked.cache_clear()


def wrong(op, change):
    """The reference, with `change(arguments by name)` afterwards."""

    truth = reference(op)  # now: a test may take it out of the table

    def run(**arguments):
        truth(**arguments)
        change(arguments)

    return run


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("state_dtype", ["bfloat16", "float16", "float32"])
def test_the_recurrence_passes_its_own_check(backend, op, dtype, state_dtype):
    case = problem(op, dtype=dtype, state_dtype=state_dtype, checkpoints=op == "prefill", max_spec_tokens=3)
    prepared = Wants(exp_gate=True, zeroed_fresh_rows=True, dense_rows=True, scratch_row=True, contiguous=True)
    for wants in (Wants(), prepared):
        result = selfcheck.run(backend(reference(op), wants=wants), case, "cpu")
        assert result.failure is None, result
        assert all(error < result.limit / 4 for error in result.errors.values())


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("factor", "why"),
    [(1.2, "is off by"), (0.0, "is off by"), (float("nan"), "off by nan")],
    ids=["scaled", "zero", "nan"],
)
def test_wrong_results_are_caught(backend, op, factor, why):
    result = selfcheck.run(backend(wrong(op, lambda named: named[RESULT[op]].mul_(factor))), problem(op), "cpu")
    assert why in result.failure
    assert not result.ok


@pytest.mark.parametrize("op", [op for op in WITH_STATE if op != "conv_prologue"])
def test_a_wrong_state_is_caught(backend, op):
    result = selfcheck.run(backend(wrong(op, lambda named: named["state"].mul_(1.5))), problem(op), "cpu")
    assert f"state of {op} is off" in result.failure


def test_one_wrong_element_is_caught(backend):
    def change(named):
        named["out"][0, 0, 0] += 3.0

    assert "out of prefill" in selfcheck.run(backend(wrong("prefill", change)), problem("prefill"), "cpu").failure


@pytest.mark.parametrize("op", WITH_STATE)
def test_writing_where_nothing_names_is_caught(backend, op):
    def change(named):
        nobodys = int(named["state"][:, 0, 0, 0].isnan().nonzero()[-1])
        named["state"][nobodys, 0, 0, 0] = 1.0

    failure = selfcheck.run(backend(wrong(op, change)), problem(op), "cpu").failure
    assert re.fullmatch(rf"{op} wrote \d+ bytes of (conv_state and )?state( and ring_\w+)* that nothing names", failure)


def test_writing_behind_a_row_is_caught(backend):
    def change(named):
        state = named["state"]
        page = state.as_strided((state.stride(0),), (1,), state.storage_offset())
        page[-1] = 1.0

    failure = selfcheck.run(backend(wrong("prefill", change)), problem("prefill"), "cpu").failure
    assert "of state that nothing names" in failure


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The problems of a GPU, on the CPU."""
    cases, case = selfcheck.small_cases, selfcheck._case
    monkeypatch.setattr(selfcheck, "small_cases", lambda row, problem, _: cases(row, problem, "cuda"))
    monkeypatch.setattr(selfcheck, "_case", lambda row, problem, lens, _: case(row, problem, lens, "cpu"))


@pytest.mark.parametrize(
    ("op", "most"), [("fused_decode", 255), ("fused_decode", 1023), ("replay_verify", 1023), ("prefill", 255)]
)
def test_what_only_a_large_batch_gets_wrong_is_caught(backend, as_on_a_gpu, op, most):
    def change(named):
        out = named["out"]
        sequences = out.shape[0] if op == "fused_decode" else named["cu_seqlens"].shape[0] - 1
        out.mul_(1.2 if sequences * out.shape[1] > most else 1.0)

    case = problem(op, max_spec_tokens=3, ring=8) if op == "replay_verify" else problem(op)
    row = backend(wrong(op, change))
    assert selfcheck.run(row, case, "cpu").failure is None
    assert "is off by" in selfcheck.run(replace(row, by_size=True), case, "cpu").failure


@pytest.mark.parametrize("spec", [0, 1, 3])
@pytest.mark.parametrize("op", OPS)
def test_the_recurrence_passes_the_larger_problems(backend, as_on_a_gpu, op, spec):
    case = problem(op, max_spec_tokens=spec, ring=16 if op.startswith("replay") else 0)
    result = selfcheck.run(replace(backend(reference(op)), by_size=True), case, "cpu")
    assert result.ok and result.whole, result


def test_no_memory_for_the_larger_problems_is_no_failure(backend, as_on_a_gpu, monkeypatch, tmp_path):
    """Under auto every backend would fail in turn; and what was left out is made up for by a later process."""
    monkeypatch.setenv("GDN_PLUGIN_CACHE", str(tmp_path))
    room = []

    def full(**arguments):
        if arguments["out"].shape[0] * 4 > room[0]:
            raise torch.OutOfMemoryError("no room")
        reference("decode")(**arguments)

    row = replace(backend(full), by_size=True, target="gdn_plugin.mine:RUN")
    monkeypatch.setattr(selfcheck, "load", lambda row: BackendOp(full if row.name == "mine" else reference("decode")))
    room[:] = [16]
    selfcheck.require(row, problem("decode"), CPU)
    assert not list(tmp_path.rglob("*.json"))
    room[:] = [1 << 20]
    selfcheck._checked.cache_clear()
    selfcheck.require(row, problem("decode"), CPU)
    assert list(tmp_path.rglob("*.json"))
    room[:] = [0]
    selfcheck._checked.cache_clear()
    with pytest.raises(SelfCheckError, match="no room"):
        selfcheck.require(row, problem("decode", state_dtype="bfloat16"), CPU)


def test_a_failure_that_is_kept_holds_no_pool(backend, as_on_a_gpu):
    pools = []

    def fail_later(**arguments):
        pools.append(weakref.ref(arguments["state"]))
        if len(pools) > 1:
            raise RuntimeError("no")
        reference("decode")(**arguments)

    result = selfcheck.run(replace(backend(fail_later), by_size=True), problem("decode"), "cpu")
    gc.collect()
    assert result.failure == "RuntimeError: no" and [pool() for pool in pools] == [None, None]


def test_what_a_kernel_raises_is_its_failure(backend):
    def boom(**arguments):
        raise RuntimeError("no kernel image")

    assert selfcheck.run(backend(boom), problem("decode"), "cpu").failure == "RuntimeError: no kernel image"
    missing = Backend("gone", "gdn_not_there:run")
    assert "could not be loaded" in selfcheck.run(missing, problem("decode"), "cpu").failure


def test_checked_once_a_family(backend):
    calls = []

    def count(**arguments):
        calls.append(1)
        reference("decode")(**arguments)

    mine = backend(count)
    for sequences in (0, 1, 128):
        selfcheck.require(mine, problem("decode", num_sequences=sequences), CPU)
    assert len(calls) == 1
    selfcheck.require(mine, problem("decode", state_dtype="bfloat16"), CPU)
    assert len(calls) == 2


def test_on_rocm_it_runs_on_what_torch_calls_cuda(backend, monkeypatch):
    asked = []
    real = selfcheck._case
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(
        selfcheck, "_case", lambda row, case, lens, device: asked.append(device) or real(row, case, lens, "cpu")
    )
    selfcheck.require(backend(reference("decode")), problem("decode"), Platform(device="rocm"))
    assert asked == ["cuda"]


def test_random_state_and_defaults_of_the_host_are_left_alone(backend):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert selfcheck.run(backend(reference("prefill")), problem("prefill"), "cpu").ok
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.rand(1), expected)


def test_a_backend_that_calls_its_own_op_ends(backend, monkeypatch):
    """Without naming another: the inner call would be checked inside the check, and so on."""
    depth = []

    def run(**arguments):
        depth.append(1)
        assert len(depth) < 5
        given = {name: arguments[name] for name in RECORDS["decode"].names}
        ops.decode(**given, out=arguments["out"])

    row = backend(run)
    for module in ("registry.choice", "registry.selection", "ops.dispatch"):
        monkeypatch.setattr(f"gdn_plugin.{module}.rows", lambda op: (row, *TABLE[op]))
    dispatch.forget()
    selfcheck.run(row, problem("decode"), "cpu")
    assert len(depth) == 1
    dispatch.forget()


class TestPolicy:
    @pytest.fixture
    def table(self, backend, monkeypatch):
        """Every op's rows: bad, then good; only what the test is about."""
        monkeypatch.delenv("GDN_PLUGIN_SELF_CHECK", raising=False)

        def zero(op):
            return wrong(op, lambda named: named[RESULT[op]].zero_())

        offered = {op: (backend(zero(op), f"bad_{op}"), backend(reference(op), f"good_{op}")) for op in OPS}
        offered = {
            op: (Backend("bad", bad.target), Backend("good", good.target)) for op, (bad, good) in offered.items()
        }
        for module in ("registry.choice", "registry.selection", "ops.dispatch"):
            monkeypatch.setattr(f"gdn_plugin.{module}.rows", lambda op: offered[op])
        dispatch.forget()
        yield offered
        dispatch.forget()

    def test_auto_moves_on_loudly(self, table, caplog):
        resolved = ops.resolve({op: problem(op) for op in ("prefill", "decode")})
        assert resolved.backends() == {"prefill": "good", "decode": "good"}
        assert "prefill: bad is not used" in caplog.text
        assert "self-check failed: out of prefill is off" in caplog.text
        assert "not bad: self-check failed" in resolved["prefill"].describe()

    def test_a_named_request_raises(self, table):
        with pytest.raises(
            SelfCheckError, match=r"backend 'bad', asked for prefill.*self-check failed.*GDN_PLUGIN_SELF_CHECK=0"
        ):
            ops.resolve({"prefill": problem("prefill")}, {"prefill": "bad,good"})

    def test_it_can_be_turned_off(self, table, monkeypatch):
        monkeypatch.setenv("GDN_PLUGIN_SELF_CHECK", "0")
        resolved = ops.resolve({"prefill": problem("prefill")}, {"prefill": "bad"})
        assert resolved["prefill"].name == "bad"

    def test_nothing_is_left(self, table, monkeypatch):
        only_bad = {op: rows[:1] for op, rows in table.items()}
        monkeypatch.setattr("gdn_plugin.registry.choice.rows", lambda op: only_bad[op])
        with pytest.raises(NoBackendError, match="self-check failed"):
            ops.resolve({"prefill": problem("prefill")})


@pytest.mark.parametrize("op", OPS)
def test_torch_passes_on_this_machine(op):
    row = next(row for row in TABLE[op] if row.name == "torch")
    for dtype in ("bfloat16", "float16", "float32"):
        result = selfcheck.run(row, problem(op, dtype=dtype, checkpoints=op == "prefill", max_spec_tokens=3), "cpu")
        assert result.failure is None, result


class TestMemory:
    """That a backend passed is kept on disk."""

    @pytest.fixture
    def runs(self, monkeypatch, tmp_path):
        monkeypatch.setenv("GDN_PLUGIN_CACHE", str(tmp_path))
        selfcheck._checked.cache_clear()
        real, calls = selfcheck.run, []

        def run(row, problem, device):
            calls.append((row.name, problem.op))
            return real(row, problem, device)

        monkeypatch.setattr(selfcheck, "run", run)
        yield calls
        selfcheck._checked.cache_clear()

    def check(self, **changed):
        row = next(row for row in TABLE["decode"] if row.name == "torch")
        selfcheck._checked.cache_clear()  # another process
        selfcheck.require(row, problem("decode", **changed.pop("problem", {})), changed.pop("platform", CPU))

    def test_a_second_process_does_not_check_again(self, runs):
        self.check()
        self.check()
        assert runs == [("torch", "decode")]

    @pytest.mark.parametrize(
        "changed",
        [{"platform": Platform.simulated("cpu", packages={"torch": "2.12.0"})}, {"problem": {"dtype": "float16"}}],
        ids=["versions", "problem"],
    )
    def test_other_versions_and_problems_are_checked(self, runs, changed):
        self.check()
        self.check(**changed)
        assert len(runs) == 2

    def test_other_sources_are_checked(self, runs, monkeypatch):
        self.check()
        monkeypatch.setattr(selfcheck, "fingerprint", lambda: "other")
        self.check()
        assert len(runs) == 2

    def test_a_failure_is_not_kept(self, runs, monkeypatch):
        monkeypatch.setitem(selfcheck.LIMITS, "bfloat16", -1.0)
        for _ in range(2):
            with pytest.raises(SelfCheckError):
                self.check()
        assert len(runs) == 2

    def test_a_folder_that_cannot_be_used_is_no_error(self, runs, monkeypatch, tmp_path):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("GDN_PLUGIN_CACHE", str(tmp_path / "file"))
        self.check()
        assert len(runs) == 1
