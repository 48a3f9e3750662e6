"""Whether the plugin fits an SGLang is read from its source. Without one unpacked only the versions can be checked."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gdn_plugin.hosts.contract import package_root, version_of
from gdn_plugin.hosts.sglang import compat
from gdn_plugin.tools.cli.host import of_tree

ROOT = Path(__file__).parents[2]


def trees() -> list[Path]:
    """Every SGLang there is: installed, unpacked by `make host-contract`, or named in HOST_CONTRACT_TREES."""
    named = [Path(path) for path in os.environ.get("HOST_CONTRACT_TREES", "").split(os.pathsep) if path]
    folders = {path.resolve() for path in (*named, *(ROOT / ".cache" / "hosts").glob("*"))}
    roots = [
        package_root("sglang", path)
        for path in sorted(folders)
        if (found := of_tree(path)) and found.package == "sglang"
    ]
    installed = compat.installed_root()
    return roots + ([installed] if installed else [])


HOSTS = trees()
of_each = pytest.mark.parametrize("root", HOSTS, ids=lambda root: version_of(root) or str(root))


@of_each
def test_it_fits(root: Path) -> None:
    fits, why = compat.CONTRACT.would_attach(root)
    assert fits, why


def parsed(root: Path, module: str) -> ast.Module:
    path = root.joinpath(*module.split(".")[1:]).with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


@of_each
def test_slot_0_is_paddings(root: Path) -> None:
    """The promise padding='scratch': the allocator hands out slots from 1 on."""
    module = parsed(root, "sglang.srt.mem_cache.allocator.mamba")
    (allocator,) = [n for n in module.body if isinstance(n, ast.ClassDef) and n.name == "MambaSlotAllocator"]
    (clear,) = [n for n in allocator.body if isinstance(n, ast.FunctionDef) and n.name == "clear"]
    (arange,) = [n for n in ast.walk(clear) if isinstance(n, ast.Call) and ast.unparse(n.func) == "torch.arange"]
    assert [ast.unparse(argument) for argument in arange.args] == ["1", "self.size + 1"]


@of_each
def test_what_the_pair_means(root: Path) -> None:
    """[all_q | all_k | all_v | all_z] and [all_b | all_a], from the host's own split."""
    path = root / "kernels" / "ops" / "attention" / "triton_gdn_fused_proj.py"
    text = path.read_text(encoding="utf-8")
    assert "mixed_qkvz: [all_q | all_k | all_v | all_z]" in text and "mixed_ba:   [all_b | all_a]" in text


@of_each
def test_extends_are_never_captured(root: Path) -> None:
    """A full prefill graph wants metadata that the backend's base refuses to make; a breakable one runs it eagerly."""
    module = parsed(root, "sglang.srt.layers.attention.hybrid_linear_attn_backend")
    (base,) = [n for n in module.body if isinstance(n, ast.ClassDef) and n.name == "MambaAttnBackendBase"]
    (replay,) = [n for n in base.body if isinstance(n, ast.FunctionDef) and n.name == "_replay_metadata"]
    assert "Invalid forward mode" in ast.unparse(replay)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The files of an SGLang that the contract reads, to be edited."""
    if not HOSTS:
        pytest.skip("no SGLang is installed or unpacked (make host-contract)")
    source, root = HOSTS[-1], tmp_path / "sglang"
    for module in {need.module for need in compat.NEEDS}:
        path = Path(*module.split(".")[1:])
        path = path.with_suffix(".py") if (source / path.with_suffix(".py")).exists() else path / "__init__.py"
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / path, root / path)
    shutil.copy(source / "_version.py", root / "_version.py")
    (root / "__init__.py").touch()
    return root


@pytest.mark.parametrize(
    ("module", "old", "new", "said"),
    [
        (compat.BACKEND_MODULE, "def forward_extend(", "def renamed(", "forward_extend is missing"),
        (compat.BACKEND_MODULE, "class GDNAttnBackend(", "class Renamed(", "GDNAttnBackend is missing"),
        (compat.BACKEND_MODULE, "mis_metadata", "items", "no mis_metadata"),
        (compat.REGISTRY_MODULE, "    _hooks: ", "    _all: ", "no _hooks"),
        (
            "sglang.srt.layers.attention.mamba.mamba2_metadata",
            "    logical_num_tokens: ",
            "    tokens: ",
            "logical_num_tokens",
        ),
        (
            "sglang.srt.model_executor.forward_batch_info",
            "mamba_track_seqlens",
            "lens",
            "no mamba_track_seqlens",
        ),
        ("sglang.srt.plugins", '"sglang.srt.plugins"', '"sglang.plugins"', "is not 'sglang.srt.plugins'"),
    ],
    ids=lambda value: value.split(".")[-1].strip(" :(") if isinstance(value, str) else None,
)
def test_what_is_missing_is_said(tree: Path, module: str, old: str, new: str, said: str) -> None:
    assert compat.CONTRACT.missing(tree) == []
    path = tree.joinpath(*module.split(".")[1:])
    path = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    missing = compat.CONTRACT.missing(tree)
    assert missing and any(said in sentence for sentence in missing), missing
    fits, why = compat.CONTRACT.would_attach(tree)
    assert not fits and said in why and "\n" not in why


@pytest.mark.parametrize("version", ["0.5.22", "0.5.23", "0.5.23.post1", "0.5.23rc1", "0.5.23+cu130"])
def test_known_versions(version: str) -> None:
    assert compat.CONTRACT.version_problem(version) is None


@pytest.mark.parametrize("version", ["0.5.21", "0.5.24", "0.5", "0.6.0", "1.0", "dev", None])
def test_unknown_versions_are_named_with_the_known_ones(version: str | None) -> None:
    problem = compat.CONTRACT.version_problem(version)
    assert problem is not None and "0.5.22 and 0.5.23" in problem
    assert version is None or version in problem


def test_no_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "installed_root", lambda: None)
    assert compat.would_attach() == (False, "SGLang is not installed")


def test_nothing_is_imported() -> None:
    code = (
        "import sys; from gdn_plugin.hosts.sglang import compat, plugin; compat.would_attach();"
        "print([m for m in ('torch', 'sglang', 'triton', 'flashinfer') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
