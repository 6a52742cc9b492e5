"""One way to prune one model, from Python: what a run and `export` leave in a JSON file."""

from __future__ import annotations  # help() shows the types as they stand here

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from atp_tune.api.arguments import Lender, names, working
from atp_tune.checkpoints.devices import find_device
from atp_tune.checkpoints.models import ModelFolder, resolve
from atp_tune.config.best import Config, ZeroShot, read_config
from atp_tune.config.data import CLASSES
from atp_tune.config.prune import Engine
from atp_tune.config.study import ModelConfig
from atp_tune.errors import UserError
from atp_tune.events import EventHandler, Place, TrialStarted, calling
from atp_tune.folders.applying import PLAIN, Way, apply, fit_plan
from atp_tune.folders.card import ABOUT, describe
from atp_tune.folders.comparing import Classified, TaskOptions, classify, continuations, evaluate
from atp_tune.folders.finetuning import apply_trained
from atp_tune.folders.gguf_file import save as save_gguf
from atp_tune.folders.packing import Codes, pack_folder, to_pack
from atp_tune.measures import Perplexity
from atp_tune.plan import Plan
from atp_tune.run.session import Session, Setup
from atp_tune.utils.cache import cache_dir, temporary_folder
from atp_tune.utils.system import check_free, check_writable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from atp_tune.metrics import Continuations

# --- Models of plans and configurations, in memory and in folders.


def pruned(config: Config, place: Place, lender: Lender) -> PreTrainedModel:
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
            keys = [checkpoint.key(i, linear) for i, linears in enumerate(checkpoint.linears) for linear in linears]
            weights = {key: checkpoint.model.get_parameter(key).detach().cpu() for key in keys}
            loaded = None if lender.model is not None else checkpoint.take_model()
    else:
        with lent_as(config, lender, place) as there, Session.open(Setup.of_config(config, there)) as session:
            weights = pruned_weights(session, fit_plan(config, session))
            loaded = None if lender.model is not None else session.checkpoint.take_model()
    return copied(lender.model, weights) if loaded is None else replaced(loaded, weights)


def save(
    config: Config,
    out: Path,
    place: Place,
    lender: Lender,
    way: Way = PLAIN,
    dtype: str | None = None,
    codes: Codes | None = None,
) -> Perplexity:
    """Writes the sparse checkpoint of a configuration, and returns its perplexity on the test text.

    `way`: as of `apply`, `dtype`: as of `write_sparse`; not used where the kept weights are trained, as a
    configuration may say. `codes` get those of rounded weights.
    """
    with in_folder(config, lender, place, out.parent) as (of_folder, there, dense):
        if config.plan.outer:
            return save_gguf(of_folder, out, there, dtype)
        if config.trained is not None:
            measured = apply_trained(of_folder, config.trained.settings, out, there, codes, way).record.after
        else:
            way = replace(way, write=partial(way.write, dtype=dtype))
            measured = apply(of_folder, out, there, way)
        if dense is not None:
            describe(out, read_config(out / ABOUT).model_copy(update={"model": config.model}))
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
            lender.model.save_pretrained(folder)
            lender.tokenizer.save_pretrained(folder)
            dense = resolve(ModelConfig(source=str(folder)), Path())  # UserError if it is read with other weights
            model = config.model.model_copy(update={"id": str(folder), "fingerprint": dense.content})
            yield config.model_copy(update={"model": model}), there, dense


@contextmanager
def lent_as(config: Config, lender: Lender, place: Place) -> Iterator[Place]:
    """Lends the model of a configuration, and yields where to work: on the device of a model in memory.

    UserError if what is lent is not the configuration's model.
    """
    with lender.lend() as sources:
        if sources.model not in (None, config.model.id):  # by the content of its weights
            raise UserError(
                "model: its weights or its config have changed since the study measured it; give it as it was"
            )
        yield replace(place, device=sources.device or place.device)


def pruned_weights(session: Session, plan: Plan) -> dict[str, Tensor]:
    """The pruned weights by parameter of the model, in host memory."""
    session.watch(TrialStarted("pruning", plan))
    checkpoint, weights = session.checkpoint, {}
    for block in session.prune(plan):
        for linear in checkpoint.linears[block.index]:
            weights[checkpoint.key(block.index, linear)] = block.weights[linear.key].cpu()
    for name, kind in plan.outer.items():
        weights[f"{name}.weight"] = session.outer.at({name: kind})[session.outer.modules[name][0]].cpu()
    session.folder.check_unchanged()
    return weights


@torch.no_grad()
def written(model: Any, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """The model itself, with pruned weights written into its parameters."""
    for name, weight in weights.items():
        model.get_parameter(name).copy_(weight)
    result: PreTrainedModel = model
    return result


@torch.no_grad()
def copied(model: Any, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """A copy of the model; the dense weights that are replaced are never copied."""
    memo = dict[int, Any]()
    for name, weight in weights.items():
        parameter = model.get_parameter(name)
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter).copy_(weight), parameter.requires_grad)
    copy: PreTrainedModel = deepcopy(model, memo)
    return copy


@torch.no_grad()
def replaced(model: Any, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """The model, which was loaded for this call, with other tensors: the loaded ones may be mapped files."""
    for name, weight in weights.items():
        parameter = model.get_parameter(name)
        parameter.data = torch.empty_like(weight, device=parameter.device).copy_(weight)
    result: PreTrainedModel = model.requires_grad_(True)
    return result


@dataclass(frozen=True, repr=False, eq=False)
class Configuration:
    """A model, how it is pruned, and what was measured: `config` holds the numbers, the methods make the model.

    Each method raises UserError if the model is not the one that the configuration was found for.
    """

    config: Config
    base: Path  # where relative paths of the configuration start
    device: str = "auto"
    allowed: Mapping[str, bool] = field(default_factory=dict)  # what a file cannot permit itself
    lender: Lender = field(default_factory=Lender)
    watch: EventHandler | None = None  # of a caller with a display; without one calls are quiet

    def __repr__(self) -> str:
        return f"<Configuration {self.config}>"

    def write(self, path: str | Path) -> None:
        """Writes the JSON file, which `load_config` and `tune.py apply` read; its paths start at its own folder."""
        out = Path(path).expanduser()
        self.config.seen_from(self.base, out.parent).write(out)

    def apply(self) -> PreTrainedModel:
        """The pruned model in memory; a model of the caller is copied and stays dense."""
        with self._working() as place:
            return pruned(self.config, place, self.lender)

    def save(
        self,
        folder: str | Path,
        *,
        packed: bool = False,
        slim: bool = False,
        dtype: str | None = None,
        format: Engine | None = None,
    ) -> Perplexity:
        """Writes the pruned model as a Hugging Face folder with a model card; returns its perplexity on the test text.

        The perplexity is measured on the folder as it is on the disk. `packed`: without zeros, and with rounded weights
        as codes of their bits: smaller, and loaded by transformers where atp_tune is imported. `slim`: without the
        channels that `pattern = "channels"` prunes, smaller and usually faster. `dtype`: "float32", "bfloat16" or
        "float16", of all weights; by default as the dense model's files, of a .gguf file as the study computed, of
        trained weights always as the files. `format`: codes of rounded weights as "compressed-tensors" (vLLM) or "mlx"
        stores them, with scales of bfloat16; default: the study's. UserError if the folder exists. Types of ggml make a
        file NAME.gguf, and beside it what `llama-quantize` needs to make it again; its perplexity, of 8192 tokens, is
        by llama.cpp.
        """
        from atp_tune.folders.slim import SLIM, check_pattern

        out = Path(folder).expanduser()
        with self._working() as place:
            check_free(out)
            if packed + slim + bool(format) > 1:
                raise UserError("packed, slim, format: each makes a folder of its own; give one of them")
            if slim:
                if self.config.is_trained:
                    raise UserError(
                        "slim: the configuration's weights are trained, and those of a slim folder cannot be"
                    )
                check_pattern(self.config)
                return save(self.config, out, place, self.lender, SLIM, dtype)
            config, own = self.config, self.config.quantize
            engine = format if packed or own is None else format or own.format
            if not (packed or engine):
                return save(config, out, place, self.lender, PLAIN, dtype)
            with temporary_folder(out) as sparse, temporary_folder(out) as parts:  # beside: relative paths stay right
                codes = None
                if own:
                    own = own.model_copy(update={"format": engine})
                    config, codes = config.model_copy(update={"quantize": own}), Codes(parts, own, engine)
                there = replace(place, watch=calling(place.watch, str(sparse), str(out)))
                measured = save(config, sparse, there, self.lender, to_pack(config, codes, engine), dtype, codes)
                pack_folder(sparse, out, watch=place.watch, codes=codes)
        return measured

    def push(self, repository: str, *, private: bool = False) -> str:
        """Uploads the pruned model with its card to the Hugging Face hub, ORG/NAME, and returns its address.

        UserError without a login, or if the hub refuses.
        """
        from atp_tune.folders.publishing import check_permission, upload

        check_permission(repository, private)
        with temporary_folder() as folder:
            self.save(folder / "model")
            return upload(folder / "model", repository, private)

    def generate(self, prompts: Sequence[str], *, tokens: int = 48) -> Continuations:
        """Continues prompts, greedily, by the dense model, uniform with the same pruner, and this configuration.

        Each continuation has `tokens` tokens at most.
        """
        if self.config.score == CLASSES:
            raise UserError(f"generate: {self.config.model.id} is an image classifier, which has no text")
        with self._lent() as there:
            return continuations(self.config, prompts, tokens, there)

    def classify(self, files: str | Path | Sequence[str | Path], *, both: bool = False) -> tuple[Classified, ...]:
        """The five most probable classes of each picture by this configuration, pruned in memory.

        Args:
            files: Pictures, or one of them.
            both: By the dense model too.

        Returns:
            One for each picture, in their order.

        Raises:
            UserError: For a file that is no picture, and if the model is no image classifier.
        """
        paths = [Path(file).expanduser() for file in ([files] if isinstance(files, str | Path) else files)]
        with temporary_folder() as folder, self._lent() as there:
            path = folder / "configuration.json"
            self.write(path)
            return classify(paths, path, both, there)

    def evaluate(
        self,
        tasks: str | Sequence[str] = "zero-shot",
        *,
        limit: int | None = None,
        num_fewshot: int | None = None,
        batch: int = 8,
    ) -> ZeroShot:
        """Scores the dense model, uniform with the same pruner, and this configuration on tasks of lm-eval.

        Args:
            tasks: Tasks or groups by name, folders or .yaml files; "zero-shot" is the seven of the papers.
            limit: Use only the first so many items of each task.
            num_fewshot: Examples before each item; by default none.
            batch: Sequences that are scored at once.

        Returns:
            The scores of each task, and their means.
        """
        with self._lent() as there:
            return evaluate(self.config, TaskOptions(names(tasks), limit, num_fewshot, batch), there)

    @contextmanager
    def _working(self) -> Iterator[Place]:
        with working(False) if self.watch is None else nullcontext(self.watch) as watch:
            yield Place(self.base, self.device, self.allowed, watch)

    @contextmanager
    def _lent(self) -> Iterator[Place]:
        with self._working() as place, lent_as(self.config, self.lender, place) as there:
            yield there


def load_config(
    path: str | Path,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    texts: object = None,
    device: str = "auto",
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    trust_plugins: bool = False,
) -> Configuration:
    """A configuration that a run, `export` or `apply` has written, such as `studies/smol.best.json`.

    Args:
        path: The JSON file.
        model: The configuration's model, if it lay in memory.
        tokenizer: Its tokenizer.
        texts: The texts of its study, if they lay in memory.
        device: "auto", "cpu", "mps", "cuda" or "cuda:N"; a model in memory is pruned where it lies.
        allow_pickle: Read .bin weights, which are pickles and may run code.
        trust_remote_code: Run the Python code that the model's folder holds.
        trust_plugins: Run the Python code of the configuration's plug-ins.

    Returns:
        `config` with its numbers, and `apply()`, `save()`, `push()`, `generate()`, `evaluate()`.

    Raises:
        UserError: If the file is missing or is no configuration.
    """
    file = Path(path).expanduser()
    config = read_config(file)
    allowed = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code, "trust_plugins": trust_plugins}
    return Configuration(config, file.parent / config.folder, device, allowed, Lender.of(model, tokenizer, texts))
