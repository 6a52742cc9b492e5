"""Refinement by conjugate gradients on the mask of any pruner: `prune.refine`."""

from itertools import product
from pathlib import Path
from typing import Any

import naive
import torch
from expect import parametrize, slow
from families import MIXTURES, bench_of, few, tiny
from hypothesis import given
from hypothesis import strategies as st
from plans import planned
from test_prune_pass import naive_pass
from test_pruners import Problem, dtypes, problem, problems, pruned_by, sparsities, tied_problems
from tinystudy import CommandLine, run
from torch import Tensor
from torch.testing import assert_close

from atp_tune.config.best import read_config
from atp_tune.config.prune import PruneConfig
from atp_tune.pruners import PRUNERS, make_pruner
from atp_tune.pruners.refinement import DAMPING

CASES = list(product(PRUNERS, (None, 8)))


def both(name: str, group: int | None, steps: int, case: Problem, sparsity: float) -> tuple[Tensor, Tensor]:
    """The pruned weight of a pruner alone, and refined."""
    given_ = {"group": group}
    return (
        pruned_by(make_pruner(name, given_), *case, sparsity),
        pruned_by(make_pruner(name, given_, steps), *case, sparsity),
    )


def damped(x: Tensor) -> Tensor:
    """XᵀX [in, in] with the damping, in float64; dead inputs have 1 on the diagonal where nothing is damped."""
    H = x.double().T @ x.double()
    H += DAMPING * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)
    H.diagonal()[H.diagonal() == 0] = 1
    return H


def error(weight: Tensor, pruned: Tensor, H: Tensor) -> Tensor:
    """Error of each row [out]."""
    difference = pruned.double() - weight.double()
    return ((difference @ H) * difference).sum(1)


@parametrize(("name", "group"), CASES)
@given(problems() | tied_problems, dtypes, sparsities)
def test_masks_stay_and_no_row_gets_worse(
    name: str, group: int | None, case: Problem, dtype: torch.dtype, sparsity: float
) -> None:
    case = case[0].to(dtype), case[1]
    alone, refined = both(name, group, 3, case, sparsity)
    assert refined.dtype == dtype
    assert torch.equal(refined == 0, alone == 0)
    H = damped(case[1])
    before, after = error(case[0], alone, H), error(case[0], refined, H)
    rounding = error(refined, (1 + torch.finfo(dtype).eps) * refined.double(), H)  # of its entries to the dtype
    assert (after <= 1.01 * before + 2 * (rounding * after).sqrt() + rounding + 1e-6 * before.mean()).all()


@given(problems(), sparsities, st.integers(1, 6))
def test_it_is_conjugate_gradients_row_by_row(case: Problem, sparsity: float, steps: int) -> None:
    weight, x = case
    alone, refined = both("wanda", None, steps, case, sparsity)
    gone, H = alone == 0, damped(x)
    scales = H.diagonal().sqrt()
    scaled = H / torch.outer(scales, scales)
    rows = [
        naive.gradients(b.double() * scales, ~m, w.double() * scales, scaled, steps) / scales
        for b, m, w in zip(alone, gone, weight, strict=True)
    ]
    if not gone.any():
        rows = list(weight.double())
    assert_close(refined.double(), torch.stack(rows), rtol=1e-3, atol=1e-3)


def test_many_steps_are_least_squares_on_the_mask() -> None:
    weight, x = problem((7, 24))
    alone, refined = both("wanda", None, 200, (weight, x), 0.6)
    H = damped(x)
    for row, (b, w) in enumerate(zip(alone, weight.double(), strict=True)):
        kept = b != 0
        exact = torch.linalg.solve(H[kept][:, kept], H[kept] @ w)
        assert_close(refined[row, kept].double(), exact, rtol=1e-3, atol=1e-4)
    assert error(weight, refined, H).sum() < 0.9 * error(weight, alone, H).sum()


@parametrize("way", ["block", "sequential", "dense"])
@parametrize("family", few(["llama", "gpt2", *MIXTURES], ("gpt_oss",)))
def test_it_is_its_naive_pass(family: str, way: Any) -> None:
    def prune(weight: Tensor, x: Tensor, sparsity: float) -> Tensor:
        return pruned_by(make_pruner("wanda", {}, 3), weight, x, sparsity)

    model = tiny(family)
    work = bench_of(model, PruneConfig(refine=3, statistics=way))
    plan = planned("wanda", "atp", (0.4, 0.6, 0.5, 0.5)[: len(work.checkpoint.blocks)])
    found = {block.index: block for block in work.prune(plan)}
    if way == "sequential":  # which `naive_pass` does not do
        alone = bench_of(model, PruneConfig(statistics=way)).prune(plan)
        assert all(found[block.index].error < block.error for block in alone)
        return
    expected = naive_pass(model, work, plan, prune, dense=way == "dense")[0].state_dict()
    for index, block in found.items():
        for linear in work.checkpoint.linears[index]:
            wanted = linear.matrix(expected[work.checkpoint.key(index, linear)])
            pruned = linear.matrix(block.weights[linear.key])
            assert torch.equal(pruned == 0, wanted == 0)
            assert_close(pruned, wanted, rtol=1e-3, atol=1e-3)


# --- by the commands


@slow
def test_a_study_its_best_and_the_folder(place: Path, command: CommandLine) -> None:
    assert run(place, "prune.refine=5").best_value < run(place, name="alone").best_value
    assert read_config(place / "tiny.best.json").prune.refine == 5
    words = ("--config", place / "tiny.best.json", "--out", place / "sparse", "--device", "cpu")
    assert command.ok("apply", *words).out.endswith("(+0.000%)\n")
    assert "refine = 5" in (place / "sparse" / "README.md").read_text()
