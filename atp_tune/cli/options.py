"""Options of several commands, and functions that find the study that they name."""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from atp_tune.cli import completion

if TYPE_CHECKING:
    from atp_tune.api.configuration import Configuration
    from atp_tune.events import EventHandler
    from atp_tune.spec.config import Config
    from atp_tune.spec.studyfile import StudyFile

UsageError: Any = typer.BadParameter.__mro__[1]  # of the click that typer brings along


def option(metavar: str, about: str, *names: str, **more: Any) -> Any:
    """An option with a value."""
    return typer.Option(*names, metavar=metavar, help=about, **more)


def flag(name: str, about: str) -> Any:
    """An option without a value."""
    return option("", about, name)


def wrong(name: str, why: str) -> Exception:
    """The error of an option."""
    return typer.BadParameter(why, param_hint=name)


STUDY: Any = option(
    "NAME", "Name of a study in `studies/`, or path of a .toml file.", "--study", autocompletion=completion.study_names
)
StudyName = Annotated[str, STUDY]
StudyLabel = Annotated[
    str | None,
    option("NAME", "Name of the study in the storage; default: the study file's.", "--study-name"),
]
Storage = Annotated[
    str | None,
    option("URL", "Optuna storage URL; default: NAME.db beside the study file."),
]
Overrides = Annotated[
    list[str] | None,
    option(
        "KEY=VALUE",
        "Override a key of the study file (see atp_tune/spec/study.py): `--set texts.validation.nsamples=8`.",
        "--set",
        autocompletion=completion.overrides,
    ),
]
Json = Annotated[bool, flag("--json", "Print one JSON document and nothing else.")]
AllowPickle = Annotated[bool, flag("--allow-pickle", "Read .bin weights, which are pickles and may run code.")]
TrustRemoteCode = Annotated[bool, flag("--trust-remote-code", "Run the Python code that the model's folder holds.")]
TrustPlugins = Annotated[
    bool,
    flag(
        "--trust-plugins", "Run the Python code that the study names: plug-ins, packages of texts, functions of tasks."
    ),
]
Private = Annotated[bool, flag("--private", "Make the repository private, if it does not exist yet.")]
Prompts = Annotated[
    list[str] | None,
    option("TEXT", "A prompt to continue, in a study beside three fixed ones; may be given several times.", "--prompt"),
]
Device = Annotated[
    str | None,
    option("DEVICE", "auto, cpu, mps, cuda or cuda:N.", autocompletion=completion.devices),
]


class Format(StrEnum):
    """Number formats of the weights of a folder."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


DType = Annotated[
    Format | None,
    option(
        "DTYPE",
        "float32, bfloat16 or float16 for the folder; default: as the dense model's files, of .gguf as computed.",
        "--dtype",
    ),
]


@dataclass(frozen=True)
class Permissions:
    """What a model, a configuration or a study, which may be a stranger's, cannot allow itself."""

    allow_pickle: AllowPickle = False
    trust_remote_code: TrustRemoteCode = False
    trust_plugins: TrustPlugins = False


def expanded(command: Callable[..., None]) -> Callable[..., None]:
    """Returns a command of typer that has an option for each field of `command`'s parameters that are dataclasses."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    parameters: list[Parameter] = []
    for name, parameter in signature(command).parameters.items():
        if name in groups:
            own = get_type_hints(groups[name], include_extras=True)
            rows = [(field.name, own[field.name], field.default) for field in fields(groups[name])]
        else:
            rows = [(name, hints[name], parameter.default)]
        for each, hint, usual in rows:
            parameters.append(Parameter(each, Parameter.KEYWORD_ONLY, default=usual, annotation=hint))

    def run(**values: Any) -> None:
        for name, kind in groups.items():
            values[name] = kind(**{field.name: values.pop(field.name) for field in fields(kind)})
        command(**values)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return run


def load_study(
    study: str,
    storage: str | None,
    device: str | None,
    set_: list[str] | None,
    plugins: bool | None = None,
    folder: Path | None = None,
) -> "StudyFile":
    """A study file by name or path, with options as overrides; UserError for what is wrong in it.

    `plugins`: None where no code of plug-ins is needed, else whether it may run; `folder`: where their places start.
    """
    from atp_tune.spec.studyfile import absolute_storage, load

    place = absolute_storage(storage, Path()) if storage else None
    options: dict[str, Any] = {"storage": place, "device": device}
    named = [f"{key}={value}" for key, value in options.items() if value is not None]
    return load(study, [*(set_ or []), *named], plugins, folder)


def checked_prompts(prompts: list[str] | None) -> tuple[str, ...]:
    """The prompts of the option; BadParameter for an empty one, or one that is not UTF-8 text."""
    from atp_tune.errors import is_text

    for prompt in prompts or ():
        if not prompt.strip() or not is_text(prompt):
            raise wrong("--prompt", "must be a text, and not empty")
    return tuple(prompts or ())


def stored_study(file: "StudyFile", study_name: str | None) -> Any:
    """The Optuna study of a study file; UserError if it has no trials yet."""
    from atp_tune.results import stored

    return stored.stored_study(file, study_name)


# --- The configuration that a command works with: one in a file, or the best of a study.


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
        from atp_tune.results.stored import best_config, file_as_run
        from atp_tune.spec.config import read_config

        if config is not None:
            return Best(read_config(config), config, self.allowed, self.device or "auto", self.storage)
        file = load_study(str(self.study), self.storage, None, set_)
        stored, path = stored_study(file, self.study_name), file.best_of(self.study_name or file.name)
        file = file_as_run(stored, file, bool(set_))
        allowed = {key: given or file.permissions[key] for key, given in self.allowed.items()}
        where = self.device or file.study.device
        return Best(best_config(file, stored, path), path, allowed, where, file.storage_url, file)
