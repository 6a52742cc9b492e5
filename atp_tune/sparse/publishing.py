"""A sparse folder as the world may see it: its files, without the folders and the user of the machine that made them.

What a folder says of its texts and of its dense model are paths that the commands of this machine read again. Nobody
else can read them, and they may name a person or a customer; the last part of each stays.
"""

import json
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

from atp_tune.checkpoints.unpacking import ABOUT as BEFORE_PACKING
from atp_tune.plugins import digest, is_place
from atp_tune.sparse.provenance import ABOUT, FINETUNED
from atp_tune.spec.facts import is_local, is_local_text
from atp_tune.spec.plugged import parts_of

OURS = (ABOUT, FINETUNED)
CONFIGS = "*config.json"  # of models, tokenizers and processors: some name the folder that they were read from
FREE = (".txt", ".md", ".rst", ".log", ".html", ".ipynb")  # what people write, who may name others or a place
TERMS = ("*licen[cs]e*", "*notice*", "*copying*", "*copyright*", "*policy*")  # files, or the folders that they lie in
TOKENS = ("*vocab*.txt", "*merges*.txt", "dict*.txt", "added_tokens*.txt", "bpe*.txt")
CARD = PurePath("README.md")
TRAINER = "trainer_state.json"  # of transformers' Trainer: it names the folder of its best checkpoint


def stage(folder: Path, place: Path) -> None:
    """Fills `place` with what is uploaded of a sparse folder: links to its files, and new files for those with paths.

    The manifest in it has the hashes of the new files. Hidden files stay where they are, and what people wrote into the
    dense model's folder, but for licences and notices; README.md is the card.
    """
    texts = dict[str, str]()
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        if not file.is_file() or any(part.startswith(".") for part in name.parts) or _is_free(name):
            continue
        text = _json_in(file) if len(name.parts) == 1 and _has_paths(file.name) else None
        if text is not None:
            texts[file.name] = text
            continue
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).symlink_to(file.resolve())
    base = folder / str(json.loads(texts[ABOUT]).get("folder", "."))
    for json_name, text in published(texts, base).items():
        (place / json_name).write_bytes(text.encode())


def published(texts: Mapping[str, str], base: Path) -> dict[str, str]:
    """The texts of a folder's JSON files, by name, without the folders in the paths that they hold.

    Relative paths start at `base`. A packed folder also keeps the texts of the one that it was made from.
    """
    found = dict(texts)
    for name in sorted(filter(_has_paths, texts), key=lambda name: name in OURS):  # ours have the others' hashes
        before = json.loads(texts[name])
        if name == BEFORE_PACKING:
            after = before | {"files": published(before["files"], base)}
        elif name in OURS:
            after = _with_names(before, lambda key, value: _public(key, value, base))
        else:
            after = _with_names(before, _read_from)
        if name in OURS and after.get("manifest"):
            hashes = {file: sha for file, sha in after["manifest"]["files"].items() if not _is_free(PurePath(file))}
            after["manifest"]["files"] = hashes
            changed = {other for other in hashes.keys() & texts.keys() if found[other] != texts[other]}
            hashes |= {other: digest(found[other].encode()) for other in changed}
        if after != before:
            found[name] = json.dumps(after, indent=2) + "\n"
    return found


def _is_free(name: PurePath) -> bool:
    """Whether a file is a text of people's own, which is no part of the model."""
    if name.suffix.lower() not in FREE or name == CARD:
        return False
    return not any(fnmatchcase(part.lower(), pattern) for part in name.parts for pattern in (*TERMS, *TOKENS))


def _json_in(file: Path) -> str | None:
    """The text of a file; None if it is no JSON, which the dense model's folder may hold under any name."""
    try:
        text = file.read_text(encoding="utf-8")
        json.loads(text)
    except (ValueError, RecursionError):
        return None
    return text


def _has_paths(name: str) -> bool:
    return name in (*OURS, BEFORE_PACKING, TRAINER) or PurePath(name).match(CONFIGS)


def _public(key: str, value: str, base: Path) -> str:
    """A value of a configuration or a record of `finetune`; paths in it start at `base`."""
    if key == "folder":
        return "."
    if key == "source" and is_local_text(value):
        kind, _, path = value.partition(":")
        return f"{kind}:{_last(path)}"
    place, rest = parts_of(value) if key in ("source", "place") else (value, "")
    if is_place(place):
        return _last(place) + f":{_last(rest)}" * bool(rest)
    return _last(value) if key == "id" and is_local(value, base) else value


def _read_from(key: str, value: str) -> str:
    """A value of a config of transformers: its keys of this kind are `_name_or_path`, `tokenizer_file` and the like."""
    is_path = PurePath(value).is_absolute() or PureWindowsPath(value).is_absolute() or value.startswith(("~", "."))
    is_path |= key.endswith("name_or_path") and (value.count("/") > 1 or "\\" in value)  # no ORG/NAME
    is_path |= key == "best_model_checkpoint"
    return _last(value) if key.endswith(("_path", "_file", "_dir", "_checkpoint")) and is_path else value


def _last(path: str) -> str:
    return PureWindowsPath(path).name or "."


def _with_names(value: Any, change: Callable[[str, str], str], key: str = "") -> Any:
    """A JSON value with each text changed, by the key that holds it."""
    if isinstance(value, Mapping):
        return {name: _with_names(each, change, name) for name, each in value.items()}
    if isinstance(value, list):
        return [_with_names(each, change, key) for each in value]
    return change(key, value) if isinstance(value, str) else value
