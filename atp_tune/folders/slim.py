"""Writes a slim folder: a checkpoint whose channels are gone, not zero, so that it is smaller and
usually faster.

    masked folder  →  rows of writers and columns of readers cut  →  checked against the masked model  →  slim folder

Blocks of equal widths make an ordinary folder of the family, if a few numbers in its config say all of them; else the
folder has a model type and a modelling file of its own (`packed.modeling_atp_sparse`). A slim model that does not
compute what the masked one computes, with and without cached keys and values, is not written. One shard at a time is in
memory.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from atp_tune.allocations.channels import ChannelSet
from atp_tune.blocks.replay import Replay
from atp_tune.checkpoints.blocks import auto_class, classifies_images, model_config, reads_images
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.convert import as_user_error, quiet
from atp_tune.checkpoints.devices import device_name, free_memory, host_memory
from atp_tune.checkpoints.files import CODE, FITS, Table, is_slim, read_headers, read_table, write_table
from atp_tune.config.best import Config, read_config
from atp_tune.config.prune import parse
from atp_tune.errors import UserError
from atp_tune.events import Message, TrialStarted
from atp_tune.folders.applying import (
    CONFIG,
    SOURCE,
    Way,
    bring_own_code,
    rewrite,
    say_size,
    sparse_folder,
    write_sparse,
)
from atp_tune.folders.card import ABOUT, describe, new_manifest
from atp_tune.folders.packing import check_class, empty_model
from atp_tune.packed.modeling_atp_sparse import LANGUAGE, VERSION
from atp_tune.packed.modeling_atp_sparse import SLIM as MODEL_TYPE
from atp_tune.plan import Plan
from atp_tune.run.session import Session
from atp_tune.utils.cache import temporary_folder
from atp_tune.utils.system import check_free

# --- Compares a slim model with the masked one, which has zeros in the place of the channels that are gone.
#
# Both compute the logits of a small batch from their folders, in float32 if that fits into memory: the weights are the
# same numbers in both, so that only the order of sums differs. In 16 bits it would hide a difference of some per cent.

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-3}  # relative difference of logits, by dtype
LOOSE = 0.05  # of others
POSITIONS = 12  # of the batch that both models compute


@torch.inference_mode()
def check_equal(context: Session, masked: Path, slim: Path) -> None:
    """UserError if the slim model's logits, with and without a cache, differ from those of the masked model.

    A message says what could not be compared, or not closely.
    """
    checkpoint, has_cache = context.checkpoint, not classifies_images(slim)
    dtype = checkpoint.dtype
    if dtype not in TOLERANCES:  # of 16 bits
        size = 4 * sum(parameter.numel() for parameter in checkpoint.model.parameters())
        if size <= FITS * min(free_memory(checkpoint.device), host_memory()):
            dtype = torch.float32
        else:
            closeness = f"compared in {context.dtype}, where {LOOSE:.0%} of difference passes"
            context.watch(Message(f"--slim: float32 does not fit into memory: {closeness}"))
    expected = _logits(context, masked, dtype)[0]
    logits, cached, reason = _logits(context, slim, dtype, has_cache)
    if cached is None and has_cache:
        context.watch(Message(f"--slim: not compared with cached keys and values: {reason}"))
    for what, output in (("without", logits), ("with", cached)):
        if output is None:
            continue
        difference = float((output.double() - expected.double()).norm() / expected.double().norm())
        if not difference <= TOLERANCES.get(dtype, LOOSE):
            raise UserError(
                f"--slim: {type(checkpoint.model).__name__} computes other logits once its channels are cut "
                f"({what} cached keys: {difference:.2g} apart); `apply` without --slim writes it"
            )


def _logits(
    context: Session, folder: Path, dtype: torch.dtype, cached: bool = False
) -> tuple[Tensor, Tensor | None, str]:
    """Logits of a folder's model for a small batch, and if `cached` also with cached keys, or the reason for none."""
    wrong, device = as_user_error("--slim: this model cannot run with fewer channels"), context.checkpoint.device
    with wrong, quiet("transformers"), Checkpoint.load(folder, dtype, device) as checkpoint:
        replay = Replay(checkpoint, context.inputs)
        _, batch, _ = context.inputs.examples(checkpoint, 1, POSITIONS)
        if checkpoint.offload != "none":
            hidden = replay.embed(batch)
            for index in range(len(checkpoint.blocks)):
                hidden = replay.run(index, checkpoint.weights(index), hidden)
            return replay.logits(batch, hidden).cpu(), None, "the blocks are copied to the device one by one"
        logits, model = replay.forward(batch).logits.cpu(), checkpoint.model
        if not cached:
            return logits, None, ""
        # Half of the tokens first, the others after their cached keys and values.
        half = batch.shape[1] // 2
        first = model(batch[:, :half], use_cache=True)
        if getattr(first, "past_key_values", None) is None:
            return logits, None, "the model keeps none"
        second = model(batch[:, half:], past_key_values=first.past_key_values, use_cache=True)
        return logits, torch.cat([first.logits, second.logits], 1).cpu(), ""


OWN_CODE = "--slim: a model with code of its own cannot be slim; `apply` without --slim writes it"


@dataclass
class Cut:
    """The rows (`dim` 0) or the columns (1) of a linear that stay, by index; `shape` [out, in] after the cut."""

    dim: int
    indices: Tensor
    transposed: bool
    shape: list[int]

    def of(self, stored: Tensor) -> Tensor:
        """The weight, or the bias, as stored, after the cut."""
        if self.dim == stored.dim():  # the columns of a bias
            return stored
        return stored.index_select(1 - self.dim if self.transposed and stored.dim() > 1 else self.dim, self.indices)


def check_pattern(config: Config) -> None:
    """UserError if a configuration prunes no channels; called before a model is loaded."""
    if not parse(config.prune.pattern).channels:
        raise UserError(
            f'--slim: only whole channels can be cut, and prune.pattern is "{config.prune.pattern}"; '
            "`--packed` makes a folder without single zeros"
        )


def check_slim(folder: Path) -> None:
    """UserError if the model in a folder cannot lose channels."""
    if reads_images(folder):
        raise UserError("--slim: a model that also reads images cannot be slim yet; `apply` without --slim writes it")
    check_class(folder, "--slim")


def write_slim(context: Session, plan: Plan, out: Path, config: Config, dtype: str | None = SOURCE) -> None:
    """Prunes and writes the slim folder `out`, with its configuration. UserError, and no folder, if it is not exact."""
    check_pattern(config)
    check_slim(context.folder.path)
    check_free(out)
    cuts = _Cuts(context)
    with temporary_folder(out) as scratch:
        masked = scratch / "masked"
        write_sparse(context, plan, masked, config, cuts.add, dtype=dtype)
        context.watch(TrialStarted(f"cutting {out}", None))
        with sparse_folder(masked, out) as folder:
            linears = cuts.tensors(masked)
            for file in sorted(masked.glob("*.safetensors")):
                rewrite(file, folder / file.name, lambda name, x: {name: linears[name].of(x) if name in linears else x})
            say_size(folder)
            # Writes the config of an ordinary folder if one says all widths, else that of a slim one, and its code.
            table = read_table(folder / CONFIG)
            wanted = {name: cut.shape for name, cut in cuts.linears.items()}
            plain = _plain_config(folder, table, cuts) if wanted else table
            if plain is None:
                if context.folder.trusted and not is_slim(folder) and any(folder.glob(CODE)):
                    raise UserError(OWN_CODE)
                plain = table | _slim_keys(table, wanted, auto_class(folder).__name__)
            write_table(folder / CONFIG, plain)
            if is_slim(folder):
                bring_own_code(folder)
            check_equal(context, masked, folder)
            manifest = new_manifest(folder, device_name(context.checkpoint.device))
            describe(folder, read_config(masked / ABOUT).model_copy(update={"manifest": manifest, "slim": True}))


SLIM = Way(write_slim, check_slim, copies=2)  # with the channels first, to be compared with


class _Cuts:
    """The cuts of each linear, gathered while the blocks are pruned."""

    def __init__(self, context: Session) -> None:
        self.checkpoint = context.checkpoint
        self.blocks = context.channels
        self.linears = dict[str, Cut]()  # by name in the model
        self.counts = list[list[tuple[ChannelSet, int]]]()  # channels that stay in each set of each block

    def add(self, index: int, masks: Mapping[str, Tensor]) -> None:
        """Takes the channels that are gone, by the linear that reads them."""
        by_name = {linear.name: linear for linear in self.checkpoint.linears[index]}
        self.counts.append([])
        for each in self.blocks[index].sets:
            mask = masks.get(each.reader)
            kept = torch.ones(each.count, dtype=torch.bool) if mask is None else ~mask.cpu()
            self.counts[-1].append((each, int(kept.sum())))
            if mask is None:
                continue
            for name, size in (*each.writers, (each.reader, each.columns)):
                linear, indices = by_name[name], kept.repeat_interleave(size).nonzero()[:, 0]
                is_reader, shape = name == each.reader, [linear.out_features, linear.in_features]
                shape[is_reader] = len(indices)
                path = f"{self.checkpoint.block_names[index]}.{name}"
                self.linears[path] = Cut(int(is_reader), indices, linear.transposed, shape)

    def tensors(self, folder: Path) -> dict[str, Cut]:
        """Cuts by the names of tensors in a folder's files; of biases only rows are cut."""
        there = read_headers(folder)
        prefix = f"{self.checkpoint.model.base_model_prefix}."
        cuts = dict[str, Cut]()
        for name, cut in self.linears.items():
            module = self.checkpoint.model.get_submodule(name)
            for end in ("weight", *(["bias"] if module.bias is not None else [])):
                saved = self.checkpoint.as_saved(f"{name}.{end}", getattr(module, end).to("meta"))
                key = next(iter(saved)) if len(saved) == 1 else ""
                keys = [other for other in (key, key.removeprefix(prefix), prefix + key) if other in there]
                if not keys:
                    raise UserError(f"--slim: {name} is stored in another form than it runs in; `apply` writes it")
                cuts[keys[0]] = cut
        return cuts


def _slim_keys(config: Table, linears: dict[str, list[int]], auto_class: str) -> Table:
    """The keys by which the config of a slim folder differs from the model's, which may be slim already."""
    if config["model_type"] == MODEL_TYPE:
        table = config[MODEL_TYPE]
        return {MODEL_TYPE: table | {"linears": table["linears"] | linears}}
    if "auto_map" in config:
        raise UserError(OWN_CODE)
    table = {"version": VERSION, "family": config["model_type"], "linears": linears}
    if auto_class != LANGUAGE:
        table["class"] = auto_class
    classes = [f"Slim{name}" for name in config.get("architectures") or ()]
    return {"model_type": MODEL_TYPE, "architectures": classes, MODEL_TYPE: table}


def _plain_config(folder: Path, config: Table, cuts: _Cuts) -> Table | None:
    """The config of the family with the widths of equal blocks; None if no numbers in it make such a model.

    A number that is the count of MLP channels may be their new one; numbers of heads scale with key/value heads.
    """
    counts = cuts.counts[0]
    if any(other != counts for other in cuts.counts) or MODEL_TYPE in config:
        return None
    choices = list[list[dict[str, int]]]()
    for each, kept in counts:
        if kept == each.count:
            continue
        if each.columns == 1:
            choices.append([{key: kept} for key, value in config.items() if type(value) is int and value == each.count])
        else:
            numbers = ((key, value) for key, value in config.items() if "head" in key and type(value) is int)
            scaled = {
                key: value * kept // each.count
                for key, value in numbers
                if "dim" not in key and value % each.count == 0
            }
            size = getattr(model_config(folder, trusted=False), "head_dim", None)
            choices.append([scaled | ({} if size is None else {"head_dim": size})])
    for changes in product(*choices):
        changed = config | {key: value for change in changes for key, value in change.items()}
        if changed != config and _makes(changed, cuts):
            return changed
    return None


def _makes(config: Table, cuts: _Cuts) -> bool:
    """Whether a config of the family makes a model of the shapes that the cuts leave."""
    with temporary_folder() as folder:
        (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
        try:
            model = empty_model(folder)
        except UserError:  # its numbers do not fit
            return False
    wanted = {name: parameter.shape for name, parameter in cuts.checkpoint.model.named_parameters()}
    for name, cut in cuts.linears.items():
        wanted[f"{name}.weight"] = torch.Size(cut.shape[::-1] if cut.transposed else cut.shape)
        if f"{name}.bias" in wanted:
            wanted[f"{name}.bias"] = torch.Size(cut.shape[:1])
    return wanted == {name: parameter.shape for name, parameter in model.named_parameters()}
