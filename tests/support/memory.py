"""What a call does behind its results: what it allocates at its peak, what it launches, whether it looks at values."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Peak(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.known and key not in given:
                    self.known.add(key)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._freed, key, size)
        return result

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def peak_bytes(call: Callable[[], Any]) -> int:
    """Most bytes of new tensors alive at once during a call. Temporaries inside a single ATen operator do not count."""
    with _Peak() as mode:
        call()
    return mode.peak


class Launches(TorchDispatchMode):
    """Names of the ops that would launch something; views and bare allocations launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        launches_nothing = func.is_view or name.startswith(("aten::empty", "aten::new_empty", "aten::detach", "prim::"))
        if not launches_nothing:
            self.names.append(name.removeprefix("gdn::").removesuffix("_out"))
        return func(*args, **(kwargs or {}))


class _NoValues(TorchDispatchMode):
    """Fails where an op needs a tensor's values on the host: on a GPU that would be a synchronisation."""

    FORBIDDEN = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "_unique2",
        "unique_dim",
        "repeat_interleave.Tensor",
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        hits = [word for word in self.FORBIDDEN if word in name]
        if "index.Tensor" in name or "index_put" in name:
            hits += ["index by mask" for x in tree_leaves(args[1]) if getattr(x, "dtype", None) is torch.bool]
        assert not hits, f"{name} reads values on the host"
        return func(*args, **(kwargs or {}))


def assert_reads_no_values(call: Callable[[], Any]) -> None:
    with _NoValues():
        call()
