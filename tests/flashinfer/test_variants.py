"""After the variants of a problem were compiled, no call of it asks a compiler for another kernel."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from gdn_plugin.backends.flashinfer.api import compile_count
from gdn_plugin.backends.flashinfer.decode import DECODE
from gdn_plugin.backends.flashinfer.prefill import PREFILL
from gdn_plugin.backends.flashinfer.verify import VERIFY
from gdn_plugin.registry import Platform
from gdn_plugin.tools.simulated import Recording, simulated_device
from tests.flashinfer.calls import D, call, problem, split

HEADS = [(2, 4), (4, 8), (16, 32), (16, 48)]
BATCHES = (1, 2, 3, 8, 32)
TOKENS = (1, 63, 64, 65, 1000, 4099, 16384)
MANY = (4, 5, 7, 11, 16, 17, 31, 33, 47, 63, 65, 90, 128, 129, 200, 257, 400, 1000)  # where kernels change, and between
OPS = {"prefill": PREFILL, "decode": DECODE, "verify": VERIFY}
FP32, BF16, FP16, INT32 = torch.float32, torch.bfloat16, torch.float16, torch.int32


@pytest.fixture(params=["sm_90a", "sm_100a"])
def machine(request: pytest.FixtureRequest) -> Iterator[Recording]:
    with simulated_device(request.param) as recording:
        yield recording


def compiled(machine, problem, pool=None):
    """How many kernels the variants of a problem compile; their names are all different."""
    before, variants = (
        compile_count(),
        list(OPS[problem.op].variants(Platform.simulated(machine.arch.removesuffix("a")), problem, pool)),
    )
    assert len({variant.name for variant in variants}) == len(variants)
    for variant in variants:
        variant.compile()
    assert compile_count() == machine.specialisations
    return compile_count() - before


def pool_of(heads, dtype, gap=0, count=70):
    row = heads[1] * D * D
    return torch.empty_strided((count, heads[1], D, D), (row + gap, D * D, D, 1), dtype=dtype, device="cuda")


def prefill_calls(heads, state, saves):
    for batch, tokens, odd in itertools.product(BATCHES, TOKENS, (False, True)):
        for saved in {saves, False}:
            wanted = problem("prefill", heads, state.dtype, checkpoints=saved, padding="scratch" if odd else "none")
            yield call(
                wanted, split(tokens, batch), zero_padding=odd, fresh=() if odd else None, use_qk_l2norm=odd,
                exp_gate=not odd, hint_seqlen=not odd, null_index=0, index_stride=1 + odd,
                offsets_dtype=torch.int64 if odd else INT32,
            ) | {"state": state}  # fmt: skip


def decode_calls(heads, state, norms=(False, True), biases=(BF16, FP32)):
    layouts = itertools.cycle((("none", 1), ("scratch", 2), ("scratch", 1)))
    for batch, norm, bias in itertools.product((*BATCHES, *MANY), norms, biases):
        padding, stride = next(layouts)
        wanted = problem("decode", heads, state.dtype, padding=padding)
        features = {"use_qk_l2norm": norm, "bias_dtype": bias, "index_stride": stride, "null_index": 0}
        yield call(wanted, [1] * batch, zero_padding=True, **features) | {"state": state}


def verify_calls(heads, state, width, norms=(False, True), biases=(BF16, FP32)):
    layouts = itertools.cycle(((False, 1), (True, 1), (False, 2), (True, 2)))
    for batch, norm, bias in itertools.product((*BATCHES, *MANY), norms, biases):
        given, stride = next(layouts)
        wanted = problem("verify", heads, state.dtype, padding="none", max_spec_tokens=width)
        features = {"use_qk_l2norm": norm, "bias_dtype": bias, "index_stride": stride, "null_index": 0}
        yield call(wanted, [width] * batch, start_rows=given, **features) | {"state": state}


def nothing_compiles(machine, op, calls):
    before = machine.specialisations
    for arguments in calls:
        OPS[op].run(**arguments)
        assert machine.specialisations == before, {
            name: tuple(x.shape) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()
        }
    assert compile_count() == before
    assert machine.launches


@pytest.mark.parametrize("checkpoints", [False, True], ids=["plain", "checkpoints"])
@pytest.mark.parametrize("state_dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_prefill(machine, heads, state_dtype, checkpoints):
    wanted = problem("prefill", heads, state_dtype, checkpoints=checkpoints, padded_pool=True)
    assert compiled(machine, wanted) > 0
    assert compiled(machine, wanted, pool_of(heads, state_dtype)) == 0
    nothing_compiles(machine, "prefill", prefill_calls(heads, pool_of(heads, state_dtype, 8192), checkpoints))


@pytest.mark.parametrize("gap", [0, 8192], ids=["dense", "padded"])
@pytest.mark.parametrize("state_dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("heads", [*HEADS, (2, 8), (1, 12), (16, 64)], ids=str)
def test_decode(machine, heads, state_dtype, gap):
    """A padded bf16 pool's kernels are compiled for it and for no other; any other pool's for all."""
    wanted, pool = problem("decode", heads, state_dtype, padded_pool=gap > 0), pool_of(heads, state_dtype, gap)
    own = gap > 0 and state_dtype == BF16
    assert bool(compiled(machine, wanted)) is not own
    assert bool(compiled(machine, wanted, pool)) is own
    nothing_compiles(machine, "decode", decode_calls(heads, pool))


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("state_dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_verify(machine, heads, state_dtype, width):
    wanted = problem("verify", heads, state_dtype, max_spec_tokens=width)
    assert compiled(machine, wanted) > 0
    nothing_compiles(machine, "verify", verify_calls(heads, pool_of(heads, state_dtype), width))


def test_verify_of_a_padded_bf16_pool(machine):
    heads, width = (16, 32), 4
    pool = pool_of(heads, BF16, 8192)
    wanted = problem("verify", heads, BF16, max_spec_tokens=width, padded_pool=True)
    assert compiled(machine, wanted) == 0
    assert compiled(machine, wanted, pool) > 0
    nothing_compiles(machine, "verify", verify_calls(heads, pool, width))


@pytest.mark.parametrize("state_dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("op", ["decode", "verify"])
def test_what_a_problem_says_is_not_compiled_twice(h100, op, state_dtype):
    """A host knows its dt_bias and who normalises q and k: a quarter of the kernels."""
    heads, width = (16, 32), 4 if op == "verify" else 0
    pool = pool_of(heads, state_dtype)
    told = problem(op, heads, state_dtype, max_spec_tokens=width, bias_dtype="bfloat16", qk_l2norm=False)
    number = compiled(h100, told)
    known = {"norms": (False,), "biases": (BF16,)}
    calls = decode_calls(heads, pool, **known) if op == "decode" else verify_calls(heads, pool, width, **known)
    nothing_compiles(h100, op, calls)
    left_open = problem(op, heads, state_dtype, max_spec_tokens=width)
    listed = [list(OPS[op].variants(Platform.simulated("sm_90"), wanted)) for wanted in (told, left_open)]
    assert 4 * len(listed[0]) == len(listed[1])
    assert compiled(h100, left_open) >= number > 0


def test_another_pool_is_compiled_for_too(h100):
    """vLLM binds a small pool first, to measure what CUDA graphs take, and the real one later."""
    heads, wanted = (16, 32), problem("decode", (16, 32), BF16, padded_pool=True)
    pools = [pool_of(heads, BF16, gap, count) for gap, count in ((8192, 70), (8192, 9), (64, 70), (8192, 70))]
    first, smaller, closer, again = (compiled(h100, wanted, pool) for pool in pools)
    assert first > smaller == closer > 0 == again  # the first compiles our own kernels too


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_variants_reach_both_routes_of_prefill(arch):
    names = [v.name for v in PREFILL.variants(Platform.simulated(arch), problem("prefill", (16, 32), FP32))]
    with simulated_device(f"{arch}a") as device:
        for variant in PREFILL.variants(Platform.simulated(arch), problem("prefill", (16, 32), FP32)):
            variant.compile()
    assert len(names) > 2 and any(name.startswith("CP") for name in device.launches)
    assert any(not name.startswith("CP") and name != "_launch" for name in device.launches)
