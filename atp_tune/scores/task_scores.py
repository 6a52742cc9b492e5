"""Scores of a model in memory on tasks of lm-eval."""

import math
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from lm_eval import evaluate
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn

from atp_tune.checkpoints.classes import check_known
from atp_tune.checkpoints.convert import quiet
from atp_tune.events import EventHandler, Step
from atp_tune.measures import TaskScore, error_of_share
from atp_tune.scores.tasks import LIBRARIES, Tasks
from atp_tune.spec.config import SHARES

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
        lm = _kind(tasks)(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch, softmax_dtype=torch.float32,
            prefix_token_id=_prefix(model, getattr(tokenizer, "tokenizer", tokenizer)),
        )  # fmt: skip
        AnswerCounter(watch).listen(lm)
        found = evaluate(
            lm, _ready(tasks, num_fewshot), limit=limit, bootstrap_iters=BOOTSTRAPS, fewshot_as_multiturn=True
        )
    return {row: _result(found, row) for row in tasks.rows}


def _kind(tasks: Tasks) -> Any:
    """The class of lm-eval's model for these tasks."""
    if not tasks.about_images:
        return _Checked
    from atp_tune.scores.image_tasks import ImageModel

    return ImageModel


def _ready(tasks: Tasks, num_fewshot: int | None) -> dict[str, Any]:
    """Prepares tasks and seeds as lm-eval's `simple_evaluate` does.

    That function would also query pip, git, compilers and drivers, which takes seconds each time.
    """
    random.seed(0)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    found: dict[str, Any] = tasks.manager.load(tasks.loaded)
    for task in found["tasks"].values():
        own = task.get_config("num_fewshot")
        if own != 0:  # a task with 0 stays zero-shot
            task.set_config(key="num_fewshot", value=(own or 0) if num_fewshot is None else num_fewshot)
        task.set_fewshot_seed(seed=SEED)
    return found


class _Checked(HFLM):  # type: ignore[misc]
    """lm-eval's model; UserError if the tokenizer's ids exceed the model's vocabulary."""

    def _model_call(self, inps: Tensor, *arguments: Any, **options: Any) -> Any:
        check_known(self.model, int(inps.max()), "evaluate")
        return super()._model_call(inps, *arguments, **options)


def _prefix(model: nn.Module, tokenizer: Any) -> int | None:
    """The token of an empty context; None if the tokenizer has one."""
    config: Any = model.config.get_text_config()  # type: ignore[operator,union-attr]
    known = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    own = [config.bos_token_id, config.eos_token_id, 0]
    return None if any(token is not None for token in known) else next(token for token in own if isinstance(token, int))


class AnswerCounter:
    """Takes the place of lm-eval's cache of answers, and so is called for each answer."""

    def __init__(self, watch: EventHandler) -> None:
        self._watch = watch
        self._done = self._total = 0

    def listen(self, lm: HFLM) -> None:
        """Counts the answers of a model from this call on."""
        lm.set_cache_hook(self)
        for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
            setattr(lm, kind, partial(self._begin, getattr(lm, kind)))

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        """Counts one answer."""
        self._done += 1
        self._watch(Step("answer", self._done, self._total))

    def _begin(self, answer: Callable[[list[Any]], Any], requests: list[Any]) -> Any:
        self._done, self._total = 0, len(requests)
        return answer(requests)


def _result(found: Mapping[str, Any], name: str) -> TaskResult:
    row, samples = found["results"][name], found["samples"].get(name, [])
    keys = [key for key, value in row.items() if "," in key and "_stderr," not in key and _is_number(value)]
    return TaskResult(
        items=row["sample_len"],
        num_fewshot=found["n-shot"].get(name) or 0,
        version=str(found["versions"].get(name)),
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
