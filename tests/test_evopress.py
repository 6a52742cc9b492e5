"""EvoPress' search as the benchmark runs it: stitched models against masks made from scratch, and its invariants."""

import copy
import importlib
import itertools
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families import bench_of, few, random_ids, tiny
from test_benchmarks import BENCHMARKS, rows
from tinystudy import CommandLine
from torch import Tensor
from torch.nn import functional

from atp_tune.allocations import Shape
from atp_tune.plan import Plan
from atp_tune.pruners.wanda import Ranks, Wanda
from atp_tune.run.session import Session
from atp_tune.spec.prune import PruneConfig


@pytest.fixture
def evopress(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark, whose modules import each other by name."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("evopress")


def ranks_of(context: Session) -> list[dict[str, Ranks]]:
    with torch.inference_mode():
        known = context.measured.statistics(Wanda())
        return [
            {x.name: Ranks.of(x.matrix(context.checkpoint.weights(i)[x.key]), known[i][x.name]) for x in linears}
            for i, linears in enumerate(context.checkpoint.linears)
        ]


def fitness_of(context: Session, evopress: Any, kind: str = "kl") -> Any:
    return evopress.TextFitness(context, random_ids(12, seed=5), evopress.by_wanda(ranks_of(context)), kind)


def some_states(context: Session, evopress: Any, count: int) -> list[Any]:
    """Uniform, and states a few switches apart."""
    shapes = context.checkpoint.shapes
    levels, draw = evopress.Levels.of(shapes, 0.01), random.Random(3)
    states = [evopress.state_of(tuple((0.6,) * len(row) for row in shapes), shapes)]
    while len(states) < count:
        states.append(levels.mutated(draw.choice(states), draw))
    return states


def from_scratch(model: Any, context: Session, state: Any) -> Any:
    """A copy of the model whose linears are pruned one by one, by sorting each row."""
    pruned = copy.deepcopy(model)
    known = context.measured.statistics(Wanda())
    for i, linears in enumerate(context.checkpoint.linears):
        for linear, zeros in zip(linears, state[i], strict=True):
            weight = linear.matrix(pruned.get_parameter(context.checkpoint.key(i, linear)).data)
            rows = (weight.abs() * known[i][linear.name].norms()).tolist()
            for row, scores in enumerate(rows):
                weight[row, sorted(range(len(scores)), key=lambda j: (scores[j], j))[:zeros]] = 0
    return pruned


@pytest.mark.parametrize("family", few(("llama", "gpt2", "gemma3"), ("llama",)))
def test_stitched_weights_are_those_of_masks_made_from_scratch(family: str, evopress: Any) -> None:
    """Wherever the way of switches led from."""
    model = tiny(family)
    context = bench_of(model)
    text = fitness_of(context, evopress)
    for number, state in enumerate(some_states(context, evopress, 4)):
        pruned = from_scratch(model, context, state)
        for i, linears in enumerate(context.checkpoint.linears):
            block = text.stitched.block(i, state[i])
            for linear in linears:
                assert torch.equal(block[linear.key], pruned.get_parameter(context.checkpoint.key(i, linear)))
        if number % 2:
            text.stitched.keep(state)


@pytest.mark.parametrize("pruner", few(("wanda", "sparsegpt"), ("wanda",)))
def test_stitched_weights_are_those_of_the_package(pruner: str, evopress: Any) -> None:
    """By its own pass over the blocks, with statistics of the dense model."""
    context = bench_of(tiny("llama"), PruneConfig(statistics="dense"))
    made = context.methods.pruner(pruner)
    with torch.inference_mode():
        by_sparsegpt = evopress.BySparseGPT(made, context.measured.statistics(made), time.monotonic)
        level = evopress.by_wanda(ranks_of(context)) if pruner == "wanda" else by_sparsegpt
        text = evopress.TextFitness(context, random_ids(2), level, "nll")
        for state in some_states(context, evopress, 3):
            rows = evopress.sparsities(state, context.checkpoint.shapes)
            for block in context.prune(Plan(pruner, "", tuple(sum(row) / len(row) for row in rows), {}, rows)):
                own = text.stitched.block(block.index, state[block.index])
                assert all(torch.equal(own[name], tensor) for name, tensor in block.weights.items())
            text.stitched.keep(state)


@pytest.mark.slow
def test_fitness_is_that_of_whole_models(evopress: Any) -> None:
    """KL and NLL of candidates that share blocks, by the logits of whole pruned copies."""
    model = tiny("llama")
    context = bench_of(model)
    states, windows = some_states(context, evopress, 5), [1, 4, 5, 9]
    ids = random_ids(12, seed=5)[windows]
    found = {kind: fitness_of(context, evopress, kind)(states, windows) for kind in ("kl", "nll")}
    with torch.no_grad():
        dense = model(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
        for number, state in enumerate(states):
            own = from_scratch(model, context, state)(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
            kl = float((dense.exp() * (dense - own)).sum(-1).mean())
            nll = float(functional.nll_loss(own.flatten(0, 1), ids[:, 1:].flatten()))
            assert found["kl"][number] == pytest.approx(kl, abs=1e-5)
            assert found["nll"][number] == pytest.approx(nll, abs=1e-5)


def test_candidates_share_what_is_equal(evopress: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks before the first difference run once, and each row of zeros of a block is made once."""
    context = bench_of(tiny("llama"))
    text, states = fitness_of(context, evopress), some_states(context, evopress, 4)
    seen: list[int] = []
    run = context.replay.run

    def counted(index: int, weights: Any, hidden: Tensor) -> Tensor:
        seen.append(len(hidden))
        return run(index, weights, hidden)

    monkeypatch.setattr(context.replay, "run", counted)
    text.final_states([states[0]] * 3, random_ids(2))
    assert sum(seen) == 2 * len(context.checkpoint.linears)
    seen.clear()
    with torch.inference_mode():
        text.final_states(states, random_ids(2))
    prefixes = {state[: index + 1] for state in states for index in range(len(state))}
    assert sum(seen) == 2 * len(prefixes)


@pytest.mark.slow
def test_a_search_on_the_whole_pool_never_gets_worse(evopress: Any) -> None:
    """Each generation has as many zeros as the first, and is at least as fit as its parent on the same windows."""
    from evopress_search import next_generation, zeros_of

    context = bench_of(tiny("llama"))
    shapes, text = context.checkpoint.shapes, fitness_of(context, evopress)
    settings = evopress.Settings(offspring=5, stages=((2, 3), (1, 12)), share=0.01)
    levels, state = evopress.Levels.of(shapes, settings.share), some_states(context, evopress, 1)[0]
    zeros, last, seen = zeros_of(state, shapes), text([state], range(12))[0], {state}
    first = last
    for number in range(4):
        found = next_generation(state, number, levels, settings, 12, text)
        assert found.fitness <= found.before == pytest.approx(last, abs=1e-6)
        state, last = found.state, found.fitness
        text.stitched.keep(state)
        seen.add(state)
        assert zeros_of(state, shapes) == zeros
        assert found.windows == 5 * 3 + 3 * 12
    assert len(seen) > 1 and last < first


def test_mutations_switch_levels_within_rows(evopress: Any) -> None:
    from evopress_search import offspring, zeros_of

    shapes = ((Shape(6, 10, True), Shape(4, 20, False)), (Shape(6, 10, True), Shape(4, 20, False)))
    levels, draw = evopress.Levels.of(shapes, 0.09), random.Random(0)
    assert levels.steps == ((2, 3), (2, 3))  # 12 weights, the least common multiple of 6 and 4
    state, total, ends = ((4, 8), (4, 8)), 2 * (4 * 6 + 8 * 4), set()
    for _ in range(300):
        state = levels.mutated(state, draw)
        assert zeros_of(state, shapes) == total
        flat = zip(sum(state, ()), sum(levels.columns, ()), strict=True)
        assert all(0 <= zeros <= columns for zeros, columns in flat)
        ends |= {k for row in state for k in row}
    assert {0, 10, 20} & ends
    full = ((10, 20), (10, 20))
    assert levels.mutated(full, draw) == full and offspring(full, levels, 4, draw) == []


def test_sparsities_give_back_the_state(evopress: Any) -> None:
    shapes = tuple((Shape(2, columns, False),) for columns in range(1, 2000))
    for share in (0.0, 0.3, 0.6, 1.0):
        state = tuple((round(share * shape.columns),) for (shape,) in shapes)
        assert evopress.state_of(evopress.sparsities(state, shapes), shapes) == state


@pytest.mark.slow
def test_the_command_goes_on_where_it_stopped(
    place: Path,
    cache: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    evopress: Any,
    command: CommandLine,
) -> None:
    """A search that is cut off after every generation finds what an undisturbed one finds; both are measured.

    Prices are those of the package.
    """
    page = place / "evopress.md"
    page.write_text(f"before\n{evopress.page.MARKS[0]}\nold\n{evopress.page.MARKS[1]}\nafter\n")
    monkeypatch.setattr(evopress.page, "PAGE", page)
    monkeypatch.setattr(evopress, "BUILD", place / "build")
    for module in (evopress, importlib.import_module("atp_tune.run.session")):
        monkeypatch.setattr(module, "POOL", 256)
    monkeypatch.setattr(evopress, "process_time", itertools.count(0.0).__next__)

    def searched(*more: str) -> None:
        words = f"--study {place}/tiny.toml --multiples 1 3 --stages 2 1 1 2 --offspring 4 --share 0.01".split()
        monkeypatch.setattr(sys, "argv", ["evopress.py", *words, "--threads", str(torch.get_num_threads()), *more])
        evopress.main()

    monkeypatch.setattr(evopress.prices, "STEPS", 2)
    searched("--name", "whole")
    monkeypatch.setattr(evopress, "SAVED", -1)
    for _ in range(10):
        searched("--name", "pieces", "--minutes", "0")
    assert "the time is over" in capsys.readouterr().out
    searched("--name", "pieces")
    whole, pieces = (evopress.page.Record(place / "build" / name).parts for name in ("whole", "pieces"))
    assert states(whole) == states(pieces) and len(states(whole)) == 7
    for part in ("points wanda", "fitness kl from uniform"):
        assert whole[part] == pieces[part]
    found = ["kl from uniform, 1×", "kl from uniform, 3×"]
    assert list(whole["points wanda"]) == ["uniform", "prices, κ = 1", "prices, κ = 0.776", *found, "row-prices, κ = 1"]
    text = page.read_text()
    assert "old" not in text and text.startswith("before") and text.endswith("after\n")
    assert [row[0] for row in rows(text) if row[0].startswith("kl")][:2] == found
    ends = []
    for name in ("prices", "row-prices"):
        before = {*(cache / "prices").glob("*.json")}
        assert command("prune", "--study", place / "tiny.toml", "--allocation", name).code == 0
        [kept] = {*(cache / "prices").glob("*.json")} - before
        ends += json.loads(kept.read_text())
    rows_ = whole["row-prices"]
    assert ends == [whole["prices"]["end"], [rows_["end"], rows_["rows"]]]


def states(record: dict[str, Any]) -> Sequence[Any]:
    return [moment["state"] for moment in record["search kl from uniform"]["moments"]]
