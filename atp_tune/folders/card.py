"""The description of a sparse checkpoint: `atp_tune.json` for programs, a model card for people and the hub.

The card is made of what lies in the folder: its configuration, the record of `finetune`, and the head of the card that
it had, which says its licence. Whoever changes the folder has it written anew; the sections are in `card.md.jinja`.
"""

import os
import tomllib
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment
from pydantic import ValidationError

from atp_tune.allocations import is_fitted
from atp_tune.checkpoints.convert import ORIGIN, quiet
from atp_tune.checkpoints.files import Table, config_in, is_slim
from atp_tune.config.best import Baseline, Config, read_config
from atp_tune.config.data import ImageSet, Text, is_local_text, short_source
from atp_tune.config.manifest import Manifest, environment, sha256_by_name
from atp_tune.config.prune import UPDATING, Training, parse
from atp_tune.config.study import Data
from atp_tune.config.studyfile import invalid
from atp_tune.errors import UserError
from atp_tune.inputs.sources import hub_arguments
from atp_tune.measures import MEASURES, Accuracy, Change, Estimate, Gain, Perplexity, error_over
from atp_tune.plan import shown
from atp_tune.report.formats import escaped, fenced, measure, speed
from atp_tune.results.formatting import continuations_note, in_one_line
from atp_tune.results.results import NOTHING
from atp_tune.utils.cache import write_out
from atp_tune.utils.registry import FrozenModel
from atp_tune.utils.system import written

# --- The files beside the weights of a sparse checkpoint that say how it was pruned and fine-tuned.

ABOUT, FINETUNED = "atp_tune.json", "atp_tune.finetune.json"
CARD = "README.md"
DESCRIPTIONS = (ABOUT, FINETUNED, CARD)  # files that commands and people change later


@dataclass(frozen=True)
class PrunedWith:
    """The configuration of a checkpoint, whose paths start at `base`, and its texts, with absolute paths."""

    config: Config
    base: Path
    calibration: Data
    validation: Data
    test: Data


def origin(folder: Path) -> PrunedWith | None:
    """Reads the `atp_tune.json` of a folder; None if it has none, UserError if it is no configuration."""
    file = folder / ABOUT
    if not file.is_file():
        return None
    config = read_config(file)
    base, texts = folder / config.folder, config.texts
    return PrunedWith(
        config, base, *(rooted(text, base) for text in (config.calibration, texts.validation, texts.test))
    )


def new_manifest(folder: Path, device: str) -> Manifest:
    """The manifest of the files that a folder holds now."""
    return Manifest(files=sha256_by_name(folder, DESCRIPTIONS), environment=environment(device))


T = TypeVar("T", bound=Data)


def rooted(text: T, base: Path) -> T:
    """The text, or the images, with the absolute path of their file or folder."""
    if not is_local_text(text.source):
        return text
    kind, _, file = text.source.partition(":")
    path = os.path.realpath(written(file, base, "source"))  # no error for a loop of links
    return text.model_copy(update={"source": f"{kind}:{path}"})  # type: ignore[return-value]


def read_text(option: str, value: str, seqlen: int | None) -> Data:
    """A text from an option: its source, or its table of a study file on one line; paths start at the current folder.

    `seqlen`: tokens per window, unless the table says it; None: images. UserError that names the option.
    """
    try:
        given = tomllib.loads(f"text = {value}")["text"] if value.startswith("{") else {"source": value}
        return rooted(ImageSet(**given) if seqlen is None else Text(**{"seqlen": seqlen, **given}), Path())
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{option}: {value} is not a TOML table: {error}") from None
    except ValidationError as error:
        raise invalid(option, error, table=("images" if seqlen is None else "texts", "test")) from None


class Zeros(FrozenModel):
    """Numbers of zeros, before and after, and of all weights, in the linears that were fine-tuned."""

    before: int
    after: int
    weights: int


class PerplexityChange(FrozenModel):
    """Perplexity on one text before and after fine-tuning, and its change, paired by windows."""

    before: Perplexity
    after: Perplexity
    change: Change


class AccuracyChange(FrozenModel):
    """Accuracy before and after fine-tuning, and its gain, paired by image."""

    before: Accuracy
    after: Accuracy
    change: Gain


class HeldOut(FrozenModel):
    """The losses on held-out windows, or images, by step, from step 0; `best`: the step whose weights were written."""

    windows: int
    losses: tuple[tuple[int, float], ...]
    best: int


class Finetuned(FrozenModel):
    """The record of `finetune`, a published JSON format: new keys do not change its number.

    `bos`: all windows, of training too, begin with BOS. `manifest`: of the fine-tuned folder. Of an image classifier
    `text` and `test` are images, `windows` their number, and `accuracy` is on the test images. `held_out`: None if
    nothing was. `before`, `after` and `change` are on the test text; `validation` is on the study's text of that
    role, if it is another. `teacher`: the SHA-256 of the dense model whose predictions were learnt, with the loss `kl`.
    """

    format: Literal["atp_tune.finetune/2"] = "atp_tune.finetune/2"
    model: str
    fingerprint: str
    text: Data
    windows: int
    test: Data
    settings: Training
    losses: tuple[float, ...]
    before: Perplexity
    after: Perplexity
    change: Change
    dense: Perplexity | None
    zeros: Zeros
    seconds: float
    memory: int
    device: str
    versions: dict[str, str]
    bos: bool = False
    manifest: Manifest | None = None
    accuracy: AccuracyChange | None = None
    held_out: HeldOut | None = None
    validation: PerplexityChange | None = None
    teacher: str | None = None


def finetuned(folder: Path) -> Finetuned | None:
    """The record of `finetune` in a folder; None without one, UserError if it is not what that writes."""
    if not (folder / FINETUNED).is_file():
        return None
    try:
        return Finetuned.model_validate_json((folder / FINETUNED).read_bytes())
    except (OSError, ValidationError):
        raise UserError(f"{folder / FINETUNED}: is no record of `finetune`; download the folder again") from None


def stored_manifest(folder: Path) -> Manifest | None:
    """The manifest that a folder carries, None if an earlier version wrote it; UserError if nothing describes it.

    Of a fine-tuned folder it is in the record of `finetune`, since its configuration describes the one before.
    """
    if (done := finetuned(folder)) is not None:
        return done.manifest
    if (folder / ABOUT).is_file():
        return read_config(folder / ABOUT).manifest
    raise UserError(f"{folder}: holds no {ABOUT}; give a folder that `apply` wrote")


# --- The model card.

PROCESSOR = ("processor_config.json", "preprocessor_config.json")  # of models that read images and texts
LICENCE = ("license", "license_name", "license_link", "language")  # metadata that is copied from the dense model's card
UNKNOWN = "that-of-the-dense-model"  # where its folder says none
RELATION = "finetune"  # the hub knows adapter, finetune, merge and quantized, and would guess without it
_ATP = ", after [ATP](https://openreview.net/forum?id=otNB7BzsiR) (Huang et al., ICML 2025)"
SOURCES = {  # of allocations, see docs/references.md
    "atp": _ATP,
    "curve": _ATP,
    **dict.fromkeys(("gradient", "gradient-rows"), ", by gradients of the loss"),
    "owl": ", after OWL (Yin et al., ICML 2024)",
    **dict.fromkeys(("alphapruning", "alphapruning-linear"), ", after AlphaPruning (Lu et al., NeurIPS 2024)"),
}
THIS, OLDER = "**this model**", "the model before fine-tuning"
BEFORE = "All that follows in this card was written before that."
WIDTH = 40  # characters of a bar of sparsity 1
REPEATS = 0.5  # of its bytes, which zlib needs: usual prose of 60 to 250 bytes takes 0.65 and more, a loop 0.45 at most
SHORTEST = 60  # bytes of a text that is judged


@dataclass(frozen=True)
class Packed:
    """How a folder was packed: numbers of tensors packed as linears, and in the file alone; their bytes, and those of
    all weights, before and after; their `values`; the class that loads it; the perplexity on the test text before and
    after rounding, if values were rounded.
    """

    linears: int
    stored: int
    dense_bytes: int
    packed_bytes: int
    before: int
    after: int
    values: str
    auto: str
    rounding: tuple[Perplexity, Perplexity] | None

    @property
    def data(self) -> str:
        """The kind of data that it was measured on: text or images."""
        return "images" if self.auto == "AutoModelForImageClassification" else "text"


def describe(folder: Path, config: Config | None = None, packed: Packed | None = None) -> None:
    """Writes the card of a folder, and before it its configuration, unless that lies there already.

    The card of a folder that others made stays, with new sections. UserError if it cannot be written.
    """
    if config is not None:
        config.write(folder / ABOUT)
    elif (folder / ABOUT).is_file():
        config = read_config(folder / ABOUT)
    if config is not None:
        write_out(folder / CARD, str(model_card(config, folder, packed)).encode())
    elif (folder / CARD).is_file():
        done, text = finetuned(folder), (folder / CARD).read_text(errors="replace")
        values = TEMPLATE.new_context({"done": done, "packed": packed})
        tuned, added = ("".join(TEMPLATE.blocks[name](values)).strip() for name in ("tuned", "packed"))
        if tuned.partition("\n")[0] in text.splitlines():
            tuned = ""  # the card of a tuned folder, which is packed
        elif done and (own := read_card(folder / CARD)) and own.data.eval_results:
            own.data.eval_results = result(done.after, done.test, done.bos)
            text = str(own)
        sections = "\n\n".join(f"{section}\n\n{BEFORE}" for section in (tuned, added) if section)
        head, mark, rest = text.partition("\n## ")
        write_out(folder / CARD, f"{head.rstrip()}\n\n{sections}\n{mark}{rest}\n".encode())


def model_card(config: Config, folder: Path, packed: Packed | None = None) -> ModelCard:
    """The card of the folder that is made of a configuration."""
    from atp_tune.checkpoints.blocks import reads_images  # loads torch

    plan, text, done, hf_config = config.plan, config.texts.test, finetuned(folder), config_in(folder)
    # The name of the dense model, without the folders of the machine that pruned it.
    name = Path(short_source(config.model.id).removeprefix("pypi:")).name.partition("==")[0].removesuffix(".gguf")
    allocation = "uniform" if plan.is_uniform else f"{plan.allocation} {shown(plan.parameters)}".strip()
    amount, bits = f"{config.sparsity.realised:.1%} sparsity", config.bits
    style, width = "6.1%", WIDTH  # of the bar of a block
    if bits and config.only_rounds:
        amount, style, width = f"{bits.nominal:.2f} bits", "<4.3g", 4
    elif bits:
        amount += f" and {bits.nominal:.3g} bits"
    # The dense model's card says its licence. Other folders' cards name what they were tuned from, often a path.
    own = read_card(folder / CARD)
    metadata = own.data.to_dict() if own else {}
    licence = {key: metadata[key] for key in LICENCE if isinstance(metadata.get(key), str | list)}
    is_unknown = licence.get("license_name") == UNKNOWN
    licensed = "license" in licence and (licence["license"] != "other" or not is_unknown)
    if licensed and is_unknown:
        del licence["license_name"]  # a person has put a licence in the place of `other`
    if not licensed:
        files = sorted(file.name for file in folder.glob("LICENSE*"))
        licence |= {"license": "other", "license_name": UNKNOWN} | ({"license_link": files[0]} if files else {})
    on_hub = config.model.id if config.model.revision else None
    base = metadata.get("base_model") if (folder / ORIGIN).is_file() else on_hub
    kinds = ["sparse", "pruned"] * (not config.only_rounds) + ["quantized"] * (bits is not None)
    data = ModelCardData(
        base_model=base,
        base_model_relation=base and RELATION,
        library_name="mlx" if packed and packed.values == "mlx" else "transformers",
        pipeline_tag="image-text-to-text" if reads_images(folder) else text.words.task,
        tags=["atp-tune", *kinds, plan.method, allocation.split()[0]],
        model_name=f"{name} at {amount}",
        eval_results=(result(done.after, done.test, done.bos) if done else list(_results(config))) or None,
        **licence,
    )
    # What changed the weights that are kept.
    channels = parse(config.prune.pattern).channels
    updated = [plan.method] * (plan.method in (*UPDATING, "gptq"))
    updated += ["conjugate gradients"] * (bool(config.prune.refine) and not config.by_bits)
    if channels:
        updated = ["least squares"] * config.prune.channels.refit
    bars = (f"block {k:>3}  {s:{style}}  {'█' * round(width * s)}" for k, s in enumerate(config.amounts))
    values = {
        "card_data": data.to_yaml(), "config": config, "plan": plan, "done": done, "packed": packed, "made": hf_config,
        "title": data.model_name, "name": name, "allocation": allocation, "after": SOURCES.get(plan.allocation, ""),
        "fitted": is_fitted(plan.allocation), "quantizer": config.quantizer, "channels": channels, "updated": updated,
        "classifies": text.data == "images", "reads_images": reads_images(folder),
        "own_code": packed or is_slim(folder),
        "this": OLDER if done else THIS, **_scores(config, done, allocation),
        "test": text.told, "licensed": licensed,
        "notes": " ".join(by.note for by in MEASURES.values() if by.note and config.scored(measure=by)),
        "errors": error_over(text.nsamples and -(-text.nsamples // text.stride), text.words.unit),
        "speed": speed(config.speed).rows if config.speed else (),
        "note": config.continuations and continuations_note(config.continuations),
        "reader": "AutoProcessor" if any((folder / name).is_file() for name in PROCESSOR) else "AutoTokenizer",
        "chart": fenced("text", "\n".join(bars)),
    }  # fmt: skip
    return ModelCard(TEMPLATE.render(values))


def _scores(config: Config, done: Finetuned | None, allocation: str) -> Table:
    """The scores of dense, uniform and this model on the test text, where measured: a head and rows."""
    names: dict[Baseline, str] = {
        "dense": "dense",
        "uniform": f"{config.plan.method}, uniform",
        "best": f"{OLDER if done else THIS} ({config.plan.method}, {escaped(allocation)})",
    }
    measures = [by for by in MEASURES.values() if any(config.scored(model, measure=by) for model in names)]
    scores = [
        [
            name,
            *(str(config.scored(model, measure=by) or (model == "dense" and by.dense) or NOTHING) for by in measures),
        ]
        for model, name in names.items()
        if config.scored(model)
    ]
    if done and scores and done.test.told == config.texts.test.told:
        new = {"perplexity": done.after, "accuracy": done.accuracy and done.accuracy.after}
        scores.append([f"{THIS}, fine-tuned", *(str(new.get(by.name) or NOTHING) for by in measures)])
    return {"measures": [by.column for by in measures], "scores": scores, "models": [*names]}


def read_card(file: Path) -> Any:
    """The `ModelCard` in a file; None if it cannot be read, since a stranger may have written it."""
    try:
        with quiet("huggingface_hub"):
            return ModelCard.load(file, ignore_metadata_errors=True)
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError):
        return None


def _repeating(texts: Sequence[str]) -> int:
    """How many texts repeat themselves."""
    encoded = (text.encode() for text in texts)
    return sum(len(each) >= SHORTEST and len(zlib.compress(each, 9)) < REPEATS * len(each) for each in encoded)


def _results(config: Config) -> Iterator[EvalResult]:
    """The metrics of this model in the schema of the hub."""
    yield from result(config.scored(), config.texts.test, config.bos)
    for task in config.zero_shot.tasks if config.zero_shot else ():
        if score := task.scores.get("best", {}).get(task.metric):
            yield EvalResult(
                task_type="text-generation", dataset_type=task.task, dataset_name=task.task,
                metric_type=task.metric, metric_name=f"{task.num_fewshot}-shot {task.metric}",
                metric_value=round(score.value, 4),
            )  # fmt: skip


def result(score: Estimate | None, text: Data, bos: bool) -> list[EvalResult]:
    """A perplexity in the schema of the hub; none if it was not measured, or is not finite."""
    if score is None or not isfinite(score.value):
        return []
    metric = "perplexity over classes, the exponential of the mean cross-entropy"
    dataset: Table = {"dataset_type": text.data, "dataset_name": text.told}
    if isinstance(text, Text):
        metric = f"perplexity, {text.seqlen} tokens a window{', the first BOS' if bos else ''}"
        with suppress(KeyError, UserError):  # of a file or a module: no data set of the hub
            arguments = hub_arguments(text)
            dataset = {
                "dataset_type": arguments["path"], "dataset_name": short_source(text.source).removeprefix("hub:"),
                "dataset_config": arguments.get("name"), "dataset_split": arguments["split"],
                "dataset_revision": arguments["revision"],
            }  # fmt: skip
    return [
        EvalResult(
            task_type=text.words.task, metric_type="perplexity", metric_name=metric,
            metric_value=round(score.value, 4), **dataset,
        )
    ]  # fmt: skip


def _listed(settings: Table) -> str:
    """Settings behind the name of a method."""
    return "".join(f", {key} = {value}" for key, value in settings.items() if value is not None)


_ENVIRONMENT = Environment()
_ENVIRONMENT.filters |= {
    "escaped": escaped, "in_one_line": in_one_line, "listed": _listed, "loops": _repeating, "measure": measure,
}  # fmt: skip
TEMPLATE = _ENVIRONMENT.from_string(Path(__file__).with_name("card.md.jinja").read_text(encoding="utf-8"))
