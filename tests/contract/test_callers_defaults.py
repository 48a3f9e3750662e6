"""No op's result depends on the caller's global state, and none changes it: default dtype and device, autocast, grad,
inference and deterministic mode, precision of matrix products, number of threads."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch

from gdn_plugin.ops import cases, dispatch
from tests.contract.site import CPU, no_self_check, pytest_generate_tests, site  # noqa: F401
from tests.support.checks import bits, check
from tests.support.public import precision, public

SITE = CPU
NOBODY_REFUSES = True


@contextlib.contextmanager
def changed(get: Callable[[], object], put: Callable[..., None], value: object) -> Iterator[None]:
    before = get()
    put(value)
    try:
        yield
        assert get() == value, "an op changed the caller's setting"
    finally:
        put(before)


def default_dtype(dtype: torch.dtype):
    return lambda device: changed(torch.get_default_dtype, torch.set_default_dtype, dtype)


INFERENCE_POOLS = "pools of inference mode"  # as servers allocate them; the caller itself is not in that mode
SETTINGS = {
    "default float64": default_dtype(torch.float64),
    "default bfloat16": default_dtype(torch.bfloat16),
    "default device": lambda device: torch.device("meta"),
    "autocast to bfloat16": lambda device: torch.autocast(device, dtype=torch.bfloat16),
    "autocast to float16": lambda device: torch.autocast(device, dtype=torch.float16),
    "inference mode": lambda device: torch.inference_mode(),
    "no grad": lambda device: torch.no_grad(),
    "deterministic": lambda device: changed(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "matrix products in bfloat16": lambda device: changed(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"
    ),
    # Beside them the setting above does not speak: torch.get_float32_matmul_precision raises.
    "matrix products in tf32, by backend": lambda device: changed(
        lambda: torch.backends.cuda.matmul.fp32_precision,
        lambda value: setattr(torch.backends.cuda.matmul, "fp32_precision", value),
        "tf32",
    ),
    "requires grad": lambda device: contextlib.nullcontext(),
    INFERENCE_POOLS: lambda device: contextlib.nullcontext(),
    "threads": lambda device: changed(torch.get_num_threads, torch.set_num_threads, 3),
}
OPS = (
    "conv_prologue", "prefill", "decode", "fused_decode", "verify", "fused_verify", "gated_norm", "replay_decode",
    "replay_verify", "replay_fold",
)  # fmt: skip
TABLE = [(op, name) for op in OPS for name in SETTINGS]


def build(site, op: str) -> cases.Case:  # noqa: F811
    keywords = {"heads": site.heads, "io_dtype": site.io, "device": site.device}
    if op == "prefill":
        more = {"fresh": (1,), "padding": (2,), "pad_tokens": 3, "checkpoint_every": 64, "use_qk_l2norm": True}
        return cases.prefill_case((70, 2, 1), **more, **keywords)
    if op == "verify":
        return cases.verify_case((4, 0, 2), padding=(2,), **keywords)
    if op == "fused_verify":
        return cases.fused_verify_case((4, 0, 2, 1), fresh=(3,), padding=(2,), **keywords)
    if op == "conv_prologue":
        return cases.conv_prologue_case((6, 1, 2), fresh=(1,), padding=(2,), pad_tokens=2, **keywords)
    if op == "gated_norm":
        return cases.gated_norm_case(**keywords)
    if op == "replay_verify":
        return cases.replay_verify_case((4, 0, 2, 1, 3), fresh=(3,), padding=(2,), **keywords)
    if op == "replay_fold":
        return cases.replay_fold_case(5, accepted=(1, 2, 3, 2, 1), fresh=(3,), padding=(1,), **keywords)
    return getattr(cases, f"{op}_case")(5, padding=(1,), **keywords)


@functools.cache
def plain_results(site, op: str, backend: str) -> dict[str, torch.Tensor]:  # noqa: F811
    """What all settings must come to."""
    case = build(site, op)
    plain = case.arguments(zero_padding=True)
    public(op, backend)(**plain)
    return case.results(plain)


def test_result_is_the_same(site, op, name, backend):  # noqa: F811
    case, want = build(site, op), plain_results(site, op, backend)
    dispatch.forget()  # what a first call sets up is set up under the caller's settings too
    if name == "threads":  # how a product is split may change its last bit
        with SETTINGS[name](site.device):
            check(public(op, backend), case, precision=precision(op, backend, site.io, site.device))
        return
    if name == "requires grad":
        for argument, x in case.args.items():
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                case.args[argument] = x.detach().requires_grad_()
    forms = (False, True) if name != INFERENCE_POOLS else (True,)
    if site.slow:  # in turn, so that each op has both
        forms = forms[(list(SETTINGS).index(name) + OPS.index(op)) % len(forms) :][:1]
    for out in forms:
        with torch.inference_mode(name == INFERENCE_POOLS):
            given = case.arguments(zero_padding=True)
        with SETTINGS[name](site.device):
            public(op, backend, out=out)(**given)
        assert case.trespass(given) is None
        for result, x in case.results(given).items():
            assert torch.equal(bits(x), bits(want[result])), result


def test_of_the_maker_of_inputs(site):  # noqa: F811
    """Cases are the same under all of these, and leave the random state alone."""
    for op in OPS:
        plain, before = build(site, op), torch.get_rng_state()
        for name, setting in SETTINGS.items():
            with setting(site.device):
                other = build(site, op)
                arguments = other.arguments()
            for argument, x in plain.args.items():
                if isinstance(x, torch.Tensor):
                    assert torch.equal(bits(x), bits(other.args[argument])), (op, name, argument)
            assert all(x.device.type == site.device for x in arguments.values() if isinstance(x, torch.Tensor))
        assert torch.equal(before, torch.get_rng_state())
