"""Dense, uniform and best of a configuration side by side, from one checkpoint in memory: on tasks, images, prompts.

Memory holds the dense model and the pruned linears of one sparse model. These lie on the compute device if they fit,
else in host memory, and each block's are copied to the device when it computes. Dense blocks that do not fit on the
device are copied one by one too.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from atp_tune.blocks.prune_pass import PrunedBlock
from atp_tune.blocks.replay import Replay
from atp_tune.blocks.verification import as_user_error
from atp_tune.checkpoints.blocks import classifies_images, model_config
from atp_tune.checkpoints.checkpoint import Checkpoint, Released
from atp_tune.checkpoints.convert import gguf_folder
from atp_tune.checkpoints.devices import device_name, find_device, find_dtype, oom_as_user_error
from atp_tune.checkpoints.models import ModelFolder, resolve
from atp_tune.config.best import SHARES, Config, TaskScores, ZeroShot, read_config
from atp_tune.config.data import CLASSES, ImageSet
from atp_tune.config.prune import PruneConfig, make_plan, parse
from atp_tune.config.study import Data, ModelConfig, of_model
from atp_tune.errors import UserError
from atp_tune.events import Place, TrialStarted
from atp_tune.folders.applying import check_model, fit_plan
from atp_tune.folders.card import ABOUT, origin
from atp_tune.inputs import KINDS, InputKind
from atp_tune.inputs.images import LABELLED_IMAGES
from atp_tune.inputs.items import LABELS, PIXELS, Items
from atp_tune.inputs.pictures import ImageProcessor, class_name, pictures_in_files
from atp_tune.inputs.windows import load_tokenizer
from atp_tune.measures import TaskScore, accuracy, difference, gain, mean_of_tasks
from atp_tune.metrics import NAMES, Continuations, Side
from atp_tune.packed.kernel import kernel_name
from atp_tune.packed.layout import Kind, packed_linear, zero_share
from atp_tune.packed.modeling_atp_sparse import LEAST, is_packable, speed_dense_linears
from atp_tune.plan import Plan
from atp_tune.run.generation import Speaker
from atp_tune.run.observers import Kept, Prompts, RoleScores, TaskResults, check_room
from atp_tune.run.session import Session, Setup
from atp_tune.utils.cache import versions
from atp_tune.utils.registry import FrozenModel
from atp_tune.utils.system import require

TASKS = ("zero-shot",)  # the default of --tasks, which are of texts
METRIC = "acc"  # as lm-eval calls it
TOPS = {"top-1": 1, "top-5": 5}


@dataclass(frozen=True)
class TaskOptions:
    """Options of `evaluate`: tasks by name or path, `most` items and few-shot examples of each, batch size."""

    tasks: tuple[str, ...]
    most: int | None
    num_fewshot: int | None
    batch: int


def open_config(config: Config, place: Place, **more: Data) -> Session:
    """The session that prunes to a configuration, to be closed; `more`: texts beside the one for calibration."""
    return Session.open(Setup.of_config(config, {"calibration": config.calibration, **more}, place))


def uniform_plan(config: Config, session: Session) -> Plan:
    """The uniform plan with the pruner and the target of a configuration."""
    return make_plan(config.plan.method, "uniform", session.budget(config.target), {}, parse(config.prune.pattern))


def continuations(config: Config, prompts: Sequence[str], tokens: int, place: Place) -> Continuations:
    """Continues prompts by dense, uniform with the same pruner, and best.

    UserError if the model is not the configuration's.
    """
    work = Prompts(prompts, tokens)
    with oom_as_user_error("generate"), open_config(config, place) as session:
        session.compare(_plans(config, session), [work], {name: f"continuations: {name}" for name in NAMES})
        return work.result()


def evaluate(config: Config, options: TaskOptions, place: Place) -> ZeroShot:
    """Scores dense, uniform with the same pruner, and best on tasks, or on test images.

    UserError, before the model is loaded, for tasks that cannot be loaded, and if the model is not the configuration's.
    """
    work = _work(config.score == CLASSES, options, place)
    texts = {"test": config.texts.test} if isinstance(work, RoleScores) else {}
    with open_config(config, place, **texts) as session:
        return _scores(session, _plans(config, session), work, options)


def folder_of(path: Path, place: Place) -> Path:
    """The folder of a model; of a .gguf file that to which it is converted."""
    return gguf_folder(path, place.note) if path.suffix == ".gguf" and path.is_file() else path


def evaluate_folder(path: Path, options: TaskOptions, place: Place) -> ZeroShot:
    """Scores the model in a folder, in the number format of its `atp_tune.json`, if it has one; or in a .gguf file.

    A classifier is scored on the test images that this file names.
    """
    folder = folder_of(path, place)
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    trusted = of_model(place.allowed).get("trust_remote_code", False)
    work, dtype = _work(classifies_images(folder), options, place), "auto"
    if (folder / ABOUT).is_file():
        with suppress(UserError):
            dtype = read_config(folder / ABOUT).model.dtype
    texts, score = dict[str, Data](), "next-token"
    if isinstance(work, RoleScores):
        pruning = origin(folder)
        if pruning is None or not isinstance(pruning.test, ImageSet):
            raise UserError(
                f"{folder}: has no atp_tune.json that says on which images; give --config FILE, or a folder that "
                "`apply` has written"
            )
        texts, score, place = {"test": pruning.test}, CLASSES, replace(place, base=pruning.base)

    def ask(path: Path, size: int) -> None:  # a missing tokenizer is said before the weights are loaded
        if isinstance(work, TaskResults):
            work.tokenizer(path, trusted)

    model = ModelConfig.model_validate({"source": str(folder.absolute()), "dtype": dtype, **of_model(place.allowed)})
    with Session.open(Setup(model, PruneConfig(), texts, place, score=score, ask=ask)) as session:
        return _scores(session, {"model": None}, work, options, {"model": str(path)})


def _plans(config: Config, session: Session) -> dict[str, Plan | None]:
    """Dense, uniform and best; UserError if the model is not the configuration's."""
    best = fit_plan(config, session, says_untrained=True)
    return {"dense": None, "uniform": uniform_plan(config, session), "best": best}


def _work(of_images: bool, options: TaskOptions, place: Place) -> TaskResults | RoleScores:
    """The tasks, loaded, or test images; UserError for tasks that are unknown or cannot be loaded, or without lm-eval.

    Image classifiers have no options of tasks.
    """
    if of_images:
        if tuple(options.tasks) != TASKS:
            raise UserError("--tasks: are of texts; an image classifier is measured on its test images, leave it out")
        if options.num_fewshot is not None:
            raise UserError("--num-fewshot: goes with tasks of texts; leave it out")
        return RoleScores("test")
    require("eval", "evaluate")
    find_device(place.device)
    from atp_tune.scores.tasks import find_tasks

    place.note("reading the tasks")
    tasks = find_tasks(options.tasks, place.watch, multimodal=True)
    return TaskResults({"": tasks}, options.most, options.num_fewshot, options.batch)


def compared(name: str, results: Mapping[Any, Any]) -> TaskScores:
    """The scores of several models on a task, and best − uniform paired by items, if both were scored."""
    first = next(iter(results.values()))
    metric = next((share for share in SHARES if share in first.scores), next(iter(first.scores), ""))
    paired = [results[model].each.get(metric, []) for model in ("best", "uniform") if model in results]
    return TaskScores(
        task=name,
        items=first.items,
        num_fewshot=first.num_fewshot,
        version=first.version,
        metric=metric,
        scores={model: result.scores for model, result in results.items()},
        best_minus_uniform=difference(*paired) if len(paired) == 2 else None,
    )


def _scores(
    session: Session,
    plans: Mapping[str, Plan | None],
    work: TaskResults | RoleScores,
    options: TaskOptions,
    titles: Mapping[str, str] | None = None,
) -> ZeroShot:
    """The scores of models on tasks, with their differences; top-1 and top-5 accuracies on images in the same form."""
    if isinstance(work, RoleScores):
        session = session if options.most is None else session.limited(options.most)
        seconds: Any = session.compare(plans, [work])
        ranks = {model: scores["ranks"] for model, scores in work.found.items()}
        tasks, more = tuple(_top(name, top, ranks) for name, top in TOPS.items()), dict[str, Any](mean={})
    else:
        session.compare(plans, [work], titles)
        results: Any = {model: sets[""] for model, sets in work.found.items()}
        seconds = {model: work.seconds.get(model, 0.0) for model in results}
        tasks = tuple(
            compared(name, {model: scores[name] for model, scores in results.items()}) for name in work.sets[""].rows
        )
        shares = [task for task in tasks if task.metric in SHARES]
        paired = [task.best_minus_uniform for task in shares]
        more = {
            "mean": {
                model: mean_of_tasks([task.scores[model][task.metric] for task in shares])
                for model in results
                if shares
            },
            "mean_best_minus_uniform": mean_of_tasks([x for x in paired if x]) if shares and all(paired) else None,
            "missing": work.sets[""].missing,
        }
    return ZeroShot(
        tasks=tasks,
        **more,
        limit=options.most,
        dtype=session.dtype,
        device=device_name(session.checkpoint.device),
        seconds=seconds,
        versions=versions() | ({} if isinstance(work, RoleScores) else {"lm_eval": version("lm_eval")}),
    )


def _top(name: str, top: int, by_model: Mapping[Any, list[float]]) -> TaskScores:
    """An accuracy on the test images by the ranks of the right classes, as a score on a task."""
    accuracies = {model: accuracy(own, top) for model, own in by_model.items()}
    paired = gain(by_model["uniform"], by_model["best"], top) if "best" in by_model else None
    return TaskScores(
        task=f"test images, {name}",
        items=len(next(iter(by_model.values()))),
        num_fewshot=0,
        version="",
        metric=METRIC,
        scores={model: {METRIC: TaskScore(**dict(one))} for model, one in accuracies.items()},
        best_minus_uniform=paired and TaskScore(**dict(paired)),
    )


# --- Sparse models whose linears are packed in memory: a kernel multiplies by them faster than by zeros.


def is_fast(device: torch.device) -> bool:
    """Whether packed weights are known to be faster than dense ones on a device."""
    return device.type == "cpu" and kernel_name() is not None


def pack_linears(checkpoint: Checkpoint, kind: Kind = "same") -> int:
    """Replaces the sparse linears of a model by packed ones, and speeds the others; the number of packed ones."""
    packed = 0
    for block, linears in zip(checkpoint.blocks, checkpoint.linears, strict=True):
        for linear in linears:
            module: Any = None if linear.expert is not None else block.get_submodule(linear.name)
            if is_packable(module) and zero_share(module.weight.detach()) >= LEAST:
                block.set_submodule(linear.name, packed_linear(module, kind))
                packed += 1
    speed_dense_linears(checkpoint.model)
    return packed


def packed_copy(
    checkpoint: Checkpoint, blocks: Iterable[PrunedBlock], what: str, instead: str
) -> tuple[nn.Module, int]:
    """A copy of a model with the pruned weights of its blocks, packed where that is for, and the number of packed ones.

    All other weights are the model's own, which lies in memory as a whole; the dense model stays as it is. UserError,
    before a block is asked for, if memory is too small: see `check_room`.
    """
    check_room(checkpoint, what, instead)
    model, packed = checkpoint.model, 0
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for block in blocks:
        for linear in checkpoint.linears[block.index]:
            weight = nn.Parameter(block.weights[linear.key], requires_grad=False)
            owner = checkpoint.blocks[block.index]
            module: Any = None if linear.expert is not None else owner.get_submodule(linear.name)
            if is_packable(module) and zero_share(weight.detach()) >= LEAST:
                pruned = copy.copy(module)
                pruned._parameters = {**module._parameters, "weight": weight}
                memo[id(module)] = packed_linear(pruned)
                packed += 1
            else:
                memo[id(model.get_parameter(checkpoint.key(block.index, linear)))] = weight
    sparse = copy.deepcopy(model, memo)
    speed_dense_linears(sparse)
    return sparse, packed


# --- The sparse, dense and uniform model of a folder that `apply` wrote, or of a configuration, each made when asked.
#
# For the command `classify` they see classes in pictures. The probability of a class is its softmax. Of equal ones the
# class with the lower index comes first, as in accuracies.

Which = Side | Literal["uniform"]
OTHER = {
    True: "is an image classifier, which has no text; take `classify`",
    False: "is no image classifier of transformers; take `chat`",
}


@dataclass(frozen=True)
class Use:
    """The command that loads the models, for error messages, and its form `with_folder` that needs less memory.

    `inputs` of the models, once the folder of one is known; `of_images`: they are image classifiers, and not language
    models, whose zeros are left out in memory where that is faster.
    """

    command: str
    with_folder: str
    inputs: Callable[[ModelFolder], InputKind] = lambda folder: KINDS["tokens"]
    of_images: bool = False


CHAT = Use("chat", "chat DIR")


@dataclass(frozen=True)
class WholeModel:
    """A model and its folder; `opened`: a context in which it is whole; `bos`: its windows begin with BOS."""

    opened: Callable[[], AbstractContextManager[nn.Module]]
    folder: ModelFolder
    device: torch.device
    bos: bool


class BothModels(Released):
    """The two models of a sparse folder, or of a configuration, and uniform with the same pruner and target."""

    def __init__(self, path: Path, use: Use, place: Place, dense: bool = False) -> None:
        """`path`: of the folder, or the file; `dense`: that model will be asked for.

        UserError, before anything is loaded, for a path that is neither, a model of another kind, an unknown dense
        model, and a device that is not here.
        """
        self._use = use
        self._place = replace(place, base=path if path.is_dir() else path.parent)
        find_device(place.device)
        self._open = list[Released]()
        self._models = dict[Which, WholeModel]()
        self._speakers = dict[Which, Speaker]()
        self._context: Session | None = None
        if not path.is_dir() and not path.is_file():
            raise UserError(f"{path}: is no folder and no file; give a folder that `apply` wrote, or a configuration")
        self._path = path = folder_of(path, place)
        file = path / ABOUT if path.is_dir() else path
        self._about = read_config(file) if file.is_file() else None
        of_images = self._about.score == CLASSES if self._about else classifies_images(path)
        if of_images != use.of_images and (self._about or (path / "config.json").is_file()):
            raise UserError(f"{use.command}: {path} {OTHER[of_images]}")
        if dense:
            self._config()

    def model(self, side: Which) -> WholeModel:
        """A model, loaded when it is first asked; UserError if it cannot be loaded, or if there is no such model."""
        if side not in self._models:
            self._models[side] = self._of_file(side) if self._path.is_file() or side == "uniform" else self._load(side)
        return self._models[side]

    def speaker(self, side: Which) -> Speaker:
        """A model that chats; UserError likewise."""
        if side not in self._speakers:
            own = self.model(side)
            tokenizer = load_tokenizer(own.folder.path, own.folder.trusted)
            self._speakers[side] = Speaker(own.opened, own.device, tokenizer, own.bos)
        return self._speakers[side]

    def release(self) -> None:
        """Frees the models."""
        while self._open:
            self._open.pop().release()

    def _of_file(self, side: Which) -> WholeModel:
        """A model in the memory of the dense one: that itself, or a plan's, which has linears of its own."""
        config = self._config()
        if self._context is None:  # the dense model, ready to be pruned
            self._context = open_config(config, replace(self._place, base=self._place.base / config.folder))
            self._open.append(self._context)
        context, checkpoint = self._context, self._context.checkpoint
        opened: Callable[[], AbstractContextManager[nn.Module]] = partial(context.replay.whole, checkpoint.weights)
        if side != "dense":
            plan = (
                uniform_plan(config, context) if side == "uniform" else fit_plan(config, context, says_untrained=True)
            )
            self._place.watch(TrialStarted("pruning", plan))
            context = context.of(plan)
            names = self._use.command, self._use.with_folder
            if self._packs(checkpoint) and not plan.outer:
                model, _ = packed_copy(checkpoint, context.prune(plan), *names)
                opened = lambda: nullcontext(model)  # noqa: E731
            else:
                [weights] = context.measure(plan, [Kept(*names)])
                opened = partial(context.replay.whole, weights)
        return WholeModel(opened, context.folder, checkpoint.device, config.bos)

    def _load(self, side: Which) -> WholeModel:
        """The model of the folder, or the dense one that it was made from; UserError if that is another by now."""
        if side == "sparse":
            source = {"source": str(self._path.absolute()), "dtype": self._about.model.dtype if self._about else "auto"}
            model = ModelConfig.model_validate({**source, **of_model(self._place.allowed)})
            folder = resolve(model, Path(), self._place.note)
        else:
            config = self._config()
            model = config.model.model(self._place.allowed)
            folder = resolve(model, self._place.base / config.folder, self._place.note)
            check_model(config, folder)
        device, inputs = find_device(self._place.device), self._use.inputs(folder)
        self._place.note(f"loading {model.source}")
        checkpoint = Checkpoint.load(folder.path, find_dtype(model.dtype, device), device, folder.trusted)
        self._open.append(checkpoint)
        if side == "sparse" and self._packs(checkpoint):
            pack_linears(checkpoint)
        # A model's own code may raise anything, as for images of its processor's size.
        with as_user_error(f"model {folder.id}: ", f"cannot be run on {inputs.called}: {{}}"):
            replay = Replay(checkpoint, inputs)
        bos = bool(self._about and self._about.bos)
        return WholeModel(partial(replay.whole, checkpoint.weights), folder, device, bos)

    def _packs(self, checkpoint: Checkpoint) -> bool:
        return not self._use.of_images and is_fast(checkpoint.device) and checkpoint.offload == "none"

    def _config(self) -> Config:
        """The configuration; UserError for a folder without one."""
        if self._about is None:
            raise UserError(f"{self._path}: has no {ABOUT}, so its dense model is not known")
        return self._about


TOP = 5  # classes of an answer
BATCH = 32  # pictures at a time


class Guess(FrozenModel):
    """A class: its index and name in the model's config, and its probability."""

    index: int
    name: str
    probability: float


class Classified(FrozenModel):
    """The classes of a picture by the model that was asked, and by its dense model: the most probable is the first."""

    file: str
    classes: tuple[Guess, ...]
    dense: tuple[Guess, ...] | None = None


def classify(files: Sequence[Path], folder: Path, both: bool, place: Place) -> tuple[Classified, ...]:
    """The first `TOP` classes of each picture by the model of a folder or a configuration.

    `both`: by its dense model too. UserError, before a model is loaded, for a file that is
    no picture.
    """
    pictures, cache = pictures_in_files(files, "FILE"), list[Items]()
    for index in range(len(pictures)):
        pictures.picture(index)  # decoded once to see that all can be

    def images(model_folder: ModelFolder) -> Items:  # their pixels, by the processor of the first model
        if not cache:
            pixels = ImageProcessor.of(model_folder.path, model_folder.trusted).pixels(pictures)
            cache.append(Items.of({PIXELS: pixels, LABELS: torch.zeros(len(pixels), dtype=torch.int64)}, 1))
        return cache[0]

    def guesses(own: WholeModel) -> Iterator[tuple[Guess, ...]]:
        items, names = images(own.folder), model_config(own.folder.path, own.folder.trusted).id2label
        for start in range(0, len(items), BATCH):
            batch = items[start : start + BATCH].batch(own.device)
            with torch.inference_mode(), own.opened() as model:
                logits = LABELLED_IMAGES.forward(model, batch).logits  # [images, classes]
            if not logits.isfinite().all():
                raise UserError(f"classify: the numbers of {own.folder.id} overflow, or are not defined")
            # The most probable classes, of equal ones that of the lower index, and their probabilities.
            values, places = logits.float().softmax(1).sort(dim=1, descending=True, stable=True)
            for row in zip(places[:, :TOP].tolist(), values[:, :TOP].tolist(), strict=True):
                pairs = zip(*row, strict=True)
                yield tuple(Guess(index=k, name=class_name(names, k), probability=value) for k, value in pairs)

    use = Use("classify", "classify DIR FILE", lambda found: LABELLED_IMAGES.of({"test": images(found)}), True)
    with BothModels(folder, use, place, dense=both) as models, oom_as_user_error("classify"):
        sparse = list(guesses(models.model("sparse")))
        dense = list(guesses(models.model("dense"))) if both else [None] * len(sparse)
    return tuple(
        Classified(file=str(file), classes=own, dense=other)
        for file, own, other in zip(files, sparse, dense, strict=True)
    )
