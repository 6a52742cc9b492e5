"""The two models that are compared: a sparse folder and the dense one that it was made of."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from atp_tune.applying import write_applied
from atp_tune.cache import cache_dir, sha256_of_json
from atp_tune.card import ABOUT
from atp_tune.checkpoint import Checkpoint
from atp_tune.config import Config, read_config
from atp_tune.errors import UserError
from atp_tune.events import Note, Watch
from atp_tune.models import ModelFolder, resolve
from atp_tune.speed.result import Side

DECIDES = (
    "model", "pruner", "prune", "allocation", "block_sparsities", "linear_sparsities", "calibration"
)  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """The configuration, the file that holds it, and both folders."""

    config: Config
    path: Path
    dense: ModelFolder
    sparse: Path

    def load(self, side: Side, dtype: torch.dtype, device: torch.device) -> Checkpoint:
        """One of the models, whole on the device."""
        folder = self.dense.path if side == "dense" else self.sparse
        return Checkpoint.load(folder, dtype, device, self.dense.trusted, "device")


def of_config(path: Path, device: str, watch: Watch, allowed: Mapping[str, bool]) -> Pair:
    """The sparse model is pruned as `apply` does, once, into the cache."""
    config = read_config(path)
    base = path.parent / config.folder
    dense = _dense(config, base, watch, allowed)
    name = sha256_of_json([config.model_dump(mode="json", include=set(DECIDES)), dense.content])
    sparse = cache_dir("sparse") / name
    if not sparse.is_dir():
        watch(Note(f"pruning once, into {sparse}"))
        write_applied(config, base, sparse, device, watch, allowed)
    return Pair(config, path, dense, sparse)


def of_folder(folder: Path, watch: Watch, allowed: Mapping[str, bool]) -> Pair:
    """A folder that `apply` or `prune` wrote; UserError if it does not say what it was made of."""
    path = folder / ABOUT
    if not path.is_file():
        raise UserError(f"--model {folder}: has no {ABOUT}; give a folder that `apply` wrote, or --config FILE")
    config = read_config(path)
    return Pair(config, path, _dense(config, folder / config.folder, watch, allowed), folder)


def _dense(config: Config, base: Path, watch: Watch, allowed: Mapping[str, bool]) -> ModelFolder:
    dense = resolve(config.model.model(allowed), base, lambda text: watch(Note(text)))
    if dense.content != config.model.fingerprint:
        raise UserError(
            f"model.fingerprint: {config.model.id} is {dense.content[:12]}… here, the configuration was found for "
            f"{config.model.fingerprint[:12]}…; give it the model of the study"
        )
    return dense
