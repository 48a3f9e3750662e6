"""The maker of inputs: cases of a Problem in every form, shapes alone on "meta", and what it finds a backend doing."""

from __future__ import annotations

import time

import pytest
import torch

from gdn_plugin.ops import cases, heads
from gdn_plugin.ops.record import OPS as RECORDS
from gdn_plugin.registry import OPS, Problem, Wants, load, rows
from tests.support.checks import check

FORMS = {
    "default": {},
    "scratch": {"padding": "scratch"},
    "none": {"padding": "none"},
    "padded": {"padded_pool": True},
    "strided": {"strided": True},
    "unaligned": {"unaligned": True, "padded_pool": True},
    "fp32 gates": {"gate_dtype": "float32"},
    "fp32 dt_bias": {"bias_dtype": "float32"},
    "normed q and k": {"qk_l2norm": False},
    "drafts": {"max_spec_tokens": 3},
    "checkpoints": {"checkpoints": True, "state_dtype": "bfloat16", "checkpoint_dtype": "float32"},
    "fp16 state": {"state_dtype": "float16"},
}
ALL_WANTS = Wants(exp_gate=True, zeroed_fresh_rows=True, dense_rows=True, scratch_row=True, contiguous=True)


def problem(op: str, **facts) -> Problem:
    return Problem(op, **({"dtype": "bfloat16", "state_dtype": "float32"} | facts), num_k_heads=2, num_v_heads=4,
                   head_k_dim=16, head_v_dim=8)  # fmt: skip


def make(op: str, form: str, **more) -> cases.Case:
    spec = problem(op, **FORMS[form])
    lens = (3, 0, 1, 2) if spec.max_spec_tokens or op in ("verify", "replay_verify") else (67, 0, 5, 2)
    return cases.case(spec, lens, fresh=(0,), padding=(3,), pad_tokens=2, **more)


@pytest.mark.parametrize("wants", [Wants(), ALL_WANTS], ids=["nothing", "everything"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("op", OPS)
def test_a_case_of_a_problem_runs(op, form, wants):
    run = load(next(row for row in rows(op) if row.name == "torch")).run
    for zero_padding in (True, False):
        check(run, make(op, form, wants=wants), zero_padding=zero_padding)


@pytest.mark.parametrize("gap", [0, 3])
@pytest.mark.parametrize("shape", [(1, 1, 16, 8), (1, 3, 8, 16), (2, 4, 16, 8), (3, 3, 8, 8)], ids=str)
@pytest.mark.parametrize("op", [op for op in OPS if RECORDS[op].projections])
def test_interleaved_heads_are_flat_ones_in_another_order(op, shape, gap):
    """The maker lays them out head by head, `heads.flat` sorts whole tensors: one checks the other."""
    maker = getattr(cases, f"{op}_case")
    flat, interleaved = (maker(heads=cases.Heads(*shape), gap=gap, interleaved=way).args for way in (False, True))
    found = heads.flat(RECORDS[op], interleaved)
    assert found.keys() == {argument.name for argument in RECORDS[op].projections}
    for name, x in flat.items():
        if isinstance(x, torch.Tensor):
            assert torch.equal(found.get(name, interleaved[name]), x), name
    assert not heads.flat(RECORDS[op], flat)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("op", OPS)
def test_on_meta_it_is_the_same_without_values(op, form):
    real, meta = (make(op, form, device=device).arguments() for device in ("cpu", "meta"))
    assert real.keys() == meta.keys()
    for name, x in real.items():
        y = meta[name]
        if isinstance(x, torch.Tensor):
            assert y.is_meta and (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype), name
        else:
            assert x == y, name


def test_on_meta_size_costs_nothing():
    spec = Problem("prefill", "bfloat16", "float32", 16, 48, 128, 128, padded_pool=True)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        cases.case(spec, (16384,), device="meta").arguments()
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.02  # drawing one head of it takes longer


def test_what_a_backend_wants():
    plain = make("prefill", "default", wants=Wants()).args
    wanted = make("prefill", "default", wants=ALL_WANTS)
    assert wanted.args["exp_gate"] and not plain["exp_gate"]
    assert wanted.args["has_initial_state"] is None and plain["has_initial_state"] is not None
    assert (wanted.args["padding"], wanted.args["null_index"], wanted.free) == ("scratch", 0, {"state": (0,)})
    assert all(bool(torch.isfinite(wanted.args[name].float()).all()) for name in ("q", "k", "v", "g", "beta"))
    assert bool(torch.isnan(plain["q"]).any())
    assert make("prefill", "strided").args["q"].is_contiguous() is False
    assert make("prefill", "strided", wants=ALL_WANTS).args["q"].is_contiguous()


def test_what_a_problem_says_of_dt_bias_and_the_norm():
    for op in ("conv_prologue", "decode", "fused_decode", "verify", "fused_verify", "replay_decode", "replay_verify"):
        args = make(op, "fp32 dt_bias").args
        assert (args["dt_bias"].dtype, args["a"].dtype) == (torch.float32, torch.bfloat16)
        assert make(op, "default").args["dt_bias"].dtype == torch.bfloat16
    for op in ("decode", "verify"):
        assert (make(op, "normed q and k").args["use_qk_l2norm"], make(op, "default").args["use_qk_l2norm"]) == (
            False,
            True,
        )
    assert cases.case(problem("prefill", qk_l2norm=True), (3,)).args["use_qk_l2norm"] is True


def test_a_hosts_pages():
    pools = make("fused_decode", "padded").pools
    conv, state = pools["conv_state"].view, pools["state"].view
    assert pools["conv_state"].base is pools["state"].base and conv.stride(1) == 1
    assert conv.stride(0) * conv.itemsize == state.stride(0) * state.itemsize


@pytest.mark.parametrize("form", ["default", "padded"])
@pytest.mark.parametrize("where", ["first row", "row before", "row behind", "page tail", "before out", "behind out"])
def test_a_stray_byte_is_found(form, where):
    case = make("decode", form)
    given = case.arguments()
    assert case.trespass(given) is None
    name = "out" if "out" in where else "state"
    x = given[name]
    page = x.stride(0) * x.itemsize
    start, rows_ = x.storage_offset() * x.itemsize, x.shape[0]
    nobody = next(r for r in range(rows_) if r not in case.written.get("state", {}))
    at = {
        "first row": start + nobody * page,
        "row before": start - page,
        "row behind": start + rows_ * page,
        "page tail": start + page - 1 if form == "padded" else start - 1,
        "before out": start - 1,
        "behind out": start + rows_ * page,
    }[where]
    torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())[at] = 7
    assert name in case.trespass(given)


def test_padding_must_be_promised():
    with pytest.raises(ValueError, match="promise='none'"):
        cases.prefill_case((3,), promise="none", padding=(0,))
    with pytest.raises(TypeError, match="unknown_feature"):
        cases.case(problem("decode"), (1,), unknown_feature=1)
