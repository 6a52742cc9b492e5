"""Swaps of pruned and kept weights in the masks of a pruner: `prune.swaps`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import bench_of, few, tiny
from hypothesis import given
from hypothesis import strategies as st
from test_prune_pass import atp_plan
from test_pruners import Problem, dtypes, problem, problems, pruned_by, sparsities, tied_problems
from test_refinement import damped, error
from tinystudy import CommandLine, run, settings, stored
from torch import Tensor

from atp_tune.config.best import read_config
from atp_tune.config.prune import PruneConfig
from atp_tune.errors import TrialError, UserError
from atp_tune.pruners import make_pruner, refinement
from atp_tune.pruners.refinement import swapped
from atp_tune.results.summary import summarise

ROUNDS = 500  # more than are needed
KEEPING = [(name, group) for name in ("wanda", "magnitude", "dsnot") for group in (None, 4)]


def both(name: str, group: int | None, case: Problem, sparsity: float, rounds: int = ROUNDS) -> tuple[Tensor, Tensor]:
    """The pruned weight of a pruner alone, and with swaps."""
    given_ = {"group": group}
    alone, improved = make_pruner(name, given_), make_pruner(name, given_, swaps=rounds)
    return pruned_by(alone, *case, sparsity), pruned_by(improved, *case, sparsity)


def scaled(case: Problem) -> tuple[Tensor, Tensor]:
    """W and H in the coordinates in which the diagonal of H is 1, in float64."""
    H = damped(case[1])
    scales = H.diagonal().sqrt()
    return case[0].double() * scales, H / torch.outer(scales, scales)


def naive_gain(mask: Tensor, w: Tensor, H: Tensor, group: int | None) -> float:
    """The most that exchanging one pair of a row can take off its error: each is tried."""

    def loss(gone: Tensor) -> float:
        e = torch.where(gone, w, 0)
        return float(e @ H @ e)

    here, best = loss(mask), 0.0
    for p in mask.nonzero().flatten().tolist():
        for u in (~mask).nonzero().flatten().tolist():
            if w[p] != 0 and (group is None or p // group == u // group):
                other = mask.clone()
                other[p], other[u] = False, True
                best = max(best, here - loss(other))
    return best


@pytest.mark.parametrize(("name", "group"), KEEPING)
@given(problems() | tied_problems, dtypes, sparsities)
def test_no_row_gets_worse_and_none_has_more_zeros(
    name: str, group: int | None, case: Problem, dtype: torch.dtype, sparsity: float
) -> None:
    case = case[0].to(dtype), case[1]
    alone, improved = both(name, group, case, sparsity)
    mask = improved == 0
    assert improved.dtype == dtype
    assert torch.equal(mask.sum(1), (alone == 0).sum(1))
    assert torch.equal(improved[~mask], case[0][~mask])
    if group is not None:
        whole = mask.shape[1] // group * group
        counts = (one[:, :whole].reshape(-1, group).sum(1) for one in (mask, alone == 0))
        assert torch.equal(*counts)
    live = (case[1] != 0).any(0)
    before, after = (error(case[0][:, live], one[:, live], damped(case[1])[live][:, live]) for one in (alone, improved))
    assert (after <= before * 1.0001 + 1e-6 * before.mean()).all()


@pytest.mark.parametrize("group", [None, 4])
@given(st.integers(0, 2**30), st.sampled_from([(4, 12), (3, 17), (2, 40)]), st.sampled_from([0.25, 0.5, 0.75]))
def test_in_the_end_no_pair_would_lower_the_error(
    group: int | None, seed: int, shape: tuple[int, int], sparsity: float
) -> None:
    """With all columns as candidates."""
    case = problem(shape, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refinement, "CANDIDATES", shape[1])
        _, improved = both("wanda", group, case, sparsity)
    W, H = scaled(case)
    for row, pruned in zip(W, improved, strict=True):
        mask = pruned == 0
        e = torch.where(mask, row, 0)
        assert naive_gain(mask, row, H, group) <= 1e-4 * float(e @ H @ e) + 1e-6


def test_a_round_exchanges_the_best_pair_of_a_row() -> None:
    """Where it exchanges one alone: by the error after each possible exchange."""
    seen = 0
    for seed in range(40):
        case = problem((1, 14), seed)
        alone, improved = both("wanda", None, case, 0.5, 1)
        W, H = scaled(case)
        if int((alone != improved).sum()) == 2:
            losses = [float(e @ H @ e) for one in (alone, improved) for e in [torch.where(one[0] == 0, W[0], 0)]]
            assert losses[0] - losses[1] == pytest.approx(naive_gain(alone[0] == 0, W[0], H, None), rel=1e-3)
            seen += 1
    assert seen > 5


def test_much_of_the_error_goes() -> None:
    case = problem((32, 256))
    H = damped(case[1])
    for group in (None, 4):
        alone, improved = (error(case[0], one, H).sum() for one in both("wanda", group, case, 0.5))
        assert improved < 0.9 * alone


def test_parts_of_the_rows_are_worked_on_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    case = problem((30, 64))
    W, H = (one.float() for one in scaled(case))
    mask = both("wanda", None, case, 0.6)[0] == 0
    whole = swapped(mask, W, H, 20)
    monkeypatch.setattr(refinement, "NUMBERS", 7 * 64)
    assert float((swapped(mask, W, H, 20) != whole).float().mean()) < 0.01  # sums of other sizes round otherwise


def test_a_wide_row_exchanges_several_pairs_in_a_round() -> None:
    case = problem((4, 2 * refinement.WIDTH))
    alone, improved = both("wanda", None, case, 0.5, 1)
    assert bool(((alone != improved).sum(1) > 2).any())


@pytest.mark.parametrize("name", ["sparsegpt", "alps"])
def test_a_pruner_that_changes_weights_is_refused(name: str, place: Path, command: CommandLine) -> None:
    with pytest.raises(UserError, match="changes weights that it keeps"):
        both(name, None, problem((6, 21)), 0.5)
    for words in ((), ("prune", "--beta", "0")):
        given_ = settings(f"prune.pruners=['wanda', '{name}']", "prune.swaps=3")
        answer = command(*words, "--study", place / "tiny.toml", *given_)
        said = f"prune.swaps: {name} changes weights that it keeps; take wanda, magnitude or dsnot, or 0"
        assert said in answer.error
    assert not (place / "tiny.db").exists()


def test_a_weight_on_a_dead_input_stays_pruned() -> None:
    """Only the damping would make it count."""
    weight, x = problem((9, 40))
    x[:, ::4] = 0
    alone, improved = both("wanda", None, (weight, x), 0.5)
    assert bool((alone[:, ::4] == 0).all()) and bool((improved[:, ::4] == 0).all())
    assert not torch.equal(alone, improved)


def test_weights_that_are_not_finite_are_not_taken_for_changed_ones() -> None:
    weight, x = problem((6, 21))
    weight[2, 3] = torch.nan
    assert torch.equal(both("wanda", None, (weight, x), 0.5)[1].isnan(), weight.isnan())


def test_without_live_inputs_nothing_changes() -> None:
    weight, x = problem((6, 21))
    alone, improved = both("magnitude", None, (weight, 0 * x), 0.5)
    assert torch.equal(alone, improved)


def test_what_is_not_finite_is_refused() -> None:
    weight, x = problem((6, 21))
    x[3, 4] = torch.inf
    with pytest.raises(TrialError, match="Hessian not finite"):
        both("magnitude", None, (weight, x), 0.5)


@pytest.mark.parametrize("way", few(["block", "sequential", "dense"], ["block"]))
def test_the_output_of_each_block_is_nearer_to_the_dense_model_s(way: Any) -> None:
    model, errors = tiny("llama"), []
    for rounds, steps in ((0, 0), (20, 0), (20, 10)):
        work = bench_of(model, PruneConfig(swaps=rounds, refine=steps, statistics=way))
        errors.append([block.error for block in work.prune(atp_plan(work, "wanda"))])
    assert all(refined < improved < alone for alone, improved, refined in zip(*errors, strict=True))


# --- by the commands


SWAPPED = ("prune.swaps=20",)


@pytest.mark.slow
def test_a_study_its_best_and_the_folder(place: Path, command: CommandLine) -> None:
    study = run(place, *SWAPPED)
    assert study.best_value < run(place, name="alone").best_value
    assert study.user_attrs["fingerprint"]["prune.swaps"] == 20
    assert read_config(place / "tiny.best.json").prune.swaps == 20
    answer = command("apply", "--config", place / "tiny.best.json", "--out", place / "sparse", "--device", "cpu")
    assert answer.code == 0, answer.err
    assert answer.out.endswith("(+0.000%)\n")
    assert "swaps = 20" in (place / "sparse" / "README.md").read_text()
    answer = command("export", "--config", place / "tiny.best.json", "--format", "llm-compressor", "--out", place / "x")
    assert "prune.swaps = 20: llm-compressor has no swaps in masks" in answer.error


@pytest.mark.slow
def test_results_say_how_they_are_refined(place: Path, command: CommandLine) -> None:
    said = "Pruned weights are refined by 20 rounds of swaps in their masks and 1 step of conjugate gradients, those of"
    assert said in command("--study", place / "tiny.toml", *settings(*SWAPPED, "prune.refine=1")).out
    assert summarise(stored(place)).made_from is not None
    answer = command("--study", place / "tiny.toml", *settings("prune.refine=1"))
    assert "prune.swaps" in answer.error
