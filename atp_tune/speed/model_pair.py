"""The two models to compare: a sparse checkpoint and its dense model."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from atp_tune.cache import cache_dir, folder_atomically, temporary_folder
from atp_tune.cache_keys import key
from atp_tune.checkpoints.blocks import classifies_images
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.convert import is_packed
from atp_tune.checkpoints.devices import arithmetic, find_device, find_dtype
from atp_tune.checkpoints.files import check_claims
from atp_tune.checkpoints.models import ModelFolder, check_files, resolve
from atp_tune.errors import UserError
from atp_tune.events import Place
from atp_tune.inputs import KINDS
from atp_tune.metrics.speed import Side
from atp_tune.run.session import Setup
from atp_tune.sparse.applying import PLAIN, check_model, write_applied
from atp_tune.sparse.provenance import ABOUT
from atp_tune.sparse.slim import SLIM
from atp_tune.spec.config import Config
from atp_tune.spec.patterns import parse
from atp_tune.spec.study import ModelConfig


@dataclass(frozen=True)
class Pair:
    """Both folders, the pattern of zeros, and whether the dense model's own code may run."""

    dense: Path
    sparse: Path
    pattern: str = "unstructured"
    trusted: bool = False

    @property
    def of_images(self) -> bool:
        """Whether the models are image classifiers."""
        return classifies_images(self.dense)

    def load(self, side: Side, dtype: torch.dtype, device: torch.device) -> Checkpoint:
        """Loads one of the models, whole on the device."""
        return Checkpoint.load(
            self.dense if side == "dense" else self.sparse, dtype, device, self.trusted, offload="none"
        )


def about(folder: Path) -> Path:
    """The path of the configuration in a sparse checkpoint; UserError if it has none."""
    path = folder / ABOUT
    if not path.is_file():
        raise UserError(f"{folder}: has no {ABOUT}; give a folder that `apply` wrote, or --config FILE")
    return path


def find_pair(config: Config, sparse: Path | None, place: Place, passing: Path | None = None) -> Pair:
    """The dense model of a configuration, and its sparse model.

    If `sparse` is None, the sparse model is pruned into the cache, as `apply` does, or into the folder `passing`,
    unless the cache has it; one of pruned channels is slim.
    UserError if the dense model is not the configuration's.
    """
    if config.by_bits:
        raise UserError(
            "speedup: weights are rounded, and run as floats, as fast as the dense model's; "
            "`export` writes recipes for engines that compute with bits"
        )
    dense = resolve(config.model.model(place.allowed), place.base, place.note)
    check_model(config, dense)
    if sparse is not None and is_packed(sparse):
        sparse = resolve(ModelConfig(source=str(sparse.absolute())), place.base, place.note).path
    elif sparse is not None:
        check_files(sparse)
        check_claims(sparse)
    else:
        known = _cached(config, dense, place)
        sparse = known if passing is None or known.is_dir() else passing
        if not sparse.is_dir():
            way = SLIM if parse(config.prune.pattern).channels else PLAIN
            with folder_atomically(sparse, shared=True) as folder:
                write_applied(config, folder, place, way)
    return Pair(dense.path, sparse, config.prune.pattern, dense.trusted)


@contextmanager
def passing_pair(config: Config, place: Place) -> Iterator[Pair]:
    """The pair of a configuration; what this writes is removed at the end, and no other process reads it."""
    with temporary_folder(cache_dir("sparse") / "passing") as folder:
        yield find_pair(config, None, place, folder / "sparse")


def _cached(config: Config, dense: ModelFolder, place: Place) -> Path:
    """The folder in the cache of a configuration's sparse model."""
    setup = Setup.of_config(config, {"calibration": config.calibration}, place)
    items = KINDS[setup.inputs].read(setup.texts, dense, place.base, bool(setup.bos))
    device = find_device(place.device)
    own = key(
        "sparse",
        config=config.made_of,
        batches=dict(config.batches),
        text=items["calibration"].content,
        arithmetic=arithmetic(device, find_dtype(config.model.dtype, device)),
    )
    return cache_dir("sparse") / own
