"""Tiny random image classifiers of the families that are replayed to the last bit, and images for them."""

from pathlib import Path
from typing import Any

import torch
import transformers
from families import CPU, SETTINGS, setup_of
from torch import nn

from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.models import ModelFolder
from atp_tune.config.prune import PruneConfig
from atp_tune.inputs.items import LABELS, PIXELS, Items
from atp_tune.run.session import Session

SIZE, CLASSES = 32, 5
FAMILIES = SETTINGS["images"]  # classes of config and model, settings, number of blocks


def make(family: str, **more: Any) -> nn.Module:
    """A tiny random classifier; its scales and normalisations are not those of a new model, which hide mistakes."""
    config, model, settings, _ = FAMILIES[family]
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(num_labels=CLASSES, **{**settings, **more}))
    with torch.no_grad():
        for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
            if tensor.is_floating_point() and tensor.dim() < 2:
                tensor.copy_(torch.rand_like(tensor) + 0.5 if "bias" not in name else torch.randn_like(tensor) * 0.1)
            elif tensor.is_floating_point():
                tensor.copy_(torch.randn_like(tensor) * 2 / tensor[0].numel() ** 0.5)
    return made.eval().requires_grad_(False)  # as loaded ones: torch multiplies by weights with gradients otherwise


def images(family: str, count: int, seed: int) -> Items:
    """Random images of the size of a family, with random classes."""
    draw = torch.Generator().manual_seed(seed)
    side = FAMILIES[family][2].get("image_size", SIZE)
    side = side[0] if isinstance(side, list) else side
    pixels = torch.randn(count, 3, side, side, generator=draw)
    labels = torch.randint(CLASSES, (count,), generator=draw)
    return Items.of({PIXELS: pixels, LABELS: labels}, (side // 4) ** 2 + 1)


def context_of(family: str, model: nn.Module | None = None, **prune: Any) -> Session:
    """A context over a tiny classifier with calibration and validation images."""
    items = {"calibration": images(family, 6, 1), "validation": images(family, 7, 2)}
    folder, checkpoint = ModelFolder(Path(), family, family), Checkpoint(model or make(family), CPU)
    return Session(folder, checkpoint, items, setup_of(PruneConfig.model_validate(prune), score="classes"))


def write_classifier(folder: Path, names: dict[int, str] | None = None, family: str = "vit") -> Path:
    """A folder with a tiny random classifier and its processor."""
    found = names or {0: "cat", 1: "dog"}
    labels = {"id2label": found, "label2id": {name: index for index, name in found.items()}}
    config, model, settings, _ = FAMILIES[family]
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(**{**settings, **labels}))
    torch.nn.init.normal_(made.classifier.weight)
    made.save_pretrained(folder)
    transformers.ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return folder
