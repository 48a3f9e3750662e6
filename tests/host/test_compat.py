"""Whether the plugin fits a vLLM is read from its source: versions, names, signatures, fields."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gdn_plugin.hosts.vllm import compat

needs_vllm = pytest.mark.skipif(compat.installed_root() is None, reason="vLLM is not installed")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The files of the installed vLLM that the contract reads, to be edited."""
    source = compat.installed_root()
    if source is None:
        pytest.skip("vLLM is not installed")
    root = tmp_path / "vllm"
    for module in {need.module for need in compat.NEEDS}:
        path = Path(*module.split(".")[1:]).with_suffix(".py")
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / path, root / path)
    shutil.copy(source / "_version.py", root / "_version.py")
    (root / "__init__.py").touch()
    return root


def edit(root: Path, module: str, old: str, new: str) -> None:
    path = root / Path(*module.split(".")[1:]).with_suffix(".py")
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@needs_vllm
def test_the_installed_host_fits() -> None:
    fits, why = compat.would_attach()
    assert fits, why


def test_unpacked_hosts_fit() -> None:
    """Every vLLM that CI has unpacked from its wheel, CUDA builds among them."""
    roots = [path for path in os.environ.get("HOST_CONTRACT_TREES", "").split(os.pathsep) if path]
    if not roots:
        pytest.skip("HOST_CONTRACT_TREES names no unpacked vLLM")
    for root in roots:
        assert compat.contract(root) == [], root
        assert compat.version_problem(compat.version_of(compat.package_root(root))) is None


def test_the_table_in_the_readme_names_tests_that_exist() -> None:
    root = Path(__file__).parents[2]
    rows = [line for line in (root / "README.md").read_text().splitlines() if "::" in line and line.startswith("| ")]
    assert len(rows) > 15
    for row in rows:
        named = re.findall(r"`(\w+)::(\w+)`", row.rsplit("|", 2)[1])
        assert named, row
        for file, name in named:
            assert re.search(rf"def test_{name}\(", (root / "tests" / "host" / f"test_{file}.py").read_text()), name


@pytest.mark.parametrize("version", ["0.32.0", "0.33.1", "0.32.0+cpu", "0.33.0rc1.dev7+g1234567", "0.33"])
def test_known_versions(version: str) -> None:
    assert compat.version_problem(version) is None


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0", "0.34.0.dev3+gabc", "dev", None])
def test_unknown_versions_are_named_with_the_known_ones(version: str | None) -> None:
    problem = compat.version_problem(version)
    assert problem is not None and "0.32.x and 0.33.x" in problem
    assert version is None or version in problem


@pytest.mark.parametrize(
    ("module", "old", "new", "said"),
    [
        (
            compat.LAYER_MODULE,
            "def _forward_core_fused_norm_packed(",
            "def _renamed(",
            "_forward_core_fused_norm_packed",
        ),
        (compat.LAYER_MODULE, "class QwenGatedDeltaNetAttention(", "class Renamed(", "QwenGatedDeltaNetAttention"),
        (compat.LAYER_MODULE, "self.in_proj_ba = ", "self.in_proj_gates = ", "in_proj_ba"),
        (compat.REGISTRY_MODULE, "op_registry_oot: dict", "registry: dict", "op_registry_oot"),
        ("vllm.v1.attention.backends.gdn_attn", "    prefill_state_indices: ", "    rows: ", "prefill_state_indices"),
        ("vllm.v1.attention.backends.utils", "NULL_BLOCK_ID = 0", "NULL_BLOCK_ID = -1", "is not 0"),
        ("vllm.utils.torch_utils", "def _encode_layer_name(layer_name", "def _encode_layer_name(name", "takes (name)"),
    ],
    ids=lambda value: value.split(".")[-1].strip() if isinstance(value, str) else None,
)
def test_what_is_missing_is_said(
    tree: Path, monkeypatch: pytest.MonkeyPatch, module: str, old: str, new: str, said: str
) -> None:
    assert compat.contract(tree) == []
    edit(tree, module, old, new)
    missing = compat.contract(tree)
    assert missing and any(said in sentence for sentence in missing), missing
    monkeypatch.setattr(compat, "installed_root", lambda: tree)
    fits, why = compat.would_attach()
    assert not fits and said in why + " ".join(missing) and "\n" not in why


def test_a_missing_file_is_said(tree: Path) -> None:
    (tree / "forward_context.py").unlink()
    assert compat.contract(tree) == ["vllm.forward_context is missing"]
    assert compat.contract(tree.parent) == ["vllm.forward_context is missing"]  # the folder that holds it will do


def test_no_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "installed_root", lambda: None)
    assert compat.would_attach() == (False, "vLLM is not installed")


def test_nothing_is_imported() -> None:
    code = (
        "import sys; from gdn_plugin.hosts.vllm import compat; compat.would_attach();"
        "print([m for m in ('torch', 'vllm', 'triton', 'flashinfer') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
