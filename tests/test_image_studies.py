"""Studies of image classifiers, run for real: a small ViT trained in this test, on images in MNIST's format."""

import base64
import gzip
import io
import json
import re
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from expect import parametrize
from image_families import write_classifier
from PIL import Image
from tinystudy import CommandLine, copy_of, run, stored
from torch.nn import functional
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from atp_tune.allocations import ALLOCATIONS
from atp_tune.api.configuration import load_config
from atp_tune.config.best import read_config
from atp_tune.folders.card import FINETUNED, Finetuned
from atp_tune.folders.packing import pack_folder
from atp_tune.measures import perplexity
from atp_tune.pruners import PRUNERS
from atp_tune.results.summary import summarise

pytestmark = pytest.mark.slow
SIDE, CLASSES = 16, 4
STUDY = """\
description = "a small ViT"
sparsity = 0.6
device = "cpu"

[model]
source = "model"
dtype = "float32"

[images.calibration]
source = "idx:train-images-idx3-ubyte.gz"
part = [0.0, 0.5]
nsamples = 24

[images.validation]
source = "idx:train-images-idx3-ubyte.gz"
part = [0.5, 1.0]
nsamples = 60

[images.test]
source = "idx:t10k-images-idx3-ubyte.gz"

[search]
trials = 6
sampler = "random"
"""


def make_images(place: Path, role: str, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise over a plain ground, columns, rows or a chessboard, the classes; writes both files of MNIST's format."""
    draw = np.random.default_rng(seed)
    classes = draw.integers(0, CLASSES, count).astype(np.uint8)
    images = draw.integers(0, 150, (count, SIDE, SIDE)).astype(np.uint8)
    rows, columns = np.indices((SIDE, SIDE)) % 2
    grounds = np.stack([np.full_like(rows, 1), columns * 2, rows * 2, (rows ^ columns) * 2]) * 40
    images += grounds[classes].astype(np.uint8)
    for name, array, magic in (("images-idx3", images, 0x803), ("labels-idx1", classes, 0x801)):
        head = struct.pack(f">I{array.ndim}I", magic, *array.shape)
        (place / f"{role}-{name}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))
    return images, classes


def make_place(place: Path) -> Path:
    """A folder with a trained classifier, its images, and the study tiny.toml."""
    images, classes = make_images(place, "train", 400, 1)
    make_images(place, "t10k", 80, 2)
    processor = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_mean=[0.3] * 3, image_std=[0.2] * 3)
    pixels = torch.cat([processor(np.stack([each] * 3, 2), return_tensors="pt")["pixel_values"] for each in images])
    torch.manual_seed(0)
    model = ViTForImageClassification(
        ViTConfig(
            hidden_size=24, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2, image_size=SIDE,
            patch_size=4, num_labels=CLASSES,
        )
    )  # fmt: skip
    optimizer, targets = torch.optim.Adam(model.parameters(), 2e-3), torch.tensor(classes.astype(np.int64))
    for _ in range(60):
        batch = torch.randint(len(pixels), (32,))
        loss = functional.cross_entropy(model(pixel_values=pixels[batch]).logits, targets[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(place / "model")
    processor.save_pretrained(place / "model")
    (place / "tiny.toml").write_text(STUDY)
    return place


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To be read only."""
    return make_place(tmp_path_factory.mktemp("vit"))


place = copy_of("trained")


def images_of(place: Path) -> np.ndarray:
    raw = gzip.decompress((place / "t10k-images-idx3-ubyte.gz").read_bytes())
    return np.frombuffer(raw, np.uint8, offset=16).reshape(-1, SIDE, SIDE)


def own_pixels(folder: Path, place: Path) -> torch.Tensor:
    """Pixels of all test images, by the processor of transformers."""
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    made = [processor(np.stack([each] * 3, 2), return_tensors="pt")["pixel_values"] for each in images_of(place)]
    return torch.cat(made)


def own_scores(folder: Path, place: Path) -> tuple[list[float], list[int]]:
    """Cross-entropies and hits of all test images, by transformers alone."""
    model = AutoModelForImageClassification.from_pretrained(folder)
    labels = gzip.decompress((place / "t10k-labels-idx1-ubyte.gz").read_bytes())
    classes = torch.tensor(list(labels[8:]))
    with torch.inference_mode():
        logits = model(pixel_values=own_pixels(folder, place)).logits
    return functional.cross_entropy(logits, classes, reduction="none").tolist(), (
        logits.argmax(1) == classes
    ).int().tolist()


@pytest.fixture
def tune(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    return CommandLine(capsys, monkeypatch)


def test_the_commands_of_a_study(place: Path, tune: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each works on an image classifier, or ends in one line."""
    monkeypatch.chdir(place)
    ran = tune.ok("--study", "tiny.toml")
    assert "test accuracy" in ran.out and "perplexity: over classes" in ran.out and "Sign of β" in ran.out
    assert "images" in ran.out and " windows" not in ran.out
    status = json.loads(tune("status", "--study", "tiny.toml", "--json").out)
    assert status["dense"]["accuracy"]["test"]["value"] > 0.7 and status["sign"]
    assert "(+0.000%)" in tune.ok("apply", "--config", "tiny.best.json", "--out", "sparse").out
    config = read_config(place / "sparse" / "atp_tune.json")
    nlls, _ = own_scores(place / "sparse", place)
    assert config.scored() is not None
    assert config.scored().value == pytest.approx(perplexity(nlls).value, rel=1e-4)
    card = (place / "sparse" / "README.md").read_text()
    assert "AutoModelForImageClassification" in card and "| accuracy |" in card and "tokenizer" not in card
    evaluated = tune.ok("evaluate", "--config", "tiny.best.json")
    assert "test images, top-1" in evaluated.out and "test images, top-5" in evaluated.out
    assert "| 10 " in tune.ok("evaluate", "sparse", "--limit", "10").out
    seen = tune("classify", "sparse", *write_pictures(place), "--both", "--json")
    pruned = tune("classify", *write_pictures(place), "--config", "tiny.best.json", "--both", "--json")
    assert seen.code == pruned.code == 0 and answers(seen) == pytest.approx(answers(pruned), rel=1e-5)
    assert answers(seen) == pytest.approx(
        [*own_probabilities(place / "sparse", place), *own_probabilities(place / "model", place)], rel=1e-4
    )
    loaded = load_config(place / "tiny.best.json", device="cpu")
    own = loaded.classify(write_pictures(place), both=True)
    assert json.loads(pruned.out) == [one.model_dump(mode="json") for one in own]
    assert loaded.classify(str(place / "0.png"))[0].dense is None
    tune.ok("report", "--study", "tiny.toml", "--out", "r.html")
    page = (place / "r.html").read_text()
    assert "validation accuracy" in page
    check_answers(page, place)
    tune.ok("export", "--study", "tiny.toml", "--format", "csv", "--out", "x.csv")
    for arguments, said in (
        (("finetune", "sparse", "--out", "tuned", "--text", "file:x"), "classifier: give --images"),
        (
            ("finetune", "sparse", "--out", "tuned", "--images", "idx:t10k-images-idx3-ubyte.gz"),
            "--images: idx:.* shares images with the test images; give another source",
        ),
        (("speedup", "--config", "tiny.best.json", "--tokens", "9"), "--tokens: an image classifier has no prompt"),
        (("generate", "--config", "tiny.best.json", "--prompt", "x"), "generate: model is an image classifier"),
        (("export", "--study", "tiny.toml", "--format", "llm-compressor"), "calibrates on texts"),
        (("evaluate", "--config", "tiny.best.json", "--tasks", "piqa"), "--tasks: are of texts"),
        (("chat", "sparse"), "chat: sparse is an image classifier, which has no text; take `classify`"),
        (("chat", "tiny.best.json"), "chat: tiny.best.json is an image classifier, which has no text; take `classify`"),
        (("model", "--sparsity", "0.5"), r"model: needs a study file with the tables \[images"),
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello")))  # of `chat`
        refused(tune(*arguments), said)
    assert not (place / "tuned").exists()


@parametrize("engine", ["torch", "packed"])
def test_the_speed_of_a_classifier(
    engine: str, place: Path, tune: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images per second are shown and kept; the packed engine compares its logits; several at once are not kept."""
    monkeypatch.chdir(place)
    tune.ok("--study", "tiny.toml", "--trials", "2")
    words = ("speedup", "--engine", engine, "--runs", "2", "--device", "cpu")
    answer = tune.ok(*words, "--config", "tiny.best.json")
    assert "| classify " in answer.out and "images per second, median" in answer.out
    assert "tokens" not in answer.out and "stored in tiny.best.json, study tiny" in answer.out
    found = read_config(place / "tiny.best.json").speed
    assert found is not None and found.fastest and found.unit == "images"
    assert all([*row.rates] == ["classify"] and len(row.rates["classify"].dense) == 2 for row in found.engines)
    assert set(found.zeros) >= {"mlp.fc1", "mlp.fc2"}
    packed = [row for row in found.engines if row.engine == "packed"]
    assert all(row.logits is not None and row.logits < 1e-3 for row in packed) and len(packed) == (engine == "packed")
    shown = tune("--study", "tiny.toml", "--trials", "2")
    assert re.search(r"classify, images per second: \w+, float32 +\|", shown.out)
    tune.ok("report", "--study", "tiny.toml", "--out", "r.md")
    assert "classify, images per second: torch, float32" in (place / "r.md").read_text()
    before = (place / "tiny.best.json").read_bytes()
    answer = tune(*words, "--config", "tiny.best.json", "--batch", "3")
    assert "classify: 3 images at once" in answer.out and "not stored: only rates of one image" in answer.out, answer
    assert (place / "tiny.best.json").read_bytes() == before


def test_a_packed_classifier_is_the_sparse_one(place: Path, tune: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain transformers loads it; `classify`, `evaluate` and `unpack` take it; rounding is measured on images."""
    monkeypatch.chdir(place)
    tune.ok("prune", "--study", "tiny.toml", "--out", "sparse", "--set", "sparsity=0.6")
    packed = tune.ok("pack", "sparse", "--out", "packed")
    assert 'AutoModelForImageClassification.from_pretrained("packed")' in packed.out
    sparse, own = (AutoModelForImageClassification.from_pretrained(place / name) for name in ("sparse", "packed"))
    assert type(own).__name__ == "PackedViTForImageClassification"
    pixels = own_pixels(place / "packed", place)
    with torch.inference_mode():
        expected, found = sparse(pixel_values=pixels).logits, own(pixel_values=pixels).logits
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    files = write_pictures(place)
    seen = [answers(tune("classify", name, *files, "--both", "--json")) for name in ("sparse", "packed")]
    assert seen[0] == seen[1]
    scores = [tune("evaluate", name).out.splitlines()[-4:] for name in ("sparse", "packed")]
    assert "test images, top-1" in "".join(scores[0])
    assert [line for line in scores[0] if "top-" in line] == [line for line in scores[1] if "top-" in line]
    tune.ok("unpack", "packed", "--out", "again")
    for file in (place / "sparse").iterdir():
        assert file.read_bytes() == (place / "again" / file.name).read_bytes(), file.name
    assert "perplexity on the test images: " in tune.ok("pack", "sparse", "--out", "int8", "--values", "int8").out
    assert "(+0.000%)" in tune.ok("apply", "--config", "sparse/atp_tune.json", "--out", "both", "--packed").out
    assert "atp_sparse" in (place / "both/config.json").read_text()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello")))
    refused(tune("chat", "packed"), "image classifier")
    tuned = tune.ok("finetune", "packed", "--out", "tuned", "--steps", "2", "--batch", "8")
    assert "2 steps on 16 images" in tuned.out


def test_a_classifier_is_fine_tuned(place: Path, tune: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros stay, the loss is transformers' own, and accuracy is measured before and after."""
    monkeypatch.chdir(place)
    tune.ok("prune", "--study", "tiny.toml", "--out", "sparse", "--set", "sparsity=0.7")
    train = '{source = "idx:train-images-idx3-ubyte.gz", part = [0.0, 0.5]}'
    words = ("finetune", "sparse", "--out", "tuned", "--images", train, "--batch", "16", "--device", "cpu")
    answer = tune.ok(*words, "--steps", "40", "--learning-rate", "0.01")
    assert " steps on 180 images of " in answer.out and "test accuracy" in answer.out
    done = Finetuned.model_validate_json((place / "tuned" / FINETUNED).read_text())
    assert done.zeros.before == done.zeros.after and done.settings.seqlen is None and done.accuracy is not None
    for folder, own, hits in (
        ("sparse", done.before, done.accuracy.before), ("tuned", done.after, done.accuracy.after)
    ):  # fmt: skip
        nlls, right = own_scores(place / folder, place)
        assert own.value == pytest.approx(perplexity(nlls).value, rel=1e-4)
        assert hits.value == pytest.approx(sum(right) / len(right))
    assert (
        done.after.value < done.before.value
        and f"Accuracy: {done.accuracy.before} before" in (place / "tuned" / "README.md").read_text()
    )
    old, new = (AutoModelForImageClassification.from_pretrained(place / name) for name in ("sparse", "tuned"))
    for (name, was), tuned in zip(old.named_parameters(), new.parameters(), strict=True):
        assert torch.equal(was, tuned) != (was.dim() == 2 and ".layers." in name)
        assert was.dim() != 2 or torch.equal((was == 0), (tuned == 0))
    assert done.held_out is not None and done.held_out.windows == 20
    learnt = tune.ok(*words, "--steps", "2", "--loss", "kl", "--patience", "0", "--out", "learnt")
    assert "2 steps on 32 images of " in learnt.out
    refused(tune(*words, "--out", "no", "--loss", "kl", "--teacher", "no-model"), "--teacher: model.source: ")


@parametrize("family", ["beit", "dinov2", "convnext", "swinv2", "hiera", "pvtv2", "segformer"])
def test_packed_families(family: str, tmp_path: Path) -> None:
    """Logits of the packed model are those of the sparse one, also where shapes change between stages."""
    source = write_classifier(tmp_path / "model", {index: str(index) for index in range(CLASSES)}, family)
    sparse = AutoModelForImageClassification.from_pretrained(source)
    with torch.no_grad():
        for module in sparse.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight[torch.rand(module.weight.shape, generator=torch.Generator().manual_seed(0)) < 0.6] = 0
    sparse.save_pretrained(source)
    assert pack_folder(source, tmp_path / "packed").packed_bytes
    own = AutoModelForImageClassification.from_pretrained(tmp_path / "packed")
    size = getattr(sparse.config, "image_size", 32)
    sides = (size, size) if isinstance(size, int) else size
    pixels = torch.randn(2, 3, *sides, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, found = sparse(pixel_values=pixels).logits, own(pixel_values=pixels).logits
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def write_pictures(place: Path) -> list[Path]:
    """The first test images as files."""
    files = [place / f"{index}.png" for index in range(3)]
    for file, image in zip(files, images_of(place), strict=False):
        Image.fromarray(image).save(file)
    return files


def answers(printed: Any) -> list[float]:
    """The probabilities of all classes of all pictures, by class: the sparse model's, then the dense one's."""
    found = json.loads(printed.out)
    return [
        guess["probability"]
        for side in ("classes", "dense")
        for one in found
        for guess in sorted(one[side], key=lambda guess: guess["index"])
    ]


def own_probabilities(folder: Path, place: Path) -> list[float]:
    model, pixels = AutoModelForImageClassification.from_pretrained(folder), own_pixels(folder, place)[:3]
    with torch.inference_mode():
        return [value for row in model(pixel_values=pixels).logits.softmax(1).tolist() for value in row]


def check_answers(page: str, place: Path) -> None:
    """The report shows the first test images with their classes, and what each model sees in them."""
    found = summarise(stored(place)).answers
    assert found is not None and len(found.pictures) == 10
    pixels, labels = (
        own_pixels(place / "model", place),
        gzip.decompress((place / "t10k-labels-idx1-ubyte.gz").read_bytes())[8:],
    )
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0)).tolist()[:10]
    assert found.labels == tuple(f"LABEL_{labels[index]}" for index in order)
    for folder, answers in (("model", found.dense), ("sparse", found.best)):
        with torch.inference_mode():
            own = AutoModelForImageClassification.from_pretrained(place / folder)(pixels[order]).logits.softmax(1)
        assert [answer.name for answer in answers] == [f"LABEL_{index}" for index in own.argmax(1).tolist()]
        assert [answer.probability for answer in answers] == pytest.approx(own.amax(1).tolist(), rel=1e-4)
    for picture, index in zip(found.pictures, order, strict=True):
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))).convert("L"))
        assert np.array_equal(shown, images_of(place)[index])
        assert f"data:image/png;base64,{picture}" in page
    assert page.count("<figcaption>LABEL_") == 10


def refused(answer: Any, said: str) -> None:
    lines = [line for line in answer.err.splitlines() if line.startswith("error:")]
    assert answer.code == 2 and len(lines) == 1 and re.search(said, lines[0])
    assert "Traceback" not in answer.err


@parametrize("kind", ["vit", "convnext"])
def test_every_pruner_and_allocation(place: Path, kind: str) -> None:
    if kind == "convnext":
        torch.manual_seed(0)
        config = ConvNextConfig(
            depths=[1, 2, 1], hidden_sizes=[8, 16, 24], num_stages=3, patch_size=2, num_labels=CLASSES
        )
        shutil.rmtree(place / "model")
        ConvNextForImageClassification(config).save_pretrained(place / "model")
        ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(place / "model")
    small = ("images.calibration.nsamples=8", "images.validation.nsamples=10", "images.test.nsamples=10")
    for key, names, trials in (("prune.pruners", [*PRUNERS], 8), ("allocation.names", [*ALLOCATIONS], 16)):
        (place / "tiny.db").unlink(missing_ok=True)
        found = run(place, f"{key}={json.dumps(names)}", *small, f"search.trials={trials}")
        assert {
            trial.params[key.split(".")[1].rstrip("s").replace("name", "allocation")] for trial in found.trials
        } == {*names}
        failures = {trial.user_attrs.get("failure") for trial in found.trials if trial.state.name == "FAIL"}
        assert all("tail" in str(failure) for failure in failures), failures
