"""`variants` lists every kernel that a launcher can launch, under the keys by which Triton looks for them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from gdn_plugin.backends.triton import conv_prologue
from gdn_plugin.backends.triton import launch as launching
from gdn_plugin.backends.triton.launch import compile_count, recorded
from gdn_plugin.backends.triton.variants import OPTIONS, _beside, key, specialise
from gdn_plugin.ops import dispatch
from gdn_plugin.ops.cases import case
from gdn_plugin.ops.selfcheck import small_cases
from gdn_plugin.registry import OPS, PHASE_OF_OP, Platform, Problem, rows
from gdn_plugin.registry.backend import left_out
from tests.support.triton_device import stand_in

HEADS = [(2, 4), (4, 8), (16, 32), (16, 48)]
SMS = [80, 90, 100]
SEQUENCES = (1, 2, 3, 8, 32, 128, 512)
TOKENS = (1, 2, 7, 64, 65, 256, 1000, 2048, 16384)
ONE_TOKEN = tuple(op for op in OPS if PHASE_OF_OP[op] in ("decode", "verify"))


def op_of(name):
    return dispatch.backend_op(name, "triton")


def problem_of(op, heads=(16, 32), state_dtype="float32", **facts):
    facts.setdefault("checkpoints", op == "prefill")
    facts.setdefault("max_spec_tokens", 4 if PHASE_OF_OP[op] == "verify" or op == "conv_prologue" else 0)
    facts.setdefault("ring", 16 if op.startswith("replay_") else 0)
    facts.setdefault("padded_pool", True)
    return Problem(op, "bfloat16", state_dtype, *heads, 128, 128, **facts)


def lengths(op):
    """Tokens of each sequence: one a sequence, or so many in all, even and as uneven as can be."""
    for count in SEQUENCES:
        if op in ONE_TOKEN:
            yield [1] * count
            continue
        for total in TOKENS:
            if total < count:
                yield [1] * total + [0] * (count - total)
            else:
                yield [total // count] * (count - 1) + [total - total // count * (count - 1)]
                yield [1] * (count - 1) + [total - count + 1]


def calls(problem, lens, **features):
    """A call in every form that the problem leaves open, in the layouts that hosts bring."""
    arguments = case(problem, lens, device="meta", **features).arguments()
    either = {
        "dt_bias": ("io",) if problem.bias_dtype else ("io", "fp32"),
        "use_qk_l2norm": (True, False) if problem.qk_l2norm is None else (problem.qk_l2norm,),
        "norm_weight": ("io", "fp32", None), "weight": ("io", "fp32"),
        "has_initial_state": ("io", None), "checkpoints": ("io", None), "num_accepted_tokens": ("io", None),
        "state": ("io", None) if problem.op == "conv_prologue" else ("io",),
    }  # fmt: skip
    # Told to a kernel as numbers, or not at all.
    plain = (
        {"zero_padding": False, "exp_gate": False, "gate": "silu", "null_index": -1, "max_seqlen": 0},
        {"zero_padding": True, "exp_gate": True, "gate": "sigmoid", "null_index": 0, "max_seqlen": max(lens)},
    )
    if problem.phase == "verify":
        del either["num_accepted_tokens"]
    if "start_rows" in arguments:
        arguments["start_rows"] = torch.empty(len(lens), dtype=torch.int32, device="meta")
        either["start_rows"] = ("io", None)
    names = [name for name in either if name in arguments]
    # A column of a table of rows, as a host's block table is.
    if "state_indices" in arguments and arguments["state_indices"].dim() == 1:
        arguments["state_indices"] = torch.empty(len(lens), 5, dtype=torch.int32, device="meta")[:, 2]
    for picked, told in itertools.product(itertools.product(*(either[name] for name in names)), plain):
        call = arguments | {name: value for name, value in told.items() if name in arguments}
        for name, pick in zip(names, picked, strict=True):
            if pick == "fp32":
                call[name] = torch.empty_like(call[name], dtype=torch.float32)
            elif pick != "io":
                call[name] = pick
        if "norm_weight" in call and call["norm_weight"] is None:
            call["z"] = None
        if "checkpoints" in call and call["checkpoints"] is None:
            call |= {"checkpoint_cu_starts": None, "checkpoint_every": 0}
        yield call


def reached(problem, sm):
    """Keys of all launches of such calls, with the lengths that first reached each."""
    found = {}
    run = op_of(problem.op).run
    forms = 0
    for lens in lengths(problem.op):
        with recorded(sm) as recording:
            for call in calls(problem, lens):
                run(**call)
                forms += 1
        for one in recording.launches:
            found.setdefault(key(one), lens)
    assert forms > len(SEQUENCES)
    return found


def listed(problem, sm, **more):
    variants = op_of(problem.op).variants(Platform.simulated(f"sm_{sm}"), problem, **more)
    assert len({variant.name for variant in variants}) == len(variants)
    return {key(variant.launch): variant for variant in variants}


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: "x".join(map(str, heads)))
@pytest.mark.parametrize("op", OPS)
def test_no_call_asks_for_a_kernel_that_is_not_listed(op, heads, state_dtype):
    problem = problem_of(op, heads, state_dtype)
    for sm in SMS:
        known = listed(problem, sm)
        unlisted = {k: lens for k, lens in reached(problem, sm).items() if k not in known}
        assert not unlisted, f"sm_{sm}: {len(unlisted)} kernels, the first of lengths {next(iter(unlisted.values()))}"


@pytest.mark.parametrize("heads", [(2, 4), (16, 32)], ids=lambda heads: "x".join(map(str, heads)))
@pytest.mark.parametrize("op", OPS)
def test_each_listed_kernel_is_asked_for(op, heads):
    """So the test above would fail if any one of them were left out, and warm-up compiles nothing in vain."""
    problem = problem_of(op, heads)
    for sm in SMS:
        assert set(listed(problem, sm)) == set(reached(problem, sm))


SAID = {"bias_dtype": "bfloat16", "qk_l2norm": False}  # by a host of its layer


@pytest.mark.parametrize("facts", [{"strided": True}, {"padded_pool": False}, {"gate_dtype": "float32"},
                                   {"checkpoint_dtype": "float32"}, {"unaligned": True}, {"bias_dtype": "float32"},
                                   SAID, {"qk_l2norm": True}], ids=str)  # fmt: skip
@pytest.mark.parametrize("op", OPS)
def test_facts_of_a_problem_are_followed(op, facts):
    problem = problem_of(op, (4, 8), "bfloat16", **facts)
    known = set(listed(problem, 90))
    assert set(reached(problem, 90)) <= known
    if facts == SAID and op not in ("gated_norm", "replay_fold"):  # and nothing is made in vain
        assert known < set(listed(problem_of(op, (4, 8), "bfloat16"), 90))


def checked(problem):
    """Launches of a self-check on sm_90, by key."""
    (row,) = (row for row in rows(problem.op) if row.name == "triton")
    run = op_of(problem.op).run
    with recorded(90) as recording:
        for small in small_cases(row, problem, "meta"):
            arguments = small.arguments(zero_padding=True)
            run(**{name: x for name, x in arguments.items() if name not in left_out(run, arguments)})
    return {key(launch): launch for launch in recording.launches}


@pytest.mark.parametrize("op", OPS)
def test_the_self_check_asks_for_no_kernel_that_is_not_listed(op):
    """What an image has compiled, or other processes ahead, must do for the whole start."""
    for state_dtype, checkpoints in itertools.product(("float32", "bfloat16"), (False, True)):
        problem = problem_of(op, state_dtype=state_dtype, checkpoints=checkpoints and op == "prefill")
        found = checked(problem)
        assert found and found.keys() <= set(listed(problem, 90))


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("heads", [(4, 8), (8, 16), (16, 32)], ids=lambda heads: "x".join(map(str, heads)))
@pytest.mark.parametrize("op", OPS)
def test_the_self_check_runs_every_configuration(op, heads, state_dtype):
    """In one form of the call: what a large batch takes is not what a small one does."""

    def configured(launch):
        chosen = {name: launch.arguments.get(name) for name in (*OPTIONS, "R", "BV", "NBUF", "TRANSITION")}
        return launch.kernel.__name__, *chosen.items()

    # With more drafts other kernels serve. A host's may end early.
    drafts = [{"max_spec_tokens": n, "ragged": True} for n in (4, 6, 8)] if PHASE_OF_OP[op] == "verify" else [{}]
    for facts in drafts:
        problem = problem_of(op, heads, state_dtype, checkpoints=False, **facts)
        wanted = {configured(variant.launch) for variant in listed(problem, 90).values()}
        launches = checked(problem).values()
        assert {configured(launch) for launch in launches} == wanted
    if op == "conv_prologue":
        assert max(launch.arguments["steps"] for launch in launches) == conv_prologue.MAX_STEPS


@pytest.mark.parametrize("heads", [(1, 1), (2, 6), (16, 32)], ids=lambda heads: "x".join(map(str, heads)))
@pytest.mark.parametrize("op", [op for op in OPS if op_of(op).interleaved])
def test_interleaved_heads_take_the_kernels_of_flat_ones(op, heads):
    problem = problem_of(op, heads)
    for lens in ([1], [1, 1, 1], [70], [70, 900]) if op not in ONE_TOKEN else ([1], [1, 1, 1]):
        with recorded(90) as recording:
            for call in calls(problem, lens, interleaved=True):
                op_of(op).run(**call)
        assert {key(one) for one in recording.launches} <= set(listed(problem, 90))


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("op", [op for op in OPS if op != "gated_norm"])
def test_a_pool_with_strides_of_its_own(op, state_dtype):
    problem = problem_of(op, (2, 4), state_dtype)
    row = 4 * 128 * 128
    held = torch.empty(4 * (row + 24), dtype=getattr(torch, state_dtype), device="meta")
    usual = held.as_strided((3, 4, 128, 128), (row + 16, 128 * 128, 128, 1))
    odd = held.as_strided((3, 4, 128, 128), (row + 24, 128 * 128, 128, 1))
    assert not listed(problem, 90, pool=usual)
    more = listed(problem, 90, pool=odd)
    assert more and not set(more) & set(listed(problem, 90))
    with recorded(90) as recording:
        for call in calls(problem, [1, 1]):
            op_of(op).run(**call | ({} if call["state"] is None else {"state": odd, **_beside(odd, call)}))
    assert {key(one) for one in recording.launches} <= set(more) | set(listed(problem, 90))


def test_a_launcher_on_an_unknown_platform_has_none():
    assert list(op_of("decode").variants(Platform.simulated("cpu"), problem_of("decode"))) == []


BASE = torch.zeros(64, dtype=torch.bfloat16)
VALUES = [None, 0, 1, 2, 15, 16, 32, 48, -1, -16, 2**31 - 1, 2**31, 2**31 + 1, 2**40, 2**40 + 1, -(2**31), -(2**31) - 1,
          1.0, 0.5, BASE, BASE[1:], BASE[8:], BASE.float(), BASE.half(), BASE.to(torch.int32), BASE.to(torch.int64),
          BASE.to(torch.bool)]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda x: str(x.dtype) if isinstance(x, Tensor) else str(x))
def test_specialisation_is_tritons(value):
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    backend = make_backend(GPUTarget("cuda", 90, 32))
    for wanted, on_alignment in itertools.product((True, False), repeat=2):
        kind, what = native_specialize_impl(backend, value, False, wanted, on_alignment)
        constant = what if kind == "constexpr" else None
        assert specialise(value, specialise=wanted, on_alignment=on_alignment) == (kind, constant, what == "D")


@pytest.fixture
def h100(monkeypatch, tmp_path):
    """An H100 as far as Triton's compilation sees; yields the names of the kernels that were loaded onto it."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    for kernel in launching._kernels:
        kernel.device_caches.clear()
    with stand_in(90) as loads:
        yield loads
    for kernel in launching._kernels:
        kernel.device_caches.clear()


def real(arguments):
    """The same tensors with memory, at addresses that are as aligned."""
    made = {}
    for name, x in arguments.items():
        if isinstance(x, Tensor):
            offset = x.storage_offset()
            extent = offset + 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
            x = torch.empty(extent, dtype=x.dtype, device="cpu").as_strided(x.shape, x.stride(), offset)
        made[name] = x
    return made


@pytest.mark.parametrize("op", ["decode", "gated_norm"])
def test_compile_makes_ready_what_a_launch_looks_for(op, h100):
    """Real tensors find, under Triton's own key, what `compile` made of meta tensors; and the counter moves."""
    problem = problem_of(op, (2, 4))
    variants = list(op_of(op).variants(Platform.simulated("sm_90"), problem))
    assert compile_count() == 0
    for number, variant in enumerate(variants, 1):
        variant.compile()
        variant.compile()
        assert (compile_count(), len(h100)) == (number, number)  # compiled and loaded, once
    before = launching.launch_count()
    for count in (1, 3):
        for dtype in (torch.bfloat16, torch.float32):
            arguments = case(problem, [1] * count, device="meta").arguments()
            name = "dt_bias" if op == "decode" else "weight"
            arguments[name] = torch.empty_like(arguments[name], dtype=dtype)
            op_of(op).run(**real(arguments))
    assert launching.launch_count() - before == 4 and compile_count() == len(variants)
    # Another dtype is another kernel, and is counted.
    op_of(op).run(**real(case(problem_of(op, (2, 4), gate_dtype="float32"), [1], device="meta").arguments())
                  | ({"weight": torch.empty(128, dtype=torch.float16)} if op == "gated_norm" else {}))  # fmt: skip
    assert compile_count() == len(variants) + 1


def test_what_was_brought_in_is_there_when_the_host_has_moved_the_cache(h100, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: None)
    platform, problem = Platform.simulated("sm_90"), problem_of("gated_norm", (2, 4))
    dispatch._bring_in(op_of("gated_norm"), platform, problem)
    held = compile_count()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "moved"))
    dispatch.warm(op_of("gated_norm"), platform, problem)
    assert compile_count() == held == len(h100) > 0 and not (tmp_path / "moved").exists()


def test_every_kernel_of_a_loaded_op_is_counted():
    for op in OPS:
        op_of(op)
    names = {kernel.__name__ for kernel in launching._kernels}
    assert names == {f"{n}_kernel" for n in ("conv_prologue", "prefill_solve", "prefill_state", "decode",
                                             "fused_decode", "verify", "fused_verify", "gated_norm", "replay",
                                             "replay_fold", "staged")}  # fmt: skip
    assert all(isinstance(kernel.device_caches, dict) for kernel in launching._kernels)
