"""Documents of datasets on the Hugging Face hub: c4, wikitext2, hub:ORG/NAME."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atp_tune.cache import sha256_of_json
from atp_tune.checkpoints.convert import one_line, quiet
from atp_tune.errors import UserError
from atp_tune.spec.data import Text

C4_FILES = {
    "train": "en/c4-train.00000-of-01024.json.gz",  # the file that Wanda and SparseGPT read
    "validation": "en/c4-validation.00000-of-00008.json.gz",
}


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

    arguments: Callable[[Text], dict[str, Any]]
    form: str = ""

    def read(self, text: Text, base: Path) -> Sequence[str]:
        """The documents, which stay on disk and are read by index; UserError if the dataset cannot be loaded."""
        import datasets

        arguments = self.revised_arguments(text)
        try:
            with quiet("datasets", "huggingface_hub"):
                rows = datasets.load_dataset(**arguments)
        except Exception as error:  # network and readers raise many types
            raise hub_error(arguments["path"], error) from error
        check_column(text, rows.column_names)
        if getattr(rows.features[text.column], "dtype", "") not in ("string", "large_string"):
            raise UserError(f'column: "{text.column}" of {text.source} holds no text')
        return Column(rows, text.column)

    def identify(self, text: Text, base: Path) -> str:
        """SHA-256 of the address of the dataset, not of its content."""
        return sha256_of_json(self.revised_arguments(text))

    def revised_arguments(self, text: Text) -> dict[str, Any]:
        """All arguments of `datasets.load_dataset`, with the revision."""
        return self.arguments(text) | {"revision": text.revision}


def check_column(text: Text, names: Sequence[str], where: str = "") -> None:
    """UserError if the column of a text is not among `names`."""
    if text.column not in names:
        raise UserError(f'column: {where or text.source} has no "{text.column}"; it has {", ".join(names)}')


def hub_error(path: str, error: Exception) -> UserError:
    """The UserError for a dataset that the hub does not give."""
    import datasets

    url = f"https://huggingface.co/datasets/{path}"
    if isinstance(error, ConnectionError):
        return UserError(f"source: {path} is not in the cache, and the hub is out of reach; connect once")
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        if "gated" in str(error):
            return UserError(f"source: {path} is gated; ask for access at {url}, then run `hf auth login`")
        return UserError(f"source: the hub shows you no dataset {path} (or not this revision); see {url}")
    return UserError(f"source: {path} cannot be loaded: {one_line(error)}")


def _c4_arguments(text: Text) -> dict[str, Any]:
    if text.config is not None:
        raise UserError("config: c4 is always en; for another one use hub:allenai/c4")
    split = text.split or "train"
    if split not in C4_FILES:
        raise UserError(f'split: c4 has train and validation, not "{split}"')
    files = {split: C4_FILES[split]}
    # no_checks: the expected sizes are those of all files
    return {"path": "allenai/c4", "split": split, "data_files": files, "verification_mode": "no_checks"}


def _wikitext2_arguments(text: Text) -> dict[str, Any]:
    if text.config is not None:
        raise UserError("config: wikitext2 is always wikitext-2-raw-v1; for another one use hub:Salesforce/wikitext")
    if text.split not in ("train", "validation", "test"):
        raise UserError("split: wikitext2 needs train, validation or test")
    return {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": text.split}


def _hub_arguments(text: Text) -> dict[str, Any]:
    path = text.source.removeprefix("hub:")
    if text.split is None:
        raise UserError(f"split: {text.source} needs one, such as train, validation or test")
    if Path(path).exists():
        raise UserError(f"source: {path} is a folder here and would be read instead of the hub; change folder")
    return {"path": path, "name": text.config, "split": text.split}


C4 = HubDataset(_c4_arguments)
WIKITEXT2 = HubDataset(_wikitext2_arguments)
HUB = HubDataset(_hub_arguments, form=r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
