"""The contents of a report on one study, read from its storage."""

import re
import shlex
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from math import isfinite
from statistics import median
from typing import Any

import optuna
import tomli_w
from optuna.trial import FrozenTrial, TrialState

from atp_tune.allocations.budget import SYMBOLS
from atp_tune.config.best import SHARES, ZeroShot
from atp_tune.config.plugged import permission
from atp_tune.config.studyfile import settings
from atp_tune.errors import printable
from atp_tune.measures import Gain, Role, TaskScore
from atp_tune.metrics import Continuations, Speed, spread
from atp_tune.results.formatting import duration, errors_of, in_one_line, spent, study_remarks, texts_note
from atp_tune.results.results import DENSE, NOTHING
from atp_tune.results.summary import Summary, Table, summarise
from atp_tune.storage.attributes import StudySnapshot
from atp_tune.storage.progress import is_given_up, is_lost, ranked, values_of
from atp_tune.utils.extras import as_typed

ENOUGH = 10  # measured trials: with fewer, importance of parameters is not shown


@dataclass(frozen=True)
class Contents:
    """A study's summary, and what a report says of it.

    facts         that its values depend on
    importance    of each parameter: shares of 1
    target        sparsity, of the best trial where the study searches for it; None with `bits`
    sparsity      the same as text, with the interval in which the study searches, or bits; "" if not known
    realised      share of zeros counted in the best trial
    description   in the study file
    seconds       of all trials; `devices` that they ran on
    notes         sentences on what is unusual in the study
    versions      of the libraries, of all trials
    study_file    with all overrides, as TOML; None where an early version made the study
    state         numbers of trials by state, in words; `running`, `failed`: numbers of trials
    errors        the meaning of ±, the numbers over draws, if there are any, and the texts
    verdict       the change against uniform in one sentence, with the error of the difference where it is known
    """

    summary: Summary
    facts: dict[str, Any]
    importance: dict[str, float]
    made: datetime
    target: float | None
    sparsity: str
    realised: float | None
    description: str
    seconds: float
    devices: str
    notes: list[str]
    versions: dict[str, str]
    study_file: str | None
    state: str
    running: int
    failed: int
    errors: str
    verdict: str


def gather(study: optuna.Study, made: datetime) -> Contents:
    """The contents of a report on the present state of a study."""
    study = StudySnapshot(study)
    summary = summarise(study)
    trials, best, file, asked = summary.trials, summary.best_trial, summary.made_from, summary.sparsity
    # The target, as a number and as text.
    target = None if isinstance(asked, tuple) else asked
    if best is not None and "sparsity" in best.params:
        target = float(best.params["sparsity"])
    parts = [] if target is None else [f"{target:g}"]
    parts += [f"{asked[0]:g} to {asked[1]:g}"] if isinstance(asked, tuple) else []
    # Numbers of trials by state.
    running, failed = (sum(t.state == state for t in trials) for state in (TrialState.RUNNING, TrialState.FAIL))
    counts = (
        (running, "running"), (sum("failure" in t.user_attrs for t in trials), "failed"),
        (sum(map(is_lost, trials)), "lost and run again"), (sum(map(is_given_up, trials)), "given up"),
        (sum("stopped_after" in t.user_attrs for t in trials), "stopped early"),
    )  # fmt: skip
    of = f" of {summary.total}" if summary.total is not None else ""
    said = (f"± is the {errors_of(summary)}", summary.goal.draws(summary), texts_note(summary))
    versions = [trial.user_attrs.get("versions") or {} for trial in trials]
    names = dict.fromkeys(name for each in versions for name in each)
    return Contents(
        summary,
        facts=dict(study.user_attrs.get("fingerprint", {})),
        importance=_importance(study, trials) if summary.goal.compares else {},  # the sparsity would have nearly all
        made=made,
        target=target,
        sparsity=" of ".join(parts) if summary.bits is None else f"{summary.bits:g} bits",
        realised=best.user_attrs.get("realised") if best else None,
        description=file.study.description if file else "",
        seconds=sum(sum(spent(trial).values()) for trial in trials),
        devices=_several(trial.user_attrs.get("device") for trial in trials),
        notes=study_remarks(summary),
        versions={name: _several(each.get(name) for each in versions) for name in names},
        study_file=toml(settings(file)["settings"]) if file else None,
        state=", ".join([f"{summary.done}{of} trials done", *(f"{count} {what}" for count, what in counts if count)]),
        running=running,
        failed=failed,
        errors="; ".join(part for part in said if part) + ".",
        verdict=summary.goal.said(summary).replace(" ± ", "\u00a0±\u00a0"),
    )


def _importance(study: optuna.Study, trials: list[FrozenTrial]) -> dict[str, float]:
    """Shares of the parameters that vary, the largest first; empty with too few trials."""
    done = ranked(trials)
    varied = {name for trial in done for name in trial.params}
    varied = {name for name in varied if len({trial.params.get(name) for trial in done}) > 1}
    if len(done) < ENOUGH or not varied:
        return {}
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances  # here, since it imports sklearn

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experimental, and complains of conditional parameters
        try:
            evaluator = PedAnovaImportanceEvaluator()
            found = get_param_importances(study, evaluator=evaluator, target=lambda trial: values_of(trial)[0])
        except (ValueError, RuntimeError):
            return {}
    shares = [(name, share) for name, share in found.items() if name in varied and isfinite(share)]
    return dict(sorted(shares, key=lambda pair: -pair[1]))


def toml(table: dict[str, Any]) -> str:
    """TOML with each list in one line."""
    text = tomli_w.dumps(_without_none(table), indent=1)
    return re.sub(r"\[\n((?: .*,\n)+)\]", lambda lines: f"[{' '.join(lines[1].split(chr(10) + ' '))[1:-2]}]", text)


def _several(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values if value))


def _without_none(value: Any) -> Any:
    """TOML has no null: a key without a value is left out."""
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return value


# --- The tables of a report that are not of models by measure, as text; all formats show the same.


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
        shots = f" ({task.num_fewshot}-shot)" if task.num_fewshot else ""
        rows.append(
            (
                (task.task + shots + ("" if task.metric == "acc" else f" [{task.metric}]")),
                str(task.items),
                *scores,
                *[_points(task.best_minus_uniform, task.metric)] * paired,
            )
        )
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
    """The text of each model for each prompt."""
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
    kinds = dict.fromkeys(contents.summary.amount.column for contents in studies)
    head = ("study", " or ".join(kinds), *columns, "trials", "time", "device")
    return Table(head, [_study_row(contents, on) for contents in studies], (0, 8))


def fingerprint(contents: Contents) -> Table:
    """Facts that values depend on, versions of libraries, devices."""
    rows = [
        (key, (", ".join(map(str, value)) if isinstance(value, list) else str(value)))
        for key, value in sorted(contents.facts.items())
    ]
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
