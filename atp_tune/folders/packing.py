"""Packs the folder of a sparse checkpoint: smaller on disk and in memory, loaded by transformers or another engine.

A tensor with a share of `LEAST` zeros is packed: as a linear, which stays packed in memory, or, such as the matrix of
an expert, in the file alone. All other tensors stay equal byte for byte. One shard at a time is in memory. Of rounded
weights codes are stored where they are known: of all tensors that have any, and of no others.
`checkpoints.convert` has the inverse. Layout: docs/formats.md.
"""

import json
import shutil
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from atp_tune.blocks.prune_pass import PrunedBlock
from atp_tune.checkpoints.blocks import auto_class, classifies_images, model_config
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.convert import (
    PACKED_INDEX,
    Original,
    as_bytes,
    as_text,
    as_user_error,
    is_packed,
    quiet,
    raw_bytes,
    sha256_of_tensor,
    unpack_folder,
)
from atp_tune.checkpoints.devices import DTYPES, Tensors, find_device
from atp_tune.checkpoints.files import (
    Table,
    find_weights,
    header_text,
    is_slim,
    nested_configs,
    parse_header,
    read_table,
    write_table,
)
from atp_tune.checkpoints.models import Ask, resolve
from atp_tune.config.best import Config, read_config
from atp_tune.config.manifest import sha256_by_name
from atp_tune.config.prune import Engine, PruneConfig, QuantizeConfig
from atp_tune.config.study import ModelConfig
from atp_tune.errors import UserError
from atp_tune.events import EventHandler, Place, Step, TrialStarted, ignore_events
from atp_tune.folders.applying import CONFIG, OURS, Way, folder_scores, rewrite, say_size, sparse_folder, write_sparse
from atp_tune.folders.card import ABOUT, CARD, DESCRIPTIONS, FINETUNED, Packed, describe, origin, stored_manifest
from atp_tune.folders.exporting import config_groups, linear_widths
from atp_tune.measures import Perplexity, perplexity
from atp_tune.packed.layout import Coded, Kind, encode, fits_kernel, pack, pack_codes, spread, zero_share
from atp_tune.packed.modeling_atp_sparse import (
    LEAST,
    MODEL_TYPE,
    SCALES,
    VALUES,
    VERSION,
    WEIGHTS,
    WITH_CODES,
    ZEROS,
    auto_map,
    class_of,
    is_packable,
    read_codes,
    read_packed,
    zero_points,
)
from atp_tune.pruners.rounding import Grid
from atp_tune.run.session import Setup
from atp_tune.utils.cache import sha256_of, temporary_folder
from atp_tune.utils.system import check_free

# --- Codes of rounded weights on their way from the pass over the blocks to a packed folder.
#
# The sparse checkpoint that is packed gets the weights that the codes give, with scales of 16 bits, so that packing it
# changes nothing, and its perplexity is that of the packed folder, or of what its engine computes.
#
# Engines have codes one after the other in words of 32 bits, the lowest bit first:
#
# compressed-tensors  its `pack-quantized`, which vLLM and transformers read: w = (q - z) Δ
# mlx                 of mlx-lm: w = q Δ + o, o = -z Δ
#
# Δ and o have the 8 bits of bfloat16, in the number format of the other weights, so that their cast changes nothing.


@dataclass(eq=False)
class Codes:
    """The codes of each rounded tensor of a checkpoint, by its name on the disk, in files of `folder`."""

    folder: Path
    quantize: QuantizeConfig
    engine: Engine | None = None  # whose scales and weights they have; None: those of a packed folder
    # Of those that are not stored yet: where their parts are, and the rest.
    files: dict[str, tuple[Path, Coded]] = field(default_factory=dict)

    def save(self, checkpoint: Checkpoint, block: PrunedBlock, key: str) -> Tensors:
        """Keeps the codes of a tensor of a block, and returns the weights that they give, by name on the disk: the
        rounded ones bit for bit, but for the 16 bits of the scales. UserError if codes cannot give them.
        """
        linears = [linear for linear in checkpoint.linears[block.index] if linear.key == key]
        name, turned = checkpoint.key(block.index, linears[0]), linears[0].transposed
        # Scale, zero point and bits of each weight of a tensor, so that they go the way of the weights to the disk.
        shaped = block.weights[key]
        scales, zeros, bits = (torch.empty(shaped.shape) for _ in range(3))
        for linear in linears:
            grid, columns = block.grids[linear.name], linear.in_features
            each = self.quantize.columns_of_group(columns)
            linear.matrix(scales).copy_(spread(grid.scale.cpu(), each, columns))
            linear.matrix(zeros).copy_(spread(grid.zero.cpu(), each, columns))
            linear.matrix(bits).fill_(int(block.bits[linear.name]))
        weights, *grids = (checkpoint.as_saved(name, tensor) for tensor in (shaped.cpu(), scales, zeros, bits))
        decoded: Tensors = {}
        for part, weight in weights.items():
            try:
                coded = _encoded([weight, *(grid[part] for grid in grids)], self.quantize, turned)
            except ValueError as error:
                raise UserError(f"{part}: cannot be stored as codes: {error}") from None
            decoded[part] = self._keep(part, coded, self.folder / f"{len(self.files)}.safetensors")
        return decoded

    def _keep(self, part: str, coded: Coded, file: Path) -> Tensor:
        """Keeps the codes of a tensor in a file, and returns the weights that they give."""
        if self.engine:
            coded = replace(coded, parts={**coded.parts, SCALES: coded.parts[SCALES].bfloat16().half()})
        save_file(coded.parts, file)
        self.files[part] = file, replace(coded, parts={})
        return self.parts_of(coded)[1]

    def parts_of(self, coded: Coded) -> tuple[Tensors, Tensor]:
        """The tensors of a coded one, as the engine stores it, by the ends of their names, and its weights, float32."""
        if self.engine is None:
            return coded.parts, coded.decoded()
        integers, each_scale = read_codes(coded.parts.get, "", coded.about)
        (rows, columns), bits = integers.shape, coded.about["codes"]["bits"]
        size = columns // coded.parts[SCALES].shape[1]
        scales = each_scale[:, ::size].bfloat16()
        zeros = zero_points(coded.parts.get(ZEROS), bits, rows, columns // size)
        codes = integers + spread(zeros, size, columns)
        words = _words(codes, bits)
        if self.engine == "mlx":
            offsets = -zeros * scales
            parts = {"weight": words.view(torch.uint32), "scales": scales, "biases": offsets}
            return parts, codes * each_scale + spread(offsets.float(), size, columns)
        parts = {"weight_packed": words, "weight_scale": scales, "weight_shape": torch.tensor(integers.shape)}
        if ZEROS in coded.parts:
            parts["weight_zero_point"] = _words(zeros.T, bits).T.contiguous()
        return parts, integers * each_scale

    def find(self, names: tuple[str, ...]) -> Coded | None:
        """The codes of a tensor by the names that it may have, once; None if it was not rounded."""
        entry = next((self.files.pop(name) for name in names if name in self.files), None)
        return entry and replace(entry[1], parts=load_file(entry[0]))

    def scaled(self, part: str, factors: Tensor) -> Tensor:
        """The weights that the codes of a tensor give with each group's scale multiplied by its factor, which is kept.

        `factors`: shaped as the tensor, equal within a group.
        """
        file, entry = self.files[part]
        try:
            coded = replace(entry, parts=load_file(file)).scaled(factors)
        except ValueError as error:
            raise UserError(f"training: {part}: {error}; lower the learning rate") from None
        return self._keep(part, coded, file)


def _encoded(saved: list[Tensor], quantize: QuantizeConfig, turned: bool) -> Coded:
    """The codes of weights; ValueError if groups of consecutive inputs do not share scales, zero points and bits.

    saved: weights, and scale, zero point and bits of each, [..., rows, columns], or if `turned` the other way round.
    """
    weight, scales, zeros, bits = (tensor.mT if turned else tensor for tensor in saved)
    columns = weight.shape[-1]
    size = quantize.columns_of_group(columns)
    groups = [part[..., ::size].contiguous() for part in (scales, zeros)]
    pairs = zip(groups, (scales, zeros), strict=True)
    if not all(torch.equal(spread(group, size, columns), part) for group, part in pairs):
        raise ValueError("its columns lie in another order there")
    least, width = map(int, bits.aminmax())
    if least != width:
        raise ValueError("its experts have different numbers of bits")
    grid = Grid(groups[0], groups[1], float(2**width - 1))
    return encode(weight.contiguous(), grid, width, quantize.group_size, quantize.symmetric, turned)


INDEX = "model.safetensors.index.json"
IMAGES = "AutoModelForImageClassification"


def pack_folder(
    source: Path,
    out: Path,
    kind: Kind = "same",
    group_size: int | None = None,
    device: str = "auto",
    watch: EventHandler = ignore_events,
    codes: Codes | None = None,
) -> Packed:
    """Writes the packed folder of the sparse checkpoint `source` into the new folder `out`.

    kind: number format of the nonzero values; group_size: columns that share a scale of int8. Where values are rounded,
    the perplexity on the test text is measured before and after, on `device`, if the folder says with which text.
    codes: of the weights of `source`, which are then stored in the place of values.
    Errors: UserError if `source` cannot be packed exactly, if nothing in it is sparse, or if `out` cannot be written.
    """
    check_free(out)
    if kind != "same":
        find_device(device)

    def ask(folder: Path, size: int) -> None:  # room at least for the weights that are not zero
        pruning = origin(source)
        share = 0.0 if pruning is None or pruning.config.bits is not None else 1 - pruning.config.sparsity.realised
        check_free(out, (share / 2 if kind == "int8" else share) * size)

    work = _Packing(source, kind, group_size, codes, ask)
    watch(TrialStarted(f"packing {out}", None))
    with sparse_folder(work.source, out) as folder:
        for number, shard in enumerate(work.shards, 1):
            work.pack_shard(shard, folder)
            watch(Step("packing", number, len(work.shards)))
        if codes and codes.files:
            raise UserError(f"--out: the checkpoint has no tensor {min(codes.files)}, whose codes are to be stored")
        if not work.linears and not work.stored:
            raise UserError(
                f"{source}: no matrix of it has {LEAST:.0%} zeros or more; `apply` writes a sparse one, and "
                "`apply --packed` stores rounded weights as codes"
            )
        if work.engine:
            work.describe_for(work.engine, folder)
        else:
            work.describe(folder)
        rounding = None if kind == "same" else _rounding(source, folder, device, watch)
        before, after = (sum(x.stat().st_size for x in each.glob("*.safetensors")) for each in (work.source, folder))
        values = work.engine or (kind if codes is None else "codes")
        done = Packed(len(work.linears), len(work.stored), *work.bytes, before, after, values, work.auto, rounding)
        describe(folder, packed=done)
    return done


def check_class(source: Path, what: str) -> None:
    """UserError, which begins with `what`, for a classifier of another class than the auto class loads for its family.

    Such as a DeiT with a teacher: a folder of a model type of its own would be loaded as another model.
    """
    if not classifies_images(source) or is_slim(source):
        return
    own, first = read_table(source / CONFIG)["architectures"][0], class_of(type(model_config(source, False)), IMAGES)
    if own != first.__name__:
        raise UserError(f"{what}: {source} is a {own}, and of its family only {first.__name__} would be loaded again")


def check_packable(folder: Path, named: object) -> None:
    """UserError if a folder, which errors call `named`, holds a slim model: no reader knows a packed one."""
    if is_slim(folder):
        raise UserError(f"{named}: is a slim model, which has lost channels and cannot be packed; use it as it is")


def to_pack(config: Config, codes: Codes | None, engine: Engine | None) -> Way:
    """The way to write the folder of a configuration that is packed next, beside it; `codes` of rounded weights.

    UserError if the configuration has what no engine stores, where it is packed for one.
    """
    if engine:
        linear_widths(config, engine)

    def check(folder: Path) -> None:
        check_packable(folder, f"--packed: {config.model.id}")

    return Way(partial(write_sparse, save=None if codes is None else codes.save), check, 2 - config.sparsity.target)


def _rounding(source: Path, folder: Path, device: str, watch: EventHandler) -> tuple[Perplexity, Perplexity] | None:
    """Perplexity on the test text before and after rounding; None if `source` does not say which text that is."""
    if (pruning := origin(source)) is None:
        return None
    config = pruning.config
    model = ModelConfig(source=str(source.absolute()), dtype=config.model.dtype, prune=config.model.prune)
    place = Place(pruning.base, device, watch=watch)
    setup = Setup(model, PruneConfig(), {"test": pruning.test}, place, bos=config.bos, score=config.score)
    before = perplexity(folder_scores(setup, source, f"checking {source}")["test"]["nlls"])
    with temporary_folder(folder) as rounded:
        unpack_folder(folder, rounded)
        return before, perplexity(folder_scores(setup, rounded, "checking the rounded weights")["test"]["nlls"])


class _Packing:
    def __init__(self, source: Path, kind: Kind, group_size: int | None, codes: Codes | None, ask: Ask) -> None:
        if source.is_dir() and is_packed(source):
            raise UserError(f"{source}: is packed already")
        check_packable(source, source)
        self.source = resolve(ModelConfig(source=str(source.absolute())), Path(), ask=ask).path
        check_class(self.source, "pack")
        self._records = [name for name in (ABOUT, FINETUNED) if (self.source / name).is_file()]
        if self._records:
            stored_manifest(self.source)  # UserError if they are not what atp_tune writes
        self._kind, self._group_size, self._codes = kind, group_size, codes
        self.engine = codes and codes.engine
        self._fits = True  # int8 values, without loss, of all linears that have codes
        self.shards = [file.name for file in find_weights(self.source, allow_pickle=False)]
        self.linears: dict[str, Table] = {}
        self.stored: dict[str, Table] = {}
        self._original = Original()
        self._weight_map: dict[str, str] = {}  # packed shard of each tensor
        self.bytes = (0, 0)  # of the packed tensors before and after
        self.auto = auto_class(self.source).__name__
        model = empty_model(self.source)
        self._prefix, head = f"{model.base_model_prefix}.", model.get_output_embeddings()
        tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
        self._linears = {name: module for name, module in model.named_modules() if is_packable(module)}
        # The linears that can stay packed in memory, by the names of their weights; none whose weight has two names.
        self._packable = {
            f"{name}.weight": module
            for name, module in self._linears.items()
            if module is not head and f"{name}.weight" not in tied
        }

    def pack_shard(self, shard: str, folder: Path) -> None:
        """Packs one file of the weights, under a name by which transformers finds it as a variant of the weights."""
        file, out = self.source / shard, folder / WEIGHTS
        if self.engine:
            out = folder / shard
        elif len(self.shards) > 1:
            number, count = self.shards.index(shard) + 1, len(self.shards)
            out = folder / f"model.packed-{number:05}-of-{count:05}.safetensors"
        header = header_text(file)
        parse_header(header, file)  # UserError if it is none
        self._original.headers[shard] = header.decode()
        self._weight_map.update(dict.fromkeys(rewrite(file, out, self._pack), out.name))
        self._original.sha256[shard] = sha256_of(file) if self._kind == "same" else None

    def _pack(self, name: str, dense: Tensor) -> Tensors:
        """The tensors in the place of a sparse or a coded one, or the one that stays."""
        names = (name, name.removeprefix(self._prefix), self._prefix + name)
        is_sparse = dense.dtype in DTYPES.values() and dense.dim() >= 2 and zero_share(dense) >= LEAST
        coded = None if self._codes is None else self._codes.find(names)
        if not (is_sparse if self._codes is None else coded):
            if self._kind != "same":
                self._original.tensors[name] = sha256_of_tensor(dense)
            return {name: dense}
        linear = next((other for other in names if other in self._packable and not self.engine), None)
        about: Table = {"shape": [*dense.shape]}
        if linear is not None:
            about["transposed"] = isinstance(self._packable[linear], Conv1D)
            if linear != name:
                self._original.names[name] = linear
        if coded is None:
            parts = pack(dense.T.contiguous() if about.get("transposed") else dense, self._kind, self._group_size)
            about["nonzeros"] = len(parts[VALUES])
            again = read_packed(parts.get, "", about).to(dense.dtype)
        else:
            assert self._codes is not None
            about, (parts, weights) = {**about, **coded.about}, self._codes.parts_of(coded)
            again = weights.to(dense.dtype)
            self._fits = self._fits and (not is_sparse or linear is None or (coded.fits and fits_kernel(about)))
            if raw_bytes(again) != raw_bytes(dense):
                raise UserError(f"{name}: its codes do not give the weights of {self.source}")
        (self.stored if linear is None else self.linears)[linear or name] = about
        self._original.tensors[name] = sha256_of_tensor(again)
        if self.engine:
            parts = {end: part.to(dense.dtype) if part.is_floating_point() else part for end, part in parts.items()}
            linear = name.removesuffix("weight")
        before, after = self.bytes
        self.bytes = before + dense.nbytes, after + sum(part.nbytes for part in parts.values())
        return {f"{linear or name}{end}": part for end, part in parts.items()}

    def describe_for(self, engine: Engine, folder: Path) -> None:
        """Writes what an engine reads in the config, and the index."""
        config, table = read_config(folder / ABOUT), read_table(folder / CONFIG)
        rounding, widths = linear_widths(config, engine)
        if engine == "mlx":
            form = {"group_size": rounding.group_size, "mode": "affine"}
            own = {name: {**form, "bits": bits} for name, bits in widths.items()}
            about = {"quantization": {**form, "bits": max(widths.values()), **own}}
            for part in nested_configs(table):  # mlx-lm reads where positions turn by the keys of transformers 4
                turns: Any = part.get("rope_parameters") or {}
                whole = turns.get("full_attention", turns)
                if "rope_theta" in whole:
                    scaling = None if whole.get("rope_type", "default") == "default" else whole
                    local = turns.get("sliding_attention", whole).get("rope_theta")
                    part.update({**whole, "rope_scaling": scaling, "rope_local_base_freq": local} | part)
        else:
            about = {
                "quantization_config": {
                    "quant_method": engine, "format": "pack-quantized", "quantization_status": "compressed",
                    "config_groups": config_groups(rounding, widths), "ignore": sorted(self._linears.keys() - widths),
                }
            }  # fmt: skip
        write_table(folder / CONFIG, table | about)
        if (folder / INDEX).is_file():
            write_table(folder / INDEX, {"weight_map": dict(sorted(self._weight_map.items()))})
            say_size(folder)
        renew_manifests(folder)

    def describe(self, folder: Path) -> None:
        """Writes config, code and index, and what `unpack` needs."""
        original, config = self._original, read_table(self.source / CONFIG)

        def change(name: str, text: str) -> None:  # writes a small file anew, and keeps what it was
            original.files[name] = as_text(folder / name)
            (folder / name).write_bytes(as_bytes(text))

        table = {
            "version": VERSION, "family": config["model_type"], "class": self.auto, "values": self._kind,
            "group_size": self._group_size, "linears": self.linears, "stored": self.stored,
        }  # fmt: skip
        if self._codes is not None:
            # How linears that stay packed are kept in memory: as int8 values if their codes fit, else as floats.
            size = self._codes.quantize.group_size if self._fits else -1
            table |= {"version": WITH_CODES, "values": "int8" if self._fits else "same"}
            table["group_size"] = None if size == -1 else size
        classes = [f"Packed{name}" for name in config.get("architectures") or ()]
        names = auto_map(MODEL_TYPE, self.auto)
        config |= {"model_type": MODEL_TYPE, "architectures": classes, "auto_map": names, MODEL_TYPE: table}
        change(CONFIG, json.dumps(config, indent=2) + "\n")
        shutil.copyfile(OURS, folder / OURS.name)
        original.added.append(OURS.name)
        if len(self.shards) > 1:
            index = {"metadata": {}, "weight_map": dict(sorted(self._weight_map.items()))}
            write_table(folder / PACKED_INDEX, index)
            original.added.append(PACKED_INDEX)
        if (folder / INDEX).is_file():
            original.files[INDEX] = as_text(folder / INDEX)
            (folder / INDEX).unlink()
        if (folder / CARD).is_file():  # written anew at the end
            original.files[CARD] = as_text(folder / CARD)
        else:
            original.added.append(CARD)
        original.files.update({name: as_text(folder / name) for name in self._records})
        original.write(folder)
        renew_manifests(folder)


def renew_manifests(folder: Path) -> None:
    """Writes the SHA-256 of the files that a folder has now into its records of pruning and training."""
    for file in (folder / ABOUT, folder / FINETUNED):
        record = read_table(file) if file.is_file() else {}
        if isinstance(record.get("manifest"), dict):
            record["manifest"]["files"] = sha256_by_name(folder, DESCRIPTIONS)
            write_table(file, record)


def empty_model(source: Path) -> Any:
    """The model of a folder without its weights; UserError if there is no such model."""
    what = f"model {source}: transformers cannot make its model"
    with as_user_error(what), quiet("transformers"), torch.device("meta"):
        return auto_class(source).from_config(model_config(source, trusted=False))


def _words(codes: Tensor, bits: int) -> Tensor:
    """Codes [rows, columns] as words, int32 [rows, ⌈columns·bits/32⌉], the last of a row filled up."""
    filled = nn.functional.pad(codes, (0, -codes.shape[1] % 32))
    words = pack_codes(filled, bits).view(torch.int32).view(len(codes), -1)
    return words[:, : -(-codes.shape[1] * bits // 32)].contiguous()
