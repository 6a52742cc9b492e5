"""`tune.py apply`, `pack`, `unpack`, `push` and `finetune`: sparse checkpoints, and what is made of them."""

import sys
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from atp_tune.cli.options import Best, BestOptions, DType, UsageError, wrong
from atp_tune.cli.terminal import echo, gib, interruptible, markdown, working
from atp_tune.errors import printable
from atp_tune.utils.system import check_free

if TYPE_CHECKING:
    from atp_tune.folders.card import Finetuned

TOLERANCE = 0.001  # relative difference of perplexities that rounding may make


def apply(
    *,
    config: Path | None = None,
    out: Path | None = None,
    packed: bool = False,
    slim: bool = False,
    verify: Path | None = None,
    push: str | None = None,
    recover: bool = True,
    dtype: DType = None,
    format_: Literal["compressed-tensors", "mlx"] | None = None,
    private: bool = False,
    options: BestOptions,
) -> None:
    """Prune the dense checkpoint to a configuration, save it as a Hugging Face folder, and measure its perplexity.

    `--packed` makes the folder smaller, and faster on a CPU: docs/speedup.md. Weights that were rounded to few bits are
    stored in so many bits, and with `--format` as vLLM or mlx-lm read them: docs/bits.md. `--slim` makes the folder of
    pruned channels smaller and usually faster: docs/channels.md.

    If the study had `recover`, the kept weights are trained as it says; what its run has trained is taken from the
    cache. `--no-recover` leaves them as they were pruned: docs/finetune.md.

    A study of `quantizers = ["ggml"]` is written as a file, `--out NAME.gguf`: docs/gguf.md.

    The folder's weights are in the number format of the dense model's files, or of a .gguf file in that of the study,
    bfloat16 or float32. `--dtype` takes another; trained weights stay in the files' format.

    `--push` checks login and permission before it prunes. If the upload is cut off, the same command resumes it.

    `--verify DIR` compares all files with their SHA-256 in `atp_tune.json` (exit code 2 if one differs), and lists what
    differs between this machine and the one that wrote them.

    Example: `python tune.py apply --study smol --out smol-sparse`

    Example: `python tune.py apply --config studies/smol.best.json --out smol-sparse`

    Example: `python tune.py apply --verify smol-sparse`

    Options:
        packed: Write no zeros, and rounded weights in their number of bits.
        slim: Write the folder without the channels that `pattern = "channels"` prunes.
        format_ FORMAT: Write rounded weights as an engine reads them: compressed-tensors (vLLM, and transformers if
            quantize.symmetric is true) or mlx (mlx-lm).
        verify DIR: Only check whether the files of a sparse checkpoint are as they were written.
        push ORG/NAME: Also upload the folder to this model repository on the hub.
        recover: Train the kept weights, where the configuration says so.
    """
    if verify is not None:
        if any((config, options.study, out, push, packed, slim, format_)):
            raise wrong("--verify", "goes without --config, --study, --out, --packed, --slim, --format and --push")
        _verify(verify)
        return
    options.check("--config FILE", config, storage=options.storage)
    if out is None:
        raise UsageError("Missing option '--out'.")
    if private and push is None:
        raise wrong("--private", "only with --push ORG/NAME")
    best = options.best(config)
    if dtype is not None and recover and best.config.is_trained:
        raise wrong("--dtype", "trained weights stay in the format of the files; leave it out")
    if not recover:
        best = replace(best, config=best.config.model_copy(update={"recovered": None}))
    if push is not None:
        from atp_tune.folders.publishing import check_folder, check_permission, is_made_from

        check_permission(push, private)
        if not (dtype or format_) and is_made_from(out, best.config, packed, slim):
            check_folder(out)
            echo(f"sparse checkpoint: {out} was written before, from this configuration")
            upload(out, push, private)
            return
    write(best, out, packed=packed, slim=slim, dtype=dtype, format=format_)
    if push is not None:
        upload(out, push, private)


def write(best: Best, out: Path, **form: Any) -> None:
    """Writes the folder of a configuration, with these options of `save`, and prints what it has come to."""
    from atp_tune.checkpoints.files import is_slim
    from atp_tune.config.best import read_config
    from atp_tune.folders.card import ABOUT
    from atp_tune.folders.publishing import compared

    with working() as watch:
        measured = best.made(watch).save(out, **form)
    config = best.config
    promised = config.final("test") or (config.final("validation") if config.is_trained else None)
    if out.is_file():
        echo(f"rounded model: {out}; beside it are the importance matrix and the types for `llama-quantize`")
        return
    echo(f"sparse checkpoint: {out}")
    if promised is None:
        echo(f"perplexity on the test text: {measured} (the configuration has none yet)")
    else:
        change = measured.value / promised.value - 1
        echo(f"perplexity on the test text: {measured}, the configuration says {promised} ({change:+.3%})")
        if abs(change) > TOLERANCE:
            echo(
                "warning: they differ by more than 0.1 %; "
                f"{'codes have scales of 16 bits, ' * (config.quantize is not None)}another device, number format or "
                "number of threads?",
                style="yellow",
            )
    if form.get("packed") or is_slim(out):
        echo("transformers loads it after `import atp_tune`, or with trust_remote_code=True")
    if not config.is_trained and (note := compared(config, read_config(out / ABOUT).manifest)):
        echo(note)


def _verify(folder: Path) -> None:
    """Prints that a folder's files are as they were written, and what differs here from where they were."""
    from atp_tune.folders.publishing import verify

    report = verify(folder)
    echo(f"{folder}: all {report.files} files are as they were written, {report.weights} of them with weights")
    if report.more:
        echo(f"not of the checkpoint: {', '.join(report.more)}")
    echo(f"written on {report.made.processor}, {report.made.device or 'unknown device'}")
    if not report.differences:
        echo("versions and CPU instructions are the same here")
        return
    rows = [[printable(cell) for cell in astuple(row)] for row in report.differences]
    echo("what differs here, if the checkpoint is made again or computed with:")
    echo(markdown(("", "there", "here", "effect"), rows))


# --- `tune.py pack` and `tune.py unpack`: a sparse checkpoint without its zeros, and with them again.

GROUP = 32  # as in packed.modeling_atp_sparse, which imports torch


def pack(
    folder: Path | None = None,
    *,
    out: Path,
    values: Literal["same", "bf16", "int8"] = "same",
    group_size: int | None = None,
    options: BestOptions,
) -> None:
    """Pack a sparse checkpoint: smaller on disk and in memory, loaded by transformers.

    A packed matrix keeps its nonzero weights and one bit for each weight: at 70 % zeros in bfloat16, 0.36 of its bytes.
    `import atp_tune` or `trust_remote_code=True` lets `from_pretrained` load the folder; `unpack` restores DIR byte for
    byte. With `--values bf16` or `int8` the weights are rounded, and perplexity on the test text is measured before and
    after. Of a study with `bits`, `apply --packed` stores the bits; DIR has only the floats that they give. With
    `--study` the best of a study is pruned and packed in one go, as `apply --study NAME --packed` does.

    Example: `python tune.py pack smol-sparse --out smol-packed`

    Example: `python tune.py pack smol-sparse --out smol-int8 --values int8 --group-size 64`

    Example: `python tune.py pack --study smol --out smol-packed`

    Options:
        folder DIR: Sparse checkpoint, as `apply` writes it.
        out DIR: The new folder.
        values: Number format of the nonzero weights; same: as in DIR, and exact.
        group_size N: Columns that share a scale of int8 (a multiple of 32); default: all.
    """
    if group_size is not None and values != "int8":
        raise wrong("--group-size", "only with --values int8")
    if group_size is not None and (group_size < GROUP or group_size % GROUP):
        raise wrong("--group-size", f"must be a multiple of {GROUP}")
    options.check("DIR", folder, storage=options.storage)
    if folder is None:
        if values != "same":
            raise wrong("--values", "takes a folder: first apply --study NAME --out DIR")
        check_free(out)
        write(options.best(), out, packed=True)
        return
    from atp_tune.folders.card import ABOUT, origin
    from atp_tune.folders.packing import pack_folder

    with working() as watch:
        done = pack_folder(folder, out, values, group_size, options.device or "auto", watch)
    kinds = [f"{done.linears} linears"] if done.linears else []
    kinds += [f"{done.stored} other matrices (in memory they are dense)"] if done.stored else []
    share = done.packed_bytes / done.dense_bytes
    echo(f"packed folder: {out}")
    echo(f"packed: {' and '.join(kinds)}, {share:.3f} of their bytes")
    echo(f"weights on disk: {done.before / 1e6:,.1f} MB before, {done.after / 1e6:,.1f} MB now")
    if done.rounding is not None:
        echo(f"perplexity on the test {done.data}: {done.rounding[0]} before rounding, {done.rounding[1]} after")
    echo(f'load it: import atp_tune, then {done.auto}.from_pretrained("{out}"); or trust_remote_code=True')
    source = origin(folder)
    if source is not None and source.config.bits is not None:
        echo(
            f"its weights are rounded to {source.config.bits.nominal:.3g} bits, and floats here; to store the bits: "
            f"python tune.py apply --config {folder / ABOUT} --out DIR --packed"
        )


def unpack(folder: Path, *, out: Path) -> None:
    """Unpack a packed folder to the sparse checkpoint that it was made from, and check the SHA-256 of each weight file.

    Example: `python tune.py unpack smol-packed --out smol-sparse`

    Options:
        folder DIR: Packed folder, as `pack` writes it.
        out DIR: The new folder.
    """
    from atp_tune.checkpoints.convert import unpack_folder

    with working():
        check_free(out)
        unpack_folder(folder, out)
    echo(f"sparse checkpoint: {out}")


# --- `tune.py push`: uploads a sparse checkpoint to the Hugging Face hub.


def push(words: list[str], *, private: bool = False, options: BestOptions) -> None:
    """Upload a sparse checkpoint with its model card to the Hugging Face hub.

    It uses the login of `hf auth login`. The same command resumes an upload that was cut off. With `--study` the best
    of a study is pruned, and uploaded from a folder that is removed in the end.

    Example: `python tune.py push smol-sparse ORG/NAME`

    Example: `python tune.py push --study smol ORG/NAME`

    Options:
        words [DIR] ORG/NAME: Sparse checkpoint, as `apply` writes it, and a model repository on the hub; made if
            missing.
    """
    from atp_tune.folders.publishing import check_folder, check_permission

    *folders, name = words
    folder = Path(folders[0]) if any(folders) else None
    options.check("DIR", folder, storage=options.storage)
    if len(folders) > 1:
        raise wrong("DIR ORG/NAME", f"got {len(words)} words, and takes DIR ORG/NAME")
    if folder is not None:
        check_folder(folder)
        check_permission(name, private)
        upload(folder, name, private)
        return

    best = options.best()
    with working() as watch:
        address = best.made(watch).push(name, private=private)
    echo(f"uploaded: {address}")


def upload(folder: Path, name: str, private: bool) -> None:
    """Uploads a checked folder, if it is as it was written, and prints where it is."""
    from atp_tune.folders import publishing

    publishing.verify(folder)
    echo(f"uploading {folder} to {name}")
    with interruptible():
        try:
            address = publishing.upload(folder, name, private)
        except KeyboardInterrupt:
            echo(f"stopped: resume with: python tune.py push {folder} {name}{' --private' if private else ''}")
            sys.exit(130)
    echo(f"uploaded: {address}")


# --- `tune.py finetune`: fine-tunes a sparse checkpoint and keeps its zeros.

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
    options: TrainingOptions,
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
    from atp_tune.config.prune import Training
    from atp_tune.events import Place
    from atp_tune.folders.card import read_text

    if options.learning_rate is not None and not 0 < options.learning_rate < float("inf"):
        raise wrong("--learning-rate", "must be greater than 0")
    if options.train == "scales" and (extra := "--rank" if options.rank else "--alpha" if options.alpha else None):
        raise wrong(extra, "is a setting of --train lora; leave it out")
    if teacher is not None and options.loss == "next-token":
        raise wrong("--teacher", "is not read with --loss next-token")
    settings = Training(**vars(options))
    from atp_tune.checkpoints.blocks import classifies_images

    texts, pictures = {"--text": text, "--test-text": test_text}, {"--images": images, "--test-images": test_images}
    given, others, kind, seqlen = (
        (texts, pictures, "a language model: give --text", options.seqlen or SEQLEN),
        (pictures, texts, "an image classifier: give --images", None),
    )[classifies_images(model)]
    for name, value in others.items():
        if value is not None:
            raise wrong(name, f"the model in {model} is {kind}")
    data, measured = (value and read_text(name, value, seqlen) for name, value in given.items())
    from atp_tune.folders.finetuning import finetune as tune

    with working() as watch, interruptible():
        try:
            place = Place(Path(), device or "auto", {"trust_plugins": trust_plugins}, watch)
            done = tune(model, out, data or None, measured or None, settings, place, teacher).record
        except KeyboardInterrupt:
            watch.close()
            echo(f"stopped: the same command resumes from {out}.part, if a step was saved there")
            sys.exit(130)
    _show_tuned(done, out)


def _show_tuned(done: "Finetuned", out: Path) -> None:
    """Prints perplexities and zeros before and after as a Markdown table, then time and memory."""
    from atp_tune.results.formatting import duration

    columns = [  # head, dense, before, after
        ("model", "dense", "pruned", "fine-tuned"),
        ("zeros", "", f"{done.zeros.before:,}", f"{done.zeros.after:,}"),
        ("test perplexity", str(done.dense), str(done.before), str(done.after)),
        ("against pruned", "–", "–", str(done.change)),
    ]
    if other := done.validation:
        columns.append(("validation perplexity", "–", str(other.before), str(other.after)))
        columns.append(("against pruned", "–", "–", str(other.change)))
    if own := done.accuracy:
        columns.append(("test accuracy", "", str(own.before), f"{own.after} ({own.change})"))
    head, dense, *rows = zip(*columns, strict=True)
    echo(markdown(head, [dense, *rows] if done.dense else rows))
    items = done.text.words.unit
    echo(
        f"\n{len(done.losses)} steps on {done.windows} {items} of {printable(done.text.source)}: "
        f"{duration(done.seconds)}, {gib(done.memory)} at most on {done.device}"
    )
    if held := done.held_out:
        losses = dict(held.losses)
        echo(
            f"loss on {held.windows} held-out {items}: {losses[0]:.4f} → {losses[held.best]:.4f} after step "
            f"{held.best}, which was written"
        )
    echo(f"sparse checkpoint: {out}")
