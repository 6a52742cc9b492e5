"""The plug-ins of examples/plugins, each against a literal form, and all of them in one study."""

import math
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import naive_allocations
import pytest
import torch
from expect import parametrize, slow
from families import bench_of, random_ids, tiny
from optuna.trial import TrialState
from plugging import loaded
from tinystudy import CommandLine, script, settings, stored
from torch import Tensor

from atp_tune.allocations import ALLOCATIONS, Budget
from atp_tune.pruners import make_pruner
from atp_tune.pruners.statistics import Hessian, InputNorms

EXAMPLES = Path(__file__).parents[1] / "examples" / "plugins"
SHAPES = [(1, 1), (1, 23), (19, 1), (11, 17), (3, 130)]  # [out, in], hardly ever a multiple of anything
SPARSITIES = [0.0, 0.1, 0.29, 0.5, 0.999, 1.0]
IDS = random_ids(5)  # the calibration windows of a tiny bench


def example(name: str, kind: str) -> ModuleType:
    return loaded(kind, f"{name}.py:{name.upper()}", EXAMPLES)


def problem(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A weight [out, in] and its inputs, of which every seventh is dead; so is the last row of the weight."""
    generator = torch.Generator().manual_seed(1000 * shape[0] + shape[1])
    weight, x = (torch.randn(size, generator=generator) for size in (shape, (11, shape[1])))
    x[:, 3::7] = 0
    if shape[0] > 1:
        weight[-1] = 0
    return weight, x


def heard(kind: Any, x: Tensor) -> Any:
    found = kind(x.shape[1], torch.device("cpu"))
    found.add(x)
    return found


# RIA


def ria_scores(weight: Tensor, x: Tensor, power: float) -> list[list[float]]:
    rows = weight.double().abs().tolist()
    norms = [math.sqrt(math.fsum(v * v for v in column)) for column in x.double().T.tolist()]
    columns = list(zip(*rows, strict=True))

    def share(value: float, total: float) -> float:
        return value / total if total else 0.0

    return [
        [
            (share(w, math.fsum(row)) + share(w, math.fsum(columns[j]))) * norms[j] ** power
            for j, w in enumerate(row)
        ]
        for row in rows
    ]  # fmt: skip


@parametrize("group", [None, 4])
@parametrize("power", [0.5, 0.0, 1.3])
@parametrize("shape", SHAPES)
def test_ria_keeps_the_highest_scores_of_each_row(shape: tuple[int, int], power: float, group: int | None) -> None:
    example("ria", "pruner")
    weight, x = problem(shape)
    scores = ria_scores(weight, x, power)
    for sparsity in SPARSITIES:
        pruned = make_pruner("ria", {"power": power, "group": group}).prune(weight, sparsity, heard(InputNorms, x))
        assert torch.equal(pruned[pruned != 0], weight[pruned != 0])
        width = group or shape[1]
        for row, own in enumerate(scores):
            for start in range(0, shape[1], width):
                check_lowest(
                    own[start : start + width], weight[row, start:][:width], pruned[row, start:][:width], sparsity
                )


def check_lowest(scores: list[float], weight: Tensor, pruned: Tensor, sparsity: float) -> None:
    """As many weights as are due are gone, and none of a higher score than one that is kept, but for rounding."""
    count = int(len(scores) * sparsity + 1e-9)
    gone = [j for j in range(len(scores)) if pruned[j] == 0 and weight[j] != 0]
    kept = [j for j in range(len(scores)) if pruned[j] != 0]
    assert len(kept) == (len(scores) - count if weight.any() else 0)
    assert max((scores[j] for j in gone), default=0) <= min((scores[j] for j in kept), default=math.inf) * (1 + 1e-5)


# DLP and LSA


def naive_levels(values: list[float]) -> list[float]:
    """The importance 1 - m / Σ m, mapped to [0, 1]."""
    importance = [1 - value / math.fsum(values) for value in values]
    low, high = min(importance), max(importance)
    return [(each - low) / (high - low) for each in importance]


def naive_sparsities(values: list[float], budget: Budget, width: float) -> list[float]:
    """As the authors: densities, with a mean weighted by size."""
    D = [2 * width * level for level in naive_levels(values)]
    mean = math.fsum(d * size for d, size in zip(D, budget.sizes, strict=True)) / sum(budget.sizes)
    return [1 - (d - mean + 1 - budget.target) for d in D]


@parametrize("family", ["llama", "gpt2", "opt"])
def test_dlp_equals_a_sort_of_all_scores(family: str) -> None:
    example("dlp", "allocation")
    model = tiny(family)
    work = bench_of(model)
    scores = naive_allocations.scores(model, work.checkpoint, IDS, "wanda")
    medians = []
    for block in scores:
        flat = sorted(float(s) for linear in block for s in linear)
        medians.append(flat[(len(flat) - 1) // 2])
    check_allocation("dlp", "alpha", work.budget, medians)


def check_allocation(name: str, parameter: str, budget_at: Any, values: list[float]) -> None:
    """Against the authors' formula, from no sparsity to all."""
    for target in (0.02, 0.5, 0.6, 0.97):
        budget = budget_at(target)
        low, high = ALLOCATIONS[name].bounds(budget)[parameter]
        assert (low, high) == (0.0, pytest.approx(min(target, 1 - target) / 2))
        for width in (0.0, high / 3, high):
            found = ALLOCATIONS[name].sparsities(budget, **{parameter: width})
            assert found == pytest.approx(naive_sparsities(values, budget, width), abs=1e-5)
            assert budget.mean(found) == pytest.approx(target, abs=1e-12)
        assert ALLOCATIONS[name].initial_points(budget)[0][parameter] <= high
    for target in (0.0, 1.0):
        budget = budget_at(target)
        assert ALLOCATIONS[name].bounds(budget) == {parameter: (0.0, 0.0)}
        assert ALLOCATIONS[name].sparsities(budget, **{parameter: 0.0}) == (target,) * len(budget.sizes)


def naive_cost(weight: Tensor, x: Tensor) -> float:
    """The half of each 128 columns that costs least, one by one: each cost from the error's definition."""
    H = [[2 * math.fsum(a * b for a, b in zip(u, v, strict=True)) / len(x) for v in x.T.tolist()] for u in x.T.tolist()]
    total = 0.0
    for w in weight.double().tolist():
        gone: list[int] = []
        for start in range(0, len(w), 128):
            left = list(range(start, min(start + 128, len(w))))
            for _ in range(len(left) // 2):
                costs = [w[j] ** 2 * H[j][j] + 2 * w[j] * math.fsum(w[k] * H[j][k] for k in gone) for j in left]
                cheapest = costs.index(min(costs))
                total += costs[cheapest]
                gone.append(left.pop(cheapest))
    return total


@parametrize("shape", [(1, 1), (1, 23), (19, 1), (7, 17), (2, 130)])
def test_the_cost_of_lsa_is_that_of_its_definition(shape: tuple[int, int]) -> None:
    module = example("lsa", "allocation")
    weight, x = problem(shape)
    assert module.mean_cost([(weight, heard(Hessian, x))]) == pytest.approx(naive_cost(weight, x), rel=1e-4, abs=1e-6)


# All of them in one study


@slow
def test_one_study_of_all_three_against_atp(place: Path, command: CommandLine, tmp_path: Path) -> None:
    shutil.copytree(EXAMPLES, place / "plugins")
    keys = (
        'prune.pruners=["wanda", "plugins/ria.py:RIA"]', "prune.ria.power=0.4", "search.sampler=gp",
        'allocation=["atp", "plugins/dlp.py:DLP", "plugins/lsa.py:LSA"]',
    )  # fmt: skip
    words = ("--study", place / "tiny.toml", *settings(*keys), "--trials", "11")
    assert command(*words).error == (
        f"{place}/tiny.toml: prune.pruners: plugins/ria.py:RIA is Python code, which is not run; read it, then allow "
        "it with --trust-plugins"
    )
    answer = script(*words, "--trust-plugins", "--workers", "2")
    assert answer.code == 0
    done = stored(place)
    assert [trial.state for trial in done.trials] == [TrialState.COMPLETE] * 11
    assert {trial.params["pruner"] for trial in done.trials} == {"wanda", "ria"}
    assert {trial.params["allocation"] for trial in done.trials} == {"atp", "dlp", "lsa"}
    facts = done.user_attrs["fingerprint"]
    assert (facts["prune.pruners"], facts["prune.ria.power"]) == (["wanda", "ria"], 0.4)
    assert {key for key in facts if key.startswith("plugins.")} == {
        f"plugins.{n}.content" for n in ("ria", "dlp", "lsa")
    }
    next_ = next(line for line in answer.out.splitlines() if line.startswith("sparse checkpoint: "))
    assert next_.endswith(" --trust-plugins")
    assert " + dlp (alpha = " in answer.out and " + lsa (strength = " in answer.out
