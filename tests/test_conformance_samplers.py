"""Optuna's own tests of samplers, run on each of ours: what a sampler draws from any space, and of what kind it is.

Optuna's cases for samplers that propose several parameters together are not for ours that draw each on its own.
"""

from collections.abc import Callable
from functools import partial

import pytest
from optuna.samplers import BaseSampler
from optuna.testing.pytest_samplers import BasicSamplerTestCase, MultiObjectiveSamplerTestCase, RelativeSamplerTestCase
from test_samplers import search_of, space_of

from atp_tune.search.samplers import make_sampler

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quiet_optuna")]


def maker(name: str) -> Callable[[], BaseSampler]:
    return partial(make_sampler, search_of(sampler=name), space_of())


class TestRandom(BasicSamplerTestCase, MultiObjectiveSamplerTestCase):
    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return maker("random")  # and "grid", whose points are queued


class TestGP(BasicSamplerTestCase, RelativeSamplerTestCase, MultiObjectiveSamplerTestCase):
    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return maker("gp")


class TestTPE(BasicSamplerTestCase, RelativeSamplerTestCase, MultiObjectiveSamplerTestCase):
    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return maker("tpe")
