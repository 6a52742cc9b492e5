"""The class of transformers that loads a folder, and the part of the model that is pruned.

A folder holds a language model, a model that also reads images, or an image classifier.

A model that also reads images is a language model with towers. Only the language model is pruned, measured on texts.
The class that a folder was saved from tells which kind of model it holds, since one model type may have both.
"""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
)
from transformers.models.auto import modeling_auto

from atp_tune.checkpoints.convert import one_line
from atp_tune.checkpoints.trust import SLIM, read_table
from atp_tune.errors import UserError

PACKED = "atp_sparse"  # as in packed.modeling_atp_sparse, which imports more


def auto_class(folder: Path) -> Any:
    """The auto class that loads a folder: of language models, of models that also read images, of classifiers."""
    if classifies_images(folder):
        return AutoModelForImageClassification
    return AutoModelForImageTextToText if reads_images(folder) else AutoModelForCausalLM


def model_config(folder: Path, trusted: bool) -> Any:
    """The transformers config of a folder; UserError if it cannot be read. `trusted`: code in it may run."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trusted, local_files_only=True)
    except Exception as error:  # configs raise many types
        raise UserError(f"model {folder}: transformers cannot read its config.json: {one_line(error)}") from error


def width_of(config: Any, of_images: bool) -> int:
    """Width of the hidden states of the part that is pruned; of a model with stages the largest."""
    found = getattr(config, "vision_config", config) if of_images else config.get_text_config()
    names = ("hidden_sizes", "hidden_size", "embed_dim")
    widths = next((value for name in names if (value := getattr(found, name, None))), 0)
    return max(widths) if isinstance(widths, list | tuple) else int(widths)


def check_known(model: nn.Module, highest: int, what: str) -> None:
    """UserError if the highest token of a text has no embedding, so the tokenizer is of another model."""
    embeddings: Any = model
    known = len(embeddings.get_input_embeddings().weight)
    if highest >= known:
        raise UserError(
            f"{what}: the tokenizer makes token {highest} of it, the model knows {known}; take the model's own"
        )


def reads_images(folder: Path) -> bool:
    """Whether transformers loads the folder as a model that also reads images."""
    file = folder / "config.json"
    config = read_table(file) if file.is_file() else {}
    kind = str(config.get("model_type"))
    name = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(kind)
    if name is None or "auto_map" in config:
        return False
    return kind not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or config.get("architectures") == [name]


def _classifiers() -> set[str]:
    """Names of the classes of transformers that classify images."""
    found = modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values()
    return {name for names in found for name in ([names] if isinstance(names, str) else names)}


def is_image_classifier(model: nn.Module) -> bool:
    """Whether a model is an image classifier of transformers."""
    return any(kind.__name__ in _classifiers() for kind in type(model).__mro__)


def classifies_images(folder: Path) -> bool:
    """Whether a folder was saved from an image classifier of transformers, or is packed or slim from such a folder."""
    file = folder / "config.json"
    config = read_table(file) if file.is_file() else {}
    if (kind := config.get("model_type")) in (PACKED, SLIM):
        table = config.get(kind)
        return isinstance(table, dict) and table.get("class") == AutoModelForImageClassification.__name__
    names = config.get("architectures")
    return isinstance(names, list) and len(names) == 1 and names[0] in _classifiers() and "auto_map" not in config


def check_language(folder: Path, what: str) -> None:
    """UserError, which begins with `what`, if a folder holds an image classifier."""
    if classifies_images(folder):
        raise UserError(f"{what}: the model in {folder} is an image classifier, which has no text; see docs/images.md")


def language_model(model: nn.Module) -> nn.Module:
    """The part of a model that is searched for blocks: the decoder, or all of it without towers."""
    config: Any = getattr(model, "config", None)
    find: Any = getattr(model, "get_decoder", None)
    if config is None or find is None or config.get_text_config() is config:
        return model
    return find() or model


def vision_tower(model: nn.Module) -> nn.Module | None:
    """The tower of a model that reads images beside text; None if transformers knows of none."""
    find: Any = getattr(model, "get_encoder", None)
    found: nn.Module | None = None if find is None else find(modality="image")
    return None if found is None or language_model(model) in found.modules() else found
