"""The sparse, dense and uniform model of a folder that `apply` wrote, or of a configuration, each made when asked."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from atp_tune.blocks.replay import Replay
from atp_tune.checkpoints.checkpoint import Checkpoint, Released
from atp_tune.checkpoints.classes import classifies_images
from atp_tune.checkpoints.convert import one_line
from atp_tune.checkpoints.devices import find_device, find_dtype, is_out_of_memory
from atp_tune.checkpoints.models import ModelFolder, resolve
from atp_tune.errors import UserError
from atp_tune.events import Place, TrialStarted
from atp_tune.generation.conversation import Speaker
from atp_tune.inputs import KINDS, InputKind
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
from atp_tune.spec.images import CLASSES
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
    kind: Callable[[ModelFolder], InputKind[Any]]
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


def _replay(checkpoint: Checkpoint, inputs: InputKind[Any], folder: ModelFolder) -> Replay:
    """The replay of a model; UserError where it does not take the inputs, such as images of its processor's size."""
    try:
        return Replay(checkpoint, inputs)
    except UserError:
        raise
    except Exception as error:  # a model's own code may raise anything
        if is_out_of_memory(error):
            raise
        raise UserError(f"model {folder.id}: cannot be run on {inputs.called}: {one_line(error)}") from error
