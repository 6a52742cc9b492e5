"""Tiny random image classifiers of the families that are replayed to the last bit, and images for them."""

from pathlib import Path
from typing import Any

import torch
import transformers
from families import CPU
from torch import nn

from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.models import ModelFolder
from atp_tune.config.prune import PruneConfig
from atp_tune.events import ignore_events
from atp_tune.inputs.items import LABELS, PIXELS, Items
from atp_tune.run.session import Session

SIZE, CLASSES = 32, 5
PLAIN: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": SIZE,
    "patch_size": 8,
}  # fmt: skip
STAGES: dict[str, Any] = {"image_size": SIZE, "patch_size": 2, "embed_dim": 16, "depths": [1, 2, 1]}
PYRAMID: dict[str, Any] = {
    "num_encoder_blocks": 3, "depths": [1, 2, 1], "sr_ratios": [4, 2, 1], "hidden_sizes": [16, 24, 32],
    "num_attention_heads": [1, 2, 4], "mlp_ratios": [2, 2, 2],
}  # fmt: skip
TOWER: dict[str, Any] = {"vision_config": PLAIN, "text_config": {"hidden_size": 16, "num_hidden_layers": 1}}
FAMILIES: dict[str, tuple[str, str, dict[str, Any], int]] = {  # config, model, its settings, number of blocks
    "vit": ("ViTConfig", "ViTForImageClassification", PLAIN, 3),
    "vit-msn": ("ViTMSNConfig", "ViTMSNForImageClassification", PLAIN, 3),
    "deit": ("DeiTConfig", "DeiTForImageClassification", PLAIN, 3),
    "deit-teacher": ("DeiTConfig", "DeiTForImageClassificationWithTeacher", PLAIN, 3),
    "beit": ("BeitConfig", "BeitForImageClassification", {**PLAIN, "use_relative_position_bias": True}, 3),
    "data2vec": ("Data2VecVisionConfig", "Data2VecVisionForImageClassification", PLAIN, 3),
    "dinov2": ("Dinov2Config", "Dinov2ForImageClassification", PLAIN, 3),
    "dinov2-swiglu": ("Dinov2Config", "Dinov2ForImageClassification", {**PLAIN, "use_swiglu_ffn": True}, 3),
    "dinov2-registers": (
        "Dinov2WithRegistersConfig", "Dinov2WithRegistersForImageClassification", {**PLAIN, "num_register_tokens": 3}, 3
    ),
    "clip": ("CLIPConfig", "CLIPForImageClassification", TOWER, 3),
    "siglip": ("SiglipConfig", "SiglipForImageClassification", TOWER, 3),
    "convnext": (
        "ConvNextConfig", "ConvNextForImageClassification",
        {"depths": [1, 2, 1], "hidden_sizes": [16, 24, 32], "num_stages": 3, "patch_size": 2}, 4
    ),
    "convnextv2": (
        "ConvNextV2Config", "ConvNextV2ForImageClassification",
        {"depths": [1, 2, 1], "hidden_sizes": [16, 24, 32], "num_stages": 3, "patch_size": 2}, 4
    ),
    "swin": (
        "SwinConfig", "SwinForImageClassification", {**STAGES, "num_heads": [1, 2, 4], "window_size": 4}, 4
    ),
    "swinv2": (
        "Swinv2Config", "Swinv2ForImageClassification", {**STAGES, "num_heads": [1, 2, 4], "window_size": 4}, 4
    ),
    "hiera": (
        "HieraConfig", "HieraForImageClassification",
        {
            "image_size": [SIZE, SIZE], "embed_dim": 16, "depths": [1, 2, 1], "num_heads": [1, 2, 4],
            "patch_size": [7, 7], "patch_stride": [4, 4], "patch_padding": [3, 3], "masked_unit_size": [4, 4],
            "masked_unit_attention": [True, True, False], "num_query_pool": 2, "query_stride": [2, 2],
        }, 4
    ),
    "levit": (
        "LevitConfig", "LevitForImageClassification",
        {
            "image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 3, 4], "depths": [1, 2, 1],
            "key_dim": [8, 8, 8], "mlp_ratio": [2, 2, 2], "attention_ratio": [2, 2, 2],
            "down_ops": [["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 3, 4, 2, 2]],
        }, 0
    ),
    "pvt": (
        "PvtConfig", "PvtForImageClassification",
        {
            **PYRAMID, "image_size": SIZE, "patch_sizes": [4, 2, 2], "strides": [4, 2, 2],
            "sequence_reduction_ratios": [4, 2, 1],
        }, 4
    ),
    "pvtv2": (
        "PvtV2Config", "PvtV2ForImageClassification",
        {**PYRAMID, "image_size": SIZE, "num_encoder_blocks": 3, "patch_sizes": [7, 3, 3], "strides": [4, 2, 2]}, 4
    ),
    "segformer": (
        "SegformerConfig", "SegformerForImageClassification",
        {**PYRAMID, "patch_sizes": [7, 3, 3], "strides": [4, 2, 2]}, 4
    ),
    "focalnet": (
        "FocalNetConfig", "FocalNetForImageClassification",
        {
            "image_size": SIZE, "patch_size": 2, "embed_dim": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 2, 1],
            "focal_levels": [2, 2, 2], "focal_windows": [3, 3, 3],
        }, 4
    ),
}  # fmt: skip


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
    settings = PruneConfig.model_validate(prune)
    return Session(folder, checkpoint, items, settings, ignore_events, inputs="images", score="classes")


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
