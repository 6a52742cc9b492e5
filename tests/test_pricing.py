"""Prices against gradients of the whole model, and the descent by them against its formula in loops."""

import copy
import json
import math
import random
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import naive
import pytest
import torch
from families import CPU, FAMILIES, MIXTURES, bench_of, few, random_ids, tiny
from naive_allocations import scores
from plans import linears_of
from test_curve import budgets
from tinystudy import CommandLine, settings, stored
from torch import Tensor
from torch.nn import functional

from atp_tune.allocations import Budget, LinearSparsities, Shape, gradient
from atp_tune.allocations.rows import RowSparsities
from atp_tune.blocks import gradients
from atp_tune.blocks.gradients import (
    BAND,
    GRID,
    BlockGradients,
    ByPlaces,
    ByPruner,
    KeptRuns,
    Levels,
    Pricing,
    Run,
    Sample,
)
from atp_tune.blocks.replay import AutoBatch, block_bytes
from atp_tune.checkpoints.blocks import Linear
from atp_tune.config.best import read_config
from atp_tune.config.prune import PruneConfig
from atp_tune.cost import forecast
from atp_tune.plan import Plan
from atp_tune.pruners import Pruner, make_pruner
from atp_tune.pruners.selection import order_in_rows, ranks
from atp_tune.pruners.wanda import Wanda
from atp_tune.run import dense_model as descents
from atp_tune.run.dense_model import CalibrationGradients, by_magnitude
from atp_tune.run.session import Session

FAST = ("llama", "gpt2")


def pricing_of(context: Session, windows: int = 4, by_wanda: bool = True, group: int | None = None) -> Pricing:
    """Prices at the context's own calibration windows, a few windows at a time."""
    with torch.inference_mode():
        statistics = context.measured.statistics(Wanda())

    def places(index: int, linear: Linear, weight: Tensor) -> Tensor:
        if not by_wanda:
            return by_magnitude(weight, group)
        return order_in_rows(Wanda.scores(weight, statistics[index][linear.name]), group)

    return pricing_at(ByPlaces(places), context, windows)


def pricing_at(levels: Levels, context: Session, windows: int = 4) -> Pricing:
    batch = AutoBatch(CPU, 1, 1, lambda text: None)
    batch.windows = windows
    of_blocks = BlockGradients(context.checkpoint, context.inputs, context.score.gradient, batch, context.heads)
    return Pricing(of_blocks, levels)


def own_levels(context: Session, pruner: Pruner, room: int = 1 << 30) -> ByPruner:
    """What a pruner makes with its statistics of the dense model."""
    with torch.inference_mode():
        statistics = list(context.measured.statistics(pruner))
    return ByPruner(pruner, lambda index: statistics[index], room)


def uneven(context: Session) -> LinearSparsities:
    """A sparsity for each linear, all different."""
    draw = random.Random(0)
    return tuple(tuple(draw.uniform(0.1, 0.9) for _ in row) for row in context.checkpoint.linears)


def places_in_rows(rows: Sequence[Sequence[float]]) -> Tensor:
    """The place of each score in its row, the leftmost of equal scores first."""
    found = []
    for row in rows:
        order = sorted(range(len(row)), key=lambda j: (row[j], j))
        found.append([order.index(j) for j in range(len(row))])
    return torch.tensor(found)


def places_in_groups(rows: Sequence[Sequence[float]], group: int) -> Tensor:
    """The place of each weight in its row, ordered by the sparsity at which its group loses it, then by score."""
    found = []
    for row in rows:
        goes = []
        for start in range(0, len(row), group):
            part = row[start : start + group]
            order = sorted(range(len(part)), key=lambda j: (part[j], j))
            goes += [Fraction(order.index(j) + 1, len(part)) for j in range(len(part))]
        order = sorted(range(len(row)), key=lambda j: (goes[j], row[j], j))
        found.append([order.index(j) for j in range(len(row))])
    return torch.tensor(found)


def naive_prices(
    model: Any,
    context: Session,
    sparsities: LinearSparsities,
    ids: Tensor,
    by_wanda: bool,
    group: int | None = None,
) -> list[list[float]]:
    """By the gradient of a whole pruned copy of the model."""
    checkpoint = context.checkpoint
    all_scores = scores(model, checkpoint, context.items("calibration"), "wanda" if by_wanda else "magnitude")
    pruned, places = copy.deepcopy(model).requires_grad_(True), {}
    for i, linears in enumerate(checkpoint.linears):
        for k, linear in enumerate(linears):
            weight = linear.matrix(pruned.get_parameter(checkpoint.key(i, linear)).data)
            flat, (rows, columns) = all_scores[i][k], weight.shape
            in_rows = [flat[r * columns : (r + 1) * columns] for r in range(rows)]
            places[i, k] = places_in_rows(in_rows) if group is None else places_in_groups(in_rows, group)
            weight[places[i, k] < int(columns * sparsities[i][k])] = 0
    logits = pruned(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    functional.cross_entropy(logits, ids[:, 1:].flatten()).backward()
    found = []
    for i, linears in enumerate(checkpoint.linears):
        found.append([])
        for k, linear in enumerate(linears):
            name = checkpoint.key(i, linear)
            gradient = linear.matrix(pruned.get_parameter(name).grad)
            weight = linear.matrix(model.get_parameter(name).data)
            columns, costs = weight.shape[1], []
            for row in range(weight.shape[0]):
                for j in range(columns):
                    distance = int(places[i, k][row, j]) - int(columns * sparsities[i][k])
                    if abs(distance) < max(1, int(BAND * columns)):
                        costs.append(float(gradient[row, j]) * float(weight[row, j]))
            found[-1].append(-math.fsum(costs) / len(costs))
    return found


def naive_own_prices(
    model: Any, context: Session, sparsities: LinearSparsities, ids: Tensor, group: int | None
) -> list[list[float]]:
    """Prices at SparseGPT's own weights, those of its naive form, 1/16 below and above the nearest 1/32."""
    checkpoint, levels = context.checkpoint, group or 32
    reach = 1 if group else 2
    names = [[checkpoint.key(i, linear) for linear in row] for i, row in enumerate(checkpoint.linears)]
    inputs = naive.inputs_of(
        model, [n.removesuffix(".weight") for row in names for n in row], context.items("calibration")
    )
    pruned, made = copy.deepcopy(model).requires_grad_(True), {}
    for i, linears in enumerate(checkpoint.linears):
        for linear, name, s in zip(linears, names[i], sparsities[i], strict=True):
            weight, at = linear.matrix(model.get_parameter(name).data), round(levels * s)
            for level in {max(0, at - reach), at, min(levels, at + reach)}:
                x = inputs[name.removesuffix(".weight")]
                made[name, level] = naive.sparsegpt(weight, x, level / levels, 0.01, 128, group)[0].float()
            linear.matrix(pruned.get_parameter(name).data).copy_(made[name, at])
    logits = pruned(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    functional.cross_entropy(logits, ids[:, 1:].flatten()).backward()
    found = []
    for i, linears in enumerate(checkpoint.linears):
        found.append([])
        for linear, name, s in zip(linears, names[i], sparsities[i], strict=True):
            at = round(levels * s)
            low, high = max(0, at - reach), min(levels, at + reach)
            moved = made[name, high] - made[name, low]
            gradient = linear.matrix(pruned.get_parameter(name).grad)
            found[-1].append(float((gradient * moved).sum()) / ((high - low) / levels * moved.numel()))
    return found


def close(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> bool:
    size = max(abs(price) for row in theirs for price in row)
    return all(
        one == pytest.approx(other, rel=1e-3, abs=1e-4 * size)
        for row, others in zip(ours, theirs, strict=True)
        for one, other in zip(row, others, strict=True)
    )


@pytest.mark.parametrize("family", few(FAMILIES, FAST))
@pytest.mark.parametrize("group", [None, 5], ids=["unstructured", "mixed:5"])
@pytest.mark.parametrize("by_wanda", [True, False], ids=["wanda", "magnitude"])
def test_prices_are_gradients_of_the_whole_pruned_model(family: str, by_wanda: bool, group: int | None) -> None:
    model = tiny(family)
    context, ids = bench_of(model), random_ids(6, seed=5)
    sparsities = uneven(context)
    ours = pricing_of(context, by_wanda=by_wanda, group=group).prices(sparsities, Sample(ids))
    assert close(ours, naive_prices(model, context, sparsities, ids, by_wanda, group))


@pytest.mark.parametrize("family", few(FAMILIES, FAST))
@pytest.mark.parametrize("group", [None, 8], ids=["unstructured", "mixed:8"])
def test_prices_at_own_weights_are_gradients_of_the_whole_pruned_model(family: str, group: int | None) -> None:
    model = tiny(family)
    context, ids = bench_of(model), random_ids(6, seed=5)
    sparsities = uneven(context)
    levels = own_levels(context, make_pruner("sparsegpt", {"group": group}))
    ours = pricing_at(levels, context).prices(sparsities, Sample(ids))
    assert close(ours, naive_own_prices(model, context, sparsities, ids, group))


def test_own_weights_that_are_masks_have_the_prices_of_masks() -> None:
    """Of 32 weights in each row a level is one weight, so that Wanda's own weights are those of its places."""
    context = bench_of(tiny("llama"))
    sparsities = tuple(tuple(k % 5 / 8 + 0.1 for k in range(len(row))) for row in context.checkpoint.linears)
    levels = own_levels(context, Wanda())
    by_own, by_places = levels, pricing_of(context)._levels
    for index, linears in enumerate(context.checkpoint.linears):
        for linear, s in zip(linears, sparsities[index], strict=True):
            weight = linear.matrix(context.checkpoint.weights(index)[linear.key])
            for level in by_own.around(weight.shape[1], s):
                zeros = int(weight.shape[1] * level / GRID)
                mask = by_places.pruned(index, linear, weight, zeros)
                assert torch.equal(by_own.pruned(index, linear, weight, level), mask)


def test_levels_are_made_once_while_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without room each is made anew, and prices are the same to the last bit."""
    monkeypatch.setattr(gradients, "SHARE", 0)  # blocks run twice
    context, ids, pruner = bench_of(tiny("llama")), random_ids(6, seed=5), make_pruner("sparsegpt")
    made, prune = list[float](), type(pruner).prune
    monkeypatch.setattr(type(pruner), "prune", lambda *words: made.append(words[2]) or prune(*words))
    linears = sum(map(len, context.checkpoint.linears))
    found, counts, held = [], [], []
    for room in (1 << 30, 20_000, 0):
        levels = own_levels(context, pruner, room)
        pricing = pricing_at(levels, context)
        found += [pricing.prices(uneven(context), Sample(ids)), pricing.prices(uneven(context), Sample(ids))]
        counts.append(len(made))
        held.append(sum(each.nbytes for each in levels._kept.values()))
        made.clear()
    assert all(each == found[0] for each in found)
    assert counts[0] == 3 * linears < counts[1] < counts[2] == 8 * linears
    assert held[0] > 20_000 >= held[1] > held[2] == 0


def test_the_descent_of_a_pattern_is_by_its_own_order(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups lose weights in another order than whole rows, so the descent has other prices, and a key of its own."""
    monkeypatch.setattr(gradient, "STEPS", 2)
    found = []
    for pattern in ("unstructured", "mixed:8"):
        context = bench_of(tiny("llama").requires_grad_(False), PruneConfig(pattern=pattern))
        for pruner in ("wanda", "magnitude"):
            found.append(context.budget(0.5).require_dense_metrics("").priced_sparsities(0.5, pruner))
    assert len(set(found)) == len(list((cache / "gradient").glob("*.json"))) == 4


@pytest.mark.parametrize("family", few(MIXTURES, ("mixtral",)))
def test_prices_of_experts(family: str) -> None:
    """By the gradient of the parameters that hold all experts of a block; one without tokens costs nothing."""
    model = tiny(family)
    context, ids = bench_of(model), random_ids(6, seed=5)
    checkpoint, sparsities = context.checkpoint, uneven(context)
    ours = pricing_of(context, by_wanda=False).prices(sparsities, Sample(ids))
    pruned = copy.deepcopy(model).requires_grad_(True)
    for i, linears in enumerate(checkpoint.linears):
        for linear, s in zip(linears, sparsities[i], strict=True):
            weight = linear.matrix(pruned.get_parameter(checkpoint.key(i, linear)).data)
            weight[ranks(weight.abs()) < int(weight.shape[1] * s)] = 0
    logits = pruned(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    functional.cross_entropy(logits, ids[:, 1:].flatten()).backward()
    theirs = []
    for i, linears in enumerate(checkpoint.linears):
        theirs.append([])
        for linear, s in zip(linears, sparsities[i], strict=True):
            name = checkpoint.key(i, linear)
            weight = linear.matrix(model.get_parameter(name).data)
            grad = pruned.get_parameter(name).grad
            gradient = torch.zeros_like(weight) if grad is None else linear.matrix(grad)
            columns = weight.shape[1]
            band = (ranks(weight.abs()).int() - int(columns * s)).abs() < max(1, int(BAND * columns))
            theirs[-1].append(-float((gradient * weight)[band].mean()))
    assert close(ours, theirs)


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_nothing_and_everything_pruned(sparsity: float) -> None:
    context = bench_of(tiny("llama"))
    everywhere = tuple((sparsity,) * len(row) for row in context.checkpoint.linears)
    found = pricing_of(context).prices(everywhere, Sample(random_ids(4)))
    assert all(math.isfinite(price) for row in found for price in row)


@pytest.mark.slow
def test_a_streamed_model_has_the_same_prices() -> None:
    found = []
    for offload in ("none", "cpu"):
        context, ids = bench_of(tiny("llama"), offload=offload), random_ids(6, seed=5)
        levels = own_levels(context, make_pruner("sparsegpt"))
        each = pricing_of(context), pricing_of(context, group=8), pricing_at(levels, context)
        found.append([pricing.prices(uneven(context), Sample(ids)) for pricing in each])
    assert found[0] == found[1]


@pytest.mark.slow
def test_the_batch_size_changes_nothing_but_rounding() -> None:
    context, ids = bench_of(tiny("llama")), random_ids(6, seed=5)
    one, other = (pricing_of(context, windows).prices(uneven(context), Sample(ids)) for windows in (1, 8))
    assert close(one, other) and one == pricing_of(context, 1).prices(uneven(context), Sample(ids))


@pytest.mark.slow
@pytest.mark.parametrize("when", [0, 2], ids=["at once", "at the third block"])
def test_out_of_memory_is_retried_with_half_the_windows(when: int) -> None:
    """Blocks before keep graphs of other batches, which then go, and are computed again."""
    context, ids = bench_of(tiny("llama")), random_ids(8, seed=5)
    pricing, failures, ran = pricing_of(context, 8), [1, 1], list[int]()
    of_blocks = pricing._gradients
    expected, run = pricing_of(context, 8).prices(uneven(context), Sample(ids)), of_blocks.replay.run

    def short(index: int, weights: Any, hidden: Tensor) -> Tensor:
        if len(hidden) > 4 and torch.is_grad_enabled() and failures and index >= when:
            failures.pop()
            raise torch.OutOfMemoryError
        ran.append(index)
        return run(index, weights, hidden)

    of_blocks.replay.run = short  # type: ignore[method-assign]
    assert close(pricing.prices(uneven(context), Sample(ids)), expected)
    assert of_blocks.batch.windows == 4
    after, again = range(when, len(context.checkpoint.blocks)), reversed(range(when))
    assert ran == [*range(when), *(index for index in (*after, *again) for _ in range(2))]


@pytest.mark.parametrize("family", few(FAMILIES, FAST))
@pytest.mark.parametrize(("windows", "some"), [(8, 1), (1, 7)])
def test_blocks_that_keep_their_graph_run_once_with_the_same_prices(
    family: str, windows: int, some: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, with room for all batches, for some and a half, and for none."""
    context, ids, sizes, found = bench_of(tiny(family)), random_ids(6, seed=5), list[int](), []
    made, measured, batches = KeptRuns, gradients.graph_bytes, len(context.checkpoint.blocks) * -(-6 // windows)
    monkeypatch.setattr(gradients, "graph_bytes", lambda result: sizes.append(measured(result)) or sizes[-1])
    for room_for, expected in ((batches + 1, batches), (some + 0.5, 2 * batches - some), (0, 2 * batches)):
        pricing, ran = pricing_of(context, windows), list[int]()
        replay, room = pricing._gradients.replay, int(room_for * max(sizes, default=1 << 20))
        monkeypatch.setattr(gradients, "KeptRuns", lambda _, room=room: made(room))
        monkeypatch.setattr(replay, "run", lambda *each, ran=ran, run=replay.run: ran.append(1) or run(*each))
        found.append(pricing.prices(uneven(context), Sample(ids)))
        assert len(ran) == expected
    assert found[0] == found[1] == found[2]


def test_what_is_larger_than_the_room_is_not_kept() -> None:
    kept, states = KeptRuns(100), torch.ones(2, 8, requires_grad=True)
    assert kept.has_room
    kept.add(0, 0, Run(states, {}, states.exp().exp()))  # 128 bytes
    assert not kept.has_room and kept.pop(0, 0, 2) is None


def test_a_graph_has_the_bytes_of_what_its_gradients_need() -> None:
    """Each tensor once: input and weight of a product, the result of exp, both factors of a square."""
    x, weight = torch.randn(4, 8).requires_grad_(), torch.randn(16, 8).requires_grad_()
    y = (x @ weight.T).exp()
    assert gradients.graph_bytes(y) == 4 * (4 * 8 + 16 * 8 + 4 * 16)
    assert gradients.graph_bytes(y.square().sum() + y.sum()) == gradients.graph_bytes(y)
    assert gradients.graph_bytes(x + 1) == 0


@pytest.mark.parametrize(("room_for", "expected"), [(4 * 300, 3), (2 * 300, 3.5), (0, 4)])
def test_passes_are_counted_by_the_room_for_graphs(
    room_for: int, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """300 tokens in 4 blocks, whose linears have inputs and outputs of `block_bytes`; blocks on the disk keep none."""
    checkpoint = bench_of(tiny("llama")).checkpoint
    free = room_for * block_bytes(checkpoint) / gradients.SHARE
    monkeypatch.setattr(gradients, "free_memory", lambda device: free)
    assert gradients.passes(checkpoint, 300) == pytest.approx(expected, abs=1e-3)
    monkeypatch.setattr(checkpoint, "offload", "disk")
    assert gradients.passes(checkpoint, 300) == 4


@pytest.mark.slow
def test_a_plan_counts_a_pass_more_where_blocks_are_on_the_disk(place: Path, command: CommandLine) -> None:
    """The tiny model's blocks keep all in memory."""
    words = ("--study", place / "tiny.toml", *settings('allocation=["gradient-rows"]'), "--json")
    tokens = [
        json.loads(command("plan", *words, *settings(f'model.offload="{offload}"')).out)["whole"]["tokens"]
        for offload in ("none", "disk")
    ]
    assert tokens[1] - tokens[0] == gradient.STEPS * 2048


def test_nothing_of_the_model_changes() -> None:
    model = tiny("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    context = bench_of(model)
    pricing_of(context).prices(uneven(context), Sample(random_ids(6)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


# The descent


def naive_descent(linears: Sequence[Sequence[Shape]], targets: Sequence[float], drawn: Any) -> list[list[float]]:
    """The formula of the docstring, step by step; the level is found by halving. Sparsities at each target."""
    sizes = [shape.rows * shape.columns for row in linears for shape in row]
    total, given, ends = sum(sizes), iter(drawn), []
    s, v = [targets[0]] * len(sizes), [0.0] * len(sizes)

    def levelled(wanted: list[float], target: float) -> list[float]:
        low, high = -2.0, 2.0
        for _ in range(100):
            shift = (low + high) / 2
            found = [min(0.98, max(0.02, x + shift)) for x in wanted]
            if math.fsum(n * x for n, x in zip(sizes, found, strict=True)) < target * total:
                low = shift
            else:
                high = shift
        return found

    if len(targets) == 1:
        steps = [(targets[0], t) for t in range(20)]
    else:
        further = [(target, t) for target in targets[1:] for t in range(12, 20)]
        steps = [*((targets[0], t) for t in range(16, 20)), *further]
    for target, t in steps:
        if t == 12 and target != targets[0]:
            s = levelled(s, target)
        p = next(given)
        v = [0.7 * old + 0.3 * new for old, new in zip(v, p, strict=True)]
        mean = math.fsum(n * x for n, x in zip(sizes, v, strict=True)) / total
        rms = math.sqrt(math.fsum(n * (x - mean) ** 2 for n, x in zip(sizes, v, strict=True)) / total)
        u = [max(-3, min(3, (x - mean) / rms)) if rms else 0.0 for x in v]
        s = levelled([a - (0.03 * (1 - t / 20) + 0.003) * b for a, b in zip(s, u, strict=True)], target)
        if t == 19:
            ends.append(s)
    return ends


@pytest.mark.parametrize("further", [(), (0.08,), (0.1, 0.15)], ids=["one target", "two", "three"])
@pytest.mark.parametrize("budget", few(budgets()[:20], budgets()[:1]), ids=lambda budget: f"{budget.target:.3f}")
def test_the_descent_follows_its_formula(budget: Budget, further: tuple[float, ...]) -> None:
    draw = random.Random(1)
    count = sum(map(len, budget.linears))
    targets = [budget.target, *(budget.target + more for more in further if budget.target + more < 0.97)]
    steps = gradient.steps_along(targets)
    drawn = [[draw.gauss(0, 1) * (1 + 9 * (k % 7 == 0)) for k in range(count)] for _ in range(steps)]
    seen: list[LinearSparsities] = []

    def prices_at(step: int, sparsities: LinearSparsities) -> list[list[float]]:
        seen.append(sparsities)
        flat = iter(drawn[step])
        return [[next(flat) for _ in row] for row in budget.linears]

    ends = list(gradient.descend(budget.linears, targets, prices_at))
    assert len(seen) == steps and {s for row in seen[0] for s in row} == {budget.target}
    for end, expected in zip(ends, naive_descent(budget.linears, targets, drawn), strict=True):
        assert [s for row in end for s in row] == pytest.approx(expected, abs=1e-9)
    lowest = seen[: 20 if len(targets) == 1 else 4]
    for row, target in [*((row, targets[0]) for row in lowest), *zip(ends, targets, strict=True)]:
        assert budget.mean(budget.block_means(row)) == pytest.approx(target, abs=1e-12)


def test_equal_prices_are_uniform_and_a_dear_linear_stays_denser() -> None:
    [budget] = budgets()[1:2]
    [equal] = gradient.descend(budget.linears, [budget.target], lambda *_: [[2.0] * len(row) for row in budget.linears])
    assert {s for row in equal for s in row} == {budget.target}
    dear = [[float(i == k == 0) for k in range(len(row))] for i, row in enumerate(budget.linears)]
    [found] = gradient.descend(budget.linears, [budget.target], lambda *_: dear)
    rest = [s for row in found for s in row][1:]
    assert found[0][0] < budget.target < min(rest)


@pytest.mark.parametrize("target", [0.0, 0.005, 0.995, 1.0])
def test_targets_at_the_ends(target: float) -> None:
    budget = Budget(target, budgets()[1].sizes, budgets()[1].linears)
    drawn = [[float(i + k) for k in range(len(row))] for i, row in enumerate(budget.linears)]
    [found] = gradient.descend(budget.linears, [target], lambda *_: drawn)
    assert budget.mean(budget.block_means(found)) == pytest.approx(target, abs=1e-9)
    assert all(0 <= s <= 1 for row in found for s in row)


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ((0.2, 0.7), (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)),
        ((0.3, 0.55), (0.3, 0.3 + 0.25 / 3, 0.3 + 0.5 / 3, 0.55)),
        ((0.5, 0.52), (0.5, 0.52)),
    ],
)
def test_a_path_has_equal_distances_of_at_most_a_tenth(
    interval: tuple[float, float], expected: tuple[float, ...]
) -> None:
    assert gradient.path(*interval) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("target", "expected"), [(0.3, 0.1), (0.35, 0.2), (0.4, 0.3), (0.41, 0.34), (0.5, 0.7), (0.5 + 1e-12, 0.7)]
)
def test_between_the_targets_of_a_path_it_is_linear(target: float, expected: float) -> None:
    ends = [RowSparsities(linears) for linears in (((0.1, 1.0),), ((0.3, 0.5),), ((0.7, 0.0),))]
    assert gradient.between((0.3, 0.4, 0.5), ends, target).linears[0][0] == pytest.approx(expected)
    assert gradient.between((0.4,), ends[:1], 0.4) == ends[0]


class Known:
    """Dense metrics with a given end of the descent."""

    def __init__(self, found: LinearSparsities) -> None:
        self._found = found

    def priced_sparsities(self, target: float, pruner: str) -> LinearSparsities:
        return self._found


def test_kappa_is_the_distance_from_uniform() -> None:
    linears = ((Shape(4, 4, True), Shape(8, 4, False)),)
    end = ((0.2, 0.8),)
    budget = Budget(0.6, (48,), linears, Known(end))  # type: ignore[arg-type]
    assert gradient.by_linear.sparsities(budget, 0.0) == (0.6,)
    assert gradient.by_linear.sparsities(budget, 1.0)[0] == pytest.approx((0.2, 0.8))  # type: ignore[comparison-overlap]
    assert gradient.by_linear.sparsities(budget, 0.5)[0] == pytest.approx((0.4, 0.7))  # type: ignore[comparison-overlap]
    far = gradient.by_linear.sparsities(budget, 1.5)
    assert far[0] == pytest.approx((0.0, 0.9))  # type: ignore[comparison-overlap]
    with pytest.raises(ValueError, match=r"κ = 1\.6 is outside"):
        gradient.by_linear.sparsities(budget, 1.6)
    with pytest.raises(ValueError, match="needs a model"):
        gradient.by_linear.sparsities(Budget(0.6, (48,), linears), 1.0)


# A study


STUDY = settings('allocation=["gradient"]', "search.trials=4")


@pytest.mark.slow
def test_a_study_descends_once(place: Path, command: CommandLine, cache: Path) -> None:
    answer = command("--study", place / "tiny.toml", *STUDY)
    assert (answer.code, answer.err) == (0, "")
    study = stored(place)
    kappas = [trial.params.get("kappa") for trial in study.trials]
    assert kappas[:3] == [0.0, 1.0, 0.6] and len(kappas) == 4
    [file] = (cache / "gradient").glob("*.json")
    [found] = json.loads(file.read_text())
    rows = linears_of(Plan.model_validate(study.trials[1].user_attrs["plan"])) or ()
    assert [row == pytest.approx(other) for row, other in zip(found, rows, strict=True)] == [True] * len(rows)
    assert "gradient (κ = " in answer.out
    written = file.stat().st_mtime_ns
    again = command("--study", place / "tiny.toml", "--study-name", "again", *STUDY)
    assert again.code == 0 and file.stat().st_mtime_ns == written
    assert [t.values for t in stored(place, "again").trials] == [t.values for t in study.trials]
    best = read_config(place / "tiny.best.json")
    assert best.plan.allocation in ("gradient", "uniform")
    once = command("prune", "--study", place / "tiny.toml", "--allocation", "gradient", "--parameter", "κ=1")
    assert once.code == 0 and "gradient κ=1" in once.out
    assert command("prune", "--study", place / "tiny.toml", "--allocation", "gradient").out == once.out  # its default


@pytest.mark.slow
def test_a_study_by_own_weights(place: Path, command: CommandLine, cache: Path) -> None:
    """SparseGPT descends by what it makes, Wanda by its masks; refined, both by what they make."""
    wishes = (*STUDY, *settings('prune.pruners=["wanda", "sparsegpt"]', "prune.gradient_at=own", "search.trials=8"))
    answer = command("--study", place / "tiny.toml", *wishes)
    assert (answer.code, answer.err) == (0, "")
    trials = [trial for trial in stored(place).trials if trial.params.get("kappa") == 1.0]
    found = {trial.params["pruner"]: linears_of(Plan.model_validate(trial.user_attrs["plan"])) for trial in trials}
    assert found["wanda"] != found["sparsegpt"] and len(list((cache / "gradient").glob("*.json"))) == 2
    words = ("prune", "--study", place / "tiny.toml", "--allocation", "gradient")
    assert command(*words, "--pruner", "wanda", *settings("prune.refine=2", "prune.gradient_at=own")).code == 0
    assert len(list((cache / "gradient").glob("*.json"))) == 3
    other = command("--study", place / "tiny.toml", *STUDY, *settings('prune.pruners=["wanda", "sparsegpt"]'))
    assert other.code == 2 and "prune.gradient_at" in other.err


@pytest.mark.slow
def test_own_prices_without_effect_are_said(place: Path, command: CommandLine) -> None:
    words = ("--study", place / "tiny.toml", *settings("prune.gradient_at=own", "search.trials=1"))
    assert 'prune.gradient_at = "own" changes nothing without an allocation by the gradient' in command(*words).out
    masks = command("plan", *words[:-2], *settings('allocation=["gradient"]', 'prune.pruners=["wanda"]'))
    assert 'prune.gradient_at = "own" changes nothing: these pruners make masks alone' in masks.out + masks.err


@pytest.mark.slow
def test_an_interval_has_one_descent(place: Path, command: CommandLine, cache: Path) -> None:
    wishes = settings('allocation=["gradient"]', "sparsity=[0.3, 0.45]", "search.trials=6")
    answer = command("--study", place / "tiny.toml", *wishes)
    assert (answer.code, answer.err) == (0, "")
    [file] = (cache / "gradient").glob("*.json")
    ends = [RowSparsities(end) for end in json.loads(file.read_text())]
    assert len(ends) == 3
    trials = [trial for trial in stored(place).trials if trial.params.get("kappa")]
    assert len({trial.params["sparsity"] for trial in trials}) > 1
    compared = 0
    for trial in trials:
        target, kappa = trial.params["sparsity"], gradient.FARTHEST * trial.params["kappa"]
        end = gradient.between(gradient.path(0.3, 0.45), ends, target).linears
        kept = [s for row in linears_of(Plan.model_validate(trial.user_attrs["plan"])) or () for s in row]
        wanted = [target + kappa * (s - target) for row in end for s in row]
        if min(wanted) >= 0 and max(wanted) <= 1:
            assert kept == pytest.approx(wanted)
            compared += 1
    assert compared


@pytest.mark.slow
def test_a_study_with_a_pattern(place: Path, command: CommandLine) -> None:
    wishes = settings('allocation=["gradient"]', "prune.pattern=mixed:8", "sparsity=0.5", "search.trials=4")
    answer = command("--study", place / "tiny.toml", *wishes)
    assert (answer.code, answer.err) == (0, "")
    different = set()
    for trial in [trial for trial in stored(place).trials if trial.params.get("kappa")]:
        kept = {s for row in linears_of(Plan.model_validate(trial.user_attrs["plan"])) or () for s in row}
        assert all((8 * s).is_integer() for s in kept)
        different |= kept
        assert trial.user_attrs["realised"] == pytest.approx(0.5, abs=0.01)
    assert len(different) > 1
    fixed = command("--study", place / "tiny.toml", *wishes, "--set", "prune.pattern=2:4", "--study-name", "fixed")
    assert fixed.code == 2 and "2:4 makes 0.5 zeros in every block; set sparsity = 0.5 and allocation =" in fixed.err


@pytest.mark.slow
def test_the_sparsest_plan_by_prices(place: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient, "FURTHER", 2)
    words = ("--max-increase", "50%", "--sparsity", "20%..60%", "--allocation", "gradient", "--device", "cpu")
    monkeypatch.chdir(place)
    more = ("--texts", place / "long.txt", "--name", "limited", *settings("continuations.tokens=0"))
    answer = command(place / "model", *words, *more)
    assert answer.code == 0, answer.err
    best = read_config(place / "studies" / "limited.best.json")
    assert best.plan.allocation == "gradient"
    assert best.plan.by_linear


@pytest.mark.slow
def test_a_plan_counts_the_descent(place: Path, command: CommandLine) -> None:
    found = [
        json.loads(command("plan", "--study", place / "tiny.toml", *settings(f"allocation=[{names}]"), "--json").out)
        for names in ('"owl"', '"owl", "gradient"')
    ]
    assert found[1]["whole"]["tokens"] - found[0]["whole"]["tokens"] >= 3 * gradient.STEPS * 2048
    assert found[0]["whole"]["descents"] is None
    assert 0 < found[1]["whole"]["descents"] < found[1]["whole"]["seconds"]
    words = settings('allocation=["gradient"]', "recover={}")
    text = command("plan", "--study", place / "tiny.toml", *words).out
    assert re.search(r", about .*, of which .* for the gradient and .* to train the best plan\n", text)


@pytest.mark.slow
def test_a_plan_counts_what_a_pruner_makes_for_its_own_prices(
    place: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecast, "LEVELS", 10**9)
    words = ("plan", "--study", place / "tiny.toml", "--json")
    wishes = settings('allocation=["gradient"]', 'prune.pruners=["sparsegpt"]')
    found = [json.loads(command(*words, *wishes, *settings(f"prune.gradient_at={by}")).out) for by in ("wanda", "own")]
    wanda, own = (each["whole"] for each in found)
    assert own["tokens"] > wanda["tokens"]  # the Hessians of the dense model
    assert own["seconds"] > 10**8 * found[1]["trial"][0]["seconds"]["prune"] > wanda["seconds"]


def test_of_several_workers_one_descends(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait for its end, and say so."""
    begun, said, made = threading.Event(), list[str](), list[int]()

    def descend(self: descents.Descent, targets: Sequence[float], place: Path) -> list[LinearSparsities]:
        made.append(1)
        begun.set()
        while not said:
            time.sleep(0.001)
        return [((0.25, 0.75),)]

    monkeypatch.setattr(descents.Descent, "_descend", descend)
    monkeypatch.setattr(CalibrationGradients, "_key", lambda *_, **__: "ab" * 32)
    gradients = CalibrationGradients.__new__(CalibrationGradients)
    gradients.watch = lambda event: said.append(event.text)
    workers = [descents.Descent(gradients, lambda: pytest.fail("is not asked"), []) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(workers[0].ends, [0.5], "")
        assert begun.wait(60)
        second = pool.submit(workers[1].ends, [0.5], "")
        assert first.result() == second.result() == (RowSparsities(((0.25, 0.75),)),)
    lock = cache / "gradient" / f".{'ab' * 32}.json.lock"
    waited = "waiting for the descent of another process; if none is running, remove"
    assert (made, said) == ([1], [f"{waited} {lock}"])


def test_steps_along_a_path_take_half_as_many_windows() -> None:
    path = (0.2, 0.3, 0.4)
    assert [descents.windows_of_step(length, (0.5,)) for length in (128, 512, 2048)] == [16, 4, 4]
    for fewer in (path, (0.4,)):
        assert [descents.windows_of_step(length, fewer) for length in (128, 512, 2048)] == [8, 2, 2]
