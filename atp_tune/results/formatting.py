"""Short texts about trials and studies, the same on the screen, in notes, figures and reports."""

import re
import shlex
from pathlib import Path
from statistics import median

from optuna.trial import FrozenTrial, TrialState

from atp_tune.errors import printable
from atp_tune.events import TrialEnded
from atp_tune.extras import as_typed
from atp_tune.measures import Change, Perplexity, error_over, reach_of
from atp_tune.metrics.continuations import Continuations
from atp_tune.plan import method_in, percent, shown
from atp_tune.results.front import Point, Versus
from atp_tune.results.summary import Summary
from atp_tune.results.trials import allocation_of, is_uniform, parameters_of
from atp_tune.spec.config import Divergences, Scores
from atp_tune.spec.finding import known
from atp_tune.spec.plugged import permission
from atp_tune.spec.texts import KINDS, MANUAL, MIXED, short_source
from atp_tune.storage.lost_trials import CutOff, cut_offs_of, given_up
from atp_tune.storage.progress import sparsity_of

NOTHING = "–"  # an empty cell of a table


def plan_of(trial: FrozenTrial) -> str:
    """A trial's plan, `wanda atp β=0.00569`, as far as it is drawn yet; first its sparsity, where that is searched."""
    pruner, sparsity = method_in(trial.params), sparsity_of(trial)
    if sparsity is not None:
        pruner = f"{percent(sparsity)} {pruner}"
    if "allocation" not in trial.params:
        return pruner
    if is_uniform(trial):
        return f"{pruner} uniform"
    return f"{pruner} {trial.params['allocation']} {shown(parameters_of(trial))}".rstrip()


def method_of(trial: FrozenTrial) -> str:
    """A trial's plan in a paper's notation: `wanda + atp (β = 0.00569)`."""
    allocation = allocation_of(trial)
    parameters = "" if allocation == "uniform" else shown(parameters_of(trial))
    listed = ", ".join(part.replace("=", " = ") for part in parameters.split())
    return f"{method_in(trial.params)} + {allocation}" + (f" ({listed})" if listed else "")


def trial_line(event: TrialEnded, plan: str, seconds: float, left: str = "") -> str:
    """The line of a trial that ended: its values or the reason, its time, and the best so far; `left`: time to go."""
    values = [] if event.value is None else [f"perplexity {event.value:.2f}"]
    values += [] if event.kl is None else [f"KL {event.kl:.4f}"]
    values += [] if event.error is None else [f"top-1 error {event.error:.1%}"]
    value = ", ".join(values) or f"failed: {event.reason}"
    title = f"[{event.done}/{event.total}] {event.what} {event.number}: {plan}"
    return f"{title}: {value} in {seconds:.0f} s ({best_so_far(event)}{left})"


def best_so_far(event: TrialEnded) -> str:
    """The best value when a trial ended: `best 60.33`, with its sparsity where that is searched."""
    best = f"best {event.best:.2f}" if event.best is not None else "no best yet"
    best = f"best KL {event.best_kl:.4f}" if event.best_kl is not None else best
    best = f"best {event.best_error:.1%}" if event.best_error is not None else best
    return best + ("" if event.best_sparsity is None else f" at {percent(event.best_sparsity)}")


def duration(seconds: float) -> str:
    """A time in one unit: `48 s`, `12 min`, `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def remark_of(trial: FrozenTrial, summary: Summary | None = None) -> str:
    """Why a trial has no value of its own, its cut-offs, and (with a summary) a device or dtype unlike the study's.

    "" for the usual trial.
    """
    unlike = summary.unlike.get(trial.number, "") if summary else ""
    return "; ".join(part for part in (_reason(trial), _before(trial), unlike) if part)


def loss_of(trial: FrozenTrial) -> str:
    """The message for a lost trial."""
    why, times = given_up(trial), len(cut_offs_of(trial))
    so_far = f", cut off {times} times by now" if times > 1 else ""
    end = f"cut off {why}, it is given up" if why else f"it is run again{so_far}"
    return f"trial {trial.number} was lost with its process: {end}"


def in_one_line(text: str) -> str:
    """A model's text in one printable line, with an arrow for its line breaks."""
    return printable(re.sub(r"\s*[\r\n]\s*", " ↵ ", text.strip())).strip()


def continuations_note(found: Continuations) -> str:
    """How the continuations were made."""
    return f"greedy, without a chat template, at most {found.tokens} tokens, in {found.dtype}; ↵: a line break"


def errors_of(summary: Summary) -> str:
    """The meaning of ±: the standard error, its number of windows, and the factor of a 95 % interval."""
    known = {role: count for role, count in summary.windows.items() if count > 1}
    if len(set(known.values())) < 2:
        said = error_over(next(iter(known.values()), None))
        return said.replace("windows", "images") if summary.hits else said
    counts = " and ".join(f"{count} {role}" for role, count in known.items())
    factors = " and ".join(f"{reach_of(count):.2f}" for count in known.values())
    items = summary.items
    return f"standard error over {counts} {items} (× {factors} for 95 %)"


def draws_of(summary: Summary, trial: FrozenTrial | None) -> tuple[str, str]:
    """A trial's test perplexity over draws of the calibration text, and its change from uniform; "" without draws."""
    found = summary.over_draws.get(trial.number) if trial else None
    return (str(found), found.changed) if found else ("", "")


def cells(scores: Scores | Divergences) -> tuple[str, str]:
    """A row's scores on the validation and test text."""
    return str(scores.validation or NOTHING), str(scores.test or NOTHING)


ACCURACY = ("validation accuracy", "test accuracy", "accuracy against uniform")


def hit_cells(summary: Summary, trial: FrozenTrial | None) -> tuple[str, str, str]:
    """Accuracies of a trial (None: of dense) on validation and test images, and against uniform; for `ACCURACY`."""
    found = summary.hits.trial(trial)
    against = summary.hits.gains.get(str(trial.number)) if trial else None
    shown = NOTHING if against is None else f"{against[0]}{' (validation)' * (against[1] == 'validation')}"
    return str(found.validation or NOTHING), str(found.test or NOTHING), shown


def changed(against: Change | None, on: str) -> str:
    """A row's change from uniform, marked if on the validation text."""
    return NOTHING if against is None else f"{against}" + (" (validation)" if on == "validation" else "")


def compared(versus: Versus | None, kl: bool = False) -> str:
    """A row's change from dense or uniform, of perplexity or KL."""
    found = versus and (versus.kl_change if kl else versus.change)
    return changed(found, versus.text) if versus and found else NOTHING


def points_head(summary: Summary) -> list[str]:
    """The columns of the table of points, over an interval of sparsities; `points_row` has their cells."""
    kls = ["validation KL", "test KL", "KL against uniform"] if "kl" in summary.objectives else []
    limit = ["limit"] if summary.limit else []
    sizes = [_bytes_column(summary)] * _has_bytes(summary)
    sizes += [_speed_column(summary)] * (dense_speed(summary) is not None)
    dense = "against dense, validation" if summary.limit else "against dense"
    columns = ["validation perplexity", "test perplexity", *["uniform"] * (not summary.limit), dense, "against uniform"]
    accuracies = ACCURACY[:2] if summary.hits else ()
    return ["sparsity", "method", "trial", *columns, *kls, *accuracies, *sizes, *limit]


def points_row(summary: Summary, point: Point, mark: str = "") -> list[str]:
    """The cells of a point; `mark` follows the trial's number of the best."""
    kls = [*cells(summary.kl(point.trial)), compared(point.against, kl=True)] if "kl" in summary.objectives else []
    limit = [] if point.excess is None else ["within" if point.excess <= 0 else "beyond"]
    number = f"{point.trial.number}{mark if point.is_best else ''}"
    changes = [compared(point.dense), compared(point.against)]
    if summary.limit:  # it holds on the validation text, and uniform has rows of its own
        changes[0] = str(point.dense.perplexity.get("validation", NOTHING))
    else:
        on = point.against.text if point.against else ""
        beside = getattr(point.uniform_scores, on) if on else NOTHING
        changes.insert(0, f"{beside}{' (validation)' * (on == 'validation')}")
    scores = [*cells(point.scores), *changes, *kls]
    hits = hit_cells(summary, point.trial)[:2] if summary.hits else ()
    return [percent(point.sparsity), method_of(point.trial), number, *scores, *hits, *_sizes(summary, point), *limit]


def dense_row(summary: Summary) -> list[str]:
    """The cells of the dense model in the table of points."""
    kls = ["0", "0", NOTHING] if "kl" in summary.objectives else []
    scores = [*cells(summary.dense), *[NOTHING] * (2 if summary.limit else 3), *kls]
    hits = hit_cells(summary, None)[:2] if summary.hits else ()
    return ["0%", "dense", "", *scores, *hits, *_sizes(summary), *([""] if summary.limit else [])]


def _sizes(summary: Summary, point: Point | None = None) -> list[str]:
    """Bytes and rate of a point or of the dense model, for the columns of `points_head`."""
    found, dense = [], dense_speed(summary)
    if _has_bytes(summary):
        size = point.packed_bytes if point else summary.dense_bytes
        found.append(NOTHING if size is None else megabytes(size))
    if dense is not None:
        rate = dense if point is None else point.speed and point.speed.fastest
        found.append(NOTHING if rate is None else f"{rate:.1f}")
    return found


def _speed_column(summary: Summary) -> str:
    return "images/s" if summary.hits else "tokens/s"


def _bytes_column(summary: Summary) -> str:
    return "slim" if summary.of_channels else "packed"


def _has_bytes(summary: Summary) -> bool:
    return any(point.packed_bytes is not None for point in summary.points)


def dense_speed(summary: Summary) -> float | None:
    """Tokens, or images, per second of the dense model in torch, the median over points; None if none is measured."""
    speeds = [point.speed for point in summary.points if point.speed]
    rows = [(speed, row) for speed in speeds for row in speed.rows if row.engine == "torch"]
    found = {id(speed): speed.torch_dense(row.phases[-1]) for speed, row in rows}
    return median(found.values()) if found else None


def megabytes(size: int) -> str:
    """A number of bytes: `297.0 MB`, from 10 GB on `13.5 GB`."""
    return f"{size / 1e6:.1f} MB" if size < 10e9 else f"{size / 1e9:.1f} GB"


def kinds_rows(summary: Summary) -> list[list[str]]:
    """A head and rows: test perplexity by kind of a mixed text, and how many times dense's; [] for other texts."""
    dense, trials = summary.kinds.get("dense", {}), [point.trial for point in summary.points] or summary.trials
    names = {"dense": "dense", **{str(trial.number): plan_of(trial) for trial in trials}, "trained": "best, trained"}
    found = {name: summary.kinds[row] for row, name in names.items() if row in summary.kinds}
    rows = [[name, *(_times(own.get(kind), dense[kind]) for kind in dense)] for name, own in found.items()]
    return [["test perplexity by kind", *dense], *rows] if dense else []


def _times(found: Perplexity | None, dense: Perplexity) -> str:
    if found is None or found is dense:
        return NOTHING if found is None else f"{found.value:.2f}"
    return f"{found.value:.2f} ({found.value / dense.value:.2f}×)"


def texts_note(summary: Summary) -> str:
    """What calibrated and what measured: `texts: c4 to calibrate, wikitext2 to measure`; "" if it is not known."""
    if summary.made_from is None:
        return ""
    data, kind = summary.made_from.study.data, "images" if summary.hits else "texts"
    test = data.validation if data.test is None else data.test
    calibration, *measured = (_named(text.source) for text in (data.calibration, data.validation, test))
    if {calibration} == set(measured):
        return f"{kind}: parts of {calibration}"
    return f"{kind}: {calibration} to calibrate, {' and '.join(dict.fromkeys(measured))} to measure"


def _named(source: str) -> str:
    if source in (MANUAL, MIXED):
        return "the Python manual" if source == MANUAL else f"{', '.join(KINDS[:-1])} and {KINDS[-1]}"
    return Path(source.removeprefix("file:")).name if source.startswith("file:") else short_source(source)


def sizes_note(summary: Summary) -> str:
    """The legend of those columns; "" without them."""
    column = _bytes_column(summary)
    writer = {"packed": "pack", "slim": "apply --slim"}[column]
    packed = f"{column}: bytes of the weights as `{writer}` writes them" if _has_bytes(summary) else ""
    how = "one image at a time" if summary.hits else "decoded one at a time"
    rates = f"{_speed_column(summary)}: {how}, weights not rounded, by the fastest engine that `speedup` measured"
    return "; ".join(note for note in (packed, rates if dense_speed(summary) is not None else "") if note)


def drawn(summary: Summary) -> int:
    """The number of draws of the calibration text with which the best was measured; 0 for its own only."""
    found = summary.over_draws.get(summary.best_trial.number) if summary.best_trial else None
    return found.count if found else 0


def draws_note(summary: Summary) -> str:
    """The legend of numbers over draws; "" without draws."""
    return f"{drawn(summary)} draws: test {summary.data}, {drawn_how(summary)}" if drawn(summary) else ""


def drawn_how(summary: Summary) -> str:
    """What the numbers over draws are; "" without draws."""
    found = summary.over_draws.get(summary.best_trial.number) if summary.best_trial else None
    return found.how(summary.data, False) if found else ""


def _reason(trial: FrozenTrial) -> str:
    attrs = trial.user_attrs
    if "repeats" in attrs:
        return f"as trial {attrs['repeats']}"
    if "stopped_after" in attrs:
        return f"stopped after {attrs['stopped_after']} windows"
    unknown = "sent no heartbeat" if trial.state == TrialState.FAIL else ""
    reason = str(attrs.get("failure") or attrs.get("lost") or unknown) + str(CutOff.read(attrs.get("cut_off", {})))
    why = given_up(trial)
    return f"{reason}, cut off {why}: given up" if why else reason


def _before(trial: FrozenTrial) -> str:
    """How often the trials that this one repeats were cut off."""
    times = 0 if trial.state == TrialState.FAIL else len(cut_offs_of(trial))
    return f"cut off {times} time{'s' * (times > 1)} before" if times else ""


def command_of(summary: Summary, *more: str, here: bool = True) -> str:
    """The command that resumes a study with its last options; the summary must have `made_from`.

    A study file that its name does not find is named by its path `here`, and elsewhere by its file name.
    """
    file = summary.made_from
    assert file is not None
    is_known = file.path.absolute() in [path.absolute() for path in known()]
    study = file.name if is_known else str(file.path) if here else file.path.name
    words = ["--study", study, *(["--study-name", summary.name] if summary.name != file.name else [])]
    for override in file.overrides:
        key, _, value = override.partition("=")
        words += ["--trials", value] if key == "search.trials" else ["--set", override]
    return as_typed(shlex.join(["python", "tune.py", *words, *permission(file.study), *more]))
