"""A sparse folder as the world may see it: its files, without the folders and the user of the machine that made them.

What a folder says of its texts and of its dense model are paths that the commands of this machine read again. Nobody
else can read them, and they may name a person or a customer; the last part of each stays.
"""

import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

from huggingface_hub import HfApi, constants, errors, utils

from atp_tune.checkpoints import convert
from atp_tune.checkpoints.files import WEIGHTS
from atp_tune.config.best import Config, read_config
from atp_tune.config.data import is_local_text, text_name
from atp_tune.config.manifest import Environment, Manifest, digest, environment
from atp_tune.config.plugged import split_source
from atp_tune.errors import UserError
from atp_tune.folders.card import ABOUT, CARD, DESCRIPTIONS, FINETUNED, stored_manifest
from atp_tune.plugins import digest as digest_of
from atp_tune.plugins import is_place
from atp_tune.storage.fingerprint import is_local
from atp_tune.utils.cache import temporary_folder
from atp_tune.utils.system import errors_alone

# --- Uploads a sparse checkpoint to the Hugging Face hub, with the login that the hub's own tools keep.

LOGIN = "run: hf auth login"
READS = "read"  # the role of a token, or of a member of an organisation, that may not write


def check_folder(folder: Path) -> None:
    """UserError if a folder is no sparse checkpoint of atp_tune, or links out of itself.

    Weights may be links, because people keep them on other disks, but only to what was written: a folder that others
    made could publish any file of this machine.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: is no folder; write one with: python tune.py apply --config FILE --out DIR")
    if not (folder / ABOUT).is_file():
        raise UserError(f"{folder}: holds no {ABOUT}, so `apply` did not write it; use: hf upload ORG/NAME DIR")
    read_config(folder / ABOUT)
    home = folder.resolve()
    for file in sorted(folder.rglob("*")):
        if not file.is_symlink() or file.resolve().is_relative_to(home):
            continue
        manifest = stored_manifest(folder)
        promised = manifest.files.get(file.name) if manifest and file.parent == folder else None
        if file.suffix not in WEIGHTS or promised is None or not file.is_file() or digest(file) != promised:
            raise UserError(f"{file}: is a link to {file.resolve()}, outside its folder; copy the file")


def is_made_from(folder: Path, config: Config, packed: bool, slim: bool) -> bool:
    """Whether a folder is the sparse checkpoint of a configuration: a whole one, since `apply` writes no part of it.

    `packed`: whether it is to be without its zeros; `slim`: without the pruned channels.
    """
    if not (folder / ABOUT).is_file() or (folder / FINETUNED).exists() != config.is_trained:
        return False
    about = read_config(folder / ABOUT)
    is_packed = about.manifest is not None and any(map(PACKED.match, about.manifest.files))
    there, wanted = ((x.weights_id, packed or x.quantize, x.trained and x.trained.settings) for x in (about, config))
    return (is_packed, about.slim, there) == (packed, slim, wanted)


def check_permission(name: str, private: bool) -> None:
    """UserError unless the login may write the model repository ORG/NAME; it changes nothing on the hub.

    `private`: UserError also if the repository exists and is public.
    """
    try:
        utils.validate_repo_id(name)
        is_valid = name.count("/") == 1
    except errors.HFValidationError:
        is_valid = False
    if not is_valid:
        raise UserError("the name on the hub must be ORG/NAME, each of letters, digits, '-', '_' and '.'")
    with _hub_errors(name):
        api = HfApi()
        # UserError if an account or its token, as the hub describes them, may not write under the owner of `name`.
        account = api.whoami()
        owner, user = name.partition("/")[0], str(account.get("name"))
        roles = {str(org.get("name")): org.get("roleInOrg") for org in account.get("orgs", [])}
        if owner not in (user, *roles):
            raise UserError(f"{name}: the login is {user}, which is not in {owner}; give {user}/NAME, or {LOGIN}")
        if roles.get(owner) == READS:
            raise UserError(f"{name}: {user} may only read in {owner}; ask its administrators, or give {user}/NAME")
        token = (account.get("auth") or {}).get("accessToken") or {}
        grained = token.get("fineGrained")  # None for tokens of other kinds
        may_write = not isinstance(grained, dict) or any(
            "repo.write" in scope.get("permissions", []) for scope in grained.get("scoped", [])
        )
        if token.get("role") == READS or not may_write:
            raise UserError(f"{name}: the token of {user} may only read; make one that may write, then {LOGIN}")
        try:
            repo = api.repo_info(name)
        except errors.RepositoryNotFoundError:
            return
    _check_visibility(name, private, repo)


def upload(folder: Path, name: str, private: bool) -> str:
    """Uploads a folder's files to the model repository, which is made if it is missing; returns its address.

    Paths of this machine in them are left out, but for their last parts: `stage`.
    What an earlier call has uploaded is not uploaded again. UserError if the hub refuses or cannot be reached.
    """
    with _hub_errors(name):
        api = HfApi()
        url = api.create_repo(name, private=private or None, exist_ok=True)
        _check_visibility(name, private, api.repo_info(name))  # somebody may have made it since it was checked
        with temporary_folder() as staging:
            stage(folder, staging)
            api.upload_folder(repo_id=name, folder_path=staging, commit_message="Upload by atp_tune")
    return str(url)


def _check_visibility(name: str, private: bool, repo: Any) -> None:
    if private and not repo.private:
        raise UserError(f"{name}: is public on the hub already; make it private there first, or leave out --private")


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Turns errors of the hub and of the network into a UserError of one line."""
    try:
        with errors_alone("huggingface_hub"), warnings.catch_warnings(action="ignore"):
            yield
    except UserError:
        raise
    except errors.LocalTokenNotFoundError:
        raise UserError(f"{name}: there is no login to the hub; {LOGIN}") from None
    except Exception as error:  # network and library raise many types
        raise UserError(f"{name}: {_message(error)}") from error


def _message(error: BaseException) -> str:
    """Words an error of the hub, and what to do."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__  # the library wraps errors of single files
    status = getattr(getattr(error, "response", None), "status_code", None)
    again = "the same command resumes the upload"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the hub is not asked; unset it"
    if status == 401:
        return f"the hub does not accept the login; {LOGIN}"
    if status == 403:
        return f"the hub does not let this login write there; choose another name, or {LOGIN}"
    if status is None and "http" in type(error).__module__:
        return f"{constants.ENDPOINT} cannot be reached ({convert.one_line(error)}); {again}"  # type: ignore[arg-type]
    return f"the hub refused it ({convert.one_line(error)}); {again}"  # type: ignore[arg-type]


OURS = (ABOUT, FINETUNED)
CONFIGS = "*config.json"  # of models, tokenizers and processors: some name the folder that they were read from
FREE = (".txt", ".md", ".rst", ".log", ".html", ".ipynb")  # what people write, who may name others or a place
TERMS = ("*licen[cs]e*", "*notice*", "*copying*", "*copyright*", "*policy*")  # files, or the folders that they lie in
TOKENS = ("*vocab*.txt", "*merges*.txt", "dict*.txt", "added_tokens*.txt", "bpe*.txt")

TRAINER = "trainer_state.json"  # of transformers' Trainer: it names the folder of its best checkpoint


def stage(folder: Path, out: Path) -> None:
    """Fills `out` with what is uploaded of a sparse folder: links to its files, and new files for those with paths.

    The manifest in it has the hashes of the new files. Hidden files stay where they are, and what people wrote into the
    dense model's folder, but for licences and notices; README.md is the card.
    """
    texts = dict[str, str]()
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        if not file.is_file() or any(part.startswith(".") for part in name.parts) or _is_free(name):
            continue
        if len(name.parts) == 1 and _has_paths(file.name):
            with suppress(ValueError, RecursionError):  # no JSON, which the dense model's folder may hold by any name
                json.loads(text := file.read_text(encoding="utf-8"))
                texts[file.name] = text
                continue
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).symlink_to(file.resolve())
    for json_name, text in published(texts, folder / str(json.loads(texts[ABOUT]).get("folder", "."))).items():
        (out / json_name).write_bytes(text.encode())


def published(texts: Mapping[str, str], base: Path) -> dict[str, str]:
    """The texts of a folder's JSON files, by name, without the folders in the paths that they hold.

    Relative paths start at `base`. A packed folder also keeps the texts of the one that it was made from.
    """
    public = dict(texts)
    for name in sorted(filter(_has_paths, texts), key=lambda name: name in OURS):  # ours have the others' hashes
        before = json.loads(texts[name])
        if name == convert.ABOUT:
            after = before | {"files": published(before["files"], base)}
        elif name in OURS:
            after = _with_names(before, lambda key, value: _public(key, value, base))
        else:
            after = _with_names(before, _read_from)
        if name in OURS and after.get("manifest"):
            hashes = {file: sha for file, sha in after["manifest"]["files"].items() if not _is_free(PurePath(file))}
            after["manifest"]["files"] = hashes
            for other in hashes.keys() & texts.keys():
                if public[other] != texts[other]:
                    hashes[other] = digest_of(public[other].encode())
        if after != before:
            public[name] = json.dumps(after, indent=2) + "\n"
    return public


def _is_free(name: PurePath) -> bool:
    """Whether a file is a text of people's own, which is no part of the model."""
    if name.suffix.lower() not in FREE or name == PurePath(CARD):
        return False
    return not any(fnmatchcase(part.lower(), pattern) for part in name.parts for pattern in (*TERMS, *TOKENS))


def _has_paths(name: str) -> bool:
    return name in (*OURS, convert.ABOUT, TRAINER) or PurePath(name).match(CONFIGS)


def _public(key: str, value: str, base: Path) -> str:
    """A value of a configuration or a record of `finetune`; paths in it start at `base`."""
    if key == "folder":
        return "."
    if key == "source" and is_local_text(value):
        return text_name(value)
    name, rest = split_source(value) if key in ("source", "place") else (value, "")
    if is_place(name):
        return _last(name) + f":{_last(rest)}" * bool(rest)
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


# --- Whether a sparse folder's files are those that were written, and how its environment differs from this one.

DIGITS = "digits may differ"
NOTHING = "no matter"
EXACT = ("atp_tune", "torch", "transformers", "tokenizers", "numpy")  # packages that compute, or make the tokens
PACKED = re.compile(r"model\.packed\b.*\.safetensors$")
INDEX = ".index.json"  # says in which files the weights are
NAMED = 3  # files that a message names


@dataclass(frozen=True)
class EnvironmentDifference:
    """A difference between the environment of a checkpoint and this one, and its effect if it is made again."""

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
    files = manifest.files
    known = {*files, *DESCRIPTIONS}
    more = sorted(file.name for file in folder.iterdir() if file.name not in known and not file.name.startswith("."))
    surplus = [name for name in more if name.endswith((*WEIGHTS, INDEX))]
    # What is missing or differs, in one line.
    missing = [name for name in files if not (folder / name).is_file()]
    try:
        other = [name for name in files if name not in missing and digest(folder / name) != files[name]]
    except OSError as error:
        raise UserError(f"{folder}: {error.filename} cannot be read: {error.strerror}") from None
    kinds = (("changed", other), ("missing", missing), ("weights that were not written", surplus))
    problems = [f"{kind}: {_listed(names)}" for kind, names in kinds if names]
    if problems:
        raise UserError(
            f"{folder}: not what was written; {'; '.join(problems)}; copy or download it again, or make it with `apply`"
        )
    weights = sum(name.endswith(WEIGHTS) for name in files)
    changes = list(differences(manifest.environment, environment()))
    return Verified(len(files), weights, more, manifest.environment, changes)


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + rest


def differences(there: Environment, here: Environment) -> Iterator[EnvironmentDifference]:
    """The differences, the most important first: packages and instructions that compute, then all else."""
    rows = [
        (name, there.versions.get(name, "–"), here.versions.get(name, "–"), name in EXACT)
        for name in sorted({*there.versions, *here.versions})
    ]
    rows += [
        ("CPU instructions", " ".join(there.instructions) or "–", " ".join(here.instructions) or "–", True),
        ("system", there.system, here.system, there.system.partition(" ")[2] != here.system.partition(" ")[2]),
        ("processor", there.processor, here.processor, False),
        ("Python", there.python, here.python, False),
    ]
    if there.device and here.device:
        rows.append(("device", there.device, here.device, True))
    for what, was, now, matters in sorted([row for row in rows if row[1] != row[2]], key=lambda row: not row[3]):
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
    rows = differences(config.manifest.environment, written.environment)
    reasons = [f"{row.what} {row.made} there, {row.here} here" for row in rows if row.effect == DIGITS]
    reason = f" ({'; '.join(reasons)})" if reasons else ""
    return f"{len(other)} of {len(promised)} files differ from the configuration's: {_listed(sorted(other))}{reason}"
