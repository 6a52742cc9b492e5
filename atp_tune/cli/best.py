"""The configuration that a command works with: one in a file, or the best of a study."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atp_tune.cli import completion
from atp_tune.cli.options import load_study, stored_study

if TYPE_CHECKING:
    from atp_tune.api.configuration import Configuration
    from atp_tune.events import EventHandler
    from atp_tune.spec.config import Config
    from atp_tune.spec.studyfile import StudyFile

BestOf = Annotated[
    str | None,
    typer.Option(
        "--study",
        metavar="NAME",
        help="A study, by name or path, whose best is taken.",
        autocompletion=completion.study_names,
    ),
]


@dataclass(frozen=True)
class Best:
    """A configuration, the path of its file, which need not exist, and what it may do; `file`: of its study."""

    config: "Config"
    path: Path
    allowed: Mapping[str, bool]
    storage: str | None
    file: "StudyFile | None" = None

    def made(self, device: str | None, watch: "EventHandler") -> "Configuration":
        """The configuration with the methods that make its model."""
        from atp_tune.api.configuration import Configuration

        base, where = self.path.parent / self.config.folder, self.where(device)
        return Configuration(self.config, base, where, self.allowed, watch=watch)

    def where(self, device: str | None) -> str:
        """The device that is asked for, else that of the study."""
        return device or (self.file.study.device if self.file else "auto")


def one_of(given: Mapping[str, Any], of_study: Mapping[str, Any]) -> None:
    """BadParameter unless one of these two is given, the second a study, without which options of it are not."""
    first, second = given
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise typer.BadParameter(f"give either {first} or {second}", param_hint=first.split()[0])
    for option, value in of_study.items():
        if value and second not in named:
            raise typer.BadParameter("only with --study", param_hint=option)


def best_of(
    config: Path | None,
    study: str | None,
    study_name: str | None,
    storage: str | None,
    allowed: Mapping[str, bool],
    set_: list[str] | None = None,
) -> Best:
    """The configuration in a file, or of the best trial of a study, of which exactly one is given."""
    from atp_tune.results.best_config import best_config
    from atp_tune.results.stored import file_as_run
    from atp_tune.spec.config import read_config

    if config is not None:
        return Best(read_config(config), config, allowed, storage)
    file = load_study(str(study), storage, None, set_)
    stored, path = stored_study(file, study_name), file.best_of(study_name or file.name)
    file = file_as_run(stored, file, bool(set_))
    allowed = {key: given or file.permissions[key] for key, given in allowed.items()}
    return Best(best_config(file, stored, path), path, allowed, file.storage_url, file)
