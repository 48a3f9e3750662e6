"""Tests of the Triton kernels under Triton's interpreter, on CPU tensors.

Triton decides when it is imported whether kernels are interpreted, so these files are collected only where
TRITON_INTERPRET=1 was set from outside; tests/test_triton_interpreted.py runs each of them in such a process. The files
of COMPILED look at kernels as Triton compiles them, and are collected only where it was not.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from tests.triton import COMPILED

if os.environ.get("TRITON_INTERPRET") != "1":
    here = Path(__file__).parent
    runs = COMPILED if importlib.util.find_spec("triton") else ()
    collect_ignore = [path.name for path in here.glob("test_*.py") if path.name not in runs]
else:
    collect_ignore = list(COMPILED)

    import numpy as np
    import pytest
    import torch

    @pytest.fixture(autouse=True)
    def nearest_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
        """The interpreter cuts fp32 off to bf16, a GPU rounds to nearest even: make the two alike."""
        import triton.language as tl
        from triton.runtime import interpreter

        cut_off = interpreter.InterpreterBuilder.cast_impl

        def cast_impl(self, src, dst_type):
            if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
                return cut_off(self, src, dst_type)
            nearest = torch.from_numpy(np.array(src.data, dtype=np.float32, ndmin=1)).to(torch.bfloat16)
            data = nearest.view(torch.int16).numpy().view(np.uint16).reshape(np.shape(src.data))
            return interpreter.TensorHandle(data, dst_type.scalar)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", cast_impl)

    @pytest.fixture(autouse=True)
    def language_made_ready_once(monkeypatch: pytest.MonkeyPatch) -> None:
        """The interpreter goes through all of triton.language at every call of a device function, a third of a test's
        time. A launch needs that once for the functions of a module."""
        from triton.runtime import interpreter

        ready: set[int] = set()
        run = interpreter.InterpretedFunction.run

        def launched(self, *args, **kwargs):
            ready.clear()
            return run(self, *args, **kwargs)

        def called(self, *args, **kwargs):
            if id(self.fn.__globals__) not in ready:
                ready.add(id(self.fn.__globals__))
                interpreter._patch_lang(self.fn)
            return self.rewrite()(*args, **kwargs)

        monkeypatch.setattr(interpreter.InterpretedFunction, "run", launched)
        monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", called)
