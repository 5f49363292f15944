"""A hook of MkDocs: makes links that leave docs/ work on the site, and colours code.

Pages link to files of the repository by relative paths, which work where the repository is hosted. On the site such a
file becomes `repository/PATH`: a page if it is Markdown, else its text with colours. So the site needs no other host.
The README is its first page.
"""

import re
from os.path import normpath, relpath
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_for_filename

ROOT = Path(__file__).resolve().parent.parent
START = "README.md", "index.md"
FOLDER = "repository/"
RELATIVE_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|[#/])([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside docs/ that pages link to, those that these link to in turn, and the colours of code."""
    pages = [path_of(file.src_uri) for file in files.documentation_pages()]
    targets = {START[0]}.union(*(targets_outside(page) for page in pages))
    added: set[str] = set()
    while targets:
        target = targets.pop()
        added.add(target)
        is_page = target.endswith(".md")
        files.append(File.generated(config, uri_of(target), content=read(target) if is_page else coloured(target)))
        targets |= (targets_outside(target) if is_page else set()) - added
    light, dark = (HtmlFormatter(style=style) for style in ("default", "github-dark"))
    css = light.get_style_defs(".highlight") + "\n" + dark.get_style_defs("[data-bs-theme=dark] .highlight")
    files.append(File.generated(config, "code.css", content=css))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to where their targets are on the site. MkDocs tells of those that lead nowhere."""
    here = path_of(page.file.src_uri)
    for written, target in links(here, markdown):
        link = relpath(uri_of(target), PurePosixPath(page.file.src_uri).parent)
        markdown = re.sub(rf"(?<=\]\(){re.escape(written)}(?=[)#])", link, markdown)
    return with_deeper_items(markdown)


def with_deeper_items(markdown: str) -> str:
    """What belongs to an item of a list is indented by two spaces in our pages, and for Python-Markdown by four."""
    lines, in_code = [], False
    for line in markdown.split("\n"):
        in_code ^= line.startswith("```")
        lines.append("  " + line if line.startswith("  ") and not in_code else line)
    return "\n".join(lines)


def links(page: str, markdown: str) -> set[tuple[str, str]]:
    """Relative links of a page, as they are written, and their targets, both pages named from the repository's root."""
    return {(link, normpath(PurePosixPath(page).parent / link)) for link in RELATIVE_LINK.findall(markdown)}


def targets_outside(page: str) -> set[str]:
    targets = {target for _, target in links(page, read(page))}
    return {target for target in targets if not target.startswith("docs/") and (ROOT / target).is_file()}


def uri_of(path: str) -> str:
    """Where a file of the repository is on the site."""
    if path == START[0]:
        return START[1]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return FOLDER + path if path.endswith(".md") else f"{FOLDER}{path}.html"


def path_of(uri: str) -> str:
    """Where a page of the site is in the repository."""
    if uri == START[1]:
        return START[0]
    return uri.removeprefix(FOLDER) if uri.startswith(FOLDER) else f"docs/{uri}"


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def coloured(path: str) -> str:
    formatter = HtmlFormatter(full=True, title=path, linenos="inline", lineanchors="L")
    return highlight(read(path), get_lexer_for_filename(path), formatter)
