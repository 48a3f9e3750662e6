"""A CUDA device that is not there: FlashInfer's own checks run and its kernels compile; nothing is launched.

Inside `simulated_device("sm_100a")` tensors are FakeTensors on "cuda", and FlashInfer's public functions see a device
of that architecture. FlashInfer hands tensors to the CuTe DSL by DLPack; here they are handed on as DLPack tensors in
device memory at a made-up address, of which only shape, strides, type and alignment are read. So the real
`from_dlpack` and the real compiler run, on the signatures that a GPU would give them. What would be launched is
recorded instead, after the check that a compiled kernel makes of its arguments: type, alignment, and every size and
stride that it was compiled for.

One process compiles for one architecture (the DSL reads CUTE_DSL_ARCH when it is imported), so `compile_flashinfer.py`
starts a process for each; without compiling, any number of architectures can follow each other in one process.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from gdn_plugin.registry.platform import SM_COUNTS

ARCHS = {"sm_90a": 90, "sm_100a": 100, "sm_103a": 103, "sm_120a": 120}
DEVICE_NAMES = {"sm_90a": "NVIDIA H100", "sm_100a": "NVIDIA B200", "sm_103a": "NVIDIA B300", "sm_120a": "NVIDIA RTX"}
# Bytes a multiprocessor has, by which the DSL sets the carve-out of kernels that ask for several blocks on one.
SHARED_MEMORY = {"sm_90a": 228 << 10, "sm_100a": 228 << 10, "sm_103a": 228 << 10, "sm_120a": 100 << 10}

_ADDRESS = 0x7F00_0000_0000  # aligned to anything; never read
_DLPACK_TYPES = {
    torch.bfloat16: (4, 16),
    torch.float16: (2, 16),
    torch.float32: (2, 32),
    torch.int32: (0, 32),
    torch.int64: (0, 64),
    torch.int8: (0, 8),
    torch.uint8: (1, 8),
}
_DLPACK_CUDA = 2
_CUTE_TYPES = {
    torch.bfloat16: "BFloat16",
    torch.float16: "Float16",
    torch.float32: "Float32",
    torch.int32: "Int32",
    torch.int64: "Int64",
    torch.int8: "Int8",
    torch.uint8: "Uint8",
}


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel that was compiled: its name, the seconds it took, and its GPU code (b"" where it was not kept)."""

    kernel: str
    seconds: float
    cubin: bytes = field(repr=False, default=b"")


@dataclass(slots=True)
class Recording:
    """What a simulated device was asked for.

    Args:
        arch: "sm_100a", ...
        launches: names of FlashInfer's kernels, in order.
        own_launches: names of this plugin's Triton kernels, in order.
        compiled: what was compiled; empty where compiling is off.
        specialisations: how many different kernels were asked of the compilers, compiled or not, our own among them.
        artifacts: object files left in the cache folder.
    """

    arch: str
    launches: list[str] = field(default_factory=list)
    own_launches: list[str] = field(default_factory=list)
    compiled: list[Compiled] = field(default_factory=list)
    specialisations: int = 0
    artifacts: list[Path] = field(default_factory=list)

    def reset(self) -> None:
        for records in (self.launches, self.own_launches, self.compiled, self.artifacts):
            records.clear()


@contextlib.contextmanager
def simulated_device(
    arch: str,
    *,
    compile_kernels: bool = False,
    cache: bool = False,
    cuda: str = "13.0",
    sm_count: int | None = None,
) -> Iterator[Recording]:
    """A pretended CUDA device for FlashInfer; everything it replaces is put back.

    Args:
        arch: "sm_90a", "sm_100a", "sm_103a" or "sm_120a".
        compile_kernels: compile for real. The process must have been started with CUTE_DSL_ARCH=arch.
        cache: also leave the object files where FlashInfer looks for them (FLASHINFER_WORKSPACE_BASE of this process).
        cuda: CUDA runtime that torch is pretended to be built for.
        sm_count: multiprocessors; by default those of the architecture's usual part.
    Raises:
        ValueError: an unknown architecture.
        RuntimeError: compile_kernels in a process whose CUTE_DSL_ARCH is not arch.
    """
    if arch not in ARCHS:
        raise ValueError(f"arch={arch!r} is not valid; choose one of: {', '.join(ARCHS)}")
    if compile_kernels and os.environ.get("CUTE_DSL_ARCH") != arch:
        raise RuntimeError(f"to compile for {arch}, start the process with CUTE_DSL_ARCH={arch}")
    capability = divmod(ARCHS[arch], 10)
    sm_count = SM_COUNTS[ARCHS[arch]] if sm_count is None else sm_count
    recording = Recording(arch)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {"CUTE_DSL_ARCH": arch}))
        _pretend_cuda(stack, arch, capability, sm_count, cuda)
        _pretend_compiler(stack, recording, compile_kernels, cache)
        _record_own_launches(stack, recording)
        forget_device()
        stack.callback(forget_device)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_Slicing())
        yield recording


def _pretend_cuda(
    stack: contextlib.ExitStack, arch: str, capability: tuple[int, int], sm_count: int, cuda: str
) -> None:
    properties = types.SimpleNamespace(
        multi_processor_count=sm_count, name=DEVICE_NAMES[arch], major=capability[0], minor=capability[1]
    )
    for name, value in {
        "get_device_capability": lambda device=None: capability,
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: DEVICE_NAMES[arch],
        "current_device": lambda: 0,
        "current_stream": lambda device=None: types.SimpleNamespace(cuda_stream=0),
        "is_available": lambda: True,
        "is_current_stream_capturing": lambda: False,
        "device": lambda device: contextlib.nullcontext(),
    }.items():
        stack.enter_context(mock.patch.object(torch.cuda, name, value))
    stack.enter_context(mock.patch.object(torch.cuda.nvtx, "range", lambda *_, **__: contextlib.nullcontext()))
    stack.enter_context(mock.patch.object(torch.version, "cuda", cuda))
    import flashinfer.gdn_kernels.device_target as device_target
    import flashinfer.utils

    stack.enter_context(mock.patch.object(flashinfer.utils, "get_device_properties", lambda device: properties))
    from cutlass.base_dsl.runtime import cuda as dsl_cuda

    known = {
        "CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR": SHARED_MEMORY[arch],
        "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR": capability[0],
        "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR": capability[1],
    }
    stack.enter_context(
        mock.patch.object(dsl_cuda, "get_device_attribute", lambda attribute, device_id=0: known[attribute.name])
    )
    # It refuses to compile for another device than the one present, which is the point here.
    stack.enter_context(mock.patch.object(device_target, "_check_dsl_can_run", lambda target: None))


def _pretend_compiler(stack: contextlib.ExitStack, recording: Recording, compile_kernels: bool, cache: bool) -> None:
    import cutlass.cute as cute
    import cutlass.cute.runtime as runtime

    # Imported first, so that every module that holds a copy of what is replaced is there.
    for name in ("gdn_prefill", "gdn_decode", "gdn_kernels.qk_l2norm"):
        importlib.import_module(f"flashinfer.{name}")
    real = runtime.from_dlpack

    def from_dlpack(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return real(_DeviceMemory(tensor) if isinstance(tensor, Tensor) else tensor, *args, **kwargs)

    def build_and_load(
        module: str, name: str, compile_fn: Callable[[], Any], extra_key_files: Sequence[str] = ()
    ) -> Any:
        if not (compile_kernels and cache):
            return compile_fn()
        from flashinfer.jit import cute_dsl_core

        spec = cute_dsl_core.JitSpecCuteDsl(
            module, name, compile_fn, cute_dsl_core._hash_source_files(tuple(extra_key_files))
        )
        if spec.is_compiled:  # by another process; to load it takes the device
            recording.artifacts.append(spec.object_path)
            return _Kernel(name, recording, None, [])
        # FlashInfer would now load the object again, which needs the device.
        spec.compile_and_persist()
        if not spec.is_compiled:
            raise RuntimeError(f"FlashInfer could not write {spec.object_path}")
        recording.artifacts.append(spec.object_path)
        return spec._compiled_kernel

    compiler = _Compiler(cute.compile, recording, compile_kernels)
    stack.enter_context(mock.patch.object(runtime, "from_dlpack", from_dlpack))
    stack.enter_context(mock.patch.object(cute, "compile", compiler))
    for module in _flashinfer_modules():
        if getattr(module, "from_dlpack", None) is real:
            stack.enter_context(mock.patch.object(module, "from_dlpack", from_dlpack))
        if hasattr(module, "build_and_load_cute_dsl_kernel"):
            stack.enter_context(mock.patch.object(module, "build_and_load_cute_dsl_kernel", build_and_load))


def _record_own_launches(stack: contextlib.ExitStack, recording: Recording) -> None:
    """Triton makes a kernel of each combination of dtypes and constants, since ours specialise on nothing else."""
    from gdn_plugin.backends.flashinfer import rows

    made: set[tuple[object, ...]] = set()

    def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        name = getattr(kernel, "fn", kernel).__name__.strip("_")
        recording.own_launches.append(name)
        kinds = ((key, _kind(key, value)) for key, value in arguments.items())
        if (key := (name, *sorted(kinds, key=str))) not in made:
            made.add(key)
            recording.specialisations += 1

    stack.enter_context(mock.patch.object(rows, "_launch", launch))
    stack.enter_context(mock.patch.object(rows, "compile_count", lambda: len(made)))


def _kind(name: str, value: Any) -> object:
    """What Triton specialises on of an argument; its constants are spelled in capitals of more than one letter."""
    if isinstance(value, Tensor):
        return value.dtype
    constant = name.isupper() and len(name) > 1
    return value if constant else type(value)


class _Slicing(TorchFunctionMode):
    """`x[:n, :m]` and addresses of fake tensors.

    torch sets the device before it indexes, which a build without CUDA cannot; and a fake tensor has no address.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__ and isinstance(args[0], FakeTensor):
            x, key = args
            for dim, part in enumerate(key if isinstance(key, tuple) else (key,)):
                if not isinstance(part, slice):
                    raise NotImplementedError(f"a simulated device slices tensors and does nothing else: {key}")
                x = torch.ops.aten.slice(x, dim, part.start, part.stop, part.step or 1)
            return x
        if func is torch.Tensor.data_ptr and isinstance(args[0], FakeTensor):
            return _address(args[0])
        return func(*args, **(kwargs or {}))


def _flashinfer_modules() -> list[types.ModuleType]:
    return [module for name, module in list(sys.modules.items()) if name.split(".")[0] == "flashinfer" and module]


def forget_device() -> None:
    """Empty what FlashInfer remembers of a device and of kernels compiled for it."""
    for module in _flashinfer_modules():
        if not module.__name__.startswith(("flashinfer.gdn", "flashinfer.utils", "flashinfer.cute_dsl")):
            continue
        for value in vars(module).copy().values():
            if getattr(value, "__module__", "").startswith("flashinfer") and hasattr(value, "cache_clear"):
                value.cache_clear()
        for name in ("_in_mem_compile_cache", "_compiled_kernels_mtp", "_compiled_kernels_wide_vec", "_cache_buf"):
            kept = getattr(module, name, None)
            if isinstance(kept, dict):
                kept.clear()


class _Compiler:
    """Stands for `cute.compile`: `compile[options](kernel, *args)` gives something that records its launches."""

    def __init__(self, real: Any, recording: Recording, compile_kernels: bool, options: Any = None) -> None:
        self._real, self._recording, self._compile_kernels, self._options = real, recording, compile_kernels, options

    def __getitem__(self, options: Any) -> _Compiler:
        return _Compiler(self._real, self._recording, self._compile_kernels, options)

    def __call__(self, kernel: Any, *args: Any, **kwargs: Any) -> _Kernel:
        name = getattr(kernel, "__name__", None) or type(kernel).__name__
        self._recording.specialisations += 1
        expected = [_Expected.of(x) for x in (*args, *kwargs.values()) if _is_cute_tensor(x)]
        if not self._compile_kernels:
            return _Kernel(name, self._recording, None, expected)
        import cutlass.cute as cute

        options = self._options if isinstance(self._options, tuple) else (self._options,) if self._options else ()
        start = time.perf_counter()
        compiled = self._real[(*options, cute.KeepCUBIN(True))](kernel, *args, **kwargs)
        seconds = time.perf_counter() - start
        self._recording.compiled.append(Compiled(name, seconds, _cubin(compiled)))
        return _Kernel(name, self._recording, compiled, expected)


def _is_cute_tensor(x: Any) -> bool:
    return hasattr(x, "dynamic_strides_mask")


@dataclass(frozen=True, slots=True)
class _Expected:
    """What a kernel was compiled for of one tensor; None in shape and strides is anything.

    `check` is the DSL's own check of a call's arguments (base_dsl/tvm_ffi_builder), which the host code of a compiled
    kernel makes and nobody else.
    """

    dtype: str
    alignment: int
    shape: tuple[int | None, ...]
    strides: tuple[int | None, ...]

    @classmethod
    def of(cls, x: Any) -> _Expected:
        shape = tuple(None if free else int(n) for n, free in zip(x.shape, x.dynamic_shapes_mask, strict=True))
        strides = tuple(None if free else int(n) for n, free in zip(x.stride, x.dynamic_strides_mask, strict=True))
        return cls(str(x.element_type), x._assumed_align or 1, shape, strides)

    def check(self, kernel: str, x: Tensor) -> None:
        found = f"{kernel}: a tensor of shape {tuple(x.shape)}, strides {x.stride()}, {x.dtype}"
        if _CUTE_TYPES[x.dtype] != self.dtype:
            raise TypeError(f"{found} where it was compiled for {self.dtype}")
        if _address(x) % self.alignment:
            raise ValueError(f"{found} off the boundary of {self.alignment} bytes that it was compiled for")
        if len(self.shape) != x.dim() or any(n not in (None, m) for n, m in zip(self.shape, x.shape, strict=True)):
            raise ValueError(f"{found} where it was compiled for the shape {self.shape}")
        for size, stride, wanted in zip(x.shape, x.stride(), self.strides, strict=True):
            if size != 1 and wanted not in (None, stride):
                raise ValueError(f"{found} where it was compiled for the strides {self.strides}")


class _Kernel:
    """What FlashInfer takes for a compiled kernel: calling it checks its tensors and records a launch."""

    def __init__(self, name: str, recording: Recording, compiled: Any, expected: list[_Expected]) -> None:
        self._name, self._recording, self._compiled, self._expected = name, recording, compiled, expected

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if len(given) == len(self._expected):  # kernels that are called with CuTe's tensors have checked them
            for expected, x in zip(self._expected, given, strict=True):
                expected.check(self._name, x)
        self._recording.launches.append(self._name)

    def __getattr__(self, name: str) -> Any:  # __ptx__ and export_to_c, which FlashInfer asks for
        if self._compiled is None:
            # An SM 120 check reads the PTX and refuses an empty one; without a compiler there is nothing to refuse.
            if name == "__ptx__":
                return "// not compiled"
            raise AttributeError(name)
        return getattr(self._compiled, name)


def _cubin(compiled: Any) -> bytes:
    kept = getattr(compiled, "__cubin__", None)
    if isinstance(kept, bytes):
        return kept
    if isinstance(kept, str) and os.path.exists(kept):
        return Path(kept).read_bytes()
    return b""


class _Device(ctypes.Structure):
    _fields_ = (("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Managed(ctypes.Structure):
    _fields_ = (("dl_tensor", _DLTensor), ("manager_ctx", ctypes.c_void_p), ("deleter", _Deleter))


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_alive: list[object] = []  # capsules outlive their maker, and a compiler that runs once a process may keep its inputs


def _address(x: Tensor) -> int:
    return _ADDRESS + int(x.storage_offset()) * x.element_size()


class _DeviceMemory:
    """A fake tensor as DLPack in device memory, at the alignment its storage offset gives it."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __dlpack_device__(self) -> tuple[int, int]:
        return _DLPACK_CUDA, 0

    def __dlpack__(self, **_: Any) -> Any:
        x, rank = self._tensor, max(self._tensor.dim(), 1)
        code, bits = _DLPACK_TYPES[x.dtype]
        shape = (ctypes.c_int64 * rank)(*x.shape)
        strides = (ctypes.c_int64 * rank)(*x.stride())
        address = _address(x)
        managed = _Managed(
            _DLTensor(address, _Device(_DLPACK_CUDA, 0), x.dim(), _DataType(code, bits, 1), shape, strides, 0),
            None,
            _Deleter(),
        )
        _alive.append((managed, shape, strides))
        return _new_capsule(ctypes.addressof(managed), b"dltensor", None)
