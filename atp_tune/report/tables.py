"""The tables of a report, as text; all formats show the same."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from optuna.trial import FrozenTrial

from atp_tune.allocations.budget import SYMBOLS
from atp_tune.errors import printable
from atp_tune.extras import as_typed
from atp_tune.figures.history import spent
from atp_tune.measures import Gain, TaskScore
from atp_tune.metrics.continuations import Continuations
from atp_tune.metrics.speed import Speed, spread
from atp_tune.report.contents import Contents
from atp_tune.results import amounts
from atp_tune.results.amounts import amount_of
from atp_tune.results.formatting import (
    ACCURACY,
    NOTHING,
    cells,
    changed,
    dense_row,
    drawn,
    draws_of,
    duration,
    hit_cells,
    in_one_line,
    kinds_rows,
    plan_of,
    points_head,
    points_row,
    remark_of,
)
from atp_tune.results.summary import Summary
from atp_tune.results.trials import allocation_of, is_uniform, score_of
from atp_tune.spec.config import SHARES, TaskScores, ZeroShot, scores_after
from atp_tune.spec.plugged import permission


@dataclass(frozen=True)
class ReportTable:
    """A head and rows of cells; `words`: columns of text, others hold numbers; `best`: the row to emphasise."""

    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    words: tuple[int, ...] = (0,)
    best: int | None = None


def headline(summary: Summary) -> ReportTable:
    """Dense, uniform and best on both texts, and over the draws of the calibration text, if there are several."""
    has_kl, best, draws = "kl" in summary.objectives, summary.best_trial, drawn(summary)

    def more(trial: FrozenTrial | None) -> tuple[str, ...]:
        over = (draws_of(summary, trial)[0] or NOTHING,) if draws else ()
        return (*over, *(cells(summary.kl(trial)) if has_kl else ()), *hits(trial))

    def hits(trial: FrozenTrial | None) -> tuple[str, ...]:
        return hit_cells(summary, trial)[:2] if summary.hits else ()

    own = (*((NOTHING,) if draws else ()), *(("0", "0") if has_kl else ()), *hits(None))
    rows = [("dense", *cells(summary.dense), *own)]
    if best is not None:
        uniform = f"uniform, {best.params.get('pruner', '')}"
        rows.append((uniform, *cells(summary.uniform), *more(summary.uniform_trial)))
        rows.append((f"best, {plan_of(best)} (trial {best.number})", *cells(summary.best), *more(best)))
        if summary.trained is not None:
            rest = (NOTHING,) * len(own)
            rows.append((f"best, trained (trial {best.number})", *cells(scores_after(summary.trained)), *rest))
    data = summary.data
    over = (f"test {data}, {draws} draws",) if draws else ()
    kls = (f"KL, validation {data}", f"KL, test {data}") if has_kl else ()
    accuracy = ACCURACY[:2] if summary.hits else ()
    head = ("perplexity", f"validation {data}", f"test {data}", *over, *kls, *accuracy)
    return ReportTable(head, rows, best=2 if best else None)


def kinds(summary: Summary) -> ReportTable | None:
    """Test perplexities by kind of a mixed text; None for other texts."""
    head, *rows = [tuple(row) for row in kinds_rows(summary)] or [()]
    return ReportTable(head, rows) if rows else None


def front(summary: Summary) -> ReportTable:
    """The trials of the Pareto front, on the validation text."""
    rows = [
        (str(trial.number), plan_of(trial), str(score_of(trial)), str(summary.kl(trial).validation))
        for trial in summary.front
    ]
    return ReportTable(("trial", "plan", "perplexity", "KL"), rows, (1,), best=0 if rows else None)


def points(summary: Summary) -> ReportTable:
    """Dense, and the points of a study over an interval of sparsities."""
    rows = [tuple(dense_row(summary)), *(tuple(points_row(summary, point)) for point in summary.points)]
    best = next((k for k, point in enumerate(summary.points, 1) if point.is_best), None)
    head = tuple(points_head(summary))
    return ReportTable(head, rows, (1, len(head) - 1) if summary.limit else (1,), best)


def ranks(summary: Summary) -> ReportTable:
    """The best of each allocation, compared with uniform window by window."""
    has_kl, draws, rows = "kl" in summary.objectives, drawn(summary), []
    for rank in summary.ranks:
        name = f"{rank.trial.params.get('pruner', '')} {allocation_of(rank.trial)}"
        over = tuple(cell or NOTHING for cell in draws_of(summary, rank.trial)) if draws else ()
        kls = (*cells(summary.kl(rank.trial)), changed(rank.kl_against, rank.on)) if has_kl else ()
        hits = hit_cells(summary, rank.trial) if summary.hits else ()
        change = changed(rank.against, rank.on)
        rows.append((name, str(rank.trial.number), *cells(rank.scores), change, *over, *kls, *hits))
    data = summary.data
    head = ("best of", "trial", f"validation {data}", f"test {data}", "against uniform")
    over = (f"test {data}, {draws} draws", f"against uniform, {draws} draws") if draws else ()
    more = (f"KL, validation {data}", f"KL, test {data}", "KL against uniform") if has_kl else ()
    accuracy = ACCURACY if summary.hits else ()
    return ReportTable((*head, *over, *more, *accuracy), rows, best=0 if rows else None)


def importance(contents: Contents) -> ReportTable:
    """Share of each parameter in what distinguishes good trials from the others."""
    shares = contents.importance.items()
    return ReportTable(("parameter", "share"), [(symbol(name), f"{share:.0%}") for name, share in shares])


def zero_shot(found: ZeroShot) -> ReportTable:
    """Scores of each model on each task, their mean, and best − uniform paired by items."""
    models = list(found.seconds)
    paired = any(task.best_minus_uniform for task in found.tasks)
    rows = []
    for task in found.tasks:
        scores = (measure(task.scores.get(model, {}).get(task.metric), task.metric) for model in models)
        rows.append((_task(task), str(task.items), *scores, *[_points(task.best_minus_uniform, task.metric)] * paired))
    if len(rows) > 1 and found.mean:
        means = (measure(found.mean.get(model)) for model in models)
        rows.append(("mean", "", *means, *[_points(found.mean_best_minus_uniform)] * paired))
    return ReportTable(("task", "items", *models, *["best − uniform"] * paired), rows)


def zero_shot_note(found: ZeroShot) -> str:
    """A note under that table: errors, versions, device and limits."""
    limit = "" if found.limit is None else f", at most the first {found.limit} items of each task"
    missing = f"; left out: {', '.join(found.missing)}" if found.missing else ""
    paired = "; best − uniform: item by item" if "best" in found.seconds else ""
    by = f"lm-eval {found.versions['lm_eval']}, " if "lm_eval" in found.versions else ""
    where = f"{by}{found.dtype}, {found.device}"
    return f"±: standard error over items{paired}; {where}{limit}{missing}"


def continuations(found: Continuations) -> ReportTable:
    """What each model makes of each prompt."""
    rows = [tuple(map(in_one_line, (prompt, *texts.values()))) for prompt, texts in found.rows()]
    return ReportTable(("prompt", *found.names), rows, tuple(range(len(found.names) + 1)))


def speed(found: Speed, where: bool = True) -> ReportTable:
    """Bytes of the weights, compressed and packed; rates of each engine, dense and sparse; the runs' ratios.

    `where`: each rate names its device.
    """
    sizes, rows = found.sizes, []
    kinds = ("weight files, zstd, MB", sizes.dense_zstd, sizes.sparse_zstd), ("packed, MB", sizes.dense, sizes.packed)
    for name, before, after in kinds:
        if before is not None and after is not None:
            rows.append((name, f"{before / 1e6:.1f}", f"{after / 1e6:.1f}", f"{before / max(1, after):.2f}× smaller"))
    for row in found.rows:
        for phase in row.phases:
            rates = row.rates(phase)
            dense, sparse = (f"{median(values):.1f}" for values in (rates.dense, rates.sparse))
            ratio = f"{spread(rates.ratios, '.2f')}× as fast"
            name = f"{phase}, {found.unit} per second: {row.name}" + (f", {row.where}" if where else "")
            rows.append((name, dense, sparse, ratio))
    return ReportTable(("speed", "dense", "sparse", "sparse against dense"), rows)


def _task(task: TaskScores) -> str:
    shots = f" ({task.num_fewshot}-shot)" if task.num_fewshot else ""
    return task.task + shots + ("" if task.metric == "acc" else f" [{task.metric}]")


def measure(found: TaskScore | None, metric: str = SHARES[0]) -> str:
    """A score with its standard error, in per cent if the metric is a share."""
    return NOTHING if found is None else found.written(".1%" if metric in SHARES else ".4g")


def _points(found: TaskScore | None, metric: str = SHARES[0]) -> str:
    """A difference, in percentage points if the metric is a share."""
    if found is not None and metric in SHARES:
        return str(Gain(value=found.value, stderr=found.stderr))
    return NOTHING if found is None else found.written("+.4g")


def trials(summary: Summary) -> ReportTable:
    """Every trial."""
    has_kl = "kl" in summary.objectives
    rows = [_row(trial, summary, has_kl) for trial in summary.trials]
    numbers = [trial.number for trial in summary.trials]
    best = numbers.index(summary.best_trial.number) if summary.best_trial else None
    kl = (*(("KL",) if has_kl else ()), *(("accuracy",) if summary.hits else ()))
    amount = "zeros" if summary.bits is None else "bits"
    head = ("trial", "plan", "perplexity", "±", *kl, amount, "time (s)", "state", "remark")
    return ReportTable(head, rows, (1, len(head) - 2, len(head) - 1), best)


def comparison(studies: Sequence[Contents]) -> ReportTable:
    """One row per study, all on one text: test if all are measured on it, else validation."""
    on = "test" if all(contents.summary.text == "test" for contents in studies) else "validation"
    data = " or ".join(dict.fromkeys(contents.summary.data for contents in studies))
    columns = (f"dense, {on} {data}", "uniform", "best", "against uniform")
    kinds = dict.fromkeys(amounts.column(contents.summary) for contents in studies)
    head = ("study", " or ".join(kinds), *columns, "trials", "time", "device")
    return ReportTable(head, [_study_row(contents, on) for contents in studies], (0, 8))


def fingerprint(contents: Contents) -> ReportTable:
    """Facts that values depend on, versions of libraries, devices."""
    rows = [(key, _plain(value)) for key, value in sorted(contents.facts.items())]
    rows += [(f"version of {name}", version) for name, version in contents.versions.items()]
    return ReportTable(("key", "value"), [*rows, ("device", contents.devices or NOTHING)], (0, 1))


def commands(summary: Summary) -> list[tuple[str, str]]:
    """Purpose and command, for each command that the report shows."""
    stored = summary.made_from is not None
    study = shlex.quote(f"{plain_name(summary.name)}.toml" if stored else printable(summary.name))
    config, folder = (shlex.quote(plain_name(summary.name) + end) for end in (".best.json", "-sparse"))
    trusts = "".join(f" {word}" for word in permission(summary.made_from.study)) if summary.made_from else ""
    rows = [
        ("run or resume", f"python tune.py --study {study}{trusts}"),
        ("show the trials", f"python tune.py status --study {study}"),
        ("best configuration", f"python tune.py export --study {study} --out {config}"),
        ("sparse checkpoint", f"python tune.py apply --config {config} --out {folder}{trusts}"),
    ]
    return [(purpose, as_typed(command)) for purpose, command in rows]


def plain_name(name: str) -> str:
    """A study's name as the name of a file."""
    return printable(name).replace("/", "_")


def symbol(name: str) -> str:
    """A parameter as the papers write it, with its name."""
    return f"{SYMBOLS[name]} ({name})" if name in SYMBOLS else name


def _row(trial: FrozenTrial, summary: Summary, has_kl: bool) -> tuple[str, ...]:
    attrs, score = trial.user_attrs, score_of(trial)
    return (
        str(trial.number),
        plan_of(trial),
        f"{score.value:.2f}" if score else "",
        f"{score.stderr:.2f}" if score and score.stderr and "stderr" in attrs else "",
        *((str(summary.kl(trial).validation or ""),) if has_kl else ()),
        *((str(summary.hits.trial(trial).validation or ""),) if summary.hits else ()),
        _amount(trial, summary),
        f"{sum(spent(trial).values()):.1f}" if spent(trial) else "",
        trial.state.name.lower(),
        remark_of(trial, summary),
    )


def _amount(trial: FrozenTrial, summary: Summary) -> str:
    if summary.bits is not None:
        return amount_of(trial, summary)
    return f"{trial.user_attrs['realised']:.4f}" if "realised" in trial.user_attrs else ""


def _study_row(contents: Contents, on: str) -> tuple[str, ...]:
    summary = contents.summary
    dense, uniform, best = (getattr(scores, on) for scores in (summary.dense, summary.uniform, summary.best))
    paired = summary.ranks[0].against if summary.ranks and not is_uniform(summary.ranks[0].trial) else None
    return (
        summary.name,
        contents.sparsity or NOTHING,
        *(str(score or NOTHING) for score in (dense, uniform, best)),
        f"{paired} ({summary.ranks[0].on})" if paired else NOTHING,
        f"{summary.done}" + (f"/{summary.total}" if summary.total else ""),
        duration(contents.seconds),
        contents.devices or NOTHING,
    )


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
