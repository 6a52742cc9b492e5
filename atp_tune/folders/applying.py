"""Writes the sparse checkpoint of a configuration or a plan, and measures its perplexity from the folder."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from atp_tune.blocks.prune_pass import PrunedBlock
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.convert import gguf_origin, raw_bytes
from atp_tune.checkpoints.devices import DTYPES, Tensors, device_name
from atp_tune.checkpoints.files import (
    CODE,
    copy_small,
    is_slim,
    nested_configs,
    offsets,
    read_header,
    read_table,
    write_table,
)
from atp_tune.checkpoints.models import Ask, ModelFolder
from atp_tune.config.best import Config, Sparsity, read_config
from atp_tune.config.plugged import records
from atp_tune.config.studyfile import StudyFile
from atp_tune.errors import UserError
from atp_tune.events import Message, Place, TrialStarted
from atp_tune.folders.card import ABOUT, FINETUNED, describe, new_manifest
from atp_tune.measures import Perplexity, perplexity
from atp_tune.packed import modeling_atp_sparse
from atp_tune.packed.modeling_atp_sparse import SLIM, auto_map, checked_table
from atp_tune.plan import Plan
from atp_tune.run.observers import RoleScores
from atp_tune.run.session import Session, Setup
from atp_tune.scores import Scores
from atp_tune.utils.cache import folder_atomically, versions
from atp_tune.utils.system import check_free, check_writable

OnGone = Callable[[int, Mapping[str, Tensor]], None]  # index of a block, and its channels that are gone, by reader
Write = Callable[..., None]  # of context, plan, folder and configuration, as `write_sparse`
Save = Callable[[Checkpoint, PrunedBlock, str], Tensors]  # what is written of a tensor of a block, by name


CONFIG = "config.json"
SOURCE = "source"  # the number format of the dense model's files


def fit_plan(config: Config, context: Session, says_untrained: bool = False) -> Plan:
    """The plan of a configuration; UserError if the context has another model, or one that the plan does not fit.

    `says_untrained`: with a line where `apply` trains the kept weights, which here are as they were pruned.
    """
    if says_untrained and config.is_trained:
        context.watch(
            Message("the model as it was pruned: `apply` trains what is kept, and its folder goes in the place of FILE")
        )
    check_model(config, context.folder)
    plan = config.plan
    try:
        plan.check_fits(context.budget(config.target))
        if plan.by_row and not config.prune.by_rows(plan.method):
            raise ValueError(f"rows: {plan.method} does not take the lowest scores of each row; leave them out")
    except ValueError as error:
        raise UserError(f"plan.{error}; take the file that a study or `export` wrote") from None
    return plan


def check_model(config: Config, folder: ModelFolder) -> None:
    """UserError if a folder does not hold the model of a configuration."""
    if folder.content != config.model.fingerprint:
        raise UserError(
            f"model.fingerprint: {config.model.id} is {folder.content[:12]}… here, the configuration was found for "
            f"{config.model.fingerprint[:12]}…; give it the model of the study"
        )


def plan_config(file: StudyFile, context: Session, plan: Plan) -> Config:
    """The configuration of a plan, without measurements."""
    study, checkpoint = file.study, context.checkpoint
    effective = None
    if study.by_bits and not plan.outer:  # else the zeros, or embedding and head, are not counted yet
        total = sum(
            study.quantize.stored_bits(x.out_features, x.in_features, level.width)
            for index, linears in enumerate(checkpoint.linears)
            for x, level in zip(linears, plan.of(index, len(linears)), strict=True)
        )
        effective = total / sum(checkpoint.sizes)
    return Config.of_study(
        study, plan, {"fingerprint": context.folder.content, "dtype": context.dtype}, checkpoint.sizes, effective,
        study=file.name,
        trial=None,
        sparsity=Sparsity(target=(target := study.sparsity or plan.parameters.get("zeros", 0.0)), realised=target),
        batches=context.batches,
        plugins=records(study, file.folder),
        bos=context.bos,
        versions=versions(),
    )  # fmt: skip


def write_sparse(
    context: Session,
    plan: Plan,
    out: Path,
    config: Config,
    on_gone: OnGone | None = None,
    save: Save | None = None,
    dtype: str | None = SOURCE,
) -> None:
    """Prunes and writes the sparse checkpoint, with its configuration and the counted share of zeros.

    `dtype`: of the folder's weights; None: the source's own, of a .gguf file, which has none, that of the computation.

    `on_gone` gets the channels of each block that are gone, by the linear that reads them; `save` gets blocks with
    the grids on which their weights were rounded, and says what is written in the place of the weights.
    """
    checkpoint, source, zeros = context.checkpoint, context.folder.path, list[int]()
    if plan.outer:
        raise UserError("--out: types of ggml are written by `apply --out NAME.gguf`, as a study has found them")
    if dtype is None:
        dtype = context.dtype if str(gguf_origin(source).get("file")).endswith(".gguf") else SOURCE
    stored = None if dtype == SOURCE else DTYPES[dtype]

    def pruned() -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name on disk, dense weight and what is written of it; `zeros` get the numbers of zeros of each block."""
        for block in context.prune(plan, grids=save is not None):
            zeros.append(sum(block.zeros.values()))
            if on_gone:
                on_gone(block.index, block.channels)
            for key in dict.fromkeys(linear.key for linear in checkpoint.linears[block.index]):
                name = f"{checkpoint.block_names[block.index]}.{key}"
                dense = checkpoint.model.get_parameter(name).detach().cpu()  # from where it lies, not by the device
                saved = save(checkpoint, block, key) if save else checkpoint.as_saved(name, block.weights[key].cpu())
                for part, was in checkpoint.as_saved(name, dense).items():
                    yield part, was, saved[part]

    shards = Shards(source, str(checkpoint.model.base_model_prefix), save is not None, stored)
    keys = {checkpoint.key(i, linear) for i, linears in enumerate(checkpoint.linears) for linear in linears}
    names = {name for key in keys for name in checkpoint.as_saved(key, checkpoint.model.get_parameter(key).to("meta"))}
    context.watch(TrialStarted(f"writing {out}", plan))
    with sparse_folder(source, out) as folder:
        (folder / FINETUNED).unlink(missing_ok=True)  # of the training of the dense model
        shards.write(folder, names, pruned())
        if stored is not None:
            declare(folder, stored)
        context.folder.check_unchanged()
        fields = {
            "model": config.model.model_copy(update={"revision": context.folder.revision}),
            "sparsity": Sparsity(target=config.sparsity.target, realised=sum(zeros) / sum(checkpoint.sizes)),
            "blocks": checkpoint.blocks_name,
            "linears": checkpoint.linear_names if plan.tells_linears else None,
            "conv1d": plan.by_bits and checkpoint.has_conv1d,
            "batches": {**config.batches, "calibration": context.batches["calibration"]},
            "slim": False,
            "manifest": new_manifest(folder, device_name(checkpoint.device)),
        }
        describe(folder, config.model_copy(update=fields))


@dataclass(frozen=True)
class Way:
    """How a folder is written: `write`, once the model is loaded; `check` refuses the dense model's folder before that.

    It takes so many times the bytes of the dense model (`copies`) while it is written.
    """

    write: Write = write_sparse
    check: Callable[[Path], None] = lambda folder: None
    copies: float = 1

    def asked(self, out: Path) -> Ask:
        """Checks before the dense model is read: it may be written so, and its folder has room at `out`."""

        def ask(folder: Path, size: int) -> None:
            self.check(folder)
            check_writable(out, self.copies * size, "--out ")

        return ask


PLAIN = Way()


def write_applied(config: Config, out: Path, place: Place, way: Way) -> Setup:
    """Prunes to a configuration, and writes the folder `out`; returns the setup to measure it.

    `way`: how the folder is written. UserError if `out` exists, or if the model is not the configuration's.
    """
    check_free(out)
    setup = Setup.of_config(config, place, test=config.texts.test)
    with Session.open(replace(setup, ask=way.asked(out))) as context:
        way.write(context, fit_plan(config, context), out, config.seen_from(place.base, out))
    return setup


def apply(config: Config, out: Path, place: Place, way: Way = PLAIN) -> Perplexity:
    """Writes the folder `out` of a configuration likewise, and returns its perplexity on the test text."""
    return measured_folder(write_applied(config, out, place, way), out)


def measured_folder(setup: Setup, out: Path) -> Perplexity:
    """Measures a written folder, and stores the perplexity in its configuration and card.

    UserError, and nothing is stored, if the folder is another by then.
    """
    config = read_config(out / ABOUT)
    measured = perplexity(folder_scores(setup, out, f"checking {out}")["test"]["nlls"])
    if read_config(out / ABOUT) != config:
        raise UserError(f"--out {out}: was replaced while it was measured, and is left as it is")
    best = config.scores.get("best", {})
    best = {**best, "perplexity": {**best.get("perplexity", {}), "test": measured}}
    describe(out, config.model_copy(update={"scores": {**config.scores, "best": best}}))
    return measured


def folder_scores(setup: Setup, folder: Path, title: str) -> dict[str, Scores]:
    """Scores of a folder, loaded like any model, on every text, or all images, of the setup, by role."""
    model = setup.model.model_copy(update={"source": str(folder.absolute()), "sha256": None, "revision": None})
    with Session.open(replace(setup, model=model)) as context:
        context.watch(TrialStarted(title, None))
        return {role: context.measure(None, [RoleScores(role)])[0] for role in setup.texts}


# --- Writes a sparse checkpoint: copies the source's safetensors shards, and overwrites the pruned tensors in them.
#
# All other tensors stay equal to the source's byte for byte. Only one tensor at a time is in memory, however the source
# distributes its blocks over shards; with another number format one shard. A disk that is too small shows before
# anything is pruned.


@dataclass(eq=False)
class Shards:
    """The shards of a source folder with the offsets of their tensors.

    prefix: the model's `base_model_prefix`; whole: all weights of a pruned tensor are written, not only changed ones;
    dtype: all floats are written in this number format, None: in that of the source.
    """

    source: Path
    prefix: str
    whole: bool = False
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        self._offsets = {shard.name: offsets(shard) for shard in sorted(self.source.glob("*.safetensors"))}

    def find(self, name: str) -> tuple[str, str]:
        """Shard and key of a tensor, with or without the prefix; UserError if the source lacks it."""
        names = (name, name.removeprefix(f"{self.prefix}."), f"{self.prefix}.{name}")
        matches = ((shard, key) for shard, keys in self._offsets.items() for key in names if key in keys)
        if (first := next(matches, None)) is None:
            raise UserError(
                f"model {self.source}: has no tensor for {name}; save it with this transformers version first"
            )
        return first

    def write(self, out: Path, names: set[str], pruned: Iterator[tuple[str, Tensor, Tensor]]) -> None:
        """Writes all shards into `out`; `pruned` yields name, dense and pruned weight for each of `names`."""
        locations = {name: self.find(name) for name in names}
        for shard in self._offsets:
            if self.dtype is not None:
                cast(self.source / shard, out / shard, self.dtype)
                continue
            shutil.copyfile(self.source / shard, out / shard)
            (out / shard).chmod(0o644)
        there = {shard: offsets(out / shard) for shard in self._offsets}
        with ExitStack() as stack:
            shards = {shard for shard, _ in locations.values()}
            files = {shard: stack.enter_context((out / shard).open("r+b")) for shard in shards}
            for name, dense, sparse in pruned:
                shard, key = locations.pop(name)
                with safe_open(self.source / shard, framework="pt") as tensors:
                    source = tensors.get_tensor(key)
                if source.shape != dense.shape or not torch.equal(source.to(dense.dtype), dense.cpu()):
                    raise UserError(f"model {self.source}: {key} in {shard} is not what transformers loaded for it")
                # The source's tensor with the weights that pruning changed.
                written = sparse.cpu().to(source.dtype)
                if not self.whole:
                    written = torch.where((sparse != dense).cpu(), written, source)
                files[shard].seek(there[shard][key])
                files[shard].write(raw_bytes(written.to(self.dtype or source.dtype)))
        assert not locations


def rewrite(source: Path, out: Path, change: Callable[[str, Tensor], Tensors]) -> list[str]:
    """Writes a file of weights with what is made of each of its tensors, and returns the names; it is in memory."""
    tensors: Tensors = {}
    with safe_open(source, framework="pt") as opened:
        metadata = opened.metadata() or {"format": "pt"}
        for name in opened.keys():  # noqa: SIM118 - it is no mapping
            tensors |= change(name, opened.get_tensor(name))
    save_file(tensors, out, metadata=metadata)
    out.chmod(0o644)  # as the others; safetensors lets only the owner read it
    return [*tensors]


def cast(source: Path, out: Path, dtype: torch.dtype) -> None:
    """Writes a file of weights with all its floats in a number format; UserError on overflow."""

    def converted(name: str, stored: Tensor) -> Tensors:
        written = stored.to(dtype) if stored.dtype in DTYPES.values() else stored
        if written.is_floating_point() and stored.isfinite().all() and not written.isfinite().all():
            raise UserError(f"--dtype: {name} has values that {dtype} cannot hold; take bfloat16")
        return {name: written}

    rewrite(source, out, converted)


def declare(folder: Path, dtype: torch.dtype) -> None:
    """Says in the config of a folder in which number format its weights are, and in their index how large they are."""
    table, name = read_table(folder / CONFIG), str(dtype).removeprefix("torch.")
    for part in nested_configs(table, depth=1):
        part.update(dict.fromkeys({"dtype", "torch_dtype"} & part.keys(), name))
    table.setdefault("dtype", name)
    write_table(folder / CONFIG, table)
    say_size(folder)


def say_size(folder: Path) -> None:
    """Says in the index of a folder, if it has one, how large its weights are."""
    for index in folder.glob("*.safetensors.index.json"):
        table = read_table(index)
        files = {*table["weight_map"].values()}
        size = sum(max(entry["data_offsets"][1] for entry in read_header(folder / file).values()) for file in files)
        write_table(index, {**table, "metadata": {**table.get("metadata", {}), "total_size": size}})


@contextmanager
def sparse_folder(source: Path, out: Path) -> Iterator[Path]:
    """Yields a temporary folder with all files of the source but its weights; it becomes `out` at the end.

    Of a slim source no code is copied: the folder gets that of this package.
    """
    with writing(out), folder_atomically(out) as folder:
        copy_small(source, folder)
        if is_slim(source):
            bring_own_code(folder)
        yield folder


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """UserError where the body cannot write."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"--out {out}: cannot be written: {error}") from None


# --- The code in a slim folder: always that of this package, since the folder's card tells people to trust it.

OURS = Path(modeling_atp_sparse.__file__)
NAMING = ("auto_map", "custom_pipelines")  # keys by which transformers finds code, in this folder or in another


def bring_own_code(folder: Path) -> None:
    """Puts the modelling file into a slim folder that was copied, and names it alone.

    All other Python files go, and what names code: of the model, its tokenizer and its processors.
    """
    for file in folder.glob(CODE):
        file.unlink()
    shutil.copyfile(OURS, folder / OURS.name)
    for file in folder.glob(f"*{CONFIG}"):  # also tokenizer_config.json and those of processors
        table = read_table(file)
        rest = {key: value for key, value in table.items() if key not in NAMING}
        if file.name == CONFIG:
            rest["auto_map"] = auto_map(SLIM, checked_table(table, SLIM)["class"])
        if rest != table:
            write_table(file, rest)
