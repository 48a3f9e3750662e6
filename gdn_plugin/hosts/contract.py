"""Whether a host's source has what the plugin needs of it: names, signatures, fields. Knows no host.

Read with `ast`, never imported: importing a serving engine's layers costs seconds and, on a GPU machine, initialises
CUDA in a process that may be about to fork. The same check serves the start of a plugin (the installed host) and
`gdn-plugin doctor --host-contract DIR` (one unpacked from its wheel).
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from packaging.version import InvalidVersion, Version


@dataclass(frozen=True, slots=True)
class Need:
    """One thing of the host that the plugin calls, overrides or reads.

    Args:
        module: dotted name of the module that defines it.
        name: of a class, function or constant at the module's top level.
        member: of a method of that class, "" for the thing itself.
        parameters: names that its signature must have, in this order (others may follow or stand between).
        fields: names that the class must have, as annotated fields or as attributes that its methods assign to self.
        value: for a constant, what it must be.
        why: what the plugin does with it.
    """

    module: str
    name: str
    why: str
    member: str = ""
    parameters: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    value: object = None

    def __str__(self) -> str:
        return f"{self.module}.{self.name}" + (f".{self.member}" if self.member else "")


@dataclass(frozen=True, slots=True)
class Contract:
    """What the plugin needs of one host.

    Args:
        host: what people call it.
        package: what Python calls it.
        supported: the first numbers of the versions that the needs were read from.
        needs: everything that is called, overridden or read.
    """

    host: str
    package: str
    supported: tuple[tuple[int, ...], ...]
    needs: tuple[Need, ...]

    def version_problem(self, version: str | None) -> str | None:
        """Why a version is not one of the supported ones, in one sentence; None where it is."""
        known = " and ".join(".".join(map(str, numbers)) + ".x" * (len(numbers) < 3) for numbers in self.supported)
        if version is None:
            return f"the version of {self.host} could not be read; known are {known}"
        try:
            release = (*Version(version).release, 0, 0)
        except InvalidVersion:
            return f"{self.host} {version!r} is not a version number; known are {known}"
        if any(release[: len(numbers)] == numbers for numbers in self.supported):
            return None
        return f"{self.host} {version} is not a version this plugin knows; known are {known}"

    def missing(self, root: str | Path) -> list[str]:
        """Everything that an unpacked host does not have, one sentence each; empty where all is there.

        Args:
            root: the folder of the package itself, or the one that holds it. Nothing is imported.
        """
        return unmet(self.needs, package_root(self.package, root))

    def would_attach(self, root: Path | None) -> tuple[bool, str]:
        """Whether the plugin would serve with the host in `root` (None: not installed), and why, in one sentence.

        Knows nothing of other plugins: whether one of them has the same class shows only inside a running engine.
        """
        if root is None:
            return False, f"{self.host} is not installed"
        version = version_of(root)
        problem = self.version_problem(version)
        if problem is not None:
            return False, problem
        missing = self.missing(root)
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            return False, f"{self.host} {version} lacks what the plugin needs: {missing[0]}{more}"
        return True, f"{self.host} {version} has everything the plugin needs"


def unmet(needs: Iterable[Need], root: str | Path) -> list[str]:
    """Every need that a source tree does not meet, one sentence each; empty where all are met.

    Args:
        root: the folder of the host's package itself.
    """
    missing = []
    trees: dict[str, ast.Module | str] = {}
    for need in needs:
        if need.module not in trees:
            trees[need.module] = _parse(Path(root), need.module)
        tree = trees[need.module]
        problem = tree if isinstance(tree, str) else _unmet(need, tree)
        if problem is not None and problem not in missing:
            missing.append(problem)
    return missing


def package_root(package: str, directory: str | Path) -> Path:
    """The folder of a package, given itself or its parent."""
    directory = Path(directory)
    return directory / package if (directory / package / "__init__.py").exists() else directory


def installed_root(package: str) -> Path | None:
    """Where a package is installed; None where it is not. Nothing is imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def version_of(root: Path) -> str | None:
    """The version written in a tree's `_version.py`; None where there is none."""
    try:
        text = (root / "_version.py").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    found = re.search(r"^(?:__version__\s*=\s*)?(?:version|__version__)\s*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return found.group(1) if found else None


def _parse(root: Path, module: str) -> ast.Module | str:
    """The module's tree, or a sentence that says why there is none."""
    path = root.joinpath(*module.split(".")[1:])
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.exists():
            try:
                return ast.parse(candidate.read_text(encoding="utf-8"))  # whatever the locale
            except (OSError, SyntaxError, ValueError) as problem:
                return f"{module} cannot be read: {problem}"
    return f"{module} is missing"


def _unmet(need: Need, tree: ast.Module) -> str | None:
    node = _top_level(tree, need.name)
    if node is None:
        return f"{need.module}.{need.name} is missing ({need.why})"
    if need.value is not None:
        value = getattr(node, "value", None)
        if not isinstance(value, ast.Constant) or value.value != need.value:
            return f"{need} is not {need.value!r} ({need.why})"
    if need.member:
        methods = [n for n in getattr(node, "body", []) if isinstance(n, ast.FunctionDef) and n.name == need.member]
        if not methods:
            return f"{need} is missing ({need.why})"
        node = methods[-1]
    if need.parameters:
        if not isinstance(node, ast.FunctionDef):
            return f"{need} is not a function ({need.why})"
        found = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        if [name for name in found if name in need.parameters] != list(need.parameters):
            return f"{need} takes ({', '.join(found)}), not ({', '.join(need.parameters)}) ({need.why})"
    lacking = [name for name in need.fields if name not in _fields(node)]
    if lacking:
        return f"{need} has no {', '.join(lacking)} ({need.why})"
    return None


def _top_level(tree: ast.Module, name: str) -> ast.AST | None:
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return node
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return node
    return None


def _fields(node: ast.AST) -> set[str]:
    """Annotated fields of a class, and attributes that its methods assign to self."""
    names = set()
    for child in ast.walk(node):
        targets = child.targets if isinstance(child, ast.Assign) else [getattr(child, "target", None)]
        for target in targets:
            if isinstance(target, ast.Name) and isinstance(child, ast.AnnAssign):
                names.add(target.id)
            if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
                names.add(target.attr)
    return names
