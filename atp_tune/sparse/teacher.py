"""The dense model whose predictions a sparse one learns, with the loss `kl`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.classes import classifies_images, model_config
from atp_tune.checkpoints.devices import find_dtype
from atp_tune.checkpoints.headers import read_sizes
from atp_tune.checkpoints.models import ModelFolder, resolve
from atp_tune.errors import UserError
from atp_tune.inputs.windows import load_tokenizer
from atp_tune.sparse.applying import check_model
from atp_tune.sparse.provenance import ABOUT, PrunedWith
from atp_tune.spec.study import ModelConfig


@dataclass(frozen=True)
class Teacher:
    """A dense model that is not loaded yet; on the CPU or GPU it lies as a whole, in the format that is fast there."""

    folder: ModelFolder
    device: torch.device

    @property
    def bytes(self) -> int:
        """Bytes of its weights once they are loaded."""
        return read_sizes(self.folder.path).total * self._dtype.itemsize

    @property
    def _dtype(self) -> torch.dtype:
        return find_dtype("auto", self.device)

    def load(self) -> nn.Module:
        """The model, in evaluation mode and without gradients."""
        return Checkpoint.load(self.folder.path, self._dtype, self.device, offload="none").take_model()


def find_teacher(
    named: str | None,
    made: PrunedWith | None,
    model: ModelFolder,
    notify: Callable[[str], None],
    allowed: Mapping[str, bool] | None = None,
) -> ModelFolder:
    """The folder of the dense model that `--teacher` names, or else of the one that `model` was pruned from.

    `allowed`: keys of `study.ModelConfig` that a configuration cannot set, for the latter.

    UserError if there is none, if it is not what the folder's configuration says, or if it has another vocabulary.
    """
    if named is not None:
        found = _resolved("--teacher", ModelConfig(source=named), Path(), notify)
        _check_vocabulary(named, found.path, model.path)
        return found
    if made is None:
        raise UserError(f"loss: {model.path} has no {ABOUT}, so its dense model is not known; name it by --teacher")
    found = _resolved("loss: the dense model", made.config.model.model(allowed), made.base, notify)
    check_model(made.config, found)
    return found


def _resolved(option: str, model: ModelConfig, base: Path, notify: Callable[[str], None]) -> ModelFolder:
    try:
        return resolve(model, base, notify)
    except UserError as error:
        raise UserError(f"{option}: {error}{'' if option == '--teacher' else ', or name it by --teacher'}") from None


def _check_vocabulary(named: str, teacher: Path, model: Path) -> None:
    """UserError unless both models predict the same tokens, or classes."""
    (ours, own), (theirs, other) = (
        (classifies_images(folder), model_config(folder, False)) for folder in (model, teacher)
    )
    if ours or theirs:
        if ours != theirs or own.id2label != other.id2label:
            raise UserError(
                f"--teacher {named}: has other classes than the sparse model; give the model it was pruned from"
            )
        return
    sizes = [config.get_text_config().vocab_size for config in (own, other)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"--teacher {named}: has a vocabulary of {sizes[1]:,} tokens, the sparse model one of {sizes[0]:,}; "
            "give the model that it was pruned from"
        )
    if load_tokenizer(teacher, False).get_vocab() != load_tokenizer(model, False).get_vocab():
        raise UserError(
            f"--teacher {named}: its tokenizer has other tokens than the sparse model's; give the model that it was "
            "pruned from"
        )
