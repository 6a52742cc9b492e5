"""Packed folders as models whose linears stay packed, for commands that run a model as a whole."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.utils import logging as hf_logging

from atp_tune.checkpoints.convert import one_line
from atp_tune.checkpoints.devices import is_out_of_memory
from atp_tune.checkpoints.trust import read_table
from atp_tune.checkpoints.unpacking import is_packed
from atp_tune.errors import UserError
from atp_tune.packed.kernel import kernel_name
from atp_tune.packed.modeling_atp_sparse import checked_table


def is_fast(device: torch.device) -> bool:
    """Whether packed weights are known to be faster than dense ones on a device."""
    return device.type == "cpu" and kernel_name() is not None


def stays_packed(folder: Path, device: torch.device) -> bool:
    """Whether a folder is a packed one that is not to be unpacked."""
    return is_packed(folder) and is_fast(device)


def load_packed(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The model of a packed folder in host memory; UserError if transformers cannot load it."""
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        kind: Any = getattr(transformers, checked_table(read_table(folder / "config.json"))["class"])
        model: nn.Module = kind.from_pretrained(folder, dtype=dtype, local_files_only=True)
    except Exception as error:  # parsers of unknown files raise many types
        if is_out_of_memory(error):
            raise
        raise UserError(f"model {folder}: transformers cannot load it: {one_line(error)}") from error
    return model.eval()
