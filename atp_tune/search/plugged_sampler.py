"""A sampler that is a plug-in: a function from a seed to an Optuna sampler, whose proposals are checked."""

from collections.abc import Callable
from numbers import Real
from typing import Any

from optuna import Study
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from atp_tune.errors import PluginError, UserError
from atp_tune.plugins import guarded
from atp_tune.registry import Origin

Make = Callable[[int], BaseSampler]


class CheckedSampler(BaseSampler):
    """The sampler of a plug-in; PluginError for a proposal outside its interval."""

    def __init__(self, inner: BaseSampler, origin: Origin) -> None:
        self._inner = inner
        self._origin = origin

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """What the plug-in says."""
        with guarded(self._origin, "infer_relative_search_space"):
            return self._inner.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The plug-in's proposal; parameters that it leaves out are drawn one by one."""
        with guarded(self._origin, "sample_relative"):
            found = dict(self._inner.sample_relative(study, trial, search_space))
        return {name: self._checked(name, found[name], kind) for name, kind in search_space.items() if name in found}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """The plug-in's draw of one parameter."""
        with guarded(self._origin, "sample_independent"):
            found = self._inner.sample_independent(study, trial, param_name, param_distribution)
        return self._checked(param_name, found, param_distribution)

    def _checked(self, name: str, value: Any, kind: BaseDistribution) -> Any:
        if not _is_inside(value, kind):
            raise PluginError(f"{self._origin}: proposed {name} = {value!r}, which is outside {kind}")
        return value


def _is_inside(value: Any, kind: BaseDistribution) -> bool:
    """Whether a value is one that Optuna may store for this distribution."""
    if isinstance(kind, CategoricalDistribution):
        return value in kind.choices
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    return is_number and isinstance(kind, FloatDistribution | IntDistribution) and kind.low <= value <= kind.high


def finished(found: Any, origin: Origin) -> Make:
    """The function of a plug-in; UserError if it is none."""
    if not callable(found):
        raise UserError(f"{origin}: is no sampler: must be a function from a seed to an Optuna sampler")

    def make(seed: int) -> BaseSampler:
        with guarded(origin, "it could not be made"):
            made = found(seed)
        if not isinstance(made, BaseSampler):
            raise PluginError(f"{origin}: made {type(made).__name__}, not an Optuna sampler")
        return CheckedSampler(made, origin)

    make.__doc__ = getattr(found, "__doc__", None)
    return make
