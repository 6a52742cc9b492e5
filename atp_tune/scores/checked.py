"""A score that is a plug-in, checked each time: one finite number, or NaN, for each item."""

from collections.abc import Sequence
from inspect import signature
from typing import Any

from torch import Tensor

from atp_tune.blocks.replay import Replay
from atp_tune.blocks.verification import ProbeRun
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.config.prune import NLL_SHARES
from atp_tune.inputs import Batch
from atp_tune.measures import MEASURES
from atp_tune.plugins import Checked, guarded
from atp_tune.scores import Scores
from atp_tune.utils.registry import Origin

ITEMS = {by.items for by in MEASURES.values()} - {"ranks"}  # which images have
METHODS = ("probes", "check_head", "head_cost", "items")


class CheckedScore(Checked):
    """The `Score` around a plug-in.

    `Difference`, by which `check_head` says that it does not fit the model, is no error of the plug-in.
    """

    @property
    def content(self) -> str:
        """Name and content: what was measured with another one does not count."""
        return f"{self._origin.name} {self._origin.sha256}"

    def probes(self, checkpoint: Checkpoint) -> Any:
        """The plug-in's probes."""
        with guarded(self._origin, "probes"):
            return self._plugin.probes(checkpoint)

    def check_head(self, replay: Replay, runs: Sequence[ProbeRun], logits: Tensor, is_routed: bool) -> None:
        """The plug-in's check."""
        self._plugin.check_head(replay, runs, logits, is_routed)

    def head_cost(self, checkpoint: Checkpoint, positions: int) -> tuple[int, int]:
        """The plug-in's cost of the head."""
        with guarded(self._origin, "head_cost"):
            at_a_time, size = self._plugin.head_cost(checkpoint, positions)
            return int(at_a_time), int(size)

    def items(self, replay: Replay, batch: Batch, hidden: Tensor, dense: Tensor | None) -> Scores:
        """The plug-in's scores, by the items of measures."""
        with guarded(self._origin, "items"):
            given = dict(self._plugin.items(replay, batch, hidden, dense))
            found = {key: [float(one) for one in row] for key, row in given.items()}
        needed = {"nlls"} if dense is None else {"nlls", "kls"}
        if not needed <= found.keys() <= ITEMS or any(len(row) != len(hidden) for row in found.values()):
            many = ", ".join(f"{len(row)} {key}" for key, row in found.items()) or "nothing"
            must = f"there must be {len(hidden)} {' and '.join(sorted(needed))}"
            raise self.wrong("items", f"returned {many}, where {must}")
        return found

    def gradient(
        self, replay: Replay, batch: Batch, hidden: Tensor, dense: Tensor | None = None, share: float = 0.5
    ) -> Tensor:
        """The plug-in's gradient, of its own loss if it takes no `dense` or `share`.

        PluginError if it has none, or if it does not take both where the loss is neither the NLL nor the mean.
        """
        if not hasattr(self._plugin, "gradient"):
            raise self.wrong("has no method", "gradient, which the allocation gradient needs")
        with guarded(self._origin, "gradient"):
            known, takes = signature(self._plugin.gradient).parameters, {"dense": dense, "share": share}
            if not any(each.kind is each.VAR_KEYWORD for each in known.values()):
                takes = {name: value for name, value in takes.items() if name in known}
            if len(takes) < 2 and dense is not None and share != NLL_SHARES["both"]:
                lacks = "share" if "dense" in takes else "dense"
                raise self.wrong(
                    "gradient", f"takes no {lacks}, which prune.loss needs; add it, or leave prune.loss out"
                )
            found: Tensor = self._plugin.gradient(replay, batch, hidden, **takes)
        if not isinstance(found, Tensor) or found.shape != hidden.shape:
            raise self.wrong("gradient", f"returned something else than a tensor {list(hidden.shape)}")
        return found


def finished(found: Any, origin: Origin) -> CheckedScore:
    """The score of a plug-in; UserError if it is none."""
    return CheckedScore.finished(found, origin, **dict.fromkeys(METHODS, "; inherit from NextToken, or see Score"))
