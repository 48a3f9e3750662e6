"""What each op is: one record. Its schema, its argument checks, its fake and its call are derived from it.

Sizes are letters. A letter stands for whatever size the first argument that has it brings; every later one must agree.
`T` packed tokens, `B` sequences, `Hk` key heads, `Hv` value heads, `K` and `V` head dims, `W` width of the convolution,
`N` pool rows, `S` token slots, `R` slots of a replay ring, `C` checkpoints. "B+1" and the like are worked out; "W-1.."
means that many or more.

Projections may come with their heads interleaved (`Argument.interleaved`): a dim more tells them from flat ones.

A new argument is a line here, one in the public function of `gdn_plugin.ops`, and the backends that use it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from gdn_plugin.registry import PADDING

HEADS = ("Hk", "Hv", "K", "V")
CHUNK = 64  # tokens between two places where a checkpoint can be; prefill's kernels work on as many at a time
DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float64: "float64"}

REQUIRED: Any = object()  # no default


def dtype_name(dtype: torch.dtype) -> str:
    """As the registry and messages spell it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


# What a tensor argument may be. IO: the dtype of the op's leading tensor, which may be any of these.
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
IO = "io"
IO_OR_FP32 = "io or float32"
FP32 = (torch.float32,)
INT32 = (torch.int32,)
OFFSETS = (torch.int32, torch.int64)
BOOL = (torch.bool,)

# How it may lie in memory.
ANY = "any"  # any strides
INNER = "inner"  # last stride 1
DENSE = "dense"  # contiguous
ROWS = "rows"  # a pool: rows contiguous, any distance apart that keeps them from overlapping
CONV_ROWS = "conv rows"  # a pool of [dim, columns], dense in either order


class _Filled:
    """Works its cached properties out when it is made: Python 3.11's take a lock, which Dynamo cannot trace."""

    def __post_init__(self) -> None:
        for name, attribute in vars(type(self)).items():
            if isinstance(attribute, cached_property):
                getattr(self, name)


@dataclass(frozen=True)
class Argument(_Filled):
    """One argument.

    Args:
        kind: "Tensor", or the schema's type of a plain value: "int", "SymInt", "float", "bool", "str".
        shape: letters or expressions, a dim each; of an int, the one letter that it gives the size of.
        dtypes: IO, IO_OR_FP32, or a tuple of torch dtypes.
        layout: of a tensor's strides.
        interleaved: the shape of a tensor whose heads are interleaved, a key head's share together: [T, Hk, ...].
        mutated: the op writes to it.
        optional: a tensor, or a float of the public function, that may be None.
        minimum: of an int, or of a float.
        choices: of a str.
        default: of the public function; `REQUIRED` where there is none.
        hint: it changes no result, so that a backend may leave it out; see `library`.
        blank: of an output: what tokens without a sequence get, from the call's arguments.
    """

    name: str
    kind: str = "Tensor"
    shape: tuple[str, ...] = ()
    dtypes: Any = IO
    layout: str = ANY
    interleaved: tuple[str, ...] = ()
    mutated: bool = False
    optional: bool = False
    minimum: float | None = None
    choices: tuple[str, ...] = ()
    default: Any = REQUIRED
    hint: bool = False
    blank: Callable[[Mapping[str, Any]], float] = field(default=lambda arguments: 0.0, compare=False)

    @cached_property
    def letters(self) -> tuple[tuple[int, str], ...]:
        """(dim, letter) of every dim whose size has a letter of its own."""
        return tuple((dim, spelled) for dim, spelled in enumerate(self.shape) if spelled.isalpha())

    @cached_property
    def expressions(self) -> tuple[tuple[int, str], ...]:
        """(dim, expression) of every dim whose size is worked out."""
        return tuple((dim, spelled) for dim, spelled in enumerate(self.shape) if not spelled.isalpha())

    @cached_property
    def of_shares(self) -> Argument | None:
        """The argument with its heads interleaved; None where it has no such form."""
        return replace(self, shape=self.interleaved, interleaved=()) if self.interleaved else None


# A rule beyond single arguments: None, or (argument, what was expected of it, what came).
Rule = Callable[[Mapping[str, Any]], "tuple[str, str, Any] | None"]


@dataclass(frozen=True)
class Op(_Filled):
    """One op: `inputs` in the order of its schema, then `outputs`, which the `_out` form takes and the other makes."""

    name: str
    inputs: tuple[Argument, ...]
    outputs: tuple[Argument, ...]
    rules: tuple[Rule, ...] = ()

    @cached_property
    def arguments(self) -> tuple[Argument, ...]:
        return (*self.inputs, *self.outputs)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(argument.name for argument in self.inputs)

    @cached_property
    def by_name(self) -> Mapping[str, Argument]:
        return {argument.name: argument for argument in self.arguments}

    @cached_property
    def lead(self) -> str:
        """The tensor whose dtype, device and first size are the call's."""
        return self.inputs[0].name

    @cached_property
    def tensors(self) -> tuple[Argument, ...]:
        return tuple(argument for argument in self.inputs if argument.kind == "Tensor")

    @cached_property
    def written(self) -> tuple[str, ...]:
        """The tensors that the op writes to."""
        return tuple(argument.name for argument in self.arguments if argument.mutated or argument in self.outputs)

    @cached_property
    def heads(self) -> tuple[str, ...]:
        """Letters of the key heads, the value heads and their dims; an op without keys has its values' twice."""
        instead = {"Hk": "Hv", "K": "V"}
        return tuple(letter if letter in self.letters else instead[letter] for letter in HEADS)

    @cached_property
    def projections(self) -> tuple[Argument, ...]:
        """The tensors that may come with their heads interleaved."""
        return tuple(argument for argument in self.tensors if argument.interleaved)

    @cached_property
    def values(self) -> tuple[Argument, ...]:
        return tuple(argument for argument in self.inputs if argument.kind != "Tensor")

    @cached_property
    def floats(self) -> tuple[str, ...]:
        return tuple(argument.name for argument in self.values if argument.kind == "float")

    @cached_property
    def letters(self) -> Mapping[str, tuple[str, int | None]]:
        """Where a size is read: (argument, dim), or (int argument, None)."""
        found: dict[str, tuple[str, int | None]] = {}
        for argument in (*self.values, *sorted(self.tensors, key=lambda argument: argument.optional)):
            for dim, letter in argument.letters:
                found.setdefault(letter, (argument.name, dim if argument.kind == "Tensor" else None))
        return found

    def without_hints(self) -> Op:
        """The same op as a backend may know it that reads no hint."""
        return replace(self, inputs=tuple(argument for argument in self.inputs if not argument.hint))

    def size(self, letter: str, arguments: Mapping[str, Any]) -> int:
        """The size that a letter stands for in a call."""
        name, dim = self.letters[letter]
        x = arguments[name]
        if dim is None:
            return x
        shares = x.dim() > len(self.by_name[name].shape)  # Hv is then Hk of Hv/Hk
        return x.shape[dim] * x.shape[dim + 1] if shares and dim else x.shape[dim]

    def schema(self, *, out: bool) -> str:
        """The schema that torch.library takes, backend last: "(Tensor q, ..., str backend) -> Tensor"."""
        aliases = iter("abcdefghi")
        spelled = []
        for argument in self.arguments if out else self.inputs:
            alias = f"({next(aliases)}!)" if argument.mutated or argument in self.outputs else ""
            absent = "?" if argument.optional and argument.kind == "Tensor" else ""
            spelled.append(f"{argument.kind}{alias}{absent} {argument.name}")
        returns = "" if out else ", ".join(["Tensor"] * len(self.outputs))
        return f"({', '.join(spelled)}, str backend) -> " + (returns if returns == "Tensor" else f"({returns})")


def _tensor(
    name: str, shape: str, dtypes: Any = IO, layout: str = ANY, interleaved: str = "", **more: Any
) -> Argument:  # fmt: skip
    return Argument(
        name, shape=tuple(shape.split()), dtypes=dtypes, layout=layout, interleaved=tuple(interleaved.split()), **more
    )


def _multiple_of_heads(arguments: Mapping[str, Any]) -> tuple[str, str, Any] | None:
    name = "v" if "v" in arguments else "a"
    key_heads = arguments["num_k_heads"] if name == "a" else arguments["q"].shape[1]
    value_heads = math.prod(arguments[name].shape[1:]) if name == "a" else arguments[name].shape[1]
    if key_heads >= 1 and value_heads >= 1 and value_heads % key_heads == 0:
        return None
    source = "num_k_heads" if name == "a" else "Hk of q"
    return name, f"a multiple of {source} = {key_heads} heads", f"shape {tuple(arguments[name].shape)}"


def _at_least_one_element(arguments: Mapping[str, Any]) -> tuple[str, str, Any] | None:
    for name in ("x",) if "x" in arguments else ("q", "v"):
        if 0 in arguments[name].shape[1:]:
            return name, "at least one head, and one element a head", f"shape {tuple(arguments[name].shape)}"
    return None


def _width(arguments: Mapping[str, Any]) -> tuple[str, str, Any] | None:
    width = arguments["conv_weight"].shape[1]
    return None if 2 <= width <= 8 else ("conv_weight", "shape [dim, W] with 2 <= W <= 8", f"W = {width}")


def _slots(arguments: Mapping[str, Any]) -> tuple[str, str, Any] | None:
    shape = tuple(arguments["state_indices"].shape)
    return None if shape[1] >= 1 else ("state_indices", "shape [B, S] with S >= 1", shape)


def _ring(arguments: Mapping[str, Any]) -> tuple[str, str, Any] | None:
    """A step's tokens, and those of the step before, which may still be taken back, have slots of their own."""
    ring, conv_state = arguments["ring_k"].shape[1], arguments.get("conv_state")
    if conv_state is None:
        return None if ring >= 1 else ("ring_k", "shape [N, R, Hk, K] with R >= 1", f"R = {ring}")
    most = conv_state.shape[2] - arguments["conv_weight"].shape[1] + 2
    if ring >= 2 * most:
        return None
    return "ring_k", f"R >= {2 * most}, twice the {most} tokens that conv_state has columns for", f"R = {ring}"


def _scratch(arguments: Mapping[str, Any]) -> tuple[str, str, Any] | None:
    if arguments["padding"] == "scratch" and arguments["null_index"] != 0:
        return "null_index", "0, since padding='scratch' makes row 0 that of padding", arguments["null_index"]
    return None


def _checkpoints(arguments: Mapping[str, Any]) -> tuple[str, str, Any] | None:
    starts, every = arguments["checkpoint_cu_starts"], arguments["checkpoint_every"]
    if arguments["checkpoints"] is None:
        if starts is not None:
            return "checkpoints", "a tensor, since checkpoint_cu_starts is given", None
        return None if every == 0 else ("checkpoint_every", "0, since checkpoints is None", every)
    if starts is None:
        return "checkpoint_cu_starts", "a tensor, since checkpoints is given", None
    return None if every > 0 and every % CHUNK == 0 else ("checkpoint_every", f"a positive multiple of {CHUNK}", every)


def _norm(arguments: Mapping[str, Any]) -> tuple[str, str, Any] | None:
    z, weight = arguments["z"], arguments["norm_weight"]
    if (z is None) == (weight is None):
        return None
    missing, given = ("z", "norm_weight") if z is None else ("norm_weight", "z")
    return missing, f"a tensor, since {given} is given", None


_DIM = "2*Hk*K+Hv*V"
_CONV_STATE = _tensor("conv_state", f"Nc {_DIM} W-1..", FLOATS, CONV_ROWS, mutated=True)
_CONV = (
    _tensor("mixed_qkv", f"T {_DIM}", layout=INNER, interleaved="T Hk 2*K+Hv/Hk*V"),
    _tensor("conv_weight", f"{_DIM} W", IO_OR_FP32),
    _tensor("conv_bias", _DIM, IO_OR_FP32, DENSE, optional=True),
)
_HEADS = tuple(
    Argument(name, "int", (letter,), minimum=1)
    for name, letter in (("num_k_heads", "Hk"), ("head_k_dim", "K"), ("head_v_dim", "V"))
)
_QKV = tuple(_tensor(name, shape, layout=INNER) for name, shape in (("q", "T Hk K"), ("k", "T Hk K"), ("v", "T Hv V")))
_GATES = (
    _tensor("a", "T Hv", IO_OR_FP32, INNER, interleaved="T Hk Hv/Hk"),
    _tensor("b", "T Hv", IO_OR_FP32, INNER, interleaved="T Hk Hv/Hk"),
    _tensor("A_log", "Hv", FP32, DENSE),
    _tensor("dt_bias", "Hv", IO_OR_FP32, DENSE),
)
# N rows of state, Nc of conv_state: a host may have other numbers of them.
_STATE = _tensor("state", "N Hv V K", FLOATS, ROWS, mutated=True)
# What a replay op keeps beside a row's state; see gdn_plugin.ops.
_RING = (
    _tensor("ring_k", "N R Hk K", layout=ROWS, mutated=True),
    _tensor("ring_u", "N R Hv V", FLOATS, ROWS, mutated=True),
    _tensor("ring_g", "N R Hv", FP32, ROWS, mutated=True),
    _tensor("ring_span", "N Hk 2", INT32, ROWS, mutated=True),
)
_CU_SEQLENS = _tensor("cu_seqlens", "B+1", OFFSETS, DENSE)
_HAS_INITIAL_STATE = _tensor("has_initial_state", "B", BOOL, DENSE, optional=True)
_SCALE = Argument("scale", "float", optional=True, default=None)  # None, K^-0.5, is worked out before the op is called
_L2NORM = Argument("use_qk_l2norm", "bool", default=True)
_EXP_GATE = Argument("exp_gate", "bool", default=False)
_NULL_INDEX = Argument("null_index", "int", minimum=-1, default=-1)
_PADDING = Argument("padding", "str", choices=PADDING, default="any", hint=True)
_SLOTS = _tensor("state_indices", "B S", INT32, INNER)
_ACCEPTED = _tensor("num_accepted_tokens", "B", INT32, DENSE)
_START_ROWS = _tensor("start_rows", "B", INT32, DENSE, optional=True, default=None)
# Of the `_out` forms: what an op returns has zeros in these rows in any case.
_ZERO_PADDING = Argument("zero_padding", "bool", default=False)
_NORM_EPS = Argument("norm_eps", "float", minimum=0, default=1e-6)
_GATE = Argument("gate", "str", choices=("silu", "sigmoid"), default="silu")
_GATED_NORM = (
    _tensor("z", "T Hv V", layout=INNER, interleaved="T Hk Hv/Hk V", optional=True, default=None),
    _tensor("norm_weight", "V", IO_OR_FP32, DENSE, optional=True, default=None),
    _NORM_EPS,
    _GATE,
)
_OUT = _tensor("out", "T Hv V", layout=DENSE)

OPS: Mapping[str, Op] = {
    op.name: op
    for op in (
        Op(
            "conv_prologue",
            (
                *_CONV,
                _CONV_STATE,
                _tensor("state_indices", "B", INT32),
                _CU_SEQLENS,
                _HAS_INITIAL_STATE,
                *_GATES,
                *_HEADS,
                replace(_STATE, optional=True, default=None),
                _EXP_GATE,
                replace(_ACCEPTED, optional=True, default=None),
                _NULL_INDEX,
            ),
            (
                _tensor("q", "T Hk K", layout=DENSE),
                _tensor("k", "T Hk K", layout=DENSE),
                _tensor("v", "T Hv V", layout=DENSE),
                _tensor("g", "T Hv", FP32, DENSE, blank=lambda arguments: float(arguments["exp_gate"])),
                _tensor("beta", "T Hv", FP32, DENSE),
            ),
            (_multiple_of_heads, _width),
        ),
        Op(
            "prefill",
            (
                *_QKV,
                _tensor("g", "T Hv", FP32),
                _tensor("beta", "T Hv", FP32),
                _STATE,
                _tensor("state_indices", "B", INT32),
                _CU_SEQLENS,
                replace(_HAS_INITIAL_STATE, default=None),
                _SCALE,
                replace(_L2NORM, default=False),
                _EXP_GATE,
                Argument("max_seqlen", "SymInt", minimum=0, default=0, hint=True),
                _NULL_INDEX,
                _PADDING,
                _tensor("checkpoints", "C Hv V K", FLOATS, DENSE, mutated=True, optional=True, default=None),
                _tensor("checkpoint_cu_starts", "B+1", INT32, DENSE, optional=True, default=None),
                Argument("checkpoint_every", "int", minimum=0, default=0),
                _ZERO_PADDING,
            ),
            (_OUT,),
            (_multiple_of_heads, _at_least_one_element, _scratch, _checkpoints),
        ),
        Op(
            "decode",
            (
                *_QKV,
                *_GATES,
                _STATE,
                _tensor("state_indices", "T", INT32),
                _SCALE,
                _L2NORM,
                _NULL_INDEX,
                _PADDING,
                _ZERO_PADDING,
            ),
            (_OUT,),
            (_multiple_of_heads, _at_least_one_element, _scratch),
        ),
        Op(
            "fused_decode",
            (
                *_CONV,
                _CONV_STATE,
                *_GATES,
                _STATE,
                _tensor("state_indices", "T", INT32),
                *_HEADS,
                _SCALE,
                *_GATED_NORM,
                _NULL_INDEX,
                _ZERO_PADDING,
            ),
            (_OUT,),
            (_multiple_of_heads, _width, _norm),
        ),
        Op(
            "verify",
            (
                *_QKV,
                *_GATES,
                _STATE,
                _SLOTS,
                _ACCEPTED,
                _CU_SEQLENS,
                _START_ROWS,
                _SCALE,
                _L2NORM,
                _NULL_INDEX,
                _PADDING,
                _ZERO_PADDING,
            ),
            (_OUT,),
            (_multiple_of_heads, _at_least_one_element, _slots, _scratch),
        ),
        Op(
            "fused_verify",
            (
                *_CONV,
                replace(_CONV_STATE, shape=("Nc", _DIM, "W+S-2..")),
                *_GATES,
                _STATE,
                _SLOTS,
                _ACCEPTED,
                _CU_SEQLENS,
                *_HEADS,
                replace(_HAS_INITIAL_STATE, default=None),
                _START_ROWS,
                _SCALE,
                *_GATED_NORM,
                _NULL_INDEX,
                _ZERO_PADDING,
            ),
            (_OUT,),
            (_multiple_of_heads, _width, _slots, _norm),
        ),
        Op(
            "replay_decode",
            (
                *_CONV,
                _CONV_STATE,
                *_GATES,
                _STATE,
                *_RING,
                _tensor("state_indices", "T", INT32),
                *_HEADS,
                _SCALE,
                *_GATED_NORM,
                _NULL_INDEX,
                _ZERO_PADDING,
            ),
            (_OUT,),
            (_multiple_of_heads, _width, _ring, _norm),
        ),
        Op(
            "replay_verify",
            (
                *_CONV,
                _CONV_STATE,
                *_GATES,
                _STATE,
                *_RING,
                _tensor("state_indices", "B", INT32),
                _ACCEPTED,
                _CU_SEQLENS,
                *_HEADS,
                replace(_HAS_INITIAL_STATE, default=None),
                _SCALE,
                *_GATED_NORM,
                _NULL_INDEX,
                _ZERO_PADDING,
            ),
            (_OUT,),
            (_multiple_of_heads, _width, _ring, _norm),
        ),
        Op(
            "replay_fold",
            (
                *(replace(x, mutated=x.name == "ring_span") for x in _RING),
                _STATE,
                _tensor("state_indices", "B", INT32),
                replace(_HAS_INITIAL_STATE, default=None),
                replace(_ACCEPTED, optional=True, default=None),
                _NULL_INDEX,
            ),
            (),
            (_ring,),
        ),
        Op(
            "gated_norm",
            (
                _tensor("x", "T Hv V", layout=INNER),
                _tensor("z", "T Hv V", layout=INNER, interleaved="T Hk Hv/Hk V"),
                _tensor("weight", "V", IO_OR_FP32, DENSE),
                replace(_NORM_EPS, name="eps"),
                _GATE,
            ),
            (_tensor("out", "T Hv V", layout=INNER),),
            (_at_least_one_element,),
        ),
    )
}
