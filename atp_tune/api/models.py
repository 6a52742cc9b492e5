"""Models of plans and configurations, in memory and in folders."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from atp_tune.api.lender import Lender
from atp_tune.cache import cache_dir, temporary_folder
from atp_tune.checkpoints.blocks import reads_images
from atp_tune.checkpoints.devices import find_device
from atp_tune.checkpoints.models import ModelFolder, resolve
from atp_tune.errors import UserError
from atp_tune.events import Place, TrialStarted
from atp_tune.measures import Perplexity
from atp_tune.paths import check_writable
from atp_tune.plan import Plan
from atp_tune.run.session import Session, Setup
from atp_tune.sparse.applying import PLAIN, Way, apply, plan_of
from atp_tune.sparse.card import Dense, amend, describe
from atp_tune.sparse.finetuning import apply_trained
from atp_tune.sparse.provenance import ABOUT
from atp_tune.spec.config import Config, read_config
from atp_tune.spec.study import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def pruned(config: Config, place: Place, lender: Lender) -> "PreTrainedModel":
    """The model of a configuration in memory."""
    if config.is_trained:
        # The same of a configuration whose kept weights are trained, through a folder that is removed.
        with temporary_folder(cache_dir("recovered") / "model") as temporary:
            folder = temporary / "trained"
            save(config, folder, place, lender)
            model = config.model.model(place.allowed).model_copy(
                update={"source": str(folder), "revision": None, "sha256": None, "offload": "none"}
            )
            where = find_device(place.device if lender.model is None else str(lender.model.device))
            checkpoint = resolve(model, Path()).checkpoint(model, where)
            linears = [(i, linear) for i, each in enumerate(checkpoint.linears) for linear in each]
            keys = [checkpoint.key(i, linear) for i, linear in linears]
            weights = {key: checkpoint.model.get_parameter(key).detach().cpu() for key in keys}
            loaded = None if lender.model is not None else checkpoint.take_model()
            return copied(lender.model, weights) if loaded is None else replaced(loaded, weights)
    texts = {"calibration": config.calibration}
    with lent_as(config, lender, place) as there, Session.open(Setup.of_config(config, texts, there)) as context:
        weights = weights_of(context, plan_of(config, context))
        loaded = None if lender.model is not None else context.checkpoint.take_model()
    return copied(lender.model, weights) if loaded is None else replaced(loaded, weights)


def save(
    config: Config,
    out: Path,
    place: Place,
    lender: Lender,
    way: Way = PLAIN,
    dtype: str | None = None,
) -> Perplexity:
    """Writes the sparse checkpoint of a configuration, and returns its perplexity on the test text.

    `way`: as of `apply`, `dtype`: as of `write_sparse`; not used where the kept weights are trained, as a
    configuration may say.
    """
    with in_folder(config, lender, place, out.parent) as (of_folder, there, dense):
        trained = None
        if config.trained is not None:
            trained = apply_trained(of_folder, config.trained.settings, out, there).record
            measured = trained.after
        else:
            way = replace(way, write=partial(way.write, dtype=dtype))
            measured = apply(of_folder, out, there, way)
        if dense is not None:
            about = read_config(out / ABOUT).model_copy(update={"model": config.model})
            describe(out, about, Dense(dense.path, None, reads_images(dense.path)))
            if trained is not None:
                amend(out, trained)
        return measured


@contextmanager
def in_folder(
    config: Config, lender: Lender, place: Place, parent: Path
) -> Iterator[tuple[Config, Place, ModelFolder | None]]:
    """The configuration with a model on the disk, where to work, and the folder of a model in memory.

    Such a model is written, dense, to a temporary folder in `parent`; None for others.
    """
    with lent_as(config, lender, place) as there:
        if lender.model is None:
            yield config, there, None
            return
        size = sum(parameter.nbytes for parameter in lender.model.parameters())
        check_writable(parent / ABOUT, 2 * size, "a folder in ")  # dense and sparse
        with temporary_folder(parent / "atp_tune") as folder:
            dense = _saved(lender, folder)
            model = config.model.model_copy(update={"id": str(folder), "fingerprint": dense.content})
            yield config.model_copy(update={"model": model}), there, dense


@contextmanager
def lent_as(config: Config, lender: Lender, place: Place) -> Iterator[Place]:
    """Lends the model of a configuration, and yields where to work: on the device of a model in memory.

    UserError if what is lent is not the configuration's model.
    """
    with lender.lend() as sources:
        check_same(config, sources.model)
        yield replace(place, device=sources.device or place.device)


def check_same(config: Config, lent: str | None) -> None:
    """UserError if another model is lent than the configuration's, by the content of its weights."""
    if lent is not None and config.model.id != lent:
        raise UserError("model: its weights or its config have changed since the study measured it; give it as it was")


def _saved(lender: Lender, folder: Path) -> ModelFolder:
    """The model of a lender as a folder; UserError if transformers reads it back with other weights."""
    lender.model.save_pretrained(folder)
    lender.tokenizer.save_pretrained(folder)
    return resolve(ModelConfig(source=str(folder)), Path())


@contextmanager
def of_one_text() -> Iterator[None]:
    """Calls the one text of a call `texts` in errors, which a study calls its calibration text."""
    try:
        yield
    except UserError as error:
        key = error.key.replace("texts.calibration", "texts").removesuffix(".source")
        raise UserError(f"{key}: {error.what}" if key else error.what) from None


def weights_of(context: Session, plan: Plan) -> dict[str, Tensor]:
    """The pruned weights by parameter of the model, in host memory."""
    context.watch(TrialStarted("pruning", plan))
    checkpoint, found = context.checkpoint, {}
    for block in context.prune(plan):
        for linear in checkpoint.linears[block.index]:
            found[checkpoint.key(block.index, linear)] = block.weights[linear.key].cpu()
    context.folder.check_unchanged()
    return found


@torch.no_grad()
def written(model: Any, weights: Mapping[str, Tensor]) -> "PreTrainedModel":
    """The model itself, with pruned weights written into its parameters."""
    for name, weight in weights.items():
        model.get_parameter(name).copy_(weight)
    found: PreTrainedModel = model
    return found


@torch.no_grad()
def copied(model: Any, weights: Mapping[str, Tensor]) -> "PreTrainedModel":
    """A copy of the model; the dense weights that are replaced are never copied."""
    known: dict[int, Any] = {}
    for name, weight in weights.items():
        parameter = model.get_parameter(name)
        own = torch.empty_like(parameter).copy_(weight)
        known[id(parameter)] = nn.Parameter(own, requires_grad=parameter.requires_grad)
    found: PreTrainedModel = copy.deepcopy(model, known)
    return found


@torch.no_grad()
def replaced(model: Any, weights: Mapping[str, Tensor]) -> "PreTrainedModel":
    """The model, which was loaded for this call, with other tensors: the loaded ones may be mapped files."""
    for name, weight in weights.items():
        parameter = model.get_parameter(name)
        parameter.data = torch.empty_like(weight, device=parameter.device).copy_(weight)
    found: PreTrainedModel = model.requires_grad_(True)
    return found
