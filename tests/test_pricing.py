"""Prices against gradients of the whole model, and the descent by them against its formula in loops."""

import copy
import json
import math
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import naive
import pytest
import torch
from expect import parametrize, slow
from families import CPU, FAMILIES, MIXTURES, bench_of, few, random_ids, tiny
from naive_allocations import scores
from plans import linears_of
from test_curve import budgets
from tinystudy import CommandLine, settings, stored
from torch import Tensor
from torch.nn import functional

from atp_tune.allocations import Budget, LinearSparsities, Shape, gradient
from atp_tune.allocations.budget import weighted_mean
from atp_tune.allocations.rows import RowSparsities
from atp_tune.blocks import gradients
from atp_tune.blocks.gradients import (
    BAND,
    BlockGradients,
    ByPlaces,
    ByPruner,
    KeptRuns,
    Levels,
    Pricing,
    Sample,
)
from atp_tune.blocks.replay import AutoBatch, block_bytes
from atp_tune.checkpoints.blocks import Linear
from atp_tune.config.best import read_config
from atp_tune.plan import Plan
from atp_tune.pruners import Pruner, make_pruner
from atp_tune.pruners.selection import order_in_rows
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


def whole_gradients(
    model: Any, context: Session, ids: Tensor, zeroed: Callable[[int, int, Tensor], Tensor], loss: Any = None
) -> list[list[tuple[Tensor, Tensor]]]:
    """Weights of each linear, and gradients by them of a whole copy of the model, of which a part is zeroed.

    The loss is the cross-entropy, or of the logits.
    """
    checkpoint, pruned = context.checkpoint, copy.deepcopy(model).requires_grad_(True)
    names = [[(linear, checkpoint.key(i, linear)) for linear in row] for i, row in enumerate(checkpoint.linears)]
    for i, row in enumerate(names):
        for k, (linear, name) in enumerate(row):
            weight = linear.matrix(pruned.get_parameter(name).data)
            weight[zeroed(i, k, weight)] = 0
    logits = pruned(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    (loss(logits) if loss else functional.cross_entropy(logits, ids[:, 1:].flatten())).backward()
    found = []
    for row in names:
        found.append([])
        for linear, name in row:
            weight, gradient = linear.matrix(model.get_parameter(name).data), pruned.get_parameter(name).grad
            found[-1].append((weight, torch.zeros_like(weight) if gradient is None else linear.matrix(gradient)))
    return found


def naive_prices(
    model: Any, context: Session, sparsities: LinearSparsities, ids: Tensor, by_wanda: bool, group: int | None = None
) -> list[list[float]]:
    """By the gradient of a whole pruned copy of the model; an expert without tokens costs nothing."""
    all_scores = scores(model, context.checkpoint, context.items("calibration"), "wanda") if by_wanda else None
    places = {}

    def zeroed(i: int, k: int, weight: Tensor) -> Tensor:
        flat, (rows, columns) = all_scores[i][k] if all_scores else weight.abs().flatten().tolist(), weight.shape
        in_rows = [flat[r * columns : (r + 1) * columns] for r in range(rows)]
        places[i, k] = places_in_rows(in_rows) if group is None else places_in_groups(in_rows, group)
        return places[i, k] < int(columns * sparsities[i][k])

    found: list[list[float]] = []
    for i, row in enumerate(whole_gradients(model, context, ids, zeroed)):
        found.append([])
        for k, (weight, slopes) in enumerate(row):
            columns, costs = weight.shape[1], []
            for r in range(weight.shape[0]):
                for j in range(columns):
                    distance = int(places[i, k][r, j]) - int(columns * sparsities[i][k])
                    if abs(distance) < max(1, int(BAND * columns)):
                        costs.append(float(slopes[r, j]) * float(weight[r, j]))
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


@parametrize("family", few(FAMILIES, FAST))
@parametrize("group", [None, 5], ids=["unstructured", "mixed:5"])
@parametrize("by_wanda", [True, False], ids=["wanda", "magnitude"])
def test_prices_are_gradients_of_the_whole_pruned_model(family: str, by_wanda: bool, group: int | None) -> None:
    model = tiny(family)
    context, ids = bench_of(model), random_ids(6, seed=5)
    sparsities = uneven(context)
    ours = pricing_of(context, by_wanda=by_wanda, group=group).prices(sparsities, Sample(ids))
    assert close(ours, naive_prices(model, context, sparsities, ids, by_wanda, group))


@parametrize("family", few(FAMILIES, FAST))
@parametrize("group", [None, 8], ids=["unstructured", "mixed:8"])
def test_prices_at_own_weights_are_gradients_of_the_whole_pruned_model(family: str, group: int | None) -> None:
    model = tiny(family)
    context, ids = bench_of(model), random_ids(6, seed=5)
    sparsities = uneven(context)
    levels = own_levels(context, make_pruner("sparsegpt", {"group": group}))
    ours = pricing_at(levels, context).prices(sparsities, Sample(ids))
    assert close(ours, naive_own_prices(model, context, sparsities, ids, group))


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


@parametrize("family", few(MIXTURES, ("mixtral",)))
def test_prices_of_experts(family: str) -> None:
    """By the gradient of the parameters that hold all experts of a block."""
    model = tiny(family)
    context, ids = bench_of(model), random_ids(6, seed=5)
    sparsities = uneven(context)
    ours = pricing_of(context, by_wanda=False).prices(sparsities, Sample(ids))
    assert close(ours, naive_prices(model, context, sparsities, ids, by_wanda=False))


@slow
@parametrize("when", [0, 2], ids=["at once", "at the third block"])
def test_out_of_memory_is_retried_with_half_the_windows(when: int) -> None:
    """Blocks before keep graphs of other batches, which then go, and are computed again."""
    context, ids = bench_of(tiny("llama")), random_ids(8, seed=5)
    pricing, failures, ran = pricing_of(context, 8), [1, 1], list[int]()
    of_blocks = pricing.gradients
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


@parametrize("family", few(FAMILIES, FAST))
@parametrize(("windows", "some"), [(8, 1), (1, 7)])
def test_blocks_that_keep_their_graph_run_once_with_the_same_prices(
    family: str, windows: int, some: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, with room for all batches, for some and a half, and for none."""
    context, ids, sizes, found = bench_of(tiny(family)), random_ids(6, seed=5), list[int](), []
    made, measured, batches = KeptRuns, gradients.graph_bytes, len(context.checkpoint.blocks) * -(-6 // windows)
    monkeypatch.setattr(gradients, "graph_bytes", lambda result: sizes.append(measured(result)) or sizes[-1])
    for room_for, expected in ((batches + 1, batches), (some + 0.5, 2 * batches - some), (0, 2 * batches)):
        pricing, ran = pricing_of(context, windows), list[int]()
        replay, room = pricing.gradients.replay, int(room_for * max(sizes, default=1 << 20))
        monkeypatch.setattr(gradients, "KeptRuns", lambda _, room=room: made(room))
        monkeypatch.setattr(replay, "run", lambda *each, ran=ran, run=replay.run: ran.append(1) or run(*each))
        found.append(pricing.prices(uneven(context), Sample(ids)))
        assert len(ran) == expected
    assert found[0] == found[1] == found[2]


def test_a_graph_has_the_bytes_of_what_its_gradients_need() -> None:
    """Each tensor once: input and weight of a product, the result of exp, both factors of a square."""
    x, weight = torch.randn(4, 8).requires_grad_(), torch.randn(16, 8).requires_grad_()
    y = (x @ weight.T).exp()
    assert gradients.graph_bytes(y) == 4 * (4 * 8 + 16 * 8 + 4 * 16)
    assert gradients.graph_bytes(y.square().sum() + y.sum()) == gradients.graph_bytes(y)
    assert gradients.graph_bytes(x + 1) == 0


@parametrize(("room_for", "expected"), [(4 * 300, 3), (2 * 300, 3.5), (0, 4)])
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


@parametrize("further", [(), (0.08,), (0.1, 0.15)], ids=["one target", "two", "three"])
@parametrize("budget", few(budgets()[:20], budgets()[:1]), ids=lambda budget: f"{budget.target:.3f}")
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
        assert budget.mean(tuple(map(weighted_mean, row, budget.linear_sizes))) == pytest.approx(target, abs=1e-12)


@parametrize(
    ("target", "expected"), [(0.3, 0.1), (0.35, 0.2), (0.4, 0.3), (0.41, 0.34), (0.5, 0.7), (0.5 + 1e-12, 0.7)]
)
def test_between_the_targets_of_a_path_it_is_linear(target: float, expected: float) -> None:
    ends = [RowSparsities(linears) for linears in (((0.1, 1.0),), ((0.3, 0.5),), ((0.7, 0.0),))]
    assert gradient.between((0.3, 0.4, 0.5), ends, target).linears[0][0] == pytest.approx(expected)
    assert gradient.between((0.4,), ends[:1], 0.4) == ends[0]


# A study


STUDY = settings('allocation=["gradient"]', "search.trials=4")


@slow
def test_a_study_descends_once(place: Path, command: CommandLine, cache: Path) -> None:
    answer = command("--study", place / "tiny.toml", *STUDY)
    assert answer.is_clean
    study = stored(place)
    kappas = [trial.params.get("kappa") for trial in study.trials]
    assert kappas[:3] == [0.0, 1.0, 0.6] and len(kappas) == 4
    [file] = (cache / "gradient").glob("*.json")
    [found] = json.loads(file.read_text())
    rows = linears_of(Plan.model_validate(study.trials[1].user_attrs["plan"])) or ()
    assert [row == pytest.approx(other) for row, other in zip(found, rows, strict=True)] == [True] * len(rows)
    assert "gradient (κ = " in answer.out
    written = file.stat().st_mtime_ns
    command.ok("--study", place / "tiny.toml", "--study-name", "again", *STUDY)
    assert file.stat().st_mtime_ns == written
    assert [t.values for t in stored(place, "again").trials] == [t.values for t in study.trials]
    assert read_config(place / "tiny.best.json").plan.allocation in ("gradient", "uniform")
    once = command.ok("prune", "--study", place / "tiny.toml", "--allocation", "gradient", "--parameter", "κ=1")
    assert "gradient κ=1" in once.out
    assert command("prune", "--study", place / "tiny.toml", "--allocation", "gradient").out == once.out  # its default


@slow
def test_an_interval_has_one_descent(place: Path, command: CommandLine, cache: Path) -> None:
    wishes = settings('allocation=["gradient"]', "sparsity=[0.3, 0.45]", "search.trials=6")
    assert command("--study", place / "tiny.toml", *wishes).is_clean
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
