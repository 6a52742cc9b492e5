"""lm-eval's tasks, loaded before any model.

A task is named by lm-eval's name of it or of its group, by `zero-shot` for the seven of the papers' tables, or by the
path of a YAML file or a folder of them. Data that is not in the cache comes from the hub; if the hub does not answer
within seconds, only the cache is used.
"""

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from huggingface_hub import constants
from lm_eval import evaluate
from lm_eval.api.group import Group
from lm_eval.models.hf_vlms import HFMultimodalLM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor, nn

from atp_tune.checkpoints.blocks import check_known
from atp_tune.checkpoints.convert import one_line, quiet
from atp_tune.config.best import SHARES
from atp_tune.config.plugged import is_task_path
from atp_tune.errors import UserError
from atp_tune.events import EventHandler, Message, Step
from atp_tune.inputs.sources import is_hub_in_reach
from atp_tune.measures import TaskScore, error_of_share
from atp_tune.utils.system import written

SEVEN = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
ALL_SEVEN = "zero-shot"
LIBRARIES = ("lm_eval", "datasets", "huggingface_hub", "transformers")
OUT_OF_REACH = "its data is not in the cache, and the hub is out of reach"


@dataclass(frozen=True)
class Tasks:
    """Loaded tasks and groups of lm-eval, the names of their scores, and reasons why others could not be loaded."""

    loaded: list[Any]
    rows: tuple[str, ...]
    missing: dict[str, str]
    manager: TaskManager
    about_images: str  # the first task that asks about images


def find_tasks(names: Sequence[str], watch: EventHandler, multimodal: bool = False, base: Path = Path()) -> Tasks:
    """Loads tasks with their data; leaves out, with a message, those that cannot run.

    `multimodal`: they may ask about images. Relative paths start at `base`. The code that YAML files name runs.
    UserError for unknown names, and if no task is left.
    """
    if not names:
        raise UserError("--tasks: names no task")
    paths = [_path(name, base) for name in names if is_task_path(name)]
    others = [name for name in names if not is_task_path(name)]
    wanted = list(dict.fromkeys(each for name in others for each in (SEVEN if name == ALL_SEVEN else (name,))))
    with quiet(*LIBRARIES):
        manager = TaskManager(include_path=[path for path in paths if path.is_dir()], include_defaults=bool(others))
        _check_names(wanted, manager.all_tasks)
        wanted += [spec for path in paths for spec in (_inside(path, manager) if path.is_dir() else [str(path)])]
        loaded, missing = _load(manager, wanted, multimodal)
    if not loaded and {*missing.values()} == {OUT_OF_REACH}:
        raise UserError(
            f"--tasks: the hub is out of reach, and the cache has no data for {', '.join(missing)}; run this once "
            "where there is a network and bring its HF_HOME along, or give tasks of your own: --tasks FOLDER/"
        )
    if not loaded:
        reasons = (f"{name}: {reason}" for name, reason in missing.items())
        raise UserError(f"--tasks: none can be run: {'; '.join(reasons)}")
    # lm-eval would join tasks of which some ask about images and others about text.
    members = [one for task in loaded for one in _members(task)]
    about_images = next((str(one.task_name) for one in members if getattr(one, "MULTIMODAL", False)), "")
    written_by = (one for one in members if one.OUTPUT_TYPE == "generate_until")  # as all that ask about images
    about_text = next((one.task_name for one in written_by if not getattr(one, "MULTIMODAL", False)), None)
    if about_text and about_images:
        raise UserError(
            f"--tasks: {about_text} asks about text and {about_images} about images; name them in two commands"
        )
    for name, reason in missing.items():
        watch(Message(f"{name}: left out, {reason}"))
    rows = dict.fromkeys(row for task in loaded for row in _rows(task))
    return Tasks(loaded, tuple(rows), missing, manager, about_images)


def _path(name: str, base: Path) -> Path:
    path = written(name, base, "--tasks")
    if not path.is_dir() and not (path.is_file() and path.suffix in (".yaml", ".yml")):
        raise UserError(f"--tasks {name}: there is no such folder and no such .yaml file")
    return path


def _check_names(names: Iterable[str], known: Sequence[str]) -> None:
    for name in names:
        if name in known:
            continue
        near = get_close_matches(name, [*known, ALL_SEVEN], n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; `lm-eval ls tasks` lists them"
        folder = f"; for the folder of that name write {name}/" if Path(name).is_dir() else ""
        raise UserError(f"--tasks {name}: lm-eval has no such task or group{folder or hint}")


def _inside(folder: Path, manager: TaskManager) -> list[str]:
    """The groups of a folder, and its tasks that are in none of them."""
    root = folder.resolve()
    own = {
        name: entry
        for name, entry in manager.task_index.items()
        if entry.yaml_path is not None and entry.yaml_path.resolve().is_relative_to(root)
    }
    groups = [own[name] for name in manager.all_groups if name in own]
    members = {member for group in groups for member in (group.cfg or {}).get("task", []) if isinstance(member, str)}
    names = [name for name in own if name not in members]
    if not names:
        raise UserError(f"--tasks {folder}: holds no task, that is no .yaml file with the keys task and dataset_path")
    return names


def _load(manager: TaskManager, names: Sequence[str], multimodal: bool) -> tuple[list[Any], dict[str, str]]:
    """Tasks and groups, and reasons why others cannot run."""
    loaded = list[Any]()
    missing = dict[str, str]()
    # In offline mode if the hub does not answer: its client would retry for minutes.
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if not any(before) and not is_hub_in_reach():
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        for name in names:
            try:
                entry = manager.load([name])
                for task in entry["tasks"].values():
                    if getattr(task, "UNSAFE_CODE", False):
                        raise ValueError("it runs code that the model writes")
                    if not getattr(task, "MULTIMODAL", False):
                        continue
                    if not multimodal or task.config.doc_to_audio:
                        raise ValueError("it needs inputs other than text" + " and images" * multimodal)
                    if task.OUTPUT_TYPE != "generate_until":
                        raise ValueError(
                            f"it is of type {task.OUTPUT_TYPE}, and lm-eval asks about images by generate_until alone"
                        )
            except Exception as error:  # whatever readers, network and a task's own code raise
                missing[name] = OUT_OF_REACH if isinstance(error, ConnectionError) else one_line(error)
                continue
            loaded += [entry["groups"][name]] if name in entry["groups"] else entry["tasks"].values()
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
    return loaded, missing


def _members(task: Any) -> list[Any]:
    """The tasks of a group, or the task itself."""
    return list(task.get_all_tasks()) if isinstance(task, Group) else [task]


def _rows(task: Any) -> list[str]:
    """Names of the scores of a task, of a group with an aggregate score, or of the tasks of a group without."""
    if isinstance(task, Group) and task.has_aggregation:
        return [task.name]
    return [one.task_name for one in _members(task)]


# --- Scores of a model in memory on tasks of lm-eval.

SEED = 1234  # lm-eval's seed for few-shot examples
BOOTSTRAPS = 1000  # resamples for standard errors of metrics that are not means


@dataclass(frozen=True)
class TaskResult:
    """Scores of a model on a task: the mean of each metric, and its values by item."""

    items: int
    num_fewshot: int
    version: str
    scores: dict[str, TaskScore]
    each: dict[str, list[float]]


def score(
    model: nn.Module,
    tokenizer: Any,
    tasks: Tasks,
    limit: int | None,
    num_fewshot: int | None,
    batch: int,
    watch: EventHandler,
) -> dict[str, TaskResult]:
    """Scores a transformers model in memory on each task, in batches of `batch` sequences.

    `tokenizer`: the model's processor, if a task asks about images. Log-likelihoods are float32 sums of the logits'
    log-softmax, whatever the model's number format.
    """
    with quiet(*LIBRARIES):
        lm = (ImageModel if tasks.about_images else _Checked)(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch, softmax_dtype=torch.float32,
            prefix_token_id=_prefix(model, getattr(tokenizer, "tokenizer", tokenizer)),
        )  # fmt: skip
        AnswerCounter(watch).listen(lm)
        # Tasks and seeds as of lm-eval's `simple_evaluate`, which would also query pip, git, compilers and drivers:
        # that takes seconds each time.
        random.seed(0)
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        loaded: dict[str, Any] = tasks.manager.load(tasks.loaded)
        for task in loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            if own != 0:  # a task with 0 stays zero-shot
                task.set_config(key="num_fewshot", value=(own or 0) if num_fewshot is None else num_fewshot)
            task.set_fewshot_seed(seed=SEED)
        output = evaluate(lm, loaded, limit=limit, bootstrap_iters=BOOTSTRAPS, fewshot_as_multiturn=True)
    return {row: _result(output, row) for row in tasks.rows}


class _Checked(HFLM):
    """lm-eval's model; UserError if the tokenizer's ids exceed the model's vocabulary."""

    def _model_call(self, inps: Tensor, *arguments: Any, **options: Any) -> Any:
        check_known(self.model, int(inps.max()), "evaluate")
        return super()._model_call(inps, *arguments, **options)


def _prefix(model: nn.Module, tokenizer: Any) -> int | None:
    """The token of an empty context; None if the tokenizer has one."""
    config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    ends = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    own = [config.bos_token_id, config.eos_token_id, 0]
    return None if any(token is not None for token in ends) else next(token for token in own if isinstance(token, int))


@dataclass(eq=False)
class AnswerCounter:
    """Takes the place of lm-eval's cache of answers, and so is called for each answer."""

    watch: EventHandler
    _done: int = 0
    _total: int = 0

    def listen(self, lm: HFLM) -> None:
        """Counts the answers of a model from this call on."""
        lm.set_cache_hook(self)
        for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
            setattr(lm, kind, partial(self._begin, getattr(lm, kind)))

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        """Counts one answer."""
        self._done += 1
        self.watch(Step("answer", self._done, self._total))

    def _begin(self, answer: Callable[[list[Any]], Any], requests: list[Any]) -> Any:
        self._done, self._total = 0, len(requests)
        return answer(requests)


def _result(output: Mapping[str, Any], name: str) -> TaskResult:
    row, samples = output["results"][name], output["samples"].get(name, [])
    keys = [key for key, value in row.items() if "," in key and "_stderr," not in key and _is_number(value)]
    return TaskResult(
        items=row["sample_len"],
        num_fewshot=output["n-shot"].get(name) or 0,
        version=str(output["versions"].get(name)),
        scores={_short(key): TaskScore(value=row[key], stderr=_stderr(row, key, row["sample_len"])) for key in keys},
        each={_short(key): _each(samples, *key.split(",", 1)) for key in keys},
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _short(key: str) -> str:
    """lm-eval's `metric,filter`, without the filter if it is `none`."""
    return key.removesuffix(",none")


def _stderr(row: Mapping[str, Any], key: str, items: int) -> float:
    """lm-eval's, which is 0 where all items have one score: of a share then that of `measures.accuracy`, else 0."""
    value = row.get(key.replace(",", "_stderr,", 1))
    if _is_number(value) and value:
        return float(value)
    return error_of_share(row[key] * items, items) if _short(key) in SHARES else 0.0


def _each(samples: Iterable[Mapping[str, Any]], metric: str, name: str) -> list[float]:
    """The metric by item; empty if it is defined only over all items."""
    own: list[Any] = [sample.get(metric) for sample in samples if sample["filter"] == name]
    return [float(value) for value in own] if all(_is_number(value) for value in own) else []


# --- lm-eval's model for questions about images: one that reads images beside text, with the processor of its folder.
#
# lm-eval writes the model's image token into a question where the task has `<image>`; the processor turns it into as
# many positions as an image takes. Whatever would let a model answer without its images is an error here.


class ImageModel(HFMultimodalLM):
    """lm-eval's model; UserError for a question whose images would not reach the model."""

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any, *arguments: Any, **options: Any) -> None:
        """Takes the processor that is given as the tokenizer."""
        self.processor, self.tokenizer = tokenizer, tokenizer.tokenizer

    def tok_batch_multimodal_encode(
        self, strings: list[str], images: list[list[Any]], *arguments: Any, **options: Any
    ) -> Any:
        """Tokens and pixels of a batch of questions."""
        longest = options.pop("left_truncate_len", None)
        try:
            batch = super().tok_batch_multimodal_encode(strings, images, *arguments, **options)
        except (ValueError, TypeError, IndexError, KeyError) as error:
            raise UserError(f"--tasks: the model's processor does not take a question: {one_line(error)}") from error
        ids = batch["input_ids"]
        if longest is not None and ids.shape[1] > longest:
            raise UserError(
                f"--tasks: a question has {ids.shape[1]} tokens with its images, and {longest} fit beside the answer"
            )
        check_known(self.model, int(ids.max()), "evaluate")
        seen = (ids == self.image_token_id).any(1).tolist()
        lost = [own for own, there in zip(images, seen, strict=True) if own and not there]
        if lost:
            raise UserError(
                f"--tasks: a question has an image, and the processor makes no image token ({self.image_token}) of it"
            )
        return batch

    def _model_multimodal_generate(self, inputs: Any, *arguments: Any, **options: Any) -> torch.Tensor:
        with torch.inference_mode():
            tokens: torch.Tensor = super()._model_multimodal_generate(inputs, *arguments, **options)
        return tokens
