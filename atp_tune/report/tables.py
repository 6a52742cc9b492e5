"""The tables of a report that are not of models by measure, as text; all formats show the same."""

import shlex
from collections.abc import Sequence
from statistics import median
from typing import Any

from atp_tune.allocations.budget import SYMBOLS
from atp_tune.errors import printable
from atp_tune.extras import as_typed
from atp_tune.measures import Gain, Role, TaskScore
from atp_tune.metrics.continuations import Continuations
from atp_tune.metrics.speed import Speed, spread
from atp_tune.report.contents import Contents
from atp_tune.results.formatting import column, duration, in_one_line
from atp_tune.results.results import DENSE, NOTHING
from atp_tune.results.summary import Summary
from atp_tune.results.tables import Table
from atp_tune.spec.config import SHARES, TaskScores, ZeroShot
from atp_tune.spec.plugged import permission


def importance(contents: Contents) -> Table:
    """Share of each parameter in what distinguishes good trials from the others."""
    shares = contents.importance.items()
    return Table(("parameter", "share"), [(symbol(name), f"{share:.0%}") for name, share in shares])


def zero_shot(found: ZeroShot) -> Table:
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
    return Table(("task", "items", *models, *["best − uniform"] * paired), rows)


def zero_shot_note(found: ZeroShot) -> str:
    """A note under that table: errors, versions, device and limits."""
    limit = "" if found.limit is None else f", at most the first {found.limit} items of each task"
    missing = f"; left out: {', '.join(found.missing)}" if found.missing else ""
    paired = "; best − uniform: item by item" if "best" in found.seconds else ""
    by = f"lm-eval {found.versions['lm_eval']}, " if "lm_eval" in found.versions else ""
    where = f"{by}{found.dtype}, {found.device}"
    return f"±: standard error over items{paired}; {where}{limit}{missing}"


def continuations(found: Continuations) -> Table:
    """What each model makes of each prompt."""
    rows = [tuple(map(in_one_line, (prompt, *texts.values()))) for prompt, texts in found.rows()]
    return Table(("prompt", *found.names), rows, tuple(range(len(found.names) + 1)))


def speed(found: Speed, where: bool = True) -> Table:
    """Bytes of the weights, compressed and packed; rates of each engine, dense and sparse; the runs' ratios.

    `where`: each rate names its device.
    """
    sizes, rows = found.sizes, []
    kinds = ("weight files, zstd, MB", sizes.dense_zstd, sizes.sparse_zstd), ("packed, MB", sizes.dense, sizes.packed)
    for name, before, after in kinds:
        if before is not None and after is not None:
            rows.append((name, f"{before / 1e6:.1f}", f"{after / 1e6:.1f}", f"{before / max(1, after):.2f}× smaller"))
    for row in found.engines:
        for phase, rates in row.rates.items():
            dense, sparse = (f"{median(values):.1f}" for values in (rates.dense, rates.sparse))
            ratio = f"{spread(rates.ratios, '.2f')}× as fast"
            name = f"{phase}, {found.unit} per second: {row.name}" + (f", {row.where}" if where else "")
            rows.append((name, dense, sparse, ratio))
    return Table(("speed", "dense", "sparse", "sparse against dense"), rows)


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


def comparison(studies: Sequence[Contents]) -> Table:
    """One row per study, all on one text: test if all are measured on it, else validation."""
    on: Role = "test" if all(contents.summary.text == "test" for contents in studies) else "validation"
    data = " or ".join(dict.fromkeys(contents.summary.results.data for contents in studies))
    columns = (f"dense, {on} {data}", "uniform", "best", "against uniform")
    kinds = dict.fromkeys(column(contents.summary) for contents in studies)
    head = ("study", " or ".join(kinds), *columns, "trials", "time", "device")
    return Table(head, [_study_row(contents, on) for contents in studies], (0, 8))


def fingerprint(contents: Contents) -> Table:
    """Facts that values depend on, versions of libraries, devices."""
    rows = [(key, _plain(value)) for key, value in sorted(contents.facts.items())]
    rows += [(f"version of {name}", version) for name, version in contents.versions.items()]
    return Table(("key", "value"), [*rows, ("device", contents.devices or NOTHING)], (0, 1))


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


def _study_row(contents: Contents, on: Role) -> tuple[str, ...]:
    summary, results = contents.summary, contents.summary.results
    scores = [results.score(model, on) for model in (DENSE, summary.uniform_trial, summary.best_trial)]
    paired = results.against_uniform(summary.best_trial)
    return (
        summary.name,
        contents.sparsity or NOTHING,
        *(str(score or NOTHING) for score in scores),
        f"{paired.change} ({paired.on})" if paired else NOTHING,
        f"{summary.done}" + (f"/{summary.total}" if summary.total else ""),
        duration(contents.seconds),
        contents.devices or NOTHING,
    )


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
