"""A pruner that is a plug-in, checked each time that it prunes: the dense weight stays as it is, and the result fits.

A result has the shape, dtype and device of the weight, no NaN or infinity, and as many zeros as the sparsity asks for:

    out · ⌊in·s⌋  <=  zeros  <=  out · ⌈in·s⌉ + zeros of the weight itself

so that it may compare weights in rows or in the matrix, and round down or up. With groups of M inputs each group has
at least ⌊M·s⌋.
"""

import math
from typing import Any

import torch
from torch import Tensor

from atp_tune.errors import PluginError, UserError
from atp_tune.plugins import guarded
from atp_tune.pruners import Pruner, Statistics
from atp_tune.pruners.selection import SLACK
from atp_tune.utils.registry import Origin


class CheckedPruner:
    """The `Pruner` around a plug-in; PluginError, which names the plug-in and its file, for a wrong result."""

    def __init__(self, plugin: Any, origin: Origin) -> None:
        self._plugin = plugin
        self._origin = origin
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
            raise PluginError(f"{self._origin}: prune {wrong}")
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
    if group is not None:
        return _miscounted_in_groups(gone, sparsity, group, before)
    low = rows * int(columns * sparsity)
    high = min(rows * columns, rows * math.ceil(columns * sparsity - SLACK) + before)
    if low <= count <= high:
        return ""
    wanted = f"{low}" if low == high else f"{low} to {high}"
    return f"left {count} zeros of {rows * columns} weights at sparsity {sparsity:g}, where there must be {wanted}"


def _miscounted_in_groups(gone: Tensor, sparsity: float, group: int, before: int) -> str:
    rows, columns = gone.shape
    whole = columns - columns % group
    parts = [(gone[:, :whole].reshape(-1, group), group), (gone[:, whole:], columns - whole)]
    wanted = [int(size * sparsity + SLACK) for _, size in parts]
    fewest = [int(part.sum(1).min()) if part.numel() else least for (part, _), least in zip(parts, wanted, strict=True)]
    if any(own < least for own, least in zip(fewest, wanted, strict=True)):
        return f"left {fewest[0]} zeros in a group of {group} at sparsity {sparsity:g}, where there must be {wanted[0]}"
    most = rows * (whole // group * wanted[0] + wanted[1]) + before
    count = int(torch.count_nonzero(gone))
    return "" if count <= most else f"left {count} zeros at sparsity {sparsity:g}, where there must be {most} at most"
