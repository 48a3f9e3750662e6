"""Which backend a call goes to, what of the call decides, and warm-up."""

from __future__ import annotations

import sys
import types
from dataclasses import replace

import pytest
import torch

from gdn_plugin import ops
from gdn_plugin.ops import cases, dispatch
from gdn_plugin.ops.record import OPS as RECORDS
from gdn_plugin.registry import (
    Backend,
    BackendLoadError,
    BackendOp,
    NoBackendError,
    Platform,
    Problem,
    SettingsError,
    Variant,
    choose,
    probe,
    select,
)

PROBLEM = Problem("decode", "float32", "float32", 2, 4, 16, 8)


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in ("", "_PREFILL", "_DECODE", "_VERIFY"):
        monkeypatch.delenv(f"GDN_PLUGIN{name}_BACKEND", raising=False)
    dispatch.forget()
    yield
    dispatch.forget()


@pytest.fixture
def used(monkeypatch):
    """Names of the backends that calls went to."""
    names = []
    original = dispatch.backend_op

    def spy(op, backend):
        names.append(backend)
        return original(op, "torch")

    monkeypatch.setattr(
        "gdn_plugin.ops.library.dispatch",
        types.SimpleNamespace(backend_op=spy, for_call=dispatch.for_call, facts=dispatch.facts),
    )
    return names


def decode(**kw):
    case = cases.decode_case(2)
    return ops.decode(**case.args | {"state": case.pools["state"].view} | kw)


def prologue(**kw):
    case = cases.conv_prologue_case((2,))
    return ops.conv_prologue(**case.args, **{n: p.view for n, p in case.pools.items()}, **kw)


def test_a_name_forces_it(used):
    decode(backend="reference")
    assert used == ["reference"]


def test_a_list_is_tried_in_order(used):
    decode(backend="flashinfer,reference")
    assert used == ["reference"]


@pytest.mark.parametrize("name", ["flashinfer", "nonsense"])
def test_a_name_that_cannot_run_raises(name):
    with pytest.raises(NoBackendError, match=name):
        decode(backend=name)


def test_environment(used, monkeypatch):
    monkeypatch.setenv("GDN_PLUGIN_BACKEND", "torch")
    decode()
    monkeypatch.setenv("GDN_PLUGIN_DECODE_BACKEND", "reference")
    decode()
    assert used == ["torch", "reference"]


def test_use_wins_over_the_environment(used, monkeypatch):
    monkeypatch.setenv("GDN_PLUGIN_DECODE_BACKEND", "reference")
    with ops.use({"decode": "torch"}):
        decode()
    with ops.use({"prefill": "torch"}):
        decode()
    assert used == ["torch", "reference"]


def test_use_takes_a_selection(used):
    with ops.use(select(probe("cpu"), {"decode": PROBLEM}, {"decode": "reference"})):
        decode()
    assert used == ["reference"]


def dense_pools_alone(platform, problem):
    return "rows of the pool are padded" if problem.padded_pool else None


@pytest.mark.parametrize(("request_", "other"), [("auto", "torch"), ("picky,reference", "reference"), ("picky", None)])
def test_a_selection_does_not_run_what_its_backend_cannot(monkeypatch, request_, other):
    """A host resolves a layer once; a call with other facts is judged anew."""
    row = next(row for row in dispatch.rows("decode") if row.name == "torch")
    table = (replace(row, name="picky", checks=(dense_pools_alone,)), row,
             next(row for row in dispatch.rows("decode") if row.name == "reference"))  # fmt: skip
    for module in ("registry.choice", "registry.selection", "ops.dispatch"):
        monkeypatch.setattr(f"gdn_plugin.{module}.rows", lambda op: table)
    dispatch.forget()
    names = []
    original = dispatch.backend_op
    monkeypatch.setattr(dispatch, "backend_op", lambda op, name: names.append(name) or original(op, name))
    selection = ops.resolve({"decode": replace(PROBLEM, padded_pool=False)}, {"decode": request_}, "cpu")
    assert selection["decode"].name == "picky"
    with ops.use(selection):
        dense, padded = (cases.decode_case(2, page_tail=tail) for tail in (0, 24))
        for case, wanted in ((dense, "picky"), (padded, other), (dense, "picky")):
            names.clear()
            if wanted is None:
                with pytest.raises(NoBackendError, match="rows of the pool are padded"):
                    ops.decode(**case.args, state=case.pools["state"].view)
                continue
            ops.decode(**case.args, state=case.pools["state"].view)
            assert names[-1] == wanted
    dispatch.forget()


def test_warm_up_follows_the_selection():
    with ops.use(select(probe("cpu"), {"decode": PROBLEM}, {"decode": "reference"})):
        assert ops.warm_up(PROBLEM, device="cpu") == "reference"
        assert ops.warm_up(PROBLEM, "torch", device="cpu") == "torch"
    with ops.use({"decode": "torch"}):
        assert ops.warm_up(PROBLEM, device="cpu") == "torch"


def test_use_refuses_an_unknown_phase():
    with pytest.raises(ValueError, match="prefil"), ops.use({"prefil": "torch"}):
        pass


def test_the_prologue_follows_prefill(used):
    with ops.use({"prefill": "reference"}):
        prologue()
    assert used == ["reference"]


def test_auto_never_takes_the_reference(used):
    decode()
    prologue()
    assert used and "reference" not in used


def test_auto_passes_over_a_backend_that_cannot_be_imported(monkeypatch, caplog):
    broken = Backend("broken", "gdn_plugin.ops.nothing_here:DECODE")
    table = (broken, *dispatch.rows("decode"))
    for module in ("registry.choice", "registry.selection", "ops.dispatch"):
        monkeypatch.setattr(f"gdn_plugin.{module}.rows", lambda op: table)
    monkeypatch.setattr("gdn_plugin.registry.choice.in_build", lambda target: True)
    assert ops.resolve({"decode": PROBLEM}, {}, "cpu")["decode"].name != "broken"
    assert "broken" in caplog.text
    for call in (
        lambda: ops.resolve({"decode": PROBLEM}, {"decode": "broken"}, "cpu"),
        lambda: decode(backend="broken"),
    ):
        with pytest.raises(BackendLoadError, match="broken"):
            call()


def test_auto_passes_over_a_backend_that_cannot_be_built(monkeypatch, made_up, caplog):
    """With the self-check off too: a compiler that fails must not take the host down."""
    monkeypatch.setenv("GDN_PLUGIN_SELF_CHECK", "0")

    def fail():
        raise RuntimeError("no compiler")

    made_up.compile = fail
    assert ops.resolve({"decode": PROBLEM}, {}, "cpu")["decode"].name != "made_up"
    assert "no compiler" in caplog.text
    with pytest.raises(RuntimeError, match="no compiler"):
        ops.resolve({"decode": PROBLEM}, {"decode": "made_up"}, "cpu")


def test_auto_passes_over_a_backend_that_was_checked_before_and_cannot_be_built_now(monkeypatch, made_up, caplog):
    """An earlier process has seen it pass; since then its library is gone, or the compiler is told other flags."""
    monkeypatch.setattr(dispatch.selfcheck, "_checked", lambda *facts: None)

    def fail():
        raise RuntimeError("no compiler")

    made_up.compile = fail
    assert ops.resolve({"decode": PROBLEM}, {}, "cpu")["decode"].name != "made_up"
    assert "no compiler" in caplog.text


@pytest.mark.parametrize("device", ["cpu", "cpu:0", torch.device("cpu")])
def test_a_device_is_as_good_as_its_type(device):
    assert ops.resolve({"decode": PROBLEM}, {}, device).platform == probe("cpu")
    assert ops.warm_up(PROBLEM, "torch", device=device) == "torch"


@pytest.fixture
def made_up(monkeypatch):
    """A backend `made_up` for decode, ranked first, with variants; it runs what torch runs."""
    module = types.ModuleType("made_up_backend")
    module.compiled = []
    module.compile = lambda: None

    def variants(platform, problem, pool=None):
        def ready():
            module.compile()
            module.compiled.append((problem.op, None if pool is None else tuple(pool.shape)))

        yield Variant("one", ready)

    def run(**arguments):
        dispatch.backend_op("decode", "torch").run(**arguments)

    module.DECODE = BackendOp(run, variants, lambda: len(module.compiled))
    monkeypatch.setitem(sys.modules, "made_up_backend", module)
    row = Backend("made_up", "made_up_backend:DECODE")
    table = (row, *dispatch.rows("decode"))
    for place in ("registry.choice", "registry.selection", "ops.dispatch"):
        monkeypatch.setattr(f"gdn_plugin.{place}.rows", lambda op: table)
    return module


def test_warm_up_and_compile_count(made_up):
    dispatch.backend_op("decode", "made_up")
    before = ops.compile_count()
    assert ops.warm_up(PROBLEM, "made_up") == "made_up"
    assert made_up.compiled == [("decode", None)]
    assert ops.compile_count() == before + 1


def test_warm_up_with_a_pool_compiles_for_the_pool(made_up):
    assert ops.warm_up(PROBLEM, "made_up", pool=torch.zeros(3)) == "made_up"
    assert made_up.compiled == [("decode", (3,))]


def test_warm_up_of_a_backend_without_kernels():
    assert ops.warm_up(PROBLEM, "torch") == "torch"
    assert ops.warm_up(PROBLEM, "torch", pool=torch.zeros(1)) == "torch"


def test_a_second_call_is_a_dictionary_lookup(monkeypatch):
    """After the first call nothing is chosen or imported again."""
    with ops.use({"decode": "torch"}):
        decode()

    def fail(*args, **kwargs):
        raise AssertionError("chosen or loaded a second time")

    for name in ("choose", "select", "load", "probe", "rows", "resolve"):
        monkeypatch.setattr(dispatch, name, fail)
    with ops.use({"decode": "torch"}):
        decode()


def test_another_device_type_is_another_choice():
    facts = ("decode", "float32", "float32", 2, 4, 16, 8)
    assert dispatch._for_call("cpu", "", facts) in ("cpu", "torch")
    assert dispatch._for_call("meta", "torch", facts) == "torch"


def test_a_wrong_variable_is_the_first_callers_error(monkeypatch):
    monkeypatch.setenv("GDN_PLUGIN_BAKEND", "torch")
    for call in (
        decode,
        lambda: decode(backend="torch"),
        lambda: ops.resolve({"decode": PROBLEM}, {"decode": "torch"}, "cpu"),
        lambda: ops.warm_up(PROBLEM, "torch"),
    ):
        with pytest.raises(SettingsError, match=r"GDN_PLUGIN_BAKEND is not a setting.*you mean 'GDN_PLUGIN_BACKEND'"):
            call()


class TestFacts:
    """What of a call becomes a fact of its Problem."""

    def problem(self, case, **changed):
        record = RECORDS[case.op]
        given = case.arguments() | changed
        given = {name: x for name, x in given.items() if name in record.names}
        return Problem(*dispatch.facts(record, given, None))

    def test_of_a_plain_call(self):
        case = cases.decode_case(3, page_tail=0)
        assert self.problem(case) == PROBLEM
        assert self.problem(cases.decode_case(3, page_tail=8)) == replace(PROBLEM, padded_pool=True)
        assert self.problem(cases.gated_norm_case(3)).op == "gated_norm"

    def test_of_padding_dtypes_and_checkpoints(self):
        case = cases.prefill_case((65,), checkpoint_every=64, checkpoint_dtype=torch.bfloat16, promise="none")
        found = self.problem(case)
        assert (found.checkpoints, found.checkpoint_dtype, found.padding) == (True, "bfloat16", "none")
        half = cases.decode_case(3, io_dtype=torch.bfloat16, gate_dtype=torch.float32, state_dtype=torch.float16)
        assert (self.problem(half).gate_dtype, self.problem(half).state_dtype) == ("float32", "float16")

    @pytest.mark.parametrize(
        ("lens", "promise", "ragged"),
        [((3, 3), "none", False), ((3, 2), "none", True), ((3, 3), "any", True), ((3, 3), "scratch", True)],
    )
    def test_verify_is_even_only_where_that_is_certain(self, lens, promise, ragged):
        assert self.problem(cases.verify_case(lens, slots=3, promise=promise)).ragged is ragged

    def test_of_layouts_off_the_cpu(self):
        case = cases.prefill_case((65,), device="meta", page_tail=64)
        assert not self.problem(case).strided and not self.problem(case).unaligned
        assert self.problem(cases.prefill_case((65,), device="meta", gap=64, page_tail=64)).strided
        odd = torch.empty(65 * 2 * 16 + 1, device="meta")[1:].view(65, 2, 16)
        assert self.problem(case, q=odd).unaligned
        assert self.problem(cases.prefill_case((65,), device="meta", page_tail=3)).unaligned
        decode = cases.decode_case(3, device="meta", page_tail=64)
        gates = torch.empty(3 * 4 + 1, device="meta")[1:].view(3, 4)  # slices of a host's projection start anywhere
        assert not self.problem(decode, a=gates, b=gates).unaligned


def test_a_backend_that_lacks_an_argument_serves_calls_that_do_not_ask_for_it(made_up, monkeypatch):
    """As a third party's does that was written before the argument was."""
    seen = {}

    def run(q, k, v, a, b, A_log, dt_bias, state, state_indices, scale, out, zero_padding):
        given = locals()
        seen.update({name: given[name] for name in ("state", "out")})

    made_up.DECODE = BackendOp(run)
    monkeypatch.setenv("GDN_PLUGIN_SELF_CHECK", "0")  # it computes nothing
    call = {"use_qk_l2norm": True, "padding": "none", "backend": "made_up"}
    decode(**call)
    assert "state" in seen
    with pytest.raises(ValueError, match="use_qk_l2norm: expected True, which is all that 'made_up' knows, got False"):
        decode(**call | {"use_qk_l2norm": False})


def test_a_backend_need_not_know_what_depends_on_the_call(made_up, monkeypatch):
    """zero_padding: its returning op zeroes in front of it. scale: None and K^-0.5 are one."""
    wanted = dispatch.backend_op("decode", "torch").run

    def run(q, k, v, a, b, A_log, dt_bias, state, state_indices, use_qk_l2norm, null_index, out):
        given = locals()
        wanted(**{n: given[n] for n in given if n != "wanted"}, scale=16**-0.5, padding="any", zero_padding=False)

    made_up.DECODE = BackendOp(run)
    case = cases.decode_case(3, padding=(1,))
    got, want = (
        ops.decode(**case.args, state=case.pools["state"].clone().view, backend=name) for name in ("made_up", "torch")
    )
    assert torch.equal(got, want) and not got[1].any()
    with pytest.raises(ValueError, match=r"scale: expected 0\.25, which is all that 'made_up' knows, got 0\.5"):
        decode(backend="made_up", scale=0.5)


@pytest.mark.parametrize("request_", ["auto", "triton"])
def test_a_kernel_that_does_not_compile_takes_its_backend_out_and_no_engine_down(monkeypatch, caplog, request_):
    monkeypatch.setenv("GDN_PLUGIN_SELF_CHECK", "0")

    def broken(*_):
        raise RuntimeError("no ptxas")

    monkeypatch.setattr(dispatch, "_bring_in", broken)
    monkeypatch.setattr(dispatch, "backend_op", lambda op, name: None)
    h100, problem = Platform.simulated("sm_90"), Problem("decode", "bfloat16", "float32", 2, 4, 64, 64)
    choice = replace(choose(h100, problem, "triton"), request=request_)
    assert dispatch._trouble(choice, h100) is None
    if request_ == "auto":
        assert dispatch._trouble(choice, h100, True) == "no ptxas" and "triton is not used: no ptxas" in caplog.text
    else:
        with pytest.raises(RuntimeError, match="no ptxas"):
            dispatch._trouble(choice, h100, True)


def test_for_a_host_what_a_layer_does_not_come_to_is_not_checked(monkeypatch):
    checked = []
    monkeypatch.setattr(
        dispatch.selfcheck, "require", lambda row, problem, platform: checked.append(problem.op) or True
    )
    problems = {op: replace(PROBLEM, op=op) for op in ("decode", "fused_decode")}
    for host, wanted in ((True, ["fused_decode"]), (False, ["decode", "fused_decode"])):
        checked.clear()
        selection = ops.resolve(problems, {"decode": "torch"}, "cpu", compile_ahead=host)
        assert selection.fuses("decode") and checked == wanted
