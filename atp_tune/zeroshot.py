"""Zero-shot scores of dense, uniform and best, side by side: one checkpoint in memory, pruned twice.

Memory holds the dense model and the pruned linears of one sparse model. These lie on the compute device if they fit,
else in host memory, and each block's are copied to the device when it computes. Dense blocks that do not fit on the
device are copied one by one too.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import Tensor

from atp_tune.blocks.replay import Replay
from atp_tune.blocks.verification import verified
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.classes import check_language
from atp_tune.checkpoints.devices import (
    device_name,
    find_device,
    find_dtype,
    oom_as_user_error,
)
from atp_tune.checkpoints.models import ModelFolder, resolve
from atp_tune.errors import UserError
from atp_tune.events import EventHandler, Message, TrialStarted
from atp_tune.extras import require
from atp_tune.inputs import KINDS
from atp_tune.inputs.windows import load_tokenizer
from atp_tune.measures import difference, mean_of_tasks
from atp_tune.plan import make_plan
from atp_tune.run.session import Session, Setup
from atp_tune.scores import SCORES
from atp_tune.search.kept_blocks import prune_whole
from atp_tune.sparse.applying import plan_as_pruned
from atp_tune.sparse.provenance import ABOUT
from atp_tune.spec.config import SHARES, Compared, Config, TaskScores, ZeroShot, read_config
from atp_tune.spec.patterns import parse
from atp_tune.spec.study import ModelConfig, of_model
from atp_tune.storage.process_identity import versions

SCORED = ("evaluate", "evaluate DIR")  # what needs a pruned copy, and what needs none

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class TaskOptions:
    """Options of `evaluate`: tasks by name or path, items and few-shot examples of each, batch size, device."""

    tasks: tuple[str, ...]
    limit: int | None
    num_fewshot: int | None
    batch: int
    device: str


class Scorer:
    """Loads tasks, then scores models on them; the weights of a model's blocks may be replaced."""

    def __init__(self, asked: TaskOptions, watch: EventHandler) -> None:
        """UserError if lm-eval is not installed, and for tasks that are unknown or cannot be loaded."""
        self._asked = asked
        self._watch = watch
        require("eval", "evaluate")
        find_device(asked.device)
        from atp_tune.scores.tasks import find_tasks

        watch(Message("reading the tasks"))
        self._tasks = find_tasks(asked.tasks, watch, images=True)
        self._results: dict[Compared, dict[str, Any]] = {}
        self._seconds: dict[Compared, float] = {}

    def score(self, name: Compared, replay: Replay, folder: ModelFolder, weights_of: Callable[[int], Weights]) -> None:
        """Scores a model, and keeps the results under `name`."""
        from atp_tune.scores.task_scores import score

        asked, began = self._asked, perf_counter()
        tokenizer = self.tokenizer(folder)
        with replay.whole(weights_of) as model, oom_as_user_error(name):
            self._results[name] = score(
                model, tokenizer, self._tasks, asked.limit, asked.num_fewshot, asked.batch, self._watch
            )
        self._seconds[name] = round(perf_counter() - began, 1)

    def tokenizer(self, folder: ModelFolder) -> Any:
        """The tokenizer of a folder, or its processor if a task asks about images; UserError if it has none."""
        if not self._tasks.about_images:
            return load_tokenizer(folder.path, folder.trusted)
        from atp_tune.scores.image_tasks import load_processor

        return load_processor(folder.path, folder.trusted, self._tasks.about_images)

    def repeat(self, name: Compared, other: Compared) -> None:
        """Copies the scores of an equal model."""
        self._results[name], self._seconds[name] = self._results[other], 0.0

    def zero_shot(self, checkpoint: Checkpoint) -> ZeroShot:
        """All scores so far, with their differences."""
        tasks = tuple(
            compared(name, {model: results[name] for model, results in self._results.items()})
            for name in self._tasks.rows
        )
        shares = [task for task in tasks if task.metric in SHARES]
        paired = [task.best_minus_uniform for task in shares]
        return ZeroShot(
            tasks=tasks,
            mean={model: mean_of_tasks([task.scores[model][task.metric] for task in shares]) for model in self._results}
            if shares
            else {},
            mean_best_minus_uniform=mean_of_tasks([one for one in paired if one]) if shares and all(paired) else None,
            missing=self._tasks.missing,
            limit=self._asked.limit,
            dtype=str(checkpoint.dtype).removeprefix("torch."),
            device=device_name(checkpoint.device),
            seconds=self._seconds,
            versions={**versions(), "lm_eval": version("lm_eval")},
        )


def evaluate(
    config: Config, base: Path, asked: TaskOptions, watch: EventHandler, allowed: Mapping[str, bool]
) -> ZeroShot:
    """Scores dense, uniform with the same pruner, and best; `allowed` as for `apply`.

    UserError, before the model is loaded, for tasks that cannot be loaded, and if the model is not the configuration's.
    """
    scorer = Scorer(asked, watch)
    texts = {"calibration": config.calibration}
    setup = Setup.of_config(config, texts, base, asked.device, allowed)
    with Session.open(setup, watch) as context:
        return _compared(scorer, config, context)


def _compared(scorer: Scorer, config: Config, context: Session) -> ZeroShot:
    best = plan_as_pruned(config, context)
    uniform = make_plan(best.pruner, "uniform", context.budget(config.target), {}, parse(config.prune.pattern))
    context.watch(TrialStarted("dense", None))
    scorer.score("dense", context.replay, context.folder, context.checkpoint.weights)
    context.watch(TrialStarted("uniform", uniform))
    scorer.score("uniform", context.replay, context.folder, prune_whole(context, uniform, *SCORED))
    if best.levels == uniform.levels:
        scorer.repeat("best", "uniform")
    else:
        context.watch(TrialStarted("best", best))
        context.begin(config.batches)
        scorer.score("best", context.replay, context.folder, prune_whole(context, best, *SCORED))
    return scorer.zero_shot(context.checkpoint)


def evaluate_folder(folder: Path, asked: TaskOptions, watch: EventHandler, allowed: Mapping[str, bool]) -> ZeroShot:
    """Scores the model in a folder, in the number format of its `atp_tune.json`, if it has one."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    check_language(folder, "evaluate")
    scorer = Scorer(asked, watch)
    origin = folder / ABOUT
    dtype = _dtype(origin)
    found = resolve(
        ModelConfig.model_validate({"source": str(folder.absolute()), "dtype": dtype, **of_model(allowed)}), Path()
    )
    scorer.tokenizer(found)  # what is missing is said before the weights are loaded
    device = find_device(asked.device)
    with Checkpoint.load(found.path, find_dtype(dtype, device), device, found.trusted) as checkpoint:
        watch(TrialStarted(str(folder), None))
        scorer.score("model", verified(checkpoint, KINDS["tokens"], SCORES["next-token"]), found, checkpoint.weights)
        return scorer.zero_shot(checkpoint)


def _dtype(origin: Path) -> str:
    try:
        return read_config(origin).model.dtype if origin.is_file() else "auto"
    except UserError:
        return "auto"


def compared(name: str, results: Mapping[Compared, Any]) -> TaskScores:
    """The scores of several models on a task, and best − uniform paired by items, if both were scored."""
    first = next(iter(results.values()))
    metric = next((share for share in SHARES if share in first.scores), next(iter(first.scores), ""))
    pair: tuple[Compared, Compared] = ("best", "uniform")
    paired = [results[model].each.get(metric, []) for model in pair if model in results]
    return TaskScores(
        task=name,
        items=first.items,
        num_fewshot=first.num_fewshot,
        version=first.version,
        metric=metric,
        scores={model: result.scores for model, result in results.items()},
        best_minus_uniform=difference(*paired) if len(paired) == 2 else None,
    )
