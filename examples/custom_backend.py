"""A backend from outside: rows in a mapping, found through an entry point, chosen by name or, where preferred, by auto.

    python examples/custom_backend.py

A real package declares the entry point in its pyproject.toml:

    [project.entry-points."gdn_plugin.backends"]
    counting = "my_package.gdn:BACKENDS"

Here this file is the package, and its metadata is written to a temporary folder.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from gdn_plugin import ops
from gdn_plugin.ops import eager
from gdn_plugin.registry import Backend, Platform, Problem, choose

calls = 0


def decode(*args) -> None:
    """A backend function: the op's arguments as README's "Adding a backend" lists them, `out` preallocated."""
    global calls
    calls += 1
    eager.decode(*args)


def small_batches(platform: Platform, problem: Problem) -> str | None:
    """A check: None where the backend runs, else one sentence with what it needs and what it found."""
    return None if problem.head_k_dim <= 128 else f"needs K <= 128, got K={problem.head_k_dim}"


BACKENDS = {"decode": Backend("counting", "custom_backend:decode", checks=(small_batches,))}


def pretend_to_be_installed() -> None:
    """What `pip install` would do: put the entry point where importlib.metadata finds it."""
    site = Path(tempfile.mkdtemp())
    info = site / "custom_backend-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: custom-backend\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[gdn_plugin.backends]\ncounting = custom_backend:BACKENDS\n")
    sys.path[:0] = [str(site), str(Path(__file__).parent)]


def main() -> None:
    B, Hk, Hv, K, V = 3, 2, 4, 64, 64
    q, k, v = torch.randn(B, Hk, K), torch.randn(B, Hk, K), torch.randn(B, Hv, V)
    gates = torch.randn(B, Hv), torch.randn(B, Hv), torch.zeros(Hv), torch.zeros(Hv)
    state, rows = torch.zeros(8, Hv, V, K), torch.tensor([1, 4, 6], dtype=torch.int32)

    want = ops.decode(q, k, v, *gates, state.clone(), rows, backend="reference")
    got = ops.decode(q, k, v, *gates, state, rows, backend="counting")
    import custom_backend  # the module the entry point loaded, which is not this __main__

    print(f"decode went through 'counting' {custom_backend.calls} time(s)")
    print(f"max |difference| from the reference: {(got - want).abs().max():.1e}")
    choice = choose(Platform.simulated("cpu"), Problem("decode", "float32", "float32", Hk, Hv, 256, V))
    for verdict in choice.verdicts:
        print(f"  K=256: {verdict.backend}: {'; '.join(verdict.reasons) or 'can run'}")
    assert custom_backend.calls == 1 and torch.allclose(got, want, atol=1e-5)


if __name__ == "__main__":
    pretend_to_be_installed()
    main()
