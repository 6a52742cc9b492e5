"""Accuracy of a trial's model on tasks of lm-eval, for a study with `limit.min_accuracy`.

A trial's pruned linears are kept while its perplexity is measured, then the model is run as a whole on the tasks. The
accuracy of a group of tasks is the mean over its tasks.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from atp_tune.checkpoints.devices import oom_as_user_error
from atp_tune.errors import UserError
from atp_tune.events import EventHandler, Message
from atp_tune.extras import require
from atp_tune.inputs.windows import load_tokenizer
from atp_tune.measures import TaskScore, mean_of_tasks
from atp_tune.run.session import Session
from atp_tune.scores.evaluation import Block
from atp_tune.search.kept_blocks import KeptBlocks
from atp_tune.spec.config import SHARES

SEQUENCES = 8  # in a batch


class TaskAccuracy:
    """Measures the accuracy of one model after another."""

    def __init__(self, least: Mapping[str, float], items: int | None, base: Path, watch: EventHandler) -> None:
        """`least`: the tasks, by name or path, which starts at `base`; `items`: of each task, at most.

        UserError, before a model is loaded, if lm-eval is not installed, a task is unknown, its data is not there,
        or it has no accuracy.
        """
        require("eval", "limit.min_accuracy")
        from atp_tune.scores.tasks import find_tasks

        self._items = items
        self._kept: tuple[Session, KeptBlocks] | None = None
        watch(Message("reading the tasks of limit.min_accuracy"))
        try:
            self._tasks = {name: find_tasks((name,), watch, base=base) for name in least}
        except UserError as error:
            raise UserError(str(error).replace("--tasks", "limit.min_accuracy", 1)) from None
        for name, found in self._tasks.items():
            if found.missing:
                reasons = "; ".join(f"{task}: {reason}" for task, reason in found.missing.items())
                raise UserError(f"limit.min_accuracy {name}: cannot be measured whole: {reasons}")

    def follow(self, context: Session, blocks: Iterable[Block]) -> Iterator[Block]:
        """Yields the blocks of a pruned model after keeping their linears."""
        self._kept = context, KeptBlocks(context.checkpoint, "limit.min_accuracy", "evaluate DIR")
        return self._kept[1].follow(blocks)

    def measure(self) -> dict[str, list[float]]:
        """The accuracy of the model whose blocks passed by last, and its standard error, by task."""
        from atp_tune.scores.task_scores import score

        assert self._kept is not None
        context, kept = self._kept[0], self._kept[1].settle()
        tokenizer = load_tokenizer(context.folder.path, context.folder.trusted)
        with context.replay.whole(kept.weights) as model, oom_as_user_error("limit.min_accuracy"):
            found = {
                name: score(model, tokenizer, tasks, self._items, None, SEQUENCES, context.watch)
                for name, tasks in self._tasks.items()
            }
        self._kept = None
        return {name: _accuracy(name, results) for name, results in found.items()}


def _accuracy(name: str, results: Mapping[str, Any]) -> list[float]:
    measures: list[TaskScore] = []
    for result in results.values():
        metric = next((share for share in SHARES if share in result.scores), None)
        if metric is None:
            raise UserError(f"limit.min_accuracy {name}: has no accuracy, only {', '.join(result.scores)}")
        measures.append(result.scores[metric])
    found = mean_of_tasks(measures)
    return [found.value, found.stderr]
