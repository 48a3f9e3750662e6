"""Every kernel an op can launch, found by driving its own launcher on meta tensors.

Which kernel a call takes depends on the call in a few ways only: dtypes, which tensors are None, alignment, Triton's
classes of integers, and the configuration, which is chosen by the numbers of sequences and tokens. `SHAPES` reaches
every configuration; each op's `variants` goes through the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from gdn_plugin.backends.triton.configs import FEW_HEADS
from gdn_plugin.backends.triton.launch import Launch, recorded
from gdn_plugin.ops.cases import case
from gdn_plugin.ops.record import dtype_name
from gdn_plugin.registry import PHASE_OF_OP, Platform, Problem, Variant
from gdn_plugin.registry.probe import triton_interprets

# Tokens of each sequence. One short sequence, one long and many are the ends of every rule by which launchers choose:
# few or many heads, short or long blocks, sequences whole, split over V or cut into segments. The stride from token to
# token says nothing where there is one token, and PyTorch then gives another than it gives to two.
_MANY = 1 << 12
SHAPES = ([1], [2], [1, 1], [1 << 17], [1] * _MANY, [1] + [0] * (_MANY - 1))

OPTIONS = ("num_warps", "num_stages", "maxnreg")
_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*u1",
}

# (Triton's type, the value of a "constexpr", whether divisible by 16)
Specialised = tuple[str, Hashable, bool]


@dataclass(frozen=True, slots=True)
class KernelVariant(Variant):
    """A variant with the launch that it was found by, on meta tensors."""

    launch: Launch

    def compile_for(self, sm: int) -> Any:
        """Triton's CompiledKernel for compute capability `sm`, which need not be this machine's.

        It comes from Triton's cache on disk, or goes there, under the key by which `compile` finds it on such a device.
        """
        with pretended(sm):
            return self.launch.kernel.warmup(grid=self.launch.grid, **self.launch.arguments)


@contextmanager
def pretended(sm: int) -> Iterator[None]:
    """Inside, Triton compiles for a device of compute capability `sm` and asks none that is here for anything.

    The launch goes Triton's own way, so that the key on disk is Triton's own, whatever its version makes it of.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    device = f"sm_{sm}"  # what is kept in memory is not a real device's
    was = dict(vars(driver))
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: device,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", sm, 32),
        )
    )
    try:
        yield
    finally:
        vars(driver).update(was)


def compile_here(launch: Launch) -> Any:
    """Compile for the current device into this process's cache, under the key that such a launch would look for."""
    # Meta tensors lie at their offset from address 0, so they are aligned as those they stand for.
    compiled = launch.kernel.warmup(grid=launch.grid, **launch.arguments)
    # Asked for, the launcher loads the machine code onto the device, which must not come to pass in a graph capture.
    getattr(compiled, "run", None)
    return compiled


def specialise(value: Any, *, specialise: bool = True, on_alignment: bool = True) -> Specialised:
    """What machine code can depend on of an argument, by Triton's rules (docs of `triton.jit` and of `warmup`).

    Args:
        specialise: the parameter is not in `do_not_specialize`.
        on_alignment: nor in `do_not_specialize_on_alignment`.
    """
    aligned = specialise and on_alignment
    if value is None:
        return "constexpr", None, False
    if isinstance(value, Tensor):
        return _TYPES[value.dtype], None, aligned and value.data_ptr() % 16 == 0
    if isinstance(value, float):
        return "fp32", None, False
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"launchers pass tensors, ints and floats to kernels, got {value!r}")
    if value == 1 and specialise:
        return "constexpr", 1, False
    width = "i32" if -(2**31) <= value < 2**31 else "i64"
    return width, None, aligned and value % 16 == 0


def specialised(launch: Launch) -> dict[str, Specialised]:
    """`specialise` of every parameter of the launch's kernel, in their order."""
    found: dict[str, Specialised] = {}
    for parameter in launch.kernel.params:
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            found[parameter.name] = "constexpr", value, False
        else:
            found[parameter.name] = specialise(
                value,
                specialise=not parameter.do_not_specialize,
                on_alignment=not parameter.do_not_specialize_on_alignment,
            )
    return found


def options(launch: Launch) -> dict[str, Any]:
    """Triton's options of a launch."""
    return {name: launch.arguments[name] for name in OPTIONS if name in launch.arguments}


def key(launch: Launch) -> Hashable:
    """Launches with one key share one compiled kernel."""
    return launch.kernel.__name__, *specialised(launch).items(), *options(launch).items()


def variants_of(
    run: Callable[..., None],
    calls: Callable[[dict[str, Any]], Iterable[Mapping[str, Any]]],
    platform: Platform,
    problem: Problem,
    pool: Tensor | None = None,
) -> list[KernelVariant]:
    """The variants of an op, each once.

    They are those of calls as `gdn_plugin.ops.cases` makes them of a problem, and hosts do: int32 rows and offsets, a
    convolution of width 4 without bias in the io dtype. Other calls are served as well, and compile when they first
    come.

    Args:
        run: the op's launcher.
        calls: from one call's arguments, every call that differs in a way which a problem does not tell.
        pool: the state pool that calls will bring; lists what its own strides add.
    """
    if triton_interprets() or platform.sm is None:
        return []
    found = _launches(run, calls, platform.sm, problem)
    label = f"K{problem.head_k_dim} V{problem.head_v_dim} {problem.dtype} state={problem.state_dtype}"
    if pool is not None:
        strided = _launches(run, calls, platform.sm, problem, _meta(pool))
        found = {k: launch for k, launch in strided.items() if k not in found}
        label += f" pool={pool.stride(0)}"
    return [
        KernelVariant(f"{_named(launch, problem)} {label}{tail}", partial(compile_here, launch), launch, kept=True)
        for launch, tail in zip(found.values(), _tails(found.values()), strict=True)
    ]  # fmt: skip


def _named(launch: Launch, problem: Problem) -> str:
    """The kernel's name; the op's, where the kernel serves several."""
    name: str = launch.kernel.__name__.removesuffix("_kernel")
    if name.startswith("staged"):
        return f"{problem.op}, staged"
    return problem.op if problem.op.startswith(name) else name


def either(parameter: Tensor) -> tuple[Tensor, Tensor]:
    """A model's parameter in its io dtype and in fp32: models keep some of them in either."""
    return parameter, torch.empty_like(parameter, dtype=torch.float32)


def fused_forms(arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Of a fused op: without the norm and with it; dt_bias and the norm's weight in the io dtype and in fp32."""
    for dt_bias in either(arguments["dt_bias"]):
        yield arguments | {"dt_bias": dt_bias, "z": None, "norm_weight": None}
        for norm_weight in either(arguments["norm_weight"]):
            yield arguments | {"dt_bias": dt_bias, "norm_weight": norm_weight}


def _launches(
    run: Callable[..., None],
    calls: Callable[[dict[str, Any]], Iterable[Mapping[str, Any]]],
    sm: int,
    problem: Problem,
    state: Tensor | None = None,
) -> dict[Hashable, Launch]:
    with recorded(sm) as recording:
        # What lies between few and many heads (see configs and staged).
        some = -(-FEW_HEADS // problem.num_v_heads)
        for lens in (*SHAPES, [1] * some):
            tokens = [1] * len(lens) if PHASE_OF_OP[problem.op] in ("decode", "verify") else lens
            arguments = case(problem, tokens, device="meta").arguments()
            if state is not None and arguments.get("state") is not None:
                arguments |= {"state": state, **_beside(state, arguments)}
            for call in calls(arguments):
                if _may_come(problem, call):
                    run(**call)
    found: dict[Hashable, Launch] = {}
    for launch in recording.launches:
        found.setdefault(key(launch), launch)
    return found


def _may_come(problem: Problem, call: Mapping[str, Any]) -> bool:
    """Whether a call agrees with what the problem says and may leave open."""
    bias, norm = call.get("dt_bias"), call.get("use_qk_l2norm")
    if bias is not None and problem.bias_dtype not in ("", dtype_name(bias.dtype)):
        return False
    return norm is None or problem.qk_l2norm in (None, norm)


def _meta(pool: Tensor) -> Tensor:
    """Shape, strides and alignment of a pool, without its memory."""
    offset = pool.data_ptr() % 16 // pool.element_size()
    extent = offset + 1 + sum((n - 1) * stride for n, stride in zip(pool.shape, pool.stride(), strict=True))
    return torch.empty(extent, dtype=pool.dtype, device="meta").as_strided(pool.shape, pool.stride(), offset)


def _beside(pool: Tensor, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a row has beside its state, as far apart as the pool's rows: a host keeps it in the same page."""
    found = {}
    for name in ("ring_k", "ring_u", "ring_g", "ring_span"):
        if name in arguments:
            x = arguments[name]
            page = pool.stride(0) * pool.element_size() // x.element_size()
            found[name] = torch.empty_strided(x.shape, (page, *x.stride()[1:]), dtype=x.dtype, device="meta")
    return found


def _tails(launches: Iterable[Launch]) -> Iterator[str]:
    """For each launch, what tells it from the others of its kernel: " BV=32 p_segments=None num_warps=4"."""
    spelled = [(launch.kernel.__name__, _spelled(launch)) for launch in launches]
    for kernel, facts in spelled:
        others = [other for name, other in spelled if name == kernel]
        differing = [name for name, fact in facts.items() if any(other.get(name) != fact for other in others)]
        yield "".join(f" {name}={facts[name]}" for name in differing)


def _spelled(launch: Launch) -> dict[str, str]:
    facts: dict[str, str] = {}
    for name, (kind, value, divisible) in specialised(launch).items():
        facts[name] = str(value) if kind == "constexpr" else kind.removeprefix("*") + (":16" if divisible else "")
    return facts | {name: str(value) for name, value in options(launch).items()}
