"""The kernel that moves states between cache blocks, interpreted, against the functions for CPUs and the host's own."""

from __future__ import annotations

import ast
import importlib.util
from typing import Any

import pytest
import torch

from gdn_plugin.hosts.vllm import compat, state_moves
from gdn_plugin.hosts.vllm.patches import align_copies
from tests.support.moves import BLOCK_SIZE, moved, step, world

KINDS = ["before", "after", "after, V1"]


@pytest.fixture(autouse=True)
def several_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small pools have more sequences, units and shares than are handled at once."""
    for name, value in {"_SEQUENCES": 4, "_UNIT": 32, "_SHARES": 3}.items():
        monkeypatch.setattr(state_moves, name, value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ring", [False, True], ids=["plain", "ring"])
@pytest.mark.parametrize("dim_first", [False, True], ids=["SD", "DS"])
@pytest.mark.parametrize(
    ("dtype", "state_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=["bf16", "fp32"]
)
def test_as_on_a_cpu(kind: str, ring: bool, dim_first: bool, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    facts: dict[str, Any] = {"ring": ring, "dim_first": dim_first, "dtype": dtype, "state_dtype": state_dtype}
    before = world(sequences=6, seed=3, **facts).pools
    here, there = (moved(kind, 6, 3, on, **facts) for on in ("gpu", "cpu"))
    assert any(not torch.equal(a, b) for a, b in zip(before, there, strict=False)), "nothing was moved"
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_one_sequence(kind: str) -> None:
    facts: dict[str, Any] = {"ring": True, "dim_first": False, "dtype": torch.float16, "state_dtype": torch.float16}
    some = False
    for seed in range(6):
        here, there = (moved(kind, 1, seed, on, **facts) for on in ("gpu", "cpu"))
        assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
        before = world(sequences=1, seed=seed, **facts).pools
        some |= any(not torch.equal(a, b) for a, b in zip(before, there, strict=False))
    assert some, "nothing was moved"


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The host's own two kernels, of the installed source: its module has them only where it finds a GPU."""
    root = compat.installed_root()
    if root is None:
        pytest.skip("vLLM is not installed")
    source = (root / "v1" / "worker" / "mamba_utils.py").read_text(encoding="utf-8")
    jitted = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.decorator_list]
    kernels = "\n\n\n".join(
        "\n".join(source.splitlines()[node.decorator_list[0].lineno - 1 : node.end_lineno]) for node in jitted
    )
    file = tmp_path_factory.mktemp("host") / "hosts_kernels.py"
    file.write_text(f"import triton\nimport triton.language as tl\n\n\n{kernels}\n", encoding="utf-8")
    spec = importlib.util.spec_from_file_location("hosts_kernels", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim_first", [False, True], ids=["SD", "DS"])
@pytest.mark.parametrize("seed", range(3))
def test_without_a_ring_as_the_hosts_kernels(host: Any, kind: str, dim_first: bool, seed: int) -> None:
    facts: dict[str, Any] = {"ring": False, "dim_first": dim_first, "dtype": torch.bfloat16}
    facts |= {"state_dtype": torch.float32, "sequences": 6, "seed": seed}
    before, there, arguments = world(**facts).pools, world(**facts), step(kind, 6, seed)
    call = there.call | arguments
    states = len(call["state_base_addrs_ptr"])
    name = "precopy_mamba_align_fused_kernel" if kind == "before" else "postprocess_mamba_fused_kernel"
    constants = {"COPY_BLOCK_SIZE": 64, "CONV_STATE_DIM_FIRST": dim_first, "TEMPORAL_TILES": 2}
    constants["HAS_IDX_MAPPING"] = call["idx_mapping_ptr"] is not None
    if kind != "before":
        constants |= {"block_size": BLOCK_SIZE, "PRECOMPUTED_NEW_COMPUTED": kind == "after"}
    grid = (call["num_reqs"], states, 2)
    getattr(host, name)[grid](**{one: call[one] for one in align_copies._KERNELS[name]}, **constants)
    assert any(not torch.equal(a, b) for a, b in zip(before, there.pools, strict=True)), "nothing was moved"
    out = call.get("num_accepted_tokens_out_ptr")
    ours = moved(kind, on="gpu", **facts)
    for a, b in zip(ours, [*there.pools, *(() if out is None else (out,))], strict=True):
        assert torch.equal(a, b)
