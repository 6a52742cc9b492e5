"""A study in MLflow: a run of the experiment atp_tune, in MLFLOW_TRACKING_URI or the SQLite file NAME.mlflow.db."""

import os
from typing import TYPE_CHECKING

from atp_tune.errors import without_secrets
from atp_tune.tracking.records import TrialRecord

if TYPE_CHECKING:
    from atp_tune.tracking import TrackedStudy

EXPERIMENT = "atp_tune"
KEY = "atp_tune.study"  # tag by which the run is found again
NAME = "trial/seconds"  # metric that every trial has


class MLflowRun:
    """The run of one study, found again by its tag; the step of a metric is the trial's number."""

    def __init__(self, study: "TrackedStudy") -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        own = f"sqlite:///{study.beside(f'{study.name}.mlflow.db').absolute()}"
        self._client = MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or own)
        self.place = f"experiment {EXPERIMENT} in {without_secrets(os.environ.get('MLFLOW_TRACKING_URI') or own)}"
        found = self._client.get_experiment_by_name(EXPERIMENT)
        experiment = found.experiment_id if found else self._client.create_experiment(EXPERIMENT)
        runs = self._client.search_runs([experiment], f"tags.`{KEY}` = '{study.key}'")
        run = runs[0] if runs else self._client.create_run(experiment, run_name=study.name, tags={KEY: study.key})
        self._run = run.info.run_id
        self._client.update_run(self._run, status="RUNNING")
        self._known = {metric.step for metric in self._client.get_metric_history(self._run, NAME)}

    def known(self) -> set[int]:
        """The numbers of the trials that the run has."""
        return self._known

    def log(self, record: TrialRecord) -> None:
        """Writes one trial; the metric that marks it as known comes last."""
        self._client.set_tag(self._run, f"trial.{record.number}", f"{record.plan} ({record.state})")
        for name in sorted(record.numbers, key=lambda name: name == NAME):
            self._client.log_metric(self._run, name, record.numbers[name], step=record.number)
        self._known.add(record.number)

    def finish(self, numbers: dict[str, float], step: int) -> None:
        """Writes the final numbers that the run does not have at this step."""
        for name, value in numbers.items():
            if step not in {metric.step for metric in self._client.get_metric_history(self._run, name)}:
                self._client.log_metric(self._run, name, value, step=step)

    def close(self) -> None:
        """Marks the run as finished for now."""
        self._client.set_terminated(self._run)
