"""Image classifiers: replay to the last bit, pruning against naive loops, scores, and what their sources may hold."""

import gzip
import io
import json
import shutil
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from expect import parametrize, refused, slow
from families import CPU, few, scores_of
from image_families import CLASSES, FAMILIES, context_of, images, make
from PIL import Image
from plans import planned
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from atp_tune.blocks.verification import verified
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.models import ModelFolder
from atp_tune.config.data import ImageSet
from atp_tune.inputs.images import LABELLED_IMAGES, LabelledImages, image_items
from atp_tune.inputs.items import LABELS, PIXELS
from atp_tune.inputs.pictures import ImageProcessor, Pictures, class_indices, pictures
from atp_tune.measures import accuracy, gain
from atp_tune.scores.classes import CLASSES as SCORE
from atp_tune.scores.classes import class_ranks

STAGED = ("convnext", "swin", "swinv2", "hiera", "levit", "pvt", "pvtv2", "segformer", "focalnet")


@parametrize("family", few(list(FAMILIES), ["vit", "convnext", "swin", "hiera"]))
def test_scores_are_those_of_the_model_itself(family: str) -> None:
    """The logits from the blocks, one by one and in batches, are equal to the last bit to the model's own."""
    work, batch = context_of(family), images(family, 7, 2)
    with torch.inference_mode():
        own = work.checkpoint.model(pixel_values=batch.tensors[PIXELS]).logits
        hidden = work.replay.embed(batch)
        for index in range(len(work.checkpoint.blocks)):
            hidden = work.replay.run(index, work.checkpoint.weights(index), hidden)
        assert torch.equal(work.replay.logits(batch, hidden), own)
    assert len(work.checkpoint.blocks) == (FAMILIES[family][3] or len(work.checkpoint.blocks))
    found = scores_of(work, work.blocks(None), "validation", kl=True)
    assert found["nlls"] == pytest.approx(
        functional.cross_entropy(own, batch.tensors[LABELS], reduction="none").tolist(), rel=1e-4
    )
    assert found["kls"] == pytest.approx([0.0] * 7, abs=1e-6) and found["same_tops"] == [1.0] * 7
    with torch.inference_mode():  # a dense model whose classes are others for some of the images
        other = hidden.flip(0)
        same = (work.replay.logits(batch, other).argmax(1) == own.argmax(1)).float().tolist()
        assert work.score.items(work.replay, batch, hidden, other)["same_tops"] == same
    assert found["ranks"] == [int((row > row[k]).sum()) for row, k in zip(own, batch.tensors[LABELS], strict=True)]


@parametrize("statistics", ["block", "sequential", "dense", "dense, as in the papers' code"])
@parametrize("family", few(["vit", *STAGED], ["vit", "convnext"]))
def test_wanda_is_a_naive_loop(family: str, statistics: str) -> None:
    """Each linear is pruned by the norms of its inputs in the model as it is pruned so far, run as a whole.

    The papers' code for images removes the lowest scores of each whole matrix, whatever its stage.
    """
    statistics, _, whole = statistics.partition(", ")
    work = context_of(family, statistics=statistics, **({"wanda": {"compare": "matrix"}} if whole else {}))
    linears, names = work.checkpoint.linears, work.checkpoint.block_names
    plan = planned("wanda", "uniform", tuple(0.3 + 0.1 * (index % 4) for index in range(len(linears))))
    found = {
        f"{names[block.index]}.{linear.name}": block.weights[linear.key].clone()
        for block in work.prune(plan)
        for linear in linears[block.index]
    }
    model, dense, calibration = make(family), make(family), images(family, 6, 1)
    for index, block in enumerate(linears):
        norms = _norms(dense if statistics == "dense" else model, names[index], calibration)
        for linear in sorted(block, key=lambda linear: list(norms).index(linear.name)):
            name = f"{names[index]}.{linear.name}"
            if statistics == "sequential":
                norms = _norms(model, names[index], calibration)
            weight = model.get_submodule(name).weight
            scores = (weight.abs() * norms[linear.name]).reshape(1 if whole else len(weight), -1)
            for row, values in zip(weight.data.view(scores.shape), scores, strict=True):
                row[torch.sort(values, stable=True)[1][: int(len(row) * plan.amounts[index])]] = 0
            assert (found[name] == 0).sum() == (weight == 0).sum()
            assert (found[name] == weight).float().mean() > 0.99, name  # a near-tie may fall otherwise in other batches
            weight.data.copy_(found[name])


def _norms(model: Any, block: str, batch: Any) -> dict[str, torch.Tensor]:
    """‖X_j‖ of the inputs of each linear of a block, in one run of the whole model."""
    found: dict[str, torch.Tensor] = {}
    handles = []
    for name, module in model.get_submodule(block).named_modules():
        if isinstance(module, torch.nn.Linear):

            def hook(_: Any, args: Any, name: str = name) -> None:
                found[name] = args[0].reshape(-1, args[0].shape[-1]).float().square().sum(0).sqrt()

            handles.append(module.register_forward_pre_hook(hook))
    with torch.inference_mode():
        model(pixel_values=batch.tensors[PIXELS])
    for handle in handles:
        handle.remove()
    return found


@parametrize("family", few(["vit", "convnext", "swin", "hiera"], ["convnext"]))
def test_the_gradient_of_prices_goes_through_steps_between_blocks(family: str) -> None:
    """The prices' first gradient, of the states that enter block 0, is that of the model as a whole."""
    work, batch = context_of(family), images(family, 3, 4)
    with torch.inference_mode(False), torch.enable_grad():
        start = work.replay.embed(batch).clone().requires_grad_()
        hidden = start
        for index in range(len(work.checkpoint.blocks)):
            hidden = work.replay.run(index, work.checkpoint.weights(index), hidden)
        loss = functional.cross_entropy(work.replay.logits(batch, hidden), batch.tensors[LABELS], reduction="sum")
        whole = torch.autograd.grad(loss, start)[0]
    assert whole.abs().max() > 0
    last = SCORE.gradient(work.replay, batch, hidden)
    with torch.enable_grad():
        leaf = hidden.detach().clone().requires_grad_()
        own = functional.cross_entropy(work.replay.logits(batch, leaf), batch.tensors[LABELS], reduction="sum")
    assert torch.allclose(last, torch.autograd.grad(own, leaf)[0], atol=1e-6)
    p = work.replay.logits(batch, 0.5 * hidden).detach().softmax(1)
    from_dense = SCORE.gradient(work.replay, batch, hidden, 0.5 * hidden)
    with torch.enable_grad():
        logits = work.replay.logits(batch, leaf)
        kl = (p * (p.log() - logits.log_softmax(1))).sum()
        both = (functional.cross_entropy(logits, batch.tensors[LABELS], reduction="sum") + kl) / 2
    assert torch.allclose(from_dense, torch.autograd.grad(both, leaf)[0], atol=1e-6)


def test_a_model_whose_blocks_pass_more_than_hidden_states_is_refused() -> None:
    """A model that is not exact block by block is found out by the program's own check."""
    model = make("vit")
    layer = model.vit.layers[1]  # type: ignore[union-attr]
    own, seen = layer.forward, []

    def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(None)
        return own(hidden, *args, **kwargs) * (1 + 0.01 * len(seen))

    layer.forward = forward
    kind = LABELLED_IMAGES.of({"validation": images("vit", 2, 0)})
    with refused("block 1 returns other numbers when it is run alone"):
        verified(Checkpoint(model, CPU), kind, SCORE)


def test_ranks_and_accuracies_are_those_of_loops() -> None:
    logits = torch.tensor([[1.0, 3, 2], [2, 2, 2], [5, 1, 1], [0, 7, 7]])
    classes = torch.tensor([2, 1, 0, 2])
    ranks = class_ranks(logits, classes).tolist()
    assert ranks == [1, 1, 0, 1]
    assert [rank == 0 for rank in ranks] == (logits.argmax(1) == classes).tolist()
    assert accuracy(ranks).value == 0.25 and accuracy(ranks, 2).value == 1
    hits = [0, 0, 1, 0] * 2  # half a hit and half a miss are added
    assert accuracy(ranks).stderr == pytest.approx(np.std([*hits, 0, 1]) / 5**0.5)
    found = gain([0, 0, 1, 3], [0, 1, 0, 0])
    differences = [0, -1, 1, 1] * 2  # and half an image to each kind of pair
    assert found.value == pytest.approx(0.25)
    assert found.stderr == pytest.approx(np.std([*differences, 0, 0, 1, -1]) / 6**0.5)


# Sources


def write_idx(folder: Path, count: int = 12, seed: int = 0) -> Path:
    """Random images and labels in MNIST's format."""
    folder.mkdir(exist_ok=True)
    draw = np.random.default_rng(seed)
    x, y = draw.integers(0, 256, (count, 8, 8), np.uint8), (np.arange(count) % CLASSES).astype(np.uint8)
    for name, array, magic in (("train-images-idx3-ubyte", x, 0x803), ("train-labels-idx1-ubyte", y, 0x801)):
        head = struct.pack(f">I{array.ndim}I", magic, *array.shape)
        (folder / f"{name}.gz").write_bytes(gzip.compress(head + array.tobytes()))
    return folder / "train-images-idx3-ubyte.gz"


def test_an_idx_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = write_idx(tmp_path)
    found = pictures(ImageSet(source=f"idx:{file}"), tmp_path)
    assert found.labels == [k % CLASSES for k in range(12)]
    own = np.random.default_rng(0).integers(0, 256, (12, 8, 8), np.uint8)
    assert np.array_equal(np.asarray(found.picture(3))[:, :, 0], own[3])
    plain = tmp_path / "plain-images-idx3-ubyte"
    plain.write_bytes(gzip.decompress(file.read_bytes()))
    (tmp_path / "plain-labels-idx1-ubyte").write_bytes(
        gzip.decompress((tmp_path / "train-labels-idx1-ubyte.gz").read_bytes())
    )
    assert pictures(ImageSet(source="idx:plain-images-idx3-ubyte"), tmp_path).labels == found.labels


def png(colour: tuple[int, int, int] = (200, 10, 10), size: tuple[int, int] = (9, 7)) -> bytes:
    """An encoded picture of one colour."""
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, "PNG")
    return stream.getvalue()


def write_folder(place: Path) -> Path:
    """A folder of two classes with pictures of different colours."""
    for index, name in enumerate(("cat", "Dog")):
        for number in range(4):
            file = place / "photos" / name / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png((60 * number, 90 * index, 7)))
    return place / "photos"


def test_a_folder_of_classes_is_read_by_names(tmp_path: Path) -> None:
    write_folder(tmp_path)
    found = pictures(ImageSet(source="folder:photos"), tmp_path)
    assert len(found) == 8 and found.labels == ["Dog"] * 4 + ["cat"] * 4
    config = ViTConfig(id2label={0: "dog, domestic dog", 1: "Cat"}, label2id={"dog, domestic dog": 0, "Cat": 1})
    assert class_indices(found, ImageSet(source="folder:photos"), config) == [0] * 4 + [1] * 4
    assert class_indices(found, ImageSet(source="folder:photos"), ViTConfig(num_labels=2)) == [0] * 4 + [1] * 4


def test_a_name_of_two_classes_is_told_apart_by_its_number_or_refused() -> None:
    names = {0: "crane", 1: "tench, Tinca tinca", 2: "crane", 3: "maillot", 4: "maillot, tank suit"}
    config = ViTConfig(id2label=names, label2id={name: index for index, name in names.items()})
    wanted = ImageSet(source="hub:a/b", split="x")

    def read_as(labels: list[str | int], numbered: tuple[str, ...] = ()) -> list[int]:
        return class_indices(
            Pictures(labels, lambda index: f"row {index}", lambda index: None, names=numbered), wanted, config
        )

    assert read_as([0, 1, 2, 3, 4], tuple(names.values())) == [0, 1, 2, 3, 4]
    assert read_as(["Tinca tinca", "maillot", "tank_suit"]) == [1, 3, 4]
    assert read_as([1, 0], ("Tank suit", "tench")) == [1, 4]
    for labels, numbered in ((["crane"], ()), ([1], ("tench", "crane")), ([7], ()), (["x"], ())):
        with refused("row 0 has the class"):
            read_as(labels, numbered)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    folder = tmp_path_factory.mktemp("vit")
    names = {index: f"kind {index}" for index in range(CLASSES)}
    config = ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4,
        id2label=names, label2id={name: index for index, name in names.items()},
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    return ModelFolder(folder, "content", "vit")


def read(classifier: ModelFolder, base: Path, **more: Any) -> Any:
    return LabelledImages().read({"validation": ImageSet(**more)}, classifier, base, False)["validation"]


def test_pixels_are_those_of_the_processor(classifier: ModelFolder, tmp_path: Path) -> None:
    found = read(classifier, tmp_path, source=f"idx:{write_idx(tmp_path)}")
    processor = ImageProcessor.of(classifier.path, False).own
    all_ = pictures(ImageSet(source="idx:train-images-idx3-ubyte.gz"), tmp_path)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist()
    own = [processor(all_.picture(k), return_tensors="pt")["pixel_values"][0] for k in order]
    assert torch.equal(found.tensors[PIXELS], torch.stack([torch.as_tensor(each) for each in own]).float())
    assert found.tensors[LABELS].tolist() == [k % CLASSES for k in order]
    assert found.positions == 5
    assert found.thinned(5).tensors[LABELS].tolist() == found.tensors[LABELS][::5].tolist()


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each picture that a processor gets."""
    seen = list[int]()
    own = Pictures.picture
    monkeypatch.setattr(Pictures, "picture", lambda self, index: (seen.append(index), own(self, index))[1])
    return seen


def test_pixels_come_from_the_cache_to_the_last_bit(
    classifier: ModelFolder, tmp_path: Path, cache: Path, decoded: list[int]
) -> None:
    place = write_folder(tmp_path)
    for number, name in enumerate(("cat", "Dog")):
        (place / name).rename(place / f"kind {number}")
    first = read(classifier, tmp_path, source="folder:photos")
    again = read(classifier, tmp_path, source="folder:photos")
    assert (
        len(decoded) == 8
        and torch.equal(first.tensors[PIXELS], again.tensors[PIXELS])
        and first.content == again.content
    )
    assert [file.suffix for file in (cache / "pixels").iterdir()] == [".npy"]
    read(classifier, tmp_path, source="folder:photos", nsamples=3)  # another selection
    assert len(decoded) == 11
    (place / "kind 0" / "1.png").write_bytes(png((1, 2, 3)))  # another picture of the same name
    other = read(classifier, tmp_path, source="folder:photos")
    assert len(decoded) == 19 and not torch.equal(other.tensors[PIXELS], first.tensors[PIXELS])


@parametrize("damage", ["a bit", "the end", "all"])
def test_damaged_pixels_are_made_anew(
    damage: str, classifier: ModelFolder, tmp_path: Path, cache: Path, decoded: list[int]
) -> None:
    source = f"idx:{write_idx(tmp_path)}"
    first = read(classifier, tmp_path, source=source)
    (file,) = (cache / "pixels").iterdir()
    content = bytearray(whole := file.read_bytes())
    content[-200] ^= 1
    file.write_bytes({"a bit": bytes(content), "the end": whole[:-1], "all": b""}[damage])
    assert torch.equal(read(classifier, tmp_path, source=source).tensors[PIXELS], first.tensors[PIXELS])
    assert len(decoded) == 24 and file.read_bytes() == whole


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("no folder", {"source": "folder:nowhere"}, "source: there is no folder .*nowhere"),
    ("no pictures", {"source": "folder:empty"}, "holds no pictures in folders of classes"),
    ("a file that is no picture", {"source": "folder:broken"}, r"kind 1/0.png is no picture that can be read: unknown"),
    ("a cut picture", {"source": "folder:cut"}, r"kind 1/0.png is no picture that can be read: OSError"),
    ("a stray file", {"source": "folder:stray"}, r"notes.txt is no picture .*remove it"),
    (
        "an unknown class",
        {"source": "folder:photos"},
        r"\d.png has the class '(Dog|cat)', the model's 5 classes are kind 0",
    ),
    ("no idx file", {"source": "idx:no-images"}, "there is no file .*no-images"),
    ("a cut idx file", {"source": "idx:cut-images-idx3-ubyte"}, "is no idx file of images .*or not all of one"),
    ("a damaged gzip file", {"source": "idx:gz-images-idx3-ubyte.gz"}, "is a damaged gzip file"),
    ("other labels", {"source": "idx:lone-images-idx3-ubyte"}, "has 12 images, lone-labels-idx1-ubyte has 7 labels"),
    ("a number that no class has", {"source": "idx:high-images-idx3-ubyte"}, r"image \d+ of .* has the class 9"),
    ("too many", {"source": "idx:train-images-idx3-ubyte.gz", "nsamples": 99}, "has 12 images, 99 are asked for"),
    ("an empty part", {"source": "idx:train-images-idx3-ubyte.gz", "part": (0, 0.01)}, "has 0 images, 1 are asked"),
    ("no parquet file", {"source": "parquet:cut-images-idx3-ubyte"}, "is no parquet file"),
    (
        "another column",
        {"source": "parquet:x.parquet", "column": "img"},
        'column: .* has no "img"; it has image, label',
    ),
    ("no package", {"source": "package:no_such_module/x"}, "there is no module no_such_module"),
]


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A folder of sources that are wrong in some way, and of some that are not."""
    import pyarrow
    import pyarrow.parquet

    raw = gzip.decompress(write_idx(tmp_path).read_bytes())
    labels = gzip.decompress((tmp_path / "train-labels-idx1-ubyte.gz").read_bytes())
    write_folder(tmp_path)
    for name, content in (("broken", b"nothing"), ("cut", png()[:45])):
        (tmp_path / name / "kind 1").mkdir(parents=True)
        (tmp_path / name / "kind 1" / "0.png").write_bytes(content)
    (tmp_path / "empty").mkdir()
    (tmp_path / "stray" / "cat").mkdir(parents=True)
    (tmp_path / "stray" / "cat" / "notes.txt").write_text("x")
    (tmp_path / "cut-images-idx3-ubyte").write_bytes(raw[:-1])
    (tmp_path / "gz-images-idx3-ubyte.gz").write_bytes(gzip.compress(raw)[:-20])
    for name in ("lone", "high"):
        (tmp_path / f"{name}-images-idx3-ubyte").write_bytes(raw)
    (tmp_path / "lone-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, 7) + bytes(7))
    (tmp_path / "high-labels-idx1-ubyte").write_bytes(labels[:8] + bytes([9] * 12))
    table = pyarrow.table({"image": [{"bytes": png(), "path": None}] * 2, "label": [0, 1]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    return tmp_path


@parametrize(("settings", "expected"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_images_are_refused_in_one_line_with_their_place(
    classifier: ModelFolder, sources: Path, settings: dict[str, Any], expected: str
) -> None:
    with refused(rf"^images\.validation\..*{expected}"):
        read(classifier, sources, **settings)


def test_roles_share_no_image(classifier: ModelFolder, tmp_path: Path) -> None:
    source = f"idx:{write_idx(tmp_path)}"
    with refused(r"images\.test: image \d+ is also in images\.validation, as are \d+ oth"):
        LabelledImages().read(
            {role: ImageSet(source=source) for role in ("validation", "test")}, classifier, tmp_path, False
        )


def test_an_image_that_a_source_has_twice_is_in_one_role(classifier: ModelFolder, tmp_path: Path) -> None:
    one = write_idx(tmp_path / "one", 300, seed=1)
    other = write_idx(tmp_path / "other", 200, seed=2)
    magic = other.read_bytes()[:2]
    data = bytearray(gzip.decompress(other.read_bytes()))
    data[16 : 16 + 64] = gzip.decompress(one.read_bytes())[16 : 16 + 64]
    other.write_bytes(gzip.compress(bytes(data)))
    assert magic == b"\x1f\x8b"
    roles = {"validation": ImageSet(source=f"idx:{one}"), "test": ImageSet(source=f"idx:{other}")}
    found = LabelledImages().read(roles, classifier, tmp_path, False)
    assert [len(found[role]) for role in roles] == [300, 199]
    assert not set(found["validation"].digests()) & set(found["test"].digests())


def test_draws_that_would_be_the_same_images_are_refused(classifier: ModelFolder, tmp_path: Path) -> None:
    wanted = ImageSet(source=f"idx:{write_idx(tmp_path, 40)}", nsamples=15)
    assert len(LabelledImages().draws(wanted, 2, 0, classifier, tmp_path, False)) == 2
    with refused(r"^images.calibration.draws: 3 draws take 45 images, and the part has 40"):
        LabelledImages().draws(wanted, 3, 0, classifier, tmp_path, False)


@parametrize(("positions", "pool"), [(0, 1), (40, 8), (10_000, 20)])
def test_draws_share_no_image(positions: int, pool: int, classifier: ModelFolder, tmp_path: Path) -> None:
    """Random subsets of one part, by other seeds, shared half of their images."""
    wanted = ImageSet(source=f"idx:{write_idx(tmp_path, 40)}", nsamples=8, seed=3)
    found = LabelledImages().draws(wanted, 2, positions, classifier, tmp_path, False)
    assert [(len(items), len(each)) for items, each in found] == [(8, pool)] * 2
    one, other = ({*items.digests(), *each.digests()} for items, each in found)
    assert not one & other
    assert found[0][0].content == image_items(wanted, classifier, tmp_path).content
    if positions == 40:
        assert found[0][1].content == LabelledImages().many(wanted, 40, classifier, tmp_path, False).content


def test_a_packed_file_is_read_as_far_as_its_head_says(tmp_path: Path) -> None:
    file = tmp_path / "train-images-idx3-ubyte.gz"
    head = struct.pack(">4I", 0x803, 2, 4, 4)
    file.write_bytes(gzip.compress(head + bytes(1 << 24)))
    tracemalloc.start()
    with refused(r"is no idx file of images \(MNIST's format\), or not all of one"):
        pictures(ImageSet(source=f"idx:{file}"), tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


@parametrize("mode", ["I;16", "I", "F"])
def test_pixels_of_more_than_eight_bits_are_refused(mode: str) -> None:
    """Converted, nearly all would be white."""
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 4), 3000, {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode])).save(
        stream, "TIFF"
    )
    deep = Pictures([0], lambda index: "scan.tif", lambda index: stream.getvalue())
    with refused(r"^source: scan.tif is no picture that can be read: .*mode (I|F).* convert it"):
        deep.picture(0)


def test_a_photo_is_turned_as_its_camera_was() -> None:
    photo, stream, exif = Image.new("RGB", (6, 2)), io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    photo.save(stream, "JPEG", exif=exif)
    assert Pictures([0], lambda index: "photo", lambda index: stream.getvalue()).picture(0).size == (2, 6)


@parametrize(
    ("labels", "classes"),
    [
        ([f"LABEL_{k}" for k in range(12)], list(range(12))),
        ([str(k) for k in range(12)], list(range(12))),
        ([f"kind {chr(97 + k)}" for k in range(12)], list(range(12))),
        ([str(k) for k in range(1, 13)], "source: its classes are numbers to 12, the model's 0 to 11"),
        ([*"abcdefghijk", "A"], "source: two classes have one name but for case and spaces; rename one"),
        ([*"abcdef"], "source: has 6 classes, and the model has 12 without names; give config.json an id2label"),
    ],
)
def test_classes_of_a_model_without_names(labels: list[str], classes: Any) -> None:
    config = ViTConfig(num_labels=12)
    found = Pictures(labels, lambda index: f"row {index}", lambda index: None, classes=frozenset(labels))
    if isinstance(classes, list):
        assert class_indices(found, ImageSet(source="folder:x"), config) == classes
        return
    with refused(f"^{classes}$"):
        class_indices(found, ImageSet(source="folder:x"), config)


def test_a_processor_s_own_code_is_not_run(classifier: ModelFolder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(classifier.path, tmp_path / "evil"))
    file = folder / "preprocessor_config.json"
    names = {"image_processor_type": "Evil", "auto_map": {"AutoImageProcessor": "evil.Evil"}}
    file.write_text(json.dumps(json.loads(file.read_text()) | names))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    with refused(r"^source: the image processor of the model in .* cannot be loaded: "):
        ImageProcessor.of(folder, False)
    assert not (tmp_path / "ran").exists()


@slow
def test_a_dataset_of_the_hub_is_read_by_the_names_of_its_classes(
    hub: tuple[Path, list[str]], classifier: ModelFolder, tmp_path: Path
) -> None:
    import datasets

    folder = hub[0] / "datasets/org/photos"
    folder.mkdir(parents=True)
    names = [f"kind {index}" for index in reversed(range(CLASSES))]
    features = datasets.Features({"image": datasets.Image(), "kind": datasets.ClassLabel(names=names)})
    rows = {"image": [{"bytes": png((40 * n, 9, 9)), "path": None} for n in range(5)], "kind": [0, 1, 2, 3, 4]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "train-00000-of-00001.parquet")
    found = read(classifier, tmp_path, source="hub:org/photos", split="train", label="kind")
    order = torch.randperm(5, generator=torch.Generator().manual_seed(0)).tolist()
    assert found.tensors[LABELS].tolist() == [CLASSES - 1 - k for k in order]
    own = ImageProcessor.of(classifier.path, False).own(
        Image.open(io.BytesIO(png((40 * order[0], 9, 9)))), return_tensors="pt"
    )
    assert torch.equal(found.tensors[PIXELS][0], torch.as_tensor(own["pixel_values"])[0].float())
    with refused(r'label: hub:org/photos has no "label"; it has image, kind'):
        read(classifier, tmp_path, source="hub:org/photos", split="train")
    with refused("the hub shows you no dataset org/none"):
        read(classifier, tmp_path, source="hub:org/none", split="train")
