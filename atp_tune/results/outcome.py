"""What a study came to, and what is unusual in it, in sentences: the same on the screen, in notes and reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from atp_tune.measures import ACCURACY, PERPLEXITY, Limit
from atp_tune.plan import METHODS, percent
from atp_tune.results.results import NOTHING, is_uniform
from atp_tune.spec.prune import PruneConfig
from atp_tune.spec.recover import Loss, RecoverConfig
from atp_tune.storage.progress import ranked

if TYPE_CHECKING:
    from atp_tune.results.summary import Summary

LOSSES: dict[Loss, str] = {
    "both": "by NLL and KL from the dense model",
    "kl": "by KL from the dense model",
    "next-token": "by the next token",
}
METHOD = (*METHODS, "allocation")  # parameters of a trial


def limit_of(limit: Limit) -> str:
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
    name = key.removeprefix("max_").removeprefix("min_").replace("_", " ")
    return f"{'KL' if name == 'kl' else name} {value:g}"


def against_uniform(summary: Summary) -> str:
    """How far the best is from uniform at one sparsity, over the items of a text and over draws; "" without both."""
    best, results, main = summary.best_trial, summary.results, summary.results.main
    found = results.against_uniform(best, main)
    if best is None or found is None:
        return ""
    over = summary.over_draws.get(best.number) if main is PERPLEXITY else None
    said = f"The best plan’s {main.title} is {found.change.beside('uniform’s')} on the {found.on} {results.data}"
    if over and over.change:
        said += f" (± standard error over {results.unit}), and over {over.count} draws of the calibration "
        said += f"{results.data} {over.beside('it')} (± standard deviation between draws)"
    return f"{said}." + (" That may be chance: zero lies in its 95\u00a0% interval." if found.is_chance else "")


def study_remarks(summary: Summary) -> list[str]:
    """Sentences on what is unusual in a study: BOS, refined or trained weights, and trials on several devices."""
    # One sentence for a study whose pruners are refined; else "".
    prune = summary.made_from.study.prune if summary.made_from else PruneConfig()
    ways = ((prune.swaps, "round", "of swaps in their masks"), (prune.refine, "step", "of conjugate gradients"))
    by = " and ".join(f"{count} {one}{'s' * (count > 1)} {what}" for count, one, what in ways if count)
    refined, trained = (
        (f"Pruned weights are refined by {by}, those of uniform too." if by else ""),
        recovery_said(summary),
    )
    found = (sign_of_beta(summary), _beginning(summary), refined, summary.rounded, trained, _mixture(summary))
    return [remark for remark in found if remark]


def _mixture(summary: Summary) -> str:
    """One sentence for a study with trials on several devices, in several dtypes or batch sizes; else ""."""
    if not summary.unlike:
        return ""
    others = ", ".join(dict.fromkeys(summary.unlike.values()))
    batches = ", those of different batches by about 1 %" if "batches" in others else ""
    return (
        f"{len(summary.unlike)} of {len(summary.trials)} trials ran {others}: perplexities of different devices differ "
        f"in the last digits, those of different number formats by per cents{batches}."
    )


def _beginning(summary: Summary) -> str:
    """One sentence for a study whose windows begin with BOS; else ""."""
    if not summary.bos:
        return ""
    return f"BOS: {summary.bos_effect or 'every window begins with it, as the study file asks'}."


def recovery_said(summary: Summary) -> str:
    """How the best plan was trained and what its perplexity came to, or why it was not; "" without `recover`."""
    found, asked = summary.recovered, summary.made_from.study.recover if summary.made_from else None
    if found is None or (not found.kept and asked is not None and asked != found.settings):
        if asked is None or not summary.complete or summary.best_trial is None:
            return ""
        if summary.training:
            return f"The best plan is being trained on {summary.training}, with {_how(asked)}."
        return f"Not trained yet: the same command trains the best plan, with {_how(asked)}."
    how = _how(found.settings)
    if found.skipped:
        return f"Not trained after pruning: {found.reason}."
    if not found.kept:
        return f"Not trained after pruning: with {how}, {found.reason}."
    texts = {"validation": found.validation, "test": found.test}
    changes = " and ".join(
        f"{each.change.beside('')} on the {name} {summary.results.data}" for name, each in texts.items() if each
    )
    return (
        f"Trained after pruning: {how}, of which step {found.step} was taken; its perplexity is {changes}, against the "
        "same plan as it was pruned. `apply` writes the trained model."
    )


def _how(settings: RecoverConfig) -> str:
    what = "scales of rows and columns" if settings.train == "scales" else "masked LoRA"
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
    uniform, found = results.uniform(better), results.change(other, better, main, "validation")
    values = [str(results.score(trial, "validation", main) or NOTHING) for trial in (better, other, uniform)]
    said = [
        f"β = {trial.params['beta']:.4g} has {value}" for trial, value in zip((better, other), values, strict=False)
    ]
    beside = f", uniform {values[2]}" if uniform is not None else ""
    # Of equal accuracies the cross-entropy has decided.
    chance = found is not None and (found.is_chance or not found.change.value)
    return (
        f"Sign of β: {word} is better: {said[0]}, the best of the other sign, {said[1]}{beside} "
        f"({main.column}, validation){', a difference that may be chance' * chance}."
    )
