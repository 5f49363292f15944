"""The documentation: every page can be found, every link leads somewhere, every public name is explained."""

import ast
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]
PAGES += [ROOT / "benchmarks/README.md"]

CODE = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?![a-z]+:)([^)#\s]*)(?:#([^)\s]*))?\)")
HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)
NAV_ENTRY = re.compile(r"^ +- .+: (\S+\.md)$", re.MULTILINE)
DIRECTIVE = re.compile(r"^::: (\S+)$", re.MULTILINE)


def text_of(page: Path) -> str:
    """Without blocks of code."""
    return CODE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Those of the headings, as hosts of repositories make them. (`mkdocs build --strict` checks those of the site.)"""
    words = (
        re.sub(r"[^\w\s-]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", title)) for title in HEADING.findall(text_of(page))
    )
    return {title.strip().lower().replace(" ", "-") for title in words}


def public_names() -> Iterator[str]:
    """Those of every `__all__` that users may import from, read without importing: frameworks may be missing."""
    package = ROOT / "fp8moe"
    patterns = ("*.py", "*/__init__.py", "integrations/*.py", "integrations/*/__init__.py")
    for path in {*chain.from_iterable(map(package.glob, patterns))} - {package / "quantize/__init__.py"}:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                yield from (f"{module}.{name}" for name in ast.literal_eval(node.value))


def test_every_page_is_in_the_navigation_once() -> None:
    entries = NAV_ENTRY.findall((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    own = [entry for entry in entries if entry != "index.md" and not entry.startswith("repository/")]
    assert sorted(own) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))
    elsewhere = [
        "README.md" if entry == "index.md" else entry.removeprefix("repository/") for entry in set(entries) - {*own}
    ]
    assert all((ROOT / path).is_file() for path in elsewhere), elsewhere


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_lead_to_files_and_headings(page: Path) -> None:
    broken = []
    for path, anchor in LINK.findall(text_of(page)):
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(f"{path}#{anchor}" if anchor else path)
    assert not broken


def test_every_public_name_is_in_the_reference_once() -> None:
    documented = [name for page in (DOCS / "api").glob("*.md") for name in DIRECTIVE.findall(page.read_text("utf-8"))]
    assert len(documented) == len(set(documented))
    public = set(public_names())
    assert {"fp8moe.FP8Config", "fp8moe.int8.Int8Experts", "fp8moe.integrations.torchtitan.experts"} <= public
    assert public - set(documented) == set()


def test_checks_see_what_is_broken(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A `b` c, d\n\n[x](gone.md) [y](page.md#a-b-c-d) [z](#nowhere)\n\n```\n[w](code.md)\n```\n")
    assert LINK.findall(text_of(page)) == [("gone.md", ""), ("page.md", "a-b-c-d"), ("", "nowhere")]
    assert anchors(page) == {"a-b-c-d"}
