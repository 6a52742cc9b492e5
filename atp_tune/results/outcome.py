"""The outcome of a study over an interval of sparsities in sentences, the same on the screen, in notes and reports."""

from collections.abc import Mapping

from atp_tune.measures import Limit
from atp_tune.plan import percent
from atp_tune.results.formatting import drawn_how, method_of
from atp_tune.results.front import Point, Versus
from atp_tune.results.pairing import Role
from atp_tune.results.summary import Summary
from atp_tune.spec.search import STEP
from atp_tune.spec.typed import INCREASE
from atp_tune.storage.progress import knee_of, ranked


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


def outcome_of(summary: Summary) -> str:
    """The best point with its distance from dense and the limit, or without a limit the ends of the front.

    "" for a study at one sparsity, or without a measured trial.
    """
    best = next((point for point in summary.points if point.is_best), None)
    if best is None:
        return ""
    return _within(summary, best, summary.limit) if summary.limit else _front(summary, best)


def against_uniform(summary: Summary) -> str:
    """How far the best is from uniform at one sparsity, over the windows of a text and over draws; "" without both."""
    rank, by_kl = summary.ranks[0] if summary.ranks else None, summary.by_kl
    found = (rank.kl_against if by_kl else rank.against) if rank else None
    if rank is None or found is None:
        return ""
    over = None if by_kl else summary.over_draws.get(rank.trial.number)
    what = "KL divergence" if by_kl else "perplexity"
    said = f"The best plan’s {what} is {found.beside('uniform’s')} on the {rank.on} {summary.data}"
    if over and over.change:
        said += f" (± standard error over {summary.items}), and over {over.count} draws of the calibration "
        said += f"{summary.data} {over.beside('it')} (± standard deviation between draws)"
    is_chance = found.may_be_chance(summary.windows.get(rank.on, 0))
    return f"{said}." + (" That may be chance: zero lies in its 95\u00a0% interval." if is_chance else "")


def draws_said(summary: Summary) -> str:
    """The best plan over draws of the calibration text, over an interval of sparsities; "" without draws."""
    over = summary.over_draws.get(summary.best_trial.number) if summary.best_trial else None
    if over is None or not summary.interval:
        return ""
    beside = f", {over.beside('uniform’s')}" if over.change else ""
    return f"the best over {over.count} draws of the calibration text: {over}{beside} ({drawn_how(summary)})"


def _within(summary: Summary, best: Point, limit: Limit) -> str:
    key, words = next(iter(limit)), limit_of(limit)
    name = f"trial {best.trial.number}, {percent(best.sparsity)} {method_of(best.trial)}"
    search, test = _measured(summary, best, key, "validation"), _measured(summary, best, key, "test")
    data = summary.data
    on_test = f"; on the test {data} {test}" if test else ""
    on_search = f": {search}" + f" on the validation {data}" * (key != "min_accuracy") if search else ""
    is_within = best.excess is not None and best.excess <= 0
    at_end = summary.interval is not None and abs(best.sparsity - summary.interval[is_within]) < STEP / 2
    further = f"; the search ends at {percent(best.sparsity)}, unless --sparsity takes it further" if at_end else ""
    if is_within:
        return f"best: {name}{on_search}, within the limit of {words}{on_test}{further}"
    return f"no trial is within the limit of {words}: the nearest is {name}{on_search}{on_test}{further}"


def _measured(summary: Summary, point: Point, key: str, text: Role) -> str:
    """What the limit bounds, on a text; "" if it is not measured."""
    if key == "min_accuracy" and text == "validation":
        accuracies = point.trial.user_attrs.get("accuracies", {})
        return ", ".join(f"{task} {value:.1%} ± {stderr:.1%}" for task, (value, stderr) in accuracies.items())
    found = {
        "max_increase": point.dense.perplexity.get(text),
        "max_perplexity": getattr(point.scores, text),
        "max_kl": getattr(summary.kl(point.trial), text),
        "max_drop": _accuracies(summary, point, text) if key == "max_drop" else "",
    }.get(key)
    return str(found or "")


def _accuracies(summary: Summary, point: Point, text: Role) -> str:
    """The accuracy of a point beside the dense model's; "" without one."""
    own, dense = (getattr(summary.hits.trial(trial), text) for trial in (point.trial, None))
    return f"accuracy {own}, dense {dense}" if own and dense else ""


def _front(summary: Summary, best: Point) -> str:
    points = [point for point in summary.points if point.on_front]
    ends = [f"{percent(point.sparsity)} ({_value(summary, point)})" for point in (points[0], points[-1])]
    if len(points) == 1:
        return f"Pareto front: one point, {ends[0]}"
    better = sum(_is_better(summary, point.against) for point in points if point.against is not None)
    gained = f"{better} of them beat uniform at the same sparsity by more than chance"
    front = f"Pareto front: {len(points)} points, from {ends[0]} to {ends[1]}; {gained}{_missing(summary)}"
    name = f"trial {best.trial.number}, {percent(best.sparsity)} {method_of(best.trial)}"
    return f"{front}; best: {name}, {_why(summary, best)}"


def _why(summary: Summary, best: Point) -> str:
    """Why this point of a front is its best."""
    if knee_of(ranked(summary.trials), not summary.by_kl and not summary.by_accuracy):
        return "the knee: it lies furthest below the line from the front’s first point to its last"
    change, words = best.dense.perplexity.get("validation"), f"{percent(INCREASE)} more perplexity than dense"
    is_within = change is not None and change.value + change.stderr <= INCREASE
    return f"the {'sparsest within' if is_within else 'nearest to'} {words}"


def _missing(summary: Summary) -> str:
    """What is said where the total leaves out sparsities that the screening was to confirm."""
    screen = summary.made_from.study.search.screen if summary.made_from else None
    measured = {trial.params["sparsity"] for trial in summary.trials if trial.values and "sparsity" in trial.params}
    if screen is None or summary.interval is None or summary.total is None or summary.done < summary.total:
        return ""
    low, high = summary.interval
    wanted = min(screen.confirm, 1 + round((high - low) / STEP))
    if len(measured) >= wanted:
        return ""
    return f"; {len(measured)} of {wanted} sparsities are measured, --trials {2 * wanted} measures all"


def _is_better(summary: Summary, against: Versus) -> bool:
    change = against.kl_change if summary.by_kl else against.change
    windows = summary.windows.get(against.text, 0)
    return change is not None and change.value < 0 and not change.may_be_chance(windows)


def _value(summary: Summary, point: Point) -> str:
    """The measure that the study minimises, on the validation text."""
    if summary.by_kl:
        kl = summary.kl(point.trial).validation
        return f"KL {kl.value:.4f}" if kl else "KL not known"
    score = point.scores.validation
    return f"perplexity {score.value:.2f}" if score else "perplexity not known"
