"""The strip of test images with the answers of dense, uniform and best: what it shows, and that it stops no study."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from expect import parametrize
from families import setup_of
from image_families import SIZE, write_classifier
from PIL import Image
from transformers import AutoModelForImageClassification

from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.models import ModelFolder
from atp_tune.events import Message
from atp_tune.inputs.items import LABELS, PIXELS, Items
from atp_tune.metrics import NAMES, Answers, ImageAnswer
from atp_tune.report.formats import _answers
from atp_tune.run.observers import ImageAnswers, LeftOut
from atp_tune.run.session import Session

CPU = torch.device("cpu")


class Strip:
    """A strip over a classifier whose folder a test has changed, and the messages that it gave."""

    def __init__(self, folder: Path) -> None:
        self.said: list[str] = []
        draw = torch.Generator().manual_seed(0)
        self.colours = torch.randint(0, 256, (4, 3, SIZE, SIZE), generator=draw)
        pixels = (self.colours / 255 - 0.3) / 0.2
        model = AutoModelForImageClassification.from_pretrained(folder).eval().requires_grad_(False)
        items = {"test": Items.of({PIXELS: pixels, LABELS: torch.tensor([0, 1, 0, 1])}, (SIZE // 4) ** 2 + 1)}
        self.context = Session(
            ModelFolder(folder, "content", "vit"),
            Checkpoint(model, CPU),
            items,
            setup_of(watch=self._hear, score="classes"),
        )
        self.answers = ImageAnswers("test")
        self.work = LeftOut(self.answers, {*NAMES}, "answers on images", self._hear)

    def _hear(self, event: Any) -> None:
        if isinstance(event, Message):
            self.said.append(event.text)

    def all(self) -> Answers | None:
        for name in NAMES:
            self.context.measure(None, [self.work], name)
        found: Answers | None = self.work.result()
        return found


def change(folder: Path, name: str, **more: Any) -> Path:
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **more}))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_classifier(tmp_path / "vit", {0: "crane", 1: "crane"})


@parametrize("mean", [0.3, [0.3], [0.3] * 3])
def test_pictures_have_their_own_colours(mean: Any, folder: Path) -> None:
    """By one mean for all channels too, which transformers takes."""
    deviation = 0.2 if isinstance(mean, float) else [0.2] * len(mean)
    strip = Strip(change(folder, "preprocessor_config.json", image_mean=mean, image_std=deviation))
    found = strip.all()
    assert found is not None and found.indices == (0, 1, 0, 1) and not strip.said
    for picture, own in zip(found.pictures, strip.colours, strict=True):
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))))
        assert np.array_equal(shown, own.permute(1, 2, 0).numpy())


@parametrize("more", [{"image_mean": [0.3] * 2, "image_std": [0.2] * 2}, {"image_processor_type": "NoneSuch"}])
def test_what_fails_leaves_the_strip_out_in_one_line(more: dict[str, Any], folder: Path) -> None:
    strip = Strip(change(folder, "preprocessor_config.json", **more))
    assert strip.all() is None and strip.work.wanted == set()
    assert len(strip.said) == 1 and strip.said[0].startswith("answers on images: left out, ")
    assert len(strip.said[0].splitlines()) == 1


def test_a_wrong_answer_of_the_same_name_is_wrong() -> None:
    """ImageNet has "crane" twice."""
    right, wrong = (ImageAnswer(name="crane", index=index, probability=1) for index in (0, 1))
    picture = base64.b64encode(b"x").decode()
    found = Answers(
        pictures=(picture,), labels=("crane",), indices=(0,), dense=(right,), uniform=(wrong,), best=(right,)
    )
    shown = _answers(type("Summary", (), {"answers": found})())  # type: ignore[arg-type]
    assert [is_right for _, _, is_right in shown[0][2]] == [True, False, True]
