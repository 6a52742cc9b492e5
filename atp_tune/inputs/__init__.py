"""Inputs of a model: windows of token ids, cut from texts, or images with their classes. Another kind can be added.

All code that runs a model (`blocks`, `search`) uses the two protocols below. A new kind of input is a file with an
object of type `InputKind` and a row of `KINDS`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from atp_tune.checkpoints.models import ModelFolder
from atp_tune.utils.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor, nn

    from atp_tune.checkpoints.checkpoint import Checkpoint
    from atp_tune.inputs.items import ByRole, Items


Batch = Any  # items on the compute device, with length and slices; for texts a tensor of ids [windows, tokens]


class InputKind(Protocol):
    """A kind of input: reads items, and calls a model with them.

    `called`: an item, for messages. `has_steps`: models may compute between blocks, and blocks may change the shape of
    the hidden states.
    """

    called: str
    has_steps: bool

    def of(self, items: "ByRole") -> "InputKind":
        """The kind for items of this shape, such as images of one size."""

    def read(self, texts: Mapping[str, Any], folder: ModelFolder, base: Path, bos: bool) -> "ByRole":
        """The items of each role; relative paths start at `base`. UserError for bad input or shared items."""

    def draws(
        self, text: Any, count: int, positions: int, folder: ModelFolder, base: Path, bos: bool
    ) -> list[tuple["Items", "Items"]]:
        """The items of `count` draws of a calibration text, and the pool of each, see `many`; the first is the text's.

        Pools do not overlap: in a text that has no room they hold fewer positions. UserError if the items have none, or
        if they are drawn at random and the text, of which that does not tell the room, is too short for the pools.
        """

    def many(self, text: Any, positions: int, folder: ModelFolder, base: Path, bos: bool) -> "Items":
        """Reads as many items of a calibration text as hold `positions` positions, fewer if the text is shorter."""

    def check_disjoint(self, items: "ByRole") -> None:
        """UserError if two roles share an item."""

    def check_fit(self, checkpoint: "Checkpoint", items: "ByRole", embed: Callable[[Batch], "Tensor"]) -> None:
        """UserError if a model cannot take the items; `embed` computes the hidden states that enter block 0.

        By default nothing is checked: what a model cannot take is seen when its replay is verified.
        """
        return

    def facts(self, items: "ByRole") -> dict[str, bool]:
        """Facts besides the content of the items, by key of a study file; by default none."""
        return {}

    def forward(self, model: "nn.Module", batch: Batch) -> Any:
        """The output of the model for a batch, without state from earlier batches."""

    def examples(self, checkpoint: "Checkpoint", items: int, positions: int) -> tuple[Batch, Batch, Batch]:
        """Three example batches of one shape: a blank one, and two with different contents."""


def cut_draws(whole: "Items", count: int, nsamples: int, stride: int, pool: int) -> list[tuple["Items", "Items"]]:
    """Items, every stride-th of the first `nsamples`, and a pool, the first `pool`, of each of `count` parts."""
    per = len(whole) // count
    starts = range(0, count * per, per)
    return [(whole.thinned(stride, x, x + nsamples), whole.thinned(1, x, x + min(pool, per))) for x in starts]


KINDS = Registry[InputKind](
    "kind of input",
    {"tokens": "atp_tune.inputs.windows:TOKEN_WINDOWS", "images": "atp_tune.inputs.images:LABELLED_IMAGES"},
)
