"""`classify`: the classes that a classifier sees in pictures, against transformers alone, and what is refused."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from expect import parametrize, slow
from image_families import write_classifier
from PIL import Image
from tinystudy import CommandLine
from transformers import AutoModelForImageClassification, ViTImageProcessorPil

from atp_tune.checkpoints import devices
from atp_tune.events import Place
from atp_tune.folders.comparing import TOP, classify

CLASSES = 7
NAMES = {0: "cat", 1: "a | b", 2: "[red]", 3: "\x1b[2Jdog", 4: "e", 5: "f", 6: "g"}


@pytest.fixture(scope="module", params=["vit", "swin"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random classifier with its processor."""
    return write_classifier(tmp_path_factory.mktemp(request.param) / "model", NAMES, request.param)


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    draw = np.random.default_rng(0)
    files = [tmp_path / f"{index}.png" for index in range(35)]
    for index, file in enumerate(files):
        Image.fromarray(draw.integers(0, 256, (9 + index, 20, 3)).astype(np.uint8)).save(file)
    return files


@slow
def test_classes_are_those_of_transformers(
    folder: Path, pictures: list[Path], command: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 also where bfloat16 is fast: transformers computes in it here."""
    monkeypatch.setattr(devices, "multiplies_bf16_fast", lambda device: False)
    found = classify(pictures, folder, False, Place(folder, "cpu"))
    assert [one.file for one in found] == list(map(str, pictures))
    model, processor = (
        AutoModelForImageClassification.from_pretrained(folder),
        ViTImageProcessorPil.from_pretrained(folder),
    )
    for one, file in zip(found, pictures, strict=True):
        with torch.inference_mode():
            pixels = processor(Image.open(file).convert("RGB"), return_tensors="pt")["pixel_values"]
            own = model(pixel_values=pixels).logits[0].softmax(0)
        order = sorted(range(CLASSES), key=lambda index: (-own[index], index))[:TOP]
        assert [guess.index for guess in one.classes] == order and one.dense is None
        assert [guess.name for guess in one.classes] == [NAMES[index] for index in order]
        assert [guess.probability for guess in one.classes] == pytest.approx(own[order].tolist(), rel=1e-4)
    shown = command.ok("classify", folder, pictures[0])
    assert "\x1b" not in shown.out
    for guess in found[0].classes:
        name = guess.name.replace("|", "\\|").replace("\x1b", "\\x1b")
        assert f"| {name} {guess.probability:.1%} " in shown.out
    printed = json.loads(command("classify", folder, *pictures[:2], "--json").out)
    alone = classify(pictures[:2], folder, False, Place(folder, "cpu"))  # a batch of another size: other last bits
    assert printed == [one.model_dump(mode="json") for one in alone]


@parametrize("side", [3, 24])
def test_a_processor_that_does_not_fit_its_model_is_refused(
    side: int, folder: Path, pictures: list[Path], command: CommandLine, tmp_path: Path
) -> None:
    place = Path(shutil.copytree(folder, tmp_path / "other"))
    ViTImageProcessorPil(size={"height": side, "width": side}).save_pretrained(place)
    answer = command("classify", place, pictures[0])
    assert answer.code == 2 and re.search(r"model .*: cannot be run on an image: ", answer.err)
    assert len(answer.err.splitlines()) == 1 and "|" not in answer.out


def test_a_file_of_any_size_is_not_read(tmp_path: Path, folder: Path, command: CommandLine) -> None:
    with (tmp_path / "big.png").open("wb") as stream:
        stream.truncate(1 << 40)  # without blocks on the disk
    answer = command("classify", folder, tmp_path / "big.png")
    assert answer.code == 2 and re.search(r"FILE: .*big.png has 1.1e\+12 bytes, and .* is the most", answer.err)
