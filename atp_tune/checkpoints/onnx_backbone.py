"""Converts a DINOv2 backbone from the ONNX graph of a wheel to a folder of safetensors.

PyTorch's exporter keeps the names of most parameters, here those of transformers 4 after `backbone.`. It stores the
weight of a linear transposed, as a nameless initializer of its MatMul node, whose name tells the module; and it splits
the position embeddings into that of the class token and those of the patches, [1, 1, width] and [1, patches, width].
"""

import json
import math
import re
from pathlib import Path
from typing import Any

from atp_tune.cache import sha256_of
from atp_tune.checkpoints.convert import ORIGIN, written_folder
from atp_tune.errors import UserError
from atp_tune.extras import require

PREFIX = "backbone."
HEAD = 64  # width of an attention head of every DINOv2
RENAMED = {  # names of transformers 4 → 5
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet, by which DINOv2's images are normalised


def onnx_to_folder(file: Path, target: Path) -> None:
    """Converts the DINOv2 in an ONNX file to the folder `target`; UserError if it holds none, or not all of it."""
    require("images", "model.source", "onnx")
    with written_folder(file, target) as folder:
        import torch
        from torch import nn
        from transformers import BitImageProcessorPil, Dinov2Model

        tensors = _tensors(file)
        model = Dinov2Model(_config(tensors, file))
        missing, unknown = model.load_state_dict(tensors, strict=False)
        if unknown or set(missing) != {"embeddings.mask_token"}:
            raise UserError(f"model.source: {file.name} holds another model than DINOv2: {[*unknown, *missing][0]}")
        model.embeddings.mask_token = nn.Parameter(torch.zeros(1, model.config.hidden_size))  # used in training only
        model.save_pretrained(folder)
        BitImageProcessorPil(
            size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}, image_mean=MEAN, image_std=STD
        ).save_pretrained(folder)
        (folder / ORIGIN).write_text(json.dumps({"file": file.name, "sha256": sha256_of(file)}))


def _tensors(file: Path) -> dict[str, Any]:
    """The parameters of the backbone by the names of transformers 5."""
    import onnx
    import torch
    from onnx import numpy_helper

    graph = onnx.load(str(file)).graph
    known = {part.name: torch.from_numpy(numpy_helper.to_array(part).copy()) for part in graph.initializer}
    found = {_renamed(name): tensor for name, tensor in known.items() if name.startswith(PREFIX)}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in known and node.name.startswith(f"/{PREFIX[:-1]}/encoder"):
            module = node.name.strip("/").rpartition("/")[0].replace("/", ".")
            found[_renamed(f"{module}.weight")] = known[node.input[1]].T.contiguous()
    width = found["embeddings.cls_token"].shape[-1]
    parts = [tensor for name, tensor in known.items() if name.startswith("onnx::") and _are_positions(tensor, width)]
    parts.sort(key=len_of_positions)
    found["embeddings.position_embeddings"] = torch.cat(parts, 1)
    return found


def _renamed(name: str) -> str:
    name = name.removeprefix(PREFIX)
    for former, present in RENAMED.items():
        name = name.replace(former, present)
    return name


def _are_positions(tensor: Any, width: int) -> bool:
    return tensor.dim() == 3 and len(tensor) == 1 and tensor.shape[2] == width


def len_of_positions(tensor: Any) -> int:
    """Number of positions of embeddings [1, positions, width]."""
    return int(tensor.shape[1])


def _config(tensors: dict[str, Any], file: Path) -> Any:
    """The config that the shapes of the tensors tell."""
    from transformers import Dinov2Config

    layers = {int(found[1]) for name in tensors if (found := re.match(r"encoder\.layer\.(\d+)\.", name))}
    width, _, _, patch = tensors["embeddings.patch_embeddings.projection.weight"].shape
    side = math.isqrt(len_of_positions(tensors["embeddings.position_embeddings"]) - 1)
    inner = len(tensors["encoder.layer.0.mlp.fc1.weight"])
    if width % HEAD or inner % width:
        raise UserError(f"model.source: {file.name} holds another model than DINOv2, of width {width}")
    return Dinov2Config(
        hidden_size=width, num_hidden_layers=len(layers), num_attention_heads=width // HEAD, mlp_ratio=inner // width,
        image_size=side * patch, patch_size=patch, architectures=["Dinov2Model"],
    )  # fmt: skip
