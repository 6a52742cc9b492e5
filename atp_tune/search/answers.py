"""Answers of dense, uniform and best on a few test images, collected while the final scores of a study prune."""

import base64
import io
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from atp_tune.blocks.prune_pass import embed
from atp_tune.checkpoints.classes import model_config
from atp_tune.checkpoints.convert import one_line
from atp_tune.errors import UserError
from atp_tune.events import Message
from atp_tune.inputs.images import Images
from atp_tune.inputs.pixels import ImageProcessor, class_name
from atp_tune.metrics.answers import COUNT, SIDE, Answers, ImageAnswer
from atp_tune.metrics.continuations import NAMES
from atp_tune.run.session import Session
from atp_tune.scores.evaluation import Block, passing


class StudyAnswers:
    """What each model sees in the first test images; the study's numbers do not depend on it.

    What fails ends in one line, and the study goes on without them.
    """

    def __init__(self, context: Session, role: str) -> None:
        """`role`: of the images, `test`, or `validation` without any."""
        self._context = context
        self._batch = context.batch(role)
        self._images: Images = context.items(role)[:COUNT]
        config = model_config(context.folder.path, context.folder.trusted)
        self._names = {index: str(name)[:100] for index, name in config.id2label.items()}
        self._answers: dict[str, tuple[ImageAnswer, ...]] = {}
        self._states: Tensor | None = None
        self._is_left_out = False

    @property
    def wanted(self) -> tuple[str, ...]:
        """The models that have not answered yet; none where all is left out."""
        return () if self._is_left_out else tuple(name for name in NAMES if name not in self._answers)

    @torch.inference_mode()
    def follow(self, name: str | None, blocks: Iterable[Block]) -> Iterator[Block]:
        """Yields the blocks of a model after the images have gone through them, if it is wanted."""
        self._states = None
        if name not in self.wanted:
            yield from blocks
            return
        states = [embed(self._context.replay, self._batch, self._images)]
        yield from passing(self._context.replay, self._batch, blocks, states, [self._images])
        self._states = states[0]

    @torch.inference_mode()
    def say(self, name: str | None) -> None:
        """Keeps the answers of the model whose blocks have passed by, if it is wanted."""
        states, self._states = self._states, None
        if name is None or states is None:
            return
        try:
            self._answers[name] = self._seen(states)
        except Exception as error:  # a model's own code may raise anything
            self._leave_out(error)

    def _seen(self, states: Tensor) -> tuple[ImageAnswer, ...]:
        logits = self._context.replay.logits(self._images, states).float()
        found = zip(logits.argmax(1).tolist(), logits.softmax(1).amax(1).tolist(), strict=True)
        return tuple(
            ImageAnswer(name=self._name(index), index=index, probability=min(1.0, value)) for index, value in found
        )

    def repeat(self, name: str, other: str) -> None:
        """Copies the answers of an equal model."""
        if other in self._answers:
            self._answers[name] = self._answers[other]

    def result(self) -> Answers | None:
        """All answers; None if a model is missing, or its images cannot be shown."""
        if self.wanted or self._is_left_out:
            return None
        try:
            return self._made()
        except Exception as error:  # processors raise many types
            self._leave_out(error)
            return None

    def _made(self) -> Answers:
        folder = self._context.folder
        processor = ImageProcessor.of(folder.path, folder.trusted)
        indices = tuple(self._images.classes.tolist())
        labels = tuple(map(self._name, indices))
        pictures = tuple(_png(processor.colours(pixels)) for pixels in self._images.pixels.cpu())
        return Answers(pictures=pictures, labels=labels, indices=indices, **self._answers)

    def _name(self, index: int) -> str:
        return class_name(self._names, index)

    def _leave_out(self, error: Exception) -> None:
        self._is_left_out = True
        reason = str(error) if isinstance(error, UserError) else one_line(error)
        self._context.watch(Message(f"answers on images: left out, {reason}"))


def _png(colours: Any) -> str:
    """A small PNG in base64 of an array [height, width, channels] of uint8."""
    from PIL import Image

    picture = Image.fromarray(colours)
    picture.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode()
