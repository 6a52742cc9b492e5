"""Optuna: the Gaussian process of its GPSampler, of which nothing is public.

SearchSpace: points as the process sees them, in the unit cube.
"""

from typing import Any

from optuna._gp.search_space import SearchSpace
from optuna.samplers import GPSampler

__all__ = ["SearchSpace", "fitted"]


def fitted(sampler: GPSampler) -> Any:
    """The process of the first objective as it was fitted last: `posterior` takes tensors like its `_X_train`."""
    assert sampler._gprs_cache_list is not None
    return sampler._gprs_cache_list[0]
