"""The Triton conv_prologue under Triton's interpreter, against the float64 reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from gdn_plugin.backends.triton import conv_prologue as module
from gdn_plugin.backends.triton.conv_prologue import CONFIGS, PrologueConfig, choose_config
from gdn_plugin.backends.triton.conv_prologue import run as conv_prologue
from gdn_plugin.backends.triton.launch import launch_count
from gdn_plugin.ops.cases import Heads, conv_prologue_case
from tests.support.checks import check, run

SMALL = Heads(1, 2, 64, 64)
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.mark.parametrize(
    "lens",
    [(1,), (2,), (16,), (17,), (130,), (0, 5, 0, 1, 0), (3, 2, 1, 18), (0, 0), (1,) * 9],
    ids=lambda x: "+".join(map(str, x)),
)
@pytest.mark.parametrize("pad_tokens", [0, 5])
def test_lengths(lens, pad_tokens):
    check(conv_prologue, conv_prologue_case(lens, SMALL, pad_tokens=pad_tokens))


def test_more_sequences_than_one_search_tile():
    lens = [0] * 132
    for i, length in {1: 2, 127: 3, 128: 1, 129: 17, 131: 4}.items():
        lens[i] = length
    case = conv_prologue_case(lens, Heads(1, 1, 64, 64), fresh=(127, 131), padding=(129,), pad_tokens=3)
    check(conv_prologue, case)


@pytest.mark.parametrize("config", [*CONFIGS.lookup(90, 128, 128, torch.bfloat16), PrologueConfig(2, 4, 1)], ids=str)
def test_configurations(config):
    case = conv_prologue_case((37, 5, 70), SMALL, fresh=(1,), pad_tokens=20)
    check(partial(conv_prologue, config=config), case)


@pytest.mark.parametrize("width", [2, 4, 6, 8])
@pytest.mark.parametrize("accepted", [None, (2, 1, 3)], ids=["plain", "speculative"])
def test_steps_shorter_than_the_history(width, accepted):
    """A run takes as many steps as reach over it, and carries what one step leaves of it."""
    case = conv_prologue_case((2, 37, 9), SMALL, width=width, accepted=accepted, extra_columns=40, pad_tokens=2)
    check(partial(conv_prologue, config=PrologueConfig(4, 2, 1)), case)


@pytest.mark.parametrize("steps", [2, 3, 8])
@pytest.mark.parametrize("lens", [(67,), (33, 16, 0, 5)], ids=lambda x: "+".join(map(str, x)))
def test_steps(monkeypatch, steps, lens):
    """Blocks that end in any step of any run, of sequences and of padding."""
    monkeypatch.setattr(module, "choose_steps", lambda *given: steps)
    case = conv_prologue_case(lens, SMALL, fresh=(0,), pad_tokens=19)
    for config in (PrologueConfig(2, 4, 1), PrologueConfig(1, 4, 1)):
        check(partial(conv_prologue, config=config), case)


def test_blocks_leave_enough_programs_and_are_mostly_full():
    short, long = CONFIGS.lookup(90, 128, 128, torch.bfloat16)
    steps = partial(module.choose_steps, slots=65, width=4)
    assert [steps(long, tokens, 1) for tokens in (256, 1024, 2048, 4096, 16384)] == [1, 4, 4, 4, 4]
    assert steps(long, 16384, 8) == 4 and steps(long, 16384, 512) == 2
    assert steps(short, 256, 64) == 1


@pytest.mark.parametrize(
    "heads",
    [(1, 1, 64, 64), (2, 6, 64, 128), (1, 8, 128, 64), (1, 3, 256, 256)],
    ids=lambda x: "x".join(map(str, x)),
)
def test_heads_and_dims(heads):
    check(conv_prologue, conv_prologue_case((5, 1), Heads(*heads)))


@pytest.mark.parametrize("io_dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("state_dtype", [FP32, FP16, BF16, None], ids=str)
def test_dtypes(io_dtype, state_dtype):
    check(conv_prologue, conv_prologue_case((5, 1, 9), SMALL, io_dtype, state_dtype=state_dtype, fresh=(1,)))


@pytest.mark.parametrize("layout", ["DS", "SD"])
@pytest.mark.parametrize("width", [2, 3, 4])
def test_conv_layouts(layout, width):
    case = conv_prologue_case(
        (5, 1, 2), SMALL, BF16, conv_dtype=FP32, gate_dtype=FP32, layout=layout, width=width, bias=width != 3,
        extra_columns=width - 2,
    )  # fmt: skip
    check(conv_prologue, case)


@pytest.mark.parametrize("fresh", [None, (), (0, 2), (0, 1, 2, 3)], ids=str)
def test_fresh_sequences(fresh):
    """Their rows are full of NaN before, and their recurrent state is zero afterwards."""
    check(conv_prologue, conv_prologue_case((5, 1, 0, 2), SMALL, fresh=fresh))


@pytest.mark.parametrize("exp_gate", [False, True], ids=["log", "exp"])
@pytest.mark.parametrize("null_index", [-1, 0])
@pytest.mark.parametrize("offsets_dtype", [torch.int32, torch.int64], ids=str)
def test_padding_and_strides(exp_gate, null_index, offsets_dtype):
    case = conv_prologue_case(
        (5, 2, 0, 3), SMALL, padding=(1,), fresh=(3,), pad_tokens=7, null_index=null_index, index_stride=3, gap=8,
        exp_gate=exp_gate, offsets_dtype=offsets_dtype, page_tail=40,
    )  # fmt: skip
    check(conv_prologue, case)


@pytest.mark.parametrize("layout", ["DS", "SD"])
@pytest.mark.parametrize("width", [2, 4])
def test_speculative_rows(layout, width):
    case = conv_prologue_case(
        (4, 1, 3, 2, 0), SMALL, accepted=(1, 4, 2, 3, 1), fresh=None, padding=(3,), layout=layout, width=width,
        extra_columns=5,
    )  # fmt: skip
    check(conv_prologue, case)


@pytest.mark.parametrize("pad_tokens", [0, 4])
def test_one_launch(pad_tokens):
    case = conv_prologue_case((4, 0, 20), SMALL, fresh=(0,), pad_tokens=pad_tokens)
    before = launch_count()
    run(conv_prologue, case)
    assert launch_count() - before == 1


def test_short_blocks_for_short_sequences():
    short, long = CONFIGS.lookup(90, 128, 128, torch.bfloat16)
    assert choose_config(90, torch.bfloat16, 128, 128, 256, 64) == short
    assert choose_config(90, torch.bfloat16, 128, 128, 8192, 1) == long
