"""The models of a chat, with their tokenizers: a sparse one, the dense one that it was pruned from, and uniform."""

from collections.abc import Mapping
from pathlib import Path

from atp_tune.checkpoints.checkpoint import Released
from atp_tune.events import EventHandler
from atp_tune.generation.conversation import Speaker
from atp_tune.inputs import KINDS
from atp_tune.inputs.windows import load_tokenizer
from atp_tune.sparse.both_models import BothModels, Use, Which


class ChatModels(Released):
    """The models of a sparse folder, or of a configuration; UserError for a place that is neither."""

    def __init__(self, place: Path, device: str, watch: EventHandler, allowed: Mapping[str, bool]) -> None:
        """`allowed`: keys of `study.ModelConfig`, as for `apply`."""
        use = Use("chat", "chat DIR", lambda folder: KINDS["tokens"], packs=True)
        self._models = BothModels(place, use, device, watch, allowed)
        self._speakers: dict[Which, Speaker] = {}

    def speaker(self, side: Which) -> Speaker:
        """A model, loaded when it is first asked; UserError if it cannot be loaded, or if there is no such model."""
        if side not in self._speakers:
            own = self._models.model(side)
            tokenizer = load_tokenizer(own.folder.path, own.folder.trusted)
            self._speakers[side] = Speaker(own.opened, own.device, tokenizer, own.bos)
        return self._speakers[side]

    def release(self) -> None:
        """Frees the models."""
        self._models.release()
