"""What `scripts/site` adds to the pages of docs/: the home page, generated pages, and pages of linked files."""

import html
import posixpath
import re
from collections.abc import Iterator
from typing import Any

import command_pages
import outside_links
import setting_pages
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import atp_tune

PICTURE = re.compile(r"^!\[(.*)\]\((\S+\.svg)\)$", re.MULTILINE)  # alone in its paragraph
PANEL = re.compile(r'<g transform="translate\((\d+),(\d+)\)"><svg [^>]*width="(\d+)" height="(\d+)"')
HIDE = "---\nhide: [navigation]\n---\n\n"  # it would hold this page alone
BUTTONS = """
[First study](docs/tutorials/first-study.md){ .md-button .md-button--primary }
[Your own model](docs/tutorials/own-model.md){ .md-button }
[All settings](docs/reference/settings.md){ .md-button }
{ .buttons }

"""
RETURNED = {  # what public functions and methods return, by the module that defines it
    "Config": "atp_tune.config.best",
    "Summary": "atp_tune.results.summary",
    "Perplexity": "atp_tune.measures",
    "Continuations": "atp_tune.metrics",
    "ZeroShot": "atp_tune.config.best",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are no files of docs/."""
    pages = dict(_pages())
    texts = {file.src_uri: file.content_string for file in files.documentation_pages()}
    for path in outside_links.linked([*texts.items(), *pages.items()]):
        pages[f"source/{path}.md"] = outside_links.source_page(path)
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turns links from places in the repository to places in the site."""
    name = page.file.src_uri
    if name.startswith(("source/", "reference/")):
        return markdown
    return PICTURE.sub(lambda found: _panels(found, posixpath.dirname(name)), outside_links.rewritten(markdown, name))


def _panels(found: re.Match[str], folder: str) -> str:
    """A picture of several figures (`scripts/picture`) as one image each, which a phone shows one below the other."""
    file = outside_links.REPO / "docs" / folder / found[2]
    images = [
        f'<img alt="{html.escape(found[1]) if (x, y) == ("0", "0") else ""}" style="aspect-ratio: {width}/{height}"'
        f' src="{found[2]}#svgView(viewBox({x},{y},{width},{height}))">'
        for x, y, width, height in PANEL.findall(file.read_text(encoding="utf-8"))
    ]
    return f'<p class="panels">{"".join(images)}</p>' if images else found[0]


def _pages() -> Iterator[tuple[str, str]]:
    for file, name in outside_links.PAGES.items():
        text = (outside_links.REPO / file).read_text(encoding="utf-8")
        yield name, _home(text) if name == "index.md" else text
    yield "reference/settings.md", setting_pages.page()
    yield "reference/commands.md", command_pages.page()
    yield "reference/python.md", _python()


def _home(readme: str) -> str:
    """The README with buttons below its first sentence."""
    title, sentence, rest = readme.split("\n\n", 2)
    return "\n\n".join([HIDE + title, sentence, BUTTONS.strip(), rest])


def _python() -> str:
    """A page of the public names of atp_tune, where they are defined: functions, classes, then what calls return."""
    parts = [f"# Python\n\n{(atp_tune.__doc__ or '').strip()}\n"]
    public = {name: getattr(atp_tune, name) for name in getattr(atp_tune, "__all__", ())}
    for name in sorted(public, key=lambda name: isinstance(public[name], type)):
        place = f"{public[name].__module__}.{public[name].__qualname__}"
        parts.append(f"::: {place}\n    options:\n      heading: atp_tune.{name}\n      toc_label: {name}\n")
    parts.append("## What calls return\n")
    for name, place in RETURNED.items():
        parts.append(f"::: {place}.{name}\n    options:\n      heading: {name}\n      toc_label: {name}\n")
    return "\n".join(parts)
