"""Top-1 and top-5 accuracies of image classifiers for the command `evaluate`, in the form of scores on tasks."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from time import perf_counter

from atp_tune.checkpoints.devices import device_name, oom_as_user_error
from atp_tune.errors import UserError
from atp_tune.events import EventHandler, TrialStarted
from atp_tune.measures import TaskScore, accuracy, gain
from atp_tune.plan import Plan, make_plan
from atp_tune.run.session import Session, Setup
from atp_tune.scores.evaluation import Block
from atp_tune.sparse.applying import plan_as_pruned
from atp_tune.sparse.provenance import origin
from atp_tune.spec.config import Compared, Config, TaskScores, ZeroShot
from atp_tune.spec.images import CLASSES, ImageSet
from atp_tune.spec.patterns import parse
from atp_tune.spec.prune import PruneConfig
from atp_tune.spec.study import Data, ModelConfig, of_model
from atp_tune.storage.process_identity import versions
from atp_tune.zeroshot import TaskOptions

TASKS = ("zero-shot",)  # the default of --tasks, which are of texts
METRIC = "acc"  # as lm-eval calls it
TOPS = {"top-1": 1, "top-5": 5}


def evaluate_config(
    config: Config, base: Path, asked: TaskOptions, watch: EventHandler, allowed: Mapping[str, bool]
) -> ZeroShot:
    """Accuracies of dense, uniform with the same pruner, and best on the configuration's test images."""
    check_options(asked)
    texts: dict[str, Data] = {"calibration": config.calibration, "test": config.texts.test}
    setup = Setup.of_config(config, texts, base, asked.device, allowed)
    with Session.open(setup, watch) as context:
        best = plan_as_pruned(config, context)
        target, pattern = config.target, parse(config.prune.pattern)
        uniform = make_plan(best.pruner, "uniform", context.budget(target), {}, pattern)
        scorer = _Scorer(context, asked.limit)
        scorer.score("dense", None)
        scorer.score("uniform", uniform)
        context.begin(config.batches)
        scorer.score("best", best)
        return scorer.result(asked)


def evaluate_folder(folder: Path, asked: TaskOptions, watch: EventHandler, allowed: Mapping[str, bool]) -> ZeroShot:
    """Accuracies of the classifier in a folder on the test images that its `atp_tune.json` names."""
    check_options(asked)
    made = origin(folder)
    if made is None or not isinstance(made.test, ImageSet):
        raise UserError(
            f"{folder}: has no atp_tune.json that says on which images; give --config FILE, or a folder that "
            "`apply` has written"
        )
    model = ModelConfig.model_validate({"source": str(folder.absolute()), "dtype": made.dtype, **of_model(allowed)})
    texts: dict[str, Data] = {"test": made.test}
    setup = Setup(model, PruneConfig(), texts, made.base, asked.device, score=CLASSES)
    with Session.open(setup, watch) as context:
        scorer = _Scorer(context, asked.limit)
        scorer.score("model", None)
        return scorer.result(asked)


def check_options(asked: TaskOptions) -> None:
    """UserError for options of tasks of texts."""
    if tuple(asked.tasks) != TASKS:
        raise UserError("--tasks: are of texts; an image classifier is measured on its test images, leave it out")
    if asked.num_fewshot is not None:
        raise UserError("--num-fewshot: goes with tasks of texts; leave it out")


class _Scorer:
    """Measures models on the test images, and keeps the ranks of the right classes."""

    def __init__(self, context: Session, limit: int | None) -> None:
        """`limit`: the first so many images, at most."""
        self._context = context if limit is None else context.limited("test", limit)
        self._ranks: dict[Compared, list[int]] = {}
        self._seconds: dict[Compared, float] = {}

    def score(self, name: Compared, plan: Plan | None) -> None:
        """Measures a plan, or the dense model."""
        context, began = self._context, perf_counter()
        context.watch(TrialStarted(name, plan))
        with oom_as_user_error(name):
            self._ranks[name] = context.all_scores(self._blocks(plan), "test").ranks
        self._seconds[name] = round(perf_counter() - began, 1)

    def _blocks(self, plan: Plan | None) -> Iterable[Block]:
        if plan is None:
            return self._context.dense()
        return ((block.index, block.weights) for block in self._context.prune(plan))

    def result(self, asked: TaskOptions) -> ZeroShot:
        """A row for top-1 and one for top-5."""
        return ZeroShot(
            tasks=tuple(self._task(name, top) for name, top in TOPS.items()),
            mean={},
            limit=asked.limit,
            dtype=self._context.dtype,
            device=device_name(self._context.checkpoint.device),
            seconds=self._seconds,
            versions=versions(),
        )

    def _task(self, name: str, top: int) -> TaskScores:
        found = {model: accuracy(ranks, top) for model, ranks in self._ranks.items()}
        paired = None
        if "best" in self._ranks and "uniform" in self._ranks:
            own = gain(self._ranks["uniform"], self._ranks["best"], top)
            paired = TaskScore(value=own.value, stderr=own.stderr)
        return TaskScores(
            task=f"test images, {name}",
            items=len(next(iter(self._ranks.values()))),
            num_fewshot=0,
            version="",
            metric=METRIC,
            scores={model: {METRIC: TaskScore(value=one.value, stderr=one.stderr)} for model, one in found.items()},
            best_minus_uniform=paired,
        )
