"""Links that leave docs/: on the repository's pages they lead to a file, on the site to a page made of that file."""

import ast
import posixpath
import re
from collections.abc import Iterable
from pathlib import Path

REPO = Path(__file__).parents[2]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
ORIGINS = {page: file for file, page in PAGES.items()}
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(\))")
UNIT = re.compile(r"(?<=[\d%]) (?=±)|(?<=\d) (?=%)|(?<=±) (?=\d)")  # a number and its error or unit stay in one line
CODE = re.compile(r"^(?:```.*?^```|(?: {4}|\t).*?$)", re.S | re.M)


def rewritten(markdown: str, page: str) -> str:
    """The text of a page of the site: links from its own place in the site, and no break before ± and %."""

    def link(found: re.Match[str]) -> str:
        before, path, anchor, after = found.groups()
        there = _page_of(_in_repository(page, path))
        return f"{before}{posixpath.relpath(there, posixpath.dirname(page) or '.')}{anchor or ''}{after}"

    def typeset(text: str) -> str:
        return UNIT.sub("\u00a0", LINK.sub(link, text))

    parts, end = [], 0
    for code in CODE.finditer(markdown):
        parts += [typeset(markdown[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, typeset(markdown[end:])])


def linked(pages: Iterable[tuple[str, str]]) -> set[str]:
    """Paths in the repository, outside of docs/, to which pages link that have no page of their own yet."""
    found = {_in_repository(page, path) for page, text in pages for _, path, _, _ in LINK.findall(CODE.sub("", text))}
    return {path for path in found if not path.startswith("docs/") and path not in PAGES and (REPO / path).exists()}


def source_page(path: str) -> str:
    """A page that shows a file, or lists the modules of a folder with their first sentences."""
    place = REPO / path
    if place.is_dir():
        files = sorted(place.glob("*.py"))
        lines = [f"- **{file.name}**: {_first_sentence(file)}" for file in files]
        return f"# {path}\n\n" + "\n".join(lines) + "\n"
    language = {".py": "python", ".toml": "toml"}.get(place.suffix, "text")
    return f"# {path}\n\n````{language}\n{place.read_text(encoding='utf-8')}````\n"


def _in_repository(page: str, path: str) -> str:
    """Where a link of a page leads, from the root of the repository."""
    folder = posixpath.dirname(ORIGINS.get(page, f"docs/{page}"))
    return posixpath.normpath(posixpath.join(folder, path))


def _page_of(path: str) -> str:
    """The page of the site that shows a file of the repository."""
    if path in PAGES:
        return PAGES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"source/{path}.md"


def _first_sentence(file: Path) -> str:
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split())
