"""Tests of the Triton kernels under Triton's interpreter, on CPU tensors.

Triton decides when it is imported whether kernels are interpreted, so these files are collected only where
TRITON_INTERPRET=1 was set from outside; tests/test_triton_interpreted.py runs each of them in such a process.
"""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
else:
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
