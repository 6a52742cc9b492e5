"""The goal of a study, as it is stored: its best trial, the points to choose from, what is reported, and how it went.

`search.goals` has the half that the search needs. Points are plans of a study over an interval of targets, each
beside dense and uniform at the same target. Without a limit they are the Pareto front of target and perplexity (or
KL), and the best plan at each other target where uniform is measured too; with one, all plans that were measured in
full, each within the limit or beyond it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import optuna
from optuna.trial import FrozenTrial

from atp_tune.config.typed import INCREASE, LIMIT, Interval, one_target, only_limit, option
from atp_tune.errors import UserError
from atp_tune.measures import ACCURACY, PERPLEXITY, TEXTS, Limit, Role, excess, knee
from atp_tune.metrics import Speed
from atp_tune.plan import Searched, amount_of, searched_by, target_in, target_words, targets_in
from atp_tune.results.formatting import against_uniform, drawn, limit_words, method_words
from atp_tune.results.results import (
    DENSE,
    NOTHING,
    Model,
    allocation_name,
    attached,
    is_uniform,
    uniform_beside,
    uniform_trials,
)
from atp_tune.storage.attributes import readable
from atp_tune.storage.fingerprint import facts_in, stored_objectives
from atp_tune.storage.progress import measured, objective_values, ranked, trials_in

if TYPE_CHECKING:
    from atp_tune.results.summary import Summary

Trials = list[FrozenTrial]
Column = tuple[str, Callable[[Model], object]]  # head, and cell of a model; None is a dash


@dataclass(frozen=True)
class Point:
    """A trial at its target, see `plan.target_in`; `amount`: its sparsity or bits.

    excess       over the study's limit, see `measures.excess`; None without a limit
    is_best      it is the study's best trial
    on_front     no other trial is both sparser and better
    packed_bytes  of all weights in a packed folder, or rounded; None for trials of earlier versions
    speed        what `speedup` measured; None without
    """

    trial: FrozenTrial
    target: float
    amount: dict[str, float]
    excess: float | None
    is_best: bool
    on_front: bool
    packed_bytes: int | None
    speed: Speed | None

    @property
    def is_within(self) -> bool:
        """Whether it is within the study's limit."""
        return self.excess is not None and self.excess <= 0


def trial_name(trial: FrozenTrial) -> str:
    """A trial of a study over an interval, with its target and method."""
    return f"trial {trial.number}, {target_words(target_in(trial.params) or 0.0)} {method_words(trial)}"


@dataclass(frozen=True)
class Choice:
    """A trial, and why it was chosen."""

    trial: FrozenTrial
    why: str

    def __str__(self) -> str:
        return f"{trial_name(self.trial)}: {self.why}"


@dataclass(frozen=True)
class AtSparsity:
    """The best plan at one sparsity, or one number of bits.

    compares  values of all trials compare, which those at different sparsities do not
    figures   names of those that show it
    same      what the best has of uniform, beside its method; `hidden`: a column that its table needs not
    is_open   all points are as good as the best: a person chooses
    """

    compares: ClassVar[bool] = True
    figures: ClassVar[Sequence[str]] = ("perplexity", "front", "sparsity", "error", "seconds")
    same: ClassVar[str] = ""
    hidden: ClassVar[str] = "trial"
    is_open: ClassVar[bool] = False

    study: optuna.Study = field(compare=False)

    def best(self, trials: Iterable[FrozenTrial]) -> FrozenTrial | None:
        """The best of these trials: the lowest first value."""
        return next(iter(ranked(trials)), None)

    def leaders(self) -> Trials:
        """The trials that lead, the best first: that of each allocation; one with equal sparsities is uniform."""
        best = dict[str, FrozenTrial]()
        for trial in measured(self.study):
            best.setdefault(allocation_name(trial), trial)
        return list(best.values())

    def compared(self) -> list[str]:
        """Numbers of the trials with final scores: each leader and its uniform trial."""
        leaders = enumerate(self.leaders())
        return self._with_uniform(trial for place, trial in leaders if place == 0 or not is_uniform(trial))

    redrawn = compared  # numbers of the trials that other draws of the calibration text prune too

    def _with_uniform(self, trials: Iterable[FrozenTrial]) -> list[str]:
        both = [trial for best in trials for trial in (uniform_beside(self.study, best), best) if trial is not None]
        return list(dict.fromkeys(str(trial.number) for trial in both))

    def points(self) -> list[Point]:
        """The points by sparsity, the lowest first; [] at one sparsity."""
        return []

    def timed(self, summary: "Summary") -> Trials:
        """The trials that `speedup` is to measure."""
        return [summary.best_trial] if summary.best_trial else []

    def nearest(self, wanted: Any) -> Choice:
        """The trial of the front that is nearest to a target; UserError for one that the study has not."""
        only = facts_in(self.study).get("sparsity")
        at = f"only at {only:.4g}" if isinstance(only, float) else "at one sparsity"
        raise UserError(f"study {self.study.study_name}: measures plans {at}; choose one of its trials with --trial N")

    sparsest = nearest  # within a limit; UserError if no trial is, or if the study lacks the numbers

    def rows(self, summary: "Summary") -> Trials:
        """The trials in the table of results, below dense."""
        return uniform_trials(self.study) + [trial for trial in summary.ranks if not is_uniform(trial)]

    def columns(self, summary: "Summary") -> Iterator[Column]:
        """Columns of changes of the perplexity, also over draws."""
        yield "against uniform", summary.results.against_uniform
        best = drawn(summary)
        if best:
            count, over = best.count, summary.over_draws
            yield f"perplexity, {count} draws", lambda m: None if isinstance(m, str) else over.get(m.number)
            yield (
                f"against uniform, {count} draws",
                lambda m: None if isinstance(m, str) or m.number not in over else over[m.number].changed or None,
            )

    def draws(self, summary: "Summary") -> str:
        """The meaning of the numbers over draws of the calibration text; "" without draws."""
        over, words = drawn(summary), summary.results.words
        return f"{over.count} draws: test {words.data}, {over.how(words.unit, words.rate, False)}" if over else ""

    def outcome(self, summary: "Summary") -> str:
        """The best trial in words; "" without one."""
        if summary.best_trial is None:
            return ""
        lowest = ", the lowest perplexity of the front; `export --trial N` takes another" if summary.front else ""
        return f"best: trial {summary.best_trial.number}, {method_words(summary.best_trial)}{lowest}"

    def said(self, summary: "Summary") -> str:
        """How it went, in sentences."""
        if summary.best_trial is None:
            return "No trial has been measured yet."
        if is_uniform(summary.best_trial):
            return "No trial is better than uniform."
        return against_uniform(summary) or "Uniform has not been measured yet."


@dataclass(frozen=True)
class OverInterval(AtSparsity):
    """The front over an interval of targets; its best is at the knee."""

    compares = False
    figures = ("points", "sparsity", "error", "seconds")
    same = " and target"
    hidden = ""
    is_open = True

    interval: Interval
    limit: Limit  # of a front where there is no knee

    @property
    def searched(self) -> Searched:
        """The amount that is searched for."""
        return searched_by(self.interval[0])

    def best(self, trials: Iterable[FrozenTrial]) -> FrozenTrial | None:
        """The knee of the front, without one the sparsest within `LIMIT`."""
        done = ranked(trials)
        return self._knee(done) or self._within(done, self.limit)

    def _knee(self, done: Iterable[FrozenTrial]) -> FrozenTrial | None:
        """The knee of the front of ranked trials over sparsity; None without one."""
        # The logs of perplexities count, in nats as KL does.
        of_logs = stored_objectives(facts_in(self.study))[0] == PERPLEXITY.name
        front, points, lowest = Trials(), list[tuple[float, float]](), math.inf
        for trial in sorted(done, key=lambda trial: target_in(trial.params) or 0.0, reverse=True):
            value = objective_values(trial)[0]
            if value < lowest and (value > 0 or not of_logs):
                front, lowest = [trial, *front], value
                points.insert(0, (target_in(trial.params) or 0.0, math.log(value) if of_logs else value))
        index = knee(points)
        return None if index is None else front[index]

    def _within(self, done: Sequence[FrozenTrial], limit: Limit) -> FrozenTrial | None:
        """The sparsest of ranked trials within a limit; if none is, the one with the smallest excess."""
        excesses = {trial.number: limit_excess(self.study, trial, limit) for trial in done}
        if inside := [trial for trial in done if excesses[trial.number] <= 0]:
            return max(
                inside, key=lambda trial: (target_in(trial.params) or 0.0, -objective_values(trial)[0], -trial.number)
            )
        return min(done, key=lambda trial: excesses[trial.number], default=None)

    def leaders(self) -> Trials:
        """The best trial; then, where a person chooses, the others of the front."""
        best, others = best_trial(self.study), pareto_front(self.study) if self.is_open else []
        return [best, *(trial for trial in others if trial.number != best.number)] if best else []

    def compared(self) -> list[str]:
        """Each leader, also a uniform one, and its uniform trial."""
        return self._with_uniform(self.leaders())

    def redrawn(self) -> list[str]:
        """The best and its uniform trial."""
        return self._with_uniform(self.leaders()[:1])

    def points(self) -> list[Point]:
        """The front, and where none of its trials is, the best at each target where uniform is measured."""
        best, front = best_trial(self.study), pareto_front(self.study)
        shown = [
            trial
            for trial in self._shown(front)
            if target_in(trial.params) is not None and "repeats" not in trial.user_attrs
        ]
        shown.sort(key=lambda trial: (target_in(trial.params), not is_uniform(trial), trial.number))
        numbers = {trial.number for trial in front}
        return [
            Point(
                trial=trial,
                target=(target := target_in(trial.params) or 0.0),
                amount=amount_of(target),
                excess=limit_excess(self.study, trial) if self.study.user_attrs.get("limit") else None,
                is_best=best is not None and trial.number == best.number,
                on_front=trial.number in numbers,
                packed_bytes=trial.user_attrs.get(self.searched.stored),
                speed=attached(self.study, trial.number).get("speed"),
            )
            for trial in shown
        ]

    def _shown(self, front: Trials) -> Trials:
        done = measured(self.study)
        best = {target_in(trial.params): trial for trial in reversed(done)}
        uniform, there = ({target_in(one.params) for one in trials} for trials in (filter(is_uniform, done), front))
        return [*front, *(best[target] for target in uniform - there)]

    def timed(self, summary: "Summary") -> Trials:
        """The points that have no speed yet."""
        return [point.trial for point in summary.points if point.speed is None]

    def nearest(self, wanted: float) -> Choice:
        """The lower of two that are as near."""
        low, high = self.interval
        if not low <= wanted <= high:
            option, ends = searched_by(wanted).option, target_words(self.interval)
            raise UserError(f"{option}: {target_words(wanted)} is outside the study's interval, {ends}")
        distances = {
            (round(abs(target - wanted), 6), target): trial
            for trial in reversed(pareto_front(self.study))
            if (target := target_in(trial.params)) is not None
        }
        if not distances:
            raise UserError(f"study {self.study.study_name}: no trial has a value yet")
        distance, _ = nearest = min(distances)
        why = "on the front" if distance == 0 else f"the nearest to {target_words(wanted)} on the front"
        return Choice(distances[nearest], why)

    def sparsest(self, limit: Limit) -> Choice:
        """Chooses as the best of a study with this limit is chosen."""
        trial, name = self._within(measured(self.study), limit), f"study {self.study.study_name}"
        if trial is None:
            raise UserError(f"{name}: no trial has a value yet")
        over = limit_excess(self.study, trial, limit)
        if over == math.inf:
            lacking = {
                "max_kl": "KL divergence; its search.objective has none",
                "max_drop": "accuracy beside dense; --max-drop is of image classifiers",
            }.get(next(iter(limit)), "perplexity beside dense")
            raise UserError(f"{name}: no trial has a finite {lacking}")
        words = (
            f"{limit_words(limit)} on the validation {'images' if 'dense_ranks' in self.study.user_attrs else 'text'}"
        )
        if over > 0:
            nearest = Choice(trial, "it is exported by its number")
            raise UserError(f"{name}: no trial is within {words}; the nearest is {nearest}")
        return Choice(trial, f"the {self.searched.most} within {words}")

    def rows(self, summary: "Summary") -> Trials:
        """The points."""
        return [point.trial for point in summary.points]

    def columns(self, summary: "Summary") -> Iterator[Column]:
        """Uniform at the same sparsity, on the text where both are measured, and the changes from dense and from it."""
        results = summary.results

        def beside(model: Model) -> str | None:
            uniform = None if isinstance(model, str) or is_uniform(model) else results.uniform(model)
            if uniform is None:
                return None
            on = results.on(uniform, model)
            return f"{results.score(uniform, on) or NOTHING}{' (validation)' * (on == 'validation')}"

        yield "uniform", beside
        yield "against dense", lambda m: None if m == DENSE else results.change(DENSE, m)
        yield "against uniform", results.against_uniform

    def draws(self, summary: "Summary") -> str:
        """The best plan over draws of the calibration text."""
        over, words = drawn(summary), summary.results.words
        if over is None:
            return ""
        beside = f", {over.beside('uniform’s')}" if over.change else ""
        how = over.how(words.unit, words.rate, False)
        return f"the best over {over.count} draws of the calibration text: {over}{beside} ({how})"

    def outcome(self, summary: "Summary") -> str:
        """The ends of the front, and the best with the reason."""
        best = next((point for point in summary.points if point.is_best), None)
        return "" if best is None else self._outcome(summary, best)

    def said(self, summary: "Summary") -> str:
        """The outcome as a sentence."""
        outcome = self.outcome(summary) or "no trial has been measured yet"
        return f"{outcome[0].upper()}{outcome[1:]}."

    def _outcome(self, summary: "Summary", best: Point) -> str:
        results, main = summary.results, summary.results.main
        points = [point for point in summary.points if point.on_front]
        # The ends of the front, and how many of its points gain by more than chance.
        ends = list[str]()
        for point in (points[0], points[-1]):
            score = results.score(point.trial, "validation", main)
            ends.append(f"{target_words(point.target)} ({main.column} {score.alone if score else 'not known'})")
        if len(points) == 1:
            return f"Pareto front: one point, {ends[0]}"
        changes = [results.against_uniform(point.trial, main) for point in points]
        better = sum(change is not None and main.is_gain(change.change) and not change.is_chance for change in changes)
        gained = f"{better} of them beat uniform at the same {self.searched.name} by more than chance"
        # Why its best is the best.
        why = "the knee: it lies furthest below the line from the front’s first point to its last"
        if not self._knee(ranked(summary.trials)):
            against = results.change(DENSE, best.trial, on="validation")
            is_within = against is not None and against.change.value + against.change.stderr <= INCREASE
            why = f"the {f'{self.searched.most} within' if is_within else 'nearest to'} {limit_words(self.limit)}"
        front = f"Pareto front: {len(points)} points, from {ends[0]} to {ends[1]}; {gained}{self._missing(summary)}"
        return f"{front}; best: {trial_name(best.trial)}, {why}"

    def _missing(self, summary: "Summary") -> str:
        """A sentence where the total leaves out sparsities that the screening was to confirm; "" elsewhere."""
        screen, (low, high) = summary.made_from.study.search.screen if summary.made_from else None, self.interval
        if screen is None or summary.total is None or summary.done < summary.total:
            return ""
        count = len({target_in(trial.params) for trial in summary.trials if trial.values} - {None})
        wanted = min(screen.confirm, 1 + round((high - low) / self.searched.step))
        note = f"; {count} of {wanted} targets are measured, --trials {2 * wanted} measures all"
        return note if count < wanted else ""


@dataclass(frozen=True)
class WithinLimit(OverInterval):
    """The sparsest plan within a limit."""

    is_open = False

    def best(self, trials: Iterable[FrozenTrial]) -> FrozenTrial | None:
        """The sparsest within the limit; if none is, the one with the smallest excess."""
        return self._within(ranked(trials), self.limit)

    def _shown(self, front: Trials) -> Trials:
        return measured(self.study)

    def columns(self, summary: "Summary") -> Iterator[Column]:
        """The change from dense on the text where the limit holds; uniform has rows of its own."""
        change = summary.results.change
        yield (
            "against dense, validation",
            lambda m: None if m == DENSE else (found := change(DENSE, m, on="validation")) and found.change,
        )
        yield "against uniform", summary.results.against_uniform

    def _outcome(self, summary: "Summary", best: Point) -> str:
        """The best point with its distance from dense and the limit."""
        key, words, data = next(iter(self.limit)), limit_words(self.limit), summary.results.data
        search, test = (self._bounded(summary, best, key, text) for text in TEXTS)
        on_test = f"; on the test {data} {test}" if test else ""
        on_search = f": {search}" + f" on the validation {data}" * (key != "min_accuracy") if search else ""
        by, end = self.searched, self.interval[best.is_within]
        further = f"; the search ends at {target_words(end)}, unless {by.option} takes it further"
        further *= abs(best.target - end) < by.step / 2
        if best.is_within:
            return f"best: {trial_name(best.trial)}{on_search}, within the limit of {words}{on_test}{further}"
        nearest = f"the nearest is {trial_name(best.trial)}{on_search}{on_test}{further}"
        return f"no trial is within the limit of {words}: {nearest}"

    def _bounded(self, summary: "Summary", point: Point, key: str, text: Role) -> str:
        """The quantity that the limit bounds, on a text; "" if it is not measured."""
        results, trial = summary.results, point.trial
        if key == "min_accuracy" and text == "validation":
            accuracies: Mapping[str, Sequence[float]] = trial.user_attrs.get("accuracies", {})
            return ", ".join(f"{task} {value:.1%} ± {stderr:.1%}" for task, (value, stderr) in accuracies.items())
        if key == "max_drop":
            own, dense = (results.score(model, text, ACCURACY) for model in (trial, DENSE))
            return f"accuracy {own}, dense {dense}" if own and dense else ""
        if key == "max_increase":
            change = results.change(DENSE, trial, on=text)
            return str(change.change) if change else ""
        scores = (results.score(trial, text, by) for by in results.measures if key == f"max_{by.name}")
        return str(next(scores, None) or "")


def goal_in(study: optuna.Study) -> AtSparsity:
    """The goal of a stored study."""
    limit, facts = study.user_attrs.get("limit"), facts_in(study)
    targets = targets_in(facts)
    if len(targets) < 2:
        return AtSparsity(study)
    return (WithinLimit if limit else OverInterval)(study, (targets[0], targets[1]), limit or LIMIT)


def chosen(study: optuna.Study, options: Mapping[str, Any]) -> int | Choice | None:
    """The trial that one of these names, if it is not None: `trial`, `sparsity` or a limit; UserError for two."""
    choices = {key: value for key, value in options.items() if value is not None}
    if len(choices) > 1:
        first, second, *_ = map(option, choices)
        raise UserError(f"{second}: names one trial, and {first} another; leave one out")
    match choices:
        case {"trial": number}:
            trial: int = number
            return trial
        case {"sparsity": _} | {"bpw": _}:
            [(key, value)] = choices.items()
            return goal_in(study).nearest(one_target(str(value), key))
    limit = only_limit(choices)
    return goal_in(study).sparsest(limit) if limit else None


def best_trial(study: optuna.Study) -> FrozenTrial | None:
    """The best of the measured trials, if there is one."""
    return goal_in(study).best(trials_in(study))


def limit_excess(study: optuna.Study, trial: FrozenTrial, limit: Limit | None = None) -> float:
    """How far a trial is beyond the study's limit, or this one: see `measures.excess`; infinite if not known."""
    own, attrs = trial.user_attrs, study.user_attrs
    ranks = attrs.get("dense_ranks"), own.get("ranks")
    limit = limit or attrs["limit"]
    value = excess(limit, attrs.get("dense"), own.get("nlls"), own.get("kls"), own.get("accuracies"), ranks)
    return math.inf if value is None else value


def pareto_front(study: optuna.Study) -> Trials:
    """The Pareto front of a study of several objectives, the lowest perplexity first; [] for one objective."""
    if len(study.directions) == 1:
        return []
    with readable(study.study_name):
        return [trial for trial in ranked(study.best_trials) if "repeats" not in trial.user_attrs]
