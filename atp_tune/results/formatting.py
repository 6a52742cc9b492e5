"""Short texts about trials and studies, the same on the screen, in notes, figures and reports."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from optuna.trial import FrozenTrial, TrialState

from atp_tune.config.data import KINDS, MANUAL, MIXED, text_name
from atp_tune.config.finding import known
from atp_tune.config.plugged import permission
from atp_tune.config.prune import Loss, RecoverConfig
from atp_tune.config.study import Study
from atp_tune.errors import printable
from atp_tune.events import TrialEnded
from atp_tune.measures import ACCURACY, MEASURES, PERPLEXITY, Limit, error_over, interval_factor
from atp_tune.metrics import Continuations, OverDraws
from atp_tune.plan import METHODS, Plan, method_in, percent, shown, target_in, target_words
from atp_tune.results.results import NOTHING, allocation_name, allocation_parameters, is_uniform
from atp_tune.storage.progress import CutOff, all_cut_offs, given_up, ranked
from atp_tune.utils.system import as_typed

if TYPE_CHECKING:
    from atp_tune.results.summary import Summary

DENSE_BITS = {"float32": 32, "bfloat16": 16, "float16": 16}


def plan_words(trial: FrozenTrial) -> str:
    """A trial's plan, `wanda atp β=0.00569`, as far as it is drawn yet; first its target, where that is searched."""
    pruner, target = method_in(trial.params), target_in(trial.params)
    if target is not None:
        pruner = f"{target_words(target)} {pruner}"
    if "allocation" not in trial.params:
        return pruner
    if is_uniform(trial):
        return f"{pruner} uniform"
    return f"{pruner} {trial.params['allocation']} {shown(allocation_parameters(trial))}".rstrip()


def method_words(trial: FrozenTrial) -> str:
    """A trial's plan in a paper's notation: `wanda + atp (β = 0.00569)`."""
    allocation = allocation_name(trial)
    parameters = "" if allocation == "uniform" else shown(allocation_parameters(trial))
    listed = ", ".join(part.replace("=", " = ") for part in parameters.split())
    return f"{method_in(trial.params)} + {allocation}" + (f" ({listed})" if listed else "")


def trial_line(event: TrialEnded, plan: str, seconds: float, left: str) -> str:
    """The line of a trial that ended: its values or the reason, its time, and the best so far; `left`: time to go."""
    scores = (f"{MEASURES[name].column} {MEASURES[name].written(value)}" for name, value in event.scores.items())
    value = ", ".join(scores) or f"failed: {event.reason}"
    title = f"[{event.done}/{event.total}] {event.what} {event.number}: {plan}"
    return f"{title}: {value} in {seconds:.0f} s ({best_so_far(event)}{left})"


def best_so_far(event: TrialEnded) -> str:
    """The best value when a trial ended: `best 60.33`, with its target where that is searched."""
    return next((best_words(name, value, event.best_params) for name, value in event.best.items()), "no best yet")


def best_words(measure: str, value: float, params: Mapping[str, object]) -> str:
    """The best value of a measure, which is named unless it is the perplexity."""
    by, target = MEASURES[measure], target_in(params)
    at = "" if target is None else f" at {target_words(target)}"
    return f"best {'' if by is PERPLEXITY else f'{by.column} '}{by.written(value)}{at}"


def spent(trial: FrozenTrial) -> dict[str, float]:
    """Seconds of a trial by phase; empty for one that repeats an earlier trial."""
    return {} if "repeats" in trial.user_attrs else dict(trial.user_attrs.get("seconds") or {})


def duration(seconds: float) -> str:
    """A time in one unit: `48 s`, `12 min`, `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def trial_remark(trial: FrozenTrial, summary: Summary | None = None) -> str:
    """Why a trial has no value of its own, its cut-offs, and (with a summary) a device or dtype unlike the study's.

    "" for the usual trial.
    """
    unlike = summary.unlike.get(trial.number, "") if summary else ""
    times = 0 if trial.state == TrialState.FAIL else len(all_cut_offs(trial))  # of the trials that this one repeats
    before = f"cut off {times} time{'s' * (times > 1)} before" if times else ""
    return "; ".join(filter(None, (_reason(trial), before, unlike)))


def why_lost(trial: FrozenTrial) -> str:
    """The message for a lost trial."""
    why, times = given_up(trial), len(all_cut_offs(trial))
    so_far = f", cut off {times} times by now" if times > 1 else ""
    end = f"cut off {why}, it is given up" if why else f"it is run again{so_far}"
    return f"trial {trial.number} was lost with its process: {end}"


def in_one_line(text: str) -> str:
    """A model's text in one printable line, with an arrow for its line breaks."""
    return printable(re.sub(r"\s*[\r\n]\s*", " ↵ ", text.strip())).strip()


def continuations_note(result: Continuations) -> str:
    """How the continuations were made."""
    return f"greedy, without a chat template, at most {result.tokens} tokens, in {result.dtype}; ↵: a line break"


def meaning_of_errors(summary: Summary) -> str:
    """The meaning of ±: the standard error, its number of windows, and the factor of a 95 % interval."""
    by_role = {role: count for role, count in summary.results.counts.items() if count > 1}
    if len(set(by_role.values())) < 2:
        return error_over(next(iter(by_role.values()), None), summary.results.words.unit)
    counts = " and ".join(f"{count} {role}" for role, count in by_role.items())
    factors = " and ".join(f"{interval_factor(count):.2f}" for count in by_role.values())
    return f"standard error over {counts} {summary.results.words.unit} (× {factors} for 95 %)"


def has_bytes(summary: Summary) -> bool:
    """Whether a point knows the bytes of its weights in a packed folder."""
    return any(point.packed_bytes is not None for point in summary.points)


def stored_as(summary: Summary) -> str:
    """The kind of folder whose bytes points know."""
    return "slim" if summary.of_channels else summary.amount.stored


def dense_speed(summary: Summary) -> float | None:
    """Tokens, or images, per second of the dense model in torch, the median over points; None if none is measured."""
    rates = [
        speed.torch_dense(list(rows[-1].rates)[-1])
        for speed in (point.speed for point in summary.points)
        if speed and (rows := [row for row in speed.engines if row.engine == "torch"])
    ]
    return median(rates) if rates else None


def megabytes(size: int) -> str:
    """A number of bytes: `297.0 MB`, from 10 GB on `13.5 GB`."""
    return f"{size / 1e6:.1f} MB" if size < 10e9 else f"{size / 1e9:.1f} GB"


def texts_note(summary: Summary) -> str:
    """The texts by use: `texts: c4 to calibrate, wikitext2 to measure`; "" if they are not known."""
    if summary.made_from is None:
        return ""
    data, kind = summary.made_from.study.data, summary.results.words.several
    test = data.validation if data.test is None else data.test
    calibration, *measured = (_source_name(text.source) for text in (data.calibration, data.validation, test))
    if {calibration} == set(measured):
        return f"{kind}: parts of {calibration}"
    return f"{kind}: {calibration} to calibrate, {' and '.join(dict.fromkeys(measured))} to measure"


def _source_name(source: str) -> str:
    if source in (MANUAL, MIXED):
        return "the Python manual" if source == MANUAL else f"{', '.join(KINDS[:-1])} and {KINDS[-1]}"
    return text_name(source).removeprefix("file:")


def sizes_note(summary: Summary) -> str:
    """The legend of those columns; "" without them."""
    how = {"packed": "`pack` writes them", "slim": "`apply --slim` writes them", "rounded": "codes with scales"}
    form = stored_as(summary)
    packed = f"{form}: bytes of the weights as {how[form]}" if has_bytes(summary) else ""
    words = summary.results.words
    rates = f"{words.rate}/s: {words.how}, weights not rounded, by the fastest engine that `speedup` measured"
    return "; ".join(filter(None, (packed, rates if dense_speed(summary) is not None else "")))


def drawn(summary: Summary) -> OverDraws | None:
    """The best over draws of the calibration text; None for its own alone."""
    return summary.over_draws.get(summary.best_trial.number) if summary.best_trial else None


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


def resume_command(summary: Summary, *more: str, here: bool = True) -> str:
    """The command that resumes a study with its last options; the summary must have `made_from`.

    A study file that its name does not find is named by its path `here`, and elsewhere by its file name.
    """
    file = summary.made_from
    assert file is not None
    study = file.name if is_known(file.path) else str(file.path) if here else file.path.name
    words = ["--study", study, *(["--study-name", summary.name] if summary.name != file.name else [])]
    for override in file.overrides:
        key, _, value = override.partition("=")
        words += ["--trials", value] if key == "search.trials" else ["--set", override]
    return as_typed(shlex.join(["python", "tune.py", *words, *permission(file.study), *more]))


def is_known(path: Path) -> bool:
    """Whether the name of a study file finds it here."""
    return path.absolute() in map(Path.absolute, known().values())


def wanted(study: Study) -> str:
    """The target of a study: `60% sparsity`, `3.5 bits`, `100MB`."""
    if study.sparsity is None:
        return study.size or target_words(study.targets)
    return f"{target_words(study.targets)} sparsity" + ("" if study.bits is None else f" at {study.bits:g} bits")


class Amount:
    """The amount that a study shares out over blocks, in words.

    column    head of the column of amounts; `counted`: of what was counted of a trial; `several`: amounts
    method    what does it; `form`: what a checkpoint of it is, `ending`: of its name, `stored`: what has its bytes
    title     of the figure by blocks, `axis` its axis, which ends at `top`
    row       name and attribute of a trial's amount in rows
    told      the target and what the best has of it, as a sentence; `share`: that amount
    """

    column = "sparsity"
    several = "sparsities"
    counted = "zeros"
    method = "pruner"
    form = "sparse"
    stored = "packed"
    ending = ""
    title = "Sparsity of each block"
    axis = "sparsity (share of zeros)"
    top = 1
    row = ("sparsity", "realised")
    told = "Sparsity {}{}."

    def of(self, trial: FrozenTrial, summary: Summary) -> str:
        """The share of zeros that a trial counted; "" if not known."""
        attrs = trial.user_attrs
        return f"{attrs['realised']:.2%}" if "realised" in attrs else ""

    def of_dense(self, summary: Summary) -> str:
        """The amount of the dense model."""
        return "0%"

    def best(self, summary: Summary) -> str:
        """The amount of the best trial, behind the target; "" if not known."""
        realised = summary.best_trial.user_attrs.get("realised") if summary.best_trial else None
        return "" if realised is None else f", {realised:.2%} counted"


class Bits(Amount):
    """Bits per weight, where weights are rounded and none is pruned."""

    column = "bits"
    several = "bits"
    counted = "bits"
    method = "quantizer"
    form = stored = "rounded"
    title = "Bits of each block"
    axis = "bits per weight, without scales"
    counting = "with scales"
    top = 9
    row = ("effective_bits", "effective_bits")
    told = "{} per weight{}."

    def of(self, trial: FrozenTrial, summary: Summary, counting: str = "") -> str:
        """A trial's bits per weight without and with scales, or what is counted too; "" if not known."""
        attrs = trial.user_attrs
        plan, sizes = Plan.stored_in(attrs), summary.sizes
        if plan is None:
            return ""
        nominal = plan.mean_bits(sizes if len(sizes) == len(plan.levels) else [1] * len(plan.levels))
        effective = f" ({attrs['effective_bits']:.2f} {counting or self.counting})" if "effective_bits" in attrs else ""
        return f"{nominal:.2f}{effective}"

    def of_dense(self, summary: Summary) -> str:
        """The bits of the number format of the computation."""
        best = summary.best_trial
        return str(DENSE_BITS.get(best.user_attrs.get("dtype", "") if best else "", "–"))

    def best(self, summary: Summary) -> str:
        """The bits of the best trial, with scales too."""
        bits = self.of(summary.best_trial, summary) if summary.best_trial else ""
        return bits and f", {bits} in the best"


class Types(Bits):
    """Types of ggml, whose bits a weight are with scales."""

    axis = "bits per weight"
    ending = ".gguf"
    counting = "with embedding and head"


class ZerosAndBits(Amount):
    """Zeros, and bits of the kept weights, which share a size."""

    column = counted = "zeros, bits"
    told = "Size {}{}."

    def of(self, trial: FrozenTrial, summary: Summary) -> str:
        """A trial's zeros without those of rounding, and bits of its weights without and with masks and scales."""
        zeros = trial.user_attrs.get("plan", {}).get("parameters", {}).get("zeros", 0.0)
        return f"{zeros:.2%}, {BITS[0].of(trial, summary, 'stored')}"

    def best(self, summary: Summary) -> str:
        """The zeros and bits of the best trial."""
        return f"; zeros and bits of the best: {self.of(summary.best_trial, summary)}" if summary.best_trial else ""


ZEROS, BITS, BOTH = Amount(), (Bits(), Types()), ZerosAndBits()  # of bits the second by types of ggml


# --- What a study came to, and what is unusual in it, in sentences: the same on the screen, in notes and reports.

LOSSES: dict[Loss, str] = {
    "both": "by NLL and KL from the dense model",
    "kl": "by KL from the dense model",
    "next-token": "by the next token",
}
METHOD = (*METHODS, "allocation")  # parameters of a trial


def limit_words(limit: Limit) -> str:
    """A limit in words: `20% more perplexity than dense`, `perplexity 25`, `KL 0.1`, `accuracy 60% on piqa`.

    Of image classifiers `1 point of accuracy less than dense`.
    """
    key, value = next(iter(limit.items()))
    if isinstance(value, Mapping):
        return "accuracy " + " and ".join(f"{percent(least)} on {task}" for task, least in value.items())
    if key == "max_increase":
        return f"{percent(value)} more perplexity than dense"
    if key == "max_drop":
        return f"{100 * value:g} point{'s' * (value != 0.01)} of accuracy less than dense"
    name = key.removeprefix("max_")
    return f"{'KL' if name == 'kl' else name} {value:g}"


def against_uniform(summary: Summary) -> str:
    """How far the best is from uniform at one sparsity, over the items of a text and over draws; "" without both."""
    best, results, main = summary.best_trial, summary.results, summary.results.main
    against = results.against_uniform(best, main)
    if best is None or against is None:
        return ""
    over = summary.over_draws.get(best.number) if main is PERPLEXITY else None
    text = f"The best plan’s {main.title} is {against.change.beside('uniform’s')} on the {against.on} {results.data}"
    if over and over.change:
        text += f" (± standard error over {results.words.unit}), and over {over.count} draws of the calibration "
        text += f"{results.data} {over.beside('it')} (± standard deviation between draws)"
    return f"{text}." + (" That may be chance: zero lies in its 95\u00a0% interval." if against.is_chance else "")


def study_remarks(summary: Summary) -> list[str]:
    """Sentences on what is unusual in a study: BOS, refined or trained weights, and trials on several devices."""
    steps = summary.made_from.study.prune.refine if summary.made_from else 0
    by = f"{steps} step{'s' * (steps > 1)} of conjugate gradients"
    refined = f"Pruned weights are refined by {by}, those of uniform too." if steps else ""
    bos = f"BOS: {summary.bos_effect or 'every window begins with it, as the study file asks'}." if summary.bos else ""
    # Trials on several devices, in several dtypes or batch sizes.
    others = ", ".join(dict.fromkeys(summary.unlike.values()))
    batches = ", those of different batches by about 1 %" if "batches" in others else ""
    mixture = (
        f"{len(summary.unlike)} of {len(summary.trials)} trials ran {others}: perplexities of different devices differ "
        f"in the last digits, those of different number formats by per cents{batches}."
    )
    remarks = (sign_of_beta(summary), bos, refined, summary.rounded, recovery_note(summary), mixture if others else "")
    return list(filter(None, remarks))


def recovery_note(summary: Summary) -> str:
    """How the best plan was trained and what its perplexity came to, or why it was not; "" without `recover`."""
    outcome, settings = summary.recovered, summary.made_from.study.recover if summary.made_from else None
    if outcome is None or (not outcome.kept and settings is not None and settings != outcome.settings):
        if settings is None or not summary.complete or summary.best_trial is None:
            return ""
        if summary.training:
            return f"The best plan is being trained on {summary.training}, with {_how(settings)}."
        return f"Not trained yet: the same command trains the best plan, with {_how(settings)}."
    how = _how(outcome.settings)
    if outcome.skipped:
        return f"Not trained after pruning: {outcome.reason}."
    if not outcome.kept:
        return f"Not trained after pruning: with {how}, {outcome.reason}."
    texts = {"validation": outcome.validation, "test": outcome.test}
    changes = " and ".join(
        f"{each.change.beside('')} on the {name} {summary.results.data}" for name, each in texts.items() if each
    )
    return (
        f"Trained after pruning: {how}, of which step {outcome.step} was taken; its perplexity is {changes}, against "
        "the same plan as it was pruned. `apply` writes the trained model."
    )


def _how(settings: RecoverConfig) -> str:
    what = "scales within linears" if settings.train == "scales" else "masked LoRA"
    return f"{settings.steps} steps of {what} {LOSSES[settings.loss]} on the calibration text"


def sign_of_beta(summary: Summary) -> str:
    """Which sign of β is better on the validation images, in a sentence; "" unless both were measured.

    Trials are compared by the study's objective, within the pruner and the allocation of the best of them. Over an
    interval of sparsities trials at different sparsities do not compare.
    """
    results, main = summary.results, summary.results.main
    done = [trial for trial in ranked(summary.trials) if trial.params.get("beta") and not is_uniform(trial)]
    if not summary.goal.compares or not done or ACCURACY not in results.measures:
        return ""
    better = done[0]
    same = [trial for trial in done if all(trial.params.get(key) == better.params.get(key) for key in METHOD)]
    is_positive = better.params["beta"] > 0
    other = next((trial for trial in same if (trial.params["beta"] > 0) != is_positive), None)
    if other is None:
        return ""
    word = "positive, which keeps early blocks denser," if is_positive else "negative, which keeps late blocks denser,"
    uniform, against = results.uniform(better), results.change(other, better, main, "validation")
    texts = [
        f"β = {trial.params['beta']:.4g} has {results.score(trial, 'validation', main) or NOTHING}"
        for trial in (better, other)
    ]
    beside = f", uniform {results.score(uniform, 'validation', main) or NOTHING}" if uniform is not None else ""
    # Of equal accuracies the cross-entropy has decided.
    chance = against is not None and (against.is_chance or not against.change.value)
    return (
        f"Sign of β: {word} is better: {texts[0]}, the best of the other sign, {texts[1]}{beside} "
        f"({main.column}, validation){', a difference that may be chance' * chance}."
    )
