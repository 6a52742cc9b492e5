"""One run of a study, as a command asks for it: which file, which name, how long, and what it leaves to others."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import optuna

from atp_tune.errors import UserError, printable
from atp_tune.events import EventHandler, Message
from atp_tune.results.summary import made_from
from atp_tune.spec.studyfile import TRIALS, StudyFile
from atp_tune.storage import opening
from atp_tune.storage.trace import Trace

if TYPE_CHECKING:
    from atp_tune.search.context import TrialContext

LONGEST = 200  # bytes of a study's name, from which files are named


@dataclass(frozen=True)
class StudyRun:
    """One call of the command: the study file, the study's name, and how many seconds to go on at most.

    A `context` that is open already, with this model and these texts, spares loading them. When the total is reached,
    a run that `reports` measures the test text, and one that `writes` writes the best configuration here. Of several
    workers one reports, and none writes: that is left to the process that started them. `mix`: another device or number
    format than the one on which the study began is no reason to refuse. `screens`: the study that this one is the
    screening of. `trace`: what follows the trials of this process.
    """

    file: StudyFile
    name: str
    timeout: float | None
    watch: EventHandler
    context: "TrialContext | None" = None
    reports: bool = True
    writes: bool = True
    mix: bool = False
    screens: str | None = None
    trace: Trace = field(default_factory=Trace)

    def note(self, text: str) -> None:
        """Tells one line."""
        self.watch(Message(text))


def with_stored_total(run: StudyRun, study: optuna.Study) -> StudyRun:
    """The run with the total that the study was last asked for, unless this command asks for one itself."""
    made = made_from(study.user_attrs.get("made_from"))
    if made is None or run.file.sets_trials or not made.sets_trials:
        return run
    search = run.file.study.search.model_copy(update={"trials": made.study.search.trials})
    spec = run.file.study.model_copy(update={"search": search})
    asked = tuple(override for override in made.overrides if override.startswith(TRIALS))
    return replace(run, file=replace(run.file, study=spec, overrides=(*run.file.overrides, *asked)))


def load_existing(run: StudyRun) -> optuna.Study | None:
    """The study as it stands, if there is one."""
    db = opening.open_storage(run.file.storage_url, create=False)
    return opening.find_study(db, run.name) if db else None


def check_name(name: str) -> None:
    """UserError for a study's name that files and terminals cannot bear."""
    if not name or printable(name) != name or len(name.encode()) > LONGEST:
        shown = name if len(name) <= 40 else f"{name[:39]}…"
        raise UserError(
            f"study {shown}: its name must have 1 to {LONGEST} bytes, all printable; choose --study-name NAME"
        )
