"""Training after pruning: trains a sparse checkpoint on a text, or images, and writes another with the same zeros."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean
from time import monotonic, time
from typing import Any

from torch import Tensor

from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.devices import (
    arithmetic,
    device_name,
    find_device,
    find_dtype,
    oom_as_user_error,
    peak_memory,
    reset_peak_memory,
)  # fmt: skip
from atp_tune.checkpoints.files import small_files
from atp_tune.checkpoints.models import ModelFolder, resolve
from atp_tune.config.best import Config
from atp_tune.config.data import CLASSES, ImageSet, Text
from atp_tune.config.plugged import plug_in_texts
from atp_tune.config.prune import PruneConfig, RecoverConfig, Recovered, RecoveredScores, Training
from atp_tune.config.study import Data, ModelConfig
from atp_tune.errors import UserError, within
from atp_tune.events import Place, Step, TrialStarted, calling
from atp_tune.folders.applying import PLAIN, Shards, Way, folder_scores, sparse_folder, write_applied, write_sparse
from atp_tune.folders.card import (
    FINETUNED,
    AccuracyChange,
    Finetuned,
    HeldOut,
    PerplexityChange,
    PrunedWith,
    Zeros,
    describe,
    new_manifest,
    origin,
)
from atp_tune.folders.packing import Codes
from atp_tune.folders.training import Trainer, find_teacher, stored_format, windows_held_out, windows_read
from atp_tune.inputs.images import duplicate_images, image_items
from atp_tune.inputs.items import Items
from atp_tune.inputs.windows import first_windows, shared_windows, token_windows
from atp_tune.measures import Estimate, accuracy, by_kind, change, gain, perplexity
from atp_tune.results.formatting import duration
from atp_tune.run.session import Setup
from atp_tune.scores import Scores
from atp_tune.utils.cache import cache_dir, key, named_for, temporary_folder, versions
from atp_tune.utils.system import check_free, require

# --- What `finetune` trains and measures on: its texts, or images, which may not share documents, and their windows.

TEST_SHARE = 0.1  # of the training text: the test text, where no other is known


def choose(text: Data | None, test: Data | None, pruning: PrunedWith | None) -> tuple[Data, Data]:
    """The text to train on and the test text, or images; UserError if there is none, or if they share documents."""
    if pruning:
        text, test = text or pruning.calibration, test or pruning.test
    if text is None:
        raise UserError(
            "--text: is needed, since the folder does not say how it was pruned; for example --text file:PATH.txt"
        )
    if test is None:
        start, end = text.part
        cut = end - TEST_SHARE * (end - start)
        text, test = (text.model_copy(update={"part": part}) for part in ((start, cut), (cut, end)))
    others = {"test": test, **({"validation": pruning.validation, "study's test": pruning.test} if pruning else {})}
    for role, other in others.items():
        if text.overlaps(other):
            shared = "documents" if isinstance(text, Text) else "images"
            raise UserError(
                f"--{text.data}: {text.source} shares {shared} with the {role} {text.data}; "
                "give another source, split or part"
            )
    return text, test


def read_items(
    text: Data, measured: Mapping[str, Any], folder: ModelFolder, settings: Training, base: Path, bos: bool
) -> Items:
    """The windows, or images, to train on and to hold out; UserError if one that is measured is among them.

    `base`: where plug-ins read from; the files of other texts are absolute. Of images those that are measured too are
    left out, unless there are many. `settings.seqlen` is None of images.
    """
    needed = windows_read(settings)
    if isinstance(text, ImageSet):
        with within("--images"):
            whole = text.model_copy(update={"nsamples": min(text.nsamples or needed, needed)})
            items = image_items(whole, folder, base, at_most=text.nsamples is None)
        with within("--test-images"):
            others = {role: image_items(other, folder, base) for role, other in measured.items()}
        return items.without(duplicate_images({**others, "training": items})["training"])
    with within("--text"):
        whole_text = text.model_copy(update={"seqlen": settings.seqlen or text.seqlen})
        items = first_windows(whole_text, folder, base, needed, bos)
    for role, other in measured.items():
        with within(f"--{role}-text"):
            windows = token_windows(other, folder.path, base, bos=bos)
        if shared := shared_windows(items, windows):
            raise UserError(
                f"--text: {len(shared)} windows of {text.source} are in the {role} text too; give another source"
            )
    return items


SAVED = 20  # steps between two writes of the adapters
KEPT = 30 * 24 * 3600  # seconds that what was trained stays in the cache after its last use


@dataclass(frozen=True)
class Trained:
    """Products of a run beside its folder: its record, scores of the new folder by role of the text, and `part`."""

    record: Finetuned
    scores: Mapping[str, Scores]
    part: Path


class NoGainError(UserError):
    """No step lowered the loss on held-out windows."""


@dataclass(frozen=True)
class FinetuningJob:
    """One run of `finetune`; `dense` is the dense model's perplexity on the test text, if known.

    `teacher`: the dense model whose predictions are learnt, None if the next tokens are. What is trained `stays` in the
    cache at the end if another run may write the same folder. `codes`: of rounded weights, whose scales are trained.
    """

    setup: Setup
    folder: ModelFolder
    out: Path
    text: Data
    items: Items
    settings: Training
    dense: Estimate | None
    teacher: ModelFolder | None
    stays: bool
    codes: Codes | None

    @cached_property
    def facts(self) -> dict[str, str]:
        """The facts that identify the run, and so its result: settings, and contents of models and text."""
        settings = {name.replace("_", "-"): json.dumps(value) for name, value in self.settings.model_dump().items()}
        settings |= {"model": self.folder.content, "text": self.items.content}
        return settings | ({"teacher": self.teacher.content} if self.teacher else {})

    @cached_property
    def part(self) -> Path:
        """The file from which an interrupted run resumes."""
        if not self.stays:
            return self.out.with_name(f"{self.out.name}.part")
        device = find_device(self.setup.place.device)
        own = key(
            "recovered",
            settings=self.settings.model_dump(),
            model=self.folder.content,
            text=self.items.content,
            teacher=self.teacher and self.teacher.content,
            # The number formats in which the model is trained, and its dense model predicts.
            arithmetic=[*arithmetic(device, stored_format(self.folder.path)), str(find_dtype("auto", device))],
        )
        return cache_dir("recovered") / f"{own}.safetensors"

    def run(self) -> Trained:
        """Trains, writes the folder, and measures it."""
        place, source, settings = self.setup.place, self.folder.path, self.settings
        before = folder_scores(self.setup, source, f"checking {source}")
        device = find_device(place.device)
        reset_peak_memory(device)
        checkpoint = Checkpoint.load(source, stored_format(source), device, offload="none")
        # What is held out lies at the end.
        count = windows_held_out(len(self.items), settings)
        items = self.items[: len(self.items) - count]
        held_out = self.items[-count:] if count else None
        groups = None if self.codes is None else self.codes.quantize.group_size
        trainer = Trainer(checkpoint, items, settings, held_out, self.teacher, groups)
        place.watch(TrialStarted(f"fine-tuning {self.out}", None))
        place.note(f"training needs {trainer.memory}")
        if not count and settings.patience:
            place.note(
                f"{len(items)} {self.text.words.unit} are too few to hold some out: all steps are done, and count"
            )
        began = monotonic()
        held = self._train(trainer, count)
        seconds, memory, losses = monotonic() - began, peak_memory(device), tuple(trainer.losses)
        zeros, names = Counter[str](), trainer.adapters.names

        def counted(tensors: Iterator[tuple[str, Tensor, Tensor]]) -> Iterator[tuple[str, Tensor, Tensor]]:
            for name, was, tuned in tensors:
                zeros.update(before=int((was == 0).sum()), after=int((tuned == 0).sum()), weights=was.numel())
                yield name, was, tuned

        with sparse_folder(source, self.out) as folder:
            Shards(source, str(checkpoint.model.base_model_prefix)).write(
                folder, names, counted(trainer.adapters.merged(self.codes))
            )
            self.folder.check_unchanged()
            del trainer
            checkpoint.release()
            after = folder_scores(self.setup, folder, f"checking {self.out}")
            nlls = {role: (before[role]["nlls"], after[role]["nlls"]) for role in after}
            changes = {
                role: PerplexityChange(before=perplexity(was), after=perplexity(now), change=change(was, now))
                for role, (was, now) in nlls.items()
            }
            hits = None  # from the ranks of the right classes; of a language model there are none
            if was := before["test"].get("ranks", []):
                now = after["test"]["ranks"]
                hits = AccuracyChange(before=accuracy(was), after=accuracy(now), change=gain(was, now))
            done = Finetuned(
                model=named_for(source), fingerprint=self.folder.content, text=self.text, windows=len(items),
                test=self.setup.texts["test"], settings=settings, dense=self.dense, losses=losses,
                zeros=Zeros(**zeros), **changes["test"].model_dump(), validation=changes.get("validation"),
                accuracy=hits, seconds=seconds, memory=memory, device=device_name(device), versions=versions(),
                bos=self.items.bos, manifest=new_manifest(folder, device_name(device)), held_out=held,
                teacher=self.teacher and self.teacher.content,
            )  # fmt: skip
            (folder / FINETUNED).write_text(done.model_dump_json(indent=2) + "\n", encoding="utf-8")
            describe(folder)
        if not self.stays:
            self.part.unlink(missing_ok=True)
        return Trained(done, after, self.part)

    def _train(self, trainer: Trainer, held_out: int) -> HeldOut | None:
        """Runs the remaining steps until early stopping ends them, and takes the best adapters.

        Adapters are saved every `SAVED` steps. Returns what was measured on so many held-out items; None if nothing
        was. UserError, and nothing is left of the run, if no step was better than the model before.
        """
        total, place, losses = self.settings.steps, self.setup.place, trainer.losses
        # Of what stays in the cache, what no run has used for `KEPT` is removed.
        for file in self.part.parent.glob("*.safetensors") if self.stays else ():
            with suppress(OSError):  # another process removes it too
                if file != self.part and time() - file.stat().st_mtime > KEPT:
                    file.unlink()
        if self.part.exists():
            self.part.touch()
            trainer.restore(self.part, self.facts)
            place.note(f"resumes after step {len(losses)} of {total}")
        if trainer.must_measure:
            place.note(f"held-out loss before training: {trainer.measure():.4f}")
        before, began = len(losses), monotonic()
        while not trainer.has_ended:
            loss = trainer.step()
            done, text = len(losses), ""
            if trainer.must_measure:
                text = f", held out {trainer.measure():.4f} (lowest after step {trainer.early_stop.best[0]})"
            place.watch(Step(f"loss {loss:.3f}", done, total))
            if done % SAVED == 0 or trainer.has_ended:
                trainer.save(self.part, self.facts)
            if text or done % SAVED == 0 or trainer.has_ended:
                left = (monotonic() - began) / (done - before) * (total - done)
                place.note(f"step {done} of {total}: loss {fmean(losses[-SAVED:]):.3f}{text}, {duration(left)} left")
        if len(losses) < total:
            place.note(f"stopped: the held-out loss has not fallen in {self.settings.patience} measurements")
        if not (held := tuple(trainer.early_stop.losses)):
            return None
        (step, _), (_, first) = trainer.early_stop.best, held[0]
        if step == 0:
            self.part.unlink(missing_ok=True)
            last, loss = min(held[1:], key=lambda each: each[1])
            raise NoGainError(
                f"training: no step lowered the loss on the {held_out} held-out {self.text.words.unit} "
                f"({first:.4f} before, {loss:.4f} after step {last} at best), so nothing was written; lower the "
                f"learning rate, or give more or other {self.text.data}"
            )
        trainer.take_best()
        return HeldOut(windows=held_out, losses=held, best=step)


def finetune(
    model: Path,
    out: Path,
    text: Data | None,
    test: Data | None,
    settings: Training,
    place: Place,
    teacher: str | None = None,
    stays: bool = False,
    codes: Codes | None = None,
) -> Trained:
    """Fine-tunes the folder `model` into the folder `out`, and measures both on the test text.

    Also on the validation text that the folder was pruned with, if `test` is None. Of an image classifier these are
    images. `text` and `test` default to the calibration and test text that the folder was pruned with. Windows begin
    with BOS if they did when it was pruned. `place`: paths start where the folder's do. `teacher`: source of the dense
    model for the loss `kl`; by default the model that the folder was pruned from. What is trained `stays` in the cache,
    for another run. `codes`: of the folder's rounded weights; the scales of their groups are trained, and kept there.
    UserError if `out` exists, if the training text shares documents with the validation or test text, or if no step
    lowers the loss on held-out windows.
    """
    if settings.train == "lora":
        require("finetune", "training by LoRA")
    check_free(out)
    find_device(place.device)
    if not model.is_dir():
        raise UserError(f"{model}: is no folder; write one with: python tune.py apply --config FILE --out DIR")
    pruning = origin(model)
    if pruning:
        own = {"text": pruning.calibration} if text is None else {}
        own |= {"test_text": pruning.test, "validation_text": pruning.validation} if test is None else {}
        plug_in_texts(pruning.config, own, pruning.base, place.allowed.get("trust_plugins", False))
    if pruning and pruning.config.bits is not None and (codes is None or settings.train == "lora"):
        raise UserError(
            f"{model}: its weights are rounded, and training would undo that; `recover` in a study trains their scales"
        )
    own_test, (text, test) = test is None, choose(text, test, pruning)
    settings = settings.filled(getattr(pruning.validation if pruning else text, "seqlen", None))
    config = ModelConfig(source=str(model.absolute()), dtype=pruning.config.model.dtype if pruning else "auto")
    folder = resolve(config, Path(), place.note, lambda _, size: check_free(out, size))
    small_files(folder.path)  # refuses links before anything runs
    dense_model = None
    if settings.has_teacher:
        dense_model = find_teacher(teacher, pruning, folder, place.note, place.allowed)
    place, bos = replace(place, base=pruning.base if pruning else Path()), pruning is not None and pruning.config.bos
    measured = {"validation": pruning.validation} if pruning and own_test and pruning.validation != test else {}
    measured["test"] = test
    kinds = {isinstance(each, ImageSet) for each in (text, *measured.values())}
    if len(kinds) > 1:
        raise UserError(f"{folder.path}: is measured on images, or on text, and was given both; give one kind")
    if True in kinds:
        settings = settings.model_copy(update={"seqlen": None})
    items = read_items(text, measured, folder, settings, place.base, bos)
    dense = pruning.config.scored("dense") if pruning and pruning.test == test else None
    setup = Setup(config, PruneConfig(), measured, place, bos=bos, score=CLASSES if True in kinds else "next-token")
    with oom_as_user_error("training"):
        return FinetuningJob(setup, folder, out, text, items, settings, dense, dense_model, stays, codes).run()


# --- Recovery, as `[recover]` of a study asks: a configuration is pruned, and its kept weights are trained.
#
# What was trained is kept in the cache, by what it was trained with, so that a second run of the same machine writes
# the same folder without training.

NO_GAIN = "no step lowered the loss on the held-out windows"


def apply_trained(
    config: Config, recover: RecoverConfig, out: Path, place: Place, codes: Codes | None = None, way: Way = PLAIN
) -> Trained:
    """Prunes to a configuration, trains the kept weights, and writes the folder `out`, measured as `finetune` does.

    Arguments and errors are those of `apply`; NoGainError if no step lowers the held-out loss. `codes` get those of
    rounded weights, with scales as trained; of `way` only the check counts.
    """
    check_free(out)
    with temporary_folder(out) as pruned, temporary_folder(out) as parts:  # beside: relative paths stay right
        if codes is None and config.quantize is not None:
            codes = Codes(parts, config.quantize)
        place = replace(place, watch=calling(place.watch, str(pruned), "the pruned model"))
        write = partial(write_sparse, save=None if codes is None else codes.save)
        write_applied(config, pruned, place, replace(way, write=write, copies=2))
        return finetune(pruned, out, None, None, recover, place, stays=True, codes=codes)


def recovered(
    config: Config, recover: RecoverConfig, place: Place, uniform: Sequence[float] = (), kinds: Sequence[str] = ()
) -> Recovered:
    """Trains a configuration's kept weights, and measures the folder that `apply` will write.

    `uniform`: window NLLs of the uniform allocation on the test text, if known; `kinds`: those of that text, in turn.
    The folder is removed.
    """
    with temporary_folder(cache_dir("recovered") / "model") as folder:
        out = folder / "trained"
        place = replace(place, watch=calling(place.watch, str(out), "the best plan"))
        try:
            done = apply_trained(config, recover, out, place)
        except NoGainError:
            return Recovered(settings=recover, kept=False, reason=NO_GAIN)
    record, held, nlls = done.record, done.record.held_out, done.scores["test"]["nlls"]
    against = change(uniform, nlls) if len(uniform) == len(nlls) else None
    validation, own = (
        RecoveredScores(perplexity=each.after, change=each.change)
        if _is_finite(each.after) and _is_finite(each.change)
        else None
        for each in (record.validation or record, record)
    )
    fell = validation is not None and validation.change.value < 0
    if not fell:
        done.part.unlink(missing_ok=True)  # no run will write it
    changed = f"by {validation.change}" if validation else "to a number that is not finite"
    return Recovered(
        settings=recover,
        kept=fell,
        reason="" if fell else f"perplexity on the validation text changed {changed}",
        step=held.best if held else len(record.losses),
        steps=len(record.losses),
        seconds=record.seconds,
        validation=validation,
        test=own if record.validation else None,
        against_uniform=against if against and _is_finite(against) else None,
        kinds={kind: estimate for kind, estimate in by_kind(nlls, kinds).items() if _is_finite(estimate)},
    )


def _is_finite(estimate: Estimate) -> bool:
    """Whether JSON can hold it."""
    return math.isfinite(estimate.value + estimate.stderr)
