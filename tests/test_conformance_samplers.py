"""Optuna's own tests of samplers."""
from functools import partial
from collections.abc import Callable
import pytest
from optuna.samplers import BaseSampler
from optuna.testing.pytest_samplers import BasicSamplerTestCase, MultiObjectiveSamplerTestCase, RelativeSamplerTestCase
from test_samplers import search_of, space_of
from atp_tune.search.samplers import make_sampler

pytestmark = pytest.mark.usefixtures("quiet_optuna")
class TestRandom(BasicSamplerTestCase, MultiObjectiveSamplerTestCase, RelativeSamplerTestCase):
    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return partial(make_sampler, search_of(sampler="random"), space_of())
class TestGP(BasicSamplerTestCase, MultiObjectiveSamplerTestCase, RelativeSamplerTestCase):
    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return partial(make_sampler, search_of(sampler="gp"), space_of())
class TestTPE(BasicSamplerTestCase, MultiObjectiveSamplerTestCase, RelativeSamplerTestCase):
    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return partial(make_sampler, search_of(sampler="tpe"), space_of())
