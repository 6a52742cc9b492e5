"""Studies with a `size`: zeros and bits that fit it together."""

from itertools import chain, product
from pathlib import Path
from typing import Any

import pytest
from expect import parametrize, slow
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_bits import check_codes
from tinystudy import STUDY, CommandLine, copied, copy_of, run, settings, stored

from atp_tune.allocations import Budget, Shape
from atp_tune.allocations.bits import Size, cheapest
from atp_tune.allocations.budget import Costs
from atp_tune.allocations.rows import RowSparsities
from atp_tune.config.best import read_config
from atp_tune.config.prune import QuantizeConfig, bits_of_size, make_plan
from atp_tune.events import Message
from atp_tune.plan import Plan

WIDTHS = (2, 3, 4, 8)
QUANTIZE = QuantizeConfig(group_size=8, widths=WIDTHS)
SHAPES = ((Shape(8, 16, True), Shape(4, 24, False)), (Shape(16, 8, True), Shape(12, 16, False)))


@parametrize(("text", "bits"), [("3.3bpw", 3300), ("0.5kB", 3200), ("1KiB", 8 * 924), ("25%", 8 * 400), ("600B", 4000)])
def test_a_size_leaves_bits_for_the_linears(text: str, bits: float) -> None:
    assert bits_of_size(text, 1000, others=100, dense=2000) == pytest.approx(bits)


class Priced:
    """Stands for a model with these costs of widths, whose descent moves a tenth within each block."""

    def __init__(self, costs: Costs) -> None:
        self._costs = costs

    def by_prices(self, target: float, pruner: str, rows: bool) -> RowSparsities:
        mean = (0.4 * 128 + 0.6 * 96) / 224, (0.4 * 128 + 0.6 * 192) / 320
        return RowSparsities(tuple((0.9 - one, 1.1 - one) for one in mean))  # at 50 %, whatever is asked for

    def width_costs(self) -> Costs:
        return self._costs


def stored_bits(plan: Plan, widths: tuple[int, ...] | None = None) -> int:
    """The bits of a plan as they are stored, or with other widths."""
    levels = [(shape, level) for i, row in enumerate(SHAPES) for shape, level in zip(row, plan.of(i, 2), strict=True)]
    own = widths or [int(level.bits or 0) for _, level in levels]
    return sum(
        QUANTIZE.stored_bits(shape.rows, shape.columns, width, shape.rows * int(shape.columns * (level.sparsity or 0)))
        for (shape, level), width in zip(levels, own, strict=True)
    )


price = st.floats(0.1, 10).map(lambda value: round(value, 3))


@given(st.lists(price, min_size=4, max_size=4), st.sampled_from([0.0, 0.3, 0.5]), st.floats(1e-6, 1e-2))
def test_the_plan_costs_least_of_all_that_fit(prices: list[float], zeros: float, of_a_bit: float) -> None:
    """At the size of the plan whose costs, and bits at this price, are least together."""
    costs = [[[own * 0.25**width for width in WIDTHS] for own in pair] for pair in (prices[:2], prices[2:])]
    blocks = tuple(sum(shape.size for shape in row) for row in SHAPES)
    evidence: Any = Priced(costs)

    def planned(most: float) -> Plan:
        budget = Budget(0.6, blocks, SHAPES, evidence, widths=WIDTHS, size=Size(most, QUANTIZE.stored_bits))
        plan = make_plan("wanda", "gradient", budget, {"kappa": 1.0, "zeros": zeros})
        plan.check_fits(budget)
        assert stored_bits(plan) <= most
        return plan

    linears = [level for i in range(2) for level in planned(1e9).of(i, 2)]
    total = sum(shape.size * (level.sparsity or 0) for shape, level in zip(chain(*SHAPES), linears, strict=True))
    assert total / 544 == pytest.approx(zeros)  # the end of the descent is shifted

    def cost(widths: Any) -> float:
        rows = zip(chain(*costs), linears, widths, strict=True)
        return sum(row[WIDTHS.index(width)] * (1 - (level.sparsity or 0)) for row, level, width in rows)

    plans = {widths: stored_bits(planned(1e9), widths) for widths in product(WIDTHS, repeat=4)}
    least = min(plans, key=lambda widths: (cost(widths) + of_a_bit * plans[widths], plans[widths]))
    found = planned(plans[least])
    assert cost([int(level.bits or 0) for i in range(2) for level in found.of(i, 2)]) == pytest.approx(cost(least))


def test_without_prices_whole_blocks_have_a_bit_more_and_lie_evenly() -> None:
    shapes = (SHAPES[0],) * 4
    three, four = (sum(QUANTIZE.stored_bits(x.rows, x.columns, bits) for x in chain(*shapes)) for bits in (3, 4))
    size = Size((three + four) / 2, QUANTIZE.stored_bits)
    plan = make_plan("wanda", "uniform", Budget(0.6, (224,) * 4, shapes, widths=WIDTHS, size=size), {})
    assert [[level.bits for level in plan.of(i, 2)] for i in range(4)] == [[4, 4], [3, 3], [4, 4], [3, 3]]


def test_a_matrix_of_zeros_has_the_fewest_bits() -> None:
    sizes = [[QuantizeConfig(group_size=8, symmetric=True).stored_bits(4, 8, width, 32) for width in WIDTHS]]
    assert len({*sizes[0]}) == 1
    assert cheapest([*sizes, [9.0, 4.0, 1.0, 0.5]], [*sizes, [2, 3, 4, 8]], sizes[0][0] + 4) == [0, 2]


TABLES = "\n[quantize]\ngroup_size = 16\n\n[allocation]\nnames = ['gradient-rows']\n\n[recover]\nsteps = 2\n"


@pytest.fixture(scope="module")
def ran(tiny_place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished study of four points; to be read only."""
    with copied(tiny_place, tmp_path_factory) as place:
        toml = STUDY.replace("sparsity = 0.6", 'size = "3.9bpw"').replace("trials = 3", "trials = 5")
        (place / "tiny.toml").write_text(toml + TABLES)
        notes: list[str] = []
        run(place, watch=lambda event: notes.append(event.text) if isinstance(event, Message) else None)
        (place / "notes.txt").write_text("\n".join(notes))
        return place


done_at_a_size = copy_of("ran")


@slow
def test_trials_differ_in_zeros_and_bits_and_all_fit(done_at_a_size: Path, command: CommandLine) -> None:
    place = done_at_a_size
    said = "size: 3.90 bits a weight; from 3.6 on bits alone were better than zeros with bits"
    assert (place / "notes.txt").read_text().count(said) == 1
    trials = stored(place).get_trials()
    plans = [Plan.model_validate(trial.user_attrs["plan"]) for trial in trials]
    assert [plan.parameters.get("zeros") for plan in plans][:4] == [0, 0.5, 0.4, 0]
    assert all(3.7 < trial.user_attrs["effective_bits"] <= 3.9 for trial in trials)
    assert [plan.is_uniform for plan in plans][:4] == [True, False, False, False]
    words = command("status", "--study", place / "tiny.toml").out
    assert "tiny: 3.9bpw" in words and "uniform has no zeros" in words and "stored" in words
    assert "0.00%, 2.72 (3.8" in words and "50.00%, 3.3" in words
    check_codes(place, command, zeros=bool(read_config(place / "tiny.best.json").plan.parameters.get("zeros")))
    # One that has none is a rounded model.
    bare = command("export", "--study", place / "tiny.toml", "--trial", "3").out.strip()
    command.ok("apply", "--config", bare, "--out", place / "bare")
    card = (place / "bare" / "README.md").read_text()
    assert "in its blocks rounded to 2.7" in card and "zero" not in card and "by gptq" in card
    assert "run as floats" in command("speedup", place / "bare").err
    # A point that has zeros leaves as codes too, with a mask.
    config = command("export", "--study", place / "tiny.toml", "--trial", "1").out.strip()
    other = read_config(Path(config))
    assert other.bits is not None and other.bits.size == "3.9bpw" and other.sparsity.target == 0.5
    command.ok("apply", "--config", config, "--out", place / "half", "--packed")
    assert any(name.endswith("_bitmask") for name in load_file(place / "half" / "model.packed.safetensors"))
    card = (place / "half" / "README.md").read_text()
    assert "bits on average by gptq" in card and "| size asked for | 3.9bpw |" in card
    table = command("export", "--study", place / "tiny.toml", "--format", "csv").out.strip()
    assert Path(table).read_text().startswith("block,module,sparsity,bits\n")
    assert "5 of 5 trials" in command("plan", "--study", place / "tiny.toml").out
    page = command("report", "--study", place / "tiny.toml", "--out", place / "page.html")
    assert not page.code and "3.9bpw" in (place / "page.html").read_text()


@slow
def test_one_plan_of_a_size(place: Path, command: CommandLine) -> None:
    (place / "tiny.toml").write_text(STUDY.replace("sparsity = 0.6", 'size = "50%"') + TABLES)
    words = ("prune", "--study", place / "tiny.toml", "--parameter", "S=0.4", "--parameter", "kappa=1")
    said = command(*words, "--out", place / "pruned")
    assert "wanda gradient-rows κ=1 S=0.4, 50%: perplexity" in said.out
    assert "byte for byte" in command("apply", "--config", place / "pruned" / "atp_tune.json", "--out", place / "a").out
    # Nor does a plan without offsets of rows exceed its size: each row of a linear has as many zeros as the others.
    wide = settings("size=5.5bpw", "quantize.widths=[4,5,6,8]", "allocation=['gradient']", "search.trials=3")
    command.ok("--study", place / "tiny.toml", *wide)
    assert all(5.4 < trial.user_attrs["effective_bits"] <= 5.5 for trial in stored(place).get_trials())
    assert "outside the admissible interval [0, 0.6]" in command(*words[:3], "--parameter", "S=0.9").error
