"""Whether a sparse folder's files are those that were written, and how its environment differs from this one."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from atp_tune.checkpoints.convert import WEIGHTS
from atp_tune.errors import UserError
from atp_tune.sparse.provenance import ABOUT, DESCRIPTIONS, stored_manifest
from atp_tune.spec.config import Config
from atp_tune.spec.manifest import Environment, Manifest, digest, environment

DIGITS = "digits may differ"
NOTHING = "no matter"
EXACT = ("atp_tune", "torch", "transformers", "tokenizers", "numpy")  # packages that compute, or make the tokens
PACKED = re.compile(r"model\.packed\b.*\.safetensors$")
INDEX = ".index.json"  # says in which files the weights are
NAMED = 3  # files that a message names


@dataclass(frozen=True)
class EnvironmentDifference:
    """What differs between the environment of a checkpoint and this one, and what that does if it is made again."""

    what: str
    made: str
    here: str
    effect: str


@dataclass(frozen=True)
class Verified:
    """The result for a folder whose files are as they were written; `more` lists files that came later."""

    files: int
    weights: int
    more: list[str]
    made: Environment
    differences: list[EnvironmentDifference]


def verify(folder: Path) -> Verified:
    """Reads all files that a folder's manifest names.

    UserError if one differs or is missing, if there are other weights, or if the folder has no manifest.
    """
    manifest = stored_manifest(folder)
    if manifest is None:
        raise UserError(
            f"{folder}: its {ABOUT} has no hashes, since an earlier version wrote it; make the folder again "
            "with: python tune.py apply --config FILE --out DIR"
        )
    known = {*manifest.files, *DESCRIPTIONS}
    more = sorted(file.name for file in folder.iterdir() if file.name not in known and not file.name.startswith("."))
    surplus = [name for name in more if name.endswith((*WEIGHTS, INDEX))]
    check(folder, manifest.files, surplus)
    weights = sum(name.endswith(WEIGHTS) for name in manifest.files)
    found = list(differences(manifest.environment, environment()))
    return Verified(len(manifest.files), weights, more, manifest.environment, found)


def check(folder: Path, files: Mapping[str, str], surplus: list[str]) -> None:
    """UserError in one line for all files that are missing or differ, and for `surplus` weights."""
    missing = [name for name in files if not (folder / name).is_file()]
    try:
        other = [name for name in files if name not in missing and digest(folder / name) != files[name]]
    except OSError as error:
        raise UserError(f"{folder}: {error.filename} cannot be read: {error.strerror}") from None
    kinds = (("changed", other), ("missing", missing), ("weights that were not written", surplus))
    said = [f"{kind}: {_listed(names)}" for kind, names in kinds if names]
    if said:
        raise UserError(
            f"{folder}: not what was written; {'; '.join(said)}; copy or download it again, or make it with `apply`"
        )


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + rest


def differences(made: Environment, here: Environment) -> Iterator[EnvironmentDifference]:
    """What differs, the most important first: packages and instructions that compute, then all else."""
    packages = sorted({*made.versions, *here.versions}, key=lambda name: (name not in EXACT, name))
    rows = [(name, made.versions.get(name, "–"), here.versions.get(name, "–"), name in EXACT) for name in packages]
    rows += [
        ("CPU instructions", " ".join(made.instructions) or "–", " ".join(here.instructions) or "–", True),
        ("system", made.system, here.system, made.system.partition(" ")[2] != here.system.partition(" ")[2]),
        ("processor", made.processor, here.processor, False),
        ("Python", made.python, here.python, False),
    ]
    if made.device and here.device:
        rows.append(("device", made.device, here.device, True))
    differing = [row for row in rows if row[1] != row[2]]
    for what, was, now, matters in sorted(differing, key=lambda row: not row[3]):
        yield EnvironmentDifference(what, was, now, DIGITS if matters else NOTHING)


def compared(config: Config, written: Manifest | None) -> str | None:
    """A sentence on whether the files that `apply` wrote are those of its configuration.

    None if that has no hashes, or those of a folder of another kind, packed or not.
    """
    if config.manifest is None or written is None:
        return None
    promised = config.manifest.files
    if any(map(PACKED.match, promised)) != any(map(PACKED.match, written.files)):
        return None
    other = [name for name in {**promised, **written.files} if promised.get(name) != written.files.get(name)]
    if not other:
        return f"all {len(promised)} files are the configuration's, byte for byte"
    found = differences(config.manifest.environment, written.environment)
    reasons = [f"{row.what} {row.made} there, {row.here} here" for row in found if row.effect == DIGITS]
    reason = f" ({'; '.join(reasons)})" if reasons else ""
    return f"{len(other)} of {len(promised)} files differ from the configuration's: {_listed(sorted(other))}{reason}"
