"""Options of several commands, and functions that find the study that they name."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

UsageError: Any = typer.BadParameter.__mro__[1]  # of the click that typer brings along

if TYPE_CHECKING:
    from atp_tune.spec.studyfile import StudyFile

STUDY: Any = typer.Option("--study", metavar="NAME", help="Name of a study in `studies/`, or path of a .toml file.")
StudyName = Annotated[str, STUDY]
StudyLabel = Annotated[
    str | None,
    typer.Option("--study-name", metavar="NAME", help="Name of the study in the storage; default: the study file's."),
]
Storage = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Optuna storage URL; default: NAME.db beside the study file."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key of the study file (see atp_tune/spec/study.py): `--set texts.validation.nsamples=8`.",
    ),
]
Json = Annotated[bool, typer.Option("--json", metavar="", help="Print one JSON document and nothing else.")]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", metavar="", help="Read .bin weights, which are pickles and may run code.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", metavar="", help="Run the Python code that the model's folder holds.")
]
Private = Annotated[
    bool, typer.Option("--private", metavar="", help="Make the repository private, if it does not exist yet.")
]
Device = Annotated[str | None, typer.Option(metavar="DEVICE", help="auto, cpu, mps, cuda or cuda:N.")]


def load_study(study: str, storage: str | None, device: str | None, set_: list[str] | None) -> "StudyFile":
    """A study file by name or path, with options as overrides; UserError for what is wrong in it."""
    from atp_tune.spec.studyfile import absolute_storage, load

    place = absolute_storage(storage, Path()) if storage else None
    options: dict[str, Any] = {"storage": place, "device": device}
    named = [f"{key}={value}" for key, value in options.items() if value is not None]
    return load(study, [*(set_ or []), *named])


def stored_study(file: "StudyFile", study_name: str | None) -> Any:
    """The Optuna study of a study file; UserError if it has no trials yet."""
    from atp_tune.errors import UserError
    from atp_tune.spec.finding import known
    from atp_tune.storage.opening import find_study, open_storage

    db = open_storage(file.storage_url, create=False)
    study = find_study(db, study_name or file.name) if db else None
    if study is None:
        by_name = file.path.absolute() in [path.absolute() for path in known()]
        other = ["--study-name", study_name] if study_name else []
        command = shlex.join(["python", "tune.py", "--study", file.name if by_name else str(file.path), *other])
        raise UserError(f"study {study_name or file.name}: has no trials yet; run: {command}")
    return study
