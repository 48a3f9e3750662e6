"""What docs/troubleshooting.md quotes is what the code says."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"
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


def test_links_of_the_documentation_lead_to_files():
    for page in [*(ROOT / "docs").glob("*.md"), ROOT / "examples" / "recall" / "README.md"]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"
