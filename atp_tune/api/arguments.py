"""From the arguments of `tune` and `prune` to a study file, as the command line makes one from its options."""

import logging
import re
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from math import ceil
from pathlib import Path
from time import monotonic
from typing import Any

from atp_tune.config import finding
from atp_tune.config.study import Study
from atp_tune.config.studyfile import StudyFile, absolute_storage, load, overridden, toml_value
from atp_tune.cost.remaining import Remaining
from atp_tune.errors import UserError
from atp_tune.events import Event, EventHandler, Message, Step, TrialEnded, TrialStarted
from atp_tune.inputs.sources import as_documents
from atp_tune.inputs.sources import lent as lent_texts
from atp_tune.results.formatting import best_so_far, duration, trial_line
from atp_tune.utils.system import interruptible, silenced

# --- What a caller gives from memory, a model with its tokenizer and texts, and how studies come to it.

ROLES = ("calibration", "validation", "test")


@dataclass(frozen=True)
class Sources:
    """How a study file names what is lent; None for what is not."""

    model: str | None
    device: str | None
    texts: str | Mapping[str, str] | None


@dataclass(frozen=True)
class Lender:
    """A model in memory with its tokenizer, if there is one, and documents: of one text, or by role."""

    model: Any = None
    tokenizer: Any = None
    texts: str | Mapping[str, str | list[str]] | list[str] | None = None

    @classmethod
    def of(cls, model: Any, tokenizer: Any, texts: Any) -> "Lender":
        """Finds the arguments that lie in memory; UserError for texts of another type.

        Texts are a name or path of them, documents, or either by role.
        """
        if not isinstance(texts, Mapping):
            return cls(model, tokenizer, None if texts is None else _checked(texts, "texts"))
        if {*texts} != {*ROLES}:
            raise UserError(
                "texts: give calibration, validation and test, or one list, of which three parts are used; "
                f"got {', '.join(map(str, texts)) or 'none'}"
            )
        return cls(model, tokenizer, {role: _checked(value, f'texts["{role}"]') for role, value in texts.items()})

    @contextmanager
    def lend(self) -> Iterator[Sources]:
        """Lends model and texts; they are found by the sources that it yields until the end."""
        with ExitStack() as stack:
            model, device, texts = None, None, self.texts
            sources: str | Mapping[str, str] | None
            if self.model is not None:
                from atp_tune.checkpoints.checkpoint import lent

                model = stack.enter_context(lent(self.model, self.tokenizer)).id
                where = next(self.model.parameters()).device
                device = str(where if where.type == "cuda" else where.type)  # as in a study file
            if isinstance(texts, Mapping):
                sources = {
                    role: each if isinstance(each, str) else stack.enter_context(lent_texts(each))
                    for role, each in texts.items()
                }
            else:
                sources = stack.enter_context(lent_texts(texts)) if isinstance(texts, list) else texts
            yield Sources(model, device, sources)


def _checked(value: Any, what: str) -> str | list[str]:
    if isinstance(value, str) and any(space in value.strip() for space in "\n ") and not Path(value).is_file():
        raise UserError(f"{what}: is neither a file nor a name of texts; give documents as a list, as in [text]")
    return str(value) if isinstance(value, str | Path) else as_documents(value, what)


def is_model(value: Any) -> bool:
    """Whether an argument is a model in memory, even one that is not treated, and no name of one."""
    return not isinstance(value, str | Path) and hasattr(value, "parameters")


def names(value: str | Sequence[str] | None) -> tuple[str, ...]:
    """One name or several, as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value or ())


Target = float | str | tuple[float, float]
Settings = Mapping[str, Any]


PYTHON = {"--trust-plugins": "trust_plugins=True", "--texts FILE": "texts=", "--out": "folder"}
SETTING = re.compile(r"--set (\S+)=(?:(true|false)|(\S+?))(?=[:.;,)]*(?:\s|$))")
OPTION = re.compile(r"(?<![\w-])--([a-z]+(?:-[a-z]+)*)")


def as_in_python(text: str) -> str:
    """A line with the arguments of Python in the place of options; a whole command stays as it is."""
    if "tune.py" in text:
        return text
    for option, argument in PYTHON.items():
        text = text.replace(option, argument)
    text = SETTING.sub(lambda match: f'settings={{"{match[1]}": {(match[2] or "").title() or match[3]}}}', text)
    return OPTION.sub(lambda match: match[1].replace("-", "_"), text)


@contextmanager
def as_arguments() -> Iterator[None]:
    """Calls options of the command line in errors as the arguments of Python that they are here."""
    try:
        yield
    except UserError as error:
        raise UserError(as_in_python(str(error))) from None


def overrides(settings: Settings) -> list[str]:
    """Settings as overrides of a study file, `key=value`; UserError for a value that TOML has not."""
    pairs = []
    for key, value in settings.items():
        try:
            pairs.append(f"{key}={toml_value(value)}")
        except (TypeError, ValueError):
            raise UserError(f"settings: {key}: {value!r} is no value of a study file") from None
    return pairs


def study_file(
    study: str | Path | Study, storage: str | None, settings: Settings, plugins: bool | None = None
) -> StudyFile:
    """The file of a study by name or path, or of a `Study` itself, with another storage and other settings.

    `plugins`: None where no code of plug-ins is needed, else whether it may run.
    """
    given = {**settings, **({} if storage is None else {"storage": absolute_storage(storage, Path())})}
    if isinstance(study, Study):
        return changed(StudyFile("study", Path("study.toml"), study), given, bool(plugins))
    with as_arguments():
        return load(str(study), overrides(given), plugins)


def changed(file: StudyFile, settings: Settings, plugins: bool) -> StudyFile:
    """A copy of a study file that does not exist, with other settings; errors begin with the key."""
    try:
        return overridden(replace(file, trusts_model=True), overrides(settings), plugins)
    except UserError as error:
        raise UserError(re.sub(r"^\S+\.toml(?: with --set .+?)?: (?=[\w.\[\]]+: )", "", str(error))) from None


def is_study(value: Any) -> bool:
    """Whether an argument names a study, or is one: a `Study`, a .toml file, or the name of a known study."""
    if isinstance(value, Study):
        return True
    if not isinstance(value, str | Path) or Path(value).is_dir():
        return False
    return Path(value).suffix == ".toml" or str(value) in finding.known()


# --- Progress of a call from Python: a bar in a terminal or a notebook, lines in a log.

PAUSE = 0.3  # seconds between changes of a bar's text: a notebook without widgets keeps each of them

logger = logging.getLogger("atp_tune")


@contextmanager
def working(progress: bool) -> Iterator[EventHandler]:
    """Shows progress, silences libraries, and lets Ctrl-C interrupt; errors name arguments (`as_arguments`)."""
    with as_arguments(), shown(progress) as watch, silenced(), interruptible(signal.SIGINT):
        yield watch


@contextmanager
def shown(progress: bool) -> Iterator[EventHandler]:
    """A handler that logs messages and results of trials; with `progress` also a bar, or lines on stderr.

    The lines are log messages of level INFO of the logger `atp_tune`. With `progress`, where stderr is neither a
    terminal nor a notebook and the logger has no handler, they go to stderr.
    """
    if not progress:
        yield Lines()
        return
    # Whether this process is the kernel of a notebook; false in a terminal's IPython.
    is_shown = sys.stderr.isatty() or ("ipykernel" in sys.modules and "zmq" in sys.modules)
    lines = Lines(is_shown)
    own = None if is_shown or logger.hasHandlers() else logging.StreamHandler()
    level = logger.level
    if own:
        logger.addHandler(own)
        logger.setLevel(logging.INFO)
    try:
        yield lines
        if lines.bar is not None and lines.bar.total:  # all is done
            lines.bar.n = lines.bar.total
    finally:
        if lines.bar is not None:
            lines.bar.close()
        if own:
            logger.removeHandler(own)
            logger.setLevel(level)


class Lines:
    """Logs messages and results, and moves a bar, which is made when work begins."""

    def __init__(self, has_bar: bool = False) -> None:
        self.bar: Any = None
        self._has_bar = has_bar
        self._title = self._plan = self._results = ""
        self._began = self._first = monotonic()
        self._shown = 0.0
        self._said = set[str]()
        self._remaining = Remaining()

    def __call__(self, event: Event) -> None:
        """Takes one event."""
        self._remaining.hear(event, monotonic())
        match event:
            case Message(text):
                if text not in self._said:
                    level = logging.WARNING if text.startswith("warning: ") else logging.INFO  # seen beside a bar too
                    logger.log(level, "%s", as_in_python(text))
                self._said.add(text)
            case TrialStarted(title, plan):
                self._title, self._plan, self._began = title, str(plan) if plan else "", monotonic()
                self._describe(title)
            case Step(phase, done, total):
                self._describe(f"{self._title}: {phase} {done}/{total}")
            case TrialEnded():
                left = self._remaining.left(monotonic())
                rest = "" if left is None else f", {duration(left)} left"
                logger.info("%s", trial_line(event, self._plan, monotonic() - self._began, rest))
                self._results = f"{event.done}/{event.total} {event.what}s, {best_so_far(event)}"

    def _describe(self, text: str) -> None:
        now = monotonic()
        if not self._has_bar or now - self._shown <= PAUSE:
            return
        self._shown = now
        if self.bar is None:
            with warnings.catch_warnings(action="ignore"):  # in a notebook without widgets, that it has none
                from tqdm.auto import tqdm
            self.bar = tqdm(total=None, dynamic_ncols=True, bar_format="{l_bar}{bar}| {elapsed}{postfix}")
        left, took = self._remaining.left(now), round(now - self._first)
        if left is not None:  # of the whole call
            self.bar.n, self.bar.total = took, took + ceil(left)
        eta = "" if left is None else f"ETA {timedelta(seconds=ceil(left))}"
        self.bar.set_postfix_str(", ".join(filter(None, (self._results, eta))), refresh=False)
        self.bar.set_description_str(text, refresh=True)
