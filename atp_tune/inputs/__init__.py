"""What goes into a model. Today that is windows of token ids, cut from texts; images can come in by the same door.

All that runs a model (`blocks`, `search`) sees items by these two protocols alone. Another kind of input is a file with
an object of type `InputKind`, and a row of `KINDS`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar, cast

from atp_tune.checkpoints.models import ModelFolder
from atp_tune.spec.study import Text

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from atp_tune.checkpoints.checkpoint import Checkpoint


Batch = Any  # items on the compute device, sized and cut by slices: for tokens a tensor of ids [windows, tokens]


class Items(Protocol):
    """The items of one role (calibration, search, report) in their order, in host memory."""

    @property
    def content(self) -> str:
        """SHA-256 of the items."""

    def __len__(self) -> int:
        """Number of items."""

    @property
    def positions(self) -> int:
        """Hidden states of one item, such as the tokens of a window."""

    def batch(self, device: "torch.device") -> Batch:
        """All items on a device."""

    def thinned(self, every: int) -> Self:
        """The first item and every so many-th after it."""


T = TypeVar("T", bound=Items)


class InputKind(Protocol[T]):
    """A kind of input: how its items are read, and how a model is called with them."""

    def read(self, texts: Mapping[str, Text], folder: ModelFolder, base: Path, bos: bool) -> Mapping[str, T]:
        """The items of each role; relative paths start at `base`. UserError for bad input, or shared items."""

    def draws(self, text: Text, count: int, folder: ModelFolder, base: Path, bos: bool) -> list[T]:
        """The items of so many draws of a calibration text, without its own, the first. UserError where it is short."""

    def check_disjoint(self, items: Mapping[str, T]) -> None:
        """UserError where two roles share an item."""

    def check_fit(self, checkpoint: "Checkpoint", items: Mapping[str, T], embed: Callable[[Batch], "Tensor"]) -> None:
        """UserError where a model cannot take the items; `embed` gives the hidden states that enter its block 0."""

    def facts(self, items: Mapping[str, T]) -> dict[str, bool]:
        """What decides a value beside the items' content, by the keys of a study file."""

    def forward(self, model: "nn.Module", batch: Batch) -> Any:
        """The model's own output for a batch; nothing of an earlier batch is remembered."""

    def examples(self, checkpoint: "Checkpoint", items: int, positions: int) -> tuple[Batch, Batch, Batch]:
        """Three made-up batches of one shape: a blank one, and two whose contents differ."""


KINDS = {"tokens": "atp_tune.inputs.tokens:TOKEN_WINDOWS"}


def find_kind(name: str = "tokens") -> InputKind[Any]:
    """The kind of input of that name, from its row in `KINDS`."""
    return cast(InputKind[Any], resolve_name(KINDS[name]))
