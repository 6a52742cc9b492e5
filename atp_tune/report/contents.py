"""The contents of a report on one study, read from its storage."""

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from math import isfinite
from typing import Any

import optuna
import tomli_w
from optuna.trial import FrozenTrial, TrialState

from atp_tune.results.formatting import amount_of, errors_of, spent, texts_note
from atp_tune.results.outcome import study_remarks
from atp_tune.results.summary import Summary, summarise
from atp_tune.spec.studyfile import settings
from atp_tune.storage.lost_trials import is_given_up, is_lost
from atp_tune.storage.progress import ranked, values_of
from atp_tune.storage.validation import StudySnapshot

ENOUGH = 10  # measured trials: with fewer, importance of parameters is not shown


@dataclass(frozen=True)
class Contents:
    """A study's summary, the facts that its values depend on, and the importance of each parameter (shares of 1)."""

    summary: Summary
    facts: dict[str, Any]
    importance: dict[str, float]
    made: datetime

    @property
    def target(self) -> float | None:
        """The target sparsity, of the best trial where the study searches for it; None with `bits`."""
        if self.summary.bits is not None:
            return None
        made, best = self.summary.made_from, self.summary.best_trial
        if best is not None and "sparsity" in best.params:
            return float(best.params["sparsity"])
        if isinstance(self.summary.sparsity, tuple):
            return None
        return made.study.highest if made else self.facts.get("sparsity")

    @property
    def sparsity(self) -> str:
        """The target as text: sparsity, with the interval in which the study searches, or bits; "" if not known."""
        if self.summary.bits is not None:
            return f"{self.summary.bits:g} bits"
        target, interval = self.target, self.summary.sparsity
        if not isinstance(interval, tuple):
            return "" if target is None else f"{target:g}"
        of = f"{interval[0]:g} to {interval[1]:g}"
        return of if target is None else f"{target:g} of {of}"

    @property
    def realised(self) -> float | None:
        """The share of zeros counted in the best trial."""
        best = self.summary.best_trial
        return best.user_attrs.get("realised") if best else None

    @property
    def bits_counted(self) -> str:
        """The bits of the best trial: `, 3.50 (3.85 with scales) in the best`; "" without any."""
        best = self.summary.best_trial
        found = amount_of(best, self.summary) if best and self.summary.bits is not None else ""
        return f", {found} in the best" if found else ""

    @property
    def description(self) -> str:
        """The description in the study file."""
        made = self.summary.made_from
        return made.study.description if made else ""

    @property
    def seconds(self) -> float:
        """Total time of all trials."""
        return sum(sum(spent(trial).values()) for trial in self.summary.trials)

    @property
    def devices(self) -> str:
        """Devices that trials ran on."""
        return _several(trial.user_attrs.get("device") for trial in self.summary.trials)

    @property
    def notes(self) -> list[str]:
        """Sentences on what is unusual in the study."""
        return study_remarks(self.summary)

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the libraries, of all trials."""
        found = [trial.user_attrs.get("versions") or {} for trial in self.summary.trials]
        names = dict.fromkeys(name for versions in found for name in versions)
        return {name: _several(versions.get(name) for versions in found) for name in names}

    @property
    def study_file(self) -> str | None:
        """The study file with all overrides, as TOML; None where an early version made the study."""
        made = self.summary.made_from
        return toml(settings(made)["settings"]) if made else None

    def count(self, *states: TrialState) -> int:
        """Number of trials in these states."""
        return sum(trial.state in states for trial in self.summary.trials)

    @property
    def state(self) -> str:
        """Numbers of trials by state, in words."""
        summary = self.summary
        of = f" of {summary.total}" if summary.total is not None else ""
        parts = [f"{summary.done}{of} trials done"]
        stopped = sum("stopped_after" in trial.user_attrs for trial in summary.trials)
        failed = sum("failure" in trial.user_attrs for trial in summary.trials)
        lost, given_up = (sum(map(is_so, summary.trials)) for is_so in (is_lost, is_given_up))
        counts = (
            (self.count(TrialState.RUNNING), "running"), (failed, "failed"), (lost, "lost and run again"),
            (given_up, "given up"), (stopped, "stopped early"),
        )  # fmt: skip
        return ", ".join(parts + [f"{count} {what}" for count, what in counts if count])

    @property
    def errors(self) -> str:
        """What ± means, the numbers over draws, if there are any, and the texts."""
        summary = self.summary
        said = (f"± is the {errors_of(summary)}", summary.goal.draws(summary), texts_note(summary))
        return "; ".join(part for part in said if part) + "."

    @property
    def verdict(self) -> str:
        """The change against uniform in one sentence, with the error of the difference where it is known."""
        return self.summary.goal.said(self.summary).replace(" ± ", "\u00a0±\u00a0")


def gather(study: optuna.Study, made: datetime) -> Contents:
    """The contents of a report on the present state of a study."""
    study = StudySnapshot(study)
    summary = summarise(study)
    shares = _importance(study, summary.trials) if summary.goal.compares else {}  # the sparsity would have nearly all
    return Contents(summary, dict(study.user_attrs.get("fingerprint", {})), shares, made)


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
