"""Which way imports go, what importing costs, and what the package says of itself."""

from __future__ import annotations

import ast
import graphlib
import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import gdn_plugin
from gdn_plugin.registry.backend import in_build

ROOT = Path(gdn_plugin.__file__).parent
PYPROJECT = ROOT.parent / "pyproject.toml"
FILES = sorted(path for path in ROOT.rglob("*.py") if "__pycache__" not in path.parts)
NAMES = {path.relative_to(ROOT).as_posix() for path in FILES}
HEAVY = ("torch", "triton", "flashinfer", "cutlass", "vllm", "sglang", "transformers")
# Rooms from the lowest floor up: a room imports its own files and those of lower floors, when a file is imported.
FLOORS = {
    "settings.py": 0,
    "cache.py": 1,
    "child.py": 1,
    "registry": 2,
    "ops": 3,
    "backends": 4,
    "hosts": 4,
    "plugin.py": 5,
    "tools": 6,
}
# What these import lazily, in a function, from a room that is not below them.
LAZY = {("plugin.py", "hosts"), ("__main__.py", "tools")}


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, whether it is imported with the file) of every import, relative ones resolved."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    found = []
    for node in ast.walk(tree):
        at_import = id(node) not in inside and id(node) not in typing_only
        if isinstance(node, ast.Import):
            found += [(alias.name, at_import) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                package = ["gdn_plugin", *path.relative_to(ROOT).parent.parts]
                module = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
            else:
                module = node.module or ""
            found += [(f"{module}.{alias.name}", at_import) for alias in node.names]
    return found


def within(module: str, *rooms: str) -> bool:
    return any(module == room or module.startswith(f"{room}.") for room in rooms)


def room(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def floor(name: str) -> tuple[str, int] | None:
    """(room, floor) of a path inside the package, or of a module's name; None for the package itself."""
    parts = name.removeprefix("gdn_plugin").strip("./").replace("/", ".").removesuffix(".py").split(".")
    top = parts[0] if parts[0] in FLOORS else f"{parts[0]}.py"
    return (top, FLOORS[top]) if top in FLOORS else None


@pytest.mark.parametrize("path", FILES, ids=room)
def test_imports_run_one_way(path):
    own = floor(room(path))
    for module, at_import in imports(path):
        assert not within(module, "ops", "registry"), f"{module}: the links at the top are no packages"
        if within(module, "vllm"):
            assert room(path).startswith("hosts/vllm/"), module
        if within(module, "sglang"):
            assert room(path).startswith("hosts/sglang/"), module
        found = floor(module) if within(module, "gdn_plugin") else None
        if found is None or own is None:
            continue
        (mine, my_floor), (theirs, their_floor) = own, found
        if mine == theirs:
            # No backend knows another one, and no host another one.
            if mine in ("backends", "hosts"):
                subroom, other = (x.split(".")[2] for x in ("gdn_plugin." + dotted(path) + ".", module + "."))
                assert subroom == other or f"{mine}/{other}.py" in NAMES or other == "", module
            continue
        if theirs == "backends":
            assert mine == "tools", f"{module}: backends are loaded by name"
        assert their_floor < my_floor or (not at_import and (room(path), theirs) in LAZY), module


def dotted(path: Path) -> str:
    return room(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def test_no_circle_between_files():
    """Not even one that is lazy: a file that is taken apart alone can be read alone."""
    known = {f"gdn_plugin.{dotted(path)}" if room(path) != "__init__.py" else "gdn_plugin": path for path in FILES}
    arrows: dict[str, set[str]] = {name: set() for name in known}
    for name, path in known.items():
        for module, _ in imports(path):
            while module and module not in known:
                module = module.rpartition(".")[0]
            # A package's __init__ that its own files import by name of a sibling is not the sibling.
            if module and module != name and not name.startswith(f"{module}."):
                arrows[name].add(module)
    assert circles(arrows) == []


def circles(arrows: dict[str, set[str]]) -> list[str]:
    """One circle, if there is any."""
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) != []
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize(
    "path", [path for path in FILES if not room(path).startswith(("tools/", "backends/"))], ids=room
)
def test_no_mock_and_no_backends_name_above_the_registry(path):
    text = path.read_text(encoding="utf-8")
    assert "unittest" not in text
    if room(path).startswith("registry/"):
        return
    strings = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
    assert not {"flashinfer", "triton", "torch"} & {s for s in strings if isinstance(s, str)}, room(path)


@pytest.mark.parametrize("path", [path for path in FILES if room(path).startswith("registry/")], ids=room)
def test_the_registry_reads_the_machine_in_one_module_only(path):
    for module, at_import in imports(path):
        if within(module, *HEAVY):
            assert room(path) == "registry/probe.py" and not at_import, module


def test_no_folder_has_the_name_of_a_package_that_files_beside_it_import():
    for folder in (path for path in ROOT.rglob("*") if path.is_dir() and path.name != "__pycache__"):
        beside = list(folder.parent.glob("*.py"))
        for path in beside:
            for module, _ in imports(path):
                assert module.split(".")[0] != folder.name, f"{room(path)} imports {module} beside folder {folder.name}"


@pytest.mark.parametrize(
    "modules",
    [
        "gdn_plugin",
        "gdn_plugin.registry",
        "gdn_plugin.settings",
        "gdn_plugin.plugin",
        "gdn_plugin.hosts.sglang.plugin",
        "gdn_plugin.tools.cli.doctor",
    ],
)
def test_importing_is_light(modules):
    if not in_build(f"{modules}:"):
        pytest.fail(f"{modules} is missing")
    code = f"import sys, {modules}; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, timeout=120, check=True
    )
    assert shown.stdout.strip() == "[]"


def test_doctor_on_a_simulated_machine_imports_nothing_heavy():
    code = (
        "import sys; from gdn_plugin.registry import *; "
        "p = Platform.simulated('sm_100'); "
        "print(choose(p, Problem('prefill', 'bfloat16', 'float32', 16, 32, 128, 128, padding='scratch')).name); "
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, timeout=120, check=True
    )
    assert shown.stdout.split() == ["flashinfer", "[]"]


class TestMetadata:
    @pytest.fixture
    def project(self):
        return tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]

    def test_versions_agree(self, project):
        assert project["version"] == gdn_plugin.__version__

    def test_entry_points_lead_somewhere(self, project):
        assert project["entry-points"] == {
            "vllm.general_plugins": {"gdn_plugin": "gdn_plugin.plugin:register"},
            "sglang.srt.plugins": {"gdn_plugin": "gdn_plugin.hosts.sglang.plugin:register"},
        }
        assert project["scripts"] == {"gdn-plugin": "gdn_plugin.tools.cli:main"}
        doors = [point["gdn_plugin"] for point in project["entry-points"].values()]
        for target in (*doors, "gdn_plugin.tools.cli:main"):
            module, _, function = target.partition(":")
            __import__(module)
            assert callable(getattr(sys.modules[module], function))

    def test_extras_are_the_ones_that_messages_name(self, project):
        assert {"vllm", "sglang", "triton", "flashinfer", "dev"} <= set(project["optional-dependencies"])
        flashinfer = " ".join(project["optional-dependencies"]["flashinfer"])
        assert "flashinfer-python>=0.6.14" in flashinfer
        assert "nvidia-cutlass-dsl[cu13]>=4.4.2" in flashinfer

    def test_the_installed_entry_point_is_this_one(self):
        try:
            importlib.metadata.version("gdn-plugin")
        except importlib.metadata.PackageNotFoundError:
            pytest.skip("gdn-plugin is not installed: pip install -e .")
        points = importlib.metadata.entry_points(group="vllm.general_plugins", name="gdn_plugin")
        assert [point.value for point in points] == ["gdn_plugin.plugin:register"]
