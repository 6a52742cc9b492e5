import pytest

from atp_tune.allocations import ALLOCATIONS, Budget
from atp_tune.allocations.budget import LinearSparsities, Shape
from atp_tune.plan import Plan, make_plan
from atp_tune.spec.patterns import parse


def test_a_plan_is_an_allocation_at_its_parameters() -> None:
    plan = make_plan("wanda", "atp", Budget(0.5, (4, 4, 4)), {"beta": 0.1})
    assert plan == Plan("wanda", "atp", pytest.approx((0.4, 0.5, 0.6)), {"beta": 0.1})
    assert make_plan("wanda", "uniform", Budget(0.5, (4, 4)), {}).sparsities == (0.5, 0.5)


def test_a_plan_keeps_to_the_pattern() -> None:
    budget = Budget(0.5, (4, 4, 4))
    plan = make_plan("wanda", "atp", budget, {"beta": 0.1}, parse("mixed:8"))
    assert plan.sparsities == (0.375, 0.5, 0.625)
    third = make_plan("wanda", "uniform", Budget(0.333333, (4, 4)), {}, parse("1:3"))
    assert third.sparsities == (1 / 3, 1 / 3)


def test_uniform_is_uniform_though_the_pattern_rounds() -> None:
    for allocation, parameters in (("uniform", {}), ("atp", {"beta": 0.0})):
        plan = make_plan("wanda", allocation, Budget(0.55, (4, 4, 4)), parameters, parse("mixed:8"))
        assert plan.is_uniform and len(set(plan.sparsities)) == 2
    assert not make_plan("wanda", "atp", Budget(0.55, (4, 4, 4)), {"beta": 0.2}, parse("mixed:8")).is_uniform


def test_linears_are_rounded_all_together(monkeypatch: pytest.MonkeyPatch) -> None:
    class Given:
        @staticmethod
        def sparsities(budget: Budget) -> LinearSparsities:
            return (0.4, 0.6), (0.45, 0.55)

    monkeypatch.setitem(ALLOCATIONS, "uniform", Given)
    shapes = ((Shape(4, 8, True), Shape(4, 8, False)),) * 2
    plan = make_plan("wanda", "uniform", Budget(0.5, (64, 64), shapes), {}, parse("mixed:8"))
    assert plan.linear_sparsities == ((0.375, 0.625), (0.5, 0.5))
    assert plan.sparsities == (0.5, 0.5)


class Priced:
    """Stands for a model whose descent ends at these sparsities."""

    def priced_sparsities(self, target: float, pruner: str) -> LinearSparsities:
        return (target - 0.21, target + 0.07), (target + 0.19, target - 0.05)


@pytest.mark.parametrize("kappa", [0.0, 0.6, 1.0])
def test_prices_keep_to_the_pattern(kappa: float) -> None:
    shapes = ((Shape(4, 8, True), Shape(4, 8, False)),) * 2
    budget = Budget(0.5, (64, 64), shapes, Priced())  # type: ignore[arg-type]
    plan = make_plan("wanda", "prices", budget, {"kappa": kappa}, parse("mixed:8"))
    rows = {0.6: ((0.375, 0.5), (0.625, 0.5)), 1.0: ((0.25, 0.625), (0.625, 0.5))}
    assert plan.linear_sparsities == rows.get(kappa)
    assert sum(plan.sparsities) == 1.0


def test_a_plan_out_of_bounds() -> None:
    with pytest.raises(ValueError, match=r"β = 0\.6 is outside the admissible interval"):
        make_plan("wanda", "atp", Budget(0.5, (4, 4, 4)), {"beta": 0.6})


def test_a_plan_says_what_it_is() -> None:
    assert str(Plan("wanda", "atp", (0.4, 0.6), {"beta": 0.0123456})) == "wanda atp β=0.01235"
    assert str(Plan("magnitude", "uniform", (0.5,))) == "magnitude uniform"
