"""Which class of transformers holds a folder's model, and which part of it is pruned.

A model that reads images beside text is a language model with towers in front of it. It is its language model that is
pruned, measured on texts; towers and projectors stay as they are. Folders say which of the two they hold by the class
that they were saved from, since one type may have both.
"""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto import modeling_auto

from atp_tune.checkpoints.convert import one_line
from atp_tune.checkpoints.trust import read_table
from atp_tune.errors import UserError


def auto_class(folder: Path) -> Any:
    """The class whose `from_pretrained` loads a folder: of language models, or of those that read images too."""
    return AutoModelForImageTextToText if reads_images(folder) else AutoModelForCausalLM


def model_config(folder: Path, trusted: bool) -> Any:
    """What transformers makes of a folder's config.json; UserError where it cannot. `trusted`: its code may run."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trusted, local_files_only=True)
    except Exception as error:  # whatever the many configurations raise
        raise UserError(f"model {folder}: transformers cannot read its config.json: {one_line(error)}") from error


def check_known(model: nn.Module, highest: int, what: str) -> None:
    """UserError if a text has a token that a model does not know: its tokenizer is of another model."""
    embeddings: Any = model
    known = len(embeddings.get_input_embeddings().weight)
    if highest >= known:
        raise UserError(
            f"{what}: the tokenizer makes token {highest} of it, the model knows {known}; take the model's own"
        )


def reads_images(folder: Path) -> bool:
    """Whether a folder's model was saved as one that reads images beside text and that transformers knows."""
    file = folder / "config.json"
    config = read_table(file) if file.is_file() else {}
    kind = str(config.get("model_type"))
    name = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(kind)
    if name is None or "auto_map" in config:
        return False
    return kind not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or config.get("architectures") == [name]


def language_model(model: nn.Module) -> nn.Module:
    """The part of a model in which blocks are looked for: all of it, if it has no towers."""
    config: Any = getattr(model, "config", None)
    find: Any = getattr(model, "get_decoder", None)
    if config is None or find is None or config.get_text_config() is config:
        return model
    return find() or model
