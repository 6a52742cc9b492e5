"""The description of a sparse checkpoint: `atp_tune.json` for programs, a model card for people and the hub."""

import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from atp_tune.allocations import is_fitted
from atp_tune.cache import write_out
from atp_tune.checkpoints.convert import ORIGIN, quiet
from atp_tune.checkpoints.files import Table, config_in, is_slim
from atp_tune.errors import UserError
from atp_tune.inputs.documents import hub_arguments
from atp_tune.measures import MEASURES, Estimate, error_over
from atp_tune.metrics import Continuations
from atp_tune.plan import shown
from atp_tune.report.contents import measure, speed
from atp_tune.report.markdown import escaped, fenced
from atp_tune.results.formatting import continuations_note, in_one_line
from atp_tune.results.results import NOTHING
from atp_tune.sparse.provenance import ABOUT, CARD, FINETUNED, Finetuned
from atp_tune.spec.config import Baseline, Compared, Config, ZeroShot
from atp_tune.spec.data import MEMORY, ImageSet, short_source
from atp_tune.spec.facts import is_local_text
from atp_tune.spec.patterns import parse
from atp_tune.spec.prune import UPDATING
from atp_tune.spec.study import Data

PROCESSOR = ("processor_config.json", "preprocessor_config.json")  # of models that read images and texts
TEMPLATE = Path(__file__).with_name("card.md.jinja")
LICENCE = ("license", "license_name", "license_link", "language")  # metadata that is copied from the dense model's card
UNKNOWN = "that-of-the-dense-model"  # where its folder says none
RELATION = "finetune"  # the hub knows adapter, finetune, merge and quantized, and would guess without it
_ATP = ", after [ATP](https://openreview.net/forum?id=otNB7BzsiR) (Huang et al., ICML 2025)"
SOURCES = {  # of allocations, see docs/references.md
    "atp": _ATP,
    "curve": _ATP,
    **dict.fromkeys(("prices", "row-prices"), ", by gradients of the loss"),
    "owl": ", after OWL (Yin et al., ICML 2024)",
    **dict.fromkeys(("alphapruning", "alphapruning-linear"), ", after AlphaPruning (Lu et al., NeurIPS 2024)"),
}
THIS = "**this model**"
MODELS: dict[Compared, str] = {"dense": "dense", "uniform": "uniform", "best": THIS}  # names in zero-shot scores
EQUAL = "Every tensor that was not pruned is equal to the dense model's byte for byte."
DENSE_FILES = """\
**The zeros are stored in dense files. By themselves they make nothing smaller and nothing faster**: this folder is as
large as the dense model's and runs at the same speed. `atp-tune pack` makes a folder without them, which is smaller,
and faster on a CPU."""
CLASSIFIER_FILES = """\
**The zeros are stored in dense files. By themselves they make nothing smaller and nothing faster**: this folder is as
large as the dense model's and runs at the same speed. `atp-tune pack` makes a folder without them, which is smaller."""
ALONE = "No other library is needed."
MASKED_FILES = """\
**The pruned channels are stored as zeros. By themselves they make nothing smaller and nothing faster**: this folder is
as large as the dense model's and runs at the same speed. `apply --slim` makes the same folder without them."""
SLIM_FILES = """\
**The pruned channels are not stored**: the matrices are dense and narrower, so this folder is smaller than the dense
model's, and usually faster, without a kernel of its own. Measured once, on a CPU in float32: SmolLM2-135M without a
quarter of the weights of its blocks read a prompt 1.3 and decoded 1.2 times as fast."""
OWN_CODE = "It needs `import atp_tune` before it, or `trust_remote_code=True` in the call."
WIDTH = 40  # characters of a bar of sparsity 1


@dataclass(frozen=True)
class Dense:
    """The dense model of a sparse checkpoint: its folder, and its commit if it is from the hub.

    `reads_images`: it reads images too; without a pruned tower only its language model was pruned.
    """

    folder: Path
    revision: str | None
    reads_images: bool = False


def describe(folder: Path, config: Config, dense: Dense) -> None:
    """Writes both files into a folder, over older ones; UserError if they cannot be written."""
    write_out(folder / ABOUT, config.to_json().encode())
    write_out(folder / CARD, str(model_card(config, dense, folder)).encode())


def model_card(config: Config, dense: Dense, folder: Path | None = None) -> ModelCard:
    """The card of the model that `apply` makes of a configuration; `folder`: where it lies."""
    bits, plan = config.bits, config.plan
    amount = f"{config.sparsity.realised:.1%} sparsity"
    if bits is not None:
        amount = f"{bits.nominal:.2f} bits" if config.by_bits else f"{amount} and {bits.nominal:g} bits"
    name = f"{_base(config)} at {amount}"
    own = read_card(dense.folder / CARD)
    found: Table = own.data.to_dict() if own else {}
    kept: Table = {key: found[key] for key in LICENCE if isinstance(found.get(key), str | list)}
    licensed = "license" in kept
    if not licensed:
        files = sorted(file.name for file in dense.folder.glob("LICENSE*"))
        kept |= {"license": "other", "license_name": UNKNOWN} | ({"license_link": files[0]} if files else {})
    # Other folders' cards name what their model was tuned from, often a path.
    base = found.get("base_model") if (dense.folder / ORIGIN).is_file() else config.model.id if dense.revision else None
    kinds = ["sparse", "pruned"] * (not config.by_bits) + ["quantized"] * (bits is not None)
    task = "image-text-to-text" if dense.reads_images else "text-generation"
    data = ModelCardData(
        base_model=base,
        base_model_relation=base and RELATION,
        library_name="transformers",
        pipeline_tag="image-classification" if isinstance(config.texts.test, ImageSet) else task,
        tags=["atp-tune", *kinds, plan.method, _allocation(config).split()[0]],
        model_name=name,
        eval_results=list(_results(config)) or None,
        **kept,
    )
    own_values = {
        "name": escaped(name),
        "licensed": licensed,
        "alone": OWN_CODE if folder is not None and is_slim(folder) else ALONE,
    }
    values = _values(config, dense) | own_values
    card: ModelCard = ModelCard.from_template(data, template_path=str(TEMPLATE), **values)
    return card


def _values(config: Config, dense: Dense) -> Table:
    """The values of the template, beside the configuration, its plan, and the dense model."""
    text, plan, said = config.texts.test, config.plan, config.continuations
    by_bits, channels = config.by_bits, parse(config.prune.pattern).channels
    head, scores = _scores(config)
    # What changed the weights that are kept; "" if nothing did.
    changed = [plan.method] if plan.method in (*UPDATING, "gptq") else []
    updated = " and ".join([*changed, *(["conjugate gradients"] if config.prune.refine and not by_bits else [])])
    files = CLASSIFIER_FILES if isinstance(text, ImageSet) else DENSE_FILES
    if channels:
        updated = "least squares" if config.prune.channels.refit else ""
        files = SLIM_FILES if config.slim else MASKED_FILES
    rounding, also, equal = "", "", EQUAL
    if config.bits is not None and by_bits:
        effective = config.bits.effective
        rounding = f"{config.bits.nominal:.2f} bits each"
        rounding += "" if effective is None else f", {effective:.2f} with the scales of groups"
        files, equal = FLOAT_FILES, EQUAL.replace("pruned", "rounded")
    elif config.bits is not None:
        also = f"Kept weights are rounded to {plan.fixed_bits} bits by {_quantizer(config)}{AS_FLOATS}"
    bars = (
        f"block {k:>3}  {f'{s:<4.3g}' if by_bits else f'{s:6.1%}'}  {'█' * round((4 if by_bits else WIDTH) * s)}"
        for k, s in enumerate(plan.amounts)
    )
    return {
        "config": config, "plan": plan, "dense": dense,
        "base": escaped(_source(config, dense)),
        "allocation": _allocation(config),
        "after": SOURCES.get(plan.allocation, ""),
        "rounded": not plan.is_even if by_bits else len(set(plan.amounts)) > 1,
        "measures": head, "scores": scores,
        "notes": " ".join(by.note for by in MEASURES.values() if by.note and config.scored(measure=by)),
        "test": escaped(words(text)),
        "errors": error_over(
            text.nsamples and -(-text.nsamples // text.stride), "images" if isinstance(text, ImageSet) else "windows"
        ),
        "models": list(MODELS.values()),
        "tasks": list(_tasks(config.zero_shot)) if config.zero_shot else [],
        "speed": [map(escaped, row) for row in speed(config.speed).rows] if config.speed else [],
        "continuations": [
            [escaped(in_one_line(text)) for text in (prompt, *(made[name] for name in MODELS))]
            for prompt, made in (said.rows() if said else ())
        ],
        "loops": loops(said, THIS) if said else "",
        "untested": list(map(escaped, untested(config, dense.folder, words(text).partition(",")[0]))),
        "elsewhere": _source(config, dense) == _base(config),
        "how": continuations_note(said) if said else "",
        "updated": updated, "channels": channels,
        "bits": rounding, "also": also,
        "draws": _draws(config),
        "equal": equal, "dense_files": files,
        "classifies": isinstance(text, ImageSet),
        "reader": "AutoProcessor" if any((dense.folder / name).is_file() for name in PROCESSOR) else "AutoTokenizer",
        "chart": fenced("text", "\n".join(bars)),
        "in_memory": config.model.id.startswith(MEMORY),
        "facts": {key: escaped(value) for key, value in _facts(config, dense).items()},
    }  # fmt: skip


def _base(config: Config) -> str:
    """The name of the dense model, without the folders of the machine that pruned it."""
    name = short_source(config.model.id).removeprefix("pypi:")
    return Path(name).name.partition("==")[0].removesuffix(".gguf")


def _source(config: Config, dense: Dense) -> str:
    """The source of the dense model if others can load it from there, else its name."""
    return config.model.id if dense.revision or config.model.id.startswith("pypi:") else _base(config)


def read_card(file: Path) -> Any:
    """The `ModelCard` in a file; None if it cannot be read, since a stranger may have written it."""
    try:
        with quiet("huggingface_hub"):
            return ModelCard.load(file, ignore_metadata_errors=True)
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError):
        return None


def _draws(config: Config) -> str:
    """A sentence on the perplexity of this plan over several draws of the calibration text; empty without any."""
    found = config.draws and config.draws.best
    if not found:
        return ""
    against = f", {found.beside('uniform’s')}" if found.change else ""
    how = found.how(config.texts.validation.data, is_fitted(config.plan.allocation))
    was = "was, before training," if config.is_trained else "is"
    return f"Over {found.count} draws of the calibration text it {was} {found}{against} ({how})."


def _tasks(found: ZeroShot) -> Iterator[Table]:
    """Zero-shot scores: a row for each task, then the mean."""
    for task in found.tasks:
        cells = [measure(task.scores.get(model, {}).get(task.metric), task.metric) for model in MODELS]
        yield {"name": escaped(f"{task.task}, {task.metric}"), "cells": cells}
    if found.mean:
        yield {"name": "mean", "cells": [measure(found.mean.get(model)) for model in MODELS]}


def _scores(config: Config) -> tuple[list[str], list[list[str]]]:
    """A head and rows: the scores of dense, uniform and this model on the test text, where measured."""
    names: dict[Baseline, str] = {
        "dense": "dense",
        "uniform": f"{config.plan.method}, uniform",
        "best": f"{THIS} ({config.plan.method}, {escaped(_allocation(config))})",
    }
    shown = [by for by in MEASURES.values() if any(config.scored(model, measure=by) for model in names)]
    rows = [
        [name, *(str(config.scored(model, measure=by) or (model == "dense" and by.dense) or NOTHING) for by in shown)]
        for model, name in names.items()
        if config.scored(model)
    ]
    return [by.column for by in shown], rows


def _results(config: Config) -> Iterator[EvalResult]:
    """The metrics of this model in the schema of the hub."""
    yield from result(config.scored(), config.texts.test, config.bos)
    for task in config.zero_shot.tasks if config.zero_shot else ():
        if found := task.scores.get("best", {}).get(task.metric):
            yield EvalResult(
                task_type="text-generation", dataset_type=task.task, dataset_name=task.task,
                metric_type=task.metric, metric_name=f"{task.num_fewshot}-shot {task.metric}",
                metric_value=round(found.value, 4),
            )  # fmt: skip


def result(score: Estimate | None, text: Data, bos: bool) -> list[EvalResult]:
    """A perplexity in the schema of the hub; none if it was not measured, or is not finite."""
    if score is None or not isfinite(score.value):
        return []
    task, kind = "text-generation", "text"
    if isinstance(text, ImageSet):
        task, kind = "image-classification", "images"
        metric = "perplexity over classes, the exponential of the mean cross-entropy"
    else:
        metric = f"perplexity, {text.seqlen} tokens a window{', the first BOS' if bos else ''}"
    dataset: Table = {"dataset_type": kind, "dataset_name": words(text)}
    if not isinstance(text, ImageSet):
        with suppress(KeyError, UserError):  # of a file or a module: no data set of the hub
            found = hub_arguments(text)
            dataset = {
                "dataset_type": found["path"], "dataset_name": short_source(text.source).removeprefix("hub:"),
                "dataset_config": found.get("name"), "dataset_split": found["split"],
                "dataset_revision": found["revision"],
            }  # fmt: skip
    value = round(score.value, 4)
    return [EvalResult(task_type=task, metric_type="perplexity", metric_name=metric, metric_value=value, **dataset)]


def words(text: Data) -> str:
    """A text, or images, in a few words: source, split, part and windows; without folders."""
    kind, _, rest = text.source.partition(":")
    if isinstance(text, ImageSet):
        part = "" if text.part == (0, 1) else f", part {text.part[0]:g} to {text.part[1]:g} shuffled"
        name = f"{kind}:{Path(rest).name}" if is_local_text(text.source) else text.source
        split = f" {text.split}" if text.split else ""
        return f"{name}{split}{part}, {text.nsamples or 'all'} images"
    source = f"{kind}:{Path(rest).name}" if kind == "file" else short_source(text.source)
    part = "" if text.part == (0, 1) else f", part {text.part[0]:g} to {text.part[1]:g}{' shuffled' * text.shuffle}"
    split = f" {text.split}" if text.split else ""
    items = "windows" if text.images is None else "pairs of image and text"
    return f"{source}{split}{part}, {text.nsamples or 'all'} {items} of {text.seqlen} tokens"


def _allocation(config: Config) -> str:
    if config.plan.is_uniform:
        return "uniform"
    return f"{config.plan.allocation} {shown(config.plan.parameters)}".strip()


def _facts(config: Config, dense: Dense) -> dict[str, str]:
    def listed(settings: Mapping[str, Any]) -> str:
        return "".join(f", {key} = {value}" for key, value in settings.items() if value is not None)

    found = {
        "dense model": f"{_source(config, dense)}, "
        + (f"commit {dense.revision}" if dense.revision else f"content {config.model.fingerprint[:12]}…")
    }
    if not config.by_bits:
        pruner = config.plan.method
        found["pruner"] = f"{pruner}{listed({**config.prune.told(pruner), **config.prune.refinement})}"
        found["pattern of zeros"] = config.prune.pattern
    if config.quantize is not None and config.bits is not None:
        quantizer = _quantizer(config)
        found["quantizer"] = f"{quantizer}{listed(config.quantize.told(quantizer))}"
        found["bits asked for"] = f"{config.bits.target:g} a weight"
    found |= {
        "statistics": f"{config.prune.statistics}, in {config.model.dtype}",
        "allocation": _allocation(config),
        "calibration text": words(config.calibration),
        **({"BOS": "every window of every text begins with it"} if config.bos else {}),
        "found by": "no search" if config.trial is None else f"study {config.study}, trial {config.trial}",
        **({} if config.trial is None else {"validation text": words(config.texts.validation)}),
        "seed": str(config.seed),
        "versions": ", ".join(f"{name} {version}" for name, version in config.versions.items()),
    }
    return found


def _quantizer(config: Config) -> str:
    return config.quantize.quantizers[0] if config.quantize and not config.by_bits else config.plan.method


# --- What the model card says where weights are rounded to fewer bits.

FLOAT_FILES = """\
**The rounded weights are stored as floats**: this folder is as large as the dense model's and runs at the same speed.
`atp-tune apply --packed` makes a folder that stores the bits, and `atp-tune export` recipes for engines that do."""
AS_FLOATS, AS_CODES = ", as floats.", ", and stored as codes."


# --- What a model card admits: what was not tested, by what its configuration has, and texts that repeat themselves.

REPEATS = 0.5  # of its bytes, which zlib needs: usual prose of 60 to 250 bytes takes 0.65 and more, a loop 0.45 at most
SHORTEST = 60  # bytes of a text that is judged


def untested(config: Config, folder: Path, text: str) -> Iterator[str]:
    """A line for each; `folder`: of the dense model, `text`: the test text in words."""
    device = config.manifest and config.manifest.environment.device
    if device:
        cpu = device.startswith("cpu")
        yield (
            "A GPU: it was pruned and measured on a CPU." if cpu else f"A CPU: it was pruned and measured on {device}."
        )
    if isinstance(config.texts.test, ImageSet):
        yield f"Pictures unlike those of {text}, and single classes."
    else:
        yield f"Text unlike {text}: other subjects, other languages."
        # The tokens that a model takes at once, by its config.json.
        table = config_in(folder)
        found = table.get("max_position_embeddings") or (table.get("text_config") or {}).get("max_position_embeddings")
        most, seqlen = (found if isinstance(found, int) else None), getattr(config.texts.test, "seqlen", 0)
        if most is not None and most > seqlen:
            yield f"Contexts of more than {seqlen:,} tokens; the dense model takes {most:,}."
        done = [] if config.zero_shot is None else sorted({task.task for task in config.zero_shot.tasks})
        yield f"Tasks other than {', '.join(done)}." if done else "Tasks: no benchmark was run."
        if config.continuations is None:
            yield "What it writes: no text was generated."
        yield "Conversations, facts, refusals and bias, all of which pruning changes."
    if config.draws is None:
        yield "Other windows of the calibration text."
    if config.speed is None:
        yield "Speed and memory."


def loops(found: Continuations, this: str) -> str:
    """A sentence on the texts of `this` model and of the dense one that repeat themselves; "" if none of its own do."""

    def repeating(texts: Sequence[str]) -> int:
        said = (text.encode() for text in texts)
        return sum(len(each) >= SHORTEST and len(zlib.compress(each, 9)) < REPEATS * len(each) for each in said)

    own, dense = repeating(found.best), repeating(found.dense)
    if not own:
        return ""
    return f"{own} of the {len(found.best)} texts of {this} repeat themselves, of the dense model's {dense or 'none'}."


# --- What a model card says of a sparse checkpoint that was trained after pruning.

HEAD = re.compile(r"\A\s*---\n.*?\n---\n", re.DOTALL)  # the metadata at the head of a card
HEADING = "Fine-tuned after pruning"
OLDER = "the model before fine-tuning"
CHANGED = {
    EQUAL: "Every tensor that was neither pruned nor fine-tuned is equal to the dense model's byte for byte.",
    THIS: OLDER,
}
TRAINED = {
    "lora": "The weights that are not zero were trained with LoRA",
    "scales": "Scales of the rows and columns of each linear were trained, and multiplied into its weights,",
}


def amend(folder: Path, done: Finetuned) -> None:
    """Adds a section above the others of a folder's card, if it has one, and the new perplexity.

    The other sections then name the model before fine-tuning.
    """
    file = folder / CARD
    if not file.is_file():
        return
    text = HEAD.sub("", file.read_text(errors="replace"))
    card: Any = read_card(file) or ModelCard(text, ignore_metadata_errors=True)
    found = result(done.after, done.test, done.bos) if card.data.model_name else []
    card.data.eval_results = found or None
    head, mark, rest = card.text.partition("\n## ")
    for before, after in CHANGED.items():
        rest = rest.replace(before, after)
    if f"measured on {escaped(words(done.test))}" in rest:
        cells = [f"{THIS}, fine-tuned", done.after, *([done.accuracy.after] if done.accuracy else [])]
        new = f"| {' | '.join(map(str, cells))} |\n"
        rest = re.sub(rf"^\| {OLDER} \(.*\n", lambda row: f"{row[0]}{new}", rest, count=1, flags=re.MULTILINE)
    head = head.rstrip().replace("and without retraining.", "and trained after that.")
    card.text = f"{head}\n\n## {HEADING}\n\n{escaped(_section(done))}\n{mark}{rest}"
    write_out(file, str(card).encode())


def _section(done: Finetuned) -> str:
    """The section, as Markdown."""
    given = done.settings.model_dump(exclude_none=True, exclude={"train"})
    settings = ", ".join(f"{key} {value if isinstance(value, str) else f'{value:g}'}" for key, value in given.items())
    zeros, bos = done.zeros, ", each beginning with BOS" if done.bos else ""
    own = {} if done.settings.seqlen is None else {"seqlen": done.settings.seqlen}
    trained = done.text.model_copy(update={"nsamples": done.windows, **own})
    hits = done.accuracy and f"Accuracy: {done.accuracy.before} before, {done.accuracy.after} after. "
    chosen = ""
    if held := done.held_out:
        losses = dict(held.losses)
        chosen = (
            f"The weights are those after step {held.best} of {len(done.losses)}, where the loss on "
            f"{held.windows} held-out windows of the same text was lowest ({losses[0]:.4f} before, "
            f"{losses[held.best]:.4f} then). "
        )
    return (
        f"{TRAINED[done.settings.train]} on {words(trained)}{bos} ({settings}). "
        f"{chosen}{zeros.after:,} of {zeros.weights:,} weights are zero, {zeros.before:,} were before. "
        f"Perplexity on {words(done.test)}: {done.before} before, {done.after} after ({done.change}). {hits or ''}"
        f"What the sections below do not call fine-tuned is of the model before; {FINETUNED} has the rest."
    )
