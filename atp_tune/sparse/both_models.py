"""The sparse, dense and uniform model of a folder that `apply` wrote, or of a configuration, each made when asked.

For the command `classify` they see classes in pictures. The probability of a class is its softmax. Of equal ones the
class with the lower index comes first, as in accuracies.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from atp_tune.blocks.replay import Replay
from atp_tune.checkpoints.checkpoint import Checkpoint, Released
from atp_tune.checkpoints.classes import classifies_images, model_config
from atp_tune.checkpoints.convert import one_line
from atp_tune.checkpoints.devices import find_device, find_dtype, is_out_of_memory, oom_as_user_error
from atp_tune.checkpoints.models import ModelFolder, resolve
from atp_tune.errors import UserError
from atp_tune.events import Place, TrialStarted
from atp_tune.frozen import FrozenModel
from atp_tune.generation import Speaker
from atp_tune.inputs import KINDS, InputKind
from atp_tune.inputs.images import LABELLED_IMAGES
from atp_tune.inputs.items import LABELS, PIXELS, Items
from atp_tune.inputs.pictures import ImageProcessor, Pictures, class_name, pictures_of
from atp_tune.inputs.windows import load_tokenizer
from atp_tune.metrics.speed import Side
from atp_tune.plan import Plan
from atp_tune.run.observers import Kept
from atp_tune.run.session import Session
from atp_tune.sparse.applying import check_model, plan_as_pruned
from atp_tune.sparse.comparing import open_config, uniform_plan
from atp_tune.sparse.packed_models import is_fast, pack_if_faster, packed_copy
from atp_tune.sparse.provenance import ABOUT
from atp_tune.spec.config import Config, read_config
from atp_tune.spec.data import CLASSES
from atp_tune.spec.study import ModelConfig, of_model

Which = Side | Literal["uniform"]
OTHER = {
    True: "is an image classifier, which has no text; take `classify`",
    False: "is no image classifier of transformers; take `chat`",
}


@dataclass(frozen=True)
class Use:
    """What models are loaded for: `command`, also as typed `with_folder`, which needs no pruned copy in memory.

    `kind`: of their inputs, once the folder of a model is known; `of_images`: they are image classifiers, else
    language models; `packs`: zeros are left out in memory where that is faster.
    """

    command: str
    with_folder: str
    kind: Callable[[ModelFolder], InputKind]
    of_images: bool = False
    packs: bool = False


CHAT = Use("chat", "chat DIR", lambda folder: KINDS["tokens"], packs=True)


@dataclass(frozen=True)
class WholeModel:
    """A model and its folder; `opened`: a context in which it is whole; `bos`: its windows begin with BOS."""

    opened: Callable[[], AbstractContextManager[nn.Module]]
    folder: ModelFolder
    device: torch.device
    bos: bool


class BothModels(Released):
    """The two models of a sparse folder, or of a configuration, and uniform with the same pruner and target."""

    def __init__(self, found: Path, use: Use, place: Place, dense: bool = False) -> None:
        """`found`: the folder, or the file; `dense`: that model will be asked for.

        UserError, before anything is loaded, for a place that is neither, a model of another kind, an unknown dense
        model, and a device that is not here.
        """
        self._found = found
        self._use = use
        self._place = replace(place, base=found if found.is_dir() else found.parent)
        find_device(place.device)
        self._open: list[Released] = []
        self._speakers: dict[Which, Speaker] = {}
        if not found.is_dir() and not found.is_file():
            raise UserError(f"{found}: is no folder and no file; give a folder that `apply` wrote, or a configuration")
        of_images = self._about.score == CLASSES if self._about else classifies_images(found)
        if of_images != use.of_images and (self._about or (found / "config.json").is_file()):
            raise UserError(f"{use.command}: {found} {OTHER[of_images]}")
        if dense:
            self._made_from()

    def model(self, side: Which) -> WholeModel:
        """A model, loaded when it is first asked; UserError if it cannot be loaded, or if there is no such model."""
        return {"dense": lambda: self._dense, "sparse": lambda: self._sparse, "uniform": lambda: self._uniform}[side]()

    def speaker(self, side: Which) -> Speaker:
        """A model that chats; UserError likewise."""
        if side not in self._speakers:
            own = self.model(side)
            tokenizer = load_tokenizer(own.folder.path, own.folder.trusted)
            self._speakers[side] = Speaker(own.opened, own.device, tokenizer, own.bos)
        return self._speakers[side]

    def release(self) -> None:
        """Frees the models."""
        while self._open:
            self._open.pop().release()

    @cached_property
    def _context(self) -> Session:
        """The dense model of the configuration, ready to be pruned."""
        config = self._made_from()
        context = open_config(config, replace(self._place, base=self._place.base / config.folder))
        self._open.append(context)
        return context

    def _pruned(self, plan: Plan) -> WholeModel:
        """A plan's model, beside the dense one: it has linears of its own, packed where that is faster."""
        context, checkpoint = self._context, self._context.checkpoint
        self._place.watch(TrialStarted("pruning", plan))
        names = self._use.command, self._use.with_folder
        if self._use.packs and is_fast(checkpoint.device) and checkpoint.offload == "none":
            model, _ = packed_copy(checkpoint, context.prune(plan), *names)
            return self._of_context(lambda: nullcontext(model))
        [weights] = context.measure(plan, [Kept(*names)])
        return self._of_context(partial(context.replay.whole, weights))

    def _of_context(self, opened: Callable[[], AbstractContextManager[nn.Module]]) -> WholeModel:
        context = self._context
        return WholeModel(opened, context.folder, context.checkpoint.device, self._made_from().bos)

    @cached_property
    def _uniform(self) -> WholeModel:
        return self._pruned(uniform_plan(self._made_from(), self._context))

    @cached_property
    def _sparse(self) -> WholeModel:
        if self._found.is_file():
            return self._pruned(plan_as_pruned(self._made_from(), self._context))
        source = {"source": str(self._found.absolute()), "dtype": self._about.model.dtype if self._about else "auto"}
        model = ModelConfig.model_validate({**source, **of_model(self._place.allowed)})
        return self._load(model, resolve(model, Path(), self._place.note), has_zeros=True)

    @cached_property
    def _dense(self) -> WholeModel:
        if self._found.is_file():
            return self._of_context(partial(self._context.replay.whole, self._context.checkpoint.weights))
        made = self._made_from()
        model = made.model.model(self._place.allowed)
        folder = resolve(model, self._place.base / made.folder, self._place.note)
        check_model(made, folder)
        return self._load(model, folder)

    def _made_from(self) -> Config:
        """The configuration; UserError for a folder without one."""
        if self._about is None:
            raise UserError(f"{self._found}: has no {ABOUT}, so its dense model is not known")
        return self._about

    @cached_property
    def _about(self) -> Config | None:
        """The configuration, or that in the folder; None without one."""
        file = self._found / ABOUT if self._found.is_dir() else self._found
        return read_config(file) if file.is_file() else None

    def _load(self, model: ModelConfig, folder: ModelFolder, has_zeros: bool = False) -> WholeModel:
        device, inputs = find_device(self._place.device), self._use.kind(folder)
        self._place.note(f"loading {model.source}")
        checkpoint = Checkpoint.load(folder.path, find_dtype(model.dtype, device), device, folder.trusted)
        self._open.append(checkpoint)
        if has_zeros and self._use.packs:
            pack_if_faster(checkpoint)
        whole = partial(_replay(checkpoint, inputs, folder).whole, checkpoint.weights)
        return WholeModel(whole, folder, device, bool(self._about and self._about.bos))


def _replay(checkpoint: Checkpoint, inputs: InputKind, folder: ModelFolder) -> Replay:
    """The replay of a model; UserError where it does not take the inputs, such as images of its processor's size."""
    try:
        return Replay(checkpoint, inputs)
    except UserError:
        raise
    except Exception as error:  # a model's own code may raise anything
        if is_out_of_memory(error):
            raise
        raise UserError(f"model {folder.id}: cannot be run on {inputs.called}: {one_line(error)}") from error


TOP = 5  # classes of an answer
BATCH = 32  # pictures at a time


class Guess(FrozenModel):
    """A class: its index and name in the model's config, and its probability."""

    index: int
    name: str
    probability: float


class Classified(FrozenModel):
    """The classes of a picture by the model that was asked, and by its dense model: the most probable is the first."""

    file: str
    classes: tuple[Guess, ...]
    dense: tuple[Guess, ...] | None = None


def classify(files: Sequence[Path], folder: Path, both: bool, place: Place) -> tuple[Classified, ...]:
    """The first `TOP` classes of each picture by the model of a folder or a configuration.

    `both`: by its dense model too. UserError, before a model is loaded, for a file that is
    no picture.
    """
    found = _Found(pictures_of(files, "FILE"))
    use = Use("classify", "classify DIR FILE", found.kind, of_images=True)
    with BothModels(folder, use, place, dense=both) as models, oom_as_user_error("classify"):
        sparse = found.guesses(models.model("sparse"))
        dense = found.guesses(models.model("dense")) if both else [None] * len(sparse)
    return tuple(
        Classified(file=str(file), classes=own, dense=other)
        for file, own, other in zip(files, sparse, dense, strict=True)
    )


class _Found:
    """Pictures, decoded once to see that all can be, and their pixels by the processor of the first model."""

    def __init__(self, found: Pictures) -> None:
        self._pictures = found
        self._folder: ModelFolder | None = None
        for index in range(len(found)):
            found.picture(index)

    def kind(self, folder: ModelFolder) -> InputKind:
        """The kind of input of a model, for images of the size of these."""
        self._folder = self._folder or folder
        return LABELLED_IMAGES.of({"test": self._images})

    def guesses(self, own: WholeModel) -> list[tuple[Guess, ...]]:
        """The first classes of each picture by a model."""
        self._folder = self._folder or own.folder
        return list(self._guesses(own, model_config(own.folder.path, own.folder.trusted).id2label))

    def _guesses(self, own: WholeModel, names: Mapping[int, Any]) -> Iterator[tuple[Guess, ...]]:
        for start in range(0, len(self._images), BATCH):
            batch = self._images[start : start + BATCH].batch(own.device)
            with torch.inference_mode(), own.opened() as model:
                logits = LABELLED_IMAGES.forward(model, batch).logits
            if not logits.isfinite().all():
                raise UserError(f"classify: the numbers of {own.folder.id} overflow, or are not defined")
            for places, values in zip(*_first(logits), strict=True):
                yield tuple(
                    Guess(index=index, name=class_name(names, index), probability=value)
                    for index, value in zip(places.tolist(), values.tolist(), strict=True)
                )

    @cached_property
    def _images(self) -> Items:
        assert self._folder is not None
        pixels = ImageProcessor.of(self._folder.path, self._folder.trusted).pixels(self._pictures)
        return Items.of({PIXELS: pixels, LABELS: torch.zeros(len(pixels), dtype=torch.int64)}, 1)


def _first(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Indices and probabilities [images, at most TOP] of the most probable classes of logits [images, classes]."""
    values, places = logits.float().softmax(1).sort(dim=1, descending=True, stable=True)
    return places[:, :TOP], values[:, :TOP]
