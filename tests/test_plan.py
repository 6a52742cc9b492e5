from typing import Any

import pytest
from expect import parametrize
from plans import linears_of, planned

from atp_tune.allocations import ALLOCATIONS, Budget
from atp_tune.allocations.budget import LinearSparsities, Shape
from atp_tune.allocations.rows import RowSparsities
from atp_tune.config.prune import make_plan, parse
from atp_tune.plan import Plan


def test_a_plan_is_an_allocation_at_its_parameters() -> None:
    plan = make_plan("wanda", "atp", Budget(0.5, (4, 4, 4)), {"beta": 0.1})
    assert plan == planned("wanda", "atp", plan.amounts, {"beta": 0.1})
    assert plan.amounts == pytest.approx((0.4, 0.5, 0.6))
    assert make_plan("wanda", "uniform", Budget(0.5, (4, 4)), {}).amounts == (0.5, 0.5)


def test_linears_are_rounded_all_together(monkeypatch: pytest.MonkeyPatch) -> None:
    class Given:
        @staticmethod
        def sparsities(budget: Budget) -> LinearSparsities:
            return (0.4, 0.6), (0.45, 0.55)

    monkeypatch.setitem(ALLOCATIONS, "uniform", Given)
    shapes = ((Shape(4, 8, True), Shape(4, 8, False)),) * 2
    plan = make_plan("wanda", "uniform", Budget(0.5, (64, 64), shapes), {}, parse("mixed:8"))
    assert linears_of(plan) == ((0.375, 0.625), (0.5, 0.5))
    assert plan.amounts == (0.5, 0.5)


class Priced:
    """Stands for a model whose descent ends at these sparsities."""

    def by_prices(self, target: float, pruner: str, rows: bool) -> RowSparsities:
        return RowSparsities(((target - 0.21, target + 0.07), (target + 0.19, target - 0.05)))


@parametrize("kappa", [0.0, 0.6, 1.0])
def test_prices_keep_to_the_pattern(kappa: float) -> None:
    shapes = ((Shape(4, 8, True), Shape(4, 8, False)),) * 2
    budget = Budget(0.5, (64, 64), shapes, Priced())  # type: ignore[arg-type]
    plan = make_plan("wanda", "gradient", budget, {"kappa": kappa}, parse("mixed:8"))
    rows = {0.6: ((0.375, 0.5), (0.625, 0.5)), 1.0: ((0.25, 0.625), (0.625, 0.5))}
    assert linears_of(plan) == rows.get(kappa)
    assert sum(plan.amounts) == 1.0


@parametrize(
    ("levels", "said"),
    [
        ([], "at least 1 item"),
        ([1.5], "less than or equal to 1"),
        ([float("nan")], "finite number"),
        (["0.5 and more"], "valid dictionary|instance of Level"),
        ([{}], "must all have a sparsity, or bits, or both"),
        ([{"bits": 4}, 0.5], "must all have a sparsity, or bits, or both"),
        ([{"bits": 4}, {"bits": 17}], "less than or equal to 16"),
        ([{"bits": 1}], "greater than or equal to 2"),
        ([{"bits": 3.5}], "a linear has a whole number of bits"),
        ([{"bits": 3.5, "linears": [{"bits": 3}, {"bits": 4.5}]}], "a linear has a whole number of bits"),
        ([{"sparsity": 0.5, "linears": [{"sparsity": 0.5, "linears": [0.5]}]}], "no linears of its own"),
        ([{"sparsity": 0.5, "rows": "a b"}], "match pattern"),
        ([{"sparsity": 0.5, "colour": 1}], "Unexpected keyword"),
        ([{"sparsity": 0.5, "rows": "AAAA"}], "rows are those of a linear"),
    ],
)
def test_levels_that_no_plan_has(levels: list[Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Plan.model_validate({"method": "wanda", "allocation": "atp", "levels": levels})
