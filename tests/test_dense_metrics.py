import gc
import weakref
from typing import Any

import naive_allocations as naive
import numpy as np
import pytest
import torch
from expect import parametrize
from families import bench_of, few, random_ids, tiny

from atp_tune.allocations import DenseMetricsProtocol
from atp_tune.blocks import dense_metrics
from atp_tune.config.prune import make_plan
from atp_tune.run.session import Session

FAMILIES = ["llama", "gpt2", "opt"]
IDS = random_ids(5)  # the calibration windows of a tiny bench


def metrics_of(work: Session) -> DenseMetricsProtocol:
    found = work.budget(0.5).dense_metrics
    assert found is not None
    return found


def rounded(family: str) -> Any:
    """A model whose weights are multiples of 1/8, so that many scores are equal."""
    model = tiny(family)
    for parameter in model.parameters():
        parameter.data = (parameter.data * 8).round() / 8
    return model


@parametrize("family", FAMILIES)
def test_outlier_ratios_equal_a_double_loop(family: str) -> None:
    model = tiny(family)
    work = bench_of(model)
    scores = naive.scores(model, work.checkpoint, IDS, "wanda")
    for threshold in (1.0, 2.5, 3.0, 3.7182818):
        found = metrics_of(work).outlier_ratios(threshold)
        assert found == naive.outlier_ratios(scores, threshold)
        assert len(set(found)) > 1  # or the comparison says little
    assert metrics_of(work).outlier_ratios(1e9) == (0.0,) * len(work.checkpoint.blocks)


def test_a_score_at_the_threshold_is_no_outlier() -> None:
    """Compared in float64: float32 would round the threshold up to the score, or down below it."""
    scores = torch.tensor([[0.1, 0.3]])
    mean = float(scores.double().mean())
    at = float(scores[0, 1].double()) / mean
    exact = [
        threshold
        for threshold in (at, np.nextafter(at, 0), np.nextafter(at, 9))
        if threshold * mean != float(scores[0, 1])
    ]
    assert len(exact) >= 1
    for threshold in exact:
        assert dense_metrics.outlier_ratio([scores], threshold) == (
            0.5 if threshold * mean < float(scores[0, 1]) else 0.0
        )
    assert dense_metrics.outlier_ratio([torch.ones(3, 5), torch.ones(2, 2)], 1.0) == 0


# Exponents


@parametrize("family", FAMILIES)
def test_exponents_equal_a_fit_by_search(family: str) -> None:
    model = tiny(family)
    work = bench_of(model)
    found = metrics_of(work).tail_exponents()
    for exponents, block in zip(found, naive.linears_of(work.checkpoint), strict=True):
        expected = [naive.tail_exponent(naive.spectrum(naive.matrix(model, *linear))) for linear in block]
        assert exponents == pytest.approx(expected, rel=1e-6)


@parametrize("scale", [1e-3, 1.0, 1e3])
def test_exponents_of_heavy_tails(scale: float) -> None:
    """Small eigenvalues leave the lower side open, large ones close it: both ways of the authors' bound."""
    generator = np.random.default_rng(0)
    for exponent in (1.5, 2.5, 4.0):
        values = sorted(float(x) for x in scale * (generator.pareto(exponent - 1, 400) + 1))
        found = dense_metrics.tail_exponent(torch.tensor(values, dtype=torch.float64))
        assert found == pytest.approx(naive.tail_exponent(values), rel=1e-6)
        assert found == pytest.approx(exponent, rel=0.25)


# Global


@parametrize("score", ["magnitude", "wanda"])
@parametrize("family", few(FAMILIES, FAMILIES[:1]))
def test_global_equals_a_sort_of_all_scores(family: str, score: Any) -> None:
    model = tiny(family)
    work = bench_of(model)
    scores = naive.scores(model, work.checkpoint, IDS, score)
    for target in (0.0, 0.001, 0.37, 0.5, 0.93, 1.0):
        mask = naive.global_mask(scores, target)
        expected = tuple(tuple(sum(part) / len(part) for part in block) for block in mask)
        found = metrics_of(work).global_sparsities(target, score)
        assert [pytest.approx(block, abs=1e-15) for block in expected] == list(found), target


@parametrize("target", [0.2, 0.61])
@parametrize("family", FAMILIES)
def test_magnitude_takes_the_lowest_of_the_model(family: str, target: float) -> None:
    """To the last weight, with many that are equal: no share may be rounded to one weight less."""
    model = rounded(family)
    work = bench_of(model)
    mask = naive.global_mask(naive.scores(model, work.checkpoint, IDS, "magnitude"), target)
    plan = make_plan("magnitude", "global", work.budget(target), {})
    for block in work.prune(plan):
        for linear, gone in zip(work.checkpoint.linears[block.index], mask[block.index], strict=True):
            dense = linear.matrix(work.checkpoint.weights(block.index)[linear.key])
            wanted = dense.masked_fill(torch.tensor(gone).view(dense.shape), 0)
            assert torch.equal(linear.matrix(block.weights[linear.key]), wanted)


def test_scores_that_differ_in_their_last_bits_alone() -> None:
    """Both halves of the bit patterns matter, also across the border of the upper one."""
    patterns = torch.tensor([0, 1, 2, 65535, 65536, 65537, 131071, 131072, 2**30, 2**30 + 1, 2**30 + 1, 2**31 - 2**23])
    shuffled = patterns[torch.randperm(len(patterns), generator=torch.Generator().manual_seed(0))].to(torch.int32)
    scores = [[shuffled[:4].view(torch.float32), shuffled[4:5].view(torch.float32)], [shuffled[5:].view(torch.float32)]]
    flat = shuffled.tolist()
    for count in range(len(flat) + 1):
        gone = sorted(range(len(flat)), key=lambda j: flat[j])[:count]
        expected = [[sum(j < 4 for j in gone), sum(j == 4 for j in gone)], [sum(j > 4 for j in gone)]]
        assert dense_metrics.lowest_counts(lambda: iter(scores), count) == expected


# Once per bench


@parametrize("allocation", few(["owl", "alphapruning", "alphapruning-linear", "er", "erk", "global"], ["owl"]))
def test_a_bench_is_freed_with_its_last_name(allocation: str) -> None:
    """At once, not when the garbage collector comes by: its memory is wanted for what is loaded next."""
    gc.collect()
    gc.disable()
    try:
        work = bench_of(tiny("llama"))
        plan = make_plan("wanda", allocation, work.budget(0.5), {})
        list(work.prune(plan))
        alive, weights = weakref.ref(work), weakref.ref(work.checkpoint)
        del work
        assert alive() is None and weights() is None
    finally:
        gc.enable()
