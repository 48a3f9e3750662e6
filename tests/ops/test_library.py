"""The ops as torch.library sees them: schemas, fakes, opcheck, and what is the same for every backend."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gdn_plugin import ops
from gdn_plugin.backends.torch import prefill as chunked
from gdn_plugin.ops import cases, dispatch, library
from gdn_plugin.ops.record import OPS as RECORDS
from gdn_plugin.registry import OPS, rows
from tests.support.memory import assert_reads_no_values
from tests.support.public import op_args

BUILD = {
    "conv_prologue": lambda **kw: cases.conv_prologue_case((3, 0, 2), gap=3, fresh=(0,), **kw),
    "prefill": lambda **kw: cases.prefill_case((65, 0, 2), gap=3, fresh=(0,), **kw),
    "decode": lambda **kw: cases.decode_case(3, gap=3, **kw),
    "fused_decode": lambda **kw: cases.fused_decode_case(3, gap=3, **kw),
    "verify": lambda **kw: cases.verify_case((2, 0, 3), gap=3, **kw),
    "fused_verify": lambda **kw: cases.fused_verify_case((2, 0, 3), gap=3, fresh=(0,), **kw),
    "gated_norm": lambda **kw: cases.gated_norm_case(3, gap=3, **kw),
    "replay_decode": lambda **kw: cases.replay_decode_case(3, gap=3, **kw),
    "replay_verify": lambda **kw: cases.replay_verify_case((2, 0, 3), gap=3, fresh=(0,), **kw),
    "replay_fold": lambda **kw: cases.replay_fold_case(3, fresh=(0,), accepted=(1, 2, 3), **kw),
}
WITH_STATE = [op for op in BUILD if op != "gated_norm"]
FORMS = [(op, variant) for op in BUILD for variant in ("", *["_out"][: len(RECORDS[op].outputs)])]
RINGS = {"ring_k", "ring_u", "ring_g", "ring_span"}
MUTATED = {
    "conv_prologue": {"conv_state", "state"},
    "prefill": {"state", "checkpoints"},
    "decode": {"state"},
    "fused_decode": {"conv_state", "state"},
    "verify": {"state"},
    "fused_verify": {"conv_state", "state"},
    "gated_norm": set(),
    "replay_decode": {"conv_state", "state"} | RINGS,
    "replay_verify": {"conv_state", "state"} | RINGS,
    "replay_fold": {"state", "ring_span"},
}


@pytest.mark.parametrize(("op", "variant"), FORMS)
def test_opcheck(op, variant):
    overload = getattr(torch.ops.gdn, op + variant).default
    torch.library.opcheck(overload, op_args(BUILD[op](), "torch", variant=variant))


def test_opcheck_with_checkpoints_and_speculation():
    prefill = cases.prefill_case((130, 64), checkpoint_every=64)
    torch.library.opcheck(torch.ops.gdn.prefill.default, op_args(prefill, "torch"))
    verify = cases.verify_case((2, 0, 3), start_rows=True)
    torch.library.opcheck(torch.ops.gdn.verify.default, op_args(verify, "torch"))
    fused = cases.fused_verify_case((2, 0, 3), start_rows=True, norm=False, fresh=None)
    torch.library.opcheck(torch.ops.gdn.fused_verify.default, op_args(fused, "torch"))
    replay = cases.replay_verify_case((2, 0, 3), norm=False, fresh=None, u_dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.gdn.replay_verify.default, op_args(replay, "torch"))
    torch.library.opcheck(torch.ops.gdn.replay_fold.default, op_args(cases.replay_fold_case(fresh=None), "torch"))
    rows = cases.conv_prologue_case((2, 3), accepted=(1, 2), state_dtype=None)
    torch.library.opcheck(torch.ops.gdn.conv_prologue.default, op_args(rows, "torch"))


@pytest.mark.parametrize("op", [op for op in BUILD if RECORDS[op].projections])
def test_opcheck_of_interleaved_heads(op):
    torch.library.opcheck(getattr(torch.ops.gdn, op).default, op_args(BUILD[op](interleaved=True), "torch"))


@pytest.mark.parametrize("op", BUILD)
def test_schemas_say_what_is_mutated(op):
    forms = [("", set()), ("_out", set(BUILD[op]().outputs))]
    for variant, outputs in forms[: 1 + bool(RECORDS[op].outputs)]:
        schema = getattr(torch.ops.gdn, op + variant).default._schema
        mutated = {x.name for x in schema.arguments if x.alias_info is not None and x.alias_info.is_write}
        assert mutated == MUTATED[op] | outputs
        assert schema.arguments[-1].name == "backend"
        assert all(r.alias_info is None for r in schema.returns)


@pytest.mark.parametrize("op", BUILD)
def test_fakes_have_the_real_metadata(op):
    """Shape, dtype and strides, from strided inputs; a fake that copied v's strides would fail here."""
    case = BUILD[op](io_dtype=torch.bfloat16)
    args = op_args(case, "torch")
    real = getattr(torch.ops.gdn, op)(*args)
    with FakeTensorMode() as mode:
        fake_args = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args]
        fake = getattr(torch.ops.gdn, op)(*fake_args)
    if not RECORDS[op].outputs:
        assert real is None and fake is None
        return
    pairs = zip(real, fake, strict=True) if isinstance(real, tuple) else [(real, fake)]
    for r, f in pairs:
        assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


@pytest.mark.parametrize("op", BUILD)
def test_no_tokens(op):
    """T = 0: empty outputs of the right shape, nothing written."""
    builds = {
        "conv_prologue": lambda: cases.conv_prologue_case((0, 0)),
        "prefill": lambda: cases.prefill_case((0, 0)),
        "decode": lambda: cases.decode_case(0),
        "fused_decode": lambda: cases.fused_decode_case(0),
        "verify": lambda: cases.verify_case((0, 0)),
        "fused_verify": lambda: cases.fused_verify_case((0, 0)),
        "gated_norm": lambda: cases.gated_norm_case(0),
        "replay_decode": lambda: cases.replay_decode_case(0),
        "replay_verify": lambda: cases.replay_verify_case((0, 0)),
        "replay_fold": lambda: cases.replay_fold_case(0),
    }
    case = builds[op]()
    pools = {n: p.clone() for n, p in case.pools.items()}
    result = getattr(ops, op)(**case.args, **{n: p.view for n, p in pools.items()}, backend="torch")
    first = result[0] if isinstance(result, tuple) else result
    assert (None if first is None else first.shape) == next((shape for shape, _ in case.outputs.values()), None)
    for name, pool in pools.items():
        assert torch.equal(pool.base, case.pools[name].base), name


@pytest.mark.parametrize("op", ["conv_prologue", "prefill", "verify", "fused_verify", "replay_verify"])
def test_no_sequences_but_padding_tokens(op):
    """B = 0 with T > 0: every token is padding, so outputs are zeros (g: 0, or 1 as exp(g))."""
    more = {"exp_gate": True} if op == "conv_prologue" else {}
    case = BUILD[op](**more)
    none = {"state_indices": case.args["state_indices"][:0], "cu_seqlens": torch.zeros(1, dtype=torch.int32)}
    for name in ("has_initial_state", "num_accepted_tokens"):
        if case.args.get(name) is not None:
            none[name] = case.args[name][:0]
    pools = {n: p.clone().view for n, p in case.pools.items()}
    result = getattr(ops, op)(**(case.args | none), **pools, backend="torch")
    if op == "conv_prologue":
        assert bool((result[3] == 1).all())
        result = torch.cat([result[i].flatten() for i in (0, 1, 2, 4)])
    assert bool((result == 0).all())


@pytest.mark.parametrize("kind", ["of inference mode", "a leaf"])
def test_no_sequences_into_any_buffer(kind):
    args = BUILD["verify"]().arguments(zero_padding=True)
    for name in ("state_indices", "num_accepted_tokens"):
        args[name] = args[name][:0]
    args["cu_seqlens"] = torch.zeros(1, dtype=torch.int32)
    with torch.inference_mode(kind == "of inference mode"):
        out = torch.full_like(args.pop("out"), torch.nan)
    out.requires_grad_(kind == "a leaf")
    ops.verify(**args, out=out, backend="torch")
    assert not bool(out.any())


@pytest.mark.parametrize("op", BUILD)
def test_torch_backend_reads_no_values(op):
    """On a GPU, reading a value is a synchronisation, and a capture would fail. Run here on CPU tensors."""
    args = (BUILD[op](padding=(0,)) if op in WITH_STATE else BUILD[op]()).arguments(zero_padding=True)
    if op == "prefill":
        for unread in ("max_seqlen", "padding"):
            args.pop(unread)
        assert_reads_no_values(lambda: chunked._prefill_device(**args))
    else:
        assert_reads_no_values(lambda: dispatch.backend_op(op, "torch").run(**args))


def test_the_detector_of_value_reads_can_fail():
    with pytest.raises(AssertionError, match="reads values"):
        assert_reads_no_values(lambda: torch.ones(2).sum().item())
    with pytest.raises(AssertionError, match="reads values"):
        assert_reads_no_values(lambda: torch.ones(2)[torch.tensor([True, False])])


def test_one_implementation_for_every_device():
    for name in (form for op in OPS for form in (op, *([f"{op}_out"] if RECORDS[op].outputs else []))):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"gdn::{name}", "CompositeExplicitAutograd")


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(("op", "variant"), FORMS)
def test_nothing_is_recorded_for_autograd(op, variant, backend):
    """Outside no_grad, inputs that require grad make no call fail and put no pool and no buffer on a graph."""
    schema = getattr(torch.ops.gdn, op + variant).default._schema
    args = op_args(BUILD[op](), backend, variant=variant)
    for argument, value in zip(schema.arguments, args, strict=True):
        if argument.alias_info is None and isinstance(value, torch.Tensor) and value.is_floating_point():
            value.requires_grad_()
    getattr(torch.ops.gdn, op + variant)(*args)
    for argument, value in zip(schema.arguments, args, strict=True):
        if argument.alias_info is not None and isinstance(value, torch.Tensor):
            assert not value.requires_grad, argument.name


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize(("op", "variant"), FORMS)
def test_autograd_knows_what_was_written(op, variant, backend):
    """What it keeps of a tensor is no longer there: it has to raise where it would give a wrong gradient."""
    if backend not in {row.name for row in rows(op)}:
        backend = "reference"
    schema = getattr(torch.ops.gdn, op + variant).default._schema
    args = op_args(BUILD[op](), backend, variant=variant)
    tensors = [pair for pair in zip(schema.arguments, args, strict=True) if isinstance(pair[1], torch.Tensor)]
    written = [value for argument, value in tensors if argument.alias_info is not None and argument.alias_info.is_write]
    memory = {value.untyped_storage().data_ptr() for value in written}  # views of one page count together
    before = [value._version for _, value in tensors]
    getattr(torch.ops.gdn, op + variant)(*args)
    for (argument, value), version in zip(tensors, before, strict=True):
        assert (value._version > version) == (value.untyped_storage().data_ptr() in memory), argument.name


class TestTheRecord:
    """What the record says is what the op is; a signature that says something else does not import."""

    def test_a_default_that_differs(self):
        with pytest.raises(TypeError, match=r"gdn\.gated_norm: record and signature differ.*eps"):

            @library.public(RECORDS["gated_norm"])
            def gated_norm(x, z, weight, *, eps=1e-5, gate="silu", out=None, backend=None):
                pass

    def test_an_argument_that_is_missing(self):
        with pytest.raises(TypeError, match=r"differ.*gate"):

            @library.public(RECORDS["gated_norm"])
            def gated_norm(x, z, weight, *, eps=1e-6, out=None, backend=None):
                pass

    def test_schemas_are_derived(self):
        for name, record in RECORDS.items():
            for form, out in ((name, False), (f"{name}_out", True))[: 1 + bool(record.outputs)]:
                schema = str(getattr(torch.ops.gdn, form).default._schema)
                assert schema == f"gdn::{form}{record.schema(out=out)}"
