"""Options from the parameters of a command, and functions that find the study that they name."""

import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, cleandoc, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from atp_tune.utils.system import as_typed

if TYPE_CHECKING:
    import optuna

    from atp_tune.api.configuration import Configuration
    from atp_tune.config.best import Config
    from atp_tune.config.studyfile import StudyFile
    from atp_tune.events import EventHandler

UsageError: Any = typer.BadParameter.__mro__[1]  # of the click that typer brings along
DType = Literal["float32", "bfloat16", "float16"] | None
ROW = re.compile(r" *(\w+)(?: (.+?))??(?: (\d[\d.]*?)?\.\.(\d*))?: (.+)")
SHARED = """Options of several commands.

Options:
    allow_pickle: Read .bin weights, which are pickles and may run code.
    config FILE: Configuration, as a run or `export` writes it.
    device DEVICE: auto, cpu, mps, cuda or cuda:N.
    dtype DTYPE: float32, bfloat16 or float16 for the folder; default: as the dense model's files, of .gguf as
        computed.
    json: Print one JSON document and nothing else.
    out DIR: Folder for the sparse checkpoint; new or empty.
    private: Make the repository private, if it does not exist yet.
    prompt TEXT: A prompt to continue, in a study beside three fixed ones; may be given several times.
    set_ KEY=VALUE: Override a key of a study file (see atp_tune/config/study.py): `--set texts.validation.nsamples=8`.
    storage URL: Optuna storage URL; default: NAME.db beside the study file.
    study NAME: Name of a study in `studies/`, or path of a .toml file.
    study_name NAME: Name of the study in the storage; default: the study file's.
    trust_plugins: Run the Python code that the study names: plug-ins, packages of texts, functions of tasks.
    trust_remote_code: Run the Python code that the model's folder holds.
"""


def wrong(name: str, why: str) -> Exception:
    """The error of an option."""
    return typer.BadParameter(why, param_hint=name)


def described(text: str | None) -> tuple[str, dict[str, tuple[str, ...]]]:
    """The help in a docstring, and the rows of its `Options:` by name: metavar, least, most, help.

    A row is `NAME METAVAR LEAST..MOST: HELP`, of which the second and the third may be missing.
    """
    about, _, table = cleandoc(text or "").partition("\n\nOptions:\n")
    rows = map(ROW.fullmatch, re.sub(r"\n {5,}", " ", table).split("\n"))
    return about, {row[1]: row.groups("")[1:] for row in rows if row}


def expanded(command: Callable[..., None]) -> Callable[..., None]:
    """Returns a command of typer, with an option for each keyword of `command`, and an argument for each other one.

    A keyword that is a dataclass stands for its fields. What an option means is a row of `Options:` in the docstring of
    the command, of the dataclass, or of `SHARED`; a parameter without a row says it by its type.
    """
    given = signature(command, eval_str=True).parameters
    groups: dict[str, Any] = {name: one.annotation for name, one in given.items() if is_dataclass(one.annotation)}
    about, rows = described(command.__doc__)
    for text in (*(kind.__doc__ for kind in groups.values()), SHARED):
        rows = described(text)[1] | rows
    parameters = list[Parameter]()
    for own in given.values():
        fields = signature(groups[own.name], eval_str=True).parameters if own.name in groups else {own.name: own}
        for name, one in fields.items():
            kind = one.annotation
            if name in rows:
                metavar, least, most, meaning = rows[name]
                is_flag, word = one.default is False, "--" + name.strip("_").replace("_", "-")
                words = [] if kind in (bool, bool | None) and not is_flag else [word]  # typer's own has --no-WORD
                more: dict[str, Any] = {
                    "help": meaning, "metavar": "" if is_flag else metavar or None,
                    "autocompletion": COMPLETED.get(name),
                    **{key: json.loads(value) for key, value in (("min", least), ("max", most)) if value},
                }  # fmt: skip
                is_option = own.kind is Parameter.KEYWORD_ONLY
                kind = Annotated[kind, typer.Option(*words, **more) if is_option else typer.Argument(**more)]
            parameters.append(one.replace(kind=Parameter.KEYWORD_ONLY, annotation=kind))

    def run(**values: Any) -> None:
        for name, kind in groups.items():
            values[name] = kind(**{field: values.pop(field) for field in signature(kind).parameters})
        command(**values)

    run.__name__, run.__doc__ = command.__name__, as_typed(about)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return run


def load_study(
    study: str,
    storage: str | None = None,
    set_: list[str] | None = None,
    device: str | None = None,
    plugins: bool | None = None,
    folder: Path | None = None,
) -> "StudyFile":
    """A study file by name or path, with options as overrides; UserError for what is wrong in it.

    `plugins`: None where no code of plug-ins is needed, else whether it may run; `folder`: where their places start.
    """
    from atp_tune.config.studyfile import load

    return load(study, [*(set_ or []), *placed(storage, device)], plugins, folder)


def placed(storage: str | None, device: str | None) -> list[str]:
    """A storage, whose path starts at the current folder, and a device as overrides of a study file."""
    from atp_tune.config.studyfile import absolute_storage

    values = {"storage": absolute_storage(storage, Path()) if storage else None, "device": device}
    return [f"{key}={value}" for key, value in values.items() if value is not None]


def checked_prompts(prompts: list[str] | None) -> tuple[str, ...]:
    """The prompts of the option; BadParameter for an empty one, or one that is not UTF-8 text."""
    from atp_tune.errors import is_text

    for prompt in prompts or ():
        if not prompt.strip() or not is_text(prompt):
            raise wrong("--prompt", "must be a text, and not empty")
    return tuple(prompts or ())


# --- The configuration that a command works with: one in a file, or the best of a study.


@dataclass(frozen=True)
class Permissions:
    """Permissions that a model, a configuration or a study, which may be a stranger's, cannot give itself."""

    allow_pickle: bool = False
    trust_remote_code: bool = False
    trust_plugins: bool = False


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
    """The options of a command that takes a configuration, or the best of a study.

    Options:
        study NAME: A study, by name or path, whose best is taken.
    """

    study: str | None = None
    study_name: str | None = None
    storage: str | None = None
    device: str | None = None

    def check(self, other: str, given: Any, **of_study: Any) -> None:
        """BadParameter unless either `other` is given, or a study, whose further options are not given without it."""
        if (given is None) == (self.study is None):
            raise wrong(other.split(maxsplit=1)[0], f"give either {other} or --study NAME")
        for name, value in {"study_name": self.study_name, **of_study}.items():
            if value and self.study is None:
                raise wrong(f"--{name.replace('_', '-')}", "only with --study")

    @property
    def allowed(self) -> dict[str, bool]:
        """The code that may run, by its name in `Permissions`."""
        return {name: getattr(self, name) for name in signature(Permissions).parameters}

    def stored(self, set_: list[str] | None = None) -> "tuple[optuna.Study, StudyFile, Path]":
        """The stored study, its file with the settings that it was run with, and the file of its best configuration."""
        from atp_tune.results.status import file_as_run, stored_study

        file = load_study(str(self.study), self.storage, set_)
        study = stored_study(file, self.study_name)
        return study, file_as_run(study, file, bool(set_)), file.best_path(self.study_name or file.name)

    def best(self, config: Path | None = None, set_: list[str] | None = None) -> Best:
        """The configuration in a file, or else of the best trial of the study."""
        from atp_tune.config.best import read_config
        from atp_tune.results.status import best_config

        if config is not None:
            return Best(read_config(config), config, self.allowed, self.device or "auto", self.storage)
        stored, file, path = self.stored(set_)
        allowed = {key: given or file.permissions[key] for key, given in self.allowed.items()}
        where = self.device or file.study.device
        return Best(best_config(file, stored, path), path, allowed, where, file.storage_url, file)


# --- Completion by the Tab key: names of studies, keys of `--set` and their values, pruners, allocations, trials.
#
# A shell runs the command again for each Tab, so this imports no torch and no Optuna, opens no server's database, and
# prints nothing that is no completion: a mistake completes nothing.

KEY = "_ATP_TUNE_COMPLETED_KEY"  # the key whose value is completed in bash
SAFE = re.compile(r"\w[\w.-]*")  # zsh evaluates what is printed
# not only those that are here, since finding them takes seconds
DEVICES = ("auto", "cpu", "mps", "cuda", "cuda:0")

Complete = Callable[[typer.Context, str], list[str]]


def silent(complete: Callable[[typer.Context, str], Iterable[str]]) -> Complete:
    """The completions that begin with what is typed; none if anything goes wrong."""

    @wraps(complete)
    def tried(ctx: typer.Context, incomplete: str) -> list[str]:
        try:
            return [text for text in complete(ctx, incomplete) if text.startswith(incomplete)]
        except Exception:  # the user is still typing
            return []

    return tried


@silent
def study_names(ctx: typer.Context, incomplete: str) -> Iterable[str]:
    """Names of study files; a path is left to the shell, and so is a name that a shell would expand or run."""
    from atp_tune.config.finding import known

    return filter(SAFE.fullmatch, known())


@silent
def overrides(ctx: typer.Context, incomplete: str) -> Iterable[str]:
    """Keys of study files; of the only one that fits, or after its `=`, the values.

    A second completion, if only a made-up one, keeps bash from adding a space after `=`.
    """
    from atp_tune.config.studyfile import choices

    by_key, key = choices(), os.environ.get(KEY, "")
    if key:  # bash completes what comes after `=` as a word of its own
        return by_key[key]
    typed, equals, _ = incomplete.partition("=")
    keys = [key for key in by_key if (key == typed if equals else key.startswith(typed))]
    values = [f"{keys[0]}={value}" for value in by_key[keys[0]] or ["VALUE"]] if len(keys) == 1 else []
    return values if equals else [*(f"{key}=" for key in keys), *values]


@silent
def pruners(ctx: typer.Context, incomplete: str) -> Iterable[str]:
    """Names of pruners; the place of a plug-in is left to the shell."""
    from atp_tune.pruners import PRUNERS

    return PRUNERS


@silent
def allocations(ctx: typer.Context, incomplete: str) -> Iterable[str]:
    """Names of allocations."""
    from atp_tune.allocations import ALLOCATIONS

    return ALLOCATIONS


@silent
def trials(ctx: typer.Context, incomplete: str) -> Iterable[str]:
    """Numbers of the trials that a study has finished, from its SQLite file."""
    from atp_tune.config.finding import finished_trials

    options = ctx.params
    file = load_study(options["study"], options.get("storage"), list(options.get("set_") or []))
    if not file.database:
        return []
    return map(str, finished_trials(file.database, options.get("study_name") or file.name))


COMPLETED: dict[str, Complete] = {  # what completes an option, by its name
    "study": study_names, "set_": overrides, "pruner": pruners, "allocation": allocations, "trial": trials,
    "device": silent(lambda ctx, incomplete: DEVICES),
}  # fmt: skip


def rejoin(environment: Any) -> None:
    """Joins `KEY`, `=` and `VALUE`, which bash has made three words, in the variables that a completion reads.

    A last word of this kind is cut: bash replaces only what comes after `=`.
    """
    if not any(name.endswith("_COMPLETE") and value == "complete_bash" for name, value in environment.items()):
        return
    words, index = environment.get("COMP_WORDS", "").split("\n"), environment.get("COMP_CWORD", "")
    if not index.isdecimal():
        return
    joined = list[str]()
    for before, word in zip(["", *words], words[: int(index) + 1], strict=False):
        if joined and "=" in (word, before):
            joined[-1] += word
        else:
            joined.append(word)
    option, equals, rest = joined[-1].partition("=")
    if option.startswith("-") and "=" in rest:  # --set=KEY=VALUE
        joined[-1:] = [option, rest]
    key, equals, value = joined[-1].partition("=")
    if equals and not key.startswith("-"):
        environment[KEY], joined[-1] = key, value
    environment |= {"COMP_WORDS": "\n".join(joined), "COMP_CWORD": str(len(joined) - 1)}
