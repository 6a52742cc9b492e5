"""The configuration that a command works with: one in a file, or the best of a study."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from atp_tune.cli import completion
from atp_tune.cli.options import Device, Permissions, Storage, StudyLabel, load_study, option, stored_study, wrong

if TYPE_CHECKING:
    from atp_tune.api.configuration import Configuration
    from atp_tune.events import EventHandler
    from atp_tune.spec.config import Config
    from atp_tune.spec.studyfile import StudyFile


@dataclass(frozen=True)
class Best:
    """A configuration, the path of its file, which need not exist, what may run, and where; `file`: of its study."""

    config: "Config"
    path: Path
    allowed: dict[str, bool]
    device: str
    storage: str | None
    file: "StudyFile | None" = None

    def made(self, watch: "EventHandler") -> "Configuration":
        """The configuration with the methods that make its model."""
        from atp_tune.api.configuration import Configuration

        return Configuration(self.config, self.path.parent / self.config.folder, self.device, self.allowed, watch=watch)


@dataclass(frozen=True)
class BestOptions(Permissions):
    """The options of a command that takes a configuration, or the best of a study."""

    study: Annotated[
        str | None,
        option(
            "NAME", "A study, by name or path, whose best is taken.", "--study", autocompletion=completion.study_names
        ),
    ] = None
    study_name: StudyLabel = None
    storage: Storage = None
    device: Device = None

    def check(self, other: str, given: Any, **of_study: Any) -> None:
        """BadParameter unless either `other` is given, or a study, whose further options are not given without it."""
        if (given is None) == (self.study is None):
            raise wrong(other.split(maxsplit=1)[0], f"give either {other} or --study NAME")
        for name, value in {"study_name": self.study_name, **of_study}.items():
            if value and self.study is None:
                raise wrong(f"--{name.replace('_', '-')}", "only with --study")

    @property
    def allowed(self) -> dict[str, bool]:
        """What may run, by its name in `Permissions`."""
        return {field.name: getattr(self, field.name) for field in fields(Permissions)}

    def best(self, config: Path | None = None, set_: list[str] | None = None) -> Best:
        """The configuration in a file, or else of the best trial of the study."""
        from atp_tune.results.best_config import best_config
        from atp_tune.results.stored import file_as_run
        from atp_tune.spec.config import read_config

        if config is not None:
            return Best(read_config(config), config, self.allowed, self.device or "auto", self.storage)
        file = load_study(str(self.study), self.storage, None, set_)
        stored, path = stored_study(file, self.study_name), file.best_of(self.study_name or file.name)
        file = file_as_run(stored, file, bool(set_))
        allowed = {key: given or file.permissions[key] for key, given in self.allowed.items()}
        where = self.device or file.study.device
        return Best(best_config(file, stored, path), path, allowed, where, file.storage_url, file)
