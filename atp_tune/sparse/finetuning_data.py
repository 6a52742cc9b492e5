"""What `finetune` trains and measures on: its texts, or images, which may not share documents, and their windows."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from atp_tune.checkpoints.models import ModelFolder
from atp_tune.errors import UserError, named
from atp_tune.inputs.images import doubles_of, images_of
from atp_tune.inputs.items import IDS, Items
from atp_tune.inputs.windows import first_windows, shared_windows, token_windows
from atp_tune.sparse.provenance import PrunedWith
from atp_tune.sparse.training import windows_held_out, windows_read
from atp_tune.spec.data import ImageSet, Text
from atp_tune.spec.recover import Training
from atp_tune.spec.study import Data

TEST_SHARE = 0.1  # of the training text: the test text, where no other is known


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
        cut = end - TEST_SHARE * (end - start)
        text, test = (text.model_copy(update={"part": part}) for part in ((start, cut), (cut, end)))
    kept: dict[str, Data] = {"test": test}
    if made:
        kept |= {"validation": made.validation, "study's test": made.test}
    for role, other in kept.items():
        if _share(text, other):
            option, *what = ("text", "documents", "text") if isinstance(text, Text) else ("images",) * 3
            raise UserError(
                f"--{option}: {text.source} shares {what[0]} with the {role} {what[1]}; give another source, split or "
                "part"
            )
    return text, test


def _share(one: Data, other: Data) -> bool:
    if isinstance(one, Text):
        return isinstance(other, Text) and one.overlaps(other)
    return isinstance(other, ImageSet) and one.overlaps(other)


def read_training_images(
    text: ImageSet, measured: Mapping[str, ImageSet], folder: ModelFolder, settings: Training, base: Path
) -> Items:
    """The images to train on and to hold out, but those that are measured; UserError if it has many of them."""
    needed = windows_read(settings)
    with named("--images: "):
        whole = text.model_copy(update={"nsamples": min(text.nsamples or needed, needed)})
        found = images_of(whole, folder, base, at_most=text.nsamples is None)
    with named("--test-images: "):
        others = {role: images_of(other, folder, base) for role, other in measured.items()}
    doubles = doubles_of({**others, "training": found})["training"]
    return found.without(doubles) if doubles else found


def read_windows(
    text: Text, measured: Mapping[str, Text], folder: Path, settings: Training, bos: bool, base: Path
) -> Items:
    """The windows to train on and to hold out; UserError if a text that is measured shares some of them.

    `base`: where plug-ins read from; the files of other texts are absolute.
    """
    with named("--text: "):
        whole = text.model_copy(update={"seqlen": settings.seqlen or text.seqlen})
        found = first_windows(whole, folder, base, windows_read(settings), bos=bos)
    for role, other in measured.items():
        with named(f"--{role}-text: "):
            windows = token_windows(other, folder, base, bos=bos)
        if shared := shared_windows(found, windows):
            raise UserError(
                f"--text: {len(shared)} windows of {text.source} are in the {role} text too; give another source"
            )
    return found


def divided(items: Items, settings: Training) -> tuple[Tensor | Items, Tensor | Items | None]:
    """What is trained on, and what is held out, at the end of it; None if nothing is."""
    found = items.tensors.get(IDS, items)
    count = windows_held_out(len(items), settings)
    return (found[:-count], found[-count:]) if count else (found, None)
