"""What docs/troubleshooting.md quotes is what the code says; pages that can be read; links that lead somewhere."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"
CPU = ROOT / "gdn_plugin" / "backends" / "cpu"
GAP = "…"


@functools.cache
def strings() -> tuple[str, ...]:
    """Every string of the package, values in f-strings as gaps, adjacent literals joined as Python joins them."""
    found = []
    for path in sorted((ROOT / "gdn_plugin").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [str(v.value) if isinstance(v, ast.Constant) else GAP for v in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return tuple(found)


def quoted() -> list[str]:
    """Quotations that a reader would compare with a message: in bold, or in the first column of a table."""
    text = PAGE.read_text(encoding="utf-8").split("## Known trouble upstream")[0]
    bold = re.findall(r"\*\*`([^`]+)`\*\*", text, re.DOTALL)
    cells = [cell for row in re.findall(r"^\| (`.+?) \|", text, re.MULTILINE) for cell in re.findall(r"`([^`]+)`", row)]
    return [" ".join(quotation.split()) for quotation in bold + cells]


def occurs(quotation: str, string: str) -> bool:
    """Whether the quotation's pieces stand in the string in order; its gaps may swallow any text."""
    pattern = "".join(".*" if piece == GAP else re.escape(piece) for piece in re.split(f"({GAP})", quotation))
    # A gap of the code may be quoted by an example of what it prints, so every literal piece is looked for.
    return re.search(pattern, " ".join(string.split()), re.DOTALL) is not None


# Rows without words of their own: composed of two fields of a KnownBad.
COMPOSED = ("… … … (…)",)


@pytest.mark.parametrize("quotation", [q for q in dict.fromkeys(quoted()) if q not in COMPOSED])
def test_a_quoted_error_is_in_the_code(quotation):
    assert len(quotation.replace(GAP, "").strip()) > 5, "a quotation needs words to be compared by"
    assert any(occurs(quotation, string) for string in strings()), f"no string of gdn_plugin reads {quotation!r}"


def test_the_comparison_can_fail():
    assert not any(occurs("needs … unicorns, found …", string) for string in strings())
    assert len(quoted()) > 30


def test_known_bad_rows_are_all_on_the_page():
    from gdn_plugin.registry.known_bad import KNOWN_BAD

    text = PAGE.read_text(encoding="utf-8")
    for row in KNOWN_BAD:
        for number in re.findall(r"#\d+", row.issue):
            assert number in text, f"{row.issue} is not in docs/troubleshooting.md"


PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("README.md")],
    key=lambda page: page.as_posix(),
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
class TestPages:
    def test_links_lead_to_files(self, page):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"links to {target}, which does not exist"

    def test_files_that_are_named_exist(self, page):
        """`gdn_plugin/registry/table.py`, and `registry/table.py` for what lies in the package."""
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"`((?:[a-z_0-9]+/)+[a-z_0-9]+\.(?:py|h|cpp|sh|md))`", text):
            places = (ROOT, ROOT / "gdn_plugin", ROOT / "gdn_plugin" / "backends", CPU, page.parent)
            assert any((place / name).exists() for place in places), f"{name} does not exist"

    def test_no_line_is_longer_than_160(self, page):
        found = [
            f"{n}: {line[:60]}" for n, line in enumerate(page.read_text("utf-8").splitlines(), 1) if len(line) > 160
        ]
        assert not found


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_is_one_page_in_its_order():
    assert len(readme().splitlines()) <= 100
    headings = re.findall(r"^## (.*)", readme(), re.MULTILINE)
    assert headings == [
        "What it gives", "Beside vLLM", "Beside SGLang", "From a checkout, two commands", "Choosing a backend", "More"
    ]  # fmt: skip


def test_the_readme_lists_every_setting_and_backend():
    from gdn_plugin.registry.table import BUILTIN_NAMES
    from gdn_plugin.settings import TABLE

    for name in TABLE:
        _, _, phase = name.partition("GDN_PLUGIN_")[2].partition("_BACKEND")[0].rpartition("_")
        assert name in readme() or f"`_{phase}_BACKEND`" in readme(), name
    for name in BUILTIN_NAMES:
        assert f"| `{name}` |" in readme()


def test_nothing_is_installed_from_an_index_that_does_not_have_the_package():
    for page in PAGES:
        assert not re.search(r"pip install '?gdn-plugin", page.read_text(encoding="utf-8")), page.name
