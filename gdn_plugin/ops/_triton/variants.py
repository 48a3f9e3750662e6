"""What `gdn-plugin compile --backend triton` compiles: a kernel with everything that fixes its machine code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One compilation of one kernel, ready for `triton.compile` on a machine without a GPU.

    Args:
        name: readable, unique in a listing ("prefill_state K128 V128 bf16 state=fp32").
        fn: the `@triton.jit` function.
        signature: argument name -> Triton type ("*bf16", "i32", "i64", "fp32", "constexpr"), in the kernel's order.
        constexprs: argument name -> value, for every "constexpr" of the signature.
        attrs: (argument index,) -> [["tt.divisibility", 16]], as Triton's own launcher would specialise it.
        num_warps: warps a program.
        num_stages: software-pipelining depth.
        max_registers: registers a thread may take, None as many as there are.
    """

    name: str
    fn: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    attrs: Mapping[tuple[int, ...], Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    max_registers: int | None = None

    def compile(self, sm: int) -> Any:
        """Compile for compute capability `sm` (10 * major + minor); returns Triton's CompiledKernel."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        source = ASTSource(self.fn, dict(self.signature), dict(self.constexprs), dict(self.attrs))
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.max_registers}
        return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)


def make_variant(
    name: str,
    fn: Any,
    types: Mapping[str, str],
    constexprs: Mapping[str, Any],
    unaligned: tuple[str, ...] = (),
    num_warps: int = 4,
    num_stages: int = 2,
    max_registers: int | None = None,
) -> Variant:
    """A `Variant` from types by argument name; whatever is neither in `types` nor in `constexprs` is an "i32".

    Pointers and 32/64-bit integers are taken as divisible by 16, which is how Triton specialises the common case,
    except those named in `unaligned` (the arguments of `do_not_specialize` and `do_not_specialize_on_alignment`).
    """
    signature: dict[str, str] = {}
    attrs: dict[tuple[int, ...], Any] = {}
    for index, arg in enumerate(fn.arg_names):
        kind = "constexpr" if arg in constexprs else types.get(arg, "i32")
        signature[arg] = kind
        if kind not in ("constexpr", "fp32") and arg not in unaligned:
            attrs[(index,)] = [["tt.divisibility", 16]]
    return Variant(name, fn, signature, dict(constexprs), attrs, num_warps, num_stages, max_registers)
