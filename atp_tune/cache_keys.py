"""Keys of what lies in the cache: the SHA-256 of all that determines an entry, each part given by its name.

What is in no key must not change an entry: docs/reliability.md says what each key holds, and why not more.
"""

from atp_tune.cache import sha256_of_json
from atp_tune.storage.process import versions

# Folder: its format, to be increased when the same ingredients give another entry, and the ingredients of its key.
FOLDERS: dict[str, tuple[int, tuple[str, ...]]] = {
    "models/bin": (1, ("content", "files")),
    "models/quantized": (1, ("content", "files")),
    "models/packed": (1, ("content", "files")),
    "windows": (4, ("text", "content", "tokenizer", "libraries", "bos", "draws")),
    "pixels": (2, ("pictures", "processor", "libraries")),
    "statistics": (2, ("model", "tower", "items", "kind", "pruner", "batch", "arithmetic", "versions")),
    "prices": (2, ("dense", "pool", "score", "targets", "levels", "batches", "constants", "versions")),
    "recovered": (2, ("settings", "model", "text", "teacher", "arithmetic", "versions")),
    "sparse": (3, ("config", "batches", "text", "arithmetic", "versions")),
}


def key(folder: str, **given: object) -> str:
    """The SHA-256 (hex) of an entry's ingredients; TypeError unless they are those of its folder, but for versions."""
    number, names = FOLDERS[folder]
    given |= {"versions": versions()} if "versions" in names else {}
    if given.keys() != {*names}:
        raise TypeError(f"{folder}: its key is of {', '.join(names)}, not of {', '.join(given)}")
    return sha256_of_json([*(given[name] for name in names), *([number] if number > 1 else [])])
