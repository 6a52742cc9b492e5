"""Pruners choose the weights of one linear to zero, from a sparsity and statistics of the linear's inputs.

A pruner is a class registered in `PRUNERS`. Its settings, if any, are its parent class, registered in `SETTINGS`; those
of a plug-in are its own fields. It takes and returns tensors, and knows no model, study or trial. Importing this
package loads no torch. So it is with a quantizer, registered in `QUANTIZERS`, which rounds the weights to few values;
what comes out are the values, as floats.
"""

from typing import TYPE_CHECKING, Any, Protocol, Self, TypeAlias

from atp_tune.utils.registry import Registry, SettingsTable

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Statistics(Protocol):
    """Statistics of the inputs X [tokens, in] of a linear, accumulated batch by batch."""

    def __init__(self, inputs: int, device: "torch.device") -> None: ...

    def add(self, x: "Tensor") -> None:
        """Adds inputs [..., in] of any float dtype."""

    def tensors(self) -> "dict[str, Tensor]":
        """The tensors to save, by name."""

    @classmethod
    def restored(cls, tensors: "dict[str, Tensor]") -> Self:
        """Statistics from saved `tensors`; nothing can be added to them."""

    @staticmethod
    def bytes_for(inputs: int) -> int:
        """Upper bound on the bytes of `tensors` for a linear with `inputs` inputs."""


Measures: TypeAlias = type[Statistics] | None  # the kind of statistics that a pruner or a quantizer needs


class Pruner(Protocol):
    """The interface of a pruner; its fields are its settings.

    All pruners have the field `group`: if it is M, ⌊M·s⌋ weights of each M consecutive inputs of a row are zeroed. A
    plug-in may lack it, and `prepare`; then it makes no patterns.
    """

    @property
    def measures(self) -> Measures:
        """The kind of statistics that it needs."""

    def prepare(self, statistics: Statistics) -> None:
        """Computes what depends on the statistics only, before they are saved."""

    def prune(self, weight: "Tensor", sparsity: float, statistics: Statistics | None) -> "Tensor":
        """A pruned copy of weight [out, in] at a sparsity in [0, 1], in the dtype of the weight."""


class Quantizer(Protocol):
    """The interface of a quantizer."""

    def __init__(self, group_size: int, symmetric: bool, damping: float, act_order: bool = False) -> None: ...

    @property
    def measures(self) -> Measures:
        """The kind of statistics of a linear's inputs that it needs."""

    def prepare(self, statistics: Statistics) -> None:
        """Computes what depends on the statistics only, before they are saved."""

    def quantize(
        self, weight: "Tensor", bits: Any, statistics: Statistics | None, zeros: "Tensor | None" = None
    ) -> "Tensor":
        """A copy of weight [out, in] with at most 2^bits values in each group, in the dtype of the weight.

        `bits`: or the type of ggml. `zeros`: mask [out, in] of weights that are 0 and stay 0.
        """


class Unprepared:
    """A pruner or quantizer that computes nothing before statistics are saved."""

    def prepare(self, statistics: Statistics) -> None:
        """Leaves the statistics as they are."""


PRUNERS = Registry[type[Pruner]](
    "pruner",
    {
        "magnitude": "atp_tune.pruners.wanda:Magnitude",
        "wanda": "atp_tune.pruners.wanda:Wanda",
        "sparsegpt": "atp_tune.pruners.sparsegpt:SparseGPT",
        "dsnot": "atp_tune.pruners.dsnot:DSnoT",
        "alps": "atp_tune.pruners.alps:ALPS",
    },
    "atp_tune.pruners",
    "atp_tune.pruners.settings:finished",
)
QUANTIZERS = Registry[type[Quantizer]](
    "quantizer",
    {
        "rtn": "atp_tune.pruners.rounding:RTN",
        "gptq": "atp_tune.pruners.rounding:GPTQ",
        "ggml": "atp_tune.pruners.ggml:GGML",
    },
)
SETTINGS = Registry[type[SettingsTable]](
    "pruner with settings",
    {
        "wanda": "atp_tune.pruners.settings:WandaSettings",
        "sparsegpt": "atp_tune.pruners.settings:SparseGPTSettings",
        "dsnot": "atp_tune.pruners.settings:DSnoTSettings",
        "alps": "atp_tune.pruners.settings:ALPSSettings",
    },
)


def make_pruner(
    name: str, settings: dict[str, Any] | None = None, refine: int = 0, quantizer: Quantizer | None = None
) -> Pruner:
    """Makes a pruner by name with its settings; KeyError if the name is not registered.

    `refine`: steps of conjugate gradients on the weights that it keeps; `quantizer`: what rounds them then. A plug-in
    is checked each time that it prunes. UserError if it knows no groups and the pattern has some.
    """
    kind, origin = PRUNERS[name], PRUNERS.origin(name)
    if origin is None:
        pruner = kind(**settings or {})
    else:
        from atp_tune.pruners.selection import CheckedPruner

        pruner = CheckedPruner.of(kind, origin, settings or {})
    if not refine and quantizer is None:
        return pruner
    from atp_tune.pruners.refinement import Treatment

    return Treatment(pruner, refine, quantizer)
