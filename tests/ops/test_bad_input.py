"""Every argument of every op, wrong in type, rank, size, dtype, device and stride: a ValueError that names it.

One table a kind of mistake, applied to every argument it makes sense for; nothing may have been written.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from gdn_plugin import ops
from gdn_plugin.ops import cases
from gdn_plugin.ops.record import OPS
from gdn_plugin.settings import SettingsError
from tests.support.checks import bits
from tests.support.public import supported

OP_CASES = {
    "conv_prologue": lambda: cases.conv_prologue_case(
        (3, 2), accepted=(1, 2), page_tail=8, layout="DS", state_dtype=torch.float32
    ),
    "prefill": lambda: cases.prefill_case((65, 64), checkpoint_every=64),
    "decode": lambda: cases.decode_case(3),
    "fused_decode": lambda: cases.fused_decode_case(3),
    "verify": lambda: cases.verify_case((2, 3), slots=3, start_rows=True),
    "fused_verify": lambda: cases.fused_verify_case((2, 3), slots=3, start_rows=True, fresh=(1,)),
    "gated_norm": lambda: cases.gated_norm_case(3),
    "replay_decode": lambda: cases.replay_decode_case(3),
    "replay_verify": lambda: cases.replay_verify_case((2, 3), slots=3, fresh=(1,)),
    "replay_fold": lambda: cases.replay_fold_case(3, accepted=(1, 2, 3), fresh=(1,)),
}
REPLAY = ("replay_decode", "replay_verify", "replay_fold")
FUSED = ("fused_decode", "fused_verify", "replay_decode", "replay_verify")
# Arguments whose strides are free in every dim, or in all but the last.
ANY_STRIDE = {"conv_weight", "state_indices", "g", "beta"}
LAST_DENSE = {"x", "mixed_qkv", "q", "k", "v", "a", "b", "z"}


def arguments(op):
    """The public function's arguments, all of them given, out included."""
    case = OP_CASES[op]()
    values = dict(case.args) | {n: p.clone().view for n, p in case.pools.items()}
    buffers = {n: torch.full(shape, 7.0, dtype=dtype) for n, (shape, dtype) in case.outputs.items()}
    if buffers:
        values["out"] = tuple(buffers.values()) if op == "conv_prologue" else buffers["out"]
    return values


def other_rank(x):
    return x.unsqueeze(0)


def longer(dim):
    return lambda x: torch.cat((x, x.narrow(dim, 0, 1)), dim)


def other_dtype(x):
    return x.to(torch.int16)


def float64(x):
    return x.double()


def other_device(x):
    return x.to("meta")


def every_other(x):
    """Same size, twice the innermost stride."""
    wide = torch.zeros(*x.shape, 2, dtype=x.dtype)
    wide[..., 0] = x
    return wide[..., 0]


def table():
    for op in OP_CASES:
        for name, x in arguments(op).items():
            if isinstance(x, Tensor):
                yield op, name, "list", lambda x: x.tolist()
                yield op, name, "rank", other_rank
                yield op, name, "dtype", other_dtype
                if x.is_floating_point():
                    yield op, name, "float64", float64
                yield op, name, "device", other_device
                pool = {"state": (1, 2, 3), "conv_state": (1,), "checkpoints": (1, 2, 3), "conv_weight": (0,),
                        "ring_k": (0, 2, 3)}  # fmt: skip
                for dim in pool.get(name, range(x.dim())):
                    if (op, name, dim) not in FREE_SIZES:
                        yield op, name, f"size of dim {dim}", longer(dim)
                if name not in ANY_STRIDE:
                    yield op, name, "stride", every_other
            elif name == "out":
                for i, part in enumerate(x):
                    for kind, wrong in (("rank", other_rank), ("dtype", other_dtype), ("stride", every_other)):
                        yield op, "out", f"{kind} of {i}", (lambda t, i=i, w=wrong: (*t[:i], w(t[i]), *t[i + 1 :]))
                    yield op, "out", f"size of {i}", (lambda t, i=i: (*t[:i], longer(0)(t[i]), *t[i + 1 :]))
                    assert isinstance(part, Tensor)
                yield op, "out", "count", lambda t: t[:4]
                yield op, "out", "type", lambda t: 3


# S of state_indices [B, S] is the caller's to choose; a longer prefill pool of checkpoints is just a longer pool.
FREE_SIZES = {("verify", "state_indices", 1)}
SCALARS = [
    *[(op, "null_index", bad) for op in OP_CASES if op != "gated_norm" for bad in (-2, 1.0, None, True)],
    *[(op, "backend", bad) for op in OP_CASES for bad in (3, b"torch")],
    *[(op, n, bad) for op in ("conv_prologue", *FUSED) for bad in (0, -1, 3, 2.0, None)
      for n in ("num_k_heads", "head_k_dim", "head_v_dim")],
    *[(op, "scale", bad) for op in ("prefill", "decode", "verify", *FUSED)
      for bad in ("1", float("nan"), True)],
    *[(op, "padding", bad) for op in ("prefill", "decode", "verify") for bad in ("", None, "all")],
    *[(op, "use_qk_l2norm", bad) for op in ("prefill", "decode", "verify") for bad in (1, None)],
    *[(op, "zero_padding", bad) for op in ("prefill", "decode", "verify", *FUSED)
      for bad in (1, None)],
    *[(op, "exp_gate", bad) for op in ("conv_prologue", "prefill") for bad in (1, None)],
    *[("prefill", "max_seqlen", bad) for bad in (-1, 1.5, None)],
    *[("prefill", "checkpoint_every", bad) for bad in (0, -64, 63, 96, 64.0, None)],
    *[(op, "norm_eps", bad) for op in FUSED for bad in (-1e-6, "0", None, float("nan"))],
    *[("gated_norm", "eps", bad) for bad in (-1e-6, "0", None, float("nan"))],
    *[(op, "gate", bad) for op in (*FUSED, "gated_norm") for bad in ("relu", None, "SILU")],
]  # fmt: skip
MISSING = [
    ("prefill", {"checkpoints": None}, "checkpoints"),
    ("prefill", {"checkpoint_cu_starts": None}, "checkpoint_cu_starts"),
    ("prefill", {"checkpoints": None, "checkpoint_cu_starts": None}, "checkpoint_every"),
    *[(op, {name: None}, name) for op in FUSED for name in ("z", "norm_weight")],
    ("prefill", {"padding": "scratch", "null_index": -1}, "null_index"),
]
# By op, tensors that may be None.
OPTIONAL = {
    "conv_prologue": {"conv_bias", "has_initial_state", "num_accepted_tokens", "state", "out"},
    "prefill": {"has_initial_state", "checkpoints", "checkpoint_cu_starts", "out"},
    "decode": {"out"},
    "fused_decode": {"conv_bias", "z", "norm_weight", "out"},
    "verify": {"start_rows", "out"},
    "fused_verify": {"conv_bias", "has_initial_state", "start_rows", "z", "norm_weight", "out"},
    "gated_norm": {"out"},
    "replay_decode": {"conv_bias", "z", "norm_weight", "out"},
    "replay_verify": {"conv_bias", "has_initial_state", "z", "norm_weight", "out"},
    "replay_fold": {"has_initial_state", "num_accepted_tokens"},
}
REQUIRED = [
    (op, name) for op in OP_CASES for name, x in arguments(op).items()
    if isinstance(x, Tensor) and name not in OPTIONAL[op]
]  # fmt: skip


def refused(op, values, name):
    """The call raises a ValueError that names the op and the argument, and nothing was written.

    The good call that it differs from was made before: what is remembered of that one must not let this one through.
    """
    getattr(ops, op)(**arguments(op), backend="torch")
    watched = [x for n in (*OPS[op].written, "out") for x in _tensors(values.get(n))]
    before = [bits(x).clone() for x in watched]
    with pytest.raises(ValueError, match=rf"^gdn\.{op}: ") as caught:
        getattr(ops, op)(**({"backend": "torch"} | values))
    message = str(caught.value)
    assert re.search(rf"\b{name}\b", message), message
    assert "expected" in message and "got" in message
    for x, was in zip(watched, before, strict=True):
        assert torch.equal(bits(x), was)


def _tensors(x):
    group = x if isinstance(x, (tuple, list)) else [x]
    return [t for t in group if isinstance(t, Tensor) and t.device.type == "cpu"]


@pytest.mark.parametrize(("op", "name", "kind", "wrong"), [pytest.param(*r, id="-".join(r[:3])) for r in table()])
def test_wrong_tensor(op, name, kind, wrong):
    values = arguments(op)
    refused(op, values | {name: wrong(values[name])}, name)


def interleaved(op):
    """Arguments whose projections have interleaved heads."""
    case = getattr(cases, f"{op}_case")(interleaved=True)
    return case.args | {n: p.clone().view for n, p in case.pools.items()}


@pytest.mark.parametrize(
    ("op", "name", "dim"),
    [(op, argument.name, dim) for op, record in OPS.items() for argument in record.projections
     for dim in range(len(argument.interleaved))],
    ids=str,
)  # fmt: skip
def test_wrong_shares(op, name, dim):
    values = interleaved(op)
    for wrong in (longer(dim), lambda x: x.narrow(dim, 0, 0), every_other, other_dtype):
        bad = wrong(values[name])
        refused(op, values | {name: bad}, name)


@pytest.mark.parametrize(("op", "name", "bad"), SCALARS, ids=lambda x: str(x))
def test_wrong_scalar(op, name, bad):
    refused(op, arguments(op) | {name: bad}, name)


@pytest.mark.parametrize(("op", "missing", "name"), MISSING, ids=lambda x: str(x))
def test_half_of_a_pair(op, missing, name):
    refused(op, arguments(op) | missing, name)


@pytest.mark.parametrize(("op", "name"), REQUIRED)
def test_none_for_a_required_tensor(op, name):
    refused(op, arguments(op) | {name: None}, name)


def test_pools_that_overlap_themselves():
    values = arguments("decode")
    dense = values["state"][0].numel()
    state = torch.as_strided(torch.zeros(dense * 8), values["state"].shape, (dense // 2, *values["state"].stride()[1:]))
    refused("decode", values | {"state": state}, "state")
    values = arguments("fused_decode")
    n, dim, width = values["conv_state"].shape
    overlapping = torch.as_strided(torch.zeros(n * dim * width), (n, dim, width), (dim * width, 1, 1))
    refused("fused_decode", values | {"conv_state": overlapping}, "conv_state")


@pytest.mark.parametrize("op", REPLAY)
def test_rings_that_cannot_be(op):
    """Too small for the tokens of two steps, rows that overlap, slots that are not dense, another number of rows."""
    values = arguments(op)
    steps = {} if op == "replay_fold" else {"conv_state": values["conv_state"]}
    least = 2 * (steps["conv_state"].shape[2] - values["conv_weight"].shape[1] + 2) if steps else 1
    rings = ("ring_k", "ring_u", "ring_g")
    refused(op, values | {n: values[n][:, : least - 1].clone() for n in rings}, "ring_k")
    for name in (*rings, "ring_span"):
        x = values[name]
        dense = x[0].numel()
        apart = torch.zeros(dense * (x.shape[0] + 1), dtype=x.dtype).as_strided(x.shape, (dense - 1, *x.stride()[1:]))
        refused(op, values | {name: apart}, name)
        wide = torch.zeros(x.shape[0], 2 * x.shape[1], *x.shape[2:], dtype=x.dtype)[:, ::2]
        refused(op, values | {name: wide}, name)
        refused(op, values | {name: x[:-1]}, name)


def test_too_few_columns_for_the_drafts():
    values = arguments("fused_verify")
    refused("fused_verify", values | {"conv_state": values["conv_state"][:, :, :-1]}, "conv_state")


@pytest.mark.parametrize("heads", [cases.Heads(1, 1, 16, 8), cases.Heads(1, 2, 16, 1), cases.Heads(2, 2, 1, 8)])
@pytest.mark.parametrize("name", ["torch", "cpu"])
def test_a_dim_of_one_element_may_have_any_stride(heads, name):
    if name not in supported("decode"):
        pytest.skip("the cpu backend cannot run here")
    case = cases.decode_case(3, heads)
    state = case.pools["state"].view
    odd = [999 if size == 1 else stride for size, stride in zip(state.shape, state.stride(), strict=True)]
    results = []
    for strides in (state.stride(), odd):
        own = case.pools["state"].clone().view.as_strided(state.shape, strides, state.storage_offset())
        results.append((ops.decode(**case.args, state=own, backend=name), own))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(bits(results[0][1].contiguous()), bits(results[1][1].contiguous()))


@pytest.mark.parametrize("shape", [(3, 4, 0), (3, 0, 8)])
def test_a_norm_of_nothing(shape):
    x = torch.zeros(shape)
    refused("gated_norm", {"x": x, "z": x, "weight": torch.zeros(shape[2])}, "x")


def test_the_arguments_are_good_to_begin_with():
    """Else every test above would pass for the wrong reason."""
    for op in OP_CASES:
        getattr(ops, op)(**arguments(op), backend="torch")


BAD_VALUES = [
    ("prefill", "state_indices", lambda x: x.fill_(1), "unique"),
    ("prefill", "state_indices", lambda x: x.fill_(99), "below N"),
    ("prefill", "cu_seqlens", lambda x: x.copy_(torch.tensor([0, 80, 70])), "never fall"),
    ("prefill", "cu_seqlens", lambda x: x.copy_(torch.tensor([0, 80, 700])), "up to T"),
    ("prefill", "cu_seqlens", lambda x: x.copy_(torch.tensor([1, 80, 90])), "first offset 0"),
    ("prefill", "checkpoint_cu_starts", lambda x: x.copy_(torch.tensor([0, 0, 1])), "rows within"),
    ("decode", "state_indices", lambda x: x.fill_(2), "unique"),
    ("fused_decode", "state_indices", lambda x: x.fill_(2), "unique"),
    ("conv_prologue", "state_indices", lambda x: x.fill_(2), "unique"),
    ("conv_prologue", "num_accepted_tokens", lambda x: x.fill_(9), "values from 1"),
    ("verify", "state_indices", lambda x: x.fill_(2), "unique"),
    ("verify", "num_accepted_tokens", lambda x: x.fill_(0), "values from 1"),
    ("verify", "start_rows", lambda x: x.fill_(99), "start_rows: expected rows below N"),
    ("verify", "cu_seqlens", lambda x: x.copy_(torch.tensor([0, 0, 5])), "at most"),
    ("fused_verify", "state_indices", lambda x: x.fill_(2), "unique"),
    ("fused_verify", "num_accepted_tokens", lambda x: x.fill_(4), "values from 1"),
    ("fused_verify", "start_rows", lambda x: x.fill_(99), "start_rows: expected rows below N"),
    ("fused_verify", "cu_seqlens", lambda x: x.copy_(torch.tensor([0, 0, 5])), "at most"),
    ("replay_verify", "num_accepted_tokens", lambda x: x.fill_(4), "values from 1"),
    ("replay_verify", "num_accepted_tokens", lambda x: x.fill_(0), "values from 1"),
    ("replay_verify", "cu_seqlens", lambda x: x.copy_(torch.tensor([0, 0, 5])), "at most"),
    ("replay_verify", "cu_seqlens", lambda x: x.copy_(torch.tensor([0, 2, 9])), "up to T"),
    ("replay_fold", "num_accepted_tokens", lambda x: x.fill_(0), "values from 1"),
    ("replay_fold", "num_accepted_tokens", lambda x: x.fill_(9), "values from 1"),
    *[
        (op, name, spoil, message)
        for op in REPLAY
        for name, spoil, message in (
            ("state_indices", lambda x: x.fill_(2), "unique"),
            ("state_indices", lambda x: x.fill_(99), "below N"),
            ("ring_span", lambda x: x[..., 0].fill_(-1), "a first slot"),
            ("ring_span", lambda x: x[..., 0].fill_(99), "a first slot"),
            ("ring_span", lambda x: x[..., 1].fill_(-1), "a number that fits"),
            ("ring_span", lambda x: x[..., 1].fill_(12), "a number that fits"),
            ("ring_span", lambda x: x[:, 1, 0].add_(1).remainder_(8), "the same for every key head"),
        )
    ],
    ("replay_decode", "ring_span", lambda x: x[..., 1].fill_(8), "a number that fits"),
]
BROKEN_PROMISES = [
    ("prefill", "none", lambda values: values["state_indices"].fill_(-1), "no padding"),
    ("prefill", "none", lambda values: values["cu_seqlens"].copy_(torch.tensor([0, 65, 128])), "past cu_seqlens"),
    ("decode", "none", lambda values: values["state_indices"].copy_(torch.tensor([1, -1, 2])), "no padding"),
    ("decode", "scratch", lambda values: values["state_indices"].copy_(torch.tensor([1, -1, 2])), "row 0 for padding"),
]


@pytest.mark.parametrize(("op", "name", "spoil", "message"), BAD_VALUES, ids=lambda x: x if isinstance(x, str) else "")
def test_values_are_checked_under_debug(op, name, spoil, message, monkeypatch):
    monkeypatch.setenv("GDN_PLUGIN_DEBUG", "1")
    values = arguments(op)
    getattr(ops, op)(**values, backend="torch")  # good values pass
    values = arguments(op)
    values[name] = values[name].clone()
    spoil(values[name])
    if (op, name) == ("verify", "num_accepted_tokens"):
        values["start_rows"] = None  # where it is given, they are not read
    with pytest.raises(ValueError, match=message):
        getattr(ops, op)(**values, backend="torch")


@pytest.mark.parametrize(
    ("op", "padding", "spoil", "message"), BROKEN_PROMISES, ids=lambda x: x if isinstance(x, str) else ""
)
def test_promises_are_checked_under_debug(op, padding, spoil, message, monkeypatch):
    monkeypatch.setenv("GDN_PLUGIN_DEBUG", "1")
    values = arguments(op) | {"padding": padding, "null_index": 0 if padding == "scratch" else -1}
    spoil(values)
    with pytest.raises(ValueError, match=message):
        getattr(ops, op)(**values, backend="torch")


def test_a_wrong_setting_is_the_same_error_in_every_op(monkeypatch):
    monkeypatch.setenv("GDN_PLUGIN_DEBUG", "true")
    for op in OP_CASES:
        with pytest.raises(SettingsError, match=r"GDN_PLUGIN_DEBUG='true' is not valid; choose one of: 0, 1"):
            getattr(ops, op)(**arguments(op), backend="torch")


def test_wrong_calls_are_pythons_own_errors():
    values = arguments("decode")
    with pytest.raises(TypeError, match="missing a required argument: 'state'"):
        ops.decode(**{n: x for n, x in values.items() if n != "state"})
    with pytest.raises(TypeError, match="unexpected keyword argument 'sate'"):
        ops.decode(**values, sate=None)
    with pytest.raises(TypeError, match="multiple values for argument 'q'"):
        ops.decode(values["q"], **values)
    with pytest.raises(TypeError, match="too many positional"):
        ops.decode(*values.values(), 1, 2, 3)


@pytest.mark.parametrize(
    ("op", "one", "other"),
    [
        ("prefill", "state_indices", "cu_seqlens"),
        ("conv_prologue", "num_k_heads", "head_k_dim"),
        ("decode", "state_indices", "A_log"),
        ("fused_decode", "num_k_heads", "head_v_dim"),
        ("verify", "num_accepted_tokens", "cu_seqlens"),
        ("gated_norm", "x", "weight"),
    ],
)
def test_a_call_like_a_good_one_but_for_two_swapped_arguments(op, one, other):
    """In the order that the caller wrote them the values are those of the good call."""
    good = arguments(op)
    wrong = {one: good[other], other: good[one]}
    getattr(ops, op)(**good, backend="torch")
    order = [other if name == one else one if name == other else name for name in good]
    with pytest.raises(ValueError, match=rf"^gdn\.{op}: "):
        getattr(ops, op)(**{name: (good | wrong)[name] for name in order}, backend="torch")
