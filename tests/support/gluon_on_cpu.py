"""Runs Gluon kernels on CPU tensors, program by program, as PyTorch operations: Triton's interpreter has no Gluon.

The kernel's own Python is run, with stand-ins for what it takes from `gluon.language`. What it checks beyond numbers:
every load and store that no mask leaves out lies in its tensor's storage; shared memory is NaN until it is stored to;
and a copy to shared memory arrives at the `wait_group` that waits for it and no earlier, so that waiting for too few
shows. Layouts are not looked at, so what threads of one program may do to one another is not seen: a GPU shows that.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.language import PropagateNan


class Dtype:
    def __init__(self, torch_dtype: torch.dtype) -> None:
        self.torch = torch_dtype
        self.primitive_bitwidth = torch_dtype.itemsize * 8


DTYPES = {
    x: Dtype(x)
    for x in (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.bool, torch.int8)
}


LAYOUTS = (
    "BlockedLayout", "SliceLayout", "SwizzledSharedLayout", "NVMMADistributedLayout", "DotOperandLayout",
)  # fmt: skip


def raw(x: Any) -> Any:
    return x.x if isinstance(x, Value) else x


def operator(function: Callable[..., Any], reflected: bool = False) -> Callable[..., Any]:
    def apply(self: Value, other: Any) -> Any:
        if isinstance(other, Pointer):
            return NotImplemented
        a, b = self.x, raw(other)
        return Value(function(b, a) if reflected else function(a, b))

    return apply


class Value:
    """A tensor or a scalar of a kernel."""

    def __init__(self, x: Any) -> None:
        self.x = x if isinstance(x, Tensor) else torch.tensor(x)

    __add__, __radd__ = operator(torch.Tensor.__add__), operator(lambda a, b: a + b, True)
    __sub__, __rsub__ = operator(lambda a, b: a - b), operator(lambda a, b: a - b, True)
    __mul__, __rmul__ = operator(lambda a, b: a * b), operator(lambda a, b: a * b, True)
    __truediv__, __rtruediv__ = operator(lambda a, b: a / b), operator(lambda a, b: a / b, True)
    __floordiv__, __mod__ = operator(lambda a, b: a // b), operator(lambda a, b: a % b)
    __lt__, __le__ = operator(lambda a, b: a < b), operator(lambda a, b: a <= b)
    __gt__, __ge__ = operator(lambda a, b: a > b), operator(lambda a, b: a >= b)
    __eq__, __ne__ = operator(lambda a, b: a == b), operator(lambda a, b: a != b)  # type: ignore[assignment]
    __and__, __or__ = operator(lambda a, b: a & b), operator(lambda a, b: a | b)
    __hash__ = None  # type: ignore[assignment]

    def __neg__(self) -> Value:
        return Value(-self.x)

    def __bool__(self) -> bool:
        return bool(self.x)

    def __index__(self) -> int:
        return int(self.x)

    def __getitem__(self, at: Any) -> Value:
        return Value(self.x[at])

    def to(self, dtype: Dtype) -> Value:
        return Value(self.x.to(dtype.torch))

    @property
    def dtype(self) -> Dtype:
        return DTYPES[self.x.dtype]

    @property
    def type(self) -> Any:
        return types.SimpleNamespace(layout=None)


class Pointer:
    """Elements of a tensor's storage."""

    def __init__(self, storage: Tensor, at: Tensor) -> None:
        self.storage, self.at = storage, at

    @classmethod
    def to(cls, x: Tensor) -> Pointer:
        whole = x.untyped_storage().nbytes() // x.element_size()
        return cls(x.as_strided((whole,), (1,), 0), torch.tensor(x.storage_offset()))

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.storage, self.at + raw(offset))

    def __getitem__(self, index: Any) -> Pointer:
        return Pointer(self.storage, self.at[index])

    @property
    def dtype(self) -> Any:
        return types.SimpleNamespace(element_ty=DTYPES[self.storage.dtype])

    def chosen(self, mask: Any) -> tuple[Tensor, Tensor]:
        """(offsets, which of them are meant), of one shape; those that are meant lie in the storage."""
        at, wanted = torch.broadcast_tensors(self.at, torch.tensor(True) if mask is None else raw(mask))
        inside = (at >= 0) & (at < self.storage.numel())
        assert bool((inside | ~wanted).all()), "a kernel reaches outside of a tensor's storage"
        return at, wanted

    def load(self, mask: Any, other: Any) -> Value:
        at, wanted = self.chosen(mask)
        if self.storage.numel() == 0:
            return Value(torch.full(at.shape, other or 0, dtype=self.storage.dtype))
        found = self.storage[torch.where(wanted, at, 0)]
        return Value(found if mask is None else torch.where(wanted, found, torch.tensor(other or 0, dtype=found.dtype)))

    def store(self, value: Any, mask: Any) -> None:
        at, wanted = self.chosen(mask)
        value = raw(value)
        value = value if isinstance(value, Tensor) else torch.tensor(value)
        assert torch.broadcast_shapes(value.shape, at.shape) == at.shape, "a store of more than its addresses"
        self.storage[at[wanted]] = value.to(self.storage.dtype).broadcast_to(at.shape)[wanted]


class Shared:
    """A descriptor of shared memory."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return Shared(self.x.narrow(dim, int(start), length))

    def index(self, i: int) -> Shared:
        return Shared(self.x[i])

    def permute(self, order: list[int]) -> Shared:
        return Shared(self.x.permute(order))

    def reshape(self, shape: list[int]) -> Shared:
        return Shared(self.x.view(shape))

    @property
    def dtype(self) -> Dtype:
        return DTYPES[self.x.dtype]

    def load(self, layout: Any) -> Value:
        return Value(self.x.clone())

    def store(self, value: Value) -> None:
        assert value.x.shape == self.x.shape and value.x.dtype == self.x.dtype
        self.x.copy_(value.x)


class Copies:
    """Copies under way, by group; they arrive when they are waited for."""

    def __init__(self) -> None:
        self.groups: list[list[Callable[[], Any]]] = []
        self.open: list[Callable[[], Any]] = []

    def copy_to_shared(self, memory: Shared, pointer: Pointer, mask: Any = None) -> None:
        # Read as late as it may be, and what a mask leaves out is zeros.
        memory.x.fill_(float("nan"))
        self.open.append(lambda: memory.x.copy_(pointer.load(mask, 0).x))

    def commit_group(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait_group(self, outstanding: int) -> None:
        while len(self.groups) > outstanding:
            for arrive in self.groups.pop(0):
                arrive()


def allocate(dtype: Dtype, shape: list[int], layout: Any) -> Shared:
    return Shared(torch.full(shape, float("nan"), dtype=dtype.torch))


def scan(x: Value, axis: int, combine: Callable[[Any, Any], Any], reverse: bool = False) -> Value:
    assert combine.__name__ == "plus"
    flipped = x.x.flip(axis) if reverse else x.x
    total = [flipped.select(axis, 0)]
    for i in range(1, flipped.shape[axis]):
        total.append(total[-1] + flipped.select(axis, i))
    found = torch.stack(total, axis)
    return Value(found.flip(axis) if reverse else found)


def matrix_product(a: Value, b: Value, accumulator: Value) -> Value:
    assert a.x.dtype == b.x.dtype
    return Value(accumulator.x + a.x.float() @ b.x.float())


def where(condition: Any, a: Any, b: Any) -> Any:
    a, b = (torch.tensor(x) if not isinstance(x, Tensor) else x for x in (raw(a), raw(b)))
    if a.dim() == 0 and b.dim() and a.is_floating_point() == b.is_floating_point():
        a = a.to(b.dtype)
    return Value(torch.where(torch.as_tensor(raw(condition)), a, b))


def of_two(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Value]:
    def apply(a: Any, b: Any, **how: Any) -> Value:
        a, b = raw(a), raw(b)
        dtype = next((x.dtype for x in (a, b) if isinstance(x, Tensor)), torch.int32)
        return Value(function(torch.as_tensor(a, dtype=dtype), torch.as_tensor(b, dtype=dtype)))

    return apply


def of_one(function: Callable[[Tensor], Tensor]) -> Callable[[Value], Value]:
    return lambda x: Value(function(x.x))


def language(program: int) -> types.SimpleNamespace:
    """What kernels take from gluon.language, for one program."""

    def load(pointer: Pointer, mask: Any = None, other: Any = None) -> Value:
        return pointer.load(mask, other)

    def store(pointer: Pointer, value: Any, mask: Any = None) -> None:
        pointer.store(value, mask)

    return types.SimpleNamespace(
        **{str(x).removeprefix("torch."): dtype for x, dtype in DTYPES.items()},
        **{name: of_one(getattr(torch, name)) for name in ("exp", "exp2", "log", "rsqrt", "zeros_like")},
        minimum=of_two(torch.minimum), maximum=of_two(torch.maximum), load=load, store=store, where=where,
        associative_scan=scan, PropagateNan=PropagateNan,
        allocate_shared_memory=allocate, static_range=range, constexpr=lambda x: x,
        **dict.fromkeys(LAYOUTS, lambda *a: None),
        convert_layout=lambda x, layout: x, sum=lambda x, axis: Value(x.x.sum(axis)),
        program_id=lambda axis: Value(torch.tensor(program, dtype=torch.int32)),
        arange=lambda start, end, layout=None: Value(torch.arange(start, end, dtype=torch.int32)),
        reshape=lambda x, shape: Value(x.x.reshape(shape)), split=lambda x: (Value(x.x[..., 0]), Value(x.x[..., 1])),
        zeros=lambda shape, dtype, layout=None: Value(torch.zeros(shape, dtype=dtype.torch)),
    )  # fmt: skip


def interpret(kernel: GluonJITFunction, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
    """`kernel[grid](**arguments)`."""
    constexpr = {p.name for p in kernel.params if p.is_constexpr}
    given: dict[str, Any] = {}
    for name in (p.name for p in kernel.params):
        value = arguments[name]
        if isinstance(value, Tensor):
            given[name] = Pointer.to(value)
        elif value is None or name in constexpr:
            given[name] = value
        else:
            given[name] = Value(torch.tensor(value, dtype=torch.float32 if isinstance(value, float) else torch.int32))
    for program in range(grid[0]):
        copies = Copies()
        namespace = dict(kernel.fn.__globals__)
        for name, x in list(namespace.items()):
            if isinstance(x, GluonJITFunction):
                namespace[name] = types.FunctionType(x.fn.__code__, namespace, name, x.fn.__defaults__)
        # Arithmetic that Triton's kernels have as well takes it from tl.
        namespace["gl"] = namespace["tl"] = language(program)
        namespace |= {"async_copy": copies, "copy_to_shared": copies.copy_to_shared, "mma_v2": matrix_product,
                      "barrier": lambda: None}  # fmt: skip
        namespace[kernel.fn.__name__](**given)
        copies.wait_group(0)


@contextmanager
def gluon_on_cpu(monkeypatch: pytest.MonkeyPatch, *modules: Any) -> Iterator[list[str]]:
    """Inside, these modules' launches of Gluon kernels are interpreted; yields the names of those that were."""
    from gdn_plugin.backends.triton.launch import launch

    seen: list[str] = []

    def launched(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        if not isinstance(kernel, GluonJITFunction):
            return launch(kernel, grid, **arguments)
        seen.append(kernel.fn.__name__)
        return interpret(kernel, grid, arguments)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a program's operations are small: handing them out costs more than they do
    try:
        with monkeypatch.context() as patched:
            for module in modules:
                patched.setattr(module, "launch", launched)
            yield seen
    finally:
        torch.set_num_threads(threads)
