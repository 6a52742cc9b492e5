"""The Markdown pages of this repository: their links, blocks of code, and the commands in them."""

import re
import shlex
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from textwrap import dedent

REPO = Path(__file__).parents[1]
PAGES = [*REPO.glob("*.md"), *sorted((REPO / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(```+)(\w*)[^\n]*\n(.*?)^\1$", re.S | re.M)
INDENTED = re.compile(r"(?:(?<=\n\n)|\A)(?: {4}.*\n+)+", re.M)
LINK = re.compile(r"(?<!\\)\]\(([^)\s]+)\)")
COMMAND = re.compile(r"(?:python tune\.py|atp-tune) (?P<words>[^`\n]*)")
WORD = re.compile(r"[^\w\- ]")
OUTPUT = re.compile(r"^ *(?:\||│|error:|study:)")


@dataclass(frozen=True)
class Block:
    """A block of code of a page: its language, "" if it is indented, its text, and where it is."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def named(path: Path) -> str:
    return str(path.relative_to(REPO))


def blocks(path: Path) -> list[Block]:
    """The blocks of a page, in their order."""
    text = path.read_text()
    found = [(match.start(), match[2], match[3]) for match in FENCE.finditer(text)]
    plain = FENCE.sub(lambda match: re.sub(r"[^\n]", "-", match[0]), text)
    found += [(match.start(), "", match[0].rstrip() + "\n") for match in INDENTED.finditer(plain)]
    return [
        Block(named(path), text[:start].count("\n") + 1, language, code if language else dedent(code))
        for start, language, code in sorted(found)
    ]


def filled(page: Path, by: str, table: str) -> None:
    """Puts a table between its two marks on a page; AssertionError if it was another one, which is then replaced."""
    first, last = f"<!-- written by {by}: -->", f"<!-- : written by {by} -->"
    text = page.read_text()
    head, begun, rest = text.partition(first)
    made = f"{head}{first}\n{table}\n{last}{rest.partition(last)[2]}"
    assert begun, f"{page.name} has no {first}"
    if made != text:
        page.write_text(made)
    assert made == text, f"{page.name} was not up to date, and has been written anew"


def prose(path: Path) -> str:
    """A page without its blocks."""
    text = FENCE.sub("", path.read_text())
    return INDENTED.sub("\n", text)


def commands(path: Path, inline: bool = True) -> list[list[str]]:
    """The arguments of each `python tune.py …` and `atp-tune …` of a page, in blocks, and in sentences if `inline`."""
    texts = [line for block in blocks(path) if block.language in ("", "sh") for line in _lines(block.text)]
    texts += [code for code in re.findall(r"`([^`]+)`", prose(path).replace("\n", " ")) if inline]
    return [words for text in texts for words in _commands(text)]


def steps(path: Path) -> list[list[str] | str]:
    """What a reader runs, in its order: the arguments of each command of a page's blocks, and its blocks of Python."""
    found: list[list[str] | str] = []
    for block in blocks(path):
        if block.language == "python":
            found.append(block.text)
        elif block.language in ("", "sh"):
            found += [words for line in _lines(block.text) for words in _commands(line)]
    return found


def _commands(text: str) -> list[list[str]]:
    found = COMMAND.finditer(text.replace("python tune.py", "\npython tune.py"))
    return [_words(match["words"]) for match in found if "…" not in match["words"]]


def _lines(text: str) -> list[str]:
    return [line for line in re.sub(r"\s*\\\n\s*", " ", text).splitlines() if not OUTPUT.match(line)]


def _words(line: str) -> list[str]:
    """The words of a command, up to a comment, the end of the command, or the quotation mark that it stands in."""
    line = re.split(r"\s#\s", line)[0]
    lexer = shlex.shlex(line.rstrip('"') if line.count('"') % 2 else line, posix=True, punctuation_chars="|;&>()")
    lexer.whitespace_split, lexer.commenters = True, ""
    return list(takewhile(lambda word: not set(word) <= set("|;&>()"), lexer))


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and Python-Markdown make them."""
    text = FENCE.sub("", path.read_text())
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {WORD.sub("", title.lower()).strip().replace(" ", "-") for title in titles}
