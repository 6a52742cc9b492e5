"""Observers of models while their blocks pass by: scores, continuations, answers on images, tasks.

`Session.measure` passes the blocks of one model to its observers, and `Session.compare` those of several models, one
after the other. An observer keeps what it finds by the name of the model.
"""

import base64
import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from atp_tune.blocks.prune_pass import PrunedBlock
from atp_tune.checkpoints.blocks import model_config, reads_images
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.convert import one_line
from atp_tune.checkpoints.devices import free_memory, host_memory, oom_as_user_error
from atp_tune.config.best import SHARES
from atp_tune.errors import UserError, named
from atp_tune.events import EventHandler, Message, Step
from atp_tune.inputs.items import LABELS, PIXELS
from atp_tune.inputs.pictures import ImageProcessor, class_name
from atp_tune.inputs.windows import load_processor, load_tokenizer
from atp_tune.measures import mean_of_tasks
from atp_tune.metrics import COUNT, NAMES, SIDE, Answers, Continuations, ImageAnswer
from atp_tune.plan import Plan
from atp_tune.run.generation import WeightsOf, continued
from atp_tune.scores import Scores, joined
from atp_tune.scores.next_token import Passing, head_scores
from atp_tune.utils.system import require

if TYPE_CHECKING:
    from atp_tune.run.session import Session
    from atp_tune.scores.tasks import TaskResult, Tasks

T = TypeVar("T")
GROUPS = 8  # parts of validation items; a stopper may end a trial between two of them
ROOM = 0.5  # share of the device's free memory for a pruned copy of the linears
SEQUENCES = 8  # in a batch of the tasks of a limit


class Observer(ABC, Generic[T]):
    """Sees the blocks of one model after another, and keeps what it finds by the name of the model (`found`)."""

    session: "Session"
    name: str
    plan: Plan | None

    @cached_property
    def found(self) -> dict[str, T]:
        """What was found, by the name of the model."""
        return {}

    def begin(self, session: "Session", name: str, plan: Plan | None) -> None:
        """Begins with a model, before its first block is pruned; `plan`: None is the dense model."""
        self.session, self.name, self.plan = session, name, plan
        self.start()

    def start(self) -> None:
        """Prepares for a model, before its first block."""

    def block(self, block: PrunedBlock) -> None:
        """Sees the next block."""

    @abstractmethod
    def end(self) -> T:
        """The result for the model, after its last block."""


@dataclass(eq=False)
class RoleScores(Observer[Scores]):
    """Scores models on the items of one role, part by part.

    `beside_dense`: also the KL from the dense model. `heard` is called with the scores of each part, and may raise.
    `one_by_one`: all blocks are kept if they fit into memory, and run on a part only when the one before was heard.
    """

    role: str
    beside_dense: bool = False
    heard: Callable[[Scores], object] = lambda scores: None
    one_by_one: bool = False

    @torch.inference_mode()
    def start(self) -> None:
        """Embeds the items, in at most `GROUPS` parts of nearly equal lengths, none smaller than a batch."""
        session, items = self.session, self.session.items(self.role)
        size, more = divmod(len(items), count := min(GROUPS, -(-len(items) // session.batch(self.role).windows)))
        ends = [part * size + min(part, more) for part in range(count + 1)]
        self._parts = [items[first:last] for first, last in pairwise(ends)]
        self._dense = session.dense_states(self.role, self._parts) if self.beside_dense else []
        self._kept: list[PrunedBlock] | None = [] if self.one_by_one and can_keep(session.checkpoint) else None
        self._embedded = partial(Passing, session.replay, session.batch(self.role))
        self._passing = self._embedded(self._parts if self._kept is None else [])

    @torch.inference_mode()
    def block(self, block: PrunedBlock) -> None:
        """Runs the items through a block, or keeps it."""
        if self._kept is None:
            self._pass(block)
        else:
            self._kept.append(block)

    def _pass(self, block: PrunedBlock) -> None:
        self._passing.block(block.index, block.weights)
        self.session.watch(Step("evaluate", block.index + 1, len(self.session.checkpoint.blocks)))

    @torch.inference_mode()
    def end(self) -> Scores:
        """Scores part after part.

        UserError if the model's files were changed meanwhile: memory-mapped weights change with them.
        """
        session, scores = self.session, list[Scores]()
        for index, part in enumerate(self._parts):
            if self._kept is not None:
                self._passing = self._embedded([part])
                for block in self._kept:
                    self._pass(block)
            hidden = self._passing.states[index if self._kept is None else 0]
            dense = self._dense[index] if self._dense else None
            scores.append(head_scores(session.replay, session.score, session.heads, part, hidden, dense))
            session.folder.check_unchanged()
            self.heard(scores[-1])
        del self._passing, self._kept, self._dense
        return joined(scores)


class Whole(Observer[T]):
    """Keeps the pruned linears of a model while its blocks pass by, so that it can be run as a whole at the end.

    The copy is in host memory while blocks pass by, then on the device if it has room, so work in between has as much
    of the device's memory as without the copy. The dense model needs none. For errors: `what` needs the copy, and
    `instead`, the command that needs none.
    """

    what: str
    instead: str

    def start(self) -> None:
        """UserError if memory is too small for the copy."""
        self._blocks = list[dict[str, Tensor]]()
        if self.plan is not None:
            self._on_host = check_room(self.session.checkpoint, self.what, self.instead)

    def block(self, block: PrunedBlock) -> None:
        """Keeps the linears of a pruned block."""
        if self.plan is None:
            return
        own = {x.key: block.weights[x.key] for x in self.session.checkpoint.linears[block.index]}
        self._blocks.append({key: tensor.cpu() for key, tensor in own.items()} if self._on_host else own)

    def end(self) -> T:
        """Runs the model, whose linears are on the device if they fit there beside the dense ones."""
        checkpoint, blocks, self._blocks = self.session.checkpoint, self._blocks, []
        device = checkpoint.device
        if self.plan is None:
            return self.run(checkpoint.weights)
        if can_keep(checkpoint):
            blocks = [{key: tensor.to(device) for key, tensor in own.items()} for own in blocks]

        def weights_of(index: int) -> dict[str, Tensor]:
            return {**checkpoint.weights(index), **{key: own.to(device) for key, own in blocks[index].items()}}

        return self.run(weights_of)

    @abstractmethod
    def run(self, weights_of: WeightsOf) -> T:
        """Runs the whole model; `weights_of`: the tensors of a block on the compute device."""


def can_keep(checkpoint: Checkpoint) -> bool:
    """Whether a pruned copy of all linears fits on the device beside the dense ones."""
    return checkpoint.offload == "none" and _copied(checkpoint) < ROOM * free_memory(checkpoint.device)


def check_room(checkpoint: Checkpoint, what: str, instead: str) -> bool:
    """Whether a pruned copy fits into host memory; UserError if it fits on the device neither."""
    if (on_host := _copied(checkpoint) <= host_memory()) or can_keep(checkpoint):
        return on_host
    raise UserError(
        f"{what}: a pruned copy needs {_copied(checkpoint) / 1024**3:.1f} GiB beside the dense model; write it with "
        f"`apply`, then {instead}"
    )


def _copied(checkpoint: Checkpoint) -> int:
    return sum(checkpoint.sizes) * checkpoint.dtype.itemsize


@dataclass(eq=False)
class Kept(Whole[WeightsOf]):
    """Keeps a model whole, for the caller."""

    what: str
    instead: str

    def run(self, weights_of: WeightsOf) -> WeightsOf:
        """The tensors of a block on the compute device, by its index."""
        return weights_of


@dataclass(eq=False)
class Prompts(Whole[tuple[str, ...]]):
    """Continuations of prompts, at most `tokens` long."""

    prompts: Sequence[str]
    tokens: int
    what: str = "generate"
    instead = "chat DIR"

    def start(self) -> None:
        """UserError if the tokenizer cannot be loaded too."""
        super().start()
        if not self.found:
            folder = self.session.folder
            self._tokenizer = load_tokenizer(folder.path, folder.trusted)

    def run(self, weights_of: WeightsOf) -> tuple[str, ...]:
        """The continuation of each prompt."""
        session = self.session
        return continued(
            session.replay, weights_of, self._tokenizer, self.prompts, self.tokens, session.bos,
            lambda done, total: session.watch(Step("generate", done, total)),
        )  # fmt: skip

    def result(self) -> Continuations:
        """The continuations by dense, uniform and best, and by others."""
        return Continuations(
            prompts=tuple(self.prompts),
            tokens=self.tokens,
            dtype=self.session.dtype,
            **{name: self.found[name] for name in NAMES},
            others={name: texts for name, texts in self.found.items() if name not in NAMES},
        )


@dataclass(eq=False)
class ImageAnswers(Observer[tuple[ImageAnswer, ...]]):
    """The answers of image classifiers for the first images of a role."""

    role: str

    @torch.inference_mode()
    def start(self) -> None:
        """Embeds the images."""
        session = self.session
        self._images = session.items(self.role)[:COUNT]
        config = model_config(session.folder.path, session.folder.trusted)
        self.names = {index: str(name)[:100] for index, name in config.id2label.items()}
        self._passing = Passing(session.replay, session.batch(self.role), [self._images])

    @torch.inference_mode()
    def block(self, block: PrunedBlock) -> None:
        """Runs the images through a block."""
        self._passing.block(block.index, block.weights)

    @torch.inference_mode()
    def end(self) -> tuple[ImageAnswer, ...]:
        """The most probable class of each image."""
        logits = self.session.replay.logits(self._images, self._passing.states[0]).float()
        del self._passing
        return tuple(
            ImageAnswer(name=class_name(self.names, index), index=index, probability=min(1.0, value))
            for index, value in zip(logits.argmax(1).tolist(), logits.softmax(1).amax(1).tolist(), strict=True)
        )

    def result(self) -> Answers:
        """The images, their classes, and the answers of dense, uniform and best."""
        folder, indices = self.session.folder, tuple(self._images.tensors[LABELS].tolist())
        processor = ImageProcessor.of(folder.path, folder.trusted)
        return Answers(
            pictures=tuple(_png(processor.colours(pixels)) for pixels in self._images.tensors[PIXELS].cpu()),
            labels=tuple(class_name(self.names, index) for index in indices),
            indices=indices,
            **self.found,
        )


def _png(colours: Any) -> str:
    """A small PNG in base64 of an array [height, width, channels] of uint8."""
    from PIL import Image

    picture = Image.fromarray(colours)
    picture.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode()


@dataclass(eq=False)
class TaskResults(Whole[dict[str, dict[str, "TaskResult"]]]):
    """Results on lm-eval's tasks, by set of tasks and task.

    `most`: items of each task, at most; `batch`: sequences at a time; `seconds`: that each model was run.
    """

    sets: Mapping[str, "Tasks"]
    most: int | None
    num_fewshot: int | None = None
    batch: int = SEQUENCES
    what: str = "evaluate"
    instead = "evaluate DIR"
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of_limit(cls, least: Mapping[str, float], items: int | None, base: Path, watch: EventHandler) -> "TaskResults":
        """For the tasks of `limit.min_accuracy`, by name or path, which starts at `base`.

        UserError, before a model is loaded, if lm-eval is not installed, a task is unknown, or its data is not there.
        """
        key = "limit.min_accuracy"
        require("eval", key)
        from atp_tune.scores.tasks import find_tasks

        watch(Message(f"reading the tasks of {key}"))
        with named(key, "--tasks"):
            sets = {name: find_tasks((name,), watch, base=base) for name in least}
        for name, tasks in sets.items():
            if tasks.missing:
                reasons = "; ".join(f"{task}: {reason}" for task, reason in tasks.missing.items())
                raise UserError(f"{key} {name}: cannot be measured whole: {reasons}")
        return cls(sets, items, what=key)

    def tokenizer(self, folder: Path, trusted: bool) -> Any:
        """The tokenizer of a folder, or its processor if a task asks about images; UserError if it has none."""
        asks = "".join(each.about_images for each in self.sets.values())
        if not asks:
            return load_tokenizer(folder, trusted)
        if not reads_images(folder):
            raise UserError(f"--tasks: {asks} asks about images, and the model in {folder} reads text alone")
        return load_processor(folder, trusted, f"--tasks: {asks} asks about images, and", f"in {folder}")

    def run(self, weights_of: WeightsOf) -> dict[str, dict[str, "TaskResult"]]:
        """Runs the model on all tasks."""
        from atp_tune.scores.tasks import score

        session, began = self.session, perf_counter()
        tokenizer = self.tokenizer(session.folder.path, session.folder.trusted)
        with session.replay.whole(weights_of) as model, oom_as_user_error(self.name or self.what):
            results = {
                name: score(model, tokenizer, tasks, self.most, self.num_fewshot, self.batch, session.watch)
                for name, tasks in self.sets.items()
            }
        self.seconds[self.name] = round(perf_counter() - began, 1)
        return results

    def accuracies(self, name: str) -> dict[str, list[float]]:
        """The accuracy of a model, and its standard error, by set of tasks: the mean over the tasks of the set."""
        accuracies = dict[str, list[float]]()
        for tasks, results in self.found[name].items():
            shares = []
            for result in results.values():
                share = next((share for share in SHARES if share in result.scores), None)
                if share is None:
                    raise UserError(f"{self.what} {tasks}: has no accuracy, only {', '.join(result.scores)}")
                shares.append(result.scores[share])
            mean = mean_of_tasks(shares)
            accuracies[tasks] = [mean.value, mean.stderr]
        return accuracies


@dataclass(eq=False)
class LeftOut(Observer[None]):
    """An observer that a study does without if it fails: that ends in one line, and it sees no further model.

    `wanted`: the models that it is yet to see, each once; others pass by unseen.
    """

    work: Any
    wanted: set[str]
    what: str
    watch: EventHandler
    _is_asked: bool = False

    def begin(self, session: "Session", name: str, plan: Plan | None) -> None:
        """Begins with a model if it is wanted."""
        self.name, self._is_asked = name, name in self.wanted
        self._try(lambda work: work.begin(session, name, plan))

    def block(self, block: PrunedBlock) -> None:
        """Passes a block on."""
        self._try(lambda work: work.block(block))

    def end(self) -> None:
        """Keeps what is found of a model."""

        def keep(work: Any) -> None:
            work.found[self.name] = work.end()
            self.wanted.remove(self.name)

        self._try(keep)

    def _try(self, call: Callable[[Any], T]) -> T | None:
        if not self._is_asked:
            return None
        try:
            return call(self.work)
        except Exception as error:  # a model's own code may raise anything
            self.leave_out(str(error) if isinstance(error, UserError) else one_line(error))
            return None

    def leave_out(self, reason: str) -> None:
        """Sees no further model, and says why."""
        self.wanted, self._is_asked, self.work = set(), False, None
        self.watch(Message(f"{self.what}: left out, {reason}"))

    def repeat(self, name: str, other: str) -> None:
        """Takes what was found of an equal model."""
        if name in self.wanted and other not in self.wanted:
            self.work.found[name] = self.work.found[other]
            self.wanted.remove(name)

    def result(self) -> Any:
        """The result over all models; None if one is missing, or it was left out."""
        if self.wanted or self.work is None:
            return None
        self._is_asked = True
        return self._try(lambda work: work.result())
