"""The texts of `language_models.py`: pages of Debian's manuals, each page in one of four parts, and news.

Pages are read from the packages themselves, of the versions and SHA-256 below, as plain text. A paragraph stays in the
first page that has it, so that parts share neither pages nor paragraphs. The parts: training (the models see nothing
else), calibration, validation, test. News are of another kind, and no model sees any.
"""

import gzip
import hashlib
import io
import json
import re
import subprocess
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from atp_tune.checkpoints.convert import download_wheel
from atp_tune.utils.cache import sha256_of, write_out

SHARES = {"training": 0.92, "calibration": 0.03, "validation": 0.02, "test": 0.03}  # of all characters
SHORTEST, LONGEST = 500, 150_000  # characters of a page; others are contents, indexes and lists of changes
NEWS_WHEEL = ("gensim==4.4.0", "gensim/test/test_data/lee_background.cor")  # 300 articles
NEWS_SHA256 = "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb"  # of the file in the wheel
OMITTED = frozenset(("head", "script", "style", "nav", "header", "footer", "svg", "title"))
HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")
BLOCKS = frozenset((*HEADINGS, "p", "div", "li", "ul", "ol", "dl", "dt", "dd", "pre", "table", "tr", "caption"))


@dataclass(frozen=True)
class Package:
    """A Debian package; `pages`: a regular expression for the paths of its English pages."""

    name: str
    version: str
    sha256: str
    pages: str


PACKAGES = (
    Package("debian-faq", "12.2",
            "303f1c9de1d5858975490dd9f50a84fcd1c22f04c584a01afc30b5b4fc4fe52d", r"\.en\.html$"),
    Package("debian-handbook", "11.20220922",
            "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa", r"/en-US/.*\.html$"),
    Package("debian-policy", "4.7.2.0",
            "942fe167dc16d7f623e5c996332fa50f8b49b8a9970fc219d9ef5775772d0dd1", r"policy\.html/[^/]*\.html$"),
    Package("debian-reference-en", "2.127",
            "81d62f642c571dd5ad2de4aa56ba953c488fc9a0aaf0336dc4ef120ff9e367ce", r"\.en\.html$"),
    Package("debmake-doc", "1.22-1",
            "b747a0d2f11a23313ca2e58e2baf8e7530cc5833dfa9366bcf56e7adbdae3939", r"\.en\.html$"),
    Package("developers-reference", "13.20",
            "fec366e4b20ea0a74e9990340047c5d5e71d51aa2884ce62e17e59e7ad728015", r"developers-reference/[^/]*\.html$"),
    Package("doc-debian", "11.3+nmu1",
            "b9bff49f22b334cb6fedc071d81669e72cc2fa0dcd65e110785f69d9941f2773", r"\.txt(\.gz)?$"),
    Package("gimp-help-en", "3.0.0-4",
            "b18e0b0763de45eb66a65305c443cf2a03572ec42fc01d6bb2817c5b33e600bf", r"/help/en/.*\.html$"),
    Package("git-doc", "1:2.47.3-0+deb13u1",
            "5051bf2c067c96b7622632d82895f89720f70ec64c2bda10a1b8311b0538df48", r"\.html$"),
    Package("installation-guide-amd64", "20250803+deb13u1",
            "c8fa00404f19f3f108a8242d9d0f341a3cf7565aceb31802ce6b14e2b054bae4", r"/en/.*\.html$"),
    Package("maint-guide", "1.2.53",
            "762c8a400a36668d2eb814a3ba356b06488fd889dfce478eb11d5cfb189a47b5", r"\.en\.html$"),
    Package("postgresql-doc-17", "17.12-0+deb13u1",
            "d2bcd368b73c1a908043f337f794dd1b0aaf6062724313b1211d9edd0e6289c3", r"\.html$"),
    Package("python-django-doc", "3:4.2.30-0+deb13u1",
            "25e2b8b0032a465059a94b735469f3daa164e2bfc039c1051c7593295fba3e76", r"/html/(?!_|gen).*\.html$"),
    Package("python3.13-doc", "3.13.5-2+deb13u5",
            "a8a924637eeb25e666df5bbf7660ae09eb280be9effa39f9f6929e7a452bf65c", r"/html/.*\.html$"),
    Package("sqlite3-doc", "3.46.1-7+deb13u2",
            "67d28cb8ec314c609a6b3bd9d91315276843251635ac7fba52247859e58f742f", r"\.html$"),
)  # fmt: skip


class Paragraphs(HTMLParser):
    """The text of a page, paragraph by paragraph, in `found`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._own: list[str] = []
        self._omitted = self._kept_as_it_is = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        """A block begins a paragraph."""
        if tag in BLOCKS:
            self.end()
        self._omitted += tag in OMITTED
        self._kept_as_it_is += tag == "pre"
        if tag in ("td", "th", "br"):
            self._own.append(" ")

    def handle_endtag(self, tag: str) -> None:
        """And ends one."""
        if tag in BLOCKS:
            self.end()
        self._omitted -= tag in OMITTED and self._omitted > 0
        self._kept_as_it_is -= tag == "pre" and self._kept_as_it_is > 0

    def handle_data(self, data: str) -> None:
        """Text, without marks of links."""
        if not self._omitted:
            self._own.append(re.sub("[¶\uf0c1]", "", data))

    def end(self) -> None:
        """Puts the paragraph that was read to the others; code keeps its lines."""
        text, self._own = "".join(self._own), []
        text = text.strip("\n").rstrip() if self._kept_as_it_is else " ".join(text.split())
        if text:
            self.found.append(text)


def paragraphs(name: str, content: str) -> list[str]:
    """The paragraphs of a page, HTML or plain text by its name."""
    if not name.removesuffix(".gz").endswith(".html"):
        return [" ".join(part.split()) for part in re.split(r"\n\s*\n", content) if part.strip()]
    parser = Paragraphs()
    parser.feed(content)
    parser.close()
    parser.end()
    return parser.found


def once(pages: Iterable[list[str]]) -> list[str]:
    """Pages as texts; each paragraph stays in the first page that has it, then short and long pages are left out."""
    seen: set[str] = set()
    found = []
    for page in pages:
        own = [text for text in dict.fromkeys(page) if text not in seen]
        if SHORTEST <= sum(map(len, own)) <= LONGEST:
            seen.update(own)
            found.append("\n\n".join(own))
    return found


def parts_of(documents: Iterable[str]) -> dict[str, list[str]]:
    """Which part has which documents: in the order of their SHA-256, cut at shares of all characters."""
    ordered = sorted(documents, key=lambda text: hashlib.sha256(text.encode()).digest())
    whole, begun = sum(map(len, ordered)), 0
    ends, end = {}, 0.0
    for part, share in SHARES.items():
        ends[part] = end = end + share
    found: dict[str, list[str]] = {part: [] for part in SHARES}
    for text in ordered:
        part = next((part for part, end in ends.items() if begun < end * whole), "test")
        found[part].append(text)
        begun += len(text)
    return found


def of_package(package: Package, file: Path) -> Iterator[list[str]]:
    """The pages of a package's file, in the order of their paths."""
    if sha256_of(file) != package.sha256:
        raise SystemExit(f"{file} is not {package.name} {package.version}: its SHA-256 is another")
    unpacked = subprocess.run(["dpkg-deb", "--fsys-tarfile", file], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(unpacked)) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            if member.isfile() and re.search(package.pages, member.name):
                stream = archive.extractfile(member)
                assert stream is not None
                yield paragraphs(member.name, _decoded(member.name, stream.read()))


def _decoded(name: str, content: bytes) -> str:
    return (gzip.decompress(content) if name.endswith(".gz") else content).decode(errors="ignore")


def of_folder(folder: Path) -> Iterator[list[str]]:
    """The .html and .txt files below a folder."""
    for file in sorted(path for path in folder.rglob("*") if path.suffix in (".html", ".txt")):
        yield paragraphs(file.name, file.read_text(encoding="utf-8"))


def fetched(package: Package, folder: Path) -> Path:
    """The file of a package in a folder; apt downloads it if it is not there."""
    escaped = package.version.replace(":", "%3a")
    file = folder / f"{package.name}_{escaped}_all.deb"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"{package.name} {package.version}", flush=True)
        subprocess.run(["apt-get", "download", f"{package.name}={package.version}"], cwd=folder, check=True)
    return file


def news(folder: Path) -> list[str]:
    """The articles of the wheel, which is downloaded if it is not in the folder."""
    wheel = next(folder.glob("gensim-4.4.0-*.whl"), None) or download_wheel(NEWS_WHEEL[0], folder)
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(NEWS_WHEEL[1])
    if hashlib.sha256(content).hexdigest() != NEWS_SHA256:
        raise SystemExit(f"{NEWS_WHEEL[1]} of {NEWS_WHEEL[0]} has another SHA-256")
    return content.decode().splitlines()


def write_parts(parts: Mapping[str, list[str]], folder: Path) -> None:
    """A file PART.jsonl for each."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, documents in parts.items():
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
        write_out(folder / f"{part}.jsonl", "".join(lines).encode())
