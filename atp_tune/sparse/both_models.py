"""The sparse and the dense model of a folder that `apply` wrote, or of a configuration, each loaded when asked."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from atp_tune.blocks.replay import Replay
from atp_tune.checkpoints.checkpoint import Checkpoint, Released
from atp_tune.checkpoints.convert import one_line
from atp_tune.checkpoints.devices import find_device, find_dtype, is_out_of_memory
from atp_tune.checkpoints.models import ModelFolder, resolve
from atp_tune.errors import UserError
from atp_tune.events import EventHandler, Message, TrialStarted
from atp_tune.inputs import InputKind
from atp_tune.metrics.speed import Side
from atp_tune.search.kept_blocks import prune_whole
from atp_tune.sparse.applying import check_model, plan_as_pruned
from atp_tune.sparse.continuations import open_config
from atp_tune.sparse.packed_models import pack_if_faster
from atp_tune.sparse.provenance import ABOUT
from atp_tune.spec.config import Config, read_config
from atp_tune.spec.study import ModelConfig, of_model


@dataclass(frozen=True)
class Use:
    """What models are loaded for: `command`, also as typed `with_folder`, which needs no pruned copy in memory.

    `kind`: of their inputs, once the folder of a model is known; `check`: UserError for a configuration that does not
    go with it; `packs`: the zeros of a sparse folder are left out in memory where that is faster.
    """

    command: str
    with_folder: str
    kind: Callable[[ModelFolder], InputKind[Any]]
    check: Callable[[Config], None] = lambda config: None
    packs: bool = False


@dataclass(frozen=True)
class WholeModel:
    """A model and its folder; `opened`: a context in which it is whole; `bos`: its windows begin with BOS."""

    opened: Callable[[], AbstractContextManager[nn.Module]]
    folder: ModelFolder
    device: torch.device
    bos: bool


class BothModels(Released):
    """The two models of a sparse folder, or of a configuration; UserError for a place that is neither."""

    def __init__(self, place: Path, use: Use, device: str, watch: EventHandler, allowed: Mapping[str, bool]) -> None:
        """`allowed`: keys of `study.ModelConfig`, as for `apply`."""
        self._place = place
        self._use = use
        self._device = device
        self._watch = watch
        self._allowed = allowed
        self._open: list[Released] = []
        if not place.is_dir() and not place.is_file():
            raise UserError(f"{place}: is no folder and no file; give a folder that `apply` wrote, or a configuration")

    def model(self, side: Side) -> WholeModel:
        """A model, loaded when it is first asked; UserError if it cannot be loaded, or if there is no such model."""
        if self._place.is_file():
            return self._pair[side]
        return self._dense if side == "dense" else self._sparse

    def release(self) -> None:
        """Frees the models."""
        while self._open:
            self._open.pop().release()

    @cached_property
    def _pair(self) -> dict[Side, WholeModel]:
        """Both models of a configuration, in one checkpoint: the sparse one has linears of its own."""
        config = read_config(self._place)
        self._use.check(config)
        context = open_config(config, self._place.parent / config.folder, self._device, self._watch, self._allowed)
        self._open.append(context)
        plan = plan_as_pruned(config, context)
        self._watch(TrialStarted("pruning", plan))
        sparse = prune_whole(context, plan, self._use.command, self._use.with_folder)
        weights = {"sparse": sparse, "dense": context.checkpoint.weights}
        device, whole = context.checkpoint.device, context.replay.whole
        return {
            side: WholeModel(partial(whole, own), context.folder, device, config.bos)  # type: ignore[misc]
            for side, own in weights.items()
        }

    @cached_property
    def _sparse(self) -> WholeModel:
        if self._about is not None:
            self._use.check(self._about)
        source = {"source": str(self._place.absolute()), "dtype": self._about.model.dtype if self._about else "auto"}
        model = ModelConfig.model_validate({**source, **of_model(self._allowed)})
        return self._load(model, resolve(model, Path(), self._note), has_zeros=True)

    @cached_property
    def _dense(self) -> WholeModel:
        if self._about is None:
            raise UserError(f"{self._place}: has no {ABOUT}, so its dense model is not known")
        model = self._about.model.model(self._allowed)
        folder = resolve(model, self._place / self._about.folder, self._note)
        check_model(self._about, folder)
        return self._load(model, folder)

    @cached_property
    def _about(self) -> Config | None:
        """The configuration in the folder; None without one."""
        file = self._place / ABOUT
        return read_config(file) if file.is_file() else None

    def _load(self, model: ModelConfig, folder: ModelFolder, has_zeros: bool = False) -> WholeModel:
        device, inputs = find_device(self._device), self._use.kind(folder)
        self._note(f"loading {model.source}")
        checkpoint = Checkpoint.load(folder.path, find_dtype(model.dtype, device), device, folder.trusted)
        self._open.append(checkpoint)
        if has_zeros and self._use.packs:
            pack_if_faster(checkpoint)
        whole = partial(_replay(checkpoint, inputs, folder).whole, checkpoint.weights)
        return WholeModel(whole, folder, device, bool(self._about and self._about.bos))

    def _note(self, text: str) -> None:
        self._watch(Message(text))


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
