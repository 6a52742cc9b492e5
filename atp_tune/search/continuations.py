"""Continuations of prompts at the end of a study, by the weights that its final scores prune."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from atp_tune.checkpoints.convert import one_line
from atp_tune.errors import UserError
from atp_tune.events import Message, Step
from atp_tune.generation.prompts import WeightsOf, continued
from atp_tune.inputs import KINDS
from atp_tune.inputs.windows import load_tokenizer
from atp_tune.metrics.continuations import NAMES, Continuations
from atp_tune.run.scoring import can_keep
from atp_tune.run.session import Session
from atp_tune.scores.evaluation import Block
from atp_tune.search.kept_blocks import KeptBlocks


class Continuing:
    """Continues prompts by one model after another, and keeps the texts."""

    def __init__(self, context: Session, prompts: Sequence[str], tokens: int, names: Sequence[str] = NAMES) -> None:
        """`names`: of all models that will continue them; UserError if the tokenizer cannot be loaded."""
        self._context = context
        self._prompts = tuple(prompts)
        self._tokens = tokens
        self._names = names
        self._tokenizer = load_tokenizer(context.folder.path, context.folder.trusted)
        self._texts: dict[str, tuple[str, ...]] = {}

    def say(self, name: str, weights_of: WeightsOf) -> None:
        """Continues the prompts by a model with these blocks."""
        context = self._context

        def step(done: int, total: int) -> None:
            context.watch(Step("generate", done, total))

        self._texts[name] = continued(
            context.replay, weights_of, self._tokenizer, self._prompts, self._tokens, context.bos, step
        )

    def repeat(self, name: str, other: str) -> None:
        """Copies the texts of an equal model."""
        self._texts[name] = self._texts[other]

    @property
    def missing(self) -> tuple[str, ...]:
        """The models that have not continued the prompts yet."""
        return tuple(name for name in self._names if name not in self._texts)

    def result(self) -> Continuations | None:
        """All texts; None if a model is missing."""
        if self.missing:
            return None
        own = {name: self._texts[name] for name in NAMES}
        others = {name: texts for name, texts in self._texts.items() if name not in NAMES}
        asked: Any = {"prompts": self._prompts, "tokens": self._tokens, "dtype": self._context.dtype}
        return Continuations(**asked, **own, others=others)


class StudyContinuations:
    """Continues prompts between the final scores of a study, whose numbers do not depend on it.

    What fails ends in one line, and the study goes on without continuations.
    """

    def __init__(self, context: Session, prompts: Sequence[str], tokens: int, names: Sequence[str]) -> None:
        """`tokens`: 0 for no continuations; without them too if the model reads no text. `names`: of the models."""
        self._context = context
        self._work: Continuing | None = None
        self._kept: KeptBlocks | None = None
        if tokens == 0 or context.inputs is not KINDS["tokens"]:
            return
        if not can_keep(context.checkpoint):
            self._leave_out("the model leaves no room for a pruned copy; `tune.py generate` makes them")
            return
        try:
            self._work = Continuing(context, prompts, tokens, names)
        except UserError as error:
            self._leave_out(str(error))

    @property
    def wanted(self) -> tuple[str, ...]:
        """The models that have not continued the prompts yet; none where all is left out."""
        return self._work.missing if self._work else ()

    def follow(self, name: str | None, blocks: Iterable[Block]) -> Iterator[Block]:
        """Yields the blocks of a model, and keeps them until `say` if it is wanted."""
        self._kept = None
        if name is None or name not in self.wanted or name == "dense":
            yield from blocks
            return
        try:
            kept = KeptBlocks(self._context.checkpoint, "memory", "chat DIR")
        except UserError as error:
            self._leave_out(str(error))
            yield from blocks
            return
        yield from kept.follow(blocks)
        self._kept = kept

    def say(self, name: str | None) -> None:
        """The model whose blocks have passed by continues the prompts, if it is wanted; its blocks are freed."""
        kept, self._kept = self._kept, None
        if name is None or name not in self.wanted or (name != "dense" and kept is None):
            return
        assert self._work is not None
        try:
            self._work.say(name, kept.settle().weights if kept else self._context.checkpoint.weights)
        except Exception as error:  # a model's own code may raise anything
            self._leave_out(str(error) if isinstance(error, UserError) else one_line(error))

    def repeat(self, name: str, other: str) -> None:
        """Copies the texts of an equal model."""
        if self._work is not None and other not in self.wanted:
            self._work.repeat(name, other)

    def result(self) -> Continuations | None:
        """All texts; None if one is missing."""
        return self._work.result() if self._work else None

    def _leave_out(self, reason: str) -> None:
        self._work = None
        self._context.watch(Message(f"continuations: left out, {reason}"))
