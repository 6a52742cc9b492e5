"""The measurements of the models of a study: items by model, text and measure, and what follows from them."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, TrialState
from pydantic import BaseModel, ValidationError

from atp_tune.config.best import Config, ZeroShot, read_config
from atp_tune.config.data import ImageSet, Text, Words
from atp_tune.config.finding import holds
from atp_tune.config.prune import Recovered
from atp_tune.config.studyfile import absolute_storage
from atp_tune.errors import UserError
from atp_tune.measures import ACCURACY, MEASURES, PERPLEXITY, TEXTS, Estimate, Items, Measure, Role, paired
from atp_tune.metrics import Answers, Continuations, Speed
from atp_tune.plan import METHODS, SEARCHED, Plan, is_zero, method_in, target_in
from atp_tune.storage import opening
from atp_tune.storage.database import without_password
from atp_tune.storage.fingerprint import facts_in
from atp_tune.storage.progress import trials_in
from atp_tune.utils.cache import alone_with, write_atomically
from atp_tune.utils.system import check_writable

# --- A stored trial's allocation and scores, and the uniform trial to compare it with.

NO_PARAMETERS = (*METHODS, "allocation", *(one.name for one in SEARCHED))  # of a trial's those of no allocation


def is_uniform(trial: FrozenTrial) -> bool:
    """Whether all linears have the same sparsity, except for the pattern's rounding."""
    allocation = str(trial.params.get("allocation", "atp"))
    numbers = [value for name, value in trial.params.items() if name not in NO_PARAMETERS]
    if allocation == "uniform" or is_zero(allocation, numbers):
        return True
    levels = trial.user_attrs.get("plan", {}).get("levels")  # as they are stored: this is asked of all trials
    if not levels or (isinstance(levels[0], dict) and "linears" in levels[0]):
        return False
    return all(level == levels[0] for level in levels)


def block_levels(trial: FrozenTrial | None) -> list[float] | None:
    """A trial's bits of each block, or means of its linears, else sparsities of each block; None without a plan."""
    plan = Plan.stored_in(trial.user_attrs) if trial else None
    return None if plan is None else list(plan.amounts)


def allocation_name(trial: FrozenTrial) -> str:
    """Name of a trial's allocation."""
    return "uniform" if is_uniform(trial) else str(trial.params.get("allocation", "atp"))


def allocation_parameters(trial: FrozenTrial) -> dict[str, float]:
    """The parameters of a trial's allocation.

    Over an interval a trial draws shares of their bounds, and stores the values when it has its plan.
    """
    if target_in(trial.params) is not None:
        return dict(trial.user_attrs.get("plan", {}).get("parameters", {}))
    return {name: value for name, value in trial.params.items() if name not in NO_PARAMETERS}


def uniform_beside(study: optuna.Study, best: FrozenTrial | None) -> FrozenTrial | None:
    """The uniform trial with the best trial's pruner and target."""
    return uniform_among(trials_in(study), best)


def uniform_among(trials: Iterable[FrozenTrial], best: FrozenTrial | None) -> FrozenTrial | None:
    """The first measured one of these trials that is uniform and has a trial's pruner and target."""
    if best is None:
        return None
    kind, done = _kind(best), (trial for trial in trials if trial.state == TrialState.COMPLETE)
    return next((trial for trial in done if _kind(trial) == kind and is_uniform(trial)), None)


def uniform_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The uniform trial of each pruner, in the order of trials."""
    uniforms = dict[str, FrozenTrial]()
    for trial in trials_in(study, TrialState.COMPLETE):
        if is_uniform(trial):
            uniforms.setdefault(method_in(trial.params), trial)
    return list(uniforms.values())


def _kind(trial: FrozenTrial) -> tuple[Any, ...]:
    return method_in(trial.params), target_in(trial.params)


Model = FrozenTrial | Literal["dense", "trained"]  # `trained`: the best plan after training
DENSE: Literal["dense"] = "dense"
TRAINED: Literal["trained"] = "trained"
NOTHING = "–"  # an empty cell of a table


@dataclass(frozen=True)
class Against:
    """A change from another model, paired by the items of the text `on`; the error is that of the difference."""

    change: Estimate
    on: Role
    items: int

    def __str__(self) -> str:
        return f"{self.change}" + (" (validation)" if self.on == "validation" else "")

    @property
    def is_chance(self) -> bool:
        """Whether 0 lies in its 95 % interval."""
        return self.change.may_be_chance(self.items)


@dataclass(frozen=True)
class Results:
    """The items of a study's models: `attrs` of the study, its trials, and how its best was trained.

    `objectives`: names of what trials minimise, in the order of their values.
    """

    attrs: Mapping[str, Any]
    trials: Sequence[FrozenTrial]
    objectives: tuple[str, ...]
    recovered: Recovered | None = None

    @property
    def trained(self) -> Recovered | None:
        """How the best trial's kept weights were trained; None if they stay as they were pruned."""
        return self.recovered if self.recovered and self.recovered.kept else None

    @cached_property
    def measures(self) -> tuple[Measure, ...]:
        """The measures of the models, in the order of columns."""

        def is_known(measure: Measure) -> bool:
            is_there = f"dense_{measure.items}" in self.attrs or f"test_{measure.items}" in self.attrs
            return is_there or any(measure.items in trial.user_attrs for trial in self.trials)

        shown = (measure for measure in MEASURES.values() if measure.name in self.objectives or is_known(measure))
        return tuple(dict.fromkeys((PERPLEXITY, *shown)))

    @property
    def main(self) -> Measure:
        """The measure that is minimised; of two, the first."""
        return MEASURES[self.objectives[0]]

    @cached_property
    def words(self) -> Words:
        """The words of the data that plans are measured on."""
        return (ImageSet if ACCURACY in self.measures else Text).words

    @property
    def data(self) -> str:
        """The data that plans are measured on: text or images."""
        return self.words.data

    @cached_property
    def counts(self) -> dict[str, int]:
        """Number of items of each measured text."""
        of_trials = (self.items(trial, "validation") for trial in self.trials if trial.values)
        validation = self.items(DENSE, "validation") or next(filter(None, of_trials), ())
        test: Items = next(iter(self.attrs.get("test_nlls", {}).values()), ())
        return {role: len(items) for role, items in (("validation", validation), ("test", test)) if items}

    def items(self, model: Model, text: Role, measure: Measure = PERPLEXITY) -> Items:
        """The items of a model on a text; empty if it was not measured, or stopped."""
        key, name = measure.items, model if isinstance(model, str) else str(model.number)
        if text == "test":
            return self.attrs.get(f"test_{key}", {}).get(name) or ()
        if not isinstance(model, str):
            return () if "stopped_after" in model.user_attrs else model.user_attrs.get(key) or ()
        return self.attrs.get(measure.dense_items) or () if model == DENSE else ()

    def score(self, model: Model | None, text: Role, measure: Measure = PERPLEXITY) -> Estimate | None:
        """The score of a model on a text; None if it is not known. Of a stopped trial its estimate."""
        if isinstance(model, FrozenTrial) and text == "validation":
            return self._measured(model, measure)
        if after := self._after_training(model, measure):
            outcome = after.validation if text == "validation" else after.test
            return outcome.perplexity if outcome else None
        items = () if model is None else self.items(model, text, measure)
        return measure.score(items) if items else None

    def _measured(self, trial: FrozenTrial, measure: Measure) -> Estimate | None:
        """The value that the trial has in the study, with its error; the score of its items where it has none."""
        items, values = self.items(trial, "validation", measure), trial.values or []
        index = self.objectives.index(measure.name) if measure.name in self.objectives else len(values)
        score = measure.score(items) if items else None
        if len(values) <= index or (score and measure.is_higher_better):
            return score if values else None
        stderr = trial.user_attrs.get("stderr") if not index else None
        error = stderr if stderr is not None or score is None else score.stderr
        return measure.kind(value=measure.of_loss(values[index], self.counts.get("validation", 1)), stderr=error or 0.0)

    def _after_training(self, model: Model | None, measure: Measure) -> Recovered | None:
        return self.trained if model == TRAINED and measure is PERPLEXITY else None

    def uniform(self, trial: FrozenTrial | None) -> FrozenTrial | None:
        """The uniform trial with a trial's pruner and target; None without one."""
        return uniform_among(self.trials, trial)

    def on(self, before: Model, after: Model) -> Role:
        """The text on which to compare two models: test if both have it, else validation."""
        return "test" if self.items(before, "test") and self.items(after, "test") else "validation"

    def change(
        self, before: Model, after: Model, measure: Measure = PERPLEXITY, on: Role | None = None
    ) -> Against | None:
        """The change from one model to another on a text, by default the one on which to compare them."""
        text = on or self.on(before, after)
        old, new = (self.items(model, text, measure) for model in (before, after))
        change = paired(measure.change, old, new)
        return None if change is None else Against(change, text, len(new))

    def against_uniform(self, model: Model | None, measure: Measure = PERPLEXITY) -> Against | None:
        """The change of a trial, or of the best after training, from uniform with the same pruner and target."""
        if isinstance(model, str) or model is None:
            after = self._after_training(model, measure)
            change = after.against_uniform if after else None
            return Against(change, "test", self.counts.get("test", 0)) if change else None
        uniform = None if is_uniform(model) else self.uniform(model)
        return None if uniform is None else self.change(uniform, model, measure)

    def shown(self, model: Model, text: Role, measure: Measure) -> Estimate | str | None:
        """The score in a table; of dense also where it is so by definition."""
        return (model == DENSE and measure.dense) or self.score(model, text, measure)

    def scores(self, model: Model | None) -> dict[str, dict[str, Estimate | None]]:
        """All scores of a model, by measure and text: the form of files and of rows."""
        return {
            measure.name: {text: self.score(model, text, measure) for text in TEXTS}
            for measure in self.measures
            if model is not None
        }

    def record(self, model: Model) -> Iterator[tuple[str, float | None]]:
        """All scores of a model in one flat row: `perplexity`, `perplexity_stderr`, `test_perplexity` and so on."""
        for measure in self.measures:
            for text in TEXTS:
                score, name = self.score(model, text, measure), f"{'test_' * (text == 'test')}{measure.name}"
                yield name, score.value if score else None
                yield f"{name}_stderr", score.stderr or None if score else None


# --- Findings on a configuration (zero-shot, speed, continuations, recovery), stored in its JSON file and on its
# study.
#
# On the study each is a user attribute, named after the file's key and the trial. A configuration that is written
# later for the same trial includes them.

Key = Literal["zero_shot", "speed", "continuations", "recovered"]
KINDS: dict[Key, type[BaseModel]] = {
    "zero_shot": ZeroShot, "speed": Speed, "continuations": Continuations, "recovered": Recovered
}  # fmt: skip


def attach(path: Path, config: Config, key: Key, value: BaseModel, address: str | None = None) -> list[str]:
    """Stores a measurement of a configuration in its file and on its study, if found; the names of both, if written.

    `address`: the study's storage, else SQLite files beside the configuration and its study file are searched. A file
    that holds another trial by now is not changed. UserError if the study is not in the storage of `address`.
    """
    study = config_study(path, config, address)
    if study is not None:  # first: a run that writes the file takes what the study has
        store(study, key, config.trial, value.model_dump(mode="json"))
    names = []
    if path.exists():
        with alone_with(path):
            now = read_config(path)
            if is_same(now, config):
                try:
                    write_atomically(path, now.model_copy(update={key: value}).to_json().encode())
                except OSError as error:
                    raise UserError(f"{path}: {error.strerror}; copy it to where you can write") from None
                names = [str(path)]
    return names + ([f"study {study.study_name}"] if study is not None else [])


def check(path: Path, config: Config, address: str | None = None) -> None:
    """UserError if `attach` could not store a measurement; called before it is measured."""
    if path.exists():
        check_writable(path, instead="copy it to where you can write")
    if address is not None:
        config_study(path, config, address)


def store(study: optuna.Study, key: str, trial: int | None, fields: Mapping[str, Any]) -> None:
    """Stores a finding on a trial of its study, in an attribute of its own."""
    study.set_user_attr(f"{key}:{trial}", dict(fields))


def is_same(one: Config, other: Config) -> bool:
    """Whether two configurations are of one trial of one study."""
    known, now = ((each.study, each.trial, each.plan, each.model.fingerprint) for each in (one, other))
    return known == now


def config_study(path: Path, config: Config, address: str | None = None) -> optuna.Study | None:
    """A configuration's study; None if not found, UserError if not in the storage of `address`."""
    if config.trial is None:  # not from a search
        return None
    if address is not None:
        study = _in_storage(absolute_storage(address, Path()), config)
        if study is None:
            raise UserError(
                f"--storage {without_password(address)}: has no study {config.study} whose trial {config.trial} is "
                f"that of {path}"
            )
        return study
    # SQLite files with a study of this name, beside the configuration and its study file.
    folders = dict.fromkeys([path.absolute().parent, Path(os.path.realpath(path.absolute().parent / config.folder))])
    files = [file for folder in folders for file in sorted(folder.glob("*.db"))]
    files.sort(key=lambda file: file.stem != config.study)
    studies = (_in_storage(f"sqlite:///{file}", config) for file in files if holds(file, config.study))
    return next(filter(None, studies), None)


def _in_storage(address: str, config: Config) -> optuna.Study | None:
    study = opening.stored(address, config.study)
    if study is None or facts_in(study).get("model.content") != config.model.fingerprint:
        return None
    plans = (Plan.stored_in(trial.user_attrs) for trial in trials_in(study) if trial.number == config.trial)
    return study if any(plan is not None and plan.does == config.plan.does for plan in plans) else None


def with_attached(config: Config, study: optuna.Study, out: Path) -> Config:
    """The configuration with its trial's measurements from the study and from the file that it will replace."""
    own = dict[str, Any]()
    with suppress(UserError):
        if out.is_file() and is_same(there := read_config(out), config):
            own = {key: getattr(there, key) for key in KINDS if getattr(there, key) is not None}
    return config.model_copy(update={**own, **attached(study, config.trial)})


def attached(study: optuna.Study, trial: int | None) -> dict[str, Any]:
    """The measurements of a trial on its study that this version can read."""
    measurements = dict[str, Any]()
    for key, kind in KINDS.items():
        if row := study.user_attrs.get(key, {}).get(str(trial)):
            with suppress(ValidationError):
                measurements[key] = kind.model_validate(row)
    return measurements


def stored_answers(study: optuna.Study, trial: FrozenTrial) -> Answers | None:
    """The answers of a trial's model on test images, beside dense's and uniform's, if this version can read them."""
    try:
        return Answers.model_validate(study.user_attrs.get("answers", {}).get(str(trial.number)))
    except ValidationError:
        return None
