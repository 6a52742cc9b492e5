import pytest

from atp_tune.allocations import Budget
from atp_tune.plan import Plan, make_plan


def test_a_plan_is_an_allocation_at_its_parameters() -> None:
    plan = make_plan("wanda", "atp", Budget(0.5, (4, 4, 4)), {"beta": 0.1})
    assert plan == Plan("wanda", "atp", pytest.approx((0.4, 0.5, 0.6)), {"beta": 0.1})
    assert make_plan("wanda", "uniform", Budget(0.5, (4, 4)), {}).sparsities == (0.5, 0.5)


def test_a_plan_out_of_bounds() -> None:
    with pytest.raises(ValueError, match=r"β = 0\.6 is outside the admissible interval"):
        make_plan("wanda", "atp", Budget(0.5, (4, 4, 4)), {"beta": 0.6})


def test_a_plan_says_what_it_is() -> None:
    assert str(Plan("wanda", "atp", (0.4, 0.6), {"beta": 0.0123456})) == "wanda atp β=0.01235"
    assert str(Plan("magnitude", "uniform", (0.5,))) == "magnitude uniform"
