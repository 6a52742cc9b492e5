"""Studies with `bits`: rounding to widths, a study and its files end to end, what is refused."""

import json
import re
import shutil
import sqlite3
import sys
from contextlib import closing
from itertools import product
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from families import checkpoint_of, tiny
from hypothesis import given
from hypothesis import strategies as st
from plans import linears_of, planned
from plans import stored as stored_plan
from pydantic import ValidationError
from safetensors.torch import load_file
from test_config import config
from tinystudy import CommandLine, stored, study_file
from torch import nn
from transformers import AutoModelForCausalLM

from atp_tune.allocations import Budget, Shape, bits
from atp_tune.api import result as api_rows
from atp_tune.config.best import Config, read_config
from atp_tune.config.data import Text
from atp_tune.config.facts import facts
from atp_tune.config.patterns import make_plan
from atp_tune.config.plugged import PluginRef
from atp_tune.config.prune import PruneConfig
from atp_tune.config.quantize import WIDTHS, Bits, QuantizeConfig
from atp_tune.config.study import Study
from atp_tune.errors import UserError
from atp_tune.folders.exporting import FORMATS, as_csv, as_yaml
from atp_tune.plan import Plan
from atp_tune.results.results import levels_of
from atp_tune.results.summary import summarise
from atp_tune.storage.progress import measured

BITS = "[quantize]\nquantizers = ['rtn', 'gptq']\ngroup_size = 16\n\n[allocation]\nbeta = 'both'\n"


# rounding

blocks = st.lists(st.tuples(st.floats(2, 8), st.integers(1, 1000)), min_size=1, max_size=12)


@given(blocks, st.sampled_from([WIDTHS, (2, 8), (3, 4), (4,)]))
def test_the_mean_stays_within_and_each_goes_one_step_at_most(found: Any, widths: tuple[int, ...]) -> None:
    wanted = [min(widths[-1], max(widths[0], b)) for b, _ in found]
    sizes = [size for _, size in found]
    rounded = bits.rounded(wanted, sizes, widths)
    assert set(rounded) <= set(widths)
    total = sum(b * size for b, size in zip(wanted, sizes, strict=True))
    missing = total - sum(b * size for b, size in zip(rounded, sizes, strict=True))
    assert missing > -1e-6 * total
    for b, was, size in zip(rounded, wanted, sizes, strict=True):
        below, above = max(w for w in widths if w <= was + 1e-9), min(w for w in widths if w >= was - 1e-9)
        assert b in (below, above)
        if b < above:  # another step would be too much
            assert (above - b) * size > missing - 1e-6 * total


@given(st.lists(st.floats(2, 8), min_size=1, max_size=10))
def test_of_equal_blocks_more_stays_more(wanted: list[float]) -> None:
    rounded = bits.rounded(wanted, [5] * len(wanted), WIDTHS)
    assert all(
        b <= c for (a, b), (d, c) in product(zip(wanted, rounded, strict=True), repeat=2) if a < d - 1e-6 and d <= 6
    )


def test_uniform_alternates() -> None:
    assert bits.rounded([3.5] * 6, [7] * 6, WIDTHS) == (4, 3, 4, 3, 4, 3)
    assert bits.rounded([3.0] * 4, [7] * 4, WIDTHS) == (3,) * 4
    assert sum(bits.rounded([3.25] * 8, [7] * 8, WIDTHS)) == 26
    assert bits.rounded([7.0] * 4, [1] * 4, WIDTHS) == (8, 6, 8, 6)
    for count in range(1, 40):
        assert sorted(bits.evenly(count)) == list(range(count))


@pytest.mark.parametrize(("blocks", "target", "beta"), [(30, 3.0, 0.00575), (30, 3.5, 0.00862), (12, 3.0, 0.01515)])
def test_plans_of_both_signs_are_mirror_images(blocks: int, target: float, beta: float) -> None:
    """Some b_i lie exactly in the middle between two widths."""
    budget = Budget(bits.share_of(target, WIDTHS), (10,) * blocks, widths=WIDTHS)
    middle = 1 / (3 * (blocks - 1)) / 2  # the first and last block at ±half a bit
    for step in (beta, middle, 2 * middle):
        early, late = (make_plan("gptq", "atp", budget, {"beta": sign * step}).amounts for sign in (1, -1))
        assert early is not None
        assert late == early[::-1], step


def test_of_ties_at_one_half_the_larger_number_is_raised() -> None:
    wanted = [3.5, *[3.0] * 28, 2.5]
    assert bits.rounded(wanted, [7] * 30, WIDTHS) == (4, *[3] * 28, 2)
    assert bits.rounded(wanted[::-1], [7] * 30, WIDTHS) == (2, *[3] * 28, 4)


def test_a_plan_has_bits_where_the_budget_has_widths() -> None:
    budget = Budget(bits.share_of(3.5, WIDTHS), (10,) * 8, widths=WIDTHS)
    late = make_plan("gptq", "atp", budget, {"beta": -0.03})
    early = make_plan("gptq", "atp", budget, {"beta": 0.03})
    assert late.amounts == early.amounts[::-1] == tuple(sorted(late.amounts))
    assert late.mean_bits(budget.sizes) == 3.5
    assert late.by_bits
    assert make_plan("gptq", "uniform", budget, {}).is_uniform
    assert not late.is_uniform


def by_price(costs: list[list[float]], sizes: list[int], price: float) -> list[int]:
    """For each linear on its own, the fewest bits at the least cost plus price for all bits of its weights."""
    pairs = zip(costs, sizes, strict=True)
    return [min(WIDTHS, key=lambda b: (row[WIDTHS.index(b)] + price * b * size, b)) for row, size in pairs]


cost = st.floats(0, 1).map(lambda value: round(value, 4))
priced = st.lists(st.tuples(st.lists(cost, min_size=6, max_size=6), st.integers(1, 9)), min_size=1, max_size=4)


@given(priced, st.floats(0.0001, 0.2))
def test_the_cheapest_bits_are_those_of_all_plans(found: Any, price: float) -> None:
    """At the bits of a price none of all plans with as many bits or fewer costs less; of others, none that is kept."""
    costs, sizes = [list(row) for row, _ in found], [size for _, size in found]

    def cost_of(plan: Any) -> float:
        return sum(row[WIDTHS.index(b)] for row, b in zip(costs, plan, strict=True))

    def bits_in(plan: Any) -> int:
        return sum(b * size for b, size in zip(plan, sizes, strict=True))

    target = bits_in(by_price(costs, sizes, price)) / sum(sizes)
    plan = bits.cheapest(costs, sizes, WIDTHS, target)
    assert bits_in(plan) <= target * sum(sizes) + 1e-6
    least = min(cost_of(other) for other in product(WIDTHS, repeat=len(sizes)) if bits_in(other) <= bits_in(plan))
    assert cost_of(plan) == pytest.approx(least, abs=1e-9)


@given(priced, st.floats(2, 8))
def test_bits_are_not_left_over(found: Any, target: float) -> None:
    """Costs that fall with each bit: nothing fits in any more."""
    costs = [sorted(row, reverse=True) for row, _ in found]
    falling = [[value + (8 - b) ** 2 for value, b in zip(row, WIDTHS, strict=True)] for row in costs]
    sizes = [size for _, size in found]
    plan = bits.cheapest(falling, sizes, WIDTHS, target)
    left = target * sum(sizes) - sum(b * size for b, size in zip(plan, sizes, strict=True))
    assert left > -1e-6
    for b, size in zip(plan, sizes, strict=True):
        assert b == 8 or (min(w for w in WIDTHS if w > b) - b) * size > left - 1e-6


def test_linears_have_bits_where_an_allocation_shares_them_out_by_linear() -> None:
    shapes = ((Shape(4, 4, True), Shape(8, 4, False)), (Shape(4, 4, True), Shape(8, 4, False)))
    shares = ((0.0, 1.0), (0.5, bits.share_of(4.25, WIDTHS)))
    known = SimpleNamespace(priced_sparsities=lambda target, score: shares)
    budget = Budget(bits.share_of(49 / 12, WIDTHS), (48, 48), shapes, known, widths=WIDTHS)  # type: ignore[arg-type]
    plan = make_plan("gptq", "gradient", budget, {"kappa": 1.0})
    assert linears_of(plan) == ((8, 2), (5, 4))
    assert plan.amounts == (4.0, pytest.approx(13 / 3))
    assert [level.bits for index in (0, 1) for level in plan.of(index, 2)] == [8, 2, 5, 4]
    assert not plan.is_uniform
    assert make_plan("gptq", "gradient", budget, {"kappa": 0.0}).amounts == (4, 4)


@pytest.mark.parametrize(("group", "symmetric", "expected"), [(16, False, 3 + 3 * 19 / 40), (-1, True, 3 + 16 / 40)])
def test_scales_and_zero_points_are_counted(group: int, symmetric: bool, expected: float) -> None:
    assert bits.stored_bits(5, 40, 3, group, symmetric) == pytest.approx(200 * expected)


# a study


@pytest.fixture(scope="module")
def ran(tiny_place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished study; to be read only."""
    from tinystudy import run

    place = tmp_path_factory.mktemp("bits") / "tiny"
    shutil.copytree(tiny_place, place)
    toml = (place / "tiny.toml").read_text().replace("sparsity = 0.6", "bits = 3.5").replace("trials = 3", "trials = 6")
    (place / "tiny.toml").write_text(toml + "\n" + BITS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATP_TUNE_CACHE", str(place.parent / "cache"))
        run(place)
    return place


@pytest.fixture
def bits_done(ran: Path, tmp_path: Path, windows: None) -> Path:
    """A copy for one test."""
    return Path(shutil.copytree(ran, tmp_path / "done"))


@pytest.mark.slow
def test_what_a_study_stores_and_shows(bits_done: Path, command: CommandLine) -> None:
    study = stored(bits_done)
    trials = measured(study)
    assert {trial.params["quantizer"] for trial in trials} == {"rtn", "gptq"}
    assert not [trial for trial in trials if "pruner" in trial.params]
    betas = {trial.params.get("beta", 0.0) for trial in trials}
    assert min(betas) < 0 < max(betas)
    for trial in trials:
        assert sum(levels_of(trial) or ()) == 14
        assert trial.user_attrs["effective_bits"] == pytest.approx(3.5 + 19.5 / 16)
    assert {round(row["effective_bits"], 3) for row in api_rows.trials(summarise(study))} == {round(3.5 + 19.5 / 16, 3)}
    dense = study.user_attrs["dense_bytes"]
    linears = 4 * sum(study.user_attrs["sizes"])
    assert trials[0].user_attrs["quantized_bytes"] == dense - linears + round(linears / 32 * (3.5 + 19.5 / 16))
    shown = command("status", "--study", bits_done / "tiny.toml")
    assert "tiny: 3.5 bits" in shown.out
    assert "3.50 (4.72 with scales)" in shown.out
    assert "sparsity" not in shown.out
    said = json.loads(command("status", "--study", bits_done / "tiny.toml", "--json").out)
    assert (said["bits"], said["sparsity"]) == (3.5, None)
    for kind in ("md", "tex", "json", "html"):
        assert command("report", "--study", bits_done / "tiny.toml", "--out", bits_done / f"r.{kind}").code == 0
        assert kind == "tex" or "3.5" in (bits_done / f"r.{kind}").read_text()
    assert "bits per weight, without scales" in (bits_done / "r.html").read_text()
    assert "3.5 bits per weight, 3.50 (4.72 with scales) in the best" in (bits_done / "r.md").read_text()


@pytest.mark.slow
def test_a_plan_for_another_number_of_blocks_is_no_configuration(bits_done: Path, command: CommandLine) -> None:
    with closing(sqlite3.connect(bits_done / "tiny.db")) as connection, connection:
        rows = "SELECT rowid, value_json FROM trial_system_attributes WHERE key = 'atp_tune:plan'"
        for row, text in connection.execute(rows).fetchall():
            plan = json.loads(text)
            plan["levels"].append({"bits": 4})
            connection.execute(
                "UPDATE trial_system_attributes SET value_json = ? WHERE rowid = ?", (json.dumps(plan), row)
            )
    for words in (("export",), ()):
        assert "lacks what a configuration needs" in command(*words, "--study", bits_done / "tiny.toml").error


@pytest.mark.slow
def test_a_study_goes_on(bits_done: Path, command: CommandLine) -> None:
    before = [trial.params for trial in stored(bits_done).get_trials()]
    assert command("--study", bits_done / "tiny.toml", "--trials", "7").code == 0
    after = stored(bits_done).get_trials()
    assert [trial.params for trial in after[:-1]] == before
    assert summarise(stored(bits_done)).complete
    for key in (
        "bits=3",
        "quantize.act_order=true",
        "quantize.group_size=8",
        "quantize.quantizers=['rtn']",
        "prune.statistics=dense",
    ):
        refused = command("--study", bits_done / "tiny.toml", "--set", key)
        assert refused.code == 2
        assert re.search(rf"study tiny: {key.partition('=')[0]} is .*, was ", refused.err)


@pytest.mark.slow
def test_apply_writes_what_the_trial_measured(bits_done: Path, command: CommandLine) -> None:
    best = read_config(bits_done / "tiny.best.json")
    assert best.quantize is not None
    assert best.bits == Bits(target=3.5, nominal=3.5, effective=3.5 + 19.5 / 16)
    assert best.plan.by_bits and sum(best.plan.amounts) == 14
    said = command("apply", "--config", bits_done / "tiny.best.json", "--out", bits_done / "out")
    assert "(+0.000%)" in said.out
    card = (bits_done / "out" / "README.md").read_text()
    assert "rounded to 3.50 bits each, 4.72 with the scales of groups" in card
    assert "quantized" in card
    assert "zero" not in card.lower()
    made = read_config(bits_done / "out" / "atp_tune.json")
    assert (made.plan, made.quantize, made.bits) == (best.plan, best.quantize, best.bits)
    assert command("apply", "--verify", bits_done / "out").code == 0
    check_codes(bits_done, command, zeros=False)
    beta = f"--beta={best.plan.parameters.get('beta') or 0.01}"
    words = ["prune", "--study", bits_done / "tiny.toml", beta, "--out", bits_done / "pruned"]
    assert "3.5 bits: perplexity" in command(*words).out
    for words, reason in (
        (["apply", "--slim", "--config", bits_done / "tiny.best.json"], "only whole channels can be cut"),
        (
            ["finetune", bits_done / "out", "--seqlen", "32"],
            "its weights are rounded, and training would undo",
        ),
        (["speedup", bits_done / "out"], "weights are rounded, and run as floats"),
        (
            ["prune", "--study", bits_done / "tiny.toml", "--pruner", "wanda", "--beta", "0.1"],
            "is of zeros; leave it out",
        ),
    ):
        more = ["--out", bits_done / "no"] if words[0] in ("apply", "finetune") else []
        refused = command(*words, *more)
        assert refused.code == 2, words
        assert reason in refused.err
        assert not (bits_done / "no").exists()


def check_codes(place: Path, command: CommandLine, zeros: bool) -> None:
    """The folder of codes of a study's best trial: its bytes, its perplexity, and all that reads it."""
    best, codes = read_config(place / "tiny.best.json"), place / "codes"
    said = command("apply", "--config", place / "tiny.best.json", "--out", codes, "--packed").out
    change = re.search(r"\(([+-]\d+\.\d+)%\)", said)
    assert change and abs(float(change[1])) < 0.5  # by scales of 16 bits alone
    assert command("apply", "--verify", codes).code == 0
    trial = next(trial for trial in stored(place).get_trials() if trial.number == best.trial)
    tensors = {name: tensor for file in codes.glob("*.safetensors") for name, tensor in load_file(file).items()}
    rows = sum(tensor.shape[0] for name, tensor in tensors.items() if name.endswith("_bitmask"))
    more = sum(tensor.nbytes for tensor in tensors.values()) - trial.user_attrs["quantized_bytes"]
    assert 0 <= more <= rows + 2 * sum(name.endswith("_codes") for name in tensors)
    assert bool(rows) == zeros
    card = (codes / "README.md").read_text()
    assert "codes" in card and "as floats" not in card and "It needs `import atp_tune` before it" in card
    again = command("apply", "--config", codes / "atp_tune.json", "--out", place / "again", "--packed").out
    assert "byte for byte" in again and "(+0.000%)" in again
    rates = command("speedup", codes, "--engine", "packed", "--tokens", "8", "--runs", "1")
    assert ("packed" in rates.out) if zeros else ("run as floats" in rates.err)
    assert command("unpack", codes, "--out", place / "unpacked").code == 0
    found, loaded = (AutoModelForCausalLM.from_pretrained(place / name) for name in ("unpacked", "codes"))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        torch.testing.assert_close(loaded(ids).logits, found(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_other_allocations_share_out_bits(bits_done: Path, command: CommandLine) -> None:
    names = "allocation.names=['uniform', 'curve', 'owl', 'alphapruning']"
    words = ["--study", bits_done / "tiny.toml", "--study-name", "others", "--trials", "9", "--set", names]
    assert command(*words, "--set", "quantize.quantizers=['rtn']").code == 0
    trials = measured(stored(bits_done, "others", bits_done / "tiny.db"))
    assert {trial.params["allocation"] for trial in trials} >= {"curve", "owl", "alphapruning"}
    assert all(sum(levels_of(trial) or ()) <= 14 for trial in trials)


@pytest.mark.slow
def test_bits_by_prices(bits_done: Path, command: CommandLine) -> None:
    words = ["--study", bits_done / "tiny.toml", "--study-name", "priced", "--set", "allocation.names=['gradient']"]
    answer = command(*words, "--trials", "6", "--set", "quantize.quantizers=['rtn']")
    assert (answer.code, answer.err) == (0, "")
    study = stored(bits_done, "priced", bits_done / "tiny.db")
    assert [trial.params.get("kappa") for trial in study.trials][:3] == [0.0, 1.0, 0.6]
    plan = Plan.model_validate(study.trials[1].user_attrs["plan"])
    rows = linears_of(plan)
    assert rows is not None
    assert len({b for row in rows for b in row}) > 1
    sizes = study.user_attrs["sizes"]
    plans = [Plan.model_validate(trial.user_attrs["plan"]) for trial in measured(study)]
    assert all(each.mean_bits(sizes) <= 3.5 for each in plans)
    assert plan.mean_bits(sizes) > 3.4
    assert "gradient" in command("status", "--study", bits_done / "tiny.toml", "--study-name", "priced").out
    assert command("report", *words[:4], "--out", bits_done / "r.html").code == 0
    found = bits_done / "found.json"
    exported = command("export", *words[:4], "--trial", "1", "--out", found)
    assert exported.code == 0
    best = read_config(found)
    assert best.plan == plan
    assert command("export", "--config", found, "--format", "llm-compressor", "--out", bits_done / "r.yaml").code == 0
    applied = command("apply", "--config", found, "--out", bits_done / "out").out
    tested = best.scored() is not None  # as of the best trials, and which those are differs by CPU
    assert ("(+0.000%)" if tested else "(the configuration has none yet)") in applied
    assert read_config(bits_done / "out" / "atp_tune.json").plan == plan
    assert command("apply", "--verify", bits_done / "out").code == 0
    weights = load_file(bits_done / "out" / "model.safetensors")
    for row, names in zip(rows, best.linears or (), strict=True):
        for bits_of, name in zip(row, names, strict=True):
            index = rows.index(row)
            groups = weights[f"model.layers.{index}.{name}.weight"].reshape(-1, 16)
            assert max(len(group.unique()) for group in groups) <= 2**bits_of


@pytest.mark.slow
def test_zeros_survive_rounding(place: Path, command: CommandLine) -> None:
    """Of a study with a sparsity and bits: the pruner's zeros, then at most 2^b values in each group."""
    lines = "sparsity = 0.5\nbits = 3\nquantize = {group_size = 16}\nallocation = ['atp', 'gradient']"
    (place / "tiny.toml").write_text((place / "tiny.toml").read_text().replace("sparsity = 0.6", lines))
    assert "tiny: 50% sparsity at 3 bits" in command("--study", place / "tiny.toml").out
    best = read_config(place / "tiny.best.json")
    assert (best.plan.method, best.plan.fixed_bits, best.by_bits) == ("wanda", 3, False)
    assert best.bits is not None
    assert best.bits.effective is not None
    assert abs(best.bits.effective - (1 + 3 * (1 - best.sparsity.realised) + 19 / 16)) < 0.1  # or without its mask
    out = place / "out"
    assert "(+0.000%)" in command("apply", "--config", place / "tiny.best.json", "--out", out).out
    assert "Kept weights are rounded to 3 bits by gptq" in (out / "README.md").read_text()
    found = load_file(out / "model.safetensors")
    for name in (key for key in found if key.endswith("_proj.weight")):
        groups = found[name].reshape(-1, 16)
        assert max(len(group.unique()) for group in groups) <= 8
    assert sum(trial.user_attrs["realised"] for trial in measured(stored(place))) / len(measured(stored(place))) > 0.49
    assert command("pack", out, "--out", place / "packed").code == 0
    check_codes(place, command, zeros=True)
    for kind in ("llm-compressor", "gptqmodel"):
        refused = command("export", "--config", place / "tiny.best.json", "--format", kind)
        assert (refused.code, "says zeros or bits" in refused.err) == (2, True)
    assert command("--study", place / "tiny.toml", "--set", "bits=4").code == 2  # another study


@pytest.mark.slow
@pytest.mark.parametrize("way", ["dense", "sequential"])
def test_other_statistics_and_screening(bits_done: Path, command: CommandLine, way: str) -> None:
    words = ["--study", bits_done / "tiny.toml", "--study-name", way, "--set", f"prune.statistics={way}"]
    screen = ["--set", "search.screen={trials = 4}"] if way == "dense" else []
    assert command(*words, *screen).code == 0
    made = command("apply", "--config", bits_done / f"{way}.best.json", "--out", bits_done / way)
    assert "(+0.000%)" in made.out


# what is refused

BELONGS = "leave it out where bits are given"
ZEROS = "is of zeros; leave it out, of prune only statistics stay where bits are given"
REFUSED = [
    ("sparsity = 0.5\nbits = 3.5", "bits: must be one of 2, 3, 4, 5, 6, 8 where a sparsity and bits are given"),
    ("sparsity = 0.5\nbits = 4\nquantize = {quantizers = ['rtn', 'gptq']}", "quantize.quantizers: must be one name"),
    ("sparsity = 0.5\nbits = 4\nprune = {pattern = 'channels'}", "prune.pattern: must be of single weights where"),
    ("", "sparsity: is needed"),
    ("bits = 1.5", "bits: must be at least 2, got 1.5"),
    ("bits = 9", "bits: must be at most 8, got 9"),
    ("bits = [3, 4]", "bits: must be a number, got [3, 4]"),
    ("bits = true", "bits: must be a number, got true"),
    ("bits = 3.5\nlimit = {max_increase = 0.1}", f"limit: needs an interval of sparsities; {BELONGS}"),
    ("bits = 3.5\nallocation = 'global'", "allocation.names: global is of zeros; take gradient, atp or another that "
     "shares out bits too, where bits are given"),
    ("bits = 3.5\nprune = {pruners = ['wanda']}", f"prune.pruners: {ZEROS}"),
    ("bits = 3.5\nprune = {pattern = '2:4'}", f"prune.pattern: {ZEROS}"),
    ("bits = 3.5\nquantize = {widths = [4, 8]}", "bits: must be from 4 to 8, as quantize.widths allows, got 3.5"),
    ("bits = 3.5\nquantize = {widths = [4, 3]}", "quantize.widths: must ascend, each once"),
    ("bits = 3.5\nquantize = {widths = [1, 4]}", "quantize.widths[0]: must be at least 2, got 1"),
    ("bits = 3.5\nquantize = {group_size = 0}", "quantize.group_size: must be at least 1, or -1 for the whole row"),
    ("bits = 3.5\nquantize = {quantizers = ['awq']}", "quantize.quantizers[0]: must be one of rtn, gptq"),
    ("bits = 3.5\nquantize = {quantizers = ['rtn', 'rtn']}", 'quantize.quantizers: holds "rtn" 2 times'),
    ("sparsity = 0.5\nquantize = {group_size = 64}", "quantize: belongs to a study with bits, and this one has a "
     "sparsity; leave it out"),
]  # fmt: skip


@pytest.mark.parametrize(("lines", "reason"), REFUSED)
def test_what_does_not_go_with_bits(lines: str, reason: str, place: Path, command: CommandLine) -> None:
    toml = (place / "tiny.toml").read_text()
    (place / "tiny.toml").write_text(toml.replace("sparsity = 0.6", lines))
    refused = command("--study", place / "tiny.toml")
    assert refused.code == 2
    assert reason in refused.err
    assert len(refused.err.strip().splitlines()) == 1
    assert not (place / "tiny.db").exists()


def test_studies_without_bits_have_the_facts_that_they_had(place: Path) -> None:
    known = facts(study_file(place).study)
    assert not [key for key in known if key.startswith(("bits", "quantize"))]
    toml = {"bits": 3.0, **study_file(place).study.model_dump(mode="json", exclude_unset=True)}
    toml.pop("sparsity")
    found = facts(Study.model_validate(toml))
    assert found["bits"] == 3
    assert found["quantize.widths"] == list(WIDTHS)
    assert "quantize.act_order" not in found  # a key that is younger than such studies
    ordered = facts(Study.model_validate({**toml, "quantize": {"act_order": True}}))
    assert ordered == {**found, "quantize.act_order": True}
    assert not [key for key in found if key.startswith("prune.") and key != "prune.statistics"]


def rounded(*bits: float, method: str = "gptq", linears: Any = None, sparsities: Any = None) -> Plan:
    return planned(method, "atp", sparsities or (None,) * len(bits), {"beta": 0.0125}, linears, bits)


ROUNDED: dict[str, Any] = {
    "quantize": QuantizeConfig(group_size=32), "plan": rounded(4, 3, 4), "bits": Bits(target=3.7, nominal=11 / 3),
    "prune": PruneConfig(),
    "linears": (("attn.q", "mlp.up"),) * 2 + (("mlp.up",),),
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"plan": planned("wanda", "atp", (0.5, 0.6, 0.7))}, "quantize: is needed with bits and a plan that has bits"),
        ({"quantize": None}, "quantize: is needed with bits and a plan that has bits"),
        ({"plan": rounded(4, 3)}, "linears: not one name for each linear"),
        ({"plan": rounded(3, 4, 4, linears=((4, 4), (3, 3), (4, 4)))}, "linears: not one name for each linear"),
        ({"plan": rounded(4, 3, 4, method="awq")}, "Input should be 'rtn' or 'gptq'"),
        ({"plan": rounded(4, 3, 4, method="wanda")}, "Input should be 'rtn' or 'gptq'"),
        ({"plan": rounded(4, 4, 4, sparsities=(0.5, 0.6, 0.7))}, "Input should be 'magnitude', 'wanda'"),
    ],
)
def test_what_a_configuration_of_a_stranger_may_not_say(changes: Any, reason: str) -> None:
    values = config(**{**ROUNDED, **changes}).model_dump(mode="json")
    with pytest.raises(ValidationError, match=re.escape(reason)):
        Config.model_validate(values)


def test_a_pruner_that_is_called_like_a_quantizer_prunes() -> None:
    plugin = {"rtn": PluginRef(kind="pruner", place="x.py:rtn", sha256="0" * 64)}
    plan = rounded(4, 4, 4, method="rtn", sparsities=(0.5, 0.6, 0.7))
    both = config(**{**ROUNDED, "plan": plan, "linears": None}, plugins=plugin)
    assert Config.model_validate(both.model_dump(mode="json")) == both
    assert (both.by_bits, both.plan.fixed_bits) == (False, 4)


def test_attributes_of_a_stranger_are_left_out() -> None:
    from atp_tune.storage.attributes import TRIAL, checked

    known = stored_plan([None], [[2, 3]], method="rtn", bits=[2.5]) | {"effective_bits": 4.5}
    assert checked(known, TRIAL) == known
    for levels in ([], [{"bits": 9}], [{"bits": 2.5}], 4, [[4]]):
        assert checked({"plan": {**known["plan"], "levels": levels}}, TRIAL) == {}, levels


# exports


def made(kind: str, **changes: Any) -> str:
    return FORMATS[kind].make(config(**{**ROUNDED, **changes}))


def test_recipes_have_a_group_for_each_number_of_bits() -> None:
    (stage,) = yaml.safe_load(made("llm-compressor")).values()
    modifier = stage["bits_modifiers"]["GPTQModifier"]
    assert (modifier["actorder"], modifier["dampening_frac"]) == (None, 0.01)
    by_bits = {group["weights"]["num_bits"]: group["targets"] for group in modifier["config_groups"].values()}
    linears = {
        3: ["model.layers.1.attn.q", "model.layers.1.mlp.up"],
        4: ["model.layers.0.attn.q", "model.layers.0.mlp.up", "model.layers.2.mlp.up"],
    }
    assert by_bits == linears
    (stage,) = yaml.safe_load(made("llm-compressor", plan=RTN, quantize=QuantizeConfig(group_size=-1))).values()
    (group, _) = stage["bits_modifiers"]["QuantizationModifier"]["config_groups"].values()
    assert group["weights"]["strategy"] == "channel"
    found = json.loads(made("gptqmodel"))
    assert (found["bits"], found["group_size"], found["sym"]) == (4, 32, False)
    assert (found["act_group_aware"], found["desc_act"]) == (False, False)
    ordered = QuantizeConfig(group_size=32, act_order=True)
    assert json.loads(made("gptqmodel", quantize=ordered))["desc_act"] is True
    (stage,) = yaml.safe_load(made("llm-compressor", quantize=ordered)).values()
    assert stage["bits_modifiers"]["GPTQModifier"]["actorder"] == "weight"
    settings = yaml.safe_load(as_yaml(config(**{**ROUNDED, "quantize": ordered})))["settings"]
    assert settings == {"group_size": 32, "symmetric": False, "damping": 0.01, "act_order": True}
    said = found["meta"]["calibration"]
    assert Text.model_validate({k: v for k, v in said.items() if k != "bos"}) == config().calibration
    assert {"source", "part", "nsamples", "seqlen"} < said.keys()
    assert said["bos"] is False
    assert json.loads(made("gptqmodel", bos=True))["meta"]["calibration"]["bos"] is True
    assert found["dynamic"] == {
        r"+:^(model\.layers\.(1)\.)": {"bits": 3}, r"+:^(model\.layers\.(0|2)\.)": {"bits": 4},
    }  # fmt: skip
    assert made("llama.cpp").splitlines() == [
        r"blk\.(1)\.(attn|ffn)_.*=q3_k", r"blk\.(0|2)\.(attn|ffn)_.*=q4_k",
    ]  # fmt: skip
    script = made("torchao", plan=RTN)
    compile(script, "torchao.py", "exec")
    assert "PerGroup(32)" in script


RTN = rounded(4, 3, 4, method="rtn")
BY_LINEAR: dict[str, Any] = {
    "plan": rounded(3.25, 3, 8, linears=((4, 3), (3, 3), (8,))),
    "linears": (("attn.q_proj", "mlp.up_proj"),) * 2 + (("mlp.up_proj",),),
}  # fmt: skip


def test_recipes_of_bits_by_linear() -> None:
    (stage,) = yaml.safe_load(made("llm-compressor", **BY_LINEAR)).values()
    groups = stage["bits_modifiers"]["GPTQModifier"]["config_groups"].values()
    assert {group["weights"]["num_bits"]: group["targets"] for group in groups} == {
        3: ["model.layers.0.mlp.up_proj", "model.layers.1.attn.q_proj", "model.layers.1.mlp.up_proj"],
        4: ["model.layers.0.attn.q_proj"],
        8: ["model.layers.2.mlp.up_proj"],
    }
    assert made("llama.cpp", **BY_LINEAR).splitlines() == [
        r"blk\.(0|1)\.ffn_up\.weight=q3_k", r"blk\.(1)\.attn_q\.weight=q3_k", r"blk\.(0)\.attn_q\.weight=q4_k",
        r"blk\.(2)\.ffn_up\.weight=q8_0",
    ]  # fmt: skip
    assert json.loads(made("gptqmodel", **BY_LINEAR))["dynamic"] == {
        r"+:^(model\.layers\.(0|1)\.mlp\.up_proj$|model\.layers\.(1)\.attn\.q_proj$)": {"bits": 3},
        r"+:^(model\.layers\.(0)\.attn\.q_proj$)": {"bits": 4}, r"+:^(model\.layers\.(2)\.mlp\.up_proj$)": {"bits": 8},
    }  # fmt: skip
    rows = as_csv(config(**{**ROUNDED, **BY_LINEAR})).splitlines()
    assert rows[:3] == ["block,module,bits", "0,model.layers.0.attn.q_proj,4", "0,model.layers.0.mlp.up_proj,3"]
    with pytest.raises(UserError, match=r"linears = attn\.q: llama\.cpp is told the tensors of the families of Llama"):
        made("llama.cpp", **{**BY_LINEAR, "linears": ROUNDED["linears"]})


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("gptqmodel", {"plan": RTN}, "pruner = rtn: gptqmodel quantizes by gptq alone"),
        ("gptqmodel", {"prune": PruneConfig(statistics="dense")}, "prune.statistics = dense: gptqmodel measures"),
        ("torchao", {}, "pruner = gptq: torchao rounds to nearest alone"),
        ("torchao", {"plan": RTN, "quantize": QuantizeConfig(symmetric=True)}, "symmetric = true: torchao rounds"),
        ("llama.cpp", {"plan": rounded(7, 3, 4)}, "plan.levels = 7: llama.cpp has k-quants of"),
        *((kind, {"linears": None}, "linears: the configuration lacks") for kind in ("gptqmodel", "llm-compressor")),
        *((kind, {"blocks": "a'b\n"}, "is not the name of a module") for kind in ("gptqmodel", "llm-compressor")),
        ("torchao", {"blocks": "a'b\n", "plan": RTN}, "is not the name of a module"),
    ],
)
def test_what_recipes_cannot_say(kind: str, changes: Any, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        made(kind, **changes)


# What reads a recipe: the linears that it names, by number of bits.


def of_llm_compressor(text: str, names: list[str]) -> dict[int, set[str]]:
    (stage,) = yaml.safe_load(text).values()
    (modifier,) = stage["bits_modifiers"].values()
    return {group["weights"]["num_bits"]: set(group["targets"]) for group in modifier["config_groups"].values()}


def of_gptqmodel(text: str, names: list[str]) -> dict[int, set[str]]:
    """As gptqmodel and vLLM look a name up: the first pattern that begins it."""
    dynamic, found = json.loads(text)["dynamic"], dict[int, set[str]]()
    for name in names:
        if pattern := next((pattern for pattern in dynamic if re.match(pattern[2:], name)), None):
            found.setdefault(dynamic[pattern]["bits"], set()).add(name)
    return found


def of_torchao(text: str, names: list[str], model: Any, monkeypatch: pytest.MonkeyPatch) -> dict[int, set[str]]:
    quantization: Any = ModuleType("torchao.quantization")
    quantization.FqnToConfig, quantization.IntxWeightOnlyConfig, quantization.quantize_ = dict, dict, None
    granularity: Any = ModuleType("granularity")
    granularity.PerAxis = granularity.PerGroup = int
    primitives: Any = ModuleType("quant_primitives")
    primitives.MappingType = SimpleNamespace(ASYMMETRIC=0)
    for module in (quantization, granularity, primitives):
        name = "torchao.quantization"
        monkeypatch.setitem(sys.modules, name if module is quantization else f"{name}.{module.__name__}", module)
    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    script: dict[str, Any] = {}
    exec(compile(text, "torchao.py", "exec"), script)
    found: dict[int, set[str]] = {}
    for name, asked in script["config"](model).items():
        found.setdefault(int(str(asked["weight_dtype"]).removeprefix("torch.int")), set()).add(name)
    return found


@pytest.mark.parametrize("kind", ["llm-compressor", "gptqmodel", "torchao"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen2_moe"])
def test_recipes_name_the_linears_that_apply_rounds(family: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(family)
    checkpoint = checkpoint_of(model)
    own = tuple((3, 4, 4, 3)[: len(checkpoint.blocks)])
    plan = rounded(*own, method="rtn" if kind == "torchao" else "gptq")
    known: dict[str, Any] = {"plan": plan, "blocks": checkpoint.blocks_name}
    known |= {"linears": tuple(map(tuple, checkpoint.linear_names)), "conv1d": checkpoint.has_conv1d}
    if family != "llama":
        reason = "this model has Conv1D" if family == "gpt2" else "no name for a single expert"
        with pytest.raises(UserError, match=f"--format {kind}: .*{reason}") as caught:
            made(kind, **known)
        assert "\n" not in str(caught.value)
        return
    text = made(kind, **known)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    wanted: dict[int, set[str]] = {}
    for i, linears in enumerate(checkpoint.linears):
        wanted.setdefault(own[i], set()).update(f"{checkpoint.blocks_name}.{i}.{linear.name}" for linear in linears)
    if kind == "torchao":
        assert of_torchao(text, names, model, monkeypatch) == wanted
    else:
        assert (of_gptqmodel if kind == "gptqmodel" else of_llm_compressor)(text, names) == wanted


@pytest.mark.parametrize("kind", ["gptqmodel", "torchao", "llama.cpp"])
def test_recipes_of_bits_are_of_bits(kind: str) -> None:
    with pytest.raises(UserError, match=f"--format {kind}: is of rounded weights, and this configuration has zeros"):
        FORMATS[kind].make(config())
