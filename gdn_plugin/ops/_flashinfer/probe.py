"""Does the installed CuTe DSL really compile for a GPU? Asked by one small compile, in a process of its own, once.

A compiler that is installed and broken (libraries for the wrong CUDA, a version that miscompiles, a crash) passes every
check of versions. The answer is kept on disk for the versions that gave it.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from gdn_plugin.ops._flashinfer.api import INSTALL
from gdn_plugin.ops._flashinfer.compile import compile_all, problems
from gdn_plugin.registry.probe import installed_packages


def compiler_trouble(sm: int, folder: Path | None = None) -> str | None:
    """None where FlashInfer's smallest GDN kernel compiles for this architecture, else a sentence that says why not.

    Args:
        sm: 90, 100, 103 or 120.
        folder: where the answer is kept; by default gdn-plugin's folder in the user's cache folder.
    """
    versions = dict(sorted(installed_packages().items()))
    key = hashlib.sha256(json.dumps([sm, versions]).encode()).hexdigest()[:16]
    kept = (_cache_folder() if folder is None else folder) / f"flashinfer-compiler-{key}.json"
    try:
        return json.loads(kept.read_text(encoding="utf-8"))["trouble"]
    except (OSError, ValueError, KeyError):
        pass  # not asked yet, or unreadable: ask
    (wanted,) = problems(ops=("decode",), state_dtypes=("float32",))
    errors = [row.error for row in compile_all(sm, wanted=[wanted], few=True) if row.error]
    trouble = f"the CuTe DSL does not compile for sm_{sm}a: {errors[0]}; {INSTALL}" if errors else None
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({"trouble": trouble, "sm": sm, "versions": versions}), encoding="utf-8")
    except OSError:
        pass  # a read-only home: the next call asks again
    return trouble


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "gdn-plugin"
