"""Uploads a sparse checkpoint to the Hugging Face hub, with the login that the hub's own tools keep."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, errors, utils

from atp_tune.cache import temporary_folder
from atp_tune.checkpoints.convert import WEIGHTS, one_line
from atp_tune.errors import UserError
from atp_tune.sparse.provenance import ABOUT, FINETUNED, stored_manifest
from atp_tune.sparse.publishing import stage
from atp_tune.sparse.verifying import PACKED
from atp_tune.spec.config import Config, read_config
from atp_tune.spec.manifest import digest

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
        if file.is_symlink() and not file.resolve().is_relative_to(home) and not _is_written(file, folder):
            raise UserError(f"{file}: is a link to {file.resolve()}, outside its folder; copy the file")


def _is_written(file: Path, folder: Path) -> bool:
    """Whether weights are the ones that a folder's manifest promises, so that who made it knows what they hold."""
    manifest = stored_manifest(folder)
    promised = manifest.files.get(file.name) if manifest and file.parent == folder else None
    return file.suffix in WEIGHTS and promised is not None and file.is_file() and digest(file) == promised


def is_made_from(folder: Path, config: Config, packed: bool = False, slim: bool = False) -> bool:
    """Whether a folder is the sparse checkpoint of a configuration: a whole one, since `apply` writes no part of it.

    `packed`: whether it is to be without its zeros; `slim`: without the pruned channels.
    """
    if not (folder / ABOUT).is_file() or (folder / FINETUNED).exists() != config.is_trained:
        return False
    found = read_config(folder / ABOUT)
    is_packed = found.manifest is not None and any(map(PACKED.match, found.manifest.files))
    training = [each.trained and each.trained.settings for each in (found, config)]
    return (is_packed, found.slim, found.made_of, training[0]) == (packed, slim, config.made_of, training[1])


def check_permission(name: str, private: bool) -> None:
    """UserError unless the login may write the model repository ORG/NAME; it changes nothing on the hub.

    `private`: UserError also if the repository exists and is public.
    """
    _check_name(name)
    with _hub_errors(name):
        api = HfApi()
        _check_login(name, api.whoami())
        try:
            found = api.repo_info(name)
        except errors.RepositoryNotFoundError:
            return
    _check_visibility(name, private, found)


def upload(folder: Path, name: str, private: bool) -> str:
    """Uploads a folder's files to the model repository, which is made if it is missing; returns its address.

    Paths of this machine in them are left out, but for their last parts: `publishing.stage`.
    What an earlier call has uploaded is not uploaded again. UserError if the hub refuses or cannot be reached.
    """
    with _hub_errors(name):
        api = HfApi()
        made = api.create_repo(name, private=private or None, exist_ok=True)
        _check_visibility(name, private, api.repo_info(name))  # somebody may have made it since it was checked
        with temporary_folder() as place:
            stage(folder, place)
            api.upload_folder(repo_id=name, folder_path=place, commit_message="Upload by atp_tune")
    return str(made)


def _check_name(name: str) -> None:
    try:
        utils.validate_repo_id(name)  # type: ignore[attr-defined]
    except errors.HFValidationError:
        name = name.replace("/", "")  # refused below
    if name.count("/") != 1:
        raise UserError("the name on the hub must be ORG/NAME, each of letters, digits, '-', '_' and '.'")


def _check_visibility(name: str, private: bool, found: Any) -> None:
    if private and not found.private:
        raise UserError(f"{name}: is public on the hub already; make it private there first, or leave out --private")


def _check_login(name: str, account: dict[str, Any]) -> None:
    """UserError if an account or its token, as the hub describes them, may not write under the owner of `name`."""
    owner, user = name.partition("/")[0], str(account.get("name"))
    roles = {str(org.get("name")): org.get("roleInOrg") for org in account.get("orgs", [])}
    if owner not in (user, *roles):
        raise UserError(f"{name}: the login is {user}, which is not in {owner}; give {user}/NAME, or {LOGIN}")
    if roles.get(owner) == READS:
        raise UserError(f"{name}: {user} may only read in {owner}; ask its administrators, or give {user}/NAME")
    token = (account.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == READS or not _may_write(token.get("fineGrained")):
        raise UserError(f"{name}: the token of {user} may only read; make one that may write, then {LOGIN}")


def _may_write(grained: Any) -> bool:
    """Whether a fine-grained token may write to some repository; True for tokens of other kinds."""
    if not isinstance(grained, dict):
        return True
    return any("repo.write" in scope.get("permissions", []) for scope in grained.get("scoped", []))


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Turns errors of the hub and of the network into a UserError of one line."""
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except UserError:
        raise
    except errors.LocalTokenNotFoundError:
        raise UserError(f"{name}: there is no login to the hub; {LOGIN}") from None
    except Exception as error:  # network and library raise many types
        raise UserError(f"{name}: {_said(error)}") from error
    finally:
        log.setLevel(level)


def _said(error: BaseException) -> str:
    """What went wrong at the hub, and what to do."""
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
        return f"{constants.ENDPOINT} cannot be reached ({one_line(error)}); {again}"  # type: ignore[arg-type]
    return f"the hub refused it ({one_line(error)}); {again}"  # type: ignore[arg-type]
