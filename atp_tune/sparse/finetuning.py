"""LoRA after pruning: trains a sparse checkpoint on a text, or images, and writes another with the same zeros."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from time import monotonic
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.convert import WEIGHTS
from atp_tune.checkpoints.devices import device_name, find_device, oom_as_user_error, peak_memory, reset_peak_memory
from atp_tune.checkpoints.models import ModelFolder, resolve
from atp_tune.checkpoints.trust import small_files
from atp_tune.errors import UserError
from atp_tune.events import EventHandler, Message, Step, TrialStarted
from atp_tune.extras import require
from atp_tune.inputs.images import Images, doubles_of, images_of
from atp_tune.inputs.windows import Windows, first_windows, recut, token_windows
from atp_tune.metrics.accuracy import accuracy, gain
from atp_tune.metrics.perplexity import Perplexity, change, perplexity
from atp_tune.results.formatting import duration
from atp_tune.search.context_config import ContextConfig, inputs_of
from atp_tune.sparse.applying import folder_scores
from atp_tune.sparse.card import amend, words
from atp_tune.sparse.provenance import (
    FINETUNED,
    AccuracyChange,
    Finetuned,
    PrunedWith,
    Settings,
    Zeros,
    manifest_of,
    origin,
)
from atp_tune.sparse.shards import Shards, check_free, sparse_folder
from atp_tune.spec.images import CLASSES, ImageSet
from atp_tune.spec.plugged import plug_in_texts
from atp_tune.spec.prune import PruneConfig
from atp_tune.spec.study import Data, ModelConfig
from atp_tune.spec.texts import Text
from atp_tune.storage.process_identity import versions

if TYPE_CHECKING:
    from atp_tune.sparse.training import Trainer

HELD_OUT = 0.1  # of the training text: the test text, where no other is known
SAVED = 20  # steps between two writes of the adapters


@dataclass(frozen=True)
class FinetuningJob:
    """One run of `finetune`; `dense` is the dense model's perplexity on the test text, if known."""

    setup: ContextConfig
    folder: ModelFolder
    out: Path
    text: Data
    items: Windows | Images
    settings: Settings
    dense: Perplexity | None
    watch: EventHandler

    @property
    def part(self) -> Path:
        """The file from which an interrupted run resumes."""
        return self.out.with_name(f"{self.out.name}.part")


def finetune(
    model: Path,
    out: Path,
    text: Data | None,
    test: Data | None,
    settings: Settings,
    device: str,
    watch: EventHandler,
    trusts_plugins: bool = False,
) -> Finetuned:
    """Fine-tunes the folder `model` into the folder `out`, and measures both on the test text.

    Of an image classifier both are images. `text` and `test` default to the calibration and test text that the folder
    was pruned with. Windows begin with BOS if they did when it was pruned. `trusts_plugins`: the code of sources of
    texts that it was pruned with may run.
    UserError if `out` exists, or if the training text shares documents with the validation or test text.
    """
    require("finetune", "finetune")
    check_free(out)
    if not model.is_dir():
        raise UserError(f"--model {model}: is no folder; write one with: python tune.py apply --config FILE --out DIR")
    made = origin(model)
    if made:
        own: dict[str, Data] = {"text": made.calibration} if text is None else {}
        own |= {"test_text": made.test} if test is None else {}
        plug_in_texts(made.config, own, made.base, trusts_plugins)
    if made and made.config.bits is not None:
        raise UserError(f"--model {model}: its weights are rounded, and training would undo that; train it before")
    text, test = choose(text, test, made)
    named = ModelConfig(source=str(model.absolute()), dtype=made.dtype if made else "auto")
    folder = resolve(named, Path(), lambda line: watch(Message(line)))
    small_files(folder.path, WEIGHTS)  # refuses links before anything runs
    bos = made is not None and made.bos
    base = made.base if made else Path()
    items: Windows | Images
    if isinstance(text, ImageSet) and isinstance(test, ImageSet):
        settings, score = settings.model_copy(update={"seqlen": None}), CLASSES
        items = read_training_images(text, test, folder, settings, base)
    elif isinstance(text, ImageSet) or isinstance(test, ImageSet):
        raise UserError(f"--model {model}: is measured on images, or on text, and was given both; give one kind")
    else:
        score = "next-token"
        items = read_windows(text, test, folder.path, settings, bos, base)
    dense = made.dense if made and made.test == test else None
    setup = ContextConfig(
        named, PruneConfig(), {"test": test}, base, device, bos=bos, inputs=inputs_of(score), score=score
    )
    with oom_as_user_error("finetune"):
        return _run(FinetuningJob(setup, folder, out, text, items, settings, dense, watch))


def choose(text: Data | None, test: Data | None, made: PrunedWith | None) -> tuple[Data, Data]:
    """The text to train on and the test text, or images; UserError if there is none, or if they share documents."""
    if made:
        text, test = text or made.calibration, test or made.test
    if text is None:
        raise UserError(
            "--text: is needed, since the folder does not say how it was pruned; for example --text file:PATH.txt"
        )
    if test is None:
        start, end = text.part
        cut = end - HELD_OUT * (end - start)
        text, test = (text.model_copy(update={"part": part}) for part in ((start, cut), (cut, end)))
    kept: dict[str, Data] = {"test": test}
    if made:
        kept |= {"validation": made.validation, "study's test": made.test}
    for role, other in kept.items():
        if _share(text, other):
            what = ("documents", "text") if isinstance(text, Text) else ("images", "images")
            raise UserError(
                f"--text: {text.source} shares {what[0]} with the {role} {what[1]}; give another source, split or part"
            )
    return text, test


def _share(one: Data, other: Data) -> bool:
    if isinstance(one, Text):
        return isinstance(other, Text) and one.overlaps(other)
    return isinstance(other, ImageSet) and one.overlaps(other)


def read_training_images(text: ImageSet, test: ImageSet, folder: ModelFolder, settings: Settings, base: Path) -> Images:
    """The images to train on, as many as the steps need, but those of the test; UserError if it has many of them."""
    needed = settings.steps * settings.batch
    with _naming("--text"):
        whole = text.model_copy(update={"nsamples": min(text.nsamples or needed, needed)})
        found = images_of(whole, folder, base, at_most=text.nsamples is None)
    with _naming("--test-text"):
        measured = images_of(test, folder, base)
    doubles = doubles_of({"test": measured, "training": found})["training"]
    return found.without(doubles) if doubles else found


def read_windows(text: Text, test: Text, folder: Path, settings: Settings, bos: bool, base: Path) -> Windows:
    """The windows to train on, as many as the steps need; UserError if the test text has one of them too.

    `base`: where plug-ins read from; the files of other texts are absolute.
    """
    seqlen = settings.seqlen or text.seqlen
    with _naming("--text"):
        whole = text.model_copy(update={"seqlen": seqlen})
        found = first_windows(whole, folder, base, settings.steps * settings.batch, bos=bos)
    with _naming("--test-text"):
        measured = token_windows(test, folder, base, bos=bos)
    tokens = min(seqlen, test.seqlen) - bos
    known = {row.tobytes() for row in recut(measured, tokens).ids}
    if shared := sum(row.tobytes() in known for row in recut(found, tokens).ids):
        raise UserError(f"--text: {shared} windows of {text.source} are in the test text too; give another source")
    return found


@contextmanager
def _naming(option: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"{option}: {error}") from None


def _run(job: FinetuningJob) -> Finetuned:
    from atp_tune.sparse.training import Trainer, stored_format

    before = folder_scores(job.setup, job.folder.path, job.watch, f"checking {job.folder.path}")
    device = find_device(job.setup.device)
    reset_peak_memory(device)
    checkpoint = Checkpoint.load(job.folder.path, stored_format(job.folder.path), device, offload="none")
    items = torch.from_numpy(job.items.ids) if isinstance(job.items, Windows) else job.items
    trainer = Trainer(checkpoint, items, job.settings)
    job.watch(TrialStarted(f"fine-tuning {job.out}", None))
    began = monotonic()
    _train(trainer, job)
    seconds, memory, losses = monotonic() - began, peak_memory(device), tuple(trainer.losses)
    with sparse_folder(job.folder.path, job.out) as folder:
        zeros = _write(trainer, checkpoint, job, folder)
        del trainer
        checkpoint.release()
        after = folder_scores(job.setup, folder, job.watch, f"checking {job.out}")
        done = Finetuned(
            model=job.folder.path.name, fingerprint=job.folder.content, text=job.text, windows=len(job.items),
            test=job.setup.texts["test"], settings=job.settings, dense=job.dense, losses=losses, zeros=zeros,
            before=perplexity(before.nlls), after=perplexity(after.nlls), change=change(before.nlls, after.nlls),
            accuracy=_accuracies(before.ranks, after.ranks),
            seconds=seconds, memory=memory, device=device_name(device), versions=versions(),
            bos=isinstance(job.items, Windows) and job.items.bos,
            manifest=manifest_of(folder, device_name(device)),
        )  # fmt: skip
        (folder / FINETUNED).write_text(done.model_dump_json(indent=2) + "\n", encoding="utf-8")
        amend(folder, "Fine-tuned after pruning", _said(done))
    job.part.unlink(missing_ok=True)
    return done


def _accuracies(before: list[int], after: list[int]) -> AccuracyChange | None:
    """Accuracies from the ranks of the right classes; None of a language model."""
    if not before:
        return None
    return AccuracyChange(before=accuracy(before), after=accuracy(after), change=gain(before, after))


def _train(trainer: "Trainer", job: FinetuningJob) -> None:
    """Runs the remaining steps, and saves the adapters every `SAVED` steps."""
    from atp_tune.sparse.training import facts_of

    facts, total = facts_of(job.settings, model=job.folder.content, text=job.items.content), job.settings.steps
    if job.part.exists():
        trainer.restore(job.part, facts)
        job.watch(Message(f"resumes after step {len(trainer.losses)} of {total}"))
    before, began = len(trainer.losses), monotonic()
    for done in range(before + 1, total + 1):
        loss = trainer.step()
        job.watch(Step(f"loss {loss:.3f}", done, total))
        if done % SAVED == 0 or done == total:
            trainer.save(job.part, facts)
            left = (monotonic() - began) / (done - before) * (total - done)
            job.watch(
                Message(f"step {done} of {total}: loss {fmean(trainer.losses[-SAVED:]):.3f}, {duration(left)} left")
            )


def _write(trainer: "Trainer", checkpoint: Checkpoint, job: FinetuningJob, folder: Path) -> Zeros:
    """Writes the weights with merged adapters; counts their zeros before and after."""
    zeros = Counter[str]()

    def counted() -> Iterator[tuple[str, Tensor, Tensor]]:
        for name, was, tuned in trainer.adapters.merged():
            zeros.update(before=int((was == 0).sum()), after=int((tuned == 0).sum()), weights=was.numel())
            yield name, was, tuned

    Shards(job.folder.path, str(checkpoint.model.base_model_prefix)).write(folder, trainer.adapters.names, counted())
    job.folder.check_unchanged()
    return Zeros(**zeros)


def _said(done: Finetuned) -> str:
    """The section of the model card."""
    settings = ", ".join(f"{key} {value:g}" for key, value in done.settings.model_dump(exclude_none=True).items())
    zeros, bos = done.zeros, ", each beginning with BOS" if done.bos else ""
    own = {} if done.settings.seqlen is None else {"seqlen": done.settings.seqlen}
    trained = done.text.model_copy(update={"nsamples": done.windows, **own})
    hits = done.accuracy and f"Accuracy: {done.accuracy.before} before, {done.accuracy.after} after. "
    return (
        f"The weights that are not zero were trained with LoRA on {words(trained)}{bos} ({settings}). "
        f"{zeros.after:,} of {zeros.weights:,} weights are zero, {zeros.before:,} were before. "
        f"Perplexity on {words(done.test)}: {done.before} before, {done.after} after ({done.change}). {hits or ''}"
        f"The sections below describe the model before fine-tuning; {FINETUNED} has the rest."
    )
