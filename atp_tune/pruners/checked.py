"""A pruner that is a plug-in, checked each time that it prunes: the dense weight stays as it is, and the result fits.

A result has the shape, dtype and device of the weight, no NaN or infinity, and as many zeros as the sparsity asks for:

    out · ⌊in·s⌋  <=  zeros  <=  out · ⌈in·s⌉ + zeros of the weight itself

so that it may compare weights in rows or in the matrix, and round down or up. With groups of M inputs each group has
at least ⌊M·s⌋.
"""

import math
from typing import Any

from torch import Tensor

from atp_tune.errors import UserError
from atp_tune.plugins import Checked, guarded
from atp_tune.pruners import Pruner, Statistics
from atp_tune.pruners.selection import SLACK
from atp_tune.utils.registry import Origin


class CheckedPruner(Checked):
    """The `Pruner` around a plug-in."""

    def __init__(self, plugin: Any, origin: Origin) -> None:
        super().__init__(plugin, origin)
        self.group: int | None = getattr(plugin, "group", None)
        self.measures: type[Statistics] | None = getattr(plugin, "measures", None)

    @classmethod
    def of(cls, kind: type[Pruner], origin: Origin, settings: dict[str, Any]) -> "CheckedPruner":
        """Makes the plug-in with its settings; UserError if they are wrong, or if it makes no groups and should."""
        fields = getattr(kind, "model_fields", {})
        if "group" not in fields and settings.get("group") is not None:
            raise UserError(f'{origin}: makes no patterns, having no field group; set prune.pattern = "unstructured"')
        with guarded(origin, "its settings"):
            return cls(kind(**{name: value for name, value in settings.items() if name in fields}), origin)

    def __repr__(self) -> str:
        """Names all that its result depends on, for the cache; the plug-in's own `repr` may leave something out."""
        return f"{self._origin.name} {vars(self._plugin)} {self._origin.sha256}"

    def prepare(self, statistics: Statistics) -> None:
        """Computes what depends on the statistics only."""
        with guarded(self._origin, "prepare"):
            if hasattr(self._plugin, "prepare"):
                self._plugin.prepare(statistics)

    def prune(self, weight: Tensor, sparsity: float, statistics: Statistics | None) -> Tensor:
        """A pruned copy of weight [out, in] at a sparsity in [0, 1]."""
        with guarded(self._origin, f"prune at sparsity {sparsity:g}"):
            found = self._plugin.prune(weight.clone(), sparsity, statistics)
        wrong = _unlike(weight, found) or _miscounted(weight, found, sparsity, self.group)
        if wrong:
            raise self.wrong("prune", wrong)
        pruned: Tensor = found
        return pruned


def _unlike(weight: Tensor, found: Any) -> str:
    """How a result differs in kind from the weight; "" if it does not."""
    if not isinstance(found, Tensor):
        return f"returned {type(found).__name__}, not a tensor"
    for name in ("shape", "dtype", "device"):
        own, there = getattr(found, name), getattr(weight, name)
        if own != there:
            own, there = (tuple(each) if name == "shape" else each for each in (own, there))
            return f"returned a weight of {name} {own} for one of {there}"
    return "" if found.isfinite().all() or not weight.isfinite().all() else "returned a weight with NaN or infinity"


def _miscounted(weight: Tensor, found: Tensor, sparsity: float, group: int | None) -> str:
    """How the number of zeros is wrong; "" if it is not."""
    rows, columns = weight.shape
    gone = found == 0
    count, before = int(gone.sum()), int((weight == 0).sum())
    at = f"at sparsity {sparsity:g}, where there must be"
    if group is None:
        low = rows * int(columns * sparsity)
        high = min(rows * columns, rows * math.ceil(columns * sparsity - SLACK) + before)
        wanted = f"{low}" if low == high else f"{low} to {high}"
        return "" if low <= count <= high else f"left {count} zeros of {rows * columns} weights {at} {wanted}"
    whole, most = columns - columns % group, before
    for part, size in ((gone[:, :whole].reshape(-1, group), group), (gone[:, whole:], columns - whole)):
        least = int(size * sparsity + SLACK)
        most += least * len(part)
        if part.numel() and (fewest := int(part.sum(1).min())) < least:
            return f"left {fewest} zeros in a group of {size} {at} {least}"
    return "" if count <= most else f"left {count} zeros {at} {most} at most"
