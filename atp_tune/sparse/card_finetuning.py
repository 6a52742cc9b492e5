"""What a model card says of a sparse checkpoint that was trained after pruning."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from atp_tune.cache import write_out
from atp_tune.report.markdown import escaped
from atp_tune.sparse.card import EQUAL, THIS, read_card, result, words
from atp_tune.sparse.provenance import CARD, FINETUNED, Finetuned

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
        rest = re.sub(rf"^\| {OLDER} \(.*\n", lambda row: f"{row[0]}{_row(done)}\n", rest, count=1, flags=re.MULTILINE)
    head = head.rstrip().replace("and without retraining.", "and trained after that.")
    card.text = f"{head}\n\n## {HEADING}\n\n{escaped(_section(done))}\n{mark}{rest}"
    write_out(file, str(card).encode())


def _row(done: Finetuned) -> str:
    cells = [f"{THIS}, fine-tuned", done.after, *([done.accuracy.after] if done.accuracy else [])]
    return f"| {' | '.join(map(str, cells))} |"


def _section(done: Finetuned) -> str:
    """The section, as Markdown."""
    given = done.settings.model_dump(exclude_none=True, exclude={"train"})
    settings = ", ".join(f"{key} {value if isinstance(value, str) else f'{value:g}'}" for key, value in given.items())
    zeros, bos = done.zeros, ", each beginning with BOS" if done.bos else ""
    own = {} if done.settings.seqlen is None else {"seqlen": done.settings.seqlen}
    trained = done.text.model_copy(update={"nsamples": done.windows, **own})
    hits = done.accuracy and f"Accuracy: {done.accuracy.before} before, {done.accuracy.after} after. "
    return (
        f"{TRAINED[done.settings.train]} on {words(trained)}{bos} ({settings}). "
        f"{_held_out(done)}{zeros.after:,} of {zeros.weights:,} weights are zero, {zeros.before:,} were before. "
        f"Perplexity on {words(done.test)}: {done.before} before, {done.after} after ({done.change}). {hits or ''}"
        f"What the sections below do not call fine-tuned is of the model before; {FINETUNED} has the rest."
    )


def _held_out(done: Finetuned) -> str:
    if done.held_out is None:
        return ""
    losses = dict(done.held_out.losses)
    return (
        f"The weights are those after step {done.held_out.best} of {len(done.losses)}, where the loss on "
        f"{done.held_out.windows} held-out windows of the same text was lowest ({losses[0]:.4f} before, "
        f"{losses[done.held_out.best]:.4f} then). "
    )
