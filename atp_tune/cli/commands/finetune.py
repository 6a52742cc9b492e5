"""`tune.py finetune`: fine-tunes a sparse checkpoint and keeps its zeros."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from atp_tune.cli.options import wrong
from atp_tune.cli.terminal import console, gib, markdown, working
from atp_tune.errors import printable
from atp_tune.utils.paths import check_free

if TYPE_CHECKING:
    from atp_tune.sparse.provenance import Finetuned

SEQLEN = 512  # tokens per window, where the folder does not say how it was pruned


@dataclass(frozen=True)
class TrainingOptions:
    """Settings of the training.

    Options:
        steps 1..: Training steps, each on one batch.
        batch 1..: Batch size in windows.
        seqlen 2..: Tokens per window; default: those of the validation text's windows, or 512.
        loss: next-token: NLL of the text; kl: KL divergence from the dense model's predictions; both: their mean.
        train: lora: masked LoRA; scales: a scale for each row and column of each linear.
        rank 1..: LoRA rank r; default: 8.
        alpha 1..: LoRA α: adapters are scaled by α / r; default: twice the rank.
        learning_rate: Highest learning rate, reached after the warm-up; default: 0.003, of lora 0.001.
        eval_every 1..: Steps between two measurements on held-out windows.
        patience 0..: Stop after so many measurements without a lower loss; 0: hold out nothing.
        seed 0..: Seed of the adapters and of the order of the windows.
    """

    steps: int = 64
    batch: int = 2
    seqlen: int | None = None
    loss: Literal["next-token", "kl", "both"] = "both"
    train: Literal["lora", "scales"] = "scales"
    rank: int | None = None
    alpha: int | None = None
    learning_rate: float | None = None
    eval_every: int = 8
    patience: int = 3
    seed: int = 0


def finetune(
    model: Path,
    *,
    out: Path,
    text: str | None = None,
    test_text: str | None = None,
    images: str | None = None,
    test_images: str | None = None,
    teacher: str | None = None,
    asked: TrainingOptions,
    device: str | None = None,
    trust_plugins: bool = False,
) -> None:
    """Fine-tune a sparse checkpoint, keep every zero, and measure perplexity before and after.

    The last windows of the text are held out; training ends when their loss stops falling, and the step where it was
    lowest is written. If no step lowers it, nothing is written.

    An image classifier is trained on labelled images, in the forms of `[images.*]`, and its accuracy is measured too.

    What is trained is merged at the end, so the result is an ordinary Hugging Face folder. The same command resumes a
    run that was interrupted. The defaults are those of `[recover]` in a study; `--train lora` needs the extra
    `finetune`.

    Example: `python tune.py finetune smol-sparse --out smol-tuned --text file:articles.txt`

    Example: `python tune.py finetune smol-sparse --out smol-tuned --train lora --loss next-token --steps 300`

    Example: `python tune.py finetune DIR --out DIR2 --text '{source = "hub:ORG/NAME", split = "train"}'`

    Options:
        model DIR: Sparse checkpoint, written by `apply` or `prune --out`.
        out DIR: Folder for the fine-tuned checkpoint; new or empty.
        text SOURCE|TABLE: Text to train on: hub:ORG/NAME, file:PATH, …; default: the calibration text.
        test_text SOURCE|TABLE: Text to measure on; default: the checkpoint's test text.
        images SOURCE|TABLE: Of an image classifier, images to train on: folder:PATH, …; as --text.
        test_images SOURCE|TABLE: Of an image classifier, images to measure on; as --test-text.
        teacher SOURCE: Dense model of `kl` and `both`; default: that which DIR was pruned from.
    """
    check_free(out)
    from atp_tune.events import Place
    from atp_tune.sparse.provenance import read_text
    from atp_tune.spec.recover import Training

    if asked.learning_rate is not None and not 0 < asked.learning_rate < float("inf"):
        raise wrong("--learning-rate", "must be greater than 0")
    if asked.train == "scales" and (extra := "--rank" if asked.rank else "--alpha" if asked.alpha else None):
        raise wrong(extra, "is a setting of --train lora; leave it out")
    if teacher is not None and asked.loss == "next-token":
        raise wrong("--teacher", "is not read with --loss next-token")
    settings = Training(**vars(asked))
    from atp_tune.checkpoints.blocks import classifies_images

    of_images = classifies_images(model)
    given = {"--text": text, "--test-text": test_text}, {"--images": images, "--test-images": test_images}
    for name in (name for name, value in given[not of_images].items() if value is not None):
        kind = "an image classifier: give --images" if of_images else "a language model: give --text"
        raise wrong(name, f"the model in {model} is {kind}")
    named, measured = (
        value and read_text(name, value, None if of_images else asked.seqlen or SEQLEN)
        for name, value in given[of_images].items()
    )
    from atp_tune.cli.terminal import interruptible
    from atp_tune.sparse.finetuning import finetune as tune

    with working() as watch, interruptible():
        try:
            place = Place(Path(), device or "auto", {"trust_plugins": trust_plugins}, watch)
            done = tune(model, out, named or None, measured or None, settings, place, teacher).record
        except KeyboardInterrupt:
            watch.close()
            console.print(f"stopped: the same command resumes from {out}.part, if a step was saved there")
            sys.exit(130)
    _show(done, out)


def _show(done: "Finetuned", out: Path) -> None:
    """Prints perplexities and zeros before and after as a Markdown table, then time and memory."""
    from atp_tune.results.formatting import duration

    hits, other = done.accuracy, done.validation
    rows: list[tuple[str, ...]] = []
    if done.dense:
        rows.append(("dense", "", str(done.dense), "–", *["–", "–"] * bool(other), *[""] * bool(hits)))
    more = [*([str(other.before), "–"] if other else []), *([str(hits.before)] if hits else [])]
    rows.append(("pruned", f"{done.zeros.before:,}", str(done.before), "–", *more))
    tuned = [*([str(other.after), str(other.change)] if other else [])]
    tuned += [f"{hits.after} ({hits.change})"] if hits else []
    rows.append(("fine-tuned", f"{done.zeros.after:,}", str(done.after), str(done.change), *tuned))
    head: tuple[str, ...] = ("model", "zeros", "test perplexity", "against pruned")
    head += ("validation perplexity", "against pruned") * bool(other) + ("test accuracy",) * bool(hits)
    console.print(markdown(head, rows))
    items = "windows" if hits is None else "images"
    trained = f"{len(done.losses)} steps on {done.windows} {items} of {printable(done.text.source)}"
    console.print(f"\n{trained}: {duration(done.seconds)}, {gib(done.memory)} at most on {done.device}")
    if held := done.held_out:
        losses = dict(held.losses)
        fell = f"{losses[0]:.4f} → {losses[held.best]:.4f}"
        console.print(f"loss on {held.windows} held-out {items}: {fell} after step {held.best}, which was written")
    console.print(f"sparse checkpoint: {out}")
