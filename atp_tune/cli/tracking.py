"""Experiment trackers that a study can write to: TensorBoard, MLflow, Weights & Biases.

A tracker has one run per study and one step per trial, the trial's number. What it has it knows itself, so that a study
that is resumed goes on in the same run and no trial is written twice. Each imports its package when it is opened.
"""

import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from atp_tune.checkpoints.convert import one_line
from atp_tune.errors import without_secrets
from atp_tune.events import Event, EventHandler, Message, TrialEnded
from atp_tune.measures import PERPLEXITY, TEXTS, Role
from atp_tune.results.results import DENSE, Model, Results, allocation_parameters
from atp_tune.results.summary import Summary, summarise
from atp_tune.utils.cache import alone_with, sha256_of_json, write_atomically

PROJECT = "atp_tune"  # of Weights & Biases; MLflow calls it an experiment
TAG = "atp_tune.study"  # by which MLflow finds a run again
SECONDS = "trial/seconds"  # a number that every trial has
Beside = Callable[[str], Path]  # the path of a file beside the study's database


class TensorBoardRun:
    """Event files in the folder NAME.tensorboard; a resumed run adds one."""

    def __init__(self, name: str, key: str, beside: Beside) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from torch.utils.tensorboard import SummaryWriter

        folder = str(beside(f"{name}.tensorboard"))
        self.place = f"tensorboard --logdir {folder}"
        self._steps: dict[str, set[int]] = defaultdict(set)
        if Path(folder).is_dir():
            read = EventAccumulator(folder, size_guidance={"scalars": 0})  # 0: none is left out
            read.Reload()
            self._steps |= {tag: {event.step for event in read.Scalars(tag)} for tag in read.Tags()["scalars"]}
        self._writer = SummaryWriter(folder)

    def steps(self, name: str) -> set[int]:
        """The steps in its files and of this run."""
        return self._steps[name]

    def log(self, step: int, numbers: Mapping[str, float], plan: str = "") -> None:
        """Writes scalars, and the plan as a text."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
            self._steps[name].add(step)
        if plan:
            self._writer.add_text("trial/plan", plan, step)
        self._writer.flush()

    def close(self) -> None:
        """Closes its file."""
        self._writer.close()


class MLflowRun:
    """A run of the experiment atp_tune, in MLFLOW_TRACKING_URI or the SQLite file NAME.mlflow.db."""

    def __init__(self, name: str, key: str, beside: Beside) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        address = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{beside(f'{name}.mlflow.db').absolute()}"
        self.place = f"experiment {PROJECT} in {without_secrets(address)}"
        self._client = MlflowClient(tracking_uri=address)
        match = self._client.get_experiment_by_name(PROJECT)
        experiment = match.experiment_id if match else self._client.create_experiment(PROJECT)
        runs = self._client.search_runs([experiment], f"tags.`{TAG}` = '{key}'")
        run = runs[0] if runs else self._client.create_run(experiment, run_name=name, tags={TAG: key})
        self._run = run.info.run_id
        self._client.update_run(self._run, status="RUNNING")

    def steps(self, name: str) -> set[int]:
        """The steps in the history of a metric."""
        return {metric.step for metric in self._client.get_metric_history(self._run, name)}

    def log(self, step: int, numbers: Mapping[str, float], plan: str = "") -> None:
        """Writes metrics, and the plan as a tag; the metric that marks a trial as known comes last."""
        if plan:
            self._client.set_tag(self._run, f"trial.{step}", plan)
        for name in sorted(numbers, key=lambda name: name == SECONDS):
            self._client.log_metric(self._run, name, numbers[name], step=step)

    def close(self) -> None:
        """Marks the run as finished for now."""
        self._client.set_terminated(self._run)


class WandbRun:
    """A run of the project atp_tune, whose id is the same each time; its files are in the folder NAME.wandb.

    WANDB_PROJECT, WANDB_ENTITY and WANDB_MODE are respected. A run that is offline cannot be asked what it has, so the
    file `trials.json` of the folder lists the trials that were written.
    """

    def __init__(self, name: str, key: str, beside: Beside) -> None:
        import wandb

        folder = beside(f"{name}.wandb")
        folder.mkdir(parents=True, exist_ok=True)
        self._list, project = folder / "trials.json", os.environ.get("WANDB_PROJECT") or PROJECT
        self.place = f"project {project}, files in {folder}"
        self._run: Any = wandb.init(
            project=project, name=name, id=key, resume="allow", dir=str(folder),
            settings=wandb.Settings(silent=True, console="off"),
        )  # fmt: skip
        self._run.define_metric("*", step_metric="trial")

    def steps(self, name: str) -> set[int]:
        """The steps of trials; final numbers may be written again."""
        return set(json.loads(self._list.read_text())) if name == SECONDS and self._list.is_file() else set()

    def log(self, step: int, numbers: Mapping[str, float], plan: str = "") -> None:
        """Writes a trial, or the final numbers into the run's summary."""
        if not plan:
            self._run.summary.update(numbers)
            return
        self._run.log({"trial": step, "plan": plan, **numbers})
        with alone_with(self._list):
            write_atomically(self._list, json.dumps(sorted({step, *self.steps(SECONDS)})).encode())

    def close(self) -> None:
        """Ends the run for now; a later one with its id goes on."""
        self._run.finish()


# One run of one tracker, made of the study's name, of a key of the study, which stays when its database moves, and of
# `beside`. `place`: where it writes, for people; `steps`: at which it has a number of a name; `log` writes a trial with
# its plan and state in words, or the final numbers at the step of the last trial; `close`: to the disk or the server.
Tracker: TypeAlias = TensorBoardRun | MLflowRun | WandbRun
# Each name is also that of the module that the tracker needs, and of the extra that installs it.
TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoardRun, "mlflow": MLflowRun, "wandb": WandbRun}


# --- Keeps trackers up to date with a study while it runs; one that fails is left out, and the study goes on.

Numbers = dict[str, float]


class Follower:
    """An event handler that writes each trial that has ended to the trackers; a context manager.

    `load` reads the study from its storage, None before it is made; `tell` gets a message if a tracker fails.
    """

    def __init__(self, names: Sequence[str], load: Callable[[], Any], beside: Beside, tell: EventHandler) -> None:
        self._waiting = list(dict.fromkeys(names))  # not yet opened
        self._open = dict[str, Tracker]()
        self._load, self._beside, self._tell = load, beside, tell
        self._study: Any = None

    def __enter__(self) -> "Follower":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, SystemExit):
            self._write(final=True)
        for name in list(self._open):
            self._guarded(name, self._open[name].close)

    def __call__(self, event: Event) -> None:
        """Writes what has ended by now, once a trial of the study itself ends."""
        if isinstance(event, TrialEnded) and event.what == "trial":
            self._write()

    def _write(self, final: bool = False) -> None:
        if not (self._waiting or self._open):
            return
        self._study = self._study or self._load()
        if self._study is None:
            return
        summary = summarise(self._study)
        if not summary.trials:
            return
        key = sha256_of_json([summary.name, str(summary.trials[0].datetime_start)])[:16]
        rows = list(records(summary))

        def update(name: str) -> None:
            if name in self._waiting:
                self._waiting.remove(name)
                self._open[name] = TRACKERS[name](summary.name, key, self._beside)
                self._tell(Message(f"--track {name}: {self._open[name].place}"))
            tracker = self._open[name]
            steps = tracker.steps(SECONDS)
            for row in rows:
                if row[0] not in steps:
                    tracker.log(*row)
            if final and rows:
                last, finals = rows[-1][0], final_numbers(summary)
                tracker.log(last, {name: finals[name] for name in finals if last not in tracker.steps(name)})

        for name in [*self._open, *self._waiting]:
            self._guarded(name, partial(update, name))

    def _guarded(self, name: str, call: Callable[[], None]) -> None:
        """Calls a function of a tracker; if it fails, the tracker is left out from now on."""
        try:
            call()
        except Exception as error:  # trackers raise many types
            self._open.pop(name, None)
            self._tell(Message(f"--track {name}: {one_line(error)}; the study goes on without it"))


def records(summary: Summary) -> Iterator[tuple[int, Numbers, str]]:
    """The trials that have ended, by number: numbers, with the best up to each and the baselines; plan and state."""
    best: Numbers = {}
    results = summary.results
    baselines = _scores(results, "baseline", {"dense": DENSE, "uniform": summary.uniform_trial}, "validation")
    for trial in summary.trials:
        if trial.state.is_finished():
            scores = {
                name: value for name, value in results.record(trial) if value is not None and math.isfinite(value)
            }
            if "stopped_after" not in trial.user_attrs:  # else the values are estimates
                for by in results.measures:
                    if by.name in scores:
                        better = max if by.is_higher_better else min
                        best[by.name] = better(scores[by.name], best.get(by.name, scores[by.name]))
            # over an interval of sparsities, not shares of the bounds
            drawn = {**trial.params, **allocation_parameters(trial)}
            parameters = {key: float(value) for key, value in drawn.items() if isinstance(value, int | float)}
            numbers = {
                f"{table}/{key}": value
                for table, each in (("trial", scores), ("best", best), ("parameters", parameters))
                for key, value in each.items()
            }
            seconds = trial.duration.total_seconds() if trial.duration else 0.0
            plan = " ".join(str(value) for key, value in drawn.items() if key not in parameters)
            yield trial.number, {**numbers, **baselines, SECONDS: seconds}, f"{plan} ({trial.state.name.lower()})"


def final_numbers(summary: Summary) -> Numbers:
    """Scores of dense, uniform and best on both texts, as far as they are known, and the best trial's number."""
    models = {"dense": DENSE, "uniform": summary.uniform_trial, "best": summary.best_trial}
    numbers: Numbers = {}
    for text in TEXTS:
        numbers |= _scores(summary.results, f"final/{text}", models, text)
    return numbers | ({"final/best_trial": float(summary.best_trial.number)} if summary.best_trial else {})


def _scores(results: Results, prefix: str, models: Mapping[str, Model | None], text: Role) -> Numbers:
    """Scores by model, of measures other than perplexity under their name."""
    scores = {
        "/".join([prefix, *([] if by is PERPLEXITY else [by.name]), name]): results.score(model, text, by)
        for by in results.measures
        for name, model in models.items()
    }
    return {name: score.value for name, score in scores.items() if score and math.isfinite(score.value)}
