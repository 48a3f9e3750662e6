"""The decode ops' short ways: `usual` says yes only where `validate` finds nothing, `direct` where no one listens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gdn_plugin import ops
from gdn_plugin.ops import direct, library, usual, validate

Arguments = dict[str, Any]


def decode_arguments(tokens: int = 3, heads: tuple[int, int] = (2, 4), K: int = 16, V: int = 8) -> Arguments:
    hk, hv = heads
    return {
        "q": torch.randn(tokens, hk, K), "k": torch.randn(tokens, hk, K), "v": torch.randn(tokens, hv, V),
        "a": torch.randn(tokens, hv), "b": torch.randn(tokens, hv), "A_log": torch.randn(hv),
        "dt_bias": torch.randn(hv), "state": torch.randn(tokens + 2, hv, V, K),
        "state_indices": torch.arange(1, tokens + 1, dtype=torch.int32), "use_qk_l2norm": True, "null_index": 0,
        "out": torch.zeros(tokens, hv, V),
    }  # fmt: skip


def fused_arguments(tokens: int = 3, heads: tuple[int, int] = (2, 4), K: int = 16, V: int = 8) -> Arguments:
    hk, hv = heads
    dim = 2 * hk * K + hv * V
    return {
        "mixed_qkv": torch.randn(tokens, dim + 5)[:, :dim], "conv_weight": torch.randn(dim, 4), "conv_bias": None,
        "conv_state": torch.randn(tokens + 2, 3, dim).transpose(1, 2), "a": torch.randn(tokens, hv),
        "b": torch.randn(tokens, hv), "A_log": torch.randn(hv), "dt_bias": torch.randn(hv),
        "state": torch.randn(tokens + 2, hv, V, K),
        "state_indices": torch.arange(1, tokens + 1, dtype=torch.int32), "num_k_heads": hk, "head_k_dim": K,
        "head_v_dim": V, "z": torch.randn(tokens, hv, V), "norm_weight": torch.randn(V), "norm_eps": 1e-6,
        "gate": "silu", "null_index": 0, "out": torch.zeros(tokens, hv, V),
    }  # fmt: skip


OPS: dict[str, tuple[Callable[[], Arguments], Callable[..., bool], Callable[..., None]]] = {
    "decode": (decode_arguments, usual.decode, validate.decode),
    "fused_decode": (fused_arguments, usual.fused_decode, validate.fused_decode),
}


def spoilt(value: Any) -> list[Any]:
    """Values that an argument might have by mistake in place of `value`."""
    if isinstance(value, bool):
        return [None, 1, "yes"]
    if isinstance(value, int):
        return [None, True, -2, 0, 1, 3, value + 1, 2.0, "2"]
    if isinstance(value, float):
        return [None, True, -1.0, float("nan"), "0"]
    if isinstance(value, str):
        return [None, "relu", 0]
    if value is None:
        return [3, torch.randn(3), torch.randn(112), torch.randn(224)[::2]]
    numbers: list[Any] = [
        None,
        3,
        value.tolist(),
        value.numpy(),
        value[None],
        value[..., 0],
        value[1:],
        value[..., :-1],
    ]
    numbers += [value.to(dtype) for dtype in (torch.float64, torch.float16, torch.int32, torch.int64, torch.bool)]
    numbers += [value.to("meta"), value.repeat_interleave(2, 0), value.repeat_interleave(2, -1)]
    numbers += [
        value.repeat_interleave(2, dim).select(dim, 0).unsqueeze(dim).expand_as(value) for dim in range(value.dim())
    ]
    strided = [
        value.repeat_interleave(2, dim)[(slice(None),) * dim + (slice(None, None, 2),)] for dim in range(value.dim())
    ]
    return numbers + strided + ([value.mT.contiguous().mT] if value.dim() > 1 else [])


@pytest.mark.parametrize("op", OPS)
def test_usual_never_says_yes_to_what_validate_refuses(op: str) -> None:
    make, is_usual, check = OPS[op]
    good = make()
    assert is_usual(*good.values())
    refused = 0
    for name in good:
        for value in spoilt(good[name]):
            arguments = good | {name: value}
            try:
                check(*arguments.values())
            except Exception:  # whatever the full check raises, the short one must not have said yes
                refused += 1
                assert not is_usual(*arguments.values()), f"{name} = {value!r}"
    assert refused > 5 * len(good)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("padded", [False, True])
def test_usual_knows_the_usual(op: str, padded: bool) -> None:
    """Hosts' calls: bf16, slices of a projection, padded pools, no norm. Else the short way would never be taken."""
    make, is_usual, _ = OPS[op]
    arguments = make()
    for name in ("q", "k", "v", "a", "b", "dt_bias", "out", "mixed_qkv", "z", "norm_weight", "conv_weight"):
        if name in arguments:
            arguments[name] = arguments[name].bfloat16()
    if padded:
        state = arguments["state"]
        arguments["state"] = torch.zeros(state.shape[0], state[0].numel() + 9)[:, :-9].view(state.shape[0], -1)
        arguments["state"] = arguments["state"].unflatten(1, state.shape[1:])
        if op == "fused_decode":
            arguments |= {"z": None, "norm_weight": None}
    assert is_usual(*arguments.values())
    assert is_usual(*(arguments | {"out": None}).values())


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def call(op: str) -> Callable[[], torch.Tensor]:
    arguments = OPS[op][0]()
    return lambda: getattr(ops, op)(**arguments, backend="torch")


@pytest.mark.parametrize("op", OPS)
def test_the_short_way_is_taken_in_inference_mode_alone(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, taken = getattr(library, f"run_{op}"), []
    monkeypatch.setattr(library, f"run_{op}", lambda *args: taken.append(run(*args)))
    step = call(op)
    step()
    assert not taken
    with torch.inference_mode():
        step()
    assert len(taken) == 1


@pytest.mark.parametrize("op", OPS)
def test_both_ways_give_the_same(op: str) -> None:
    results = []
    for short in (False, True):
        torch.manual_seed(0)
        arguments = OPS[op][0]()
        with torch.inference_mode(short):
            out = getattr(ops, op)(**arguments, backend="torch")
        assert out is arguments["out"]
        results.append((out, arguments["state"]))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("op", OPS)
def test_who_listens_sees_the_op(op: str) -> None:
    step = call(op)
    with torch.inference_mode(), Seen() as seen:
        step()
    assert f"gdn.{op}_out.default" in seen.names
    with torch.inference_mode(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    assert f"gdn::{op}_out" in {event.key for event in profile.key_averages()}


def test_subclasses_and_levels_take_the_dispatcher() -> None:
    plain, pool = torch.zeros(2), torch.zeros(2)
    with torch.inference_mode():
        assert direct.possible(plain, pool)
        assert direct.possible(plain, torch.nn.Parameter(pool))  # a parameter is its memory
        assert not direct.possible(plain, pool, Wrapper(plain))
        assert not direct.possible(plain.to("meta"), pool)
        assert not torch.func.vmap(lambda x: x + int(direct.possible(plain, pool)))(torch.zeros(1)).any()
        with torch.device("cpu"):
            assert not direct.possible(plain, pool)
    assert not direct.possible(plain, pool)


class Wrapper(torch.Tensor):
    """Has no memory of its own: a kernel that read its address would crash."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"a wrapper saw {function}")


@pytest.mark.parametrize("name", ["k", "v", "a", "b", "A_log", "dt_bias", "state_indices", "out"])
def test_a_wrapper_anywhere_takes_the_dispatcher(name: str) -> None:
    arguments = decode_arguments()
    arguments[name] = Wrapper(arguments[name])
    with torch.inference_mode(), pytest.raises((NotImplementedError, TypeError, ValueError)):
        ops.decode(**arguments, backend="cpu" if name != "state_indices" else "torch")


@pytest.mark.parametrize("name", ["q", "v", "a", "dt_bias"])
def test_what_memory_does_not_say_takes_the_dispatcher(name: str) -> None:
    """A pending negation and a lazy zero: the short way would read their memory as it is."""
    with torch.inference_mode():
        plain = decode_arguments()
        for odd, meant in (
            (torch._neg_view(plain[name]), -plain[name]),
            (torch._efficientzerotensor(plain[name].shape), torch.zeros_like(plain[name])),
        ):
            results = []
            for value in (odd, meant):
                given = {key: x.clone() if isinstance(x, torch.Tensor) else x for key, x in plain.items()}
                given[name] = value
                results.append((ops.decode(**given, backend="torch"), given["state"]))
            for got, want in zip(*results, strict=True):
                torch.testing.assert_close(got, want)


def test_a_trace_keeps_the_op() -> None:
    arguments = decode_arguments()
    q = arguments.pop("q")
    with torch.inference_mode():
        traced = torch.jit.trace(lambda x: ops.decode(x, **arguments, backend="torch"), q, check_trace=False)
    assert "gdn::decode" in str(traced.graph)


def test_a_parameter_takes_the_short_way() -> None:
    assert direct._plain(torch.nn.Parameter) and direct._plain(torch.Tensor) and not direct._plain(Wrapper)
