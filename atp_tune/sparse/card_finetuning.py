"""The section of a model card that says how a sparse checkpoint was trained after pruning."""

from atp_tune.sparse.card import words
from atp_tune.sparse.provenance import FINETUNED, Finetuned

HEADING = "Fine-tuned after pruning"
TRAINED = {
    "lora": "The weights that are not zero were trained with LoRA",
    "scales": "Scales of the rows and columns of each linear were trained, and multiplied into its weights,",
}


def section(done: Finetuned) -> str:
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
        f"The sections below describe the model before fine-tuning; {FINETUNED} has the rest."
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
