"""The classifiers of `images.py`: the model of a study, and small ones that are trained here on Fashion-MNIST.

    python benchmarks/image_classifiers.py vit      trains one into build/images/vit, unless it is there

They see half of the training images, the first `part` of the shuffled source, in which calibration images may lie; the
validation images are of the other half. AdamW, one cycle of the learning rate, no augmentation, seed 0. Weights are not
committed: on another machine the last digits, and so the accuracies, differ a little.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch.nn import functional
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    PreTrainedModel,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from atp_tune.checkpoints.blocks import model_config
from atp_tune.checkpoints.models import ModelFolder, resolve
from atp_tune.cli.terminal import quiet
from atp_tune.config.data import ImageSet
from atp_tune.config.studyfile import StudyFile, load
from atp_tune.inputs.images import read_images
from atp_tune.inputs.items import LABELS, PIXELS
from atp_tune.utils.cache import folder_atomically

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "images"
STUDY = "fashion"  # whose images all classifiers see
SIDE, MEAN, DEVIATION = 28, 0.286, 0.353  # of Fashion-MNIST
BATCH, DECAY = 128, 0.05


@dataclass(frozen=True)
class Classifier:
    """A classifier and how many images it is measured on; `make` builds an untrained one, None: the study's own."""

    title: str
    validation: int
    test: int
    make: Callable[[dict[str, Any]], PreTrainedModel] | None = None
    epochs: int = 0
    rate: float = 0.0  # the highest learning rate


def vit(labels: dict[str, Any]) -> PreTrainedModel:
    """Ten blocks of width 64, 16 patches of 7 × 7."""
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=64, intermediate_size=256, num_hidden_layers=10, num_attention_heads=4, image_size=SIDE,
            patch_size=7, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **labels,
        )
    )  # fmt: skip


def convnext(labels: dict[str, Any]) -> PreTrainedModel:
    """Eight blocks in three stages of width 32, 64 and 128, on 14 × 14, 7 × 7 and 3 × 3 positions."""
    return ConvNextForImageClassification(
        ConvNextConfig(depths=[2, 4, 2], hidden_sizes=[32, 64, 128], num_stages=3, patch_size=2, **labels)
    )


def swin(labels: dict[str, Any]) -> PreTrainedModel:
    """Eight blocks in two stages of width 48 and 96, on 14 × 14 and 7 × 7 positions, windows of 7 × 7."""
    return SwinForImageClassification(
        SwinConfig(
            image_size=SIDE, patch_size=2, embed_dim=48, depths=[2, 6], num_heads=[3, 6], window_size=7,
            hidden_dropout_prob=0.0, drop_path_rate=0.0, **labels,
        )
    )  # fmt: skip


CLASSIFIERS = {
    "dinov2": Classifier("DINOv2-small, 12 blocks, 21.3 M weights in them, with a linear classifier", 400, 1000),
    "vit": Classifier("ViT, 10 blocks of width 64", 2000, 5000, vit, 4, 2e-3),
    "convnext": Classifier("ConvNeXt, 8 blocks in 3 stages", 2000, 5000, convnext, 3, 3e-3),
    "swin": Classifier("Swin, 8 blocks in 2 stages", 1000, 2500, swin, 2, 2e-3),
}


def study_of(name: str, overrides: Sequence[str] = ()) -> StudyFile:
    """The study of a classifier, under its name; it is trained first if it is not there yet."""
    found = CLASSIFIERS[name]
    counts = (f"images.validation.nsamples={found.validation}", f"images.test.nsamples={found.test}")
    file = load(STUDY, [*counts, *overrides])
    if found.make is None:
        return replace(file, name=name)
    model = file.study.model.model_copy(update={"source": str(trained(name))})
    return replace(file, name=name, study=file.study.model_copy(update={"model": model}))


def trained(name: str) -> Path:
    """The folder of a trained classifier."""
    target = BUILD / name
    if not target.is_dir():
        BUILD.mkdir(parents=True, exist_ok=True)
        with folder_atomically(target) as place:
            _train(CLASSIFIERS[name], load(STUDY, []), place)
    return target


def _train(asked: Classifier, file: StudyFile, place: Path) -> None:
    data = file.study.images
    assert asked.make is not None and data is not None
    own = resolve(file.study.model, file.folder)  # examples/fashion/prepare.py has made it
    names: dict[int, str] = model_config(own.path, own.trusted).id2label
    torch.manual_seed(0)
    model = asked.make({"id2label": names, "label2id": {label: index for index, label in names.items()}})
    model.save_pretrained(place)
    ViTImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_mean=[MEAN] * 3, image_std=[DEVIATION] * 3
    ).save_pretrained(place)
    wanted = ImageSet(source=data.calibration.source, labels=tuple(names.values()), part=data.calibration.part)
    images = read_images("calibration", wanted, ModelFolder(place, "", ""), file.folder)
    steps, began = asked.epochs * (len(images) // BATCH), monotonic()
    optimizer = torch.optim.AdamW(model.parameters(), lr=asked.rate, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, asked.rate, total_steps=steps, pct_start=0.2)
    order = torch.cat([torch.randperm(len(images)) for _ in range(asked.epochs)])
    model.train()
    for step in range(steps):
        rows = order[step * BATCH : (step + 1) * BATCH]
        loss = functional.cross_entropy(
            model(pixel_values=images.tensors[PIXELS][rows]).logits, images.tensors[LABELS][rows]
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step} of {steps}: loss {loss:.3f}, {monotonic() - began:.0f} s", flush=True)
    model.requires_grad_(False).save_pretrained(place)


if __name__ == "__main__":
    with quiet():
        for chosen in sys.argv[1:]:
            print(study_of(chosen).study.model.source)
