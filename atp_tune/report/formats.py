"""The contents of a report on one study, read from its storage, and its forms: page, Markdown, LaTeX table and JSON."""

import json
import re
import shlex
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

import optuna
import plotly.graph_objects as go
import tomli_w
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from optuna.trial import FrozenTrial, TrialState
from plotly.io.json import to_json_plotly
from plotly.offline import get_plotlyjs
from pydantic_core import to_jsonable_python

import atp_tune
from atp_tune.allocations.budget import SYMBOLS
from atp_tune.config.best import SHARES, ZeroShot
from atp_tune.config.data import short_source
from atp_tune.config.plugged import permission
from atp_tune.config.studyfile import settings
from atp_tune.errors import printable
from atp_tune.measures import MEASURES, TEXTS, Gain, Role, TaskScore
from atp_tune.metrics import NAMES, Continuations, ImageAnswer, Speed, spread
from atp_tune.report import figures
from atp_tune.results.formatting import (
    continuations_note,
    duration,
    in_one_line,
    limit_words,
    meaning_of_errors,
    plan_words,
    resume_command,
    spent,
    study_remarks,
    texts_note,
    trial_remark,
    wanted,
)
from atp_tune.results.results import DENSE, NOTHING, is_uniform
from atp_tune.results.status import make_status
from atp_tune.results.summary import Summary, Table, front, kinds, overview, summarise, trials
from atp_tune.storage.attributes import StudySnapshot
from atp_tune.storage.fingerprint import facts_in
from atp_tune.storage.progress import given_up, is_lost, objective_values, ranked
from atp_tune.utils.system import as_typed

# --- The contents of a report on one study, read from its storage.

ENOUGH = 10  # measured trials: with fewer, importance of parameters is not shown


@dataclass(frozen=True)
class Contents:
    """A study's summary, and what a report says of it.

    facts         that its values depend on
    importance    of each parameter: shares of 1
    description   in the study file
    seconds       of all trials; `devices` that they ran on
    versions      of the libraries, of all trials
    study_file    with all overrides, as TOML; None where an early version made the study
    state         numbers of trials by state, in words
    errors        the meaning of ±, the numbers over draws, if there are any, and the texts
    verdict       the change against uniform in one sentence, with the error of the difference where it is known
    """

    summary: Summary
    facts: dict[str, Any]
    importance: dict[str, float]
    made: datetime
    description: str
    seconds: float
    devices: str
    versions: dict[str, str]
    study_file: str | None
    state: str
    errors: str
    verdict: str


def gather(study: optuna.Study, now: datetime) -> Contents:
    """The contents of a report on the present state of a study."""
    study = StudySnapshot(study)
    summary = summarise(study)
    trials, file = summary.trials, summary.made_from
    # Numbers of trials by state.
    counts = (
        (sum(t.state == TrialState.RUNNING for t in trials), "running"),
        (sum("failure" in t.user_attrs for t in trials), "failed"),
        (sum(map(is_lost, trials)), "lost and run again"), (sum(map(bool, map(given_up, trials))), "given up"),
        (sum("stopped_after" in t.user_attrs for t in trials), "stopped early"),
    )  # fmt: skip
    of = f" of {summary.total}" if summary.total is not None else ""
    notes = (f"± is the {meaning_of_errors(summary)}", summary.goal.draws(summary), texts_note(summary))
    versions = [trial.user_attrs.get("versions") or {} for trial in trials]
    names = dict.fromkeys(name for each in versions for name in each)
    return Contents(
        summary,
        facts=facts_in(study),
        importance=_importance(study, trials) if summary.goal.compares else {},  # the sparsity would have nearly all
        made=now,
        description=file.study.description if file else "",
        seconds=sum(sum(spent(trial).values()) for trial in trials),
        devices=_several(trial.user_attrs.get("device") for trial in trials),
        versions={name: _several(each.get(name) for each in versions) for name in names},
        study_file=toml(settings(file)["settings"]) if file else None,
        state=", ".join([f"{summary.done}{of} trials done", *(f"{count} {what}" for count, what in counts if count)]),
        errors="; ".join(filter(None, notes)) + ".",
        verdict=summary.goal.said(summary).replace(" ± ", "\u00a0±\u00a0"),
    )


def _importance(study: optuna.Study, trials: list[FrozenTrial]) -> dict[str, float]:
    """Shares of the parameters that vary, the largest first; empty with too few trials."""
    done = ranked(trials)
    varied = {name for trial in done for name in trial.params}
    varied = {name for name in varied if len({trial.params.get(name) for trial in done}) > 1}
    if len(done) < ENOUGH or not varied:
        return {}
    from optuna.importance import get_param_importances  # here, since it imports sklearn

    with warnings.catch_warnings(action="ignore"):  # experimental, and complains of conditional parameters
        try:
            importances = get_param_importances(study, target=lambda trial: objective_values(trial)[0])
        except (ValueError, RuntimeError):
            return {}
    return {name: share for name, share in importances.items() if name in varied and isfinite(share)}


def toml(table: dict[str, Any]) -> str:
    """TOML with each list in one line, and without the keys that have no value: it has no null."""
    whole = json.loads(
        json.dumps(table), object_hook=lambda own: {key: own[key] for key in own if own[key] is not None}
    )
    text = tomli_w.dumps(whole, indent=1)
    return re.sub(r"\[\n((?: .*,\n)+)\]", lambda lines: f"[{' '.join(lines[1].split(chr(10) + ' '))[1:-2]}]", text)


def _several(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values if value))


# --- The tables of a report that are not of models by measure, as text; all formats show the same.


def importance(contents: Contents) -> Table:
    """Share of each parameter in what distinguishes good trials from the others."""
    rows = [(symbol(name), f"{share:.0%}") for name, share in contents.importance.items()]
    return Table(("parameter", "share"), rows)


def zero_shot(result: ZeroShot) -> Table:
    """Scores of each model on each task, their mean, and best − uniform paired by items."""
    models = list(result.seconds)
    paired = any(task.best_minus_uniform for task in result.tasks)
    rows = []
    for task in result.tasks:
        scores = (measure(task.scores.get(model, {}).get(task.metric), task.metric) for model in models)
        shots = f" ({task.num_fewshot}-shot)" if task.num_fewshot else ""
        rows.append(
            (
                task.task + shots + ("" if task.metric == "acc" else f" [{task.metric}]"),
                str(task.items),
                *scores,
                *[_points(task.best_minus_uniform, task.metric)] * paired,
            )
        )
    if len(rows) > 1 and result.mean:
        means = (measure(result.mean.get(model)) for model in models)
        rows.append(("mean", "", *means, *[_points(result.mean_best_minus_uniform)] * paired))
    return Table(("task", "items", *models, *["best − uniform"] * paired), rows)


def zero_shot_note(result: ZeroShot) -> str:
    """A note under that table: errors, versions, device and limits."""
    limit = "" if result.limit is None else f", at most the first {result.limit} items of each task"
    missing = f"; left out: {', '.join(result.missing)}" if result.missing else ""
    paired = "; best − uniform: item by item" if "best" in result.seconds else ""
    by = f"lm-eval {result.versions['lm_eval']}, " if "lm_eval" in result.versions else ""
    return f"±: standard error over items{paired}; {by}{result.dtype}, {result.device}{limit}{missing}"


def continuations(result: Continuations) -> Table:
    """The text of each model for each prompt."""
    rows = [tuple(map(in_one_line, (prompt, *texts.values()))) for prompt, texts in result.rows()]
    return Table(("prompt", *result.names), rows, tuple(range(len(result.names) + 1)))


def speed(result: Speed, where: bool = True) -> Table:
    """Bytes of the weights, compressed and packed; rates of each engine, dense and sparse; the runs' ratios.

    `where`: each rate names its device.
    """
    sizes, rows = result.sizes, []
    kinds = ("weight files, zstd, MB", sizes.dense_zstd, sizes.sparse_zstd), ("packed, MB", sizes.dense, sizes.packed)
    for name, before, after in kinds:
        if before is not None and after is not None:
            rows.append((name, f"{before / 1e6:.1f}", f"{after / 1e6:.1f}", f"{before / max(1, after):.2f}× smaller"))
    for row in result.engines:
        for phase, rates in row.rates.items():
            dense, sparse = (f"{median(values):.1f}" for values in (rates.dense, rates.sparse))
            ratio = f"{spread(rates.ratios, '.2f')}× as fast"
            name = f"{phase}, {result.unit} per second: {row.name}" + (f", {row.where}" if where else "")
            rows.append((name, dense, sparse, ratio))
    return Table(("speed", "dense", "sparse", "sparse against dense"), rows)


def measure(score: TaskScore | None, metric: str = SHARES[0]) -> str:
    """A score with its standard error, in per cent if the metric is a share."""
    return NOTHING if score is None else score.written(".1%" if metric in SHARES else ".4g")


def _points(score: TaskScore | None, metric: str = SHARES[0]) -> str:
    """A difference, in percentage points if the metric is a share."""
    if score is not None and metric in SHARES:
        return str(Gain(value=score.value, stderr=score.stderr))
    return NOTHING if score is None else score.written("+.4g")


def comparison(studies: Sequence[Contents]) -> Table | None:
    """One row per study, all on one text: test if all are measured on it, else validation. None of a single study."""
    if len(studies) < 2:
        return None
    on: Role = "test" if all(contents.summary.text == "test" for contents in studies) else "validation"
    data = " or ".join(dict.fromkeys(contents.summary.results.data for contents in studies))
    columns = (f"dense, {on} {data}", "uniform", "best", "against uniform")
    kinds = dict.fromkeys(contents.summary.amount.column for contents in studies)
    head = ("study", " or ".join(kinds), *columns, "trials", "time", "device")
    rows = []
    for contents in studies:
        summary, results = contents.summary, contents.summary.results
        scores = [results.score(model, on) for model in (DENSE, summary.uniform_trial, summary.best_trial)]
        paired = results.against_uniform(summary.best_trial)
        rows.append(
            (
                summary.name,
                contents.summary.told or NOTHING,
                *(str(score or NOTHING) for score in scores),
                f"{paired.change} ({paired.on})" if paired else NOTHING,
                f"{summary.done}" + (f"/{summary.total}" if summary.total else ""),
                duration(contents.seconds),
                contents.devices or NOTHING,
            )
        )
    return Table(head, rows, (0, 8))


def fingerprint(contents: Contents) -> Table:
    """Facts that values depend on, versions of libraries, devices."""
    rows = [
        (key, ", ".join(map(str, value)) if isinstance(value, list) else str(value))
        for key, value in sorted(contents.facts.items())
    ]
    rows += [(f"version of {name}", version) for name, version in contents.versions.items()]
    return Table(("key", "value"), [*rows, ("device", contents.devices or NOTHING)], (0, 1))


def commands(summary: Summary) -> list[tuple[str, str]]:
    """Purpose and command, for each command that the report shows."""
    file = summary.made_from
    study = shlex.quote(f"{plain_name(summary.name)}.toml" if file else printable(summary.name))
    endings = (".best.json", summary.amount.ending or "-sparse")
    config, folder = (shlex.quote(plain_name(summary.name) + ending) for ending in endings)
    trusts = "".join(f" {word}" for word in permission(file.study)) if file else ""
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


def escaped(text: str) -> str:
    """Text in one line without markup, HTML, formulas or entities."""
    return re.sub(r"([\\`*_{}\[\]<>|#$&~])", r"\\\1", printable(" ".join(text.split())))


def code(text: object) -> str:
    """Text as inline code."""
    return "`" + printable(str(text)).replace("`", "'") + "`"


def fenced(language: str, text: str) -> str:
    """Text as a fenced code block, which text with fences in it cannot end."""
    fence = "`" * (3 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip(chr(10))}\n{fence}"


def markdown(studies: Sequence[Contents]) -> bytes:
    """The report: a comparison if there are several studies, then each study."""
    return (rendered("report.md.jinja", studies=studies, comparison=comparison(studies)) + "\n").encode()


def table(content: Table, gap: str = "") -> str:
    """A Markdown table with numbers aligned to the right; `gap`: written before each cell but a row's first."""
    rules = [":--" if column in content.words else "--:" for column in range(len(content.head))]
    rows = [[f"**{cell}**" if cell and index == content.best else cell for cell in map(escaped, row)]
            for index, row in enumerate(content.rows)]  # fmt: skip
    head, *body = (f"| {f' | {gap}'.join(cells)} |" for cells in (map(escaped, content.head), *rows))
    return "\n".join((head, f"| {' | '.join(rules)} |", *body))


# --- A LaTeX table for a paper: dense, uniform and the best of each allocation.

_SPECIAL = {
    **{char: f"\\{char}" for char in "#$%&_{}"},
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "–": "--", "’": "'", "±": r"$\pm$", "−": "$-$", "×": r"$\times$",
    "β": r"$\beta$", "γ": r"$\gamma$", "κ": r"$\kappa$",
    "δ": r"$\delta$", "φ": r"$\varphi$", "ν": r"$\nu$", "λ": r"$\lambda$", "ε": r"$\varepsilon$",
}  # fmt: skip


def latex(studies: Sequence[Contents]) -> bytes:
    r"""One table of all studies, with the columns of each; it needs \usepackage{booktabs}."""
    tables = [overview(contents.summary, "trial") for contents in studies]
    rows = [[dict(zip(table.head, cells, strict=True)) for cells in table.rows] for table in tables]
    units = " or ".join(dict.fromkeys(contents.summary.results.words.unit for contents in studies))
    page = PAGES.get_template("table.tex.jinja").render(
        studies=studies, tables=list(zip(studies, rows, strict=True)), nothing=NOTHING,
        head=[*dict.fromkeys(name for table in tables for name in table.head)],
        measures=[*dict.fromkeys(by.title for contents in studies for by in contents.summary.results.measures)],
        errors=meaning_of_errors(studies[0].summary) if len(studies) == 1 else f"standard error over {units}",
    )  # fmt: skip
    return (page + "\n").encode()


def tex(text: str) -> str:
    """Text with LaTeX's special characters escaped; the sign of a number is a minus, no hyphen."""
    signed = re.sub(r"(?<!\S)-(?=\d)", "−", " ".join(text.split()))
    return "".join(_SPECIAL.get(char, char) for char in signed)


# --- The documents are templates beside this file; values are escaped as their filters say, in HTML all of them.

HERE = Path(__file__).parent
PAGES = Environment(
    loader=FileSystemLoader(HERE), autoescape=lambda name: name == "page.html.jinja", trim_blocks=True,
    lstrip_blocks=True, undefined=StrictUndefined,
)  # fmt: skip
PAGES.filters |= {"escaped": escaped, "printable": printable, "tex": tex}
GAP = "&emsp;"  # the dashboard leaves no space between columns
HELPERS = (  # functions that the documents call
    as_typed, code, commands, continuations, continuations_note, fenced, fingerprint, front, importance, is_lost,
    is_uniform, kinds, limit_words, meaning_of_errors, overview, permission, plain_name, plan_words, resume_command,
    short_source, speed, study_remarks, symbol, table, trial_remark, trials, wanted, zero_shot, zero_shot_note,
)  # fmt: skip
PAGES.globals |= {each.__name__: each for each in HELPERS}
PAGES.globals |= {"gap": GAP, "measures": MEASURES, "version": atp_tune.__version__}


def rendered(name: str, **given: Any) -> str:
    """The text of a template, with one empty line between its paragraphs."""
    return re.sub(r" *\n{2,}", "\n\n", PAGES.get_template(name).render(given)).strip()


# --- The report for programs.

FORMAT = "atp_tune.report/3"
KEPT = ("errors", "device", "dtype")  # attributes of trials
FINDINGS = ("zero_shot", "speed", "recovered", "continuations")  # of the best trial


def machine(studies: Sequence[Contents]) -> bytes:
    """The report for programs: a published JSON format (`atp_tune.report/3`); keys are added, never renamed or removed.

        format, made            `atp_tune.report/3`; local time, ISO 8601
        studies[]               the document of `status --json` of each study, without its clock, and:
          description           of the study
          state                 running, failed: numbers of trials
          realised              share of zeros counted in the best, null if unknown
          zero_shot             what `evaluate` measured of the best trial, as in its configuration; or null
          speed                 what `speedup`, or the end of a study, measured of it, likewise; or null
          recovered             training of the best's kept weights, as in its configuration; or null
          continuations         prompts, and what dense, uniform, best and `others`, the best of each other allocation,
                                make of each; or null
          importance            parameter → share of 1; empty with too few trials
          trials[]              also levels (of each block, as `plan.py` stores them, without those of rows), errors (by
                                block), times (phase → s), device, dtype
          time, devices         of all trials: seconds, names
          study_file            name and settings, as the study was made; or null
          fingerprint, versions facts that the values depend on, and versions of libraries

    Numbers that are not finite are null.
    """
    document = {
        "format": FORMAT,
        "made": max(contents.made for contents in studies).isoformat(timespec="seconds"),
        "studies": [_document(contents) for contents in studies],
    }
    finite = to_jsonable_python(document, inf_nan_mode="null")
    return (json.dumps(finite, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _document(contents: Contents) -> dict[str, Any]:
    summary = contents.summary
    status = make_status(summary, contents.made).without_clock().model_dump(exclude={"format"})
    for trial, row in zip(summary.trials, status["trials"], strict=True):
        attrs = trial.user_attrs
        stored = json.dumps(attrs.get("plan", {}).get("levels"))
        row["levels"] = json.loads(stored, object_hook=lambda level: level.pop("rows", level) and level)
        row["times"] = attrs.get("seconds")
        row.update({key: attrs.get(key) for key in KEPT})
    states = [row["state"] for row in status["trials"]]
    return {
        **status,
        "description": contents.description,
        "state": {"running": states.count("running"), "failed": states.count("fail")},
        "realised": summary.best_trial.user_attrs.get("realised") if summary.best_trial else None,
        **{name: (found := getattr(summary, name)) and found.model_dump() for name in FINDINGS},
        "importance": contents.importance,
        "time": contents.seconds,
        "devices": contents.devices,
        "study_file": settings(summary.made_from) if summary.made_from else None,
        "fingerprint": contents.facts,
        "versions": contents.versions,
    }


# --- The report as one HTML file with figures, tables and commands, which needs no network.

TITLE = 32  # px of a figure's title, which the page shows instead
# Facts that must be equal for perplexities to compare.
SAME = ("model.content", "texts.validation.content", "images.validation.content")


def html(studies: Sequence[Contents]) -> bytes:
    """The page of the studies; a comparison comes first if there are several."""
    page = PAGES.get_template("page.html.jinja").render(
        studies=list(map(_section, studies)),
        made=max(contents.made for contents in studies),
        comparison=comparison(studies),
        overlays=_drawn(overlays(studies)),
        style=_own("page.css"),
        script=_own("page.js"),
        plotly=Markup(get_plotlyjs()),
    )
    return (page.strip() + "\n").encode()


def overlays(studies: Sequence[Contents]) -> dict[str, go.Figure]:
    """Figures that compare several studies; perplexities only if all have one model and text."""
    if len(studies) < 2:
        return {}
    summaries = [contents.summary for contents in studies]
    comparable = len({tuple(contents.facts.get(key) for key in SAME) for contents in studies}) == 1
    by_name = {
        "perplexities": figures.perplexities(summaries) if comparable else None,
        "sparsities": figures.sparsities(summaries),
    }
    return {name: figure for name, figure in by_name.items() if figure is not None}


def _section(contents: Contents) -> dict[str, Any]:
    summary = contents.summary
    plots, results = figures.draw(summary), summary.results
    if "perplexity" in plots and (went := figures.draw_history(summary)):
        plots["history"] = went
    models = {"dense": DENSE, "uniform": summary.uniform_trial, "best": summary.best_trial}
    return {
        "contents": contents,
        "figures": _drawn(plots),
        "scores": {
            name: model and {text: results.shown(model, text, results.main) for text in TEXTS}
            for name, model in models.items()
        },
        "answers": _answers(summary),
    }


def _answers(summary: Summary) -> list[tuple[str, str, list[tuple[str, ImageAnswer, bool]]]]:
    """PNG, class and the answer of each model, and whether it is right, for the test images of an image classifier."""
    answers = summary.answers
    if answers is None:
        return []
    return [
        (picture, label, [(name, (own := answers.of(name)[index]), own.index == right) for name in NAMES])
        for index, (picture, label, right) in enumerate(
            zip(answers.pictures, answers.labels, answers.indices, strict=True)
        )
    ]


def _drawn(plots: Mapping[str, go.Figure]) -> dict[str, tuple[str, Markup]]:
    """Titles and data of figures; the page sets the titles itself.

    The data are JSON without `<`, so that no name of a study ends the script element around it.
    """
    drawn = {}
    for name, figure in plots.items():
        plain = figure.to_dict()
        title = plain["layout"].pop("title")["text"]
        plain["layout"]["margin"]["t"] -= TITLE
        drawn[name] = title, Markup(to_json_plotly(plain).replace("<", "\\u003c"))
    return drawn


def _own(name: str) -> Markup:
    return Markup((HERE / name).read_text(encoding="utf-8"))
