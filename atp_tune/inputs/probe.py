"""A linear classifier on top of a model of images that has none: `[model.probe]`.

x features of an image [features], what the classification class of transformers gives its last linear, such as the
class token beside the mean patch; y its class; z = (x - μ) / σ with mean and standard deviation of the training images:

    minimise  mean over images of -ln softmax(A z + b)_y  +  l2 · Σ A²        (L-BFGS, float64; convex)

The classifier is W = A / σ, b - W μ. All other weights stay as they are. The result is a folder in the cache. A study
knows it by what it was made from (model, images, penalty, names), so that it goes on on another machine, whose
classifier differs in the last digits.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from atp_tune.cache import cache_dir, folder_atomically, keep, sha256_of_json
from atp_tune.cache_keys import key
from atp_tune.checkpoints.classes import classifies_images
from atp_tune.checkpoints.convert import one_line, quiet
from atp_tune.checkpoints.models import ModelFolder
from atp_tune.errors import UserError
from atp_tune.inputs.images import Images, chosen
from atp_tune.inputs.pictures import Pictures, pictures
from atp_tune.inputs.pixel_cache import cached_pixels, libraries, made_by
from atp_tune.inputs.pixels import ImageProcessor, labels_of
from atp_tune.spec.images import ARCHIVES, Probe

_FORMAT = 1  # in the content by which studies know a model with its classifier
BATCH = 32  # images at a time
STEPS = 500  # of L-BFGS, at most
PERIOD = 30  # seconds between lines that say how many images the model has seen


def with_probe(folder: ModelFolder, probe: Probe, base: Path, notify: Callable[[str], None]) -> ModelFolder:
    """The model with a classifier fitted to the images of `probe`, cached; UserError for bad input."""
    if classifies_images(folder.path):
        raise UserError(f"model.probe: {folder.id} has a classifier already; leave the table out")
    try:
        processor = ImageProcessor.of(folder.path, folder.trusted, probe.size)
        known = _known(folder, probe, processor)
        if known is not None and known.is_file():
            target, content = json.loads(known.read_text())
            if Path(target).is_dir():
                return replace(folder, path=Path(target), content=content)
        found = chosen(pictures(probe, base), probe)
        names = labels_of(found, probe)
        pixels = processor.pixels(found) if known else cached_pixels(processor, found)  # pinned ones are read once
    except UserError as error:
        raise UserError(f"model.probe.{error}") from None
    images = Images.of(pixels, torch.tensor(_numbers(found, names), dtype=torch.int64), 1)
    made_from = [_FORMAT, folder.content, probe.l2, images.content, list(names)]
    own = {"model": folder.content, "probe": [probe.l2, list(names)], "images": images.content}
    target = cache_dir("models/probe") / key("models/probe", **own, processor=made_by(processor))
    if not target.is_dir():
        notify(f"fitting a classifier of {len(names)} classes to {len(images)} images, once")
        with folder_atomically(target, shared=True) as place:
            _fit(folder, images, names, probe.l2, place, notify)
            processor.own.save_pretrained(place)
            for file in folder.path.iterdir():
                if file.name.startswith(("README", "LICENSE")) and file.is_file():
                    shutil.copyfile(file, place / file.name)
    content = sha256_of_json(made_from)  # not of the weights, whose last digits differ between machines
    if known is not None:
        keep(known, json.dumps([str(target), content]).encode())
    return replace(folder, path=target, content=content)


def _known(folder: ModelFolder, probe: Probe, processor: ImageProcessor) -> Path | None:
    """The file of the cache that names the classifier of a probe whose images are pinned by their SHA-256.

    So its thousands of images are not decoded each time a model is loaded.
    """
    if probe.kind not in ARCHIVES:
        return None
    own = {"model": folder.content, "probe": probe.model_dump(mode="json"), "images": libraries()}  # that decode them
    return cache_dir("models/probe") / f"{key('models/probe', **own, processor=made_by(processor))}.json"


def _numbers(found: Pictures, names: tuple[str, ...]) -> list[int]:
    index = {name: number for number, name in enumerate(names)}
    result = []
    for row, label in enumerate(found.labels):
        number = label if isinstance(label, int) else index.get(label)
        if number is None or not 0 <= number < len(names):
            raise UserError(f"model.probe.labels: {found.name(row)} has the class {label!r}, which is none of them")
        result.append(number)
    if len(set(result)) < 2:
        raise UserError("model.probe: its images are of one class; give images of all classes")
    return result


@torch.inference_mode()
def _fit(
    folder: ModelFolder, images: Images, names: tuple[str, ...], l2: float, place: Path, notify: Callable[[str], None]
) -> None:
    model = _classifier(folder, names)
    head = model.classifier
    seen, done, said = [], 0, monotonic()
    for pixels in torch.split(images.pixels, BATCH):
        seen.append(_features(model, head, pixels))
        done += len(pixels)
        if monotonic() - said >= PERIOD:
            said = monotonic()
            notify(f"fitting a classifier: the model has seen {done} of {len(images)} images")
    features = torch.cat(seen).double()
    with torch.inference_mode(False):
        weight, bias = fitted(features.clone(), images.classes.clone(), len(names), l2)
    head.weight.copy_(weight)
    head.bias.copy_(bias)
    with quiet("transformers"):
        model.save_pretrained(place)


def _classifier(folder: ModelFolder, names: tuple[str, ...]) -> Any:
    """The folder's model with a classifier of random weights; UserError if other weights are missing."""
    from transformers import AutoModelForImageClassification

    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    options = {"local_files_only": True, "trust_remote_code": folder.trusted, "output_loading_info": True}
    try:
        with quiet("transformers"):
            model, found = AutoModelForImageClassification.from_pretrained(
                str(folder.path), dtype=torch.float32, use_safetensors=True, **labels, **options
            )
    except Exception as error:  # parsers of unknown files raise many types
        raise UserError(
            f"model.probe: transformers has no classifier for the model of {folder.id}: {one_line(error)}"
        ) from error
    others = sorted(key for key in found["missing_keys"] if not key.startswith("classifier."))
    if others or not isinstance(getattr(model, "classifier", None), nn.Linear):
        lack = f"{folder.id} has no {others[0]}" if others else f"{type(model).__name__} ends in no linear classifier"
        raise UserError(f"model.probe: {lack}; such a model cannot be probed")
    return model.eval()


def _features(model: Any, head: nn.Linear, pixels: Tensor) -> Tensor:
    """What the classifier gets for each image, [images, features]."""
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        model(pixel_values=pixels)
    finally:
        handle.remove()
    return seen[0]


def fitted(features: Tensor, classes: Tensor, count: int, l2: float) -> tuple[Tensor, Tensor]:
    """Weight [classes, features] and bias [classes] for features float64 [images, features]."""
    mean, spread = features.mean(0), features.std(0).clamp_min(1e-6)
    z = (features - mean) / spread
    weight = torch.zeros(count, features.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(count, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS(
        [weight, bias], max_iter=STEPS, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        search.zero_grad()
        value = functional.cross_entropy(z @ weight.T + bias, classes) + l2 * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        search.step(loss)  # type: ignore[no-untyped-call]
    scaled = weight.detach() / spread
    return scaled, bias.detach() - scaled @ mean
