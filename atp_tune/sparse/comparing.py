"""Dense, uniform and best of a configuration side by side, from one checkpoint in memory: on tasks, images, prompts.

Memory holds the dense model and the pruned linears of one sparse model. These lie on the compute device if they fit,
else in host memory, and each block's are copied to the device when it computes. Dense blocks that do not fit on the
device are copied one by one too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from atp_tune.checkpoints.classes import check_language, classifies_images
from atp_tune.checkpoints.devices import device_name, find_device, oom_as_user_error
from atp_tune.errors import UserError
from atp_tune.events import Place
from atp_tune.extras import require
from atp_tune.measures import TaskScore, accuracy, difference, gain, mean_of_tasks
from atp_tune.metrics.continuations import NAMES, Continuations
from atp_tune.plan import Plan
from atp_tune.run.observers import Prompts, RoleScores, TaskResults
from atp_tune.run.session import Session, Setup
from atp_tune.sparse.applying import plan_as_pruned
from atp_tune.sparse.provenance import ABOUT, origin
from atp_tune.spec.config import SHARES, Compared, Config, TaskScores, ZeroShot, read_config
from atp_tune.spec.data import CLASSES, ImageSet
from atp_tune.spec.patterns import make_plan, parse
from atp_tune.spec.prune import PruneConfig
from atp_tune.spec.study import Data, ModelConfig, of_model
from atp_tune.storage.process import versions

TASKS = ("zero-shot",)  # the default of --tasks, which are of texts
METRIC = "acc"  # as lm-eval calls it
TOPS = {"top-1": 1, "top-5": 5}


@dataclass(frozen=True)
class TaskOptions:
    """Options of `evaluate`: tasks by name or path, items and few-shot examples of each, batch size."""

    tasks: tuple[str, ...]
    limit: int | None
    num_fewshot: int | None
    batch: int


def open_config(config: Config, place: Place, **more: Data) -> Session:
    """The session that prunes to a configuration, to be closed; `more`: texts beside the one for calibration."""
    return Session.open(Setup.of_config(config, {"calibration": config.calibration, **more}, place))


def uniform_plan(config: Config, session: Session) -> Plan:
    """The uniform plan with the pruner and the target of a configuration."""
    return make_plan(config.plan.method, "uniform", session.budget(config.target), {}, parse(config.prune.pattern))


def _plans(config: Config, session: Session) -> dict[str, Plan | None]:
    """Dense, uniform and best; UserError if the model is not the configuration's."""
    best = plan_as_pruned(config, session)
    return {"dense": None, "uniform": uniform_plan(config, session), "best": best}


def continuations(config: Config, prompts: Sequence[str], tokens: int, place: Place) -> Continuations:
    """What dense, uniform with the same pruner, and best make of prompts.

    UserError if the model is not the configuration's.
    """
    work = Prompts(prompts, tokens)
    with oom_as_user_error("generate"), open_config(config, place) as session:
        session.compare(_plans(config, session), [work], {name: f"continuations: {name}" for name in NAMES})
        return work.result()


def evaluate(config: Config, asked: TaskOptions, place: Place) -> ZeroShot:
    """Scores dense, uniform with the same pruner, and best on tasks, or on test images.

    UserError, before the model is loaded, for tasks that cannot be loaded, and if the model is not the configuration's.
    """
    if config.score == CLASSES:
        check_options(asked)
        with open_config(config, place, test=config.texts.test) as session:
            return _on_images(session, _plans(config, session), asked)
    work = _tasks(asked, place)
    with open_config(config, place) as session:
        session.compare(_plans(config, session), [work])
        return _zero_shot(work, session, asked)


def evaluate_folder(folder: Path, asked: TaskOptions, place: Place) -> ZeroShot:
    """Scores the model in a folder, in the number format of its `atp_tune.json`, if it has one.

    A classifier is scored on the test images that this file names.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    if classifies_images(folder):
        check_options(asked)
        made = origin(folder)
        if made is None or not isinstance(made.test, ImageSet):
            raise UserError(
                f"{folder}: has no atp_tune.json that says on which images; give --config FILE, or a folder that "
                "`apply` has written"
            )
        place = replace(place, base=made.base)
        with Session.open(_setup(folder, made.dtype, place, {"test": made.test}, score=CLASSES)) as session:
            return _on_images(session, {"model": None}, asked)
    check_language(folder, "evaluate")
    work, trusted = _tasks(asked, place), of_model(place.allowed).get("trust_remote_code", False)
    try:
        dtype = read_config(folder / ABOUT).model.dtype if (folder / ABOUT).is_file() else "auto"
    except UserError:
        dtype = "auto"

    def ask(found: Path, size: int) -> None:  # a missing tokenizer is said before the weights are loaded
        work.tokenizer(found, trusted)

    with Session.open(_setup(folder, dtype, place, {}, ask=ask)) as session:
        session.compare({"model": None}, [work], {"model": str(folder)})
        return _zero_shot(work, session, asked)


def _setup(folder: Path, dtype: str, place: Place, texts: dict[str, Data], **more: Any) -> Setup:
    model = ModelConfig.model_validate({"source": str(folder.absolute()), "dtype": dtype, **of_model(place.allowed)})
    return Setup(model, PruneConfig(), texts, place, **more)


def check_options(asked: TaskOptions) -> None:
    """UserError for options of tasks of texts."""
    if tuple(asked.tasks) != TASKS:
        raise UserError("--tasks: are of texts; an image classifier is measured on its test images, leave it out")
    if asked.num_fewshot is not None:
        raise UserError("--num-fewshot: goes with tasks of texts; leave it out")


def _tasks(asked: TaskOptions, place: Place) -> TaskResults:
    """Loads the tasks; UserError if lm-eval is not installed, and for those that are unknown or cannot be loaded."""
    require("eval", "evaluate")
    find_device(place.device)
    from atp_tune.scores.tasks import find_tasks

    place.note("reading the tasks")
    found = find_tasks(asked.tasks, place.watch, images=True)
    return TaskResults({"": found}, asked.limit, asked.num_fewshot, asked.batch)


def _zero_shot(work: TaskResults, session: Session, asked: TaskOptions) -> ZeroShot:
    """The scores of all models on all tasks, with their differences."""
    results: Any = {model: found[""] for model, found in work.found.items()}
    tasks = tuple(
        compared(name, {model: found[name] for model, found in results.items()}) for name in work.sets[""].rows
    )
    shares = [task for task in tasks if task.metric in SHARES]
    paired = [task.best_minus_uniform for task in shares]
    means = {model: mean_of_tasks([task.scores[model][task.metric] for task in shares]) for model in results if shares}
    return ZeroShot(
        tasks=tasks,
        mean=means,
        mean_best_minus_uniform=mean_of_tasks([one for one in paired if one]) if shares and all(paired) else None,
        missing=work.sets[""].missing,
        limit=asked.limit,
        dtype=session.dtype,
        device=device_name(session.checkpoint.device),
        seconds={model: work.seconds.get(model, 0.0) for model in results},
        versions={**versions(), "lm_eval": version("lm_eval")},
    )


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


def _on_images(session: Session, plans: Mapping[str, Plan | None], asked: TaskOptions) -> ZeroShot:
    """Top-1 and top-5 accuracies of models on the test images, in the form of scores on tasks."""
    work = RoleScores("test")
    session = session if asked.limit is None else session.limited("test", asked.limit)
    seconds: Any = session.compare(plans, [work])
    ranks: Any = {model: scores.ranks for model, scores in work.found.items()}

    def task(name: str, top: int) -> TaskScores:
        found = {model: accuracy(own, top) for model, own in ranks.items()}
        paired = gain(ranks["uniform"], ranks["best"], top) if "best" in ranks else None
        return TaskScores(
            task=f"test images, {name}",
            items=len(next(iter(ranks.values()))),
            num_fewshot=0,
            version="",
            metric=METRIC,
            scores={model: {METRIC: TaskScore(value=one.value, stderr=one.stderr)} for model, one in found.items()},
            best_minus_uniform=paired and TaskScore(value=paired.value, stderr=paired.stderr),
        )

    return ZeroShot(
        tasks=tuple(task(name, top) for name, top in TOPS.items()),
        mean={},
        limit=asked.limit,
        dtype=session.dtype,
        device=device_name(session.checkpoint.device),
        seconds=seconds,
        versions=versions(),
    )
