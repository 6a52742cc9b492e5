"""Tables of a study for the terminal: trials, progress, summary; `status`, and the last words of a run."""

import shlex
import signal
import statistics
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from time import sleep

from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, TrialState
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text
from sqlalchemy.exc import SQLAlchemyError

from atp_tune.cli.terminal import console, echo, interruptible, markdown, table
from atp_tune.config.best import read_config
from atp_tune.config.plugged import permission
from atp_tune.config.studyfile import StudyFile, read
from atp_tune.errors import UserError, printable
from atp_tune.metrics import Continuations
from atp_tune.results import summary as tables
from atp_tune.results.formatting import (
    best_words,
    continuations_note,
    duration,
    in_one_line,
    is_known,
    limit_words,
    meaning_of_errors,
    sizes_note,
    study_remarks,
    texts_note,
    wanted,
)
from atp_tune.results.results import is_uniform
from atp_tune.results.status import Status, TrialStatus, make_status, to_json
from atp_tune.results.summary import Summary, summarise
from atp_tune.storage import opening
from atp_tune.storage.database import without_password

MARK = " ←"  # at the best of several points
WIDE_ENOUGH = 33  # columns for each of the texts side by side


def show_summary(summary: Summary, file: StudyFile) -> None:
    """Prints dense, uniform and the best of each allocation as a Markdown table, then the next commands."""
    spec = (summary.made_from or file).study
    if summary.sparsity:  # as stored: the file may have changed since
        spec = spec.model_copy(update={"sparsity": summary.sparsity})
    echo(f"{printable(summary.name)}: {wanted(spec)}\n")
    echo(drawn(tables.overview(summary, summary.goal.hidden)))
    if kinds := tables.kinds(summary):
        echo(f"\n{drawn(kinds)}")
    # The legend of the table.
    same = f"same {summary.amount.method}{summary.goal.same}, same {summary.results.words.unit}"
    notes = [
        f"±: {meaning_of_errors(summary)}; against uniform: {same}, error of the difference",
        sizes_note(summary), summary.goal.draws(summary), texts_note(summary),
        *(by.note for by in summary.results.measures), summary.results.words.note,
    ]  # fmt: skip
    if summary.limit:
        by_tasks = "min_accuracy" in summary.limit
        where = "at the lower end" if by_tasks else f"validation {summary.results.data}, at the upper end"
        notes.append(f"limit: {limit_words(summary.limit)}, {where} of the standard error")
    echo("\n" + "\n".join(filter(None, notes)), style="dim")
    if summary.best_trial is not None:
        echo(summary.goal.outcome(summary))
    if summary.choices:
        echo("`export` writes another point: --sparsity or --bpw, --max-increase or --trial names it")
    if front := tables.front(summary):
        echo(f"\nPareto front\n\n{drawn(front)}\n")
    _show_rest(summary)
    if (scores := summary.zero_shot) is not None and scores.mean:
        means = ", ".join(f"{name} {mean.value:.1%}" for name, mean in scores.mean.items())
        echo(f"zero-shot accuracy: {means} (mean of {len(scores.tasks)} tasks; the report has them)")
    if summary.speed is not None and summary.speed.engines:
        from atp_tune.report.formats import speed  # here: it brings Plotly and the pages

        speeds = speed(summary.speed, where=False)
        where = ", ".join(dict.fromkeys(row.where for row in summary.speed.engines))
        echo(f"\n{markdown((f'best, on {where}', *speeds.head[1:]), speeds.rows)}\n")
    for remark in study_remarks(summary):
        echo(remark)
    if summary.continuations:
        show_continuations(summary.continuations)
    show_next(summary, file)


def drawn(content: tables.Table) -> str:
    """A table in Markdown, with an arrow at the best trial."""
    where = list(content.head).index("trial") if "trial" in content.head else -1
    rows = [
        [f"{cell}{MARK}" if (row, column) == (content.best, where) else cell for column, cell in enumerate(cells)]
        for row, cells in enumerate(content.rows)
    ]
    return markdown(content.head, rows)


def show_continuations(result: Continuations) -> None:
    """Prints what each model makes of each prompt: side by side on a wide terminal, else one below the other."""
    is_wide = console().is_terminal and console().width >= WIDE_ENOUGH * len(result.names)
    width = max(8, *map(len, result.names))
    for prompt, texts in result.rows():
        echo(f"\n{in_one_line(prompt)} …", style="bold")
        if is_wide:
            side_by_side = table(*texts)
            side_by_side.add_row(*map(in_one_line, texts.values()))
            echo(side_by_side, soft_wrap=False)
        else:
            for name, text in texts.items():
                echo(f"  {name:<{width}} {in_one_line(text)}")
    echo(f"\n{continuations_note(result)}\n", style="dim")


def _show_rest(summary: Summary) -> None:
    others = any(trial.values is not None and not is_uniform(trial) for trial in summary.trials)
    if summary.goal.compares and summary.best_trial is not None and is_uniform(summary.best_trial) and others:
        echo("no trial is better than uniform")
    screening = summary.screening
    if screening is not None and not summary.trials:
        done = f"{screening.done} of {screening.total} trials are done"
        echo(f"screening: {done}; they are the study {printable(screening.study)}")
    if summary.requested is not None:
        echo(f"ended early, after {summary.total} of {summary.requested} trials")
    if summary.total is not None and summary.done < summary.total:
        echo(f"{summary.done} of {summary.total} trials are done")
    elif not summary.complete and summary.best_trial is not None:
        if not summary.is_tested:
            echo("the test text is not measured yet: the same command resumes the study")
        elif summary.done == summary.total:
            echo("not all final numbers are measured yet: the same command resumes the study")


def show_status(summary: Summary, file: StudyFile) -> None:
    """Prints all trials of a study, then its summary."""
    echo(trials_table(summary, summary.trials))
    scores = (summary.results.score(trial, "validation") for trial in summary.trials)
    values = [score.value for score in scores if score is not None]
    if len(values) > 1 and summary.goal.compares:
        echo(f"spread: {min(values):.2f} to {max(values):.2f}, median {statistics.median(values):.2f}")
    show_summary(summary, file)


def trials_table(summary: Summary, trials: list[FrozenTrial]) -> Table:
    """Some of a study's trials, one a row."""
    content = tables.trials(summary, trials)
    drawn = table(*content.head)
    for row in content.rows:
        drawn.add_row(*row)
    return drawn


def progress_line(status: Status) -> str:
    """One line: trials done, best value, running trials with their times, time left."""
    done = f"[{status.done}/{status.total}]" if status.total else f"[{status.done}]"
    best, measure = "no best yet", status.objective[0]
    if status.best and (score := status.best.scores[measure]["validation"]):
        best = f"{best_words(measure, score.value, dict(status.best))} (trial {status.best.trial})"
    running = [
        f"trial {one.trial} " + ("was lost with its process" if one.lost else f"runs for {duration(one.seconds)}")
        for one in status.running
    ]
    if not running:
        if status.screening and not status.trials:
            running = [f"screening: {status.screening.done} of {status.screening.total} trials"]
        elif status.complete:
            running = ["complete"]
        elif status.total is None or status.done < status.total:
            running = ["no trial runs"]
        else:
            lacks = status.best is None or status.best.scores["perplexity"]["test"] is None
            running = ["the test text is not measured yet" if lacks else "not all final numbers are measured yet"]
    left = [] if status.seconds_left is None else [f"about {duration(status.seconds_left)} left"]
    return f"{done} {', '.join([best, *running, *left])}"


# --- The last words of a run: the file of the best configuration, and the commands that come next.


def show_next(summary: Summary, file: StudyFile) -> None:
    """Prints the file of the best configuration, if it holds the best trial, and the commands that come next."""
    if not summary.is_tested or summary.best_trial is None:
        return
    best = file.best_path(summary.name)
    try:
        trial = read_config(best).trial if best.exists() else None
    except UserError:
        return
    if trial != summary.best_trial.number:
        return
    form = "slim" if summary.of_channels else summary.amount.form
    # A name that no file has here: the name itself, or followed by -2, -3 and so on.
    name = f"{printable(summary.name).replace('/', '_')}-{form}"
    names = [f"{name}{more}{summary.amount.ending}" for more in ("", *(f"-{number}" for number in range(2, 1000)))]
    config, out = _from_here(best), next((free for free in names if not Path(free).exists()), names[0])
    # The words that name the stored study from here.
    study = ["--study", file.name if is_known(file.path) else _from_here(file.path)]
    study += ["--study-name", printable(summary.name)] if summary.name != file.name else []
    if (url := file.study.storage) and url != read(file.path).get("storage"):
        study += ["--storage", without_password(url)]
    if points := summary.choices:
        middle = points[len(points) // 2].trial.number
        second = ("another point", ["export", *study, "--trial", str(middle)])
    else:
        second = ("page with figures", ["report", *study])
    trusts = permission(file.study)
    echo(f"best configuration: {config}")
    for what, words in (
        *[("talk with it", ["chat", *study, *trusts])] * (summary.results.data == "text"),
        (f"{form} checkpoint", ["apply", "--config", config, "--out", out, *["--slim"] * summary.of_channels, *trusts]),
        second,
        *[("top-1 and top-5", ["evaluate", "--config", config])] * (summary.results.data == "images"),
    ):
        echo(f"{what + ':':<19} {shlex.join(['python', 'tune.py', *words])}")


def _from_here(path: Path) -> str:
    """A path relative to the current folder, if it is inside."""
    here = Path.cwd()
    return printable(str(path.relative_to(here) if path.is_relative_to(here) else path))


# --- `status` and `status --watch`: on a terminal, in a pipe, or as JSON.


def watch(file: StudyFile, name: str, every: float, as_json: bool) -> None:
    """Shows a study until it is complete, then its summary; Ctrl-C ends it with exit code 130, as it does a run.

    A terminal's alternate screen has as many trials as it has rows for; after Ctrl-C the normal screen has the last
    state. Elsewhere what changed is printed.
    """
    live = Live(console=console(), screen=True, auto_refresh=False) if console().is_terminal and not as_json else None
    changes, last, waits = Changes(as_json), None, f"study {name}: has no trials yet; waiting for it"
    try:
        with interruptible(), live or nullcontext():
            try:
                for summary in looks(file, name, every):
                    last = summary
                    if live:
                        shown = _line(waits) if summary is None else fitting(summary, datetime.now())
                        live.update(shown, refresh=True)
                    else:
                        changes.show(summary, waits)
            except KeyboardInterrupt:
                if live:  # another one would leave the terminal without its screen and cursor
                    signal.signal(signal.SIGINT, signal.SIG_IGN)
                    live.stop()
                if live and last:
                    echo(fitting(last, datetime.now()))
                raise
    except KeyboardInterrupt:
        sys.exit(130)
    if last is not None and not as_json:
        show_status(last, file)


def looks(file: StudyFile, name: str, every: float) -> Iterator[Summary | None]:
    """Summaries of the study every so many seconds, until it is complete; None while it does not exist."""
    db = study = None
    while True:
        db = db or opening.open_storage(file.storage_url, create=False)
        study = study or (opening.find_study(db, name) if db else None)
        try:
            summary = summarise(study) if study else None
        except (StorageInternalError, SQLAlchemyError, KeyError) as error:
            reason = "it is gone" if isinstance(error, KeyError) else str(error).splitlines()[0]
            raise UserError(f"study {name}: cannot be read any more: {reason}") from None
        yield summary
        if summary and summary.complete:
            return
        sleep(every)


class Changes:
    """Prints the states of a study, each only if it differs from the one before: what changed of it, or JSON lines."""

    def __init__(self, as_json: bool = False) -> None:
        self._as_json = as_json
        self._said: Status | str | None = ""
        self._known = dict[int, TrialStatus]()

    def show(self, summary: Summary | None, waits: str = "") -> None:
        """Prints a state; nothing of a complete study, but in JSON, since its summary follows.

        `waits`: what is said, once, of a study that does not exist yet.
        """
        status = None if summary is None else make_status(summary, datetime.now())
        before, self._said = self._said, status and status.without_clock()
        if before == self._said:  # times that the clock alone changes do not count
            return
        if summary is None or status is None:
            print(waits, file=sys.stderr, flush=True) if self._as_json else echo(waits)
        elif self._as_json:
            print(to_json(status, indent=None), flush=True)
        elif not summary.complete:
            changed = {trial.number for trial in status.trials if self._known.get(trial.number) != trial}
            self._known = {trial.number: trial for trial in status.trials}
            if changed:
                echo(trials_table(summary, [trial for trial in summary.trials if trial.number in changed]))
            echo(progress_line(status))


def fitting(summary: Summary, now: datetime) -> RenderableType:
    """All trials and the progress; only the best and the last trials where the terminal has too few rows."""
    progress = _line(progress_line(make_status(summary, now)))
    for trials in _choices(summary, console().height):
        waiting = sum(trial.state == TrialState.WAITING for trial in summary.trials)
        counts = ((len(summary.trials) - len(trials) - waiting, "earlier"), (waiting, "waiting"))
        hidden = " and ".join(f"{count} {word}" for count, word in counts if count)
        more = [_line(f"and {hidden}", "dim")] if len(trials) < len(summary.trials) else []
        drawn = Group(trials_table(summary, trials), *more, progress)
        if len(console().render_lines(drawn)) <= console().height:
            return drawn
    return progress


def _choices(summary: Summary, rows: int) -> Iterator[list[FrozenTrial]]:
    """All trials, then the best trial with ever fewer of the last trials that have begun."""
    yield summary.trials
    begun = [trial for trial in summary.trials if trial.state != TrialState.WAITING]
    best = summary.best_trial
    for count in range(min(rows, len(begun)), 0, -1):
        last = begun[-count:]
        yield [best, *last[1:]] if best is not None and best.number < last[0].number else last


def _line(text: str, style: str = "") -> Text:
    return Text(printable(text), style=style, no_wrap=False, overflow="fold")
