"""Every CUDA backend against the float64 reference, on a real GPU and in real bf16."""

from __future__ import annotations

import pytest
import torch

from gdn_plugin.ops import cases
from gdn_plugin.ops.cases import Heads
from tests.support.checks import bits, check, run_reference

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
QWEN = Heads(4, 8, 128, 128)
HEADS = [Heads(2, 2, 64, 64), Heads(2, 4, 128, 128), Heads(1, 3, 128, 64), Heads(1, 8, 64, 128), Heads(1, 2, 256, 256)]
LENS = [(1,), (63,), (64, 1, 129), (0, 65), (257, 64, 3), (1000,)]


def ids(value):
    if isinstance(value, Heads):
        return "x".join(map(str, value))
    if isinstance(value, tuple):
        return "+".join(map(str, value))
    return str(value).replace("torch.", "")


@pytest.mark.parametrize("lens", LENS, ids=ids)
@pytest.mark.parametrize("heads", HEADS, ids=ids)
@pytest.mark.parametrize("io", [BF16, FP32], ids=ids)
def test_triton_prefill(backend_function, lens, heads, io):
    case = cases.prefill_case(lens, heads, io, pad_tokens=5, gap=8, device="cuda", fresh=(0,))
    check(backend_function("triton", "prefill"), case, precision="io")


@pytest.mark.parametrize("keys", ["random", "correlated"])
@pytest.mark.parametrize("gate", ["mild", "none", "strong", "harsh"])
@pytest.mark.parametrize("state", [FP32, BF16], ids=ids)
@pytest.mark.parametrize("exp_gate", [False, True], ids=["log", "exp"])
def test_triton_prefill_gates_and_keys(backend_function, keys, gate, state, exp_gate):
    case = cases.prefill_case((129, 64, 200), QWEN, BF16, state, keys=keys, gate=gate, exp_gate=exp_gate, device="cuda")
    check(backend_function("triton", "prefill"), case, precision="io")


@pytest.mark.parametrize("io", [BF16, FP16, FP32], ids=ids)
@pytest.mark.parametrize("zero_padding", [False, True])
def test_triton_prefill_options(backend_function, io, zero_padding):
    case = cases.prefill_case(
        (130, 0, 64, 300),
        QWEN,
        io,
        padding=(2,),
        pad_tokens=70,
        use_qk_l2norm=True,
        checkpoint_every=64,
        null_index=0,
        index_stride=3,
        offsets_dtype=torch.int64,
        device="cuda",
    )
    check(backend_function("triton", "prefill"), case, precision="io", zero_padding=zero_padding)


@pytest.mark.parametrize("heads", HEADS, ids=ids)
@pytest.mark.parametrize("io", [BF16, FP16, FP32], ids=ids)
@pytest.mark.parametrize("state", [FP32, BF16, FP16], ids=ids)
@pytest.mark.parametrize("op", ["decode", "fused_decode"])
def test_triton_decode(backend_function, op, heads, io, state):
    make = getattr(cases, f"{op}_case")
    case = make(7, heads, io, state, padding=(2, 6), null_index=0, gap=8, index_stride=2, device="cuda")
    check(backend_function("triton", op), case)


@pytest.mark.parametrize("layout", ["DS", "SD"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("batch", [1, 64, 257])
def test_triton_fused_decode_batches(backend_function, layout, norm, batch):
    case = cases.fused_decode_case(batch, QWEN, BF16, layout=layout, norm=norm, gate="sigmoid", device="cuda")
    want = run_reference(case)
    for _ in range(5):  # a race shows as an error that moves
        check(backend_function("triton", "fused_decode"), case, want=want)


@pytest.mark.parametrize("layout", ["DS", "SD"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("drafts", [1, 3, 5])
@pytest.mark.parametrize("batch", [1, 8, 64, 128])
def test_triton_fused_verify_batches(backend_function, layout, norm, drafts, batch):
    lens = [1 + (i + drafts) % (drafts + 1) for i in range(batch)]
    case = cases.fused_verify_case(
        lens, QWEN, BF16, BF16, slots=drafts + 1, layout=layout, norm=norm, fresh=range(0, batch, 5), device="cuda"
    )
    want = run_reference(case)
    for _ in range(5):  # a race shows as an error that moves
        check(backend_function("triton", "fused_verify"), case, want=want)


@pytest.mark.parametrize("heads", HEADS, ids=ids)
@pytest.mark.parametrize("io", [BF16, FP16, FP32], ids=ids)
@pytest.mark.parametrize("state", [FP32, BF16, FP16], ids=ids)
def test_triton_fused_verify(backend_function, heads, io, state):
    case = cases.fused_verify_case(
        (3, 1, 4, 0, 2), heads, io, state, pad_tokens=3, padding=(4,), fresh=(1,), gap=8, device="cuda"
    )
    check(backend_function("triton", "fused_verify"), case)


@pytest.mark.parametrize("heads", HEADS, ids=ids)
@pytest.mark.parametrize("io", [BF16, FP16, FP32], ids=ids)
@pytest.mark.parametrize("state", [FP32, BF16, FP16], ids=ids)
@pytest.mark.parametrize("op", ["replay_decode", "replay_verify", "replay_fold"])
def test_triton_replay(backend_function, op, heads, io, state):
    more = {"lens": (3, 1, 4, 0, 2), "pad_tokens": 3, "fresh": (1,), "gap": 8} if op == "replay_verify" else {}
    case = getattr(cases, f"{op}_case")(
        heads=heads, io_dtype=io, state_dtype=state, padding=(4,), device="cuda", **more
    )
    check(backend_function("triton", op), case)


@pytest.mark.parametrize("layout", ["DS", "SD"])
@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("batch", [1, 8, 64, 128])
def test_triton_replay_batches(backend_function, layout, slots, batch):
    case = cases.replay_verify_case(
        [1 + i % slots for i in range(batch)], QWEN, BF16, slots=slots, ring=16, layout=layout,
        fresh=range(0, batch, 5), device="cuda",
    )  # fmt: skip
    want = run_reference(case)
    for _ in range(5):  # a race shows as an error that moves
        check(backend_function("triton", "replay_verify"), case, want=want)


@pytest.mark.parametrize("heads", HEADS, ids=ids)
@pytest.mark.parametrize("io", [BF16, FP16, FP32], ids=ids)
@pytest.mark.parametrize("layout", ["DS", "SD"])
def test_triton_conv_prologue(backend_function, heads, io, layout):
    case = cases.conv_prologue_case(
        (5, 1, 0, 130, 2), heads, io, layout=layout, fresh=(0, 3), pad_tokens=9, gap=8, device="cuda"
    )
    check(backend_function("triton", "conv_prologue"), case)


@pytest.mark.parametrize("exp_gate", [False, True], ids=["log", "exp"])
def test_triton_conv_prologue_speculative(backend_function, exp_gate):
    case = cases.conv_prologue_case(
        (4, 1, 3, 2),
        QWEN,
        BF16,
        accepted=(1, 4, 2, 3),
        extra_columns=3,
        fresh=None,
        exp_gate=exp_gate,
        padding=(3,),
        device="cuda",
    )
    check(backend_function("triton", "conv_prologue"), case)


@pytest.mark.parametrize("heads", HEADS, ids=ids)
@pytest.mark.parametrize("io", [BF16, FP32], ids=ids)
@pytest.mark.parametrize("state", [FP32, BF16], ids=ids)
def test_triton_verify(backend_function, heads, io, state):
    case = cases.verify_case((3, 1, 4, 0, 2), heads, io, state, pad_tokens=3, padding=(4,), device="cuda")
    check(backend_function("triton", "verify"), case)


@pytest.mark.parametrize("lens", [(1,), (64, 1, 129), (257, 64, 3), (1000,)], ids=ids)
@pytest.mark.parametrize("state", [FP32, BF16, FP16], ids=ids)
@pytest.mark.parametrize("checkpoint_every", [0, 64])
def test_flashinfer_prefill(backend_function, lens, state, checkpoint_every):
    case = cases.prefill_case(
        lens, QWEN, BF16, state, exp_gate=True, fresh=None, page_tail=8192, checkpoint_every=checkpoint_every,
        promise="none", device="cuda",
    )  # fmt: skip
    check(backend_function("flashinfer", "prefill"), case, precision="io")


@pytest.mark.parametrize("state", [FP32, BF16], ids=ids)
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_flashinfer_decode(backend_function, state, batch):
    padding = (2,) if batch > 2 else ()
    case = cases.decode_case(
        batch, QWEN, BF16, state, page_tail=8192, promise="scratch", padding=padding, device="cuda"
    )
    check(backend_function("flashinfer", "decode"), case, precision="io")


@pytest.mark.parametrize("state", [FP32, BF16], ids=ids)
def test_flashinfer_verify(backend_function, state):
    page_tail = 0 if state is FP32 else 8192  # FlashInfer's scatter of fp32 states takes dense pools alone
    case = cases.verify_case((4, 4, 4), QWEN, BF16, state, page_tail=page_tail, promise="none", device="cuda")
    check(backend_function("flashinfer", "verify"), case, precision="io")


@pytest.mark.parametrize("state", [FP32, BF16], ids=ids)
@pytest.mark.parametrize("backend", ["triton", "flashinfer"])
@pytest.mark.parametrize("batch", [1, 3])
def test_verify_from_start_rows(backend_function, backend, state, batch):
    """The form that is FlashInfer's kernel alone."""
    case = cases.verify_case(
        (4,) * batch, QWEN, BF16, state, start_rows=True, page_tail=0 if state is FP32 else 8192, promise="none",
        device="cuda",
    )  # fmt: skip
    if batch == 1:  # contiguous whatever its stride, which CuTe looks at
        wide = case.args["start_rows"].repeat(4).view(4, 1).t()
        case.args["start_rows"] = wide[:, 0].as_strided((1,), (4,))
    check(backend_function(backend, "verify"), case, precision="io", zero_padding=False)


@pytest.mark.parametrize(
    ("backend", "op", "state_dtype"),
    [
        *[("triton", op, FP32) for op in ("prefill", "decode", "fused_decode", "verify", "fused_verify")],
        *[("flashinfer", op, state) for op in ("prefill", "decode") for state in (FP32, BF16)],
    ],
    ids=ids,
)
def test_pool_past_int32_offsets(backend_function, backend, op, state_dtype):
    """Rows whose offset is past 2^31 elements: a 32-bit product would wrap to another row."""
    heads = Heads(4, 32, 128, 128)
    rows = 2**31 // (32 * 128 * 128) + 40
    lens = (65, 3) if op == "prefill" else (3, 2)
    first = 2 if op.endswith("decode") else lens
    fused = op.startswith("fused_")
    promise = {} if fused else {"promise": "none"}
    make = getattr(cases, f"{op}_case")
    case = make(first, heads, BF16, state_dtype, page_tail=0, pool_rows=rows, device="cuda", **promise)
    given = case.arguments(copy=False)
    start = torch.randn(2, 32, 128, 128, device="cuda").to(state_dtype)
    steps = 4 * torch.arange(4 if op.endswith("verify") else 1, dtype=torch.int32, device="cuda")
    outs, states = [], []
    for last in (rows - 1, 39):
        index = last - torch.arange(2, dtype=torch.int32, device="cuda")[:, None] - steps
        given["state"][index[:, 0].long()] = start
        if op.endswith("verify"):
            given["num_accepted_tokens"].fill_(1)
        if fused:
            given["conv_state"].zero_()
        out = torch.zeros(case.outputs["out"][0], dtype=BF16, device="cuda")
        own = {"state_indices": index if op.endswith("verify") else index[:, 0].contiguous(), "out": out}
        backend_function(backend, op)(**given | own)
        outs.append(out)
        states.append(given["state"][index[:, -1].long()].clone())
    assert torch.isfinite(outs[0]).all()
    assert torch.equal(outs[0], outs[1]) and torch.equal(states[0].isnan(), states[1].isnan())
    assert torch.equal(states[0].nan_to_num(), states[1].nan_to_num())


@pytest.mark.parametrize("op", ["replay_decode", "replay_verify", "replay_fold"])
def test_pages_past_int32_offsets(backend_function, op):
    """The same of pages that hold a ring: the last rows of every pool in them are past 2^31 of its elements."""
    rows = 2**31 // (32 * 128 * 128) + 40
    size = (3, 2, 1) if op == "replay_verify" else 3  # an empty ring, one with room, one that folds
    page = {} if op == "replay_fold" else {"shared": True}
    case = getattr(cases, f"{op}_case")(
        size, Heads(4, 32, 128, 128), BF16, pool_rows=rows, device="cuda", **page
    )  # fmt: skip
    given = case.arguments(copy=False)
    assert all(given[name].stride(0) * (rows - 3) > 2**31 for name in case.pools)
    kept = {name: given[name][given["state_indices"].long()] for name in case.pools}
    found = []
    for last in (rows - 1, 39):
        index = last - torch.arange(3, dtype=torch.int32, device="cuda")
        for name, x in kept.items():
            given[name][index.long()] = x
        own = {name: torch.zeros(shape, dtype=dtype, device="cuda") for name, (shape, dtype) in case.outputs.items()}
        backend_function("triton", op)(**given | own | {"state_indices": index})
        found.append([*own.values(), *(given[name][index.long()] for name in case.pools)])
    assert all(bool(torch.isfinite(x).all()) for x in found[0][: len(case.outputs)])
    for x, y in zip(*found, strict=True):
        assert torch.equal(bits(x), bits(y))


@pytest.mark.parametrize("gate", ["silu", "sigmoid"])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("io", [BF16, FP16, FP32], ids=ids)
@pytest.mark.parametrize("tokens", [1, 257, 4096])
def test_triton_gated_norm(backend_function, gate, in_place, io, tokens):
    case = cases.gated_norm_case(tokens, QWEN, io, gate=gate, in_place=in_place, gap=64, device="cuda")
    check(backend_function("triton", "gated_norm"), case)
