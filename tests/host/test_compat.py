"""Whether the plugin fits a vLLM is read from its source: versions, names, signatures, fields."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gdn_plugin.hosts.contract import version_of
from gdn_plugin.hosts.vllm import compat
from gdn_plugin.tools.cli.host import of_tree

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
    named = [path for path in os.environ.get("HOST_CONTRACT_TREES", "").split(os.pathsep) if path]
    roots = [path for path in named if (found := of_tree(path)) is None or found.package == "vllm"]
    if not roots:
        pytest.skip("HOST_CONTRACT_TREES names no unpacked vLLM")
    for root in roots:
        assert compat.contract(root) == [], root
        assert compat.version_problem(version_of(compat.package_root(root))) is None


def test_the_table_of_what_works_names_tests_that_exist() -> None:
    root = Path(__file__).parents[2]
    page = (root / "docs" / "verification.md").read_text(encoding="utf-8")
    named = re.findall(r"`(\w+)::(\w+)`", page.partition("Shown by")[2].partition("\n")[2])
    assert len(named) > 25
    for file, name in named:
        text = (root / "tests" / "host" / f"test_{file}.py").read_text(encoding="utf-8")
        assert re.search(rf"def test_{name}\(", text), name


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


def test_sources_are_utf_8_whatever_the_locale(tree: Path) -> None:
    path = tree / "forward_context.py"
    path.write_text(path.read_text(encoding="utf-8") + "\n# Ünïcode, as in the name of an author\n", encoding="utf-8")
    code = f"from gdn_plugin.hosts.vllm import compat; print(compat.contract({str(tree)!r}))"
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | plain)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("damage", [b"def broken(:", b"# \xff\xfe", b"\0"], ids=["syntax", "encoding", "null"])
def test_a_file_that_cannot_be_read_is_said(tree: Path, damage: bytes) -> None:
    path = tree / "forward_context.py"
    path.write_bytes(path.read_bytes() + b"\n" + damage)
    (said,) = compat.contract(tree)
    assert said.startswith("vllm.forward_context cannot be read: ")


# Who builds the layer, in 0.32 and 0.33. A name that is missing here wants a look at what it passes and calls.
MODELS = {"qwen3_next", "qwen3_5", "interns2_mobius", "qwen4_exp"}


def hosts() -> list[Path]:
    named = [path for path in os.environ.get("HOST_CONTRACT_TREES", "").split(os.pathsep) if path]
    unpacked = sorted((Path(__file__).parents[2] / ".cache" / "hosts").glob("*"))
    installed = compat.installed_root()
    roots = [compat.package_root(path) for path in (*named, *unpacked)] + ([installed] if installed else [])
    return [root for root in roots if (root / "__init__.py").exists()]


@pytest.mark.parametrize("root", hosts(), ids=lambda root: version_of(root))
def test_every_model_that_builds_the_layer_is_served(root: Path) -> None:
    """It builds the very class that is replaced, with arguments that the layer takes, and does nothing but call it."""
    found = set()
    for folder in ("models", "model_executor/models"):
        for path in sorted((root / folder).rglob("*.py")):
            source = path.read_text(encoding="utf-8")
            if compat.LAYER_CLASS not in source:
                continue
            found.add(path.relative_to(root / folder).with_suffix("").parts[0])
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.ClassDef):
                    assert compat.LAYER_CLASS not in map(ast.unparse, node.bases), f"{path}: {node.name}"
                if isinstance(node, ast.Call) and ast.unparse(node.func) == compat.LAYER_CLASS:
                    given = {keyword.arg for keyword in node.keywords}
                    taken = {"config", "vllm_config", "prefix", "gqa_interleaved_layout", "reduce_results"}
                    assert len(node.args) <= 1 and given <= taken, f"{path}:{node.lineno}"
                if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith("self.linear_attn"):
                    raise AssertionError(f"{path}:{node.lineno} reads {ast.unparse(node)}")
    assert found == MODELS


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
