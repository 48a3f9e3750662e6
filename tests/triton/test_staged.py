"""The staged kernels as Triton compiles them: which calls they serve, and what they need. GPUs run them: tests/gpu."""

from __future__ import annotations

import pytest
import torch

from gdn_plugin.backends.triton import fused_decode, fused_verify, replay, staged
from gdn_plugin.backends.triton.launch import recorded
from gdn_plugin.backends.triton.variants import pretended
from gdn_plugin.ops import cases
from gdn_plugin.ops.cases import Heads

BF16, FP32 = torch.bfloat16, torch.float32
QWEN = Heads(16, 32, 128, 128)
SHARED_MEMORY = 227 << 10  # a program's at most on compute capability 9.0
MODULES = {"fused_decode": fused_decode, "fused_verify": fused_verify, "replay_decode": replay, "replay_verify": replay}


def launched(op, batch, heads=QWEN, state=BF16, sm=90, **given):
    given = {"page_tail": 64, "device": "meta", **given}
    if op.startswith("replay"):
        given.setdefault("ring", 16)
    first = batch if op.endswith("decode") else (4,) * batch
    call = getattr(cases, f"{op}_case")(first, heads, BF16, state, **given).arguments()
    with recorded(sm) as recording:
        MODULES[op].run(**{"zero_padding": False, **call})
    (launch,) = recording.launches
    return launch


def is_staged(op, batch, *args, **given):
    return launched(op, batch, *args, **given).kernel.__name__.startswith("staged")


def test_an_older_triton_is_served_by_the_other_kernels(monkeypatch):
    monkeypatch.setattr(staged, "KNOWN", False)
    assert not is_staged("fused_decode", 64)


@pytest.mark.parametrize("op", MODULES)
def test_who_is_served(op):
    assert is_staged(op, 64)
    assert is_staged(op, 1) == op.startswith("replay"), "few heads"
    assert not is_staged(op, 1, state=FP32), "few heads"
    assert not is_staged(op, 64, sm=80), "a GPU that was not measured"
    assert not is_staged(op, 64, Heads(16, 48, 128, 128)), "three value heads a key head"
    assert not is_staged(op, 64, Heads(16, 32, 64, 64)), "dims that were not measured"
    if op.startswith("fused"):
        assert not is_staged(op, 64, page_tail=4), "rows that are not aligned"
    if op.startswith("replay"):
        assert not is_staged(op, 64, ring=40), "a ring that registers do not hold"
    if op.endswith("verify"):
        assert not is_staged(op, 64, slots=9), "more tokens than are unrolled"


@pytest.mark.parametrize("op", MODULES)
@pytest.mark.parametrize("heads", [(16, 16), (16, 32), (8, 32)], ids=lambda x: "x".join(map(str, x)))
@pytest.mark.parametrize("state", [BF16, FP32], ids=str)
@pytest.mark.parametrize("batch", [16, 128])
def test_a_program_fits(op, heads, state, batch):
    launch = launched(op, batch, Heads(*heads, 128, 128), state)
    assert launch.kernel.__name__.startswith("staged")
    with pretended(90):
        compiled = launch.kernel.warmup(grid=launch.grid, **launch.arguments)
    assert compiled.metadata.shared <= SHARED_MEMORY
    ratio = heads[1] // heads[0]
    assert launch.arguments["num_warps"] * 32 <= ratio * 128, "a channel would be two threads'"
    assert launch.grid == (batch * heads[0],)


# Past four tokens, with the rings that hosts have then.
@pytest.mark.parametrize(
    ("op", "slots", "ring"), [("fused_verify", 6, 0), ("replay_verify", 5, 20), ("replay_verify", 8, 32)]
)
def test_two_programs_fit_where_registers_are_held(op, slots, ring):
    given = {"slots": slots, **({"ring": ring} if ring else {})}

    def two_fit(launch):
        with pretended(90):
            compiled = launch.kernel.warmup(grid=launch.grid, **launch.arguments)
        return 2 * (compiled.metadata.shared + 1024) <= 228 << 10

    for state in (BF16, torch.float16):
        launch = launched(op, 16, state=state, **given)
        assert launch.arguments["maxnreg"] * launch.arguments["num_warps"] * 32 == 65536 // 2
        assert two_fit(launch)
        assert "maxnreg" not in launched(op, 16, state=state, **given | {"slots": 4}).arguments
    assert "maxnreg" not in launched(op, 7, **given).arguments, "a multiprocessor has one program at most"
    wide = launched(op, 16, Heads(8, 32, 128, 128), **given)
    assert "maxnreg" not in wide.arguments and (ring or not two_fit(wide))
    assert "maxnreg" not in launched(op, 16, Heads(16, 16, 128, 128), **given).arguments
    for batch in (8, 32):
        exact = launched(op, batch, state=FP32, **given)
        assert exact.kernel.__name__.startswith("staged") == bool(ring), "without one the other kernel serves"
        assert "maxnreg" not in exact.arguments and (not ring or not two_fit(exact))
