"""Tables for people: trials, summary, studies. Needs neither torch nor a model."""

import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from atp_tune.config import Config, Scores
    from atp_tune.perplexity import Perplexity
    from atp_tune.studyfile import StudyFile
    from atp_tune.summary import Summary

console = Console(soft_wrap=True, markup=False)  # paths and reasons may hold brackets
WRAPPED = ("remark", "what", "plan", "best of")  # columns that may take several lines
TOLERANCE = 0.001  # relative difference of perplexities that rounding may make


def show_summary(summary: "Summary", file: "StudyFile") -> None:
    """Dense, uniform and best side by side, and the commands that come next."""
    from atp_tune.summary import named

    table = _table(f"{summary.name}: {file.study.sparsity:.0%} sparsity", "", "search text", "report text")
    table.add_row("dense", *_cells(summary.dense))
    best = summary.best_trial
    if best is not None:
        table.add_row(f"uniform, {best.params['pruner']}", *_cells(summary.uniform))
        table.add_row(f"best (trial {best.number})", *_cells(summary.best))
    console.print(table)
    console.print("perplexity ± standard error over windows", style="dim", highlight=False)
    if best is not None:
        console.print(f"best: {named(best)}", highlight=False)
    if len(summary.ranks) > 2:  # with two it is uniform and the best, as above
        _show_ranks(summary)
    _show_gain(summary)
    if best is not None:
        _show_next(summary, file)


def _show_ranks(summary: "Summary") -> None:
    """The best of each allocation, compared with uniform window by window."""
    from atp_tune.summary import allocation_of

    table = _table(None, "best of", "trial", "search text", "report text", "against uniform")
    for rank in summary.ranks:
        against = "" if rank.against is None else f"{rank.against}" + (" (search)" if rank.on == "search" else "")
        label = f"{rank.trial.params['pruner']} {allocation_of(rank.trial)}"
        table.add_row(label, str(rank.trial.number), *_cells(rank.scores), against)
    console.print(table)
    console.print("against uniform: same pruner, same windows; the error is that of the difference", style="dim")


def _show_gain(summary: "Summary") -> None:
    from atp_tune.summary import is_uniform

    if summary.best_trial is not None and is_uniform(summary.best_trial):
        console.print("no trial is better than uniform", highlight=False)
    elif summary.gain is not None:
        text = "report" if summary.best.report else "search"
        side = "below" if summary.gain >= 0 else "above"
        paired = summary.ranks[0].against
        error = f" ± {paired.stderr:.1%}" if paired and paired.stderr else ""
        console.print(f"best is {abs(summary.gain):.1%}{error} {side} uniform on the {text} text", highlight=False)
    if summary.total is not None and summary.done < summary.total:
        console.print(f"{summary.done} of {summary.total} trials are done", highlight=False)


def _show_next(summary: "Summary", file: "StudyFile") -> None:
    best = file.best_of(summary.name)
    if summary.best.report is not None and best.exists():
        console.print(f"best configuration: {_short(best)}", highlight=False)
        console.print(
            f"sparse checkpoint:  python tune.py apply --config {_short(best)} --out {summary.name}-sparse",
            highlight=False,
        )


def show_status(study: "optuna.Study", file: "StudyFile") -> None:
    """All trials of a study, then its summary."""
    from atp_tune.summary import summarise

    summary = summarise(study)
    table = _table(None, "trial", "state", "plan", "perplexity", "zeros", "s", "remark")
    for trial in summary.trials:
        table.add_row(*_row(trial, trial == summary.best_trial))
    console.print(table)
    values = [trial.value for trial in summary.trials if trial.value is not None]
    if len(values) > 1:
        console.print(
            f"spread: {min(values):.2f} to {max(values):.2f}, median {statistics.median(values):.2f}",
            highlight=False,
        )
    show_summary(summary, file)


def _row(trial: "FrozenTrial", is_best: bool) -> list[str]:
    from atp_tune.summary import named, remark

    attrs = trial.user_attrs
    value = "" if trial.value is None else f"{trial.value:.2f}"
    error = f" ± {attrs['stderr']:.2f}" if value and "stderr" in attrs else ""
    return [
        str(trial.number),
        trial.state.name.lower(),
        named(trial),
        value + error,
        f"{attrs['realised']:.2%}" if "realised" in attrs else "",
        f"{sum(attrs['seconds'].values()):.0f}" if "seconds" in attrs else "",
        "best" if is_best else remark(trial),
    ]


def show_applied(config: "Config", measured: "Perplexity", out: Path) -> None:
    """Where the sparse checkpoint is, and whether its perplexity is the one that was promised."""
    console.print(f"sparse checkpoint: {out}", highlight=False)
    promised = config.perplexity.report
    if promised is None:
        console.print(f"perplexity on the report text: {measured} (the configuration has none yet)", highlight=False)
        return
    change = measured.value / promised.value - 1
    console.print(
        f"perplexity on the report text: {measured}, the configuration says {promised} ({change:+.3%})",
        highlight=False,
    )
    if abs(change) > TOLERANCE:
        console.print("warning: they differ by more than 0.1 %; another device or number format?", style="yellow")


def show_studies() -> None:
    """Every study that can be run by name, and how far it is."""
    from atp_tune.errors import UserError
    from atp_tune.studyfile import known, load

    table = _table(None, "study", "state", "what")
    for path in known():
        try:
            file = load(str(path))
            table.add_row(path.stem, _state(file), file.study.description)
        except UserError as error:
            table.add_row(path.stem, "invalid", str(error))
    console.print(table)


def _state(file: "StudyFile") -> str:
    if file.database is None or not file.database.exists():
        return "not started" if file.database else "see status"
    from atp_tune.storage import find_study, open_storage
    from atp_tune.summary import summarise

    db = open_storage(file.storage_url, create=False)
    study = find_study(db, file.name) if db else None
    if study is None:
        return "not started"
    summary = summarise(study)
    best = f", best {summary.best_trial.value:.2f}" if summary.best_trial else ""
    return f"{summary.done} of {summary.total or file.study.search.trials} trials{best}"


def _table(title: str | None, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column not in WRAPPED)
    return table


def _cells(scores: "Scores") -> list[str]:
    return [str(score) if score else "–" for score in (scores.search, scores.report)]


def _short(path: Path) -> Path:
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path
