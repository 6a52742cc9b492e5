"""What people see of a study: trials, progress, summary. Needs neither torch nor a model."""

import shlex
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from atp_tune.cli.terminal import console, markdown, markdown_table, table
from atp_tune.errors import printable

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from atp_tune.metrics.perplexity import Change
    from atp_tune.metrics.speed import Measured, Phase, Speed
    from atp_tune.results.status import Running, Status
    from atp_tune.results.summary import Rank, Summary
    from atp_tune.spec.config import Divergences, Scores, ZeroShot
    from atp_tune.spec.studyfile import StudyFile


def show_summary(summary: "Summary", file: "StudyFile") -> None:
    """Dense, uniform and the best of each allocation as one Markdown table, and the commands that come next."""
    from atp_tune.results.formatting import beginning_of, draws_note, errors_of, method_of, mixture_of

    sparsity = summary.sparsity or file.study.sparsity
    console.print(f"{printable(summary.name)}: {sparsity:.0%} sparsity\n", highlight=False)
    console.print(markdown(_results(summary)), highlight=False)
    paired = "against uniform: same pruner, same windows, error of the difference"
    notes = [f"±: {errors_of(summary)}; {paired}", draws_note(summary)]
    console.print("\n" + "\n".join(filter(None, notes)), style="dim", highlight=False)
    best = summary.best_trial
    if best is not None:
        lowest = ", the lowest perplexity of the front; `export --trial N` takes another" if summary.front else ""
        console.print(f"best: trial {best.number}, {method_of(best)}{lowest}", highlight=False)
    if summary.front:
        console.print(f"\nPareto front\n\n{markdown(_front(summary))}\n", highlight=False)
    _show_rest(summary)
    if summary.zero_shot is not None and summary.zero_shot.mean:
        console.print(f"zero-shot accuracy: {_means(summary.zero_shot)}", highlight=False)
    if summary.speed is not None and summary.speed.engines:
        console.print(
            f"tokens per second, sparse / dense: {_ratios(summary.speed)} (the report has the range)", highlight=False
        )
    for remark in (beginning_of(summary), mixture_of(summary)):
        if remark:
            console.print(remark, highlight=False)
    if best is not None:
        _show_next(summary, file)


def _results(summary: "Summary") -> Table:
    from atp_tune.results.formatting import drawn, method_of
    from atp_tune.results.summary import is_uniform, score_of
    from atp_tune.spec.config import Scores

    has_kl, draws = "kl" in summary.goals, drawn(summary)
    kl = ("search KL", "report KL", "KL against uniform") if has_kl else ()
    more = (f"perplexity, {draws} draws", f"against uniform, {draws} draws") if draws else ()
    table = markdown_table(
        "method", "sparsity", "search perplexity", "report perplexity", "against uniform", *more, *kl
    )

    def over(trial: "FrozenTrial | None") -> tuple[str, ...]:
        return _over_draws(summary, trial) if draws else ()

    table.add_row("dense", "0%", *_cells(summary.dense), "–", *over(None), *(("0", "0", "–") if has_kl else ()))
    for trial in summary.uniforms:
        scores = Scores(search=score_of(trial), report=summary.reports.get(trial.number))
        kls = (*_cells(summary.kl(trial)), "–") if has_kl else ()
        table.add_row(method_of(trial), _zeros(trial), *_cells(scores), "–", *over(trial), *kls)
    for rank in summary.ranks:
        if not is_uniform(rank.trial):
            kls = (*_cells(summary.kl(rank.trial)), _change(rank.kl_against, rank)) if has_kl else ()
            change = _change(rank.against, rank)
            cells = (*_cells(rank.scores), change, *over(rank.trial))
            table.add_row(method_of(rank.trial), _zeros(rank.trial), *cells, *kls)
    return table


def _over_draws(summary: "Summary", trial: "FrozenTrial | None") -> tuple[str, ...]:
    from atp_tune.results.formatting import draws_of

    return tuple(cell or "–" for cell in draws_of(summary, trial))


def _means(found: "ZeroShot") -> str:
    """The mean accuracy of each model in one line."""
    means = ", ".join(f"{name} {mean.value:.1%}" for name, mean in found.mean.items())
    return f"{means} (mean of {len(found.tasks)} tasks; the report has them)"


def _ratios(found: "Speed") -> str:
    """How much faster each engine is with the zeros, in one line."""
    from atp_tune.metrics.speed import PHASES

    def ratio(row: "Measured", phase: "Phase") -> str:
        return f"{phase} {statistics.median(row.rates(phase).ratios):.2f}×"

    return "; ".join(f"{row.name}: {', '.join(ratio(row, phase) for phase in PHASES)}" for row in found.engines)


def _change(against: "Change | None", rank: "Rank") -> str:
    if against is None:
        return "–"
    return f"{against}" + (" (search)" if rank.on == "search" else "")


def _front(summary: "Summary") -> Table:
    """The trials of the Pareto front, on the search text."""
    from atp_tune.results.formatting import method_of
    from atp_tune.results.summary import score_of

    rows = markdown_table("trial", "method", "search perplexity", "search KL")
    for trial in summary.front:
        rows.add_row(str(trial.number), method_of(trial), str(score_of(trial)), str(summary.kl(trial).search))
    return rows


def _zeros(trial: "FrozenTrial") -> str:
    return f"{trial.user_attrs['realised']:.2%}" if "realised" in trial.user_attrs else "–"


def _show_rest(summary: "Summary") -> None:
    from atp_tune.results.summary import is_uniform

    others = any(trial.values is not None and not is_uniform(trial) for trial in summary.trials)
    if summary.best_trial is not None and is_uniform(summary.best_trial) and others:
        console.print("no trial is better than uniform", highlight=False)
    screening = summary.screening
    if screening is not None and not summary.trials:
        console.print(
            f"screening: {screening.done} of {screening.total} trials are done; "
            f"they are the study {printable(screening.study)}",
            highlight=False,
        )
    if summary.total is not None and summary.done < summary.total:
        console.print(f"{summary.done} of {summary.total} trials are done", highlight=False)
    elif not summary.complete and summary.best_trial is not None and summary.best.report is None:
        console.print("the report text is not measured yet: the same command goes on", highlight=False)
    elif not summary.complete and summary.best_trial is not None and summary.done == summary.total:
        console.print("not all final numbers are measured yet: the same command goes on", highlight=False)


def _show_next(summary: "Summary", file: "StudyFile") -> None:
    best = file.best_of(summary.name)
    if summary.best.report is not None and _is_of(best, summary.best_trial):
        config, out = printable(str(_short(best))), f"{printable(summary.name)}-sparse"
        console.print(f"best configuration: {config}", highlight=False)
        command = shlex.join(["python", "tune.py", "apply", "--config", config, "--out", out])
        console.print(f"sparse checkpoint:  {command}", highlight=False)


def _is_of(file: Path, trial: "FrozenTrial | None") -> bool:
    """Whether a configuration is there and of this trial: one of an earlier best may have been left."""
    from atp_tune.errors import UserError
    from atp_tune.spec.config import read_config

    try:
        return trial is not None and file.exists() and read_config(file).trial == trial.number
    except UserError:
        return False


def show_status(summary: "Summary", file: "StudyFile") -> None:
    """All trials of a study, then its summary."""
    from atp_tune.results.summary import score_of

    console.print(trials_table(summary, summary.trials))
    values = [score.value for trial in summary.trials if (score := score_of(trial)) is not None]
    if len(values) > 1:
        console.print(
            f"spread: {min(values):.2f} to {max(values):.2f}, median {statistics.median(values):.2f}",
            highlight=False,
        )
    show_summary(summary, file)


def trials_table(summary: "Summary", trials: "list[FrozenTrial]") -> Table:
    """Some of a study's trials, one a row."""
    from atp_tune.results.formatting import remark_of

    best = summary.best_trial
    has_kl = "kl" in summary.goals
    rows = table("trial", "state", "plan", "perplexity", *(["KL"] if has_kl else []), "zeros", "s", "remark")
    for trial in trials:
        is_best = best is not None and trial.number == best.number
        words = ("best" if is_best else "", remark_of(trial, summary))
        row = _row(trial, "; ".join(word for word in words if word))
        kl = summary.kl(trial).search
        rows.add_row(*row[:4], *([f"{kl.value:.4f}" if kl else ""] if has_kl else []), *row[4:])
    return rows


def _row(trial: "FrozenTrial", remark: str) -> list[str]:
    from atp_tune.results.formatting import plan_of
    from atp_tune.results.summary import score_of

    attrs, score = trial.user_attrs, score_of(trial)
    value = "" if score is None else f"{score.value:.2f}"
    error = f" ± {score.stderr:.2f}" if score and "stderr" in attrs else ""
    return [
        str(trial.number),
        trial.state.name.lower(),
        plan_of(trial),
        value + error,
        f"{attrs['realised']:.2%}" if "realised" in attrs else "",
        f"{sum(attrs['seconds'].values()):.0f}" if "seconds" in attrs else "",
        remark,
    ]


def progress_line(status: "Status") -> str:
    """How far a study is, in one line: trials, best, what runs and for how long, time left."""
    from atp_tune.results.formatting import duration

    done = f"[{status.done}/{status.total}]" if status.total else f"[{status.done}]"
    best, score = "no best yet", status.best and status.best.search
    if status.best and score:
        kl = status.best.kl and status.best.kl.search
        value = f"KL {kl.value:.4f}" if kl and status.objective == ("kl",) else f"{score.value:.2f}"
        best = f"best {value} (trial {status.best.trial})"
    running = [_runs(one) for one in status.running] or [_screens(status) or _idle(status)]
    left = [] if status.seconds_left is None else [f"about {duration(status.seconds_left)} left"]
    return f"{done} {', '.join([best, *running, *left])}"


def _screens(status: "Status") -> str:
    """How far the screening is, until the study's own trials begin."""
    found = status.screening
    return f"screening: {found.done} of {found.total} trials" if found and not status.trials else ""


def _runs(one: "Running") -> str:
    from atp_tune.results.formatting import duration

    return f"trial {one.trial} " + ("was lost with its process" if one.lost else f"runs for {duration(one.seconds)}")


def _idle(status: "Status") -> str:
    if status.complete:
        return "complete"
    if status.total is None or status.done < status.total:
        return "no trial runs"
    lacks = status.best is None or status.best.report is None
    return "the report text is not measured yet" if lacks else "not all final numbers are measured yet"


def _cells(scores: "Scores | Divergences") -> list[str]:
    return [str(score) if score else "–" for score in (scores.search, scores.report)]


def _short(path: Path) -> Path:
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path
